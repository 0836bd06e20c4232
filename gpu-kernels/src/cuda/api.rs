//! The driver's functions, loaded at run time.
//!
//! cudarc finds and loads the library and has its types. The functions are resolved here, all at once: cudarc's own wrappers
//! resolve each at its first call and *panic* when there is none, and they return a Rust enum, for which a result code
//! that this release has never heard of is undefined behaviour. Here a missing function is an error, and codes are numbers.

#![allow(non_snake_case, reason = "the driver's own names, to be found in its manual")]

use super::error::GpuError;
use core::ffi::{c_char, c_int, c_uint, c_void};
use cudarc::driver::sys::{
    CUcontext, CUdevice, CUdeviceptr, CUevent, CUfunction, CUmodule, CUstream, culib, is_culib_present,
};
use std::sync::OnceLock;

/// CUDA 12.0, which everything but the kernels needs.
const VERSION_MIN: i32 = 12_000;
/// CUDA 12.8, the first with batched copies. It also selects the signature.
const BATCH_SINCE: c_int = 12_080;

pub(super) const NOT_READY: u32 = 600;
const NO_DEVICE: u32 = 100;
const STUB_LIBRARY: u32 = 34;

macro_rules! api {
    ($(fn $name:ident($($argument:ident: $type:ty),* $(,)?);)*) => {
        /// The driver.
        pub(super) struct Api {
            $($name: unsafe extern "C" fn($($type),*) -> u32,)*
            batch: Option<BatchCopy>,
        }

        impl Api {
            fn load(version: i32) -> Result<Api, GpuError> {
                Ok(Api {
                    $($name: symbol(concat!(stringify!($name), "\0"), version)?,)*
                    batch: None,
                })
            }

            $(
                /// The driver's function of that name.
                ///
                /// # Safety
                /// As CUDA's manual says.
                #[allow(clippy::too_many_arguments, reason = "the driver's signatures")]
                pub(super) unsafe fn $name(&self, $($argument: $type),*) -> Result<(), GpuError> {
                    // SAFETY: as the caller promises.
                    self.check(stringify!($name), unsafe { (self.$name)($($argument),*) })
                }
            )*
        }
    };
}

