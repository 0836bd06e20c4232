//! The slots that this worker was granted and whose commit or abort is not done yet: those that the engine believes it
//! is writing.
//!
//! A slot that an engine has granted stays WRITING until its writer commits or aborts it, whatever becomes of that
//! engine. So the mover enters every grant here before its copy may begin. A batch leaves when its commit has been
//! answered, or when it is aborted. After a restart the keeper declares all that is here to the new engine, which frees
//! the rest.
//!
//! **A grant counts only if it came through the attachment that the ledger is at.** From the moment at which the keeper
//! takes stock for the new engine ([`Ledger::begin_declaring`]), the ledger refuses a grant that comes late through the
//! old channel: the new engine frees these slots, and may have given them to somebody else before we write them.
//!
//! A commit or abort that the mover decides on while no engine is attached is a *duty*: the keeper sends it when there
//! is a new attachment.

use crate::at::At;
use crate::batch::{BatchId, Settled};
use crate::link::Link;
use kvring_shm_abi::failpoint::{self, Rule};
use kvring_shm_abi::message::SlotRecord;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

enum Duty {
    /// A copy may be running.
    Writing,
    /// The copy has ended, and the engine has not answered the commit yet.
    Commit,
    /// The slots will not be written and no copy of them runs, but they may have been declared: they must be aborted.
    Abort,
    /// The engine has answered the commit, and the mover has not taken the outcome yet.
    Settled(Settled),
}

struct Batch {
    records: Vec<SlotRecord>,
    duty: Duty,
    /// The mover does not wait for the outcome any more.
    left: bool,
}

struct State {
    at: At,
    batches: HashMap<BatchId, Batch>,
    last: u64,
}

/// See the module's documentation.
pub(crate) struct Ledger {
    state: Mutex<State>,
}

/// The duties that the keeper does through a new attachment.
#[derive(Default)]
pub(crate) struct Duties {
    /// To be committed.
    pub(crate) commits: Vec<(BatchId, Vec<SlotRecord>)>,
    /// To be aborted.
    pub(crate) aborts: Vec<SlotRecord>,
}

impl Default for Ledger {
    fn default() -> Self {
        let state = State { at: At::Nowhere, batches: HashMap::new(), last: 0 };
        Ledger { state: Mutex::new(state) }
    }
}

