//! Helpers for several tests of this crate.
#![allow(dead_code, reason = "no test needs all of it")]

pub(crate) mod calls;
pub(crate) mod fake;
pub(crate) mod pages;
pub(crate) mod random;
pub(crate) mod world;
