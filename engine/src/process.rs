//! Settings of the engine's own process.

use nix::libc;
use nix::sched::CpuSet;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::Pid;
use std::io;
use std::time::Duration;

/// Switches off core dumps of this process. If that is refused, a warning says so.
///
/// When a process dies, the kernel dumps its core before it marks life words. So with a dump, a death by SIGABRT or
/// SIGSEGV is noticed seconds late, and all of the shared memory is copied for nothing. The limit is **1** and not
/// 0: if dumps are piped to a program (`core_pattern` with `|`: systemd-coredump, apport), the kernel ignores a
/// limit of 0, but takes 1 as "no pipe either"; for files, both are below a page and mean no dump.
/// `PR_SET_DUMPABLE` would forbid debuggers and profilers as well.
pub fn disable_core_dumps() {
    // The hard limit stays as it is, because raising it again would need a privilege, and nobody is to be kept from
    // dumps by us.
    let limited = getrlimit(Resource::RLIMIT_CORE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_CORE, hard.min(1), hard));
    if let Err(errno) = limited {
        tracing::warn!(%errno, "core dumps stay on: a crash may be noticed seconds late");
    }
}

/// How long the service loop may spin before it sleeps: the configured time, or not at all if this process and its
/// clients share one CPU (by affinity or by the control group's quota). There a spin would keep the clients from
/// answering: 108 µs per round trip instead of 4.
#[must_use]
pub fn spin_time(configured: Duration) -> Duration {
    spin_time_on(configured, std::thread::available_parallelism().map_or(1, usize::from))
}

fn spin_time_on(configured: Duration, cpus: usize) -> Duration {
    if cpus <= 1 { Duration::ZERO } else { configured }
}

/// Makes this process independent of the process that started it: undoes what it has inherited and would keep for
/// ever. Otherwise an engine that a worker of vLLM starts would run on that worker's one CPU, and have the whole
/// arena on its memory node. Call it before there is any other thread. Returns what could not be undone, with the
/// reasons.
///
/// | inherited | then |
/// | --- | --- |
/// | CPUs (`taskset`, `numactl`) | all that the cpuset allows |
/// | scheduling class, niceness | the usual one, 0 (to lower its niceness, a process needs a privilege or `ulimit -e`) |
/// | memory policy (`numactl`) | interleaved over the nodes that the cpuset allows |
/// | blocked signals | none |
/// | working directory | `/`, so that no file system is kept busy |
///
/// Limits (`ulimit`), the OOM score, control groups, namespaces and seccomp filters stay as they are: leaving them
/// takes privileges.
#[must_use]
pub fn belong_to_the_node() -> Vec<(&'static str, io::Error)> {
    let undone: [(&str, io::Result<()>); 6] = [
        ("CPU affinity", all_cpus()),
        ("scheduling class", usual_class()),
        ("niceness", rustix::process::setpriority_process(None, 0).map_err(io::Error::from)),
        ("memory policy", interleaved()),
        ("blocked signals", SigSet::all().thread_unblock().map_err(io::Error::from)),
        ("working directory", std::env::set_current_dir("/")),
    ];
    undone.into_iter().filter_map(|(what, done)| done.err().map(|error| (what, error))).collect()
}

fn all_cpus() -> io::Result<()> {
    let mut cpus = CpuSet::new();
    // The kernel takes those of these CPUs that exist and that the cpuset allows.
    for cpu in 0..CpuSet::count() {
        cpus.set(cpu)?;
    }
    Ok(nix::sched::sched_setaffinity(Pid::from_raw(0), &cpus)?)
}

fn usual_class() -> io::Result<()> {
    let priority = libc::sched_param { sched_priority: 0 };
    // SAFETY: the call reads one structure, which lives until it returns.
    let done = unsafe { libc::sched_setscheduler(0, libc::SCHED_OTHER, &raw const priority) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// How many memory nodes the mask has room for: more than a kernel can be built for.
const NODES_MAX: usize = 1024;

fn interleaved() -> io::Result<()> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let nodes = listed(field(&status, "Mems_allowed_list").unwrap_or_default());
    let mut mask = [0 as libc::c_ulong; NODES_MAX / libc::c_ulong::BITS as usize];
    for node in nodes.iter().filter(|node| **node < NODES_MAX) {
        mask[node / libc::c_ulong::BITS as usize] |= 1 << (node % libc::c_ulong::BITS as usize);
    }
    let (mode, mask, most) = match nodes.len() {
        // There is one node, or the kernel knows of none.
        0 | 1 => (libc::MPOL_DEFAULT, std::ptr::null(), 0),
        _ => (libc::MPOL_INTERLEAVE, mask.as_ptr(), NODES_MAX),
    };
    // SAFETY: the call reads `most` bits from `mask`, which lives until it returns.
    let done = unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, mask, most) };
    match io::Error::last_os_error() {
        _ if done == 0 => Ok(()),
        // Without NUMA there is no policy to undo.
        error if error.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
        error => Err(error),
    }
}

/// The numbers of a list such as `0-2,5`.
fn listed(text: &str) -> Vec<usize> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse::<usize>().ok()?..=last.parse().ok()?)
    };
    text.split(',').filter_map(range).flatten().collect()
}

/// A field of `/proc/self/status`.
fn field<'a>(status: &'a str, key: &str) -> Option<&'a str> {
    let value = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    Some(value.trim())
}

/// Whether this process ignores this signal, as `nohup` makes it from its start.
#[must_use]
pub fn ignores(signal: Signal) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = field(&status, "SigIgn").and_then(|mask| u64::from_str_radix(mask, 16).ok());
    ignored.is_some_and(|mask| mask >> (signal as i32 - 1) & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_the_kernels_are_read() {
        assert_eq!(listed("0-2,5"), [0, 1, 2, 5]);
        assert_eq!(listed("7"), [7]);
        assert_eq!(listed(""), Vec::<usize>::new());
        assert_eq!(field("Name:\tx\nSigIgn:\t0000000000000001\n", "SigIgn"), Some("0000000000000001"));
        assert!(!ignores(Signal::SIGTERM));
    }

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
