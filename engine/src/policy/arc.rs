//! Adaptive replacement (Megiddo and Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache", FAST'03).
//!
//! Two lists hold the residents: T1 those seen once lately, T2 those seen at least twice. Two lists of ghosts, B1
//! and B2, remember by hash what was evicted from each. A chunk that comes back while its ghost is remembered shows
//! which list was too short, and moves the target for T1. So a burst of prompts that never come back drains T1
//! alone.
//!
//! This differs from the paper:
//!
//! * **The capacity is not fixed.** The cache evicts a few chunks at a time, when it needs room. So the capacity
//!   `c` is the number of residents when it last began to evict, or the present number, if that is larger.
//! * **Room is made before the miss is known**, so the target moves after the eviction, not before it.
//! * **There are more ghosts**: up to `c` on each list, where the paper keeps |T1| + |B1| within `c` and all four
//!   lists within 2 `c`. Here the first reuse comes late (after minutes), and a ghost costs tens of bytes beside
//!   megabytes of KV. On Mooncake's conversation trace this raises the hit rate from .065 to .078 with room for 1 %
//!   of the blocks, from .133 to .147 at 3 % and from .307 to .310 at 15 %, and lowers it at no size.
//! * **Chains.** A new leaf goes just behind its parent if both are on the same list (mostly T1, where one prompt's
//!   new chunks arrive together), otherwise to the warm end of its own list. So leaves are evicted first, as in
//!   LRU. Moving a leaf behind a parent on the other list would count it as seen twice when it was seen once, or
//!   the reverse.

use super::ghosts::Ghosts;
use super::lists::Lists;
use super::{ChunkId, MAX_CHUNKS, NoMemory, ORDERS, Policy};
use crate::lazy::Lazy;

/// The lists of an order, both of residents (T1, T2) and of ghosts (B1, B2). Those of order n begin at n × `LISTS`.
const ONCE: usize = 0;
const TWICE: usize = 1;
const LISTS: usize = 2;
/// If all chunks of a list were refused, the search looks at this many of them again for each victim that it finds
/// on the other list. So it soon notices when some of them may be evicted again, and the looks for one victim stay
/// few however long that list is.
const LOOKS_BACK: usize = 16;

/// The adaptive order. Every call is O(1), [`victim`](Policy::victim) amortised.
pub struct Arc {
    /// T1 and T2.
    residents: Lists<{ LISTS * ORDERS }>,
    /// B1 and B2.
    ghosts: Ghosts,
    /// The content hash of each resident chunk, by which its ghost will be known.
    hashes: Lazy<u64>,
    orders: [Order; ORDERS],
}

/// What adapts in one order.
#[derive(Clone, Copy, Default)]
struct Order {
    /// The paper's p: how many residents T1 should have, at most `c`. Its steps are fractions.
    target_once: f64,
    /// The number of residents when the cache last began to make room: `c`, unless there are more now.
    full_len: usize,
    /// True from an insertion to the next eviction, which is then the first of a batch.
    grew: bool,
    /// How many chunks of each list were refused in a row. When a whole list has been refused, the other list has
    /// its turn. A search that runs out of looks is continued from here.
    refused: [usize; LISTS],
}

impl Arc {
    /// Takes the memory for chunk ids below `max_chunks`: 80 to 96 bytes for each, untouched until used.
    ///
    /// # Panics
    ///
    /// If `max_chunks` is above [`MAX_CHUNKS`].
    ///
    /// # Errors
    ///
    /// The system has no address space for it.
    pub fn new(max_chunks: usize) -> Result<Self, NoMemory> {
        assert!(
            max_chunks <= MAX_CHUNKS,
            "a policy orders at most {MAX_CHUNKS} chunks, and {max_chunks} were asked for"
        );
        Ok(Self {
            residents: Lists::new(max_chunks)?,
            ghosts: Ghosts::new(max_chunks)?,
            hashes: Lazy::new(max_chunks)?,
            orders: [Order::default(); ORDERS],
        })
    }

