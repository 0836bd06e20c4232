//! Keeps copying threads off the CPU of the thread that waits for them.
//!
//! The waiting thread copies too. When it wakes a helper while every other CPU happens to be busy for a moment, the
//! kernel may queue the helper behind it, on its own CPU, and leave it there for a millisecond or more: as long as the
//! whole copy takes. Measured on two CPUs: 27 % of all batches were copied by one thread at a time, and 2 MiB shards
//! moved at 0.78 of the limit instead of 0.93.

use rustix::thread::{CpuSet, Pid, sched_getaffinity, sched_getcpu, sched_setaffinity};
use std::sync::{Mutex, PoisonError};

/// Where a pool's threads may run.
pub(crate) struct Apart {
    /// The CPUs that the thread that made the pool could use; `None` where the kernel did not say.
    allowed: Option<CpuSet>,
    helpers: Vec<Pid>,
    /// The CPU that the helpers avoid now.
    avoided: Mutex<Option<usize>>,
}

impl Apart {
    /// For a pool of these threads, which the calling thread has made.
    pub(crate) fn new(helpers: Vec<Pid>) -> Apart {
        Apart { allowed: sched_getaffinity(None).ok(), helpers, avoided: Mutex::new(None) }
    }

    /// From now on the helpers run on any CPU but the caller's, out of those that the thread that made the pool could use at
    /// that time (a mask that is set later does not count). Costs a few nanoseconds while the caller stays on its CPU. Where
    /// this is not possible, because there is one CPU or the kernel forbids it, nothing changes: copies are only slower.
    pub(crate) fn keep_off_this_cpu(&self) {
        let Some(allowed) = &self.allowed else { return };
        let here = sched_getcpu();
        let mut avoided = self.avoided.lock().unwrap_or_else(PoisonError::into_inner);
        if *avoided == Some(here) {
            return;
        }
        *avoided = Some(here);
        let mut elsewhere = *allowed;
        if here < CpuSet::MAX_CPU {
            elsewhere.unset(here);
        }
        if elsewhere.count() == 0 {
            return;
        }
        for helper in &self.helpers {
            // If the kernel does not let us move a thread, it is only slower.
            let _ = sched_setaffinity(Some(*helper), &elsewhere);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::thread::gettid;
    use std::sync::mpsc;

    fn only(cpu: usize) -> CpuSet {
        let mut set = CpuSet::new();
        set.set(cpu);
        set
    }

    #[test]
    fn helpers_run_anywhere_but_where_the_waiting_thread_is() {
        let allowed = sched_getaffinity(None).unwrap();
        let cpus: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).collect();
        let (tell, told) = mpsc::channel();
        let (end, ended) = mpsc::channel::<()>();
        let helper = std::thread::spawn(move || {
            tell.send(gettid()).unwrap();
            let _ = ended.recv();
        });
        let tid = told.recv().unwrap();
        let apart = Apart::new(vec![tid]);
        for &here in cpus.iter().take(4) {
            sched_setaffinity(None, &only(here)).unwrap();
            apart.keep_off_this_cpu();
            let now = sched_getaffinity(Some(tid)).unwrap();
            if cpus.len() > 1 {
                assert!(!now.is_set(here), "the helper may still run on CPU {here}");
                assert_eq!(now.count() as usize, cpus.len() - 1, "and everywhere else");
            } else {
                assert!(now.is_set(here), "one CPU is all there is");
            }
        }
        drop(end);
        helper.join().unwrap();
    }
}
