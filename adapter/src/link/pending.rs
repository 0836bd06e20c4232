//! The caller's side of an operation: in flight, then answered. Letting go of either gives everything back.

use super::{BURST, Link, Operation, release_operation};
use crate::error::CallError;
use crate::health::Health;
use kvring_shm_abi::futex::{Deadline, monotonic_ns};
use kvring_shm_abi::message::Completion;
use kvring_shm_abi::park;
use kvring_shm_abi::payload::Payload;
use std::sync::Arc;

/// An operation in flight. Dropping it abandons the operation.
#[derive(Debug)]
pub(crate) struct Pending {
    link: Arc<Link>,
    slot: u16,
    /// The engine's beat when it was submitted.
    beat: u32,
    /// The completion has been taken: there is nothing left to abandon.
    taken: bool,
}

/// A completed operation, and its payload region until this is dropped.
#[derive(Debug)]
pub(crate) struct Answer {
    link: Arc<Link>,
    slot: u16,
    pub(crate) completion: Completion,
}

impl Pending {
    pub(super) fn new(link: Arc<Link>, slot: u16, beat: u32) -> Pending {
        Pending { link, slot, beat, taken: false }
    }

    /// The answer, if it has arrived.
    pub(crate) fn try_take(mut self) -> Result<Answer, Pending> {
        match self.link.poll(self.slot, 1) {
            Some(completion) => {
                self.taken = true;
                Ok(Answer { link: self.link.clone(), slot: self.slot, completion })
            }
            None => Err(self),
        }
    }

    /// Why no answer is to be expected any more, if so: without waiting.
    pub(crate) fn hopeless(&self, deadline: Deadline) -> Option<CallError> {
        let link = &self.link;
        if let Err(gone) = link.alive() {
            return Some(gone);
        }
        if !link.is_healthy() || link.detached().is_some() {
            return Some(CallError::Degraded(link.health()));
        }
        deadline.passed().then(|| {
            link.stall.deadline_missed(self.beat, link.engine.epoch().beat());
            CallError::TimedOut { waited_ms: 0 }
        })
    }

    /// Waits for the answer: until `deadline`, or until the engine is seen dead or restarted.
    pub(crate) fn wait(mut self, deadline: Deadline) -> Result<Answer, CallError> {
        let link = self.link.clone();
        // Where spinning is pointless (one CPU for both), every look beyond the first keeps the engine from running.
        let looks = if link.spin.is_zero() { 1 } else { BURST };
        if let Some(completion) = link.poll(self.slot, looks) {
            return Ok(self.answer(completion));
        }
        let started = monotonic_ns();
        let spin_until = started.saturating_add(u64::try_from(link.spin.as_nanos()).unwrap_or(u64::MAX));
        loop {
            if let Some(completion) = link.poll(self.slot, looks) {
                return Ok(self.answer(completion));
            }
            link.alive()?;
            if link.is_broken() || link.detached().is_some() {
                return Err(CallError::Degraded(Health::Attaching));
            }
            let now = monotonic_ns();
            if now >= deadline.0 {
                link.stall.deadline_missed(self.beat, link.engine.epoch().beat());
                let waited_ms = now.saturating_sub(started) / 1_000_000;
                return Err(CallError::TimedOut { waited_ms });
            }
            if now < spin_until {
                continue;
            }
            link.stall.look_at(link.engine.epoch().beat(), now);
            link.sleep(self.slot, deadline);
        }
    }

    fn answer(&mut self, completion: Completion) -> Answer {
        self.taken = true;
        Answer { link: self.link.clone(), slot: self.slot, completion }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if self.taken {
            return;
        }
        let link = &self.link;
        let mut inner = link.lock();
        let (mut sent, mut left) = (false, false);
        match inner.operations[usize::from(self.slot)] {
            Operation::InFlight { region, undo, .. } => {
                inner.operations[usize::from(self.slot)] =
                    Operation::InFlight { region, undo, abandoned: true };
                left = true;
            }
            // It completed between the caller's last look and now: undone at once.
            Operation::Done { region, undo, completion } => {
                link.undo(&mut inner, undo, &completion);
                release_operation(&mut inner, self.slot, region);
                sent = link.flush(&mut inner);
            }
            Operation::Free => {}
        }
        drop(inner);
        if sent {
            park::notify(link.lobby.doorbell());
        }
        if left {
            link.leave_to_keeper();
        }
    }
}

impl Answer {
    /// The payload area, in which this answer's region stays ours until it is dropped.
    pub(crate) fn payload(&self) -> &Payload {
        self.link.payload()
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        let mut inner = self.link.lock();
        if let Operation::Done { region, .. } = inner.operations[usize::from(self.slot)] {
            release_operation(&mut inner, self.slot, region);
        }
    }
}
