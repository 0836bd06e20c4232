//! What stands in for something that this system lacks is said in the log, once in a process.

use kvring_shm_abi::means::{DeathNotice, Waiting};
use kvring_shm_abi::probe;
use std::sync::Once;

/// A client has made its claim: this tells of its death.
pub(crate) fn told(death_notice: DeathNotice) {
    static SAID: Once = Once::new();
    SAID.call_once(|| {
        if death_notice == DeathNotice::FileLock {
            tracing::warn!(
                "no robust futexes on this system (gVisor? a seccomp profile?): should this process die, the kvring engine \
                 notices it within some 50 ms instead of 0.05"
            );
        }
        if probe::means().waiting == Waiting::Slices {
            tracing::warn!(
                "no futex_waitv on this system (Linux before 5.16? gVisor? a seccomp profile?): the death of a kvring engine \
                 is noticed within some 50 ms instead of 0.05, and this process wakes up 20 times a second"
            );
        }
    });
}
