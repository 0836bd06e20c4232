//! `CudaBackend` with the fake CUDA driver (`tests/fake`): bytes, orderings, captures, failures, leaks. These tests prove logic;
//! only a GPU can show its speed, and that a real driver does the same.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

#[path = "../support/mod.rs"]
mod support;

mod calibration;
mod capture;
mod children;
mod failure;
mod leaks;
mod missing;
mod order;
mod rounds;
mod sweep;
mod threads;

use support::calls;
use support::fake::{Fake, Kernels, inside_as, test_of};

/// Runs a test with the fake driver, in the context of its device 0. `env` sets the fake up (`tests/fake/control.cpp`).
fn inside<F: FnOnce(&Fake)>(env: &[(&str, &str)], body: F) {
    inside_as(test_of::<F>(), Kernels::Ours, env, |fake| {
        let _context = calls::context();
        body(fake);
    });
}

/// The same without a context.
fn without_context<F: FnOnce(&Fake)>(env: &[(&str, &str)], body: F) {
    inside_as(test_of::<F>(), Kernels::Ours, env, body);
}

/// All calls of the driver that kvring makes: those of the table in `api.rs`, and the batch copy, which is not in it.
fn calls_of_the_driver() -> Vec<&'static str> {
    let table = include_str!("../../src/cuda/api.rs").lines();
    let functions =
        table.filter_map(|line| line.strip_prefix("    fn cu").and(line.trim_start().split_once('(')));
    let names = functions.map(|(name, _)| name.trim_start_matches("fn ").trim_end_matches("_v2"));
    let calls: Vec<_> = names.chain(["cuMemcpyBatchAsync"]).collect();
    assert!(calls.len() >= 39 && calls.contains(&"cuLaunchKernel"), "{calls:?}");
    calls
}
