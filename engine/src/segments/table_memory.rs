//! Memory for the sparse tables of the engine's segment. A span's slot headers get theirs when the span gets its shard size;
//! chunk records, and the lines that belong to them, get theirs as chunks are made.

use kvring_shm_abi::chunk::{ChunkRecord, SlotLine};
use kvring_shm_abi::engine_segment::Places;
use kvring_shm_abi::failpoint::{self, Rule};
use kvring_shm_abi::futex::Deadline;
use kvring_shm_abi::segment::SegmentFile;
use kvring_shm_abi::slot::SLOT_HEADER_BYTES;
use kvring_shm_abi::superblock::Geometry;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

const PAGE: u64 = 4096;
/// How long after a failure memory is asked for again, as in the arena's allocator. Room hardly appears sooner, and
/// asking is slow: a full file system gives what it has, and takes it back.
const RETRY: Duration = Duration::from_secs(1);

/// Gives the sparse tables their memory.
pub struct TableMemory {
    file: Arc<SegmentFile>,
    places: Places,
    slots: u64,
    /// Set when there was no room: until then no memory is asked for.
    full_until: Option<Deadline>,
}

impl TableMemory {
    pub(super) fn new(file: Arc<SegmentFile>, geometry: &Geometry) -> TableMemory {
        let (places, slots) = (Places::of(geometry), geometry.slot_count() as u64);
        TableMemory { file, places, slots, full_until: None }
    }

    /// Makes sure that the headers of `count` slots from `first` on are backed by memory. Repeatable. False: there
    /// is no room at the moment, or there are no such slots. The reason is logged once each time that a shortage
    /// begins.
    #[must_use]
    pub fn ensure_headers(&mut self, first: u32, count: u32) -> bool {
        let (first, end) = (u64::from(first), u64::from(first) + u64::from(count));
        let header = SLOT_HEADER_BYTES as u64;
        end <= self.slots && self.ensure(&[(self.places.slots_at, header, first..end)])
    }

    /// Makes sure that this many chunk records and lines are backed by memory, where `before` say how many are already.
    /// As [`TableMemory::ensure_headers`].
    #[must_use]
    pub fn ensure_chunks(&mut self, before: (u32, u32), now: (u32, u32)) -> bool {
        let range = |before: u32, now: u32| u64::from(before)..u64::from(now);
        self.ensure(&[
            (self.places.records_at, size_of::<ChunkRecord>() as u64, range(before.0, now.0)),
            (self.places.lines_at, size_of::<SlotLine>() as u64, range(before.1, now.1)),
        ])
    }

    /// Each table: where it begins, how long an item is, and which items are wanted.
    fn ensure(&mut self, tables: &[(u64, u64, Range<u64>)]) -> bool {
        if self.full_until.is_some_and(|until| !until.passed()) {
            return false;
        }
        if failpoint::broken(Rule::MemoryForTables) {
            return false;
        }
        let outcome = tables.iter().try_for_each(|(at, bytes, items)| {
            let start = (at + items.start * bytes) / PAGE * PAGE;
            let stop = (at + items.end * bytes).next_multiple_of(PAGE);
            if items.is_empty() { Ok(()) } else { self.file.allocate(start, stop - start) }
        });
        match (&outcome, &self.full_until) {
            (Ok(()), None) | (Err(_), Some(_)) => {}
            (Ok(()), Some(_)) => tracing::info!("there is memory for the engine's tables again"),
            (Err(error), None) => {
                tracing::warn!(%error, "no memory for more of the engine's tables: stores that need it are dropped until there is");
            }
        }
        self.full_until = outcome.is_err().then(|| Deadline::after(RETRY));
        outcome.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvring_shm_abi::segment::{self, Access, EngineName};

    #[test]
    fn memory_that_is_not_there_is_not_asked_for_again_at_once() {
        let name = EngineName::new(&format!("t-headers-{}", std::process::id())).unwrap().engine_segment();
        let geometry = Geometry::new(4 << 20, 1 << 20).unwrap();
        let file = Arc::new(SegmentFile::create(&name, Places::of(&geometry).bytes).unwrap());
        // A read-only file, through which nothing can be allocated.
        let refuses = Arc::new(SegmentFile::open(&name, Access::ReadOnly).unwrap());
        segment::unlink(&name);
        let mut memory = TableMemory::new(refuses, &geometry);
        assert!(!memory.ensure_headers(0, 1));
        memory.file = file;
        assert!(!memory.ensure_headers(0, 1), "not for a second");
        memory.full_until = Some(Deadline(0));
        assert!(memory.ensure_headers(0, 1));
        assert_eq!(memory.full_until, None);
    }
}
