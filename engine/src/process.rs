//! What the engine asks of its own process.

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::time::Duration;

/// Switches off core dumps of this process; where that is refused, a warning says so.
///
/// The kernel marks life words when a process dies, but a dump comes first: with one, a death by SIGABRT or SIGSEGV is
/// noticed seconds late, and all of the shared memory is copied for nothing. The limit is **1** and not 0: where dumps
/// are piped to a program (`core_pattern` with `|`: systemd-coredump, apport) the kernel ignores a limit of 0, while 1
/// is its word for "no pipe either"; for files both are below a page and mean none. `PR_SET_DUMPABLE` would forbid
/// debuggers and profilers as well.
pub fn disable_core_dumps() {
    // The hard limit stays as it is: raising it needs a privilege, and nobody has to be kept from it.
    let limited = getrlimit(Resource::RLIMIT_CORE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_CORE, hard.min(1), hard));
    if let Err(errno) = limited {
        tracing::warn!(%errno, "core dumps stay on: a crash may be noticed seconds late");
    }
}

/// How long the service loop may spin before it sleeps: the configured time, or nothing at all where this process has
/// one CPU to itself and its clients (by affinity or by the cgroup's quota). A spin would keep them from answering:
/// 108 µs per round trip instead of 4.
#[must_use]
pub fn spin_time(configured: Duration) -> Duration {
    spin_time_on(configured, std::thread::available_parallelism().map_or(1, usize::from))
}

fn spin_time_on(configured: Duration, cpus: usize) -> Duration {
    if cpus <= 1 { Duration::ZERO } else { configured }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_cpu_never_spins() {
        let spin = Duration::from_micros(20);
        assert_eq!(spin_time_on(spin, 1), Duration::ZERO);
        assert_eq!(spin_time_on(spin, 2), spin);
    }

    #[test]
    fn core_dumps_are_off_and_the_hard_limit_stays() {
        let (_, before) = getrlimit(Resource::RLIMIT_CORE).unwrap();
        disable_core_dumps();
        assert_eq!(getrlimit(Resource::RLIMIT_CORE).unwrap(), (before.min(1), before));
    }
}
