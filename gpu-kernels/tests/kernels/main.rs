//! The GPU kernels without a GPU: g++ compiles `cuda/kv.cu` through a shim, and random cases compare the kernels bit for bit with
//! plain Rust. Then the kernels are broken on purpose, and the same cases must notice.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

#[path = "../support/mod.rs"]
mod support;

mod cases;
mod mutants;
mod shim;

use shim::{Shape, Shim};
use std::path::PathBuf;

/// Names the library of a mutant, to be used in place of the kernels' own.
const LIBRARY: &str = "KVRING_KERNELS_LIBRARY";

fn library() -> PathBuf {
    std::env::var_os(LIBRARY).map(PathBuf::from).unwrap_or_else(|| {
        let library = shim::scratch().join("libkv.so");
        shim::build(&shim::cuda().join("kv.cu"), "-O2", &library);
        library
    })
}

/// Two threads launch at once, as streams do.
#[test]
fn every_case_is_bit_exact() {
    let shim = Shim::open(&library());
    let failed: Vec<String> = std::thread::scope(|scope| {
        let threads = [0, 1].map(|odd| {
            let shim = &shim;
            let mut seeds = (odd..cases::CASES).step_by(2);
            scope.spawn(move || seeds.find_map(|seed| cases::run(seed, shim).err()))
        });
        threads.into_iter().filter_map(|thread| thread.join().unwrap()).collect()
    });
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

#[test]
fn the_cases_cover_what_they_are_there_for() {
    let coverage = cases::coverage();
    // Nine orders and seven other things, each at three widths; half words only with the narrowest vector.
    let few: Vec<_> = coverage.iter().filter(|(_, count)| **count < 5).collect();
    assert!(few.is_empty(), "{few:?}");
    assert_eq!(coverage.len(), 3 * (9 + 7) + 1, "{coverage:#?}");
}

#[test]
fn the_shim_refuses_what_a_driver_would() {
    let shim = Shim::open(&library());
    let copy = [8, 4, 4, 8, 2052];
    for width in [16, 8, 4] {
        let params = |kernel: &str| {
            shim.params(&std::ffi::CString::new(format!("kv_{kernel}_{width}")).unwrap()).unwrap()
        };
        assert_eq!(params("gather"), copy);
        assert_eq!(params("scatter"), copy);
        assert_eq!(params("checksum"), [&copy[..], &[4, 8]].concat());
    }
    assert_eq!(shim.params(c"kv_gather_32"), None);
    let shape = |grid, block| Shape { grid, block };
    // SAFETY: none of these runs a kernel.
    let launch = |kernel, shape| unsafe { shim.raw(kernel, shape, &mut []) };
    assert_eq!(launch("kv_gather_32", shape(1, 32)), 1);
    for bad in [shape(0, 32), shape(1, 0), shape(1, 33), shape(1, 1056)] {
        assert_eq!(launch("kv_gather_16", bad), 2, "{bad:?}");
    }
}

/// `cuda/compile --check`, which needs NVRTC, checks that the PTX is what kv.cu compiles to.
#[test]
fn the_ptx_has_the_kernels_and_is_old_enough() {
    let ptx = include_str!("../../cuda/kv.ptx");
    let after = |word: &str| ptx.lines().find_map(|line| line.strip_prefix(word)).unwrap().trim();
    let (major, minor) = after(".version").split_once('.').unwrap();
    let version: (u32, u32) = (major.parse().unwrap(), minor.parse().unwrap());
    assert!(version <= (8, 7), "drivers from 570 on take PTX up to 8.7, got {version:?}");
    assert_eq!(after(".target"), "sm_80");
    let entries: Vec<&str> = ptx.lines().filter_map(|line| line.strip_prefix(".visible .entry ")).collect();
    for width in [16, 8, 4] {
        for kernel in ["gather", "scatter", "checksum"] {
            let name = format!("kv_{kernel}_{width}");
            assert!(entries.contains(&format!("{name}(").as_str()), "{name} is not in {entries:?}");
            assert!(ptx.contains(&format!(".b8 {name}_param_4[2052]")), "{name}: block ids by value");
        }
    }
    assert_eq!(entries.len(), 9);
    // Memory that another process writes must not be read through the non-coherent path.
    assert!(!ptx.contains("ld.global.nc") && !ptx.contains(".local"));
}

#[test]
fn every_mutant_is_noticed() {
    mutants::all();
}
