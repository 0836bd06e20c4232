//! A scheduler's requests: the state of each of them, and the ranks that it waits for.

use super::message::{Job, Life, Outcome};
use crate::chaos::Turn;
use kvring_adapter::Key;
use std::time::Instant;

/// The state of a request: it waits for this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// The ranks' loads.
    Loading,
    /// The ranks' stores.
    Storing,
    /// Nothing: its client has gone away, and somebody will notice then.
    Abandoned(Instant),
    /// Nothing: its session has ended already, and its load is sent only then.
    Stale(Instant),
}

/// A request whose session is open, or of which workers still have work.
#[derive(Clone, Debug)]
pub(super) struct Request {
    /// Its name for the workers.
    pub(super) job: Job,
    /// The turn of a conversation that it is; none if the coordinator has handed it out.
    pub(super) turn: Option<Turn>,
    /// Its keys.
    pub(super) keys: Vec<Key>,
    /// Chunks that its lookup found.
    pub(super) hit: usize,
    /// Where it is.
    pub(super) state: State,
    /// When that began.
    pub(super) since: Instant,
    /// Is it part of the last look at everything?
    pub(super) audit: bool,
    /// How long its lookup took.
    pub(super) lookup_ns: u64,
    /// When it is preempted.
    pub(super) preempt: Option<Instant>,
    /// When its store began.
    pub(super) store_ns: u64,
    /// Another request of this scheduler stores some of the same chunks: the newer round replaces the older one, and
    /// what was skipped for it is not there yet.
    contested: bool,
    /// Shards of its store that were there already.
    pub(super) skipped: u32,
    /// Ranks that have not answered, a bit each.
    waiting: u64,
    /// Something of the load or store went wrong.
    failed: bool,
    /// The engine's life, as far as it is one.
    life: Option<Life>,
}

impl Request {
    /// A request that has been looked up.
    pub(super) fn new(job: Job, turn: Option<Turn>, keys: Vec<Key>, hit: usize) -> Request {
        let (state, since) = (State::Loading, Instant::now());
        Request {
            job,
            turn,
            keys,
            hit,
            state,
            since,
            audit: false,
            lookup_ns: 0,
            preempt: None,
            store_ns: 0,
            contested: false,
            skipped: 0,
            waiting: 0,
            failed: false,
            life: None,
        }
    }

    /// So many ranks have been told something.
    pub(super) fn begin(&mut self, state: State, ranks: u32) {
        let all = u64::MAX >> (64 - ranks);
        (self.state, self.since, self.waiting, self.failed) = (state, Instant::now(), all, false);
    }

    /// The store begins.
    pub(super) fn begin_store(&mut self, now_ns: u64, life: Option<Life>, ranks: u32) {
        self.begin(State::Storing, ranks);
        (self.store_ns, self.life) = (now_ns, life);
    }

    /// The keys that are being stored.
    pub(super) fn storing(&self) -> &[Key] {
        if self.state == State::Storing { &self.keys[self.hit..] } else { &[] }
    }

    /// If both store the same chunks, skipped ones count as acknowledged for neither.
    pub(super) fn contest(&mut self, other: &mut Request) {
        if self.storing().iter().any(|key| other.storing().contains(key)) {
            (self.contested, other.contested) = (true, true);
        }
    }

    /// Does somebody work for it?
    pub(super) fn is_busy(&self) -> bool {
        !matches!(self.state, State::Abandoned(_) | State::Stale(_))
    }

    /// Does it wait for this rank?
    pub(super) fn waits_for(&self, rank: u32) -> bool {
        self.waiting & 1 << rank != 0
    }

    /// A rank has answered. True once all have.
    pub(super) fn answered(&mut self, rank: u32, outcome: Outcome) -> bool {
        let waited = self.waiting != 0;
        self.waiting &= !(1 << rank);
        match (outcome, self.state) {
            (Outcome::Stored { stored, skipped, life }, State::Storing) => {
                self.skipped += skipped;
                let whole = (stored + skipped) as usize == self.keys.len() - self.hit;
                self.failed |= !whole || life.is_none() || life != self.life;
            }
            (Outcome::Loaded, State::Loading) => {}
            _ => self.failed = true,
        }
        waited && self.waiting == 0
    }

    /// Have all ranks committed all of it, in one round and in one life of the engine?
    pub(super) fn acknowledged(&self) -> bool {
        self.state == State::Storing && self.waiting == 0 && !self.failed && !self.contested
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIFE: Option<Life> = Some(Life { arena_id: [1, 2], incarnation: 4 });

    fn storing(conversation: u32, number: u32) -> Request {
        let turn = Turn { phase: 0, conversation, chunks: 6 };
        let mut request = Request::new(Job { life: 1, number }, Some(turn), turn.keys(1), 2);
        request.begin_store(7, LIFE, 2);
        request
    }

    fn stored(stored: u32, life: Option<Life>) -> Outcome {
        Outcome::Stored { stored, skipped: 0, life }
    }

    #[test]
    fn only_what_all_ranks_committed_in_one_life_is_acknowledged() {
        let mut request = storing(1, 1);
        assert!(!request.answered(0, stored(4, LIFE)) && !request.acknowledged());
        assert!(request.answered(1, stored(4, LIFE)) && request.acknowledged());
        for (acknowledged, life) in
            [(3, LIFE), (4, None), (4, Some(Life { arena_id: [1, 2], incarnation: 6 }))]
        {
            let mut request = storing(1, 1);
            request.answered(0, stored(4, LIFE));
            assert!(request.answered(1, stored(acknowledged, life)) && !request.acknowledged());
        }
    }

    #[test]
    fn who_stores_the_same_chunks_at_once_is_not_believed() {
        let (mut one, mut other, mut third) = (storing(1, 1), storing(7, 2), storing(2, 3));
        one.contest(&mut third);
        assert!(!one.contested && !third.contested);
        one.contest(&mut other);
        assert!(one.contested && other.contested, "chunks 2 and 3 are the family's");
    }
}
