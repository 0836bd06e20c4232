//! The kernels of `cuda/kv.cu`, which the driver compiles from the PTX in the repository.

use super::device::Context;
use super::error::GpuError;
use crate::tiles::{Blocks, Window};
use core::ffi::c_void;
use cudarc::driver::sys::{CUdeviceptr, CUfunction, CUmodule, CUstream};
use std::sync::Arc;

/// Made from `cuda/kv.cu` by `cuda/compile`; drivers from 570 on accept it.
const PTX: &core::ffi::CStr =
    match core::ffi::CStr::from_bytes_with_nul(concat!(include_str!("../../cuda/kv.ptx"), "\0").as_bytes()) {
        Ok(ptx) => ptx,
        Err(_) => panic!("the PTX holds a zero byte"),
    };

/// Threads of a block: each SM that takes part copies with 16 warps.
const THREADS: u32 = 512;
const WARPS: u32 = THREADS / 32;

/// What a kernel does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kernel {
    /// From pages to a shard.
    Gather = 0,
    /// From a shard to pages.
    Scatter = 1,
    /// Sums of a shard's bytes.
    Checksum = 2,
}

const NAMES: [[&core::ffi::CStr; 3]; 3] = [
    [c"kv_gather_16", c"kv_gather_8", c"kv_gather_4"],
    [c"kv_scatter_16", c"kv_scatter_8", c"kv_scatter_4"],
    [c"kv_checksum_16", c"kv_checksum_8", c"kv_checksum_4"],
];

/// The column of [`NAMES`] for a vector's width.
fn column(vector: u32) -> usize {
    match vector {
        16 => 0,
        8 => 1,
        _ => 2,
    }
}

/// The loaded module.
pub(super) struct Kernels {
    context: Arc<Context>,
    module: CUmodule,
    functions: [[CUfunction; 3]; 3],
}

// SAFETY: functions may be launched from any thread.
unsafe impl Send for Kernels {}
// SAFETY: as above.
unsafe impl Sync for Kernels {}

/// What a launch works on.
#[derive(Clone, Copy)]
pub(super) struct Launch<'a> {
    /// Bytes of a vector ([`crate::tiles::Tiles::vector`]).
    pub(super) vector: u32,
    /// The chunk's tiles, in device memory.
    pub(super) tiles: CUdeviceptr,
    pub(super) window: &'a Window,
    /// The address at which the shard's first byte would be.
    pub(super) shard: u64,
    /// The chunk's blocks.
    pub(super) blocks: &'a [u32],
    /// SMs that may take part.
    pub(super) grid_max: u32,
}

impl Launch<'_> {
    /// How many blocks of threads: at most one warp for each tile.
    pub(super) fn grid(&self) -> u32 {
        self.window.count.div_ceil(WARPS).clamp(1, self.grid_max.max(1))
    }
}

impl Kernels {
    /// Loads the module.
    pub(super) fn load(context: &Arc<Context>) -> Result<Kernels, GpuError> {
        let _entered = context.enter()?;
        let mut module = core::ptr::null_mut();
        // SAFETY: the image is PTX, ended by a zero; no options. Unloaded once, by `drop`.
        unsafe {
            let (names, values) = (core::ptr::null_mut(), core::ptr::null_mut());
            context.api.cuModuleLoadDataEx(&raw mut module, PTX.as_ptr().cast(), 0, names, values)?;
        }
        let mut kernels =
            Kernels { context: context.clone(), module, functions: [[core::ptr::null_mut(); 3]; 3] };
        for (names, functions) in NAMES.iter().zip(&mut kernels.functions) {
            for (name, function) in names.iter().zip(functions) {
                // SAFETY: writes one address; the module is loaded.
                unsafe { context.api.cuModuleGetFunction(function, module, name.as_ptr()) }?;
            }
        }
        Ok(kernels)
    }

    /// Puts a gather or a scatter on the stream. The caller has entered the context.
    ///
    /// # Safety
    /// Until the kernel has run, the tiles' pages of these blocks and the window's bytes of the shard are memory that the device
    /// can reach, and nobody else accesses the bytes that it writes.
    pub(super) unsafe fn copy(
        &self,
        kernel: Kernel,
        launch: &Launch<'_>,
        stream: CUstream,
    ) -> Result<(), GpuError> {
        // SAFETY: as the caller promises.
        unsafe { self.launch(kernel, launch, stream, &mut []) }
    }

    /// Puts a checksum on the stream: each of `launch.grid()` blocks of threads writes its sum to `partial`. With `paged` the
    /// kernel reads the pages, and only the bytes of skipped blocks from the shard.
    ///
    /// # Safety
    /// As [`Kernels::copy`], for reading; `partial` has room.
    pub(super) unsafe fn checksum(
        &self,
        launch: &Launch<'_>,
        paged: bool,
        partial: CUdeviceptr,
        stream: CUstream,
    ) -> Result<(), GpuError> {
        let (mut paged, mut partial) = (u32::from(paged), partial);
        let mut more = [(&raw mut paged).cast::<c_void>(), (&raw mut partial).cast::<c_void>()];
        // SAFETY: as the caller promises; the parameters are those of the checksum.
        unsafe { self.launch(Kernel::Checksum, launch, stream, &mut more) }
    }

    unsafe fn launch(
        &self,
        kernel: Kernel,
        launch: &Launch<'_>,
        stream: CUstream,
        more: &mut [*mut c_void],
    ) -> Result<(), GpuError> {
        let Launch { vector, mut tiles, window, mut shard, blocks, .. } = *launch;
        let (mut first, mut count) = (window.first, window.count);
        let mut ids = Blocks::of(window, blocks);
        let mut parameters = [core::ptr::null_mut::<c_void>(); 7];
        parameters[0] = (&raw mut tiles).cast();
        parameters[1] = (&raw mut first).cast();
        parameters[2] = (&raw mut count).cast();
        parameters[3] = (&raw mut shard).cast();
        parameters[4] = (&raw mut ids).cast();
        parameters[5..5 + more.len()].copy_from_slice(more);
        let function = self.functions[kernel as usize][column(vector)];
        // SAFETY: the kernel has these parameters (cuda/kv.cu), and the driver copies them in this call.
        unsafe {
            self.context.api.cuLaunchKernel(
                function,
                launch.grid(),
                1,
                1,
                THREADS,
                1,
                1,
                0,
                stream,
                parameters.as_mut_ptr(),
                core::ptr::null_mut(),
            )
        }
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        if let Ok(_entered) = self.context.enter() {
            // SAFETY: loaded once; none of its launches is left, because lanes are waited for first.
            let _ = unsafe { self.context.api.cuModuleUnload(self.module) };
        }
    }
}
