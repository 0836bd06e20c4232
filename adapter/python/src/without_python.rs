//! Tests of the modules that do not touch Python, in a binary that is not linked with it.
#![allow(dead_code, reason = "only the tests use these modules here")]

mod handles;
mod planes;
mod records;
