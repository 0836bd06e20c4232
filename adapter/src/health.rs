//! What a client concludes about its engine, from the engine's life word, its epoch, and looks at its beat.

use kvring_shm_abi::futex::monotonic_ns;
use kvring_shm_abi::sync::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// The engine's health as this client sees it. Everything but `Healthy` is *degraded*: a store may be dropped, a lookup
/// may answer 0, a load may fail; but there are never wrong bytes, a hang or a leak.
///
/// # Example
/// ```
/// use kvring_adapter::Health;
///
/// assert!(Health::Healthy.is_healthy() && !Health::Stalled.is_healthy());
/// assert_eq!(
///     Health::Absent.explain("mine"),
///     "no kvring engine named mine runs here: start it with `kvring serve --name mine`"
/// );
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// The client is attached, the incarnation is still the same, and the beat moves.
    Healthy,
    /// No engine of that name has been found yet.
    Absent,
    /// The engine's process has died; the keeper looks for a successor.
    Dead,
    /// The engine is recovering: not ready yet.
    Recovering,
    /// The engine has been restarted, or this client is attaching again.
    Attaching,
    /// The engine lives, but its loop does not move.
    Stalled,
    /// The engine found its own invariants broken and stopped serving: see `kvring status`.
    Unhealthy,
    /// The client table is full, or the engine refused this client, for this reason.
    Refused(String),
    /// The engine comes from another release or build, with this difference.
    Incompatible(String),
    /// This client has been shut down, or its keeper has failed.
    ShutDown,
}

impl Health {
    /// True for `Healthy` alone.
    #[must_use]
    pub fn is_healthy(&self) -> bool {
        *self == Health::Healthy
    }

    /// A sentence for people who run an engine of that name and know nothing of this crate: what is wrong, and what
    /// they can do about it.
    #[must_use]
    pub fn explain(&self, engine: &str) -> String {
        match self {
            Health::Healthy => "it is well".to_owned(),
            Health::Absent => {
                format!(
                    "no kvring engine named {engine} runs here: start it with `kvring serve --name {engine}`"
                )
            }
            Health::Dead => {
                format!("its process has died: start it again with `kvring serve --name {engine}`")
            }
            Health::Recovering => "it is starting, and may be taking over what it held before".to_owned(),
            Health::Attaching => "it was started anew: connecting to it".to_owned(),
            Health::Stalled => format!(
                "it does not respond: its process is stopped, or gets no CPU time (`kvring status --name {engine}`)"
            ),
            Health::Unhealthy => {
                "it found an error in its own tables and stopped serving: see its log, and start it again"
                    .to_owned()
            }
            Health::Refused(why) | Health::Incompatible(why) => why.clone(),
            Health::ShutDown => "kvring has been shut down in this process".to_owned(),
        }
    }
}

impl core::fmt::Display for Health {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Health::Healthy => f.write_str("healthy"),
            Health::Absent => f.write_str("absent"),
            Health::Dead => f.write_str("dead"),
            Health::Recovering => f.write_str("recovering"),
            Health::Attaching => f.write_str("attaching"),
            Health::Stalled => f.write_str("stalled"),
            Health::Unhealthy => f.write_str("unhealthy"),
            Health::Refused(why) => write!(f, "refused: {why}"),
            Health::Incompatible(why) => write!(f, "incompatible: {why}"),
            Health::ShutDown => f.write_str("shut down"),
        }
    }
}

/// Only gaps between two looks of this client that are at most this long count towards a stall: after a longer one it
/// cannot tell when the beat last moved.
const GAP_MAX_NS: u64 = 100_000_000;

/// Watches the beat of one attachment's engine. It is private to the process. Several threads may look at once; a race
/// between two looks only loses one short gap.
#[derive(Debug)]
pub(crate) struct StallClock {
    stall_after_ns: u64,
    /// The beat at the last look.
    beat: AtomicU32,
    /// When the last look was.
    looked_ns: AtomicU64,
    /// For how long the beat has stood still, in gaps of at most [`GAP_MAX_NS`].
    still_ns: AtomicU64,
    /// [`SUSPECT`], [`BROKEN`] and [`GONE`] in one value, so that a health check of a healthy engine needs one load of
    /// it.
    trouble: AtomicU32,
}

/// The beat stood still for too long, or an operation reached its deadline under an unmoved beat: degraded until the
/// beat moves.
const SUSPECT: u32 = 1;
/// The engine broke the protocol: nothing that comes through this attachment is believed any more.
const BROKEN: u32 = 2;
/// The engine has died, as its file lock shows: its life word does not say so, and a client cannot write that.
const GONE: u32 = 4;

impl StallClock {
    pub(crate) fn new(stall_after: Duration, beat: u32) -> StallClock {
        StallClock {
            stall_after_ns: u64::try_from(stall_after.as_nanos()).unwrap_or(u64::MAX),
            beat: AtomicU32::new(beat),
            looked_ns: AtomicU64::new(monotonic_ns()),
            still_ns: AtomicU64::new(0),
            trouble: AtomicU32::new(0),
        }
    }

