//! Logs, once in each process, which stand-ins kvring uses because the system lacks something.

use kvring_shm_abi::means::{DeathNotice, Waiting};
use kvring_shm_abi::probe;
use std::sync::Once;

/// Called when a client has made its claim. `death_notice` is how the engine notices this client's death.
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
