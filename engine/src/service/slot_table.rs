//! The transitions of the cache's slots and chunks, published in the engine's segment.

use crate::cache::{self, ShardHeader, SlotId, SlotTable};
use crate::segments::{Segments, TableMemory};
use kvring_shm_abi::chunk::ChunkTable;
use kvring_shm_abi::engine_segment::SlabRecord;
use kvring_shm_abi::failpoint::{self, Place};
use kvring_shm_abi::mapping::View;
use kvring_shm_abi::message::Round;
use kvring_shm_abi::slot::{ShardIdentity, SlotHeader, SlotState, SlotWord};

/// The slot table in shared memory. Sparse: headers get memory when their span gets its class.
pub(crate) struct SharedSlots {
    headers: View<SlotHeader>,
    slabs: View<SlabRecord>,
    chunks: ChunkTable,
    memory: TableMemory,
}

impl SharedSlots {
    pub(crate) fn new(segments: &Segments) -> SharedSlots {
        let engine = &segments.engine;
        let (headers, slabs, chunks) = (engine.slots.clone(), engine.slabs.clone(), engine.chunks.clone());
        SharedSlots { headers, slabs, chunks, memory: segments.table_memory() }
    }
}

fn word(state: SlotState, owner: cache::Owner, generation: u64) -> SlotWord {
    SlotWord { state, owner, generation }
}

impl SlotTable for SharedSlots {
    fn chunks(&self) -> &ChunkTable {
        &self.chunks
    }

    fn ensure_chunks(&mut self, records: u32, lines: u32) -> bool {
        let ensured = self.memory.ensure_chunks(self.chunks.ready(), (records, lines));
        if ensured {
            self.chunks.set_ready(records, lines);
        }
        ensured
    }

    fn writing(&mut self, slot: SlotId, generation: u64, header: &ShardHeader) {
        let identity = ShardIdentity {
            key: header.key,
            namespace: header.namespace,
            rank: header.rank,
            offset: header.offset,
            length: header.length,
        };
        let round = Round { source: header.round.source, number: header.round.number };
        let writing = word(SlotState::Writing, header.owner, generation);
        self.headers[slot as usize].begin_writing(writing, &identity, header.nonce, round.pack());
    }

    fn committed(&mut self, slot: SlotId, generation: u64, owner: cache::Owner, checksum: u64) {
        self.headers[slot as usize].commit(word(SlotState::Committed, owner, generation), checksum);
    }

    fn orphaned(&mut self, slot: SlotId, generation: u64, owner: cache::Owner) {
        failpoint::here(Place::OrphanWord);
        self.headers[slot as usize].orphan(word(SlotState::Orphaned, owner, generation));
        failpoint::here(Place::OrphanDone);
    }

    fn hidden(&mut self, slot: SlotId) {
        self.headers[slot as usize].hide();
    }

    fn freed(&mut self, slot: SlotId, next_generation: u64) {
        self.headers[slot as usize].free(next_generation);
    }

    fn touched(&mut self, slot: SlotId, tick: u64) {
        self.headers[slot as usize].touch(tick);
    }

    fn ensure(&mut self, first_slot: SlotId, count: u32) -> bool {
        self.memory.ensure_headers(first_slot, count)
    }

    fn span_made(&mut self, first_slab: u32, slabs: u32, slot_bytes: u64) {
        failpoint::here(Place::SpanRecord);
        self.slabs[first_slab as usize].assign(slot_bytes, slabs);
        failpoint::here(Place::SpanDone);
    }

    fn span_gone(&mut self, first_slab: u32) {
        failpoint::here(Place::SpanGone);
        self.slabs[first_slab as usize].clear();
        failpoint::here(Place::SpanCleared);
    }

    fn generation(&self, slot: SlotId) -> u64 {
        self.headers[slot as usize].word().generation
    }
}