impl Ledger {
    /// The state, after taking in the link's answers to commits that nobody waits for.
    fn state(&self) -> MutexGuard<'_, State> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.take_late_answers();
        state
    }

    /// Mover: enters slots that were granted through `link`. `None`: the grant came too late, the slots are not ours,
    /// and nothing may be written there.
    pub(crate) fn hold(&self, link: &Arc<Link>, records: Vec<SlotRecord>) -> Option<BatchId> {
        let mut state = self.state();
        let is_current = state.at.is(link);
        if !is_current && !failpoint::broken(Rule::LateGrants) {
            return None;
        }
        state.last += 1;
        let id = BatchId(state.last);
        state.batches.insert(id, Batch { records, duty: Duty::Writing, left: false });
        Some(id)
    }

    /// Mover: the copy has ended. Returns what to commit and through which link. `None`: the keeper commits it once
    /// there is an engine again, or the batch was forgotten with its arena.
    pub(crate) fn commit(&self, id: BatchId, checksums: &[u64]) -> Option<(Arc<Link>, Vec<SlotRecord>)> {
        let mut guard = self.state();
        let state = &mut *guard;
        // A batch that was given up with its arena must never reach another engine.
        let batch = state.batches.get_mut(&id).filter(|batch| matches!(batch.duty, Duty::Writing))?;
        for (record, checksum) in batch.records.iter_mut().zip(checksums) {
            record.checksum = *checksum;
        }
        batch.duty = Duty::Commit;
        match &state.at {
            At::Attached(link) => Some((link.clone(), batch.records.clone())),
            At::Nowhere | At::Declaring => None,
        }
    }

    /// Mover: the batch will not be written, and no copy of it runs. Returns what to abort now, and through which link.
    pub(crate) fn abort(&self, id: BatchId) -> Option<(Arc<Link>, Vec<SlotRecord>)> {
        let mut guard = self.state();
        let state = &mut *guard;
        if matches!(state.batches.get(&id)?.duty, Duty::Settled(_)) {
            state.batches.remove(&id);
            return None;
        }
        match &state.at {
            At::Attached(link) => {
                let batch = state.batches.remove(&id)?;
                Some((link.clone(), batch.records))
            }
            // The keeper may be declaring it at this moment, so it must be aborted afterwards.
            At::Declaring => {
                state.batches.get_mut(&id)?.duty = Duty::Abort;
                None
            }
            // The next engine frees it because nobody declares it.
            At::Nowhere => {
                state.batches.remove(&id);
                None
            }
        }
    }

    /// Enters the engine's answer to the batch's commit.
    pub(crate) fn settle(&self, id: BatchId, outcome: Settled) {
        self.state().settle(id, outcome);
    }

    /// Mover: removes a batch whose answer it has seen itself.
    pub(crate) fn close(&self, id: BatchId) {
        self.state().batches.remove(&id);
    }

    /// Mover: the outcome of a commit that the keeper sends or whose answer came late; `None` while it is not known.
    /// The batch is removed when its outcome is taken.
    pub(crate) fn take_settled(&self, id: BatchId) -> Option<Settled> {
        let mut state = self.state();
        match state.batches.get(&id) {
            Some(Batch { duty: Duty::Settled(outcome), .. }) => {
                let outcome = *outcome;
                state.batches.remove(&id);
                Some(outcome)
            }
            Some(_) => None,
            // The batch has been removed: nothing of it is known to be stored.
            None => Some(Settled::default()),
        }
    }

    /// Mover: does not wait for the outcome any longer. The batch is committed all the same, if an engine can be told.
    pub(crate) fn leave(&self, id: BatchId) {
        let mut state = self.state();
        match state.batches.get_mut(&id) {
            Some(Batch { duty: Duty::Settled(_), .. }) => drop(state.batches.remove(&id)),
            Some(batch) => batch.left = true,
            None => {}
        }
    }

    /// Keeper: takes stock for a new engine and returns the slots to declare. From here on no grant of an earlier
    /// engine is accepted. Aborts stay due: an earlier attempt may have declared these slots to the same engine, and to
    /// any other engine the abort does nothing.
    pub(crate) fn begin_declaring(&self) -> Vec<SlotRecord> {
        let mut state = self.state();
        let before = core::mem::replace(&mut state.at, At::Declaring);
        let is_held = |batch: &&Batch| match batch.duty {
            Duty::Writing => !failpoint::broken(Rule::DeclareRunningCopies),
            Duty::Commit => true,
            Duty::Abort | Duty::Settled(_) => false,
        };
        let held = state.batches.values().filter(is_held);
        let held = held.flat_map(|batch| batch.records.iter().copied()).collect();
        drop(state);
        // Dropped outside the lock, because this may unmap a channel.
        drop(before);
        held
    }

    /// Keeper: moves the ledger to a new attachment, and returns the duties that have come up before.
    pub(crate) fn attached(&self, link: &Arc<Link>) -> Duties {
        let mut state = self.state();
        state.at = At::Attached(link.clone());
        let mut duties = Duties::default();
        state.batches.retain(|id, batch| match batch.duty {
            Duty::Commit => {
                duties.commits.push((*id, batch.records.clone()));
                true
            }
            Duty::Abort => {
                duties.aborts.append(&mut batch.records);
                false
            }
            Duty::Writing | Duty::Settled(_) => true,
        });
        duties
    }

    /// Keeper: the arena and its slots are given up, after the last copy into them has ended. A mover that waits for an
    /// outcome is told that nothing was stored.
    pub(crate) fn forget(&self) {
        let mut state = self.state();
        state.at = At::Nowhere;
        state.batches.retain(|_, batch| {
            let gone = batch.records.len() as u32;
            match batch.duty {
                // Nobody waits for the outcome of an abort.
                Duty::Abort => return false,
                Duty::Writing | Duty::Commit => batch.duty = Duty::Settled(Settled { done: 0, gone }),
                Duty::Settled(_) => {}
            }
            !batch.left
        });
    }
}

impl State {
    fn take_late_answers(&mut self) {
        if let At::Attached(link) = &self.at {
            for (id, outcome) in link.take_settled() {
                self.settle(id, outcome);
            }
        }
    }

