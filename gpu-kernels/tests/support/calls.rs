//! Calls of the driver for tests. Each returns its error, if there is one. They are safe because the fake checks handles and
//! addresses itself; they are not for a real driver.

use cudarc::driver::{CudaContext, DriverError, result, sys};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::Arc;
use sys::CUresult as E;

/// A delay that is long against the fake's random delays.
pub(crate) const LATE_US: u32 = 20_000;
/// A delay for a race that has to be lost at the first try: the fake adds the time in which a thread of the test has no core.
pub(crate) const FAR_LATER_US: u32 = 200_000;
/// Bytes of most copies here.
pub(crate) const BYTES: usize = 8192;
const DEVICEMAP: u32 = 2;

/// A raw call's error.
pub(crate) fn error(result: E) -> Option<E> {
    (result != E::CUDA_SUCCESS).then_some(result)
}

/// The error of a call through cudarc's `result`.
pub(crate) fn why<T: std::fmt::Debug>(result: Result<T, DriverError>) -> Option<E> {
    result.err().map(|error| error.0)
}

/// Makes the context of device 0 current.
pub(crate) fn context() -> Arc<CudaContext> {
    let context = CudaContext::new(0).unwrap();
    // SAFETY: cudarc has made no stream or slice yet.
    unsafe { context.disable_event_tracking() };
    context
}

/// A stream that does not wait for the default one.
pub(crate) fn stream() -> sys::CUstream {
    result::stream::create(result::stream::StreamKind::NonBlocking).unwrap()
}

/// An event.
pub(crate) fn event() -> sys::CUevent {
    result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).unwrap()
}

/// Device memory.
pub(crate) fn device(bytes: usize) -> u64 {
    // SAFETY: an allocation; the tests write before they read.
    unsafe { result::malloc_sync(bytes) }.unwrap()
}

/// Shared memory of a whole number of pages, as the arena is. It stays mapped.
pub(crate) fn shared(bytes: usize) -> *mut c_void {
    // SAFETY: a new mapping.
    unsafe { mmap_anonymous(null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED) }
        .unwrap()
}

/// Registers host memory, mapped for the device.
pub(crate) fn register(address: *mut c_void, bytes: usize) -> Option<E> {
    // SAFETY: the fake checks the addresses itself; the memory stays mapped.
    error(unsafe { sys::cuMemHostRegister_v2(address, bytes, DEVICEMAP) })
}

/// A copy on a stream.
pub(crate) fn to_host(to: *mut c_void, from: u64, bytes: usize, stream: sys::CUstream) -> Option<E> {
    // SAFETY: the fake checks registered ranges, and the tests give no others that are not writable.
    error(unsafe { sys::cuMemcpyDtoHAsync_v2(to, from, bytes, stream) })
}

/// A copy on a stream.
pub(crate) fn to_device(to: u64, from: *const c_void, bytes: usize, stream: sys::CUstream) -> Option<E> {
    // SAFETY: as in `to_host`.
    error(unsafe { sys::cuMemcpyHtoDAsync_v2(to, from, bytes, stream) })
}

/// Records an event.
pub(crate) fn record(event: sys::CUevent, stream: sys::CUstream) -> Option<E> {
    // SAFETY: the fake knows its handles.
    why(unsafe { result::event::record(event, stream) })
}

/// Lets a stream wait for an event.
pub(crate) fn wait_for(stream: sys::CUstream, event: sys::CUevent) -> Option<E> {
    // SAFETY: the fake knows its handles.
    why(unsafe { result::stream::wait_event(stream, event, sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT) })
}

/// Looks at an event: no error means that it has come.
pub(crate) fn query(event: sys::CUevent) -> Option<E> {
    // SAFETY: the fake knows its handles.
    why(unsafe { result::event::query(event) })
}

/// Waits for a stream.
pub(crate) fn finish(stream: sys::CUstream) -> Option<E> {
    // SAFETY: the fake knows its handles.
    why(unsafe { result::stream::synchronize(stream) })
}

/// Waits for all streams.
pub(crate) fn finish_all() {
    // SAFETY: the call touches no memory of this process.
    assert_eq!(error(unsafe { sys::cuCtxSynchronize() }), None);
}

/// Reads memory of the test, or of the fake's device.
pub(crate) fn bytes_at(address: *const c_void, bytes: usize) -> Vec<u8> {
    // SAFETY: memory of the test or of the fake, which no stream writes any more.
    unsafe { std::slice::from_raw_parts(address.cast(), bytes) }.to_vec()
}

/// Sets this thread's capture mode, and returns the one before.
pub(crate) fn exchange(mode: sys::CUstreamCaptureMode) -> sys::CUstreamCaptureMode {
    let mut mode = mode;
    // SAFETY: the mode is read and written.
    assert_eq!(error(unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut mode) }), None);
    mode
}

/// Starts a capture.
pub(crate) fn begin(stream: sys::CUstream) {
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
    // SAFETY: the fake knows its handles.
    unsafe { result::stream::begin_capture(stream, mode) }.unwrap();
}

/// Ends a capture, and throws the graph away.
pub(crate) fn end(stream: sys::CUstream) -> Option<E> {
    // SAFETY: the fake knows its handles.
    match unsafe { result::stream::end_capture(stream) } {
        // SAFETY: as above; the graph is not used any more.
        Ok(graph) => why(unsafe { result::graph::destroy(graph) }),
        Err(error) => Some(error.0),
    }
}
