//! Helpers for several tests of this crate.
#![allow(dead_code, reason = "no test needs all of it")]

pub(crate) mod calls;
pub(crate) mod fake;
pub(crate) mod pages;
// The rig's generator, without the rig, which is built on this crate.
#[path = "../../../tests/rig/src/random.rs"]
#[allow(unreachable_pub, reason = "another crate's module")]
pub(crate) mod random;
pub(crate) mod world;
