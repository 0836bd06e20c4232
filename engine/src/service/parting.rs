//! Clients that leave, die or are thrown out: what they had is taken back, a piece per turn, and their entry is looked at again
//! when that is over.

use super::Service;
use super::entry::{Entry, Going, Then};
use super::linger::Lingering;
use crate::cache::{Leaving, Parting};
use crate::stats::Stat;
use kvring_shm_abi::engine_segment::AttachStatus;
use kvring_shm_abi::failpoint::{self, Rule};
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

    /// The owner of this entry is marked dead: all that it had is freed. Where a device may still write for it, the slots
    /// that it was writing and its entry are kept until its process has ended.
    pub(super) fn bury(&mut self, entry: usize) {
        // An owner that was writing no slot leaves none that a device could be writing into.
        let writes = self.cache.writes(entry as u8);
        let owner = self.segments.lobby.entries[entry].dma().filter(|_| writes);
        let Some(owner) = owner.filter(|_| !failpoint::broken(Rule::WaitsForTheProcess)) else {
            return self.reclaim(entry);
        };
        let Some(lingering) = Lingering::begin(&owner, &self.own, || self.segments.holds_dma_lock(entry))
        else {
            return self.reclaim(entry);
        };
        self.hang_up(entry, "client died; its leases are freed");
        tracing::warn!(
            entry,
            pid = owner.process.pid,
            told_by = lingering.told_by(),
            "devices may still write for a dead client: what it was writing is kept until its process is gone"
        );
        self.begin_parting(entry, Leaving::Lingers, Then::Wait(lingering));
    }

    /// Reclaims the entry if the client's process has ended. Called with each look around the lobby.
    pub(super) fn look_at_lingering(&mut self, entry: usize) {
        let Entry::Lingering(lingering) = &mut self.entries[entry] else { return };
        if let Some(ms) = lingering.ended_after(|| self.segments.holds_dma_lock(entry)) {
            tracing::info!(entry, ms, "the process of a dead client is gone; what it was writing is freed");
            self.reclaim(entry);
        }
    }
}
