//! For benchmarks and tests: a device's memory, registered host memory, plain copies on streams, a gather alone.
//!
//! Benchmarks compare a [`CudaBackend`](crate::CudaBackend) with these, and tests look at what it has copied through them.
//! Nothing here is needed to move KV.

use super::device::{Context, DeviceInfo};
use super::error::GpuError;
use super::kernels::{Kernel, Kernels, Launch};
use super::objects::{DeviceBuffer, Events, Recorded, Stream};
use super::prepared::Tiled;
use crate::batch::ComputeStream;
use crate::layout::PagedKv;
use core::ffi::c_int;
use cudarc::driver::sys::culib;
use std::sync::Arc;

/// `CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID`, `…_BUS_ID`, `…_DEVICE_ID`.
const PCI: [c_int; 3] = [50, 33, 34];
/// `CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP`, as the arena's.
const REGISTER_FLAGS: u32 = 1 | 2;

/// A device, in the context that a backend uses too.
#[derive(Clone)]
pub struct Device {
    context: Arc<Context>,
    events: Arc<Events>,
}

impl core::fmt::Debug for Device {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_tuple("Device").field(&self.context.info).finish()
    }
}

impl Device {
    /// Opens it.
    pub fn open(device: u32) -> Result<Device, GpuError> {
        let context = Context::open(device)?;
        let events = Events::new(&context);
        Ok(Device { context, events })
    }

    /// What the driver says of it.
    #[must_use]
    pub fn info(&self) -> &DeviceInfo {
        &self.context.info
    }

    /// The driver's CUDA version: 1000 × major + 10 × minor.
    #[must_use]
    pub fn cuda_version(&self) -> Option<u32> {
        type Version = unsafe extern "C" fn(*mut c_int) -> u32;
        // SAFETY: the library is there, or there would be no context; the type is that of the driver's function.
        let get = unsafe { culib().get::<Version>(b"cuDriverGetVersion\0") }.ok()?;
        let mut version = 0;
        // SAFETY: writes one number.
        let code = unsafe { get(&raw mut version) };
        u32::try_from(version).ok().filter(|_| code == 0)
    }

    /// Its place on the PCI bus, as `/sys/bus/pci/devices` names it.
    #[must_use]
    pub fn pci_address(&self) -> Option<String> {
        let api = self.context.api;
        let mut device = 0;
        // SAFETY: writes one number.
        unsafe { api.cuDeviceGet(&raw mut device, c_int::try_from(self.info().device).ok()?) }.ok()?;
        let mut found = [0; 3];
        for (attribute, value) in PCI.into_iter().zip(&mut found) {
            // SAFETY: writes one number.
            unsafe { api.cuDeviceGetAttribute(&raw mut *value, attribute, device) }.ok()?;
        }
        let [domain, bus, slot] = found;
        Some(format!("{domain:04x}:{bus:02x}:{slot:02x}.0"))
    }

    /// Allocates memory of the device. Its content is arbitrary.
    pub fn allocate(&self, bytes: usize) -> Result<DeviceMemory, GpuError> {
        DeviceBuffer::new(&self.context, bytes).map(DeviceMemory)
    }

    /// Makes a stream: non-blocking and of the lowest priority, as a backend's streams are.
    pub fn stream(&self) -> Result<PlainStream, GpuError> {
        let stream = Stream::new(&self.context)?;
        Ok(PlainStream { stream, context: self.context.clone(), events: self.events.clone() })
    }

    /// Registers host memory, with the same flags as the arena.
    ///
    /// # Safety
    /// The memory stays mapped until the result is dropped, and all copies from and to it have ended by then.
    pub unsafe fn register(&self, host: *mut u8, bytes: usize) -> Result<Registered, GpuError> {
        let _entered = self.context.enter()?;
        // SAFETY: as the caller promises; for a range that is not mapped the driver returns an error.
        unsafe { self.context.api.cuMemHostRegister_v2(host.cast(), bytes, REGISTER_FLAGS) }?;
        Ok(Registered { context: self.context.clone(), host })
    }
}

/// Memory of a device, freed when this is dropped. All work that uses it has ended by then.
pub struct DeviceMemory(DeviceBuffer);

impl DeviceMemory {
    /// Its address on the device.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.0.address()
    }

    /// Its length.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.0.bytes()
    }
}

impl core::fmt::Debug for DeviceMemory {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "DeviceMemory({} bytes)", self.bytes())
    }
}

