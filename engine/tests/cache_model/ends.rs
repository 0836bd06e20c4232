//! The model's ends: of clients, and of the engine.

use kvring_engine::cache::{Leaving, Parting, SlotId};

use crate::cache_support::restore;
use crate::model::{Model, Write, empty};
use crate::ops::OWNERS;

impl Model {
    /// The engine dies, and its successor reads what was published. Then each owner has died (a bit of `dead`), or
    /// comes back and declares the slots that `named` says (by their places in `writes`).
    pub(crate) fn restart(&mut self, dead: u8, named: u64) {
        self.take_freed();
        let mut table = self.cache.table().clone();
        table.out_of_space = false;
        // A clone of an empty log has no capacity.
        (table.freed, table.touches) = (Vec::with_capacity(1 << 16), Vec::with_capacity(1 << 16));
        self.cache = empty(self.policy, table, &self.added);
        restore(&mut self.cache);
        let (restored, unplaced) = self.cache.restore_end();
        self.sorted = Some(unplaced.sort());
        // What was in the rings is lost, and who waited gets no answer.
        self.leases.clear();
        self.said.clear();
        self.waiting.clear();
        self.marked.clear();
        let freed = self.take_freed();
        assert!(freed.is_empty() && restored.dropped == 0);
        assert_eq!(restored.visible as usize, self.chunks.iter().filter(|chunk| chunk.visible).count());
        assert_eq!(restored.kept as usize, self.chunks.iter().filter(|chunk| !chunk.visible).count());
        self.cache.check_all().unwrap();
        for owner in 0..OWNERS {
            let nonce = self.nonces[usize::from(owner)] + 1;
            self.nonces[usize::from(owner)] = nonce;
            // All of the owner's attachments are one now.
            for write in self.writes.iter_mut().filter(|write| write.owner == owner) {
                write.nonce = 0;
            }
            if dead >> owner & 1 == 1 {
                let mut parting = Parting::new(owner, Leaving::Gone);
                self.in_pieces(|model| model.cache.part(&mut parting));
            } else {
                for (place, write) in self.writes.iter_mut().enumerate() {
                    let Write { slot, generation, key, .. } = *write;
                    if write.owner == owner && named >> (place % 64) & 1 == 1 {
                        assert!(!self.cache.adopt((owner + 1) % OWNERS, 1, slot, generation, key));
                        assert!(self.cache.adopt(owner, nonce, slot, generation, key));
                        write.nonce = nonce;
                    }
                }
                let rest =
                    self.writes.iter().filter(|write| (write.owner, write.nonce) == (owner, 0)).count();
                let mut freed = 0;
                self.in_pieces(|model| model.cache.declare_end(owner, &mut freed));
                assert_eq!(freed as usize, rest);
            }
            let freed = self.take_freed();
            self.writer_gone(owner, 0, &freed);
        }
        self.quarantined.clear();
    }

    pub(crate) fn gone(&mut self, owner: u8, quarantine: bool) {
        self.said.retain(|said| said.name.0 != owner);
        let nonce = std::mem::replace(&mut self.nonces[usize::from(owner)], 0);
        self.nonces[usize::from(owner)] = nonce + 1;
        let how = if quarantine { Leaving::Detached { nonce } } else { Leaving::Left { nonce } };
        let mut parting = Parting::new(owner, how);
        self.in_pieces(|model| model.cache.part(&mut parting));
        self.leases.retain(|(other, _, _), _| *other != owner);
        let freed = self.take_freed();
        if quarantine {
            self.quarantined.push((owner, nonce));
            let of_client: Vec<Write> =
                self.writes.iter().copied().filter(|w| (w.owner, w.nonce) == (owner, nonce)).collect();
            for write in of_client {
                assert!(!freed.contains(&write.slot), "freed while it may be written: {write:?}");
                if let Some(at) = self.chunk_of(write) {
                    self.dropped(at, &freed);
                }
            }
        } else {
            self.writer_gone(owner, nonce, &freed);
        }
    }

    /// Nobody writes any more what was written under earlier attachments of this entry.
    pub(crate) fn quarantine_over(&mut self, owner: u8) {
        let (its, others) = std::mem::take(&mut self.quarantined).into_iter().partition(|its| its.0 == owner);
        self.quarantined = others;
        let before = self.writes.len();
        let mut freed = 0;
        self.in_pieces(|model| model.cache.declare_end(owner, &mut freed));
        let slots = self.take_freed();
        for (_, nonce) in Vec::from_iter(its) {
            self.writer_gone(owner, nonce, &slots);
        }
        assert_eq!(freed as usize, before - self.writes.len());
    }

    pub(crate) fn writer_gone(&mut self, owner: u8, nonce: u64, freed: &[SlotId]) {
        let is_its = |write: &Write| (write.owner, write.nonce) == (owner, nonce);
        // A chunk may have lost several shards of this writer at once.
        let its: Vec<Write> = self.writes.iter().copied().filter(is_its).collect();
        for write in its {
            assert!(freed.contains(&write.slot));
            self.writes.retain(|other| *other != write);
            if let Some(at) = self.chunk_of(write) {
                let still: Vec<SlotId> = self.writes.iter().filter(|w| !is_its(w)).map(|w| w.slot).collect();
                let chunk = self.chunks.remove(at);
                for shard in chunk.shards.values() {
                    let stays = !shard.committed && still.contains(&shard.slot);
                    assert_eq!(freed.contains(&shard.slot), !stays, "{chunk:?}");
                }
            }
        }
    }
}
