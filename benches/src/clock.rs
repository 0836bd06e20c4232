//! Time: a tick counter for intervals of tens of nanoseconds, and the CPU time of another process.

use kvring_shm_abi::futex::monotonic_ns;
use kvring_shm_abi::sync::spin_loop;
use std::time::Duration;

/// Reads ticks and knows how long one is.
///
/// On x86-64 with a constant time-stamp counter a tick is that counter's, elsewhere a nanosecond: `clock_gettime`
/// costs 20–40 ns, which is too much beside a round trip of 100.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    counter: bool,
    ns_per_tick: f64,
    /// Ticks between two readings with nothing in between.
    overhead: u64,
}

/// Long enough that reading the other clock does not show.
const CALIBRATION: Duration = Duration::from_millis(40);

impl Clock {
    /// Calibrates.
    pub(crate) fn new() -> Clock {
        let mut clock = Clock { counter: has_constant_counter(), ns_per_tick: 1.0, overhead: 0 };
        if clock.counter {
            let (ns, ticks) = (monotonic_ns(), clock.ticks());
            std::thread::sleep(CALIBRATION);
            let (ns, ticks) = (monotonic_ns() - ns, clock.ticks() - ticks);
            clock.ns_per_tick = ns as f64 / ticks.max(1) as f64;
        }
        let mut samples = crate::stats::Samples::with_capacity(1000);
        let mut before = clock.ticks();
        for _ in 0..1000 {
            let now = clock.ticks();
            samples.push(now - before);
            before = now;
        }
        clock.overhead = samples.percentile(0.5).unwrap_or(0);
        clock
    }

    /// The counter now. The processor has done everything that comes before this call in the program.
    #[inline(always)]
    pub(crate) fn ticks(&self) -> u64 {
        #[cfg(target_arch = "x86_64")]
        if self.counter {
            // SAFETY: SSE2 and the counter are part of x86-64.
            return unsafe {
                core::arch::x86_64::_mm_lfence();
                core::arch::x86_64::_rdtsc()
            };
        }
        monotonic_ns()
    }

    /// Ticks as nanoseconds.
    pub(crate) fn ns(&self, ticks: u64) -> f64 {
        ticks as f64 * self.ns_per_tick
    }

    /// The time between two readings, without the time that a reading takes.
    pub(crate) fn between_ns(&self, ticks: u64) -> f64 {
        self.ns(ticks.saturating_sub(self.overhead))
    }

    /// Does nothing for a while, without sleeping.
    pub(crate) fn pause(&self, ns: f64) {
        let started = self.ticks();
        while self.ns(self.ticks() - started) < ns {
            spin_loop();
        }
    }

    /// How long a reading takes.
    pub(crate) fn overhead_ns(&self) -> f64 {
        self.ns(self.overhead)
    }
}

fn has_constant_counter() -> bool {
    cfg!(target_arch = "x86_64")
        && std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| text.contains("constant_tsc"))
}

/// CPU time that a process has used, all its threads together, in nanoseconds.
pub(crate) fn process_cpu_ns(pid: u32) -> anyhow::Result<u64> {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid)?);
    let time = nix::time::clock_gettime(nix::time::clock_getcpuclockid(pid)?)?;
    Ok(u64::try_from(time.tv_sec())? * 1_000_000_000 + u64::try_from(time.tv_nsec())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_and_nanoseconds_agree() {
        let clock = Clock::new();
        let (ns, ticks) = (monotonic_ns(), clock.ticks());
        std::thread::sleep(Duration::from_millis(5));
        let ticks = clock.ticks() - ticks;
        let ns = (monotonic_ns() - ns) as f64;
        // This compares two clocks over one interval. The slack is for preemption between their readings.
        assert!((clock.ns(ticks) - ns).abs() < ns / 2.0, "{} against {ns}", clock.ns(ticks));
        assert_eq!(clock.between_ns(0), 0.0);
    }

    #[test]
    fn a_process_that_does_not_exist_has_no_cpu_time() {
        assert!(process_cpu_ns(std::process::id()).unwrap() > 0);
        // Above the largest id that a kernel can be told to give.
        assert!(process_cpu_ns((1 << 22) + 1).is_err());
    }
}