    /// Takes in a look at the beat, at time `now_ns`.
    pub(crate) fn look_at(&self, beat: u32, now_ns: u64) {
        // Relaxed throughout: these are one process's guesses about another, and publish nothing.
        let before = self.looked_ns.swap(now_ns, Ordering::Relaxed);
        if self.beat.swap(beat, Ordering::Relaxed) != beat {
            self.still_ns.store(0, Ordering::Relaxed);
            self.trouble.fetch_and(!SUSPECT, Ordering::Relaxed);
            return;
        }
        let gap = now_ns.saturating_sub(before);
        if gap <= GAP_MAX_NS {
            let still = self.still_ns.fetch_add(gap, Ordering::Relaxed) + gap;
            if still >= self.stall_after_ns {
                self.trouble.fetch_or(SUSPECT, Ordering::Relaxed);
            }
        }
    }

    /// Takes in a look at the beat, now.
    pub(crate) fn look(&self, beat: u32) {
        self.look_at(beat, monotonic_ns());
    }

    /// Takes in that an operation that began under beat `began` reached its deadline.
    pub(crate) fn deadline_missed(&self, began: u32, beat: u32) {
        if began == beat {
            self.beat.store(beat, Ordering::Relaxed);
            self.trouble.fetch_or(SUSPECT, Ordering::Relaxed);
        }
    }

    /// Says that the engine broke the protocol. True for the first call.
    pub(crate) fn break_off(&self) -> bool {
        self.trouble.fetch_or(BROKEN, Ordering::Relaxed) & BROKEN == 0
    }

    /// Did the engine break the protocol?
    pub(crate) fn is_broken(&self) -> bool {
        self.trouble.load(Ordering::Relaxed) & BROKEN != 0
    }

    /// Says that the engine has died though its life word does not show it. True for the first call.
    pub(crate) fn engine_gone(&self) -> bool {
        // SYNC POINT: Release; pairs with the Acquire in `is_gone`.
        self.trouble.fetch_or(GONE, Ordering::Release) & GONE == 0
    }

    /// Has the engine died, as its file lock shows?
    #[inline]
    pub(crate) fn is_gone(&self) -> bool {
        self.trouble.load(Ordering::Acquire) & GONE != 0
    }

    /// Is the engine stalled, broken or gone? `beat` is called only if it may be; if the beat has moved, the engine is
    /// not stalled.
    #[inline]
    pub(crate) fn troubled(&self, beat: impl FnOnce() -> u32) -> bool {
        self.trouble.load(Ordering::Relaxed) != 0 && self.still_troubled(beat())
    }

    #[cold]
    fn still_troubled(&self, beat: u32) -> bool {
        self.look(beat);
        self.trouble.load(Ordering::Relaxed) != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn clock() -> StallClock {
        let clock = StallClock::new(Duration::from_secs(2), 7);
        clock.looked_ns.store(0, Ordering::Relaxed);
        clock
    }

    #[test]
    fn a_beat_that_stands_still_under_our_eyes_is_a_stall_and_moving_ends_it() {
        let clock = clock();
        for step in 1..=39 {
            clock.look_at(7, step * 50 * MS);
            assert!(!clock.troubled(|| 7), "after {step} looks");
        }
        clock.look_at(7, 40 * 50 * MS);
        assert!(clock.troubled(|| 7));
        assert!(!clock.troubled(|| 8), "a beat that has moved is not stalled, whoever looks first");
        clock.look_at(8, 41 * 50 * MS);
        assert!(!clock.troubled(|| 8));
    }

    #[test]
    fn an_engine_that_is_gone_stays_gone_whatever_its_beat_seems_to_do() {
        let clock = clock();
        assert!(!clock.is_gone() && !clock.troubled(|| 7));
        assert!(clock.engine_gone() && !clock.engine_gone(), "one says so first");
        assert!(clock.is_gone() && clock.troubled(|| 8) && clock.troubled(|| 9));
        assert!(!clock.is_broken());
    }

    #[test]
    fn who_looked_away_concludes_nothing() {
        let clock = clock();
        // Five minutes of warm-up without a call, then an hour in a debugger: for all that this client saw, the beat
        // did not move.
        for pause in [300_000, 3_600_000, 101] {
            let now = clock.looked_ns.load(Ordering::Relaxed) + pause * MS;
            clock.look_at(7, now);
            assert!(!clock.troubled(|| 7));
        }
    }

    #[test]
    fn a_missed_deadline_under_an_unmoved_beat_degrades_at_once_until_it_moves() {
        let clock = clock();
        clock.deadline_missed(6, 7);
        assert!(!clock.troubled(|| 7), "the beat moved during the operation: slow, not stalled");
        clock.deadline_missed(7, 7);
        assert!(clock.troubled(|| 7));
        assert!(!clock.troubled(|| 8));
        assert!(!clock.troubled(|| 8));
    }
}