api! {
    fn cuDeviceGetCount(count: *mut c_int);
    fn cuDeviceGet(device: *mut CUdevice, ordinal: c_int);
    fn cuDeviceGetName(name: *mut c_char, length: c_int, device: CUdevice);
    fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, device: CUdevice);
    fn cuDeviceTotalMem_v2(bytes: *mut usize, device: CUdevice);
    fn cuDevicePrimaryCtxRetain(context: *mut CUcontext, device: CUdevice);
    fn cuDevicePrimaryCtxRelease_v2(device: CUdevice);
    fn cuCtxGetCurrent(context: *mut CUcontext);
    fn cuCtxPushCurrent_v2(context: CUcontext);
    fn cuCtxPopCurrent_v2(context: *mut CUcontext);
    fn cuCtxGetStreamPriorityRange(least: *mut c_int, greatest: *mut c_int);
    fn cuThreadExchangeStreamCaptureMode(mode: *mut c_int);
    fn cuStreamCreateWithPriority(stream: *mut CUstream, flags: c_uint, priority: c_int);
    fn cuStreamDestroy_v2(stream: CUstream);
    fn cuStreamSynchronize(stream: CUstream);
    fn cuStreamWaitEvent(stream: CUstream, event: CUevent, flags: c_uint);
    fn cuStreamIsCapturing(stream: CUstream, status: *mut c_int);
    fn cuEventCreate(event: *mut CUevent, flags: c_uint);
    fn cuEventDestroy_v2(event: CUevent);
    fn cuEventRecord(event: CUevent, stream: CUstream);
    fn cuEventQuery(event: CUevent);
    fn cuEventSynchronize(event: CUevent);
    fn cuMemAlloc_v2(address: *mut CUdeviceptr, bytes: usize);
    fn cuMemFree_v2(address: CUdeviceptr);
    fn cuMemHostAlloc(address: *mut *mut c_void, bytes: usize, flags: c_uint);
    fn cuMemFreeHost(address: *mut c_void);
    fn cuMemHostRegister_v2(address: *mut c_void, bytes: usize, flags: c_uint);
    fn cuMemHostUnregister(address: *mut c_void);
    fn cuMemHostGetDevicePointer_v2(alias: *mut CUdeviceptr, address: *mut c_void, flags: c_uint);
    fn cuMemGetAddressRange_v2(base: *mut CUdeviceptr, bytes: *mut usize, address: CUdeviceptr);
    fn cuPointerGetAttribute(value: *mut c_void, attribute: c_int, address: CUdeviceptr);
    fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: CUdeviceptr, bytes: usize, stream: CUstream);
    fn cuMemcpyHtoDAsync_v2(to: CUdeviceptr, from: *const c_void, bytes: usize, stream: CUstream);
    fn cuModuleLoadDataEx(
        module: *mut CUmodule,
        image: *const c_void,
        options: c_uint,
        names: *mut c_int,
        values: *mut *mut c_void,
    );
    fn cuModuleUnload(module: CUmodule);
    fn cuModuleGetFunction(function: *mut CUfunction, module: CUmodule, name: *const c_char);
    fn cuLaunchKernel(
        function: CUfunction,
        grid_x: c_uint,
        grid_y: c_uint,
        grid_z: c_uint,
        block_x: c_uint,
        block_y: c_uint,
        block_z: c_uint,
        shared_bytes: c_uint,
        stream: CUstream,
        parameters: *mut *mut c_void,
        extra: *mut *mut c_void,
    );
    fn cuGetProcAddress_v2(
        symbol: *const c_char,
        function: *mut *mut c_void,
        version: c_int,
        flags: u64,
        status: *mut c_int,
    );
}

/// `CUmemcpyAttributes` of CUDA 12.8.
#[repr(C)]
struct BatchAttributes {
    /// `CU_MEMCPY_SRC_ACCESS_ORDER_STREAM`: sources are read when the stream comes to the copies, and no sooner.
    source_order: u32,
    source_location: [u32; 2],
    destination_location: [u32; 2],
    flags: u32,
}

/// `cuMemcpyBatchAsync` as of CUDA 12.8: destinations, sources, lengths, count, attributes, the index of the first copy that each
/// attribute is for, the number of attributes, the index of the copy that failed, stream.
type BatchCopy = unsafe extern "C" fn(
    *mut CUdeviceptr,
    *mut CUdeviceptr,
    *mut usize,
    usize,
    *mut BatchAttributes,
    *mut usize,
    usize,
    *mut usize,
    CUstream,
) -> u32;

fn symbol<T: Copy>(name: &'static str, version: i32) -> Result<T, GpuError> {
    // SAFETY: `get` has found the library. The type is the driver's, by the table above.
    let found = unsafe { culib().get::<T>(name.as_bytes()) };
    found.map(|symbol| *symbol).map_err(|_| GpuError::DriverTooOld {
        expected: VERSION_MIN,
        found: version,
        what: name.trim_end_matches('\0').to_owned(),
    })
}

