//! The crash suite: processes that are killed at every place that the code names, and what must be true afterwards.
//!
//! A *place* is a [`Place`](kvring_shm_abi::failpoint::Place) in the product's code; [`table`] says for each what leads there. A
//! scenario has a [`cast`] of clients that live through it and keep books of what was acknowledged; it ends in a list of
//! [violations](checks::Checks), so that the same scenario can be run with a rule broken, and must then not be empty.

pub mod cast;
pub mod checks;
pub mod clients;
pub mod copies;
pub mod engines;
pub mod rules;
pub mod settled;
pub mod table;

use std::process::ExitStatus;

/// The variable that says where a process is to die.
pub const FAIL_POINT: &str = "KVRING_FAIL_POINT";
/// The variable that says which rule does not hold, in all processes of a test.
pub const BREAK: &str = "KVRING_BREAK";

/// Did it die of a SIGKILL, and by nothing else?
#[must_use]
pub fn was_killed(status: ExitStatus) -> bool {
    use std::os::unix::process::ExitStatusExt;
    status.signal() == Some(nix::libc::SIGKILL)
}
