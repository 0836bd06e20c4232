//! `cuda/kv.cu`, or a mutant of it, built by g++ through `cuda/shim` and called in this process.

use kvring_gpu_kernels::{Blocks, Tile, Window};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;

type Launch = unsafe extern "C" fn(*const c_char, u32, u32, u32, *mut *mut c_void) -> c_int;
type Params = unsafe extern "C" fn(*const c_char, *mut *const usize, *mut c_int) -> c_int;
type Allow = unsafe extern "C" fn(*const usize, usize);
type Moved = unsafe extern "C" fn() -> usize;

/// The crate's directory of sources for the device.
pub(crate) fn cuda() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda")
}

/// Where tests may leave files.
pub(crate) fn scratch() -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
}

/// Builds `source` into `to`.
pub(crate) fn build(source: &Path, optimise: &str, to: &Path) {
    // Test processes run side by side, so each builds a file of its own and then renames it.
    let own = to.with_extension(format!("{}.so", std::process::id()));
    let ran = Command::new("g++")
        .args(["-std=c++17", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-shared", "-fPIC", optimise])
        .arg(format!("-DKV_SOURCE=\"{}\"", source.display()))
        .arg("-o")
        .args([&own, &cuda().join("shim/launch.cpp")])
        .output()
        .unwrap_or_else(|error| {
            panic!("expected g++, which runs the GPU kernels here, got {error}: install g++ (Debian, Ubuntu: apt install g++)")
        });
    assert!(
        ran.status.success(),
        "g++ {}: {}\n{}",
        source.display(),
        ran.status,
        String::from_utf8_lossy(&ran.stderr)
    );
    std::fs::rename(own, to).unwrap();
}

/// Grid and block of a launch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) grid: u32,
    pub(crate) block: u32,
}

/// The kernels, ready to be launched from any thread.
pub(crate) struct Shim {
    launch: Launch,
    params: Params,
    allow: Allow,
    moved: Moved,
}

impl Shim {
    pub(crate) fn open(path: &Path) -> Shim {
        // SAFETY: built from this crate's sources; its constructors do nothing.
        let library = unsafe { libloading::Library::new(path) }.unwrap();
        // Never unloaded, because threads that have launched kernels keep memory of the library until they end.
        let library = Box::leak(Box::new(library));
        // SAFETY: the signatures of cuda/shim/launch.cpp.
        unsafe {
            Shim {
                launch: *library.get(b"kv_shim_launch").unwrap(),
                params: *library.get(b"kv_shim_params").unwrap(),
                allow: *library.get(b"kv_shim_allow").unwrap(),
                moved: *library.get(b"kv_shim_moved").unwrap(),
            }
        }
    }

    /// Sizes of a kernel's parameters.
    pub(crate) fn params(&self, kernel: &CStr) -> Option<Vec<usize>> {
        let (mut sizes, mut count) = (std::ptr::null(), 0);
        // SAFETY: a string, and two places that the function writes.
        let status = unsafe { (self.params)(kernel.as_ptr(), &mut sizes, &mut count) };
        // SAFETY: the function has given an array of so many sizes, which lives as long as the library.
        (status == 0).then(|| unsafe { std::slice::from_raw_parts(sizes, count as usize) }.to_vec())
    }

    /// Launches of this thread may access these ranges (address, bytes), and nothing else.
    pub(crate) fn allow(&self, ranges: &[[usize; 2]]) {
        assert!(!ranges.is_empty(), "none would mean any");
        // SAFETY: an array of so many pairs, which the function copies.
        unsafe { (self.allow)(ranges.as_ptr().cast(), ranges.len()) }
    }

    /// Bytes that this thread's latest launch loaded and stored.
    pub(crate) fn moved(&self) -> usize {
        // SAFETY: reads a number.
        unsafe { (self.moved)() }
    }

    /// Launches any kernel with any parameters, and returns the shim's status.
    ///
    /// # Safety
    /// The parameters are the kernel's.
    pub(crate) unsafe fn raw(&self, kernel: &str, shape: Shape, params: &mut [*mut c_void]) -> i32 {
        let kernel = CString::new(kernel).unwrap();
        // SAFETY: as the caller promises.
        unsafe { (self.launch)(kernel.as_ptr(), shape.grid, shape.block, 0, params.as_mut_ptr()) }
    }

    /// Launches `kv_gather_V` or `kv_scatter_V`.
    ///
    /// # Safety
    /// The tiles and `shard` name memory that nobody else uses meanwhile.
    pub(crate) unsafe fn copy(
        &self,
        kernel: &str,
        shape: Shape,
        tiles: &[Tile],
        window: &Window,
        shard: u64,
        chunk: &[u32],
    ) -> Result<(), String> {
        // SAFETY: as the caller promises; these kernels have no more parameters.
        unsafe { self.launch(kernel, shape, tiles, window, shard, chunk, &[]) }
    }

    /// Launches `kv_checksum_V`, and returns the sum of what its blocks have written.
    ///
    /// # Safety
    /// As `copy`.
    pub(crate) unsafe fn checksum(
        &self,
        (kernel, shape): (&str, Shape),
        tiles: &[Tile],
        window: &Window,
        shard: u64,
        chunk: &[u32],
        paged: bool,
    ) -> Result<u64, String> {
        const POISON: u64 = 0xa5a5_5a5a_a5a5_5a5a;
        let mut paged = u32::from(paged);
        let mut partial = vec![POISON; shape.grid as usize + 2];
        let mut to = partial[1..].as_mut_ptr() as u64;
        let more = [(&raw mut paged).cast(), (&raw mut to).cast()];
        // SAFETY: as the caller promises; the sums go to `partial`.
        unsafe { self.launch(kernel, shape, tiles, window, shard, chunk, &more) }?;
        match &partial[..] {
            [POISON, sums @ .., POISON] => Ok(sums.iter().fold(0, |sum, part| sum.wrapping_add(*part))),
            _ => Err(format!("{kernel} wrote beyond its partial sums")),
        }
    }

    /// Launches a kernel with the parameters that all have, and `more`.
    ///
    /// # Safety
    /// The parameters are the kernel's, and name memory that nobody else uses meanwhile.
    #[allow(clippy::too_many_arguments, reason = "the kernels' parameters")]
    unsafe fn launch(
        &self,
        kernel: &str,
        shape: Shape,
        tiles: &[Tile],
        window: &Window,
        mut shard: u64,
        chunk: &[u32],
        more: &[*mut c_void],
    ) -> Result<(), String> {
        let (mut table, mut first, mut count) = (tiles.as_ptr() as u64, window.first, window.count);
        let mut blocks = Blocks::of(window, chunk);
        let mut params = vec![
            (&raw mut table).cast(),
            (&raw mut first).cast(),
            (&raw mut count).cast(),
            (&raw mut shard).cast(),
            (&raw mut blocks).cast(),
        ];
        params.extend_from_slice(more);
        // SAFETY: as the caller promises.
        match unsafe { self.raw(kernel, shape, &mut params) } {
            0 => Ok(()),
            3 => Err(format!("{kernel}: a barrier or a shuffle waits for a thread that does not come")),
            4 => Err(format!("{kernel}: an access that is not aligned")),
            5 => Err(format!("{kernel}: an access that is not its own")),
            other => Err(format!("{kernel}: status {other}")),
        }
    }
}
