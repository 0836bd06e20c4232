//! Least recently used: one list, warm end to cold end.
//!
//! It does not resist a scan: a burst of prompts that never come back pushes everything else out. Where the
//! cache is small against what passes through it, see [`arc`](super::arc).

use super::lists::Lists;
use super::{ChunkId, MAX_CHUNKS, Policy};

/// The one list there is.
const ALL: usize = 0;

/// The least-recently-used order. Every call is O(1), [`victim`](Policy::victim) amortised.
pub struct Lru {
    order: Lists<1>,
}

impl Lru {
    /// Takes the memory for chunk ids below `max_chunks`: 12 bytes each, untouched until used.
    ///
    /// # Panics
    ///
    /// If `max_chunks` is above [`MAX_CHUNKS`].
    pub fn new(max_chunks: usize) -> Self {
        assert!(
            max_chunks <= MAX_CHUNKS,
            "a policy orders at most {MAX_CHUNKS} chunks, and {max_chunks} were asked for"
        );
        Self { order: Lists::new(max_chunks) }
    }
}

impl Policy for Lru {
    fn name(&self) -> &'static str {
        "lru"
    }

    fn insert(&mut self, id: ChunkId, _hash: u64, parent: Option<ChunkId>) {
        match parent {
            // Also where the parent is not the warmest: a leaf stored late must not outlive its prefix.
            Some(parent) if self.order.list_of(parent).is_some() => self.order.push_behind(parent, id),
            _ => self.order.push_warm(ALL, id),
        }
    }

    fn touch(&mut self, id: ChunkId) {
        self.order.move_warm(ALL, id);
    }

    fn remove(&mut self, id: ChunkId, _evicted: bool) {
        self.order.unlink(id);
    }

    fn victim(&mut self, evictable: &mut dyn FnMut(ChunkId) -> bool) -> Option<ChunkId> {
        // One look at each resident chunk: a refused one goes to the warm end and would be met again.
        for _ in 0..self.len() {
            let id = self.order.coldest(ALL)?;
            if evictable(id) {
                return Some(id);
            }
            self.order.move_warm(ALL, id);
        }
        None
    }

    fn len(&self) -> usize {
        self.order.len(ALL)
    }

    fn dump(&self) -> Vec<ChunkId> {
        self.order.dump(ALL)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tests::{Op, ops};
    use super::*;

    /// The same order, written for obviousness: coldest first.
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

        fn touch(&mut self, id: ChunkId) {
            self.remove(id);
            self.0.push(id);
        }

        fn victim(&mut self, refused: u32) -> Option<ChunkId> {
            for id in self.0.clone() {
                if refused & 1 << id == 0 {
                    return Some(id);
                }
                self.touch(id);
            }
            None
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        #[test]
        fn does_what_the_model_does(ops in ops()) {
            let (mut lru, mut model) = (Lru::new(32), Model::default());
            for op in ops {
                let resident = |id: &ChunkId| model.0.contains(id);
                match op {
                    Op::Insert { id, parent, .. } if !resident(&id) => {
                        // A parent that is not resident is as good as none.
                        lru.insert(id, 0, parent);
                        model.insert(id, parent);
                    }
                    Op::Touch(id) if resident(&id) => {
                        lru.touch(id);
                        model.touch(id);
                    }
                    Op::Remove { id, evicted } if resident(&id) => {
                        lru.remove(id, evicted);
                        model.remove(id);
                    }
                    Op::Victim { refused } => {
                        prop_assert_eq!(lru.victim(&mut |id| refused & 1 << id == 0), model.victim(refused));
                    }
                    _ => {}
                }
                prop_assert_eq!(lru.dump(), &model.0[..]);
                prop_assert_eq!(lru.len(), model.0.len());
            }
        }
    }

    #[test]
    fn a_leaf_stored_late_goes_just_behind_its_parent() {
        let mut lru = Lru::new(4);
        lru.insert(0, 0, None);
        lru.insert(1, 0, Some(0));
        lru.insert(2, 0, None);
        lru.insert(3, 0, Some(1));
        assert_eq!(lru.dump(), [3, 1, 0, 2]);
    }
}
