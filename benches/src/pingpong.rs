//! The limits of a round trip between two processes: two cache lines, or two futexes, and nothing else.

use crate::child::{self, Child, Job};
use crate::clock::Clock;
use crate::cores;
use crate::stats::Samples;
use kvring_rig::pipe::Pipe;
use kvring_shm_abi::abi::{Described, Type};
use kvring_shm_abi::futex::{self, Deadline};
use kvring_shm_abi::mapping::{Mapping, Pad, Shared};
use kvring_shm_abi::segment;
use kvring_shm_abi::sync::{AtomicU32, Ordering, spin_loop};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// How the two wait for each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Waiting {
    /// Reading the line again and again.
    Spin,
    /// The same, with the processor's hint in between.
    Pause,
    /// Asleep on a shared futex.
    Futex,
}

/// The other side of a ping-pong.
#[derive(Serialize, Deserialize)]
pub(crate) struct PeerJob {
    segment: String,
    cpu: usize,
}

/// Two lines, far enough apart for a prefetcher that takes them in pairs.
#[repr(C, align(128))]
struct Table {
    ping: AtomicU32,
    _pad0: Pad<124>,
    pong: AtomicU32,
    _pad1: Pad<124>,
}

/// Only this benchmark's own processes look at it.
impl Described for Table {
    const TYPE: &'static Type = &Type::itself::<Table>("Table");
}

// SAFETY: atomics and padding.
unsafe impl Shared for Table {}

/// Bytes of the segment they share.
const BYTES: usize = 4096;

/// A sleep that somebody forgot to end must end.
const PATIENCE: Duration = Duration::from_secs(5);

impl Waiting {
    /// Returns when `word` no longer holds `old`.
    #[inline(always)]
    fn until_changed(self, word: &AtomicU32, old: u32) {
        // SYNC POINT: Acquire; pairs with the Release in `hand_over`.
        while word.load(Ordering::Acquire) == old {
            match self {
                Waiting::Spin => {}
                Waiting::Pause => spin_loop(),
                Waiting::Futex => {
                    futex::wait_any(&[(word, old)], Deadline::after(PATIENCE));
                }
            }
        }
    }

    /// Changes `word`, and wakes the thread that sleeps on it.
    #[inline(always)]
    fn hand_over(self, word: &AtomicU32, new: u32) {
        // SYNC POINT: Release; pairs with the Acquire in `until_changed`.
        word.store(new, Ordering::Release);
        if self == Waiting::Futex {
            futex::wake(word, 1);
        }
    }
}

/// The other side, waiting for windows.
pub(crate) struct Peer {
    child: Child,
    shared: Mapping,
}

impl Peer {
    /// Starts it on a CPU.
    pub(crate) fn spawn(cpu: usize) -> anyhow::Result<Peer> {
        let segment = format!("kvring-{}", child::unique_name());
        let shared = segment::create_shared(&segment, BYTES)?;
        let child = Child::spawn(&PeerJob { segment: segment.clone(), cpu }).and_then(|mut child| {
            child.read::<()>()?;
            Ok(child)
        });
        segment::unlink(&segment);
        Ok(Peer { child: child?, shared })
    }

    /// One window of `rounds` round trips, each timed, with a pause before each.
    pub(crate) fn window(
        &mut self,
        waiting: Waiting,
        rounds: u32,
        pause_ns: f64,
        clock: &Clock,
    ) -> anyhow::Result<Samples> {
        self.child.ask::<()>(&(waiting, rounds))?;
        let table: &Table = self.shared.at(0)?;
        let mut samples = Samples::with_capacity(rounds as usize);
        let first = table.pong.load(Ordering::Relaxed);
        for round in 0..rounds {
            if pause_ns > 0.0 {
                clock.pause(pause_ns);
            }
            let old = first.wrapping_add(round);
            let before = clock.ticks();
            waiting.hand_over(&table.ping, old.wrapping_add(1));
            waiting.until_changed(&table.pong, old);
            samples.push(clock.ticks() - before);
        }
        Ok(samples)
    }
}

impl Job for PeerJob {
    const NAME: &'static str = "peer";

    /// The child's side.
    fn be(self, mut pipe: Pipe) -> anyhow::Result<()> {
        cores::pin(&[self.cpu])?;
        let shared = segment::open_shared(&self.segment, BYTES)?;
        let table: &Table = shared.at(0)?;
        child::answer(&mut pipe, &())?;
        while let Some((waiting, rounds)) = pipe.receive::<(Waiting, u32)>(None)? {
            let first = table.ping.load(Ordering::Relaxed);
            child::answer(&mut pipe, &())?;
            for round in 0..rounds {
                let old = first.wrapping_add(round);
                waiting.until_changed(&table.ping, old);
                waiting.hand_over(&table.pong, old.wrapping_add(1));
            }
        }
        Ok(())
    }
}