/// Host memory that is registered, until this is dropped.
pub struct Registered {
    context: Arc<Context>,
    host: *mut u8,
}

// SAFETY: an address that is never dereferenced.
unsafe impl Send for Registered {}

impl core::fmt::Debug for Registered {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_tuple("Registered").field(&self.host).finish()
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        if let Ok(_entered) = self.context.enter() {
            // SAFETY: registered once; all copies have ended, as the caller of `register` has promised.
            let _ = unsafe { self.context.api.cuMemHostUnregister(self.host.cast()) };
        }
    }
}

/// A stream for plain copies. Dropping it does not wait for them.
pub struct PlainStream {
    stream: Stream,
    context: Arc<Context>,
    events: Arc<Events>,
}

impl core::fmt::Debug for PlainStream {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("PlainStream")
    }
}

impl PlainStream {
    /// The driver's handle, in the form in which torch gives that of its own stream.
    #[must_use]
    pub fn compute_stream(&self) -> ComputeStream {
        ComputeStream(self.stream.raw() as u64)
    }

    /// Puts a copy from the device to the host on it.
    ///
    /// # Safety
    /// Both ranges are memory until the copy has ended, and nobody else accesses `to`.
    pub unsafe fn to_host(&self, to: *mut u8, from: u64, bytes: usize) -> Result<(), GpuError> {
        let _entered = self.context.enter()?;
        // SAFETY: as the caller promises.
        unsafe { self.context.api.cuMemcpyDtoHAsync_v2(to.cast(), from, bytes, self.stream.raw()) }
    }

    /// Puts a copy from the host to the device on it.
    ///
    /// # Safety
    /// Both ranges are memory until the copy has ended, and nobody else accesses `to`, or writes `from`.
    pub unsafe fn to_device(&self, to: u64, from: *const u8, bytes: usize) -> Result<(), GpuError> {
        let _entered = self.context.enter()?;
        // SAFETY: as the caller promises.
        unsafe { self.context.api.cuMemcpyHtoDAsync_v2(to, from.cast(), bytes, self.stream.raw()) }
    }

    /// A mark at the point that it has reached.
    pub fn mark(&self) -> Result<Mark, GpuError> {
        let _entered = self.context.enter()?;
        let recorded = self.events.record(self.stream.raw())?;
        Ok(Mark { context: self.context.clone(), recorded })
    }

    /// Waits until all that was put on it has ended.
    pub fn synchronize(&self) -> Result<(), GpuError> {
        let _entered = self.context.enter()?;
        self.stream.synchronize()
    }
}

/// A point on a stream.
pub struct Mark {
    context: Arc<Context>,
    recorded: Recorded,
}

impl core::fmt::Debug for Mark {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Mark")
    }
}

impl Mark {
    /// Has the device reached it?
    pub fn has_come(&self) -> Result<bool, GpuError> {
        let _entered = self.context.enter()?;
        self.recorded.event().map_or(Ok(true), |event| event.has_come())
    }
}

/// The gather kernel alone, without what a backend does around it.
pub struct Gather {
    kernels: Kernels,
    tiled: Tiled,
}

impl core::fmt::Debug for Gather {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Gather")
    }
}

impl Gather {
    /// For a cache in this device's memory.
    pub fn new(device: &Device, paged: &PagedKv) -> Result<Gather, GpuError> {
        let kernels = Kernels::load(&device.context)?;
        let tiled = Tiled::of(&device.context, paged, |_| 0)?;
        Ok(Gather { kernels, tiled })
    }

    /// Puts the gather of one chunk on a stream, with at most `grid` blocks of threads in each launch.
    ///
    /// # Safety
    /// The cache has these blocks, and `shard` is a multiple of 16. Until the kernels have run, the blocks' pages and the shard's
    /// bytes from `shard` on are memory of the device; nobody writes the pages, and nobody else accesses the shard's bytes.
    pub unsafe fn chunk(
        &self,
        blocks: &[u32],
        shard: u64,
        grid: u32,
        stream: &PlainStream,
    ) -> Result<(), GpuError> {
        let _entered = stream.context.enter()?;
        for window in &self.tiled.whole {
            let (vector, tiles) = (self.tiled.vector, self.tiled.table.address());
            let launch = Launch { vector, tiles, window, shard, blocks, grid_max: grid };
            // SAFETY: as the caller promises.
            unsafe { self.kernels.copy(Kernel::Gather, &launch, stream.stream.raw()) }?;
        }
        Ok(())
    }
}
