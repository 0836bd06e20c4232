//! The CPUs that there are, and how busy they are.

use anyhow::Context;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// CPUs that this process may run on.
pub(crate) fn usable() -> anyhow::Result<Vec<usize>> {
    let mask = sched_getaffinity(Pid::from_raw(0)).context("sched_getaffinity")?;
    Ok((0..CpuSet::count()).filter(|cpu| mask.is_set(*cpu).unwrap_or(false)).collect())
}

/// Pins the calling thread, and those that it starts from now on.
pub(crate) fn pin(cpus: &[usize]) -> anyhow::Result<()> {
    let mut mask = CpuSet::new();
    for cpu in cpus {
        mask.set(*cpu).with_context(|| format!("CPU {cpu}"))?;
    }
    sched_setaffinity(Pid::from_raw(0), &mask).with_context(|| format!("sched_setaffinity to CPUs {cpus:?}"))
}

/// Does `work` on a thread that is pinned, as are the threads that it starts.
pub(crate) fn on<T: Send>(
    cpus: &[usize],
    work: impl FnOnce() -> anyhow::Result<T> + Send,
) -> anyhow::Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            pin(cpus)?;
            work()
        });
        thread.join().map_err(|_| anyhow::anyhow!("a measuring thread panicked"))?
    })
}

/// The two CPUs of a measurement between two processes: ours and the other's. One CPU where there is only one.
#[derive(Clone, Debug)]
pub(crate) struct Pair {
    /// The client's.
    pub(crate) ours: usize,
    /// The engine's.
    pub(crate) theirs: usize,
    /// All there are.
    pub(crate) all: Vec<usize>,
}

impl Pair {
    /// The first two CPUs that this process may use.
    pub(crate) fn choose() -> anyhow::Result<Pair> {
        let all = usable()?;
        let ours = *all.first().context("expected a CPU in the affinity mask, got none")?;
        Ok(Pair { ours, theirs: all.get(1).copied().unwrap_or(ours), all })
    }

    /// Are there two?
    pub(crate) fn two(&self) -> bool {
        self.ours != self.theirs
    }

    /// The CPUs of a measurement, for people.
    pub(crate) fn describe(&self) -> String {
        let load = load_average().map_or_else(|| "unknown".to_owned(), |load| format!("{load:.2}"));
        let siblings = match smt_siblings(self.ours) {
            Some(list) if list.contains(&self.theirs) && self.two() => ", two threads of one core",
            _ => "",
        };
        let cpus = self.all.len();
        format!(
            "{cpus} CPU{} usable; client on CPU {}, engine on CPU {}{siblings}; load average {load} before the run",
            if cpus == 1 { "" } else { "s" },
            self.ours,
            self.theirs
        )
    }
}

/// How many threads wanted a CPU, on average over the last minute.
pub(crate) fn load_average() -> Option<f64> {
    std::fs::read_to_string("/proc/loadavg").ok()?.split(' ').next()?.parse().ok()
}

/// The hardware threads of a CPU's core.
fn smt_siblings(cpu: usize) -> Option<Vec<usize>> {
    let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
    parse_list(std::fs::read_to_string(path).ok()?.trim())
}

/// A list as the kernel writes it: `0-3,8`.
fn parse_list(text: &str) -> Option<Vec<usize>> {
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        cpus.extend(first.parse::<usize>().ok()?..=last.parse::<usize>().ok()?);
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cpus() {
        assert_eq!(parse_list("0"), Some(vec![0]));
        assert_eq!(parse_list("0-2,8"), Some(vec![0, 1, 2, 8]));
        assert_eq!(parse_list("x"), None);
    }

    #[test]
    fn pinning_ends_with_its_thread() {
        let before = usable().unwrap();
        let inside = on(&before[..1], usable).unwrap();
        assert_eq!((inside, usable().unwrap()), (before[..1].to_vec(), before));
    }
}
