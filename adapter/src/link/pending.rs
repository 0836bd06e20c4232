//! The caller's side of an operation: [`Pending`] while it is in flight, then [`Answer`]. Dropping either gives back
//! what the operation holds.

use super::Link;
use super::operations::Done;
use crate::error::CallError;
use kvring_shm_abi::message::Completion;
use kvring_shm_abi::payload::Payload;
use std::sync::Arc;
use std::time::Duration;

/// An operation in flight. Dropping it abandons the operation.
#[derive(Debug)]
pub(crate) struct Pending {
    held: Held,
    /// The engine's beat when the operation was submitted.
    beat: u32,
}

/// A completed operation, and its payload region until this is dropped.
#[derive(Debug)]
pub(crate) struct Answer {
    held: Held,
    pub(crate) completion: Completion,
}

/// An operation's id, and what dropping this must do about the operation.
#[derive(Debug)]
struct Held {
    link: Arc<Link>,
    operation: u16,
    owes: Owes,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owes {
    /// The operation is in flight, or nobody has taken its completion.
    Abandon,
    /// The completion has been taken, and the region is still ours.
    Region,
    /// The completion has been taken, and there was no region.
    Nothing,
}

impl Pending {
    pub(super) fn new(link: Arc<Link>, operation: u16, beat: u32) -> Pending {
        Pending { held: Held { link, operation, owes: Owes::Abandon }, beat }
    }

    /// The answer, if it has arrived.
    pub(crate) fn try_take(self) -> Result<Answer, Pending> {
        if !self.held.link.fork.is_ours() {
            return Err(self);
        }
        match self.held.link.poll(self.held.operation, 1) {
            Some(done) => Ok(self.answer(done)),
            None => Err(self),
        }
    }

    /// Waits for the answer for at most `timeout`, or until the engine is seen dead or restarted.
    pub(crate) fn wait(self, timeout: Duration) -> Result<Answer, CallError> {
        if !self.held.link.fork.is_ours() {
            return Err(CallError::Forked);
        }
        let done = self.held.link.wait(self.held.operation, self.beat, timeout)?;
        Ok(self.answer(done))
    }

    fn answer(self, done: Done) -> Answer {
        let mut held = self.held;
        held.owes = if done.owns_region { Owes::Region } else { Owes::Nothing };
        Answer { held, completion: done.completion }
    }
}

impl Answer {
    /// The payload area. This answer's region in it stays ours until the answer is dropped.
    pub(crate) fn payload(&self) -> &Payload {
        self.held.link.payload()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if !self.link.fork.is_ours() {
            // A forked child has none of the link's memory, and its parent does all of this.
            return;
        }
        match self.owes {
            Owes::Nothing => {}
            Owes::Region => self.link.give_back(self.operation),
            Owes::Abandon => self.link.abandon(self.operation),
        }
    }
}
