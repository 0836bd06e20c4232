//! Lookups without the engine, and how the engine evicts beside them.
//!
//! A scheduler finds chunks by the directory and their records, says that it holds them by a message that nobody waits for
//! ([`Request::Hold`](crate::message::Request::Hold)), and looks at the records once more. An engine that wants the room of
//! chunks marks their records, looks whether any scheduler has said something that it has not heard, and decides only then.
//!
//! ```text
//! scheduler                                            engine
//!  word, key, namespace (search)                        words := EVICTING (mark)
//!  publishes its Hold; if there is no room for that,    fence
//!    sets `unpublished`                                 each scheduler: unpublished? then nothing is evicted now
//!  fence                                                  anything in its ring? then that is heard first
//!  each word once more (still)                          decides: what is held by now is spared, the rest ends
//!    the first that is not VISIBLE cuts the answer
//! ```
//!
//! The two fences are one pair. One of them is first in the one order of all such fences: if it is the scheduler's, the engine
//! sees the message, or that it is unpublished; if it is the engine's, the scheduler sees the mark. So a chunk that a scheduler
//! has kept in its answer is never evicted before the scheduler has released it.
//!
//! There are exceptions, and in each a load of the chunk fails its check: a client that has not come back within the grace after
//! a restart; one that has not published what it holds for as long; one that was thrown out; and a chunk that is damaged.
//!
//! The second look at the words also makes sure that the keys and namespaces that were read belong to the words: see
//! [`ChunkRecord::read`](crate::chunk::ChunkRecord::read).

use crate::abi;
use crate::chunk::{ChunkRecord, ChunkState, ChunkTable, ChunkWord, generation_of, state_of};
use crate::directory::Spot;
#[cfg(not(loom))]
use crate::message::Key;
use crate::namespace::namespace_index;
use crate::sync::{AtomicU32, Ordering};

/// As in `message`, which models do without.
#[cfg(loom)]
type Key = [u64; 2];

/// For how many keys the directory is asked at once, if it is asked.
const BLOCK: usize = 16;
/// How many records ahead of consecutive ones are prefetched.
const AHEAD: u32 = 8;

/// What a reader makes of chunks that an engine has marked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Marked {
    /// The engine lives and will decide: they are not there.
    Missing,
    /// The engine that has marked them is dead: it evicts nothing any more, and its successor shows them again.
    There,
}

/// The fence between what a scheduler says and its second look, and between an engine's marks and its look at the schedulers.
#[inline(always)]
pub fn fence() {
    // SYNC POINT: SeqCst; each pairs with those of the other side.
    crate::sync::fence(Ordering::SeqCst);
}

/// What a record's word says to a reader, if its chunk is there.
#[inline(always)]
fn generation(word: u64, marked: Marked) -> Option<u64> {
    let is_there = match state_of(word) {
        Some(ChunkState::Visible) => true,
        Some(ChunkState::Evicting) => marked == Marked::There,
        Some(ChunkState::Free) | None => false,
    };
    is_there.then(|| generation_of(word))
}

impl ChunkRecord {
    /// Scheduler, first look: the generation of the chunk, if it is there and has this key. The second look decides.
    #[inline(always)]
    #[must_use]
    pub fn find(&self, namespace: u32, key: Key, marked: Marked) -> Option<u64> {
        // SYNC POINT: Acquire; pairs with the Release in `show`, so the fields are at least those of this life.
        let generation = generation(self.word(Ordering::Acquire), marked)?;
        self.is_of(namespace, key).then_some(generation)
    }

    /// Scheduler, second look, after [`fence`]: is it still the same chunk, and there?
    #[inline(always)]
    #[must_use]
    pub fn still(&self, same: u64, marked: Marked) -> bool {
        // Relaxed: the fence before it orders it.
        generation(self.word(Ordering::Relaxed), marked) == Some(same)
    }
}

