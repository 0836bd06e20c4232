//! A test with the fake CUDA driver (`tests/fake`): builds it, and runs the test in a process that finds it.

use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;

const INSIDE: &str = "KVRING_TEST_FAKE_CUDA";
/// Set to 1 on a machine with a GPU for tests that do not need the fake itself (`tests/device.rs`): they then use its driver.
const REAL: &str = "KVRING_REAL_CUDA";

/// The kernels that the fake can launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kernels {
    /// kvring's, compiled for this machine (`cuda/shim/launch.cpp`).
    Ours,
    /// The two kernels of the fake's own tests (`tests/fake/standin.cpp`).
    StandIn,
}

/// Runs `body` in a process of its own that has the fake driver with kvring's kernels: this binary again, with only the
/// test `name` (its full path). `env` sets the fake up (`tests/fake/control.cpp` lists the settings). With `KVRING_REAL_CUDA=1`
/// the body runs here, with the machine's own driver.
///
/// # Panics
/// When the test fails there, and if there is no g++.
pub(crate) fn inside(name: &str, env: &[(&str, &str)], body: impl FnOnce()) {
    inside_with(Kernels::Ours, name, env, body);
}

/// The same with a choice of kernels.
///
/// # Panics
/// As [`inside`].
pub(crate) fn inside_with(kernels: Kernels, name: &str, env: &[(&str, &str)], body: impl FnOnce()) {
    if is_inside() || is_real() {
        return body();
    }
    let (text, errors) = run(kernels, name, env);
    // A misspelt name runs nothing, and succeeds.
    assert!(text.contains("1 passed"), "{name} ran no test:\n{text}\n{errors}");
    // Its messages (SKIPPED, leaks) belong into this test's output.
    eprint!("{errors}");
}

/// Is this the process with the fake? For tests that look at the output of that process.
pub(crate) fn is_inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Do the tests use the machine's own driver?
pub(crate) fn is_real() -> bool {
    std::env::var_os(REAL).is_some_and(|real| real == "1")
}

/// Runs the test `name` with the fake, and returns its standard output and standard error.
///
/// # Panics
/// As [`inside`].
pub(crate) fn run(kernels: Kernels, name: &str, env: &[(&str, &str)]) -> (String, String) {
    let library = build(kernels);
    let mut path = library.into_os_string();
    if let Some(rest) = std::env::var_os("LD_LIBRARY_PATH").filter(|rest| !rest.is_empty()) {
        path.push(":");
        path.push(rest);
    }
    let output = Command::new(std::env::current_exe().expect("this test's own path"))
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(INSIDE, "1")
        .env("LD_LIBRARY_PATH", path)
        .envs(env.iter().copied())
        .output()
        .expect("a process for the test");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{name}, with the fake driver: {}\n{text}\n{errors}", output.status);
    (text, errors)
}

/// Builds the library unless it is there already, and returns its directory.
fn build(kernels: Kernels) -> PathBuf {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake");
    let (name, shim) = match kernels {
        Kernels::Ours => ("fake-cuda", None),
        Kernels::StandIn => ("fake-cuda-standin", Some(sources.join("standin.cpp"))),
    };
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let built = Command::new(sources.join("build")).arg(&directory).args(shim).output();
    let built = built.expect("bash, to build the fake driver");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    directory
}

/// How many objects there are in the fake.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// How often primary contexts are retained.
    pub(crate) contexts: u64,
    pub(crate) streams: u64,
    pub(crate) events: u64,
    /// Allocations of device memory.
    pub(crate) allocations: u64,
    /// Allocations by `cuMemHostAlloc`.
    pub(crate) pinned: u64,
    /// Registrations by `cuMemHostRegister`.
    pub(crate) registrations: u64,
    pub(crate) modules: u64,
    pub(crate) graphs: u64,
}

/// The control functions of the fake.
#[derive(Debug)]
pub(crate) struct Fake {
    library: libloading::Library,
}

impl Fake {
    /// The fake of this process, which runs in [`inside`].
    ///
    /// # Panics
    /// In any other process.
    pub(crate) fn get() -> Fake {
        assert!(is_inside(), "the fake driver is there only within `inside`");
        // SAFETY: its initialisers only set up its own state; cudarc loads the same library.
        let library = unsafe { libloading::Library::new("libcuda.so.1") }.expect("the fake driver");
        Fake { library }
    }

