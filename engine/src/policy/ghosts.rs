//! Ghosts: evicted chunks, of which only the hashes are remembered, on two lists for each order, each from warm to
//! cold.
//!
//! A hash is found through an open-addressing table (linear probing, at most half full; removals close their holes,
//! so no tombstones pile up). [`Ghosts::new`] takes all memory, which is zeroed and untouched until used.
//!
//! The probe sequence is not keyed: somebody who chooses the hashes could make probes long. The cache passes in
//! hashes that it has computed itself with its secret seed, never a client's bytes.

use super::lists::Lists;
use super::{NoMemory, ORDERS};
use crate::lazy::Lazy;

/// Two lists for each order. The last list has the nodes that were used once and are free again.
const LISTS: usize = 2 * ORDERS + 1;
const FREE: usize = LISTS - 1;

/// The most ghosts that one [`Ghosts::push`] drops. A list exceeds its bound by more only after the bound fell. The
/// excess is then dropped over the next calls, so that no single one takes long.
const DROPS_PER_PUSH: usize = 4;

/// A bounded set of 64-bit hashes on the lists below [`FREE`].
pub(super) struct Ghosts {
    lists: Lists<LISTS>,
    /// The hash of each ghost's node.
    hashes: Lazy<u64>,
    /// Nodes from this number on have never been used: they are on no list, and their pages are untouched.
    fresh: u32,
    /// The table: each element is a node's number + 1, or 0 if it is empty. Its length is a power of two.
    table: Lazy<u32>,
    /// The list at which the search begins for a ghost to drop when all nodes are in use and the list that needs
    /// one has none.
    from: usize,
}

impl Ghosts {
    /// Takes memory for twice `per_list` ghosts in all orders together: 28 to 36 bytes for each.
    pub(super) fn new(per_list: usize) -> Result<Self, NoMemory> {
        let capacity = 2 * per_list;
        let table_len = (2 * capacity).next_power_of_two();
        let (lists, hashes, table) = (Lists::new(capacity)?, Lazy::new(capacity)?, Lazy::new(table_len)?);
        Ok(Self { lists, hashes, fresh: 0, table, from: 0 })
    }

    /// How many ghosts are on `list`.
    pub(super) fn len(&self, list: usize) -> usize {
        self.lists.len(list)
    }

    /// Remembers `hash` at the warm end of `list`, and forgets an older ghost of that hash. If `list` has `bound`
    /// ghosts or more, its coldest are dropped first. A bound of 0 remembers nothing.
    pub(super) fn push(&mut self, list: usize, hash: u64, bound: usize) {
        self.take(hash);
        let bound = bound.min(self.hashes.len() / 2);
        for _ in 0..DROPS_PER_PUSH {
            if self.len(list) >= bound {
                self.drop_coldest(list);
            }
        }
        if bound == 0 {
            return;
        }
        let node = match self.lists.coldest(FREE) {
            Some(node) => {
                self.lists.unlink(node);
                node
            }
            None if (self.fresh as usize) < self.hashes.len() => {
                self.fresh += 1;
                self.fresh - 1
            }
            // Other orders have all nodes, for chunks that were evicted long ago. Each new ghost takes one of
            // theirs.
            None => {
                self.drop_any(list);
                let Some(node) = self.lists.coldest(FREE) else { return };
                self.lists.unlink(node);
                node
            }
        };
        self.hashes[node as usize] = hash;
        self.lists.push_warm(list, node);
        let mut slot = self.home(hash);
        while self.table[slot] != 0 {
            slot = self.next(slot);
        }
        self.table[slot] = node + 1;
    }

    /// Forgets `hash`, and returns the list that it was on.
    pub(super) fn take(&mut self, hash: u64) -> Option<usize> {
        let mut slot = self.home(hash);
        loop {
            let node = self.table[slot].checked_sub(1)?;
            if self.hashes[node as usize] == hash {
                let list = self.lists.list_of(node)?;
                self.forget(slot, node);
                return Some(list);
            }
            slot = self.next(slot);
        }
    }

    /// Forgets the coldest ghost of `list`, if there is one.
    fn drop_coldest(&mut self, list: usize) {
        if let Some(node) = self.lists.coldest(list) {
            self.take(self.hashes[node as usize]);
        }
    }

    /// Forgets the coldest ghost of another list or, if no other list has any, of this one.
    fn drop_any(&mut self, list: usize) {
        let lists = (0..FREE).map(|step| (self.from + step) % FREE);
        let other = lists.clone().find(|other| *other != list && self.len(*other) > 0);
        let Some(other) = other.or_else(|| lists.clone().find(|other| self.len(*other) > 0)) else { return };
        self.from = (other + 1) % FREE;
        self.drop_coldest(other);
    }

