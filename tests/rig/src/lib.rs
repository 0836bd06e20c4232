//! The rig: what the tests, and the commands that prove or measure something (`kvring replay`, `chaos` and `bench`), drive
//! engines with.
//!
//! | module | what it has |
//! | --- | --- |
//! | [`child`], [`pipe`] | other processes, which end with this one, and messages to and from them |
//! | [`content`], [`pages`] | a paged KV cache in which every byte is a function of its place, so that a load can be verified |
//! | [`blocks`] | which of the cache's blocks are free |
//! | [`wire`] | what an adapter answers, in a form that can be sent to another process |
//! | [`shm`] | an engine's files in `/dev/shm`, seen from outside |
//! | [`random`] | random numbers that a seed determines |
//!
//! The product does not depend on it: only tests and benches do, and the command `kvring` through them.

pub mod blocks;
pub mod child;
pub mod content;
pub mod pages;
pub mod pipe;
pub mod random;
pub mod shm;
pub mod wire;
