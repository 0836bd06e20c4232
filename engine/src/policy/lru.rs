//! Least recently used: one list for each order, from the warm end to the cold end.
//!
//! This policy does not resist a scan: a burst of prompts that never come back pushes everything else out. For a
//! cache that is small against what passes through it, see [`arc`](super::arc).

use super::lists::Lists;
use super::{ChunkId, MAX_CHUNKS, NoMemory, ORDERS, Policy};

/// The least-recently-used order. Every call is O(1), [`victim`](Policy::victim) amortised.
pub struct Lru {
    orders: Lists<ORDERS>,
}

impl Lru {
    /// Takes the memory for chunk ids below `max_chunks`: 12 bytes for each, untouched until used.
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
        Ok(Self { orders: Lists::new(max_chunks)? })
    }
}

impl Policy for Lru {
    fn name(&self) -> &'static str {
        "lru"
    }

    fn insert(&mut self, order: usize, id: ChunkId, _hash: u64, parent: Option<ChunkId>) {
        match parent {
            // This also holds if the parent is not the warmest: a leaf that is stored late must not outlive its
            // prefix.
            Some(parent) if self.orders.list_of(parent) == Some(order) => self.orders.push_behind(parent, id),
            _ => self.orders.push_warm(order, id),
        }
    }

    fn insert_coldest(&mut self, order: usize, id: ChunkId, _hash: u64) {
        self.orders.push_cold(order, id);
    }

    fn has(&self, id: ChunkId) -> bool {
        self.orders.list_of(id).is_some()
    }

    fn touch(&mut self, id: ChunkId, front: Option<ChunkId>) {
        let Some(order) = self.orders.list_of(id) else {
            debug_assert!(false, "chunk {id} is not resident");
            return;
        };
        match front {
            Some(front) if self.orders.list_of(front) == Some(order) => self.orders.move_behind(front, id),
            _ => self.orders.move_warm(order, id),
        }
    }

    fn remove(&mut self, id: ChunkId, _evicted: bool) {
        self.orders.unlink(id);
    }

    fn victim(
        &mut self,
        order: usize,
        looks: &mut u32,
        evictable: &mut dyn FnMut(ChunkId) -> bool,
    ) -> Option<ChunkId> {
        // Each resident chunk is looked at once: a refused one goes to the warm end, where the search would meet it
        // again.
        for _ in 0..self.len(order) {
            *looks = looks.checked_sub(1)?;
            let id = self.orders.coldest(order)?;
            if evictable(id) {
                return Some(id);
            }
            self.orders.move_warm(order, id);
        }
        None
    }

    fn put_back(&mut self, id: ChunkId) {
        if let Some(order) = self.orders.unlink(id) {
            self.orders.push_cold(order, id);
        }
    }

    fn forget(&mut self, _order: usize) {}

    fn len(&self, order: usize) -> usize {
        self.orders.len(order)
    }

    fn dump(&self, order: usize) -> Vec<ChunkId> {
        self.orders.dump(order)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tests::{Op, ops};
    use super::*;

    /// The same order, in the most obvious form: a list, coldest first.
    #[derive(Default)]
    struct Model(Vec<ChunkId>);

    impl Model {
        fn insert(&mut self, id: ChunkId, parent: Option<ChunkId>) {
            let at = parent.and_then(|parent| self.0.iter().position(|&other| other == parent));
            self.0.insert(at.unwrap_or(self.0.len()), id);
        }

        fn remove(&mut self, id: ChunkId) {
            self.0.retain(|&other| other != id);
        }

        fn touch(&mut self, id: ChunkId, front: Option<ChunkId>) {
            if front != Some(id) {
                self.remove(id);
                self.insert(id, front);
            }
        }

        fn victim(&mut self, refused: u32) -> Option<ChunkId> {
            for id in self.0.clone() {
                if refused & 1 << id == 0 {
                    return Some(id);
                }
                self.touch(id, None);
            }
            None
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        #[test]
        fn does_what_the_model_does(ops in ops()) {
            let (mut lru, mut model) = (Lru::new(32).unwrap(), Model::default());
            for op in ops {
                let resident = |id: &ChunkId| model.0.contains(id);
                match op {
                    Op::Insert { id, parent, .. } if !resident(&id) => {
                        // A parent that is not resident counts as none.
                        lru.insert(5, id, 0, parent);
                        model.insert(id, parent);
                    }
                    Op::InsertColdest { id, .. } if !resident(&id) => {
                        lru.insert_coldest(5, id, 0);
                        model.0.insert(0, id);
                    }
                    Op::Touch { id, front } if resident(&id) => {
                        lru.touch(id, front);
                        model.touch(id, front);
                    }
                    Op::Remove { id, evicted } if resident(&id) => {
                        lru.remove(id, evicted);
                        model.remove(id);
                    }
                    Op::PutBack { id } if resident(&id) => {
                        lru.put_back(id);
                        model.remove(id);
                        model.0.insert(0, id);
                    }
                    Op::Victim { refused } => {
                        let victim = lru.victim(5, &mut u32::MAX.clone(), &mut |id| refused & 1 << id == 0);
                        prop_assert_eq!(victim, model.victim(refused));
                    }
                    _ => {}
                }
                prop_assert_eq!(lru.dump(5), &model.0[..]);
                prop_assert_eq!(lru.len(5), model.0.len());
                prop_assert!((0..32).all(|id| lru.has(id) == model.0.contains(&id)));
            }
        }
    }

    #[test]
    fn a_leaf_stored_late_goes_just_behind_its_parent() {
        let mut lru = Lru::new(4).unwrap();
        lru.insert(0, 0, 0, None);
        lru.insert(0, 1, 0, Some(0));
        lru.insert(0, 2, 0, None);
        lru.insert(0, 3, 0, Some(1));
        assert_eq!(lru.dump(0), [3, 1, 0, 2]);
    }
}
