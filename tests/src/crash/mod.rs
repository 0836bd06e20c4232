//! The crash suite: processes are killed at every fail point, and what must be true afterwards.
//!
//! A *place* is a [`Place`](kvring_shm_abi::failpoint::Place) in the product's code, and [`table`] says for each what leads there.
//! A scenario has an engine and clients ([`scene`]), often a [`cast`] of clients that live through it and record what was
//! acknowledged. It returns a list of [violations](checks::Checks). The same scenario can be run with a rule broken: then the
//! list must not be empty.

pub mod cast;
pub mod checks;
pub mod clients;
pub mod copies;
pub mod engines;
pub mod rules;
pub mod scene;
pub mod table;

use std::process::ExitStatus;

/// The variable that says at which place a process dies.
pub const FAIL_POINT: &str = "KVRING_FAIL_POINT";
/// The variable that says which rule is broken, in all processes of a test.
pub const BREAK: &str = "KVRING_BREAK";

/// Did it die of a SIGKILL?
pub fn was_killed(status: ExitStatus) -> bool {
    use std::os::unix::process::ExitStatusExt;
    status.signal() == Some(nix::libc::SIGKILL)
}
