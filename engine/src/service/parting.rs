//! Clients that go, in whatever way: what they had is taken back a piece per turn, and their entry is looked at again when
//! that is over.

use super::Service;
use crate::cache::{Leaving, Parting};
use crate::stats::Stat;
use kvring_shm_abi::engine_segment::AttachStatus;

/// What follows a parting.
#[derive(Clone, Copy)]
pub(super) enum Then {
    /// The client is told.
    Answer { nonce: u64, status: AttachStatus },
    /// The entry is free.
    Free,
    /// Its process is waited for.
    Wait,
}

/// A parting, and what follows.
pub(super) struct Going {
    parting: Parting,
    then: Then,
}

impl Service {
    /// From now on this entry has no connection, and is not looked at, until the parting is over.
    pub(super) fn begin_parting(&mut self, entry: usize, how: Leaving, then: Then) {
        self.partings[entry] = Some(Going { parting: Parting::new(entry as u8, how), then });
        self.parting |= 1 << entry;
    }

    /// The next piece of somebody's parting.
    pub(super) fn go_on_parting(&mut self) {
        let entry = self.parting.trailing_zeros() as usize;
        let Some(Some(going)) = self.partings.get_mut(entry) else { return };
        if !self.cache.part(&mut going.parting) {
            return;
        }
        let then = going.then;
        self.partings[entry] = None;
        self.parting &= !(1 << entry);
        match then {
            Then::Answer { nonce, status } => {
                let left = status == AttachStatus::Left;
                self.stat(if left { Stat::Detaches } else { Stat::Breaches }, 1);
                self.segments.engine.attach[entry].answer(nonce, status);
            }
            Then::Free => self.reclaimed(entry),
            Then::Wait => self.no_longer_awaited(entry),
        }
        // Its word may have changed meanwhile.
        self.look_around();
    }
}
