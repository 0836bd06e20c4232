//! `CudaBackend` with the fake CUDA driver (`tests/fake`): bytes, orderings, captures, failures, leaks. What it proves is logic;
//! speed, and that a real driver does the same, is for a GPU to show.
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
mod world;
