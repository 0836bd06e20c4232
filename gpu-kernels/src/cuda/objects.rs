//! Objects that are made in a context, and destroyed when they are dropped.

use super::api::NOT_READY;
use super::device::Context;
use super::error::GpuError;
use core::ffi::{c_int, c_void};
use cudarc::driver::sys::{CUdeviceptr, CUevent, CUstream};
use std::sync::{Arc, Mutex, PoisonError};

/// `CU_STREAM_NON_BLOCKING`: it does not wait for the default stream, nor the default stream for it.
const NON_BLOCKING: u32 = 1;
/// `CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING`: a thread that waits for it sleeps.
const EVENT_FLAGS: u32 = 1 | 2;
/// `CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP`.
const HOST_FLAGS: u32 = 1 | 2;

/// A stream of our own: non-blocking, and of the lowest priority, so that the model's kernels go first.
pub(super) struct Stream {
    context: Arc<Context>,
    raw: CUstream,
}

// SAFETY: a stream may be used from any thread.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    pub(super) fn new(context: &Arc<Context>) -> Result<Stream, GpuError> {
        let _entered = context.enter()?;
        let (mut least, mut greatest): (c_int, c_int) = (0, 0);
        let mut raw = core::ptr::null_mut();
        // SAFETY: writes two numbers and an address; destroyed once, by `drop`.
        unsafe {
            context.api.cuCtxGetStreamPriorityRange(&raw mut least, &raw mut greatest)?;
            context.api.cuStreamCreateWithPriority(&raw mut raw, NON_BLOCKING, least)?;
        }
        Ok(Stream { context: context.clone(), raw })
    }

    pub(super) fn raw(&self) -> CUstream {
        self.raw
    }

    /// Work that is put on it from now on waits for the event.
    pub(super) fn wait_for(&self, event: &Event) -> Result<(), GpuError> {
        // SAFETY: both are of this context, and live.
        unsafe { self.context.api.cuStreamWaitEvent(self.raw, event.raw, 0) }
    }

    /// Waits until all that was put on it has ended, or has failed.
    pub(super) fn synchronize(&self) -> Result<(), GpuError> {
        // SAFETY: it lives.
        unsafe { self.context.api.cuStreamSynchronize(self.raw) }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Ok(_entered) = self.context.enter() {
            // SAFETY: created once. The driver destroys it only after it has done its work.
            let _ = unsafe { self.context.api.cuStreamDestroy_v2(self.raw) };
        }
    }
}

/// An event.
pub(super) struct Event {
    context: Arc<Context>,
    raw: CUevent,
}

// SAFETY: an event may be used from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// The caller has entered the context.
    fn new(context: &Arc<Context>) -> Result<Event, GpuError> {
        let mut raw = core::ptr::null_mut();
        // SAFETY: writes one address; destroyed once, by `drop`.
        unsafe { context.api.cuEventCreate(&raw mut raw, EVENT_FLAGS) }?;
        Ok(Event { context: context.clone(), raw })
    }

    /// Records the event: it comes when everything has been done that is on the stream now. The stream may be somebody else's.
    pub(super) fn record(&self, stream: CUstream) -> Result<(), GpuError> {
        // SAFETY: the event lives; for a stream that does not live the driver returns an error.
        unsafe { self.context.api.cuEventRecord(self.raw, stream) }
    }

    /// Has it come?
    pub(super) fn has_come(&self) -> Result<bool, GpuError> {
        // SAFETY: it lives.
        match unsafe { self.context.api.cuEventQuery(self.raw) } {
            Ok(()) => Ok(true),
            Err(GpuError::Call { code: NOT_READY, .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Sleeps until it has come, or until the device has failed.
    pub(super) fn synchronize(&self) -> Result<(), GpuError> {
        // SAFETY: it lives.
        unsafe { self.context.api.cuEventSynchronize(self.raw) }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Ok(_entered) = self.context.enter() {
            // SAFETY: created once.
            let _ = unsafe { self.context.api.cuEventDestroy_v2(self.raw) };
        }
    }
}

/// Events that are used again, because making one takes longer than recording it.
pub(super) struct Events {
    context: Arc<Context>,
    free: Mutex<Vec<Event>>,
}

impl Events {
    pub(super) fn new(context: &Arc<Context>) -> Arc<Events> {
        Arc::new(Events { context: context.clone(), free: Mutex::default() })
    }

    /// One of them, recorded on the stream. The caller has entered the context.
    pub(super) fn record(self: &Arc<Events>, stream: CUstream) -> Result<Recorded, GpuError> {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let event = free.map_or_else(|| Event::new(&self.context), Ok)?;
        event.record(stream)?;
        Ok(Recorded { event: Some(event), events: self.clone() })
    }
}

/// An event that has been recorded, and can be used again when this is dropped. A stream that waits for it has been told so
/// before that, and recording the event again does not change what the stream waits for.
pub(super) struct Recorded {
    event: Option<Event>,
    events: Arc<Events>,
}

impl Recorded {
    pub(super) fn event(&self) -> Option<&Event> {
        self.event.as_ref()
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        if let Some(event) = self.event.take() {
            self.events.free.lock().unwrap_or_else(PoisonError::into_inner).push(event);
        }
    }
}

/// Device memory.
pub(super) struct DeviceBuffer {
    context: Arc<Context>,
    address: CUdeviceptr,
    bytes: usize,
}

impl DeviceBuffer {
    pub(super) fn new(context: &Arc<Context>, bytes: usize) -> Result<DeviceBuffer, GpuError> {
        let _entered = context.enter()?;
        let mut address = 0;
        // SAFETY: writes one address; freed once, by `drop`.
        unsafe { context.api.cuMemAlloc_v2(&raw mut address, bytes.max(1)) }?;
        Ok(DeviceBuffer { context: context.clone(), address, bytes })
    }

    pub(super) fn address(&self) -> u64 {
        self.address
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        if let Ok(_entered) = self.context.enter() {
            // SAFETY: allocated once; all work that used it has ended.
            let _ = unsafe { self.context.api.cuMemFree_v2(self.address) };
        }
    }
}

/// Pinned host memory, which kernels can write.
pub(super) struct HostBuffer {
    context: Arc<Context>,
    address: *mut c_void,
    alias: CUdeviceptr,
    bytes: usize,
}

// SAFETY: an address of memory; each use says who touches the memory, and when.
unsafe impl Send for HostBuffer {}
// SAFETY: as above.
unsafe impl Sync for HostBuffer {}

impl HostBuffer {
    pub(super) fn new(context: &Arc<Context>, bytes: usize) -> Result<HostBuffer, GpuError> {
        let _entered = context.enter()?;
        let mut address = core::ptr::null_mut();
        // SAFETY: writes one address; freed once, by `drop`.
        unsafe { context.api.cuMemHostAlloc(&raw mut address, bytes.max(1), HOST_FLAGS) }?;
        let mut buffer = HostBuffer { context: context.clone(), address, alias: 0, bytes };
        // SAFETY: writes one address.
        unsafe { context.api.cuMemHostGetDevicePointer_v2(&raw mut buffer.alias, address, 0) }?;
        Ok(buffer)
    }

    pub(super) fn host(&self) -> *mut u8 {
        self.address.cast()
    }

    /// The address by which the device knows it.
    pub(super) fn alias(&self) -> u64 {
        self.alias
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for HostBuffer {
    fn drop(&mut self) {
        if let Ok(_entered) = self.context.enter() {
            // SAFETY: allocated once; all work that used it has ended.
            let _ = unsafe { self.context.api.cuMemFreeHost(self.address) };
        }
    }
}