impl ChunkTable {
    /// Scheduler, first look: appends the longest prefix of `keys` that is there to `found`, at most `most` chunks. The chunks
    /// of a chain usually have consecutive ids, so the record behind the one just found is tried first. Otherwise the
    /// directory is asked for a block of keys at once: first for all of its lines, then for the records that these name.
    #[inline]
    pub fn search(
        &self,
        namespace: u32,
        keys: impl IntoIterator<Item = Key>,
        most: usize,
        marked: Marked,
        found: &mut Vec<ChunkWord>,
    ) {
        let (records, directory, index) = (self.records(), self.directory(), namespace_index(namespace));
        let find = |id: u32, key: Key| {
            let generation = records.get(id as usize)?.find(namespace, key, marked)?;
            Some(ChunkWord::new(id, generation))
        };
        let mut keys = keys.into_iter();
        let (mut block, mut spots) = ([Key::default(); BLOCK], [Spot::default(); BLOCK]);
        // Which record the first hint of each spot names.
        let mut hinted = [u32::MAX; BLOCK];
        // Where the block is read, how long it is, and whether what is left of it has spots.
        let (mut at, mut len, mut is_spotted) = (0, 0, false);
        let mut next = u32::MAX;
        let end = found.len().saturating_add(most);
        while found.len() < end {
            if at == len {
                // The first chunk tells whether the others lie behind it.
                let size = if next == u32::MAX { 1 } else { BLOCK };
                (at, len, is_spotted) = (0, 0, false);
                for (place, key) in block[..size].iter_mut().zip(&mut keys) {
                    *place = key;
                    len += 1;
                }
                if len == 0 {
                    return;
                }
            }
            let key = block[at];
            // Where one chunk of a block did not lie behind the one before it, the others hardly do.
            let word = match find(if is_spotted { hinted[at] } else { next }, key) {
                Some(word) => {
                    if !is_spotted {
                        self.prefetch(next.saturating_add(AHEAD));
                    }
                    word
                }
                None => {
                    if !is_spotted {
                        for (spot, key) in spots[at..len].iter_mut().zip(&block[at..len]) {
                            *spot = directory.spot(index, *key);
                            directory.prefetch(*spot);
                        }
                        // The first one is needed at once.
                        for (spot, id) in spots[at + 1..len].iter().zip(&mut hinted[at + 1..len]) {
                            *id = directory.hints(*spot).next().unwrap_or(u32::MAX);
                            self.prefetch(*id);
                        }
                        is_spotted = true;
                    }
                    let Some(word) = directory.hints(spots[at]).find_map(|id| find(id, key)) else { return };
                    word
                }
            };
            found.push(word);
            next = word.chunk().saturating_add(1);
            at += 1;
        }
    }

    /// Scheduler, second look, after [`fence`]: how many of these chunks, from the first one on, are still there.
    #[must_use]
    pub fn still(&self, words: &[ChunkWord], marked: Marked) -> usize {
        let records = self.records();
        let is_still = |word: &ChunkWord| {
            let record = records.get(word.chunk() as usize);
            record.is_some_and(|record| record.still(word.generation(), marked))
        };
        words.iter().position(|word| !is_still(word)).unwrap_or(words.len())
    }
}

abi! {
    /// A word in a client's channel: does the client hold something that it could not publish, because there was no room?
    #[repr(transparent)]
    pub struct Unpublished(AtomicU32);
}

// SAFETY: one atomic.
unsafe impl crate::mapping::Shared for Unpublished {}

impl Unpublished {
    /// A word in private memory, for models.
    #[cfg(loom)]
    #[must_use]
    #[allow(clippy::new_without_default, reason = "made in models alone")]
    pub fn new() -> Unpublished {
        Unpublished(AtomicU32::new(0))
    }

    /// Scheduler: there is something, and the [`fence`] comes after this. This and `clear` are called under the lock under which
    /// holds are entered and published.
    pub fn set(&self) {
        // Relaxed: the fence after it orders it.
        self.0.store(1, Ordering::Relaxed);
    }

    /// Scheduler: everything is in its ring by now.
    pub fn clear(&self) {
        // SYNC POINT: Release; pairs with the Acquire in `is_set`: an engine that sees this sees what is in the ring.
        self.0.store(0, Ordering::Release);
    }

