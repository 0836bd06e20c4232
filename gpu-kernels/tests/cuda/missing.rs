//! Machines without a driver, or with something else of its name.

use kvring_gpu_kernels::{CudaBackend, GpuError, GpuOptions, probe};
use std::path::Path;
use std::process::Command;

const CASE: &str = "KVRING_TEST_NO_CUDA";

/// Runs the test again in a process that looks for libraries in this folder.
fn elsewhere(name: &str, folder: &Path, body: impl FnOnce()) {
    if std::env::var_os(CASE).is_some() {
        return body();
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(CASE, "1")
        .env("LD_LIBRARY_PATH", folder)
        .output()
        .unwrap();
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && text.contains("1 passed"), "{text}\n{errors}");
}

fn folder(name: &str) -> std::path::PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

/// If this machine has a driver elsewhere, `probe` finds that one, and the test proves nothing.
fn expect_none() {
    let found = probe();
    if !has_driver() {
        assert_eq!(found.unwrap_err(), GpuError::NoDriver);
        assert_eq!(CudaBackend::new(GpuOptions::new(0)).err(), Some(GpuError::NoDriver));
    }
}

fn has_driver() -> bool {
    // SAFETY: a driver's initialisers do nothing to this process.
    unsafe { libloading::Library::new("libcuda.so.1") }.is_ok()
}

#[test]
fn no_driver_is_an_error() {
    elsewhere("missing::no_driver_is_an_error", &folder("no-cuda"), expect_none);
}

#[test]
fn a_file_that_is_no_library_is_no_driver() {
    let folder = folder("garbage-cuda");
    for name in ["libcuda.so", "libcuda.so.1"] {
        std::fs::write(folder.join(name), "not a library").unwrap();
    }
    elsewhere("missing::a_file_that_is_no_library_is_no_driver", &folder, expect_none);
}

/// A library with the driver's name and some of its functions.
fn library(name: &str, source: &str) -> std::path::PathBuf {
    let folder = folder(name);
    if std::env::var_os(CASE).is_some() {
        return folder;
    }
    let file = folder.join("library.cpp");
    std::fs::write(&file, source).unwrap();
    for name in ["libcuda.so", "libcuda.so.1"] {
        let built =
            Command::new("g++").args(["-shared", "-fPIC", "-o"]).arg(folder.join(name)).arg(&file).output();
        assert!(built.expect("g++").status.success());
    }
    folder
}

#[test]
fn a_driver_that_lacks_a_function_is_too_old() {
    let source = r#"
        extern "C" int cuInit(unsigned) { return 0; }
        extern "C" int cuDriverGetVersion(int *version) { *version = 12030; return 0; }
        extern "C" int cuDeviceGetCount(int *count) { *count = 1; return 0; }"#;
    let folder = library("partial-cuda", source);
    elsewhere("missing::a_driver_that_lacks_a_function_is_too_old", &folder, || {
        let error = probe().unwrap_err();
        assert!(
            matches!(&error, GpuError::DriverTooOld { found: 12030, what, .. } if what == "cuDeviceGet"),
            "{error}"
        );
        assert!(error.to_string().contains("cuDeviceGet"), "{error}");
    });
}

#[test]
fn a_library_without_anything_is_too_old() {
    let folder = library("empty-cuda", "extern \"C\" int nothing() { return 0; }");
    elsewhere("missing::a_library_without_anything_is_too_old", &folder, || {
        let error = probe().unwrap_err();
        assert!(matches!(&error, GpuError::DriverTooOld { what, .. } if what == "cuInit"), "{error}");
    });
}

#[test]
fn a_result_that_nobody_knows_has_no_name() {
    let folder = library("odd-cuda", "extern \"C\" int cuInit(unsigned) { return 54321; }");
    elsewhere("missing::a_result_that_nobody_knows_has_no_name", &folder, || {
        let error = probe().unwrap_err();
        assert!(matches!(error, GpuError::Call { call: "cuInit", code: 54321, .. }), "{error}");
    });
}
