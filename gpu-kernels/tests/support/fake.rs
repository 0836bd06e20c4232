//! Runs a test with the fake CUDA driver (`tests/fake`) in a process of its own, and controls the fake there.

use cudarc::driver::sys::culib;
use std::any::type_name;
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

/// Runs `body`, a part of the test of this name, in a process of its own that has the fake driver with these kernels: the binary
/// runs again with that test alone. `env` sets the fake up (`tests/fake/control.cpp` lists the settings). With
/// `KVRING_REAL_CUDA=1` the body runs in this process, with the machine's own driver.
///
/// # Panics
/// When the test fails there, and if there is no g++.
pub(crate) fn inside_as(name: &str, kernels: Kernels, env: &[(&str, &str)], body: impl FnOnce(&Fake)) {
    if is_inside() || is_real() {
        return body(&Fake);
    }
    // The test's messages (SKIPPED, leaks) belong into this test's output.
    eprint!("{}", run(kernels, name, env));
}

/// The name of the test in which this closure is written, as the test harness knows it.
pub(crate) fn test_of<F>() -> &'static str {
    let closure = type_name::<F>();
    let (_, path) = closure.split_once("::").expect("a path");
    path.split_once("::{{closure}}").expect("a closure of a test").0
}

/// Does this process have the fake, or another driver that [`again`] has given it?
pub(crate) fn is_inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Do the tests use the machine's own driver?
pub(crate) fn is_real() -> bool {
    std::env::var_os(REAL).is_some_and(|real| real == "1")
}

/// Runs the test `name` with the fake, and returns what it wrote to standard error.
///
/// # Panics
/// As [`inside_as`].
pub(crate) fn run(kernels: Kernels, name: &str, env: &[(&str, &str)]) -> String {
    let mut path = build(kernels).into_os_string().into_string().expect("a path in UTF-8");
    if let Some(rest) = std::env::var("LD_LIBRARY_PATH").ok().filter(|rest| !rest.is_empty()) {
        path = format!("{path}:{rest}");
    }
    again(name, &path, env)
}

/// Runs the test `name` of this binary in another process, which finds libraries in `library_path`, and returns what it wrote
/// to standard error.
///
/// # Panics
/// When the test fails there.
pub(crate) fn again(name: &str, library_path: &str, env: &[(&str, &str)]) -> String {
    let output = Command::new(std::env::current_exe().expect("this test's own path"))
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(INSIDE, "1")
        .env("LD_LIBRARY_PATH", library_path)
        .envs(env.iter().copied())
        .output()
        .expect("a process for the test");
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name}, with another driver: {}\n{text}\n{errors}", output.status);
    // A process that finds no test of that name succeeds as well.
    assert!(text.contains("1 passed"), "{name} ran no test:\n{text}\n{errors}");
    errors.into_owned()
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
}

/// The control functions of the fake, for tests that run [inside of it](inside_as).
#[derive(Debug)]
pub(crate) struct Fake;

/// A control function of the fake's.
///
/// # Safety
/// `F` is the function's type in `control.cpp` or `copy.cpp`.
unsafe fn control<F: Copy>(name: &str) -> F {
    // SAFETY: this process has a driver, or the test would not run here.
    let library = unsafe { culib() };
    // SAFETY: as the caller says.
    *unsafe { library.get::<F>(name.as_bytes()) }
        .unwrap_or_else(|error| panic!("not the fake driver: {error}"))
}

/// Defines methods that call the control function of that symbol with the name of a call of the driver.
macro_rules! of_a_call {
    ($($(#[$doc:meta])* fn $method:ident(call $(, $argument:ident: $type:ty)*) $(-> $result:ty)? = $symbol:literal;)*) => {$(
        $(#[$doc])*
        pub(crate) fn $method(&self, call: &str $(, $argument: $type)*) $(-> $result)? {
            type Control = unsafe extern "C" fn(*const c_char $(, $type)*) $(-> $result)?;
            let call = CString::new(call).expect("a name");
            // SAFETY: the type is that of control.cpp; the name outlives the call.
            unsafe { control::<Control>($symbol)(call.as_ptr() $(, $argument)*) }
        }
    )*};
}

impl Fake {
    of_a_call! {
        /// From now on the call does nothing, and succeeds. Only for calls without results.
        fn ignore(call) = "fake_cuda_ignore";
        /// From its `after`-th use from now on (1: the next) the call gives this error.
        fn fail(call, error: c_int, after: c_int) = "fake_cuda_fail";
        /// The call gives this error once, at its `after`-th use from now on (1: the next).
        fn fail_once(call, error: c_int, after: c_int) = "fake_cuda_fail_once";
        /// How often the call was made.
        fn calls(call) -> u64 = "fake_cuda_calls";
    }

    /// From now on no call is ignored or made to fail.
    pub(crate) fn reset(&self) {
        // SAFETY: the type is that of control.cpp.
        unsafe { control::<unsafe extern "C" fn()>("fake_cuda_reset")() }
    }

    /// How many objects there are.
    pub(crate) fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        // SAFETY: the type is that of control.cpp, which writes these numbers.
        unsafe { control::<unsafe extern "C" fn(*mut Counts)>("fake_cuda_counts")(&raw mut counts) }
        counts
    }

    /// The device is gone: queued work never runs, and every call gives this error.
    pub(crate) fn lose(&self, error: i32) {
        // SAFETY: the type is that of control.cpp.
        unsafe { control::<unsafe extern "C" fn(c_int)>("fake_cuda_lose")(error) }
    }

    /// Acts as a kernel of torch: `delay_us` after its turn comes, `stream` writes [`pattern`] of this seed. Returns the
    /// `CUresult`.
    pub(crate) fn fill(&self, stream: u64, to: u64, bytes: usize, seed: u32, delay_us: u32) -> i32 {
        type Fill = unsafe extern "C" fn(*mut c_void, u64, usize, c_uint, c_uint) -> c_int;
        // SAFETY: the type is that of copy.cpp, which checks the address itself.
        unsafe { control::<Fill>("fake_cuda_fill")(stream as *mut c_void, to, bytes, seed, delay_us) }
    }

    /// Acts as a kernel of torch that reads: after the delay `stream` copies the bytes that it finds to `into`.
    ///
    /// # Safety
    /// Until the stream has done so, `into` is writable for `bytes`, and nobody else accesses it.
    pub(crate) unsafe fn read(
        &self,
        stream: u64,
        from: u64,
        bytes: usize,
        into: *mut u8,
        delay_us: u32,
    ) -> i32 {
        type Read = unsafe extern "C" fn(*mut c_void, u64, usize, *mut u8, c_uint) -> c_int;
        // SAFETY: the type is that of copy.cpp; `into` as the caller says.
        unsafe { control::<Read>("fake_cuda_read")(stream as *mut c_void, from, bytes, into, delay_us) }
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
