//! Memory for slot headers. The slot table is sparse: a span's headers get their memory when the span gets its
//! shard size.

use kvring_shm_abi::engine_segment::Places;
use kvring_shm_abi::failpoint::{self, Rule};
use kvring_shm_abi::futex::Deadline;
use kvring_shm_abi::segment::{SegmentError, SegmentFile};
use kvring_shm_abi::slot::SLOT_HEADER_BYTES;
use kvring_shm_abi::superblock::Geometry;
use std::sync::Arc;
use std::time::Duration;

const PAGE: u64 = 4096;
/// How long after a failure memory is asked for again, as in the arena's allocator. Room hardly appears sooner, and
/// asking is slow: a full file system gives what it has, and takes it back.
const RETRY: Duration = Duration::from_secs(1);

/// Gives slot headers their memory.
pub struct SlotMemory {
    file: Arc<SegmentFile>,
    slots_at: u64,
    slots: u64,
    /// Set when there was no room: until then no memory is asked for.
    full_until: Option<Deadline>,
}

impl SlotMemory {
    pub(super) fn new(file: Arc<SegmentFile>, geometry: &Geometry) -> SlotMemory {
        let slots_at = Places::of(geometry).slots_at;
        SlotMemory { file, slots_at, slots: geometry.slot_count() as u64, full_until: None }
    }

    /// Makes sure that the headers of `count` slots from `first` on are backed by memory. Repeatable. False: there
    /// is no room at the moment, or there are no such slots. The reason is logged once each time that a shortage
    /// begins.
    #[must_use]
    pub fn ensure(&mut self, first: u32, count: u32) -> bool {
        if self.full_until.is_some_and(|until| !until.passed()) {
            return false;
        }
        if failpoint::broken(Rule::MemoryForHeaders) {
            return false;
        }
        let outcome = self.allocate(u64::from(first), u64::from(first) + u64::from(count));
        match (&outcome, &self.full_until) {
            (Ok(()), None) | (Err(_), Some(_)) => {}
            (Ok(()), Some(_)) => tracing::info!("there is memory for slot headers again"),
            (Err(error), None) => {
                tracing::warn!(%error, "no memory for slot headers: stores that need new ones are dropped until there is");
            }
        }
        self.full_until = outcome.is_err().then(|| Deadline::after(RETRY));
        outcome.is_ok()
    }

    fn allocate(&self, first: u64, end: u64) -> Result<(), SegmentError> {
        let bytes = SLOT_HEADER_BYTES as u64;
        if end > self.slots {
            return Err(SegmentError::TooShort {
                name: self.file.name().to_owned(),
                expected: self.slots_at + end * bytes,
                found: self.slots_at + self.slots * bytes,
            });
        }
        let start = (self.slots_at + first * bytes) / PAGE * PAGE;
        let stop = (self.slots_at + end * bytes).next_multiple_of(PAGE);
        if first == end { Ok(()) } else { self.file.allocate(start, stop - start) }
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
        let mut memory = SlotMemory::new(refuses, &geometry);
        assert!(!memory.ensure(0, 1));
        memory.file = file;
        assert!(!memory.ensure(0, 1), "not for a second");
        memory.full_until = Some(Deadline(0));
        assert!(memory.ensure(0, 1));
        assert_eq!(memory.full_until, None);
    }
}
