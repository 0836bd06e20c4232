//! Every call into the adapter against its own deadline; a canary that knows how late the machine itself was, and the kernel's
//! word on how long the caller had no core.

use super::message::Tally;
use anyhow::Context;
use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How much longer a call may take than its deadline and the machine's own lateness allow.
const SLACK: Duration = Duration::from_millis(20);
/// How long the canary sleeps.
const NAP: Duration = Duration::from_millis(1);
/// A shorter overshoot is no gap.
const GAP_MIN: Duration = Duration::from_micros(500);
/// Gaps that are kept.
const GAPS: usize = 4096;
/// A gap that ended so long before a call still counts: threads that were late then have work to catch up with.
const AROUND: Duration = Duration::from_millis(50);
/// Misses that are told in words.
const TOLD: usize = 4;

/// The gaps that the canary has seen.
#[derive(Debug, Default)]
struct Seen {
    /// Gaps: when they ended, and how long they were.
    gaps: VecDeque<(Instant, Duration)>,
    /// The end of its last nap.
    awake: Option<Instant>,
}

/// Times calls; keeps the tally of them.
#[derive(Debug)]
pub(super) struct Watch {
    /// The gaps that the canary has seen; `None` where calls are only counted.
    seen: Option<Arc<Mutex<Seen>>>,
    tally: Tally,
    /// The kernel's statistics of this thread; `None` where there are none.
    schedstat: Option<File>,
}

impl Watch {
    /// A watch that only counts.
    pub(super) fn that_counts() -> Watch {
        Watch { seen: None, tally: Tally::default(), schedstat: None }
    }

    /// Starts the canary.
    pub(super) fn start() -> anyhow::Result<Watch> {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let theirs = seen.clone();
        let canary = move || {
            loop {
                let began = Instant::now();
                thread::sleep(NAP);
                let now = Instant::now();
                let gap = (now - began).saturating_sub(NAP);
                let mut seen = theirs.lock().unwrap_or_else(PoisonError::into_inner);
                seen.awake = Some(now);
                if gap >= GAP_MIN {
                    if seen.gaps.len() == GAPS {
                        seen.gaps.pop_front();
                    }
                    seen.gaps.push_back((now, gap));
                }
            }
        };
        thread::Builder::new()
            .name("chaos-canary".to_owned())
            .spawn(canary)
            .context("the canary's thread")?;
        let schedstat = File::open("/proc/thread-self/schedstat").ok();
        Ok(Watch { seen: Some(seen), tally: Tally::default(), schedstat })
    }

    /// How long this thread was ready and had no core: no call is to be blamed for that.
    fn refused(&self) -> Duration {
        let mut told = [0; 64];
        let read = self.schedstat.as_ref().and_then(|file| file.read_at(&mut told, 0).ok()).unwrap_or(0);
        let told = str::from_utf8(&told[..read]).unwrap_or_default();
        Duration::from_nanos(told.split(' ').nth(1).and_then(|ns| ns.parse().ok()).unwrap_or(0))
    }

    /// Does it, and sees whether it returns by its deadline.
    pub(super) fn call<T>(&mut self, what: &str, deadline: Duration, call: impl FnOnce() -> T) -> T {
        self.tally.operations += 1;
        let Some(seen) = self.seen.clone() else { return call() };
        let (began, refused) = (Instant::now(), self.refused());
        let result = call();
        let took = began.elapsed();
        let deadline = deadline + self.refused().saturating_sub(refused);
        if took > deadline + SLACK {
            self.look_closer(&seen, what, deadline, began, took);
        }
        result
    }

    /// A call took longer than it may. Was it the machine, or a stop of this process? The canary saw the same then.
    fn look_closer(
        &mut self,
        seen: &Mutex<Seen>,
        what: &str,
        deadline: Duration,
        began: Instant,
        took: Duration,
    ) {
        let ended = began + took;
        // Its nap that overlaps the end of the call has to be over.
        while locked(seen).awake.is_none_or(|awake| awake < ended + NAP) {
            thread::sleep(NAP);
        }
        let from = began.checked_sub(AROUND).unwrap_or(began);
        let overlaps = |(end, gap): &&(Instant, Duration)| *end >= from && *end - *gap <= ended;
        let gap = locked(seen).gaps.iter().filter(overlaps).map(|(_, gap)| *gap).max().unwrap_or_default();
        if took > deadline + gap + SLACK {
            self.tally.deadline_misses += 1;
            let ms = |time: Duration| time.as_secs_f64() * 1e3;
            let text = format!(
                "{what} took {:.1} ms: expected at most {:.1} ms, and {:.1} ms for the largest gap around it",
                ms(took),
                ms(deadline + SLACK),
                ms(gap)
            );
            tracing::error!("{text}");
            if self.tally.missed.len() < TOLD {
                self.tally.missed.push(text);
            }
        }
    }

    /// The tally, to count in.
    pub(super) fn tally(&mut self) -> &mut Tally {
        &mut self.tally
    }

    /// Everything since the last time.
    pub(super) fn take(&mut self) -> Tally {
        let largest = self.seen.as_ref().map_or(Duration::ZERO, |seen| {
            let seen = locked(seen);
            let recent =
                seen.gaps.iter().rev().take_while(|(end, _)| end.elapsed() < Duration::from_secs(10));
            recent.map(|(_, gap)| *gap).max().unwrap_or_default()
        });
        self.tally.gap_us = u64::try_from(largest.as_micros()).unwrap_or(u64::MAX);
        core::mem::take(&mut self.tally)
    }
}

fn locked(seen: &Mutex<Seen>) -> std::sync::MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_dawdles_is_told_and_who_is_punctual_is_not() {
        let mut watch = Watch::start().unwrap();
        assert_eq!(watch.call("add", Duration::ZERO, || 1 + 1), 2);
        let before = watch.take();
        assert_eq!((before.operations, before.deadline_misses), (1, 0));
        // Longer than any gap that a test machine has; the canary naps happily meanwhile.
        watch.call("dawdle", Duration::from_millis(5), || thread::sleep(Duration::from_millis(800)));
        let tally = watch.take();
        assert_eq!((tally.operations, tally.deadline_misses), (1, 1), "{tally:?}");
        assert!(tally.missed[0].starts_with("dawdle took"), "{tally:?}");
        assert_eq!(watch.take().deadline_misses, 0);
    }
}