impl Api {
    /// The driver of this process, loaded and initialised once.
    pub(super) fn get() -> Result<&'static Api, GpuError> {
        static API: OnceLock<Result<Api, GpuError>> = OnceLock::new();
        API.get_or_init(Api::open).as_ref().map_err(Clone::clone)
    }

    fn open() -> Result<Api, GpuError> {
        // SAFETY: loads the library and unloads it again.
        if !unsafe { is_culib_present() } {
            return Err(GpuError::NoDriver);
        }
        let init: unsafe extern "C" fn(c_uint) -> u32 = symbol("cuInit\0", 0)?;
        // SAFETY: its one flag is reserved, and 0.
        match unsafe { init(0) } {
            0 => {}
            NO_DEVICE => return Err(GpuError::NoDevice),
            STUB_LIBRARY => return Err(GpuError::StubLibrary),
            code => return Err(GpuError::Call { call: "cuInit", code, name: name_of(code) }),
        }
        let get_version: unsafe extern "C" fn(*mut c_int) -> u32 = symbol("cuDriverGetVersion\0", 0)?;
        let mut version = 0;
        // SAFETY: writes one number.
        let code = unsafe { get_version(&raw mut version) };
        if code != 0 {
            return Err(GpuError::Call { call: "cuDriverGetVersion", code, name: name_of(code) });
        }
        if version < VERSION_MIN {
            let what = "support for CUDA 12".to_owned();
            return Err(GpuError::DriverTooOld { expected: VERSION_MIN, found: version, what });
        }
        let mut api = Api::load(version)?;
        api.batch = api.find_batch_copy(version);
        Ok(api)
    }

    /// Asks for the version whose signature is used here: a later driver has another one under the same name.
    fn find_batch_copy(&self, version: i32) -> Option<BatchCopy> {
        if version < BATCH_SINCE {
            return None;
        }
        let (mut function, mut status) = (core::ptr::null_mut(), 0);
        // SAFETY: writes an address and a status.
        let found = unsafe {
            let name = c"cuMemcpyBatchAsync".as_ptr();
            self.cuGetProcAddress_v2(name, &raw mut function, BATCH_SINCE, 0, &raw mut status)
        };
        if found.is_err() || function.is_null() {
            return None;
        }
        // SAFETY: the function of that name and version.
        Some(unsafe { core::mem::transmute::<*mut c_void, BatchCopy>(function) })
    }

    /// Does the driver have batched copies?
    pub(super) fn has_batch_copy(&self) -> bool {
        self.batch.is_some()
    }

    /// Makes many copies by one call; `None` if the driver has no such call.
    ///
    /// # Safety
    /// As for as many `cuMemcpyAsync`, in any order among themselves.
    pub(super) unsafe fn copy_batch(
        &self,
        to: &mut [CUdeviceptr],
        from: &mut [CUdeviceptr],
        bytes: &mut [usize],
        stream: CUstream,
    ) -> Option<Result<(), GpuError>> {
        let copy = self.batch?;
        let mut attributes = BatchAttributes {
            source_order: 1,
            source_location: [0; 2],
            destination_location: [0; 2],
            flags: 0,
        };
        let (mut first, mut failed) = (0, 0);
        let count = to.len().min(from.len()).min(bytes.len());
        // SAFETY: as the caller promises; the arrays have `count` elements, and the one attribute is for all of them.
        let code = unsafe {
            copy(
                to.as_mut_ptr(),
                from.as_mut_ptr(),
                bytes.as_mut_ptr(),
                count,
                &raw mut attributes,
                &raw mut first,
                1,
                &raw mut failed,
                stream,
            )
        };
        Some(self.check("cuMemcpyBatchAsync", code))
    }

    fn check(&self, call: &'static str, code: u32) -> Result<(), GpuError> {
        if code == 0 { Ok(()) } else { Err(GpuError::Call { call, code, name: name_of(code) }) }
    }
}

/// A result's name, in the driver's words.
fn name_of(code: u32) -> String {
    if code == NOT_READY {
        // Not an error, and the answer to most looks at an event: it needs no name.
        return String::new();
    }
    let Ok(get_name) = symbol::<unsafe extern "C" fn(u32, *mut *const c_char) -> u32>("cuGetErrorName\0", 0)
    else {
        return "unnamed".to_owned();
    };
    let mut name = core::ptr::null();
    // SAFETY: writes the address of a constant of the driver's, or null.
    if unsafe { get_name(code, &raw mut name) } != 0 || name.is_null() {
        return "a result that this driver has no name for".to_owned();
    }
    // SAFETY: a constant string of the driver's.
    unsafe { core::ffi::CStr::from_ptr(name) }.to_string_lossy().into_owned()
}
