//! Which chunks the engine has promised to have, and whether it has them.
//!
//! Times are the machine's monotonic clock, which all processes share: a lookup must find every chunk that was acknowledged
//! before it began. After a clear, or a cold start that was asked for, the engine rightfully has nothing. The oracle then forgets
//! all promises as well, and does not believe a store that began before that, whenever it ends.

use super::work::Turn;
use crate::instances::Job;
use kvring_adapter::Key;
use std::collections::HashMap;

/// The store that has acknowledged a chunk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Promise {
    /// When the store began, and when the last rank had reported.
    pub(super) began_ns: u64,
    pub(super) ended_ns: u64,
    /// Which scheduler, and which of its requests.
    pub(super) instance: u32,
    pub(super) job: Job,
    /// Of the request's shards of all ranks, those that were there already.
    pub(super) skipped: u32,
}

impl std::fmt::Display for Promise {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Promise { instance, job, skipped, .. } = self;
        write!(f, "request {} of life {} of scheduler {instance} ({skipped} skipped)", job.number, job.life)
    }
}

/// The judge of one run.
#[derive(Debug)]
pub(super) struct Oracle {
    seed: u64,
    /// Chunks that every rank has committed.
    promised: HashMap<Key, Promise>,
    /// Stores that began before this are not believed.
    forgotten_ns: u64,
    /// Nothing is evicted in this phase, so every promise is kept.
    pub(super) roomy: bool,
    /// All of the arena is there: until it is after a cold start, chunks are evicted in any phase.
    pub(super) settled: bool,
    /// A clear is under way: nobody knows which chunks are there.
    clearing: bool,
    /// Chunks that were promised and not there.
    pub(super) lost: u64,
    /// Chunks promised.
    pub(super) acknowledged: u64,
    /// Promised chunks that a lookup had to find.
    pub(super) judged: u64,
    /// The first losses, in words.
    pub(super) told: Vec<String>,
}

/// Losses that are told in words.
const TOLD: usize = 8;

impl Oracle {
    /// Nothing is promised.
    pub(super) fn new(seed: u64) -> Oracle {
        Oracle {
            seed,
            promised: HashMap::new(),
            forgotten_ns: 0,
            roomy: false,
            settled: false,
            clearing: false,
            lost: 0,
            acknowledged: 0,
            judged: 0,
            told: Vec::new(),
        }
    }

    /// Promises that can be broken now.
    pub(super) fn promised(&self) -> usize {
        self.promised.len()
    }

    fn judges(&self) -> bool {
        self.roomy && self.settled && !self.clearing
    }

    /// All ranks have committed a turn's chunks from `from` on.
    pub(super) fn acknowledge(&mut self, turn: Turn, from: u32, promise: Promise) {
        if !self.judges() || promise.began_ns <= self.forgotten_ns {
            return;
        }
        for key in turn.keys(self.seed).into_iter().skip(from as usize) {
            self.acknowledged += 1;
            self.promised.entry(key).or_insert(promise);
        }
    }

    /// A lookup that the engine answered.
    pub(super) fn looked(&mut self, turn: Turn, began_ns: u64, found: u32) {
        if !self.judges() {
            return;
        }
        let keys = turn.keys(self.seed);
        let known = |key: &&Key| self.promised.get(*key).is_some_and(|promise| promise.ended_ns < began_ns);
        let expected = keys.iter().take_while(known).count();
        self.judged += expected as u64;
        let found = found as usize;
        if found < expected {
            let promise = self.promised.get(&keys[found]);
            let ago = promise.map_or(0, |promise| (began_ns - promise.ended_ns) / 1000);
            self.lose(
                expected - found,
                &format!(
                    "{turn:?}: the first {expected} chunks were acknowledged, a lookup found {found}; the next one was \
                     acknowledged {ago} µs before by {}",
                    promise.map(Promise::to_string).unwrap_or_default()
                ),
            );
            // Once is enough.
            for key in &keys[found..expected] {
                self.promised.remove(key);
            }
        }
    }

    fn lose(&mut self, chunks: usize, why: &str) {
        self.lost += chunks as u64;
        tracing::error!(chunks, "lost: {why}");
        if self.told.len() < TOLD {
            self.told.push(format!("{chunks} chunks lost: {why}"));
        }
    }

    /// The engine has started cold, and nobody had asked for that.
    pub(super) fn cold_start(&mut self, now_ns: u64) {
        let promised = self.promised.len();
        if self.roomy && promised > 0 {
            self.lose(promised, "a restart of the engine kept nothing");
        }
        self.forget(now_ns);
    }

    /// Everything may be gone, rightfully.
    pub(super) fn forget(&mut self, now_ns: u64) {
        self.promised.clear();
        self.forgotten_ns = now_ns;
    }

    /// A clear begins.
    pub(super) fn begin_clear(&mut self) {
        self.promised.clear();
        self.clearing = true;
    }

    /// It has ended, whatever it has done.
    pub(super) fn end_clear(&mut self, now_ns: u64) {
        self.clearing = false;
        self.forget(now_ns);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TURN: Turn = Turn { phase: 0, conversation: 3, chunks: 10 };

    fn promise(began_ns: u64, ended_ns: u64) -> Promise {
        Promise { began_ns, ended_ns, instance: 0, job: Job { life: 1, number: 1 }, skipped: 0 }
    }

    fn oracle() -> Oracle {
        let mut oracle = Oracle { roomy: true, settled: true, ..Oracle::new(1) };
        oracle.acknowledge(Turn { chunks: 8, ..TURN }, 0, promise(10, 20));
        oracle
    }

    #[test]
    fn a_promised_prefix_must_be_found_and_its_loss_counts_once() {
        let mut oracle = oracle();
        oracle.looked(TURN, 30, 8);
        oracle.looked(TURN, 30, 10);
        oracle.looked(Turn { chunks: 3, ..TURN }, 30, 3);
        // Began before the last rank had reported: it need not have seen it.
        oracle.looked(TURN, 15, 0);
        assert_eq!((oracle.lost, oracle.judged), (0, 19));
        oracle.looked(TURN, 30, 6);
        oracle.looked(TURN, 40, 6);
        assert_eq!((oracle.lost, oracle.promised()), (2, 6));
    }

    #[test]
    fn a_hole_in_what_was_promised_hides_what_comes_after_it() {
        let mut oracle = Oracle { roomy: true, settled: true, ..Oracle::new(1) };
        oracle.acknowledge(TURN, 4, promise(10, 20));
        oracle.looked(TURN, 30, 0);
        assert_eq!(oracle.lost, 0);
    }

    #[test]
    fn what_may_be_forgotten_is_and_an_unasked_cold_start_is_a_loss() {
        let mut cleared = oracle();
        cleared.begin_clear();
        cleared.acknowledge(TURN, 0, promise(25, 26));
        cleared.looked(TURN, 30, 0);
        cleared.end_clear(40);
        // It began before the clear had ended.
        cleared.acknowledge(TURN, 0, promise(39, 50));
        assert_eq!((cleared.lost, cleared.promised()), (0, 0));
        let mut restarted = oracle();
        restarted.cold_start(50);
        restarted.cold_start(60);
        assert_eq!((restarted.lost, restarted.promised()), (8, 0));
        let mut small = Oracle { roomy: false, ..oracle() };
        small.cold_start(50);
        assert_eq!(small.lost, 0);
    }
}