    fn settle(&mut self, id: BatchId, outcome: Settled) {
        let Some(batch) = self.batches.get_mut(&id) else { return };
        if batch.left {
            self.batches.remove(&id);
        } else {
            batch.duty = Duty::Settled(outcome);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::tests::pair;
    use kvring_shm_abi::message::Status;

    fn records(slot: u64) -> Vec<SlotRecord> {
        vec![SlotRecord { slot, generation: 1, key: [slot, 0], checksum: 0 }]
    }

    #[test]
    fn what_an_earlier_engine_grants_counts_until_stock_is_taken_and_no_longer() {
        let ledger = Ledger::default();
        let ((old, _old_engine), (new, _new_engine)) = (pair("grant-old"), pair("grant-new"));
        assert_eq!(ledger.hold(&old, records(1)), None, "nobody is attached");
        ledger.attached(&old);
        assert!(ledger.hold(&old, records(1)).is_some());
        assert_eq!(ledger.begin_declaring(), records(1));
        assert_eq!(ledger.hold(&old, records(2)), None, "too late");
        ledger.attached(&new);
        assert_eq!(ledger.hold(&old, records(2)), None);
        assert!(ledger.hold(&new, records(3)).is_some());
        assert_eq!(ledger.begin_declaring().len(), 2, "also what was declared before, and not settled");
    }

    #[test]
    fn what_was_decided_without_an_engine_is_done_through_the_next() {
        let ledger = Ledger::default();
        let ((old, _old_engine), (new, _new_engine)) = (pair("duty-old"), pair("duty-new"));
        ledger.attached(&old);
        let [commits, aborts, early, writes] =
            [1, 2, 3, 4].map(|slot| ledger.hold(&old, records(slot)).unwrap());
        // The engine may be dead: the sender finds out, and that settles nothing.
        let (link, sent) = ledger.commit(commits, &[77]).unwrap();
        assert!(Arc::ptr_eq(&link, &old));
        assert_eq!(sent[0].checksum, 77);
        assert!(ledger.abort(early).is_some());
        assert_eq!(ledger.begin_declaring().len(), 3);
        assert!(ledger.abort(aborts).is_none(), "it may have been named by now");
        let duties = ledger.attached(&new);
        assert_eq!(duties.commits, [(commits, sent)]);
        assert_eq!(duties.aborts, records(2));
        assert_eq!(ledger.take_settled(commits), None, "not answered yet");
        ledger.leave(commits);
        ledger.settle(commits, Settled { done: 1, gone: 0 });
        assert_eq!(ledger.begin_declaring(), records(4), "what nobody waits for is gone once it is settled");
        ledger.attached(&new);
        assert!(ledger.commit(writes, &[]).is_some());
        ledger.settle(writes, Settled { done: 1, gone: 0 });
        // The keeper takes stock after the answer and before its waiter has looked at it.
        assert!(ledger.begin_declaring().is_empty());
        assert_eq!(ledger.take_settled(writes), Some(Settled { done: 1, gone: 0 }));
    }

    #[test]
    fn a_commit_that_is_answered_when_nobody_waits_is_settled() {
        let ledger = Ledger::default();
        let ((link, mut engine), (new, _new_engine)) = (pair("late-commit"), pair("late-commit-new"));
        ledger.attached(&link);
        let batch = ledger.hold(&link, records(1)).unwrap();
        let (through, sent) = ledger.commit(batch, &[77]).unwrap();
        drop(through.commit(batch, &sent).unwrap());
        assert_eq!(ledger.take_settled(batch), None, "not answered yet");
        let (operation, _) = engine.next().unwrap();
        engine.complete(operation, Status::Ok, [1, 0, 0, 0]);
        link.tend();
        assert!(ledger.begin_declaring().is_empty(), "the next engine need not know of it");
        ledger.attached(&new);
        assert_eq!(ledger.take_settled(batch), Some(Settled { done: 1, gone: 0 }));
    }

    #[test]
    fn what_was_given_up_with_its_arena_never_reaches_another_engine() {
        let ledger = Ledger::default();
        let ((old, _old_engine), (new, _new_engine)) = (pair("forget-old"), pair("forget-new"));
        ledger.attached(&old);
        let [writes, waits, aborts] = [1, 2, 3].map(|slot| ledger.hold(&old, records(slot)).unwrap());
        ledger.commit(waits, &[]).unwrap();
        ledger.begin_declaring();
        assert!(ledger.abort(aborts).is_none());
        assert_eq!(ledger.take_settled(waits), None);
        ledger.forget();
        assert_eq!(ledger.take_settled(waits), Some(Settled { done: 0, gone: 1 }));
        assert!(ledger.commit(writes, &[]).is_none(), "its copy ended after all");
        let duties = ledger.attached(&new);
        assert!(duties.commits.is_empty() && duties.aborts.is_empty());
        assert!(ledger.abort(writes).is_none());
        assert!(ledger.begin_declaring().is_empty());
    }

    #[test]
    fn what_was_named_to_an_engine_once_is_taken_back_there_after_every_further_attempt() {
        let ledger = Ledger::default();
        let ((old, _old_engine), (new, _new_engine)) = (pair("twice-old"), pair("twice-new"));
        ledger.attached(&old);
        let batch = ledger.hold(&old, records(1)).unwrap();
        assert_eq!(ledger.begin_declaring(), records(1));
        assert!(ledger.abort(batch).is_none());
        assert!(ledger.begin_declaring().is_empty(), "the first attempt did not get through");
        assert_eq!(ledger.attached(&new).aborts, records(1));
        assert!(ledger.attached(&new).aborts.is_empty());
    }
}