    /// The paper's c.
    fn capacity(&self, order: usize) -> usize {
        self.orders[order].full_len.max(self.len(order))
    }

    fn inserted(&mut self, order: usize, id: ChunkId, hash: u64) {
        if let Some(known_by) = self.hashes.get_mut(id as usize) {
            *known_by = hash;
        }
        self.orders[order].grew = true;
    }

    /// Moves the target after a miss whose ghost was on `list`. `once` and `twice` are the numbers of ghosts at
    /// that time.
    fn adapt(&mut self, order: usize, list: usize, once: usize, twice: usize) {
        let (once, twice) = (once as f64, twice as f64);
        let capacity = self.capacity(order) as f64;
        let target = &mut self.orders[order].target_once;
        // The fewer ghosts a list has, the more a hit among them says. The list of the hit is not empty, so nothing
        // is divided by 0.
        *target = if list == ONCE {
            (*target + (twice / once).max(1.0)).min(capacity)
        } else {
            (*target - (once / twice).max(1.0)).max(0.0)
        };
    }
}

impl Policy for Arc {
    fn name(&self) -> &'static str {
        "arc"
    }

    fn insert(&mut self, order: usize, id: ChunkId, hash: u64, parent: Option<ChunkId>) {
        let first = order * LISTS;
        let (once, twice) = (self.ghosts.len(first + ONCE), self.ghosts.len(first + TWICE));
        let list = match self.ghosts.take(hash) {
            // A ghost of another order has the same hash by chance only.
            Some(ghost_list) if ghost_list / LISTS == order => {
                self.adapt(order, ghost_list % LISTS, once, twice);
                first + TWICE
            }
            _ => first + ONCE,
        };
        match parent {
            Some(parent) if self.residents.list_of(parent) == Some(list) => {
                self.residents.push_behind(parent, id)
            }
            _ => self.residents.push_warm(list, id),
        }
        self.inserted(order, id, hash);
    }

    fn insert_coldest(&mut self, order: usize, id: ChunkId, hash: u64) {
        self.residents.push_cold(order * LISTS + ONCE, id);
        self.inserted(order, id, hash);
    }

    fn has(&self, id: ChunkId) -> bool {
        self.residents.list_of(id).is_some()
    }

    fn touch(&mut self, id: ChunkId, front: Option<ChunkId>) {
        let Some(list) = self.residents.list_of(id) else {
            debug_assert!(false, "chunk {id} is not resident");
            return;
        };
        let list = list - list % LISTS + TWICE;
        match front {
            Some(front) if self.residents.list_of(front) == Some(list) => {
                self.residents.move_behind(front, id)
            }
            _ => self.residents.move_warm(list, id),
        }
    }

    fn remove(&mut self, id: ChunkId, evicted: bool) {
        let Some(list) = self.residents.list_of(id) else {
            debug_assert!(false, "chunk {id} is not resident");
            return;
        };
        let order = list / LISTS;
        let len = self.len(order);
        let state = &mut self.orders[order];
        if evicted && state.grew {
            state.full_len = len;
            state.target_once = state.target_once.min(len as f64);
            state.grew = false;
        }
        let bound = state.full_len;
        self.residents.unlink(id);
        if evicted {
            self.ghosts.push(list, self.hashes[id as usize], bound);
        }
        // A removal that was no eviction (cleared, replaced, aborted) makes the capacity smaller.
        let capacity = self.capacity(order) as f64;
        let target = &mut self.orders[order].target_once;
        *target = target.min(capacity);
    }

    fn victim(
        &mut self,
        order: usize,
        looks: &mut u32,
        evictable: &mut dyn FnMut(ChunkId) -> bool,
    ) -> Option<ChunkId> {
        let once = self.residents.len(order * LISTS + ONCE);
        let lists = if once as f64 > self.orders[order].target_once { [ONCE, TWICE] } else { [TWICE, ONCE] };
        // A pass that an earlier call began is finished first. Then everything is looked at once more, because
        // chunks that were refused in that pass may have become evictable.
        let rounds = 1 + usize::from(self.orders[order].refused != [0; LISTS]);
        for _ in 0..rounds {
            for list in lists {
                // A refused chunk goes to its list's warm end, where the search would meet it again.
                while self.orders[order].refused[list] < self.residents.len(order * LISTS + list) {
                    *looks = looks.checked_sub(1)?;
                    let id = self.residents.coldest(order * LISTS + list)?;
                    let refused = &mut self.orders[order].refused;
                    if evictable(id) {
                        let other = &mut refused[1 - list];
                        *other = other.saturating_sub(LOOKS_BACK);
                        refused[list] = 0;
                        return Some(id);
                    }
                    refused[list] += 1;
                    self.residents.move_warm(order * LISTS + list, id);
                }
            }
            self.orders[order].refused = [0; LISTS];
        }
        None
    }

    fn put_back(&mut self, id: ChunkId) {
        if let Some(list) = self.residents.unlink(id) {
            self.residents.push_cold(list, id);
        }
    }

    fn forget(&mut self, order: usize) {
        // Its ghosts belong to nobody now: no chunk has their hashes, and other ghosts take their places.
        self.orders[order] = Order::default();
    }

    fn len(&self, order: usize) -> usize {
        self.residents.len(order * LISTS + ONCE) + self.residents.len(order * LISTS + TWICE)
    }

    fn dump(&self, order: usize) -> Vec<ChunkId> {
        let lists = [ONCE, TWICE].map(|list| order * LISTS + list);
        for list in lists {
            let ghosts = self.ghosts.dump(list).len();
            assert!(
                ghosts <= self.hashes.len(),
                "{ghosts} ghosts on list {list} for {} chunks",
                self.hashes.len()
            );
        }
        let (capacity, target) = (self.capacity(order), self.orders[order].target_once);
        assert!((0.0..=capacity as f64).contains(&target), "target {target} of {capacity}");
        lists.into_iter().flat_map(|list| self.residents.dump(list)).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::super::tests::{Op, ops};
    use super::*;

    /// The same algorithm for a cache of fixed capacity, by content alone, in the most obvious form. Lists are
    /// coldest first.
    #[derive(Default)]
    struct Reference {
        capacity: usize,
        t: [Vec<u64>; 2],
        b: [Vec<u64>; 2],
        p: f64,
    }

    impl Reference {
        /// Uses `block`, which follows `parent` in its chain. Returns what was evicted for it.
        fn access(&mut self, block: u64, parent: Option<u64>) -> Option<u64> {
            if self.t.iter().any(|list| list.contains(&block)) {
                self.t.iter_mut().for_each(|list| list.retain(|&other| other != block));
                self.t[1].push(block);
                return None;
            }
            let evicted = (self.t[0].len() + self.t[1].len() == self.capacity).then(|| self.replace());
            let (b1, b2) = (self.b[0].len() as f64, self.b[1].len() as f64);
            let list = if self.b[0].contains(&block) {
                self.p = f64::min(self.p + f64::max(1.0, b2 / b1), self.capacity as f64);
                1
            } else if self.b[1].contains(&block) {
                self.p = f64::max(self.p - f64::max(1.0, b1 / b2), 0.0);
                1
            } else {
                0
            };
            self.b.iter_mut().for_each(|ghosts| ghosts.retain(|&other| other != block));
            let behind = parent.and_then(|parent| self.t[list].iter().position(|&other| other == parent));
            let at = behind.unwrap_or(self.t[list].len());
            self.t[list].insert(at, block);
            evicted
        }

        fn replace(&mut self) -> u64 {
            let from = if self.t[0].len() as f64 > self.p || self.t[1].is_empty() { 0 } else { 1 };
            let block = self.t[from].remove(0);
            self.b[from].push(block);
            if self.b[from].len() > self.capacity {
                self.b[from].remove(0);
            }
            block
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        #[test]
        fn does_what_the_reference_does(
            capacity in 1..12_usize,
            accesses in proptest::collection::vec((0..30_u64, proptest::option::of(0..30_u64)), 1..600),
        ) {
            let mut arc = Arc::new(capacity).unwrap();
            let mut reference = Reference { capacity, ..Reference::default() };
            let mut contents: Vec<u64> = Vec::new();
            for (block, parent) in accesses {
                let id_of = |contents: &[u64], block| contents.iter().position(|&other| other == block);
                let evicted = reference.access(block, parent);
                if let Some(id) = id_of(&contents, block) {
                    arc.touch(id as ChunkId, None);
                } else {
                    let id = if contents.len() < capacity {
                        contents.push(block);
                        contents.len() - 1
                    } else {
                        let id = arc.victim(0, &mut u32::MAX.clone(), &mut |_| true).unwrap();
                        prop_assert_eq!(Some(contents[id as usize]), evicted);
                        arc.remove(id, true);
                        contents[id as usize] = block;
                        id as usize
                    };
                    let parent = parent.filter(|&parent| parent != block).and_then(|parent| id_of(&contents, parent));
                    arc.insert(0, id as ChunkId, block, parent.map(|parent| parent as ChunkId));
                }
                let order: Vec<u64> = arc.dump(0).iter().map(|&id| contents[id as usize]).collect();
                prop_assert_eq!(order, reference.t.concat());
                prop_assert_eq!(arc.residents.len(ONCE), reference.t[0].len());
                prop_assert_eq!([arc.ghosts.dump(ONCE), arc.ghosts.dump(TWICE)], reference.b.clone());
                prop_assert_eq!(arc.orders[0].target_once, reference.p);
            }
        }

        /// Makes calls that a cache of fixed capacity never makes: refusals, removals without need, evictions
        /// before it is full.
        #[test]
        fn keeps_its_invariants_whatever_is_called(ops in ops()) {
            let mut arc = Arc::new(32).unwrap();
            let mut resident: Vec<Option<u64>> = vec![None; 32];
            let mut ghosts = BTreeSet::new();
            for op in ops {
                match op {
                    Op::Insert { id, hash, parent } if resident[id as usize].is_none() => {
                        let was_ghost = ghosts.remove(&hash);
                        arc.insert(0, id, hash, parent);
                        prop_assert_eq!(arc.residents.list_of(id), Some(if was_ghost { TWICE } else { ONCE }));
                        resident[id as usize] = Some(hash);
                    }
                    Op::InsertColdest { id, hash } if resident[id as usize].is_none() => {
                        arc.insert_coldest(0, id, hash);
                        prop_assert_eq!(arc.dump(0)[0], id);
                        prop_assert_eq!(arc.residents.list_of(id), Some(ONCE));
                        resident[id as usize] = Some(hash);
                    }
                    Op::Touch { id, .. } if resident[id as usize].is_some() => {
                        arc.touch(id, None);
                        prop_assert_eq!(arc.residents.list_of(id), Some(TWICE));
                    }
                    Op::Remove { id, evicted } if resident[id as usize].is_some() => {
                        arc.remove(id, evicted);
                        let hash = resident[id as usize].take();
                        // The bound may drop other ghosts, so the test takes those that are left from the policy
                        // itself.
                        let (once, twice) = (arc.ghosts.dump(ONCE), arc.ghosts.dump(TWICE));
                        let now: BTreeSet<u64> = once.into_iter().chain(twice).collect();
                        if evicted {
                            ghosts.extend(hash);
                            prop_assert!(hash.is_some_and(|hash| now.contains(&hash)) && ghosts.is_superset(&now));
                        } else {
                            prop_assert_eq!(&ghosts, &now);
                        }
                        ghosts = now;
                    }
                    Op::PutBack { id } if resident[id as usize].is_some() => {
                        let (before, list) = (arc.dump(0), arc.residents.list_of(id));
                        arc.put_back(id);
                        prop_assert_eq!(arc.residents.list_of(id), list);
                        prop_assert_eq!(list.and_then(|list| arc.residents.coldest(list)), Some(id));
                        let others = |dump: Vec<ChunkId>| -> Vec<ChunkId> {
                            dump.into_iter().filter(|other| *other != id).collect()
                        };
                        prop_assert_eq!(others(arc.dump(0)), others(before));
                    }
                    Op::Victim { refused } => {
                        let before = arc.dump(0);
                        let victim = arc.victim(0, &mut u32::MAX.clone(), &mut |id| refused & 1 << id == 0);
                        let may_go = |id: &ChunkId| refused & 1 << *id == 0;
                        prop_assert_eq!(victim.is_some(), before.iter().any(may_go));
                        prop_assert!(victim.is_none_or(|id| may_go(&id) && before.contains(&id)));
                    }
                    _ => {}
                }
                let mut dump = arc.dump(0);
                dump.sort_unstable();
                let expected: Vec<ChunkId> = (0..32).filter(|&id| resident[id as usize].is_some()).collect();
                prop_assert_eq!(&dump, &expected);
                prop_assert_eq!(arc.len(0), expected.len());
                prop_assert!((0..32).all(|id| arc.has(id) == expected.contains(&id)));
            }
        }
    }

    #[test]
    fn a_burst_that_never_comes_back_leaves_what_did() {
        let mut arc = Arc::new(10).unwrap();
        for id in 0..5 {
            arc.insert(0, id, u64::from(id), None);
        }
        (0..5).for_each(|id| arc.touch(id, None));
        for id in 5..10 {
            arc.insert(0, id, u64::from(id), None);
        }
        for hash in 100..200 {
            let id = arc.victim(0, &mut u32::MAX.clone(), &mut |_| true).unwrap();
            assert!(id >= 5, "chunk {id} was used twice");
            arc.remove(id, true);
            arc.insert(0, id, hash, None);
        }
    }

    /// A full policy of `capacity` chunks; chunk n has hash n.
    fn full(capacity: u32) -> Arc {
        let mut arc = Arc::new(capacity as usize).unwrap();
        (0..capacity).for_each(|id| arc.insert(0, id, u64::from(id), None));
        arc
    }

    #[test]
    fn only_a_chunk_that_was_evicted_leaves_a_ghost() {
        let mut arc = full(3);
        arc.remove(0, true);
        arc.remove(1, false);
        assert_eq!(arc.ghosts.dump(ONCE), [0]);
        arc.insert(0, 1, 1, None);
        arc.insert(0, 0, 0, None);
        assert_eq!([0, 1].map(|id| arc.residents.list_of(id)), [Some(TWICE), Some(ONCE)]);
    }

    #[test]
    fn the_capacity_is_what_was_resident_before_room_was_made() {
        let mut arc = full(10);
        (0..4).for_each(|id| arc.remove(id, true));
        assert_eq!((arc.len(0), arc.capacity(0)), (6, 10), "within a batch");
        arc.insert(0, 0, 100, None);
        arc.remove(9, true);
        assert_eq!((arc.len(0), arc.capacity(0)), (6, 7), "the next batch begins lower");
    }

    #[test]
    fn a_capacity_that_fell_lowers_the_target() {
        let mut arc = full(10);
        arc.remove(0, true);
        for hash in 0..8 {
            // Each content comes back while its ghost is in B1, and another one is evicted.
            arc.insert(0, hash as ChunkId, hash, None);
            arc.remove(hash as ChunkId + 1, true);
        }
        assert!(arc.orders[0].target_once >= 8.0, "{}", arc.orders[0].target_once);
        for id in arc.dump(0) {
            arc.remove(id, false);
        }
        arc.insert(0, 0, 200, None);
        arc.remove(0, true);
        arc.dump(0);
        assert!(arc.orders[0].target_once <= 2.0, "{}", arc.orders[0].target_once);
    }
}