    fn forget(&mut self, slot: usize, node: u32) {
        self.lists.move_warm(FREE, node);
        // Close the hole: an element further on moves into it, unless its home lies behind the hole.
        let mut hole = slot;
        let mut at = self.next(slot);
        while let Some(other) = self.table[at].checked_sub(1) {
            let home = self.home(self.hashes[other as usize]);
            if self.distance(home, at) >= self.distance(hole, at) {
                self.table[hole] = other + 1;
                hole = at;
            }
            at = self.next(at);
        }
        self.table[hole] = 0;
    }

    /// Where the search for `hash` begins: the top bits of a Fibonacci product, which spreads dense hashes too.
    fn home(&self, hash: u64) -> usize {
        let mixed = (hash ^ (hash >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed >> 32) as usize & (self.table.len() - 1)
    }

    fn next(&self, slot: usize) -> usize {
        (slot + 1) & (self.table.len() - 1)
    }

    /// How many steps `to` lies behind `from`, around the table's end.
    fn distance(&self, from: usize, to: usize) -> usize {
        to.wrapping_sub(from) & (self.table.len() - 1)
    }

    /// The hashes on `list`, coldest first. Asserts that the table finds exactly the ghosts there are.
    pub(super) fn dump(&self, list: usize) -> Vec<u64> {
        let nodes = self.lists.dump(list);
        let entries = self.table.iter().filter(|&&entry| entry != 0).count();
        assert_eq!(entries, (0..FREE).map(|list| self.len(list)).sum::<usize>(), "entries in the table");
        assert_eq!(self.lists.dump(FREE).len() + entries, self.fresh as usize, "nodes ever used");
        for &node in &nodes {
            let mut slot = self.home(self.hashes[node as usize]);
            while self.table[slot] != node + 1 {
                assert_ne!(
                    self.table[slot], 0,
                    "ghost {:#x} is not in the table",
                    self.hashes[node as usize]
                );
                slot = self.next(slot);
            }
        }
        nodes.into_iter().map(|node| self.hashes[node as usize]).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        /// There are few hashes in a small table, so probes collide, wrap around its end and close holes all the
        /// time.
        #[test]
        fn does_what_a_pair_of_vecs_does(
            per_list in 0..9_usize,
            ops in proptest::collection::vec((0..3_usize, 0..40_u64, 0..9_usize), 1..400),
        ) {
            let mut ghosts = Ghosts::new(per_list).unwrap();
            let mut model = [Vec::new(), Vec::new()];
            for (op, hash, bound) in ops {
                let on = model.iter().position(|list| list.contains(&hash));
                model.iter_mut().for_each(|list| list.retain(|&other| other != hash));
                if op == 2 {
                    prop_assert_eq!(ghosts.take(hash), on);
                } else {
                    ghosts.push(op, hash, bound);
                    let bound = bound.min(per_list);
                    for _ in 0..DROPS_PER_PUSH {
                        if !model[op].is_empty() && model[op].len() >= bound {
                            model[op].remove(0);
                        }
                    }
                    if bound > 0 {
                        model[op].push(hash);
                    }
                }
                prop_assert_eq!([ghosts.dump(0), ghosts.dump(1)], model.clone());
            }
        }
    }

    #[test]
    fn an_order_that_comes_late_takes_its_ghosts_from_the_others() {
        let mut ghosts = Ghosts::new(4).unwrap();
        (0..4).for_each(|hash| ghosts.push(0, hash, 4));
        (4..8).for_each(|hash| ghosts.push(1, hash, 4));
        (8..12).for_each(|hash| ghosts.push(9, hash, 4));
        assert_eq!([0, 1, 9].map(|list| ghosts.dump(list)), [vec![2, 3], vec![6, 7], vec![8, 9, 10, 11]]);
    }

    #[test]
    fn dense_and_strided_hashes_probe_short() {
        for step in [1, 64, 1 << 32, 0x9e37_79b9_7f4a_7c15] {
            let mut ghosts = Ghosts::new(4096).unwrap();
            (0..4096_u64).for_each(|n| ghosts.push(0, n.wrapping_mul(step), 4096));
            let far = |n: u64| {
                let node = n as u32 + 1;
                let slot = ghosts.table.iter().position(|&entry| entry == node).unwrap();
                ghosts.distance(ghosts.home(n.wrapping_mul(step)), slot)
            };
            let longest = (0..4096).map(far).max().unwrap();
            assert!(longest < 64, "step {step:#x}: a probe of {longest}");
        }
    }
}