    /// # Safety
    /// `F` is the function's type.
    unsafe fn function<F: Copy>(&self, name: &str) -> F {
        // SAFETY: as the caller says.
        *unsafe { self.library.get::<F>(name) }.unwrap_or_else(|error| panic!("not the fake driver: {error}"))
    }

    /// From now on the call does nothing, and succeeds. Only for calls without results.
    pub(crate) fn ignore(&self, call: &str) {
        let call = CString::new(call).expect("a name");
        // SAFETY: the type is that of control.cpp; the name outlives the call.
        unsafe { self.function::<extern "C" fn(*const c_char)>("fake_cuda_ignore")(call.as_ptr()) }
    }

    /// From its `after`-th use from now on (1: the next) the call gives this error. With error 0 it works again.
    pub(crate) fn fail(&self, call: &str, error: i32, after: i32) {
        let call = CString::new(call).expect("a name");
        // SAFETY: as in `ignore`.
        unsafe {
            self.function::<extern "C" fn(*const c_char, c_int, c_int)>("fake_cuda_fail")(
                call.as_ptr(),
                error,
                after,
            );
        }
    }

    /// The call gives this error once, at its `after`-th use from now on (1: the next).
    pub(crate) fn fail_once(&self, call: &str, error: i32, after: i32) {
        let call = CString::new(call).expect("a name");
        // SAFETY: as in `ignore`.
        unsafe {
            self.function::<extern "C" fn(*const c_char, c_int, c_int)>("fake_cuda_fail_once")(
                call.as_ptr(),
                error,
                after,
            );
        }
    }

    /// From now on no call is ignored or made to fail.
    pub(crate) fn reset(&self) {
        // SAFETY: the type is that of control.cpp.
        unsafe { self.function::<extern "C" fn()>("fake_cuda_reset")() }
    }

    /// How often the call was made.
    pub(crate) fn calls(&self, call: &str) -> u64 {
        let call = CString::new(call).expect("a name");
        // SAFETY: as in `ignore`.
        unsafe { self.function::<extern "C" fn(*const c_char) -> u64>("fake_cuda_calls")(call.as_ptr()) }
    }

    /// How many objects there are.
    pub(crate) fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        // SAFETY: the type is that of control.cpp, which writes these eight numbers.
        unsafe { self.function::<extern "C" fn(*mut Counts)>("fake_cuda_counts")(&raw mut counts) }
        counts
    }

    /// The device is gone: queued work never runs, and every call gives this error (0: `DEVICE_UNAVAILABLE`).
    pub(crate) fn lose(&self, error: i32) {
        // SAFETY: the type is that of control.cpp.
        unsafe { self.function::<extern "C" fn(c_int)>("fake_cuda_lose")(error) }
    }

    /// Acts as a kernel of torch: `delay_us` after its turn comes, `stream` writes [`pattern`] of this seed. Returns the
    /// `CUresult`.
    pub(crate) fn fill(&self, stream: u64, to: u64, bytes: usize, seed: u32, delay_us: u32) -> i32 {
        type Fill = extern "C" fn(*mut c_void, u64, usize, c_uint, c_uint) -> c_int;
        // SAFETY: the type is that of copy.cpp, which checks the address itself.
        unsafe { self.function::<Fill>("fake_cuda_fill")(stream as *mut c_void, to, bytes, seed, delay_us) }
    }

    /// Acts as a kernel of torch that reads: after the delay `stream` copies what it finds there to `into`.
    ///
    /// # Safety
    /// Until it has done so, `into` is writable for `bytes`, and nobody else touches it.
    pub(crate) unsafe fn read(
        &self,
        stream: u64,
        from: u64,
        bytes: usize,
        into: *mut u8,
        delay_us: u32,
    ) -> i32 {
        type Read = extern "C" fn(*mut c_void, u64, usize, *mut u8, c_uint) -> c_int;
        // SAFETY: the type is that of copy.cpp; `into` as the caller says.
        unsafe { self.function::<Read>("fake_cuda_read")(stream as *mut c_void, from, bytes, into, delay_us) }
    }
}

/// The bytes that [`Fake::fill`] writes: they depend on the seed and the place.
pub(crate) fn pattern(seed: u32, bytes: usize) -> Vec<u8> {
    (0..bytes as u32)
        .map(|i| {
            let mut x = seed.wrapping_mul(0x9e37_79b9) ^ i;
            x ^= x >> 16;
            x = x.wrapping_mul(0x7feb_352d);
            x ^= x >> 15;
            x as u8
        })
        .collect()
}
