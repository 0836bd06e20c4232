//! Finds the GPUs, and opens the context in which this process uses one.

use super::api::Api;
use super::error::GpuError;
use core::ffi::c_int;
use cudarc::driver::sys::{CUcontext, CUdevice};
use std::sync::Arc;

const MULTIPROCESSOR_COUNT: c_int = 16;
const COMPUTE_CAPABILITY_MAJOR: c_int = 75;
const COMPUTE_CAPABILITY_MINOR: c_int = 76;
const CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM: c_int = 91;

/// `CU_STREAM_CAPTURE_MODE_RELAXED`.
const RELAXED: c_int = 2;

/// A GPU, as the driver describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its number for this process.
    pub device: u32,
    /// Its product name.
    pub name: String,
    /// Compute capability, major and minor.
    pub compute_capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of memory.
    pub memory_bytes: u64,
}

/// The GPUs of this process. Never panics, whatever is missing: no driver, no device, a stub library or a driver that is too
/// old are errors that say so.
pub fn probe() -> Result<Vec<DeviceInfo>, GpuError> {
    let api = Api::get()?;
    (0..count(api)?).map(|device| describe(api, device, handle(api, device)?)).collect()
}

fn count(api: &Api) -> Result<u32, GpuError> {
    let mut count = 0;
    // SAFETY: writes one number.
    unsafe { api.cuDeviceGetCount(&raw mut count) }?;
    match u32::try_from(count) {
        Ok(0) | Err(_) => Err(GpuError::NoDevice),
        Ok(count) => Ok(count),
    }
}

fn handle(api: &Api, device: u32) -> Result<CUdevice, GpuError> {
    let count = count(api)?;
    let ordinal = c_int::try_from(device).ok().filter(|_| device < count);
    let ordinal = ordinal.ok_or(GpuError::Device { device, count })?;
    let mut handle = 0;
    // SAFETY: writes one number.
    unsafe { api.cuDeviceGet(&raw mut handle, ordinal) }?;
    Ok(handle)
}

fn attribute(api: &Api, device: CUdevice, attribute: c_int) -> Result<u32, GpuError> {
    let mut value = 0;
    // SAFETY: writes one number.
    unsafe { api.cuDeviceGetAttribute(&raw mut value, attribute, device) }?;
    Ok(u32::try_from(value).unwrap_or(0))
}

fn describe(api: &Api, device: u32, handle: CUdevice) -> Result<DeviceInfo, GpuError> {
    let mut name = [0u8; 128];
    let mut memory_bytes = 0usize;
    // SAFETY: writes at most as many bytes as it is told, and one number.
    unsafe {
        api.cuDeviceGetName(name.as_mut_ptr().cast(), name.len() as c_int, handle)?;
        api.cuDeviceTotalMem_v2(&raw mut memory_bytes, handle)?;
    }
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    Ok(DeviceInfo {
        device,
        name: String::from_utf8_lossy(&name[..end]).into_owned(),
        compute_capability: (
            attribute(api, handle, COMPUTE_CAPABILITY_MAJOR)?,
            attribute(api, handle, COMPUTE_CAPABILITY_MINOR)?,
        ),
        multiprocessors: attribute(api, handle, MULTIPROCESSOR_COUNT)?,
        memory_bytes: memory_bytes as u64,
    })
}

/// A device's primary context. It is torch's too, so streams and addresses of torch's can be used here.
pub(super) struct Context {
    pub(super) api: &'static Api,
    pub(super) info: DeviceInfo,
    /// May kernels use the address at which host memory was registered?
    pub(super) host_pointers: bool,
    handle: CUdevice,
    raw: CUcontext,
    /// The process that opened it: CUDA does not work in a forked child.
    process: u32,
}

// SAFETY: a context may be used from any thread; nothing here changes.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    pub(super) fn open(device: u32) -> Result<Arc<Context>, GpuError> {
        let api = Api::get()?;
        let handle = handle(api, device)?;
        let info = describe(api, device, handle)?;
        let host_pointers = attribute(api, handle, CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM)? != 0;
        let mut raw = core::ptr::null_mut();
        // SAFETY: writes one address; released once, by `drop`.
        unsafe { api.cuDevicePrimaryCtxRetain(&raw mut raw, handle) }?;
        Ok(Arc::new(Context { api, info, host_pointers, handle, raw, process: std::process::id() }))
    }

    /// Is this still the process that opened it?
    pub(super) fn is_ours(&self) -> bool {
        self.process == std::process::id()
    }

    /// Makes it this thread's context until the result is dropped. Also lets this thread make calls that CUDA forbids while any
    /// thread of the process captures a graph in the strictest mode: without this, our look at an event would break the capture.
    pub(super) fn enter(&self) -> Result<Entered<'_>, GpuError> {
        if !self.is_ours() {
            return Err(GpuError::Forked);
        }
        let (mut current, mut mode) = (core::ptr::null_mut(), RELAXED);
        // SAFETY: these write an address and a mode; they change only this thread's state, and `drop` changes it back.
        unsafe {
            self.api.cuCtxGetCurrent(&raw mut current)?;
            let pushed = current != self.raw;
            if pushed {
                self.api.cuCtxPushCurrent_v2(self.raw)?;
            }
            let mut entered = Entered { context: self, pushed, mode: None };
            self.api.cuThreadExchangeStreamCaptureMode(&raw mut mode)?;
            entered.mode = Some(mode);
            Ok(entered)
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if self.is_ours() {
            // SAFETY: retained once, and nothing that was made in it is left, because everything made in it holds it.
            let _ = unsafe { self.api.cuDevicePrimaryCtxRelease_v2(self.handle) };
        }
    }
}

/// This thread is in the context.
pub(super) struct Entered<'a> {
    context: &'a Context,
    pushed: bool,
    /// The capture mode of this thread before, if it was changed.
    mode: Option<c_int>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let api = self.context.api;
        let mut context = core::ptr::null_mut();
        // SAFETY: as in `enter`. An error could be told to nobody, and nothing depends on it.
        unsafe {
            if let Some(mode) = &mut self.mode {
                let _ = api.cuThreadExchangeStreamCaptureMode(mode);
            }
            if self.pushed {
                let _ = api.cuCtxPopCurrent_v2(&raw mut context);
            }
        }
    }
}
