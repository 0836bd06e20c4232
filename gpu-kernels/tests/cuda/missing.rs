//! Machines without a driver, or with something else of its name.

use crate::support::fake::{again, is_inside, test_of};
use kvring_gpu_kernels::{CudaBackend, DeviceInfo, GpuError, GpuOptions, probe};
use std::path::{Path, PathBuf};
use std::process::Command;

const NAMES: [&str; 2] = ["libcuda.so", "libcuda.so.1"];

/// Runs the test again in a process that looks for libraries in this folder, after `make` has made them.
fn elsewhere<F: FnOnce()>(folder: &str, make: impl FnOnce(&Path), body: F) {
    if is_inside() {
        return body();
    }
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(folder);
    std::fs::create_dir_all(&folder).unwrap();
    make(&folder);
    again(test_of::<F>(), folder.to_str().unwrap(), &[]);
}

/// If this machine has a driver elsewhere, `probe` finds that one, and the test proves nothing.
fn expect_none(found: Result<Vec<DeviceInfo>, GpuError>) {
    // SAFETY: a driver's initialisers do nothing to this process.
    if unsafe { libloading::Library::new("libcuda.so.1") }.is_err() {
        assert_eq!(found.unwrap_err(), GpuError::NoDriver);
        assert_eq!(CudaBackend::new(GpuOptions::new(0)).err(), Some(GpuError::NoDriver));
    }
}

#[test]
fn no_driver_is_an_error() {
    elsewhere("no-cuda", |_| {}, || expect_none(probe()));
}

#[test]
fn a_file_that_is_no_library_is_no_driver() {
    let make = |folder: &Path| {
        NAMES.iter().for_each(|name| std::fs::write(folder.join(name), "no library").unwrap())
    };
    elsewhere("garbage-cuda", make, || expect_none(probe()));
}

/// Makes a library with the driver's name and some of its functions.
fn library(source: &str) -> impl FnOnce(&Path) {
    move |folder| {
        let file = folder.join("library.cpp");
        std::fs::write(&file, source).unwrap();
        for name in NAMES {
            let to = folder.join(name);
            let built = Command::new("g++").args(["-shared", "-fPIC", "-o"]).arg(to).arg(&file).output();
            assert!(built.expect("g++").status.success());
        }
    }
}

#[test]
fn a_driver_that_lacks_a_function_is_too_old() {
    let source = r#"
        extern "C" int cuInit(unsigned) { return 0; }
        extern "C" int cuDriverGetVersion(int *version) { *version = 12030; return 0; }
        extern "C" int cuDeviceGetCount(int *count) { *count = 1; return 0; }"#;
    elsewhere("partial-cuda", library(source), || {
        let error = probe().unwrap_err();
        let GpuError::DriverTooOld { found: 12030, what, .. } = &error else { panic!("{error}") };
        assert_eq!(what, "cuDeviceGet");
        assert!(error.to_string().contains("cuDeviceGet"), "{error}");
    });
}

#[test]
fn a_library_without_anything_is_too_old() {
    elsewhere("empty-cuda", library("extern \"C\" int nothing() { return 0; }"), || {
        let error = probe().unwrap_err();
        assert!(matches!(&error, GpuError::DriverTooOld { what, .. } if what == "cuInit"), "{error}");
    });
}

#[test]
fn a_result_that_nobody_knows_has_no_name() {
    elsewhere("odd-cuda", library("extern \"C\" int cuInit(unsigned) { return 54321; }"), || {
        let error = probe().unwrap_err();
        assert!(matches!(error, GpuError::Call { call: "cuInit", code: 54321, .. }), "{error}");
    });
}
