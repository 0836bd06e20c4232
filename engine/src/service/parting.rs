//! Clients that leave, die or are thrown out: what they had is taken back, a piece per turn, and their entry is looked at again
//! when that is over.

use super::Service;
use super::entry::{Entry, Going, Then};
use crate::cache::{Leaving, Parting};
use crate::stats::Stat;
use kvring_shm_abi::engine_segment::AttachStatus;
use kvring_shm_abi::lobby::CLIENTS_MAX;

impl Service {
    /// Begins a parting. Until it is over this entry has no connection, and its life word is not looked at.
    pub(super) fn begin_parting(&mut self, entry: usize, how: Leaving, then: Then) {
        self.becomes(entry, Entry::Parting(Going { parting: Parting::new(entry as u8, how), then }));
    }

    /// Does the next piece of one entry's parting. Another entry's begins when that is over.
    pub(super) fn go_on_parting(&mut self) {
        let from = self.part_from;
        let entry = ((self.parting.rotate_right(from).trailing_zeros() + from) as usize) % CLIENTS_MAX;
        let Entry::Parting(going) = &mut self.entries[entry] else { return };
        if !self.cache.part(&mut going.parting) {
            return;
        }
        let Entry::Parting(Going { then, .. }) = self.becomes(entry, Entry::Over) else { return };
        self.part_from = (entry as u32 + 1) % CLIENTS_MAX as u32;
        match then {
            Then::Answer { nonce, status } => {
                let left = status == AttachStatus::Left;
                self.stat(if left { Stat::Detaches } else { Stat::Breaches }, 1);
                self.segments.engine.attach[entry].answer(nonce, status);
            }
            Then::Free => {
                self.becomes(entry, Entry::Free);
                self.reclaimed(entry);
            }
            Then::Wait(lingering) => {
                self.becomes(entry, Entry::Lingering(lingering));
                self.no_longer_awaited(entry);
            }
        }
        // The entry's life word may have changed meanwhile.
        self.look_again();
    }
}
