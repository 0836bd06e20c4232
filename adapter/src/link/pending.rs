//! The caller's side of an operation: in flight, then answered. Letting go of either gives everything back.

use super::Link;
use super::operations::Done;
use crate::error::CallError;
use kvring_shm_abi::futex::Deadline;
use kvring_shm_abi::message::Completion;
use kvring_shm_abi::payload::Payload;
use std::sync::Arc;
use std::time::Duration;

/// An operation in flight. Dropping it abandons the operation.
#[derive(Debug)]
pub(crate) struct Pending {
    held: Held,
    /// The engine's beat when it was submitted.
    beat: u32,
}

/// A completed operation, and its payload region until this is dropped.
#[derive(Debug)]
pub(crate) struct Answer {
    held: Held,
    pub(crate) completion: Completion,
}

/// An operation's slot in the link's table, and what is to be done about it at the end.
#[derive(Debug)]
struct Held {
    link: Arc<Link>,
    slot: u16,
    owes: Owes,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owes {
    /// It is in flight, or nobody has taken its completion.
    Abandon,
    /// Its completion has been taken; its region is still ours.
    Region,
    /// It is over.
    Nothing,
}

impl Pending {
    pub(super) fn new(link: Arc<Link>, slot: u16, beat: u32) -> Pending {
        Pending { held: Held { link, slot, owes: Owes::Abandon }, beat }
    }

    /// The answer, if it has arrived.
    pub(crate) fn try_take(self) -> Result<Answer, Pending> {
        if !self.held.link.fork.is_ours() {
            return Err(self);
        }
        match self.held.link.poll(self.held.slot, 1) {
            Some(done) => Ok(self.answer(done)),
            None => Err(self),
        }
    }

    /// The answer, if it arrives while this spins for `patience`: one look at least, no sleep.
    pub(crate) fn spin(self, patience: Duration) -> Result<Answer, Pending> {
        if !self.held.link.fork.is_ours() {
            return Err(self);
        }
        match self.held.link.spin(self.held.slot, patience) {
            Some(done) => Ok(self.answer(done)),
            None => Err(self),
        }
    }

    /// Why no answer is to be expected any more, if so: without waiting.
    pub(crate) fn hopeless(&self, deadline: Deadline) -> Option<CallError> {
        let link = &self.held.link;
        if !link.fork.is_ours() {
            return Some(CallError::Forked);
        }
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

    /// It has less time than an operation gets: that it reaches its deadline does not tell against the engine.
    pub(crate) fn forgiving(mut self) -> Pending {
        // A beat that is not the present one: the engine's has moved since.
        self.beat = self.beat.wrapping_sub(1);
        self
    }

    /// Waits for the answer: for `timeout`, or until the engine is seen dead or restarted.
    pub(crate) fn wait(self, timeout: Duration) -> Result<Answer, CallError> {
        if !self.held.link.fork.is_ours() {
            return Err(CallError::Forked);
        }
        let done = self.held.link.wait(self.held.slot, self.beat, timeout)?;
        Ok(self.answer(done))
    }

    fn answer(self, done: Done) -> Answer {
        let mut held = self.held;
        held.owes = if done.owns_region { Owes::Region } else { Owes::Nothing };
        Answer { held, completion: done.completion }
    }
}

impl Answer {
    /// The payload area, in which this answer's region stays ours until it is dropped.
    pub(crate) fn payload(&self) -> &Payload {
        self.held.link.payload()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if !self.link.fork.is_ours() {
            // A forked child has none of the memory that this is about, and its parent does all of it.
            return;
        }
        match self.owes {
            Owes::Nothing => {}
            Owes::Region => self.link.give_back(self.slot),
            Owes::Abandon => self.link.abandon(self.slot),
        }
    }
}