    /// Engine, after its [`fence`] and before it looks at the ring.
    #[must_use]
    pub fn is_set(&self) -> bool {
        // SYNC POINT: Acquire; pairs with the Release in `clear`.
        self.0.load(Ordering::Acquire) != 0
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::chunk::ChunkIdentity;

    const NAMESPACE: u32 = 3;

    fn key(number: u64) -> Key {
        [number, number.wrapping_mul(0x9e37_79b9_7f4a_7c15)]
    }

    fn table(records: u32) -> ChunkTable {
        let table = ChunkTable::private(1 << 10);
        table.set_ready(records, 0);
        table
    }

    fn show(table: &ChunkTable, chunk: u32, number: u64) {
        let identity = ChunkIdentity { key: key(number), namespace: NAMESPACE };
        assert!(table.show(chunk, identity, &[chunk], &[], |_| None));
    }

    fn search(table: &ChunkTable, numbers: core::ops::Range<u64>, marked: Marked) -> Vec<u32> {
        let mut found = Vec::new();
        table.search(NAMESPACE, numbers.map(key), usize::MAX, marked, &mut found);
        assert_eq!(table.still(&found, marked), found.len());
        found.iter().map(|word| word.chunk()).collect()
    }

    #[test]
    fn the_longest_prefix_is_found_wherever_its_chunks_lie() {
        let table = table(1000);
        // A run, then scattered ones, then a run that goes down, then a gap.
        let ids: Vec<u32> = (10..60).chain([700, 3, 999, 0, 5]).chain((300..340).rev()).collect();
        for (number, id) in ids.iter().enumerate() {
            show(&table, *id, number as u64);
        }
        for count in [0, 1, 2, 16, 17, 50, 52, 55, ids.len()] {
            assert_eq!(search(&table, 0..count as u64, Marked::Missing), ids[..count], "{count} keys");
        }
        assert_eq!(search(&table, 0..1000, Marked::Missing), ids);
        assert_eq!(search(&table, 40..1000, Marked::Missing), ids[40..]);
        assert!(search(&table, 500..501, Marked::Missing).is_empty());
        let mut found = Vec::new();
        table.search(NAMESPACE, (0..1000).map(key), 20, Marked::Missing, &mut found);
        assert_eq!(found.len(), 20);
        table.search(NAMESPACE + 1, (0..1000).map(key), 20, Marked::Missing, &mut found);
        assert_eq!(found.len(), 20, "another namespace has none of it");
    }

    #[test]
    fn a_miss_takes_no_key_behind_its_block() {
        let table = table(1000);
        (0..20).for_each(|number| show(&table, number, number.into()));
        for (from, most) in [(0, 20 + BLOCK), (100, 1)] {
            let mut taken = 0;
            let keys = (from..from + 1000).map(|number| {
                taken += 1;
                key(number)
            });
            table.search(NAMESPACE, keys, usize::MAX, Marked::Missing, &mut Vec::new());
            assert!(taken <= most, "{taken} keys were taken from {from} on");
        }
    }

    #[test]
    fn what_is_marked_is_missing_unless_its_engine_is_dead() {
        let table = table(1000);
        (0..30).for_each(|number| show(&table, number, number.into()));
        let mut found = Vec::new();
        table.search(NAMESPACE, (0..30).map(key), usize::MAX, Marked::Missing, &mut found);
        table.mark(17);
        for (marked, count) in [(Marked::Missing, 17), (Marked::There, 30)] {
            assert_eq!(search(&table, 0..30, marked).len(), count);
            assert_eq!(table.still(&found, marked), count);
        }
        // Whoever holds it may load it, and the engine may spare it.
        assert!(table.find(found[17]).is_some() && table.is_still_there(found[17]));
        table.spare(17);
        assert_eq!(table.still(&found, Marked::Missing), 30);
        // A chunk that ends is gone for all, whoever has its record next.
        table.mark(17);
        table.end(17, ChunkIdentity { key: key(17), namespace: NAMESPACE });
        show(&table, 17, 17);
        assert_eq!(search(&table, 0..30, Marked::Missing).len(), 30);
        assert_eq!(table.still(&found, Marked::There), 17);
        assert!(table.find(found[17]).is_none() && !table.is_still_there(found[17]));
    }

    #[test]
    fn hints_that_lie_lead_nowhere() {
        let table = table(8);
        (0..8).for_each(|number| show(&table, number, number.into()));
        // A hint to a record without memory, to one beyond the table, and to a chunk with another key.
        for (number, id) in [(100, 500), (101, (1 << 20) + 7), (102, 3)] {
            assert!(table.directory().insert(
                table.directory().spot(namespace_index(NAMESPACE), key(number)),
                id,
                |_| None
            ));
            assert!(search(&table, number..number + 1, Marked::There).is_empty());
        }
        let beyond = ChunkWord::new(500, 0);
        assert_eq!(table.still(&[beyond], Marked::There), 0);
        assert!(!table.is_still_there(beyond));
    }
}
