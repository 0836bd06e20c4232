//! Compares the whole cache with a model of plain vectors: random operations of several clients, in arenas so small
//! that chunks are evicted and spans move between sizes. After each operation the cache checks itself completely,
//! and what it has published is compared with what the model allows.

#![allow(clippy::unwrap_used, reason = "a test")]

#[path = "../cache_support/mod.rs"]
mod cache_support;
mod ends;
mod model;
mod ops;
mod waits;

use kvring_engine::cache::{Heard, Invalidated, Key, Leaving, Parting};
use kvring_engine::policy::PolicyKind;
use proptest::prelude::*;

use cache_support::{State, key};
use model::{Model, SLABS, WORLDS};
use ops::{Listen, OWNERS, Op, op};

impl Model {
    fn step(&mut self, op: &Op) {
        match *op {
            Op::Invalidate { which, how } => self.invalidate(which, how),
            Op::Find { owner, session, admission, namespace, chain, len, split, later } => {
                self.find((owner, session, admission), namespace, chain, len, split);
                if !later {
                    self.read_rings(Some(owner));
                }
            }
            Op::Listen(listen) => self.listen = listen,
            Op::Hear => self.hear(),
            Op::GoOnDropping => self.go_on_dropping(),
            Op::SpareAll => {
                self.cache.spare_all();
                assert!(!self.cache.is_waiting() && self.check_words().is_empty());
            }
            Op::GoOnWaiting { which } => self.go_on_waiting(which),
            Op::Release { owner, session, admission, keep } => {
                self.read_rings(Some(owner));
                self.in_pieces(|model| model.cache.release(owner, session, admission, keep));
                if let Some(chunks) = self.leases.get_mut(&(owner, session, admission)) {
                    chunks.truncate(keep as usize);
                }
                self.leases.retain(|_, chunks| !chunks.is_empty());
            }
            Op::EndSession { owner, session } => {
                self.read_rings(Some(owner));
                self.leases.retain(|(o, s, _), _| (*o, *s) != (owner, session));
                self.in_pieces(|model| model.cache.end_session(owner, session));
            }
            Op::Reserve { owner, namespace, rank, round, chain, from, len, twice } => {
                let mut keys: Vec<Key> = (from..from + len).map(|place| key(chain, place)).collect();
                if twice {
                    keys.push(keys[0]);
                }
                let parent = from.checked_sub(1).map(|place| key(chain, place));
                let rank = rank % (WORLDS[namespace as usize].len() as u32 + 1);
                self.reserve(owner, namespace, rank, round, parent, &keys);
            }
            Op::Store { namespace, round, chain, len } => {
                let keys: Vec<Key> = (0..len).map(|place| key(chain, place)).collect();
                for rank in 0..WORLDS[namespace as usize].len() {
                    self.reserve((rank % 3) as u8, namespace, rank as u32, round, None, &keys);
                }
                for which in (0..self.writes.len()).rev() {
                    self.commit(which);
                }
            }
            Op::Commit { which } => self.commit(which),
            Op::Recommit { which } => self.forge(which, 3),
            Op::Abort { which } => self.abort(which),
            Op::Forge { which, how } => self.forge(which, how),
            Op::Gone { owner, quarantine } => self.gone(owner, quarantine),
            Op::QuarantineOver { owner } => self.quarantine_over(owner),
            Op::Clear { namespace } => self.clear(namespace, 0, false),
            Op::OutOfSpace(out) => self.cache.table_mut().out_of_space = out,
            Op::Hostile { slot, generation } => {
                for owner in [0, 63, 64, 255] {
                    let _ = self.cache.commit(owner, slot, generation, [0; 2], 0);
                    let _ = self.cache.abort(owner, slot, generation, [0; 2]);
                    assert!(self.cache.release(owner, u64::MAX, slot, slot));
                    assert!(self.cache.end_session(owner, generation | 1 << 63));
                    let outcome = self.cache.invalidate(slot, generation, [0; 2], |_, _| true);
                    assert!(matches!(outcome, Invalidated::Gone | Invalidated::Refused));
                }
                for how in [Leaving::Left { nonce: generation }, Leaving::Detached { nonce: generation }] {
                    assert!(self.cache.part(&mut Parting::new(255, how)));
                }
            }
            Op::Allow(records) => self.allowed = records,
            Op::GoOnEmptying => {
                let ears = self.ears();
                self.in_pieces(|model| {
                    model.cache.go_on_emptying(&mut || ears);
                    true
                });
                self.marked_went();
            }
            Op::GoOnPlacing => self.go_on_placing(),
            Op::Restart { dead, named } => self.restart(dead, named),
            Op::AddSlab(slab) => {
                let is_new = slab < SLABS && !self.added.contains(&slab);
                assert_eq!(self.cache.add_slab(slab).is_ok(), is_new);
                if is_new {
                    self.added.push(slab);
                }
            }
        }
        let rest = self.take_freed();
        assert!(rest.is_empty(), "{op:?} freed slots {rest:?} that nothing allows");
    }

    fn check(&mut self, op: &Op) {
        self.cache.check_all().unwrap();
        let marked = self.check_words();
        assert_eq!(self.cache.is_waiting(), !marked.is_empty());
        // Whoever may make room marks chunks, if not everything was heard. What is marked stays so until it is spared or goes.
        let may_mark = matches!(
            op,
            Op::Reserve { .. }
                | Op::Store { .. }
                | Op::Clear { .. }
                | Op::GoOnEmptying
                | Op::GoOnWaiting { .. }
        );
        assert!(may_mark && self.ears() == Heard::NotYet || marked.is_subset(&self.marked), "{op:?}");
        self.marked = marked;
        self.cache.check_step(37).unwrap();
        self.cache.table().assert_disjoint();
        let stats = self.cache.stats();
        let visible = self.chunks.iter().filter(|chunk| chunk.visible).count() as u64;
        assert_eq!(
            (stats.chunks_visible, stats.chunks_forming),
            (visible, self.chunks.len() as u64 - visible)
        );
        assert_eq!(stats.chunks_hidden as usize, self.hidden.len());
        for shard in self.hidden.iter().flat_map(|chunk| chunk.shards.values()) {
            let entry = self.cache.table().entries[shard.slot as usize];
            let is_kept = entry.generation == shard.generation && matches!(entry.state, State::Hidden(_));
            assert!(is_kept, "slot {} was leased and is {entry:?}", shard.slot);
        }
        assert_eq!((stats.slots_writing, stats.leases), (self.writes.len() as u64, self.leases.len() as u64));
        let orphans = self.writes.iter().filter(|write| self.chunk_of(**write).is_none()).count() as u64;
        assert_eq!(stats.orphans, orphans);
        for chunk in self.chunks.iter().filter(|chunk| chunk.visible) {
            assert_eq!(chunk.shards.len(), WORLDS[chunk.namespace as usize].len());
            assert!(!chunk.is_written());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, max_shrink_iters: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_cache_does_what_its_model_allows(
        ops in prop::collection::vec(op(), 1..250),
        policy in prop::sample::select(&PolicyKind::ALL[..]),
    ) {
        let mut model = Model::new(policy);
        for op in &ops {
            model.step(op);
            model.check(op);
        }
        // Everything that was said is heard, and then everything that waits is answered.
        model.listen = Listen::Truly;
        for _ in 0..10_000 {
            model.hear();
            model.check(&Op::Hear);
            model.go_on_dropping();
            model.check(&Op::GoOnDropping);
            if model.waiting.is_empty() && !model.cache.is_waiting() {
                break;
            }
            let op = Op::GoOnWaiting { which: 0 };
            model.step(&op);
            model.check(&op);
        }
        prop_assert!(model.waiting.is_empty() && !model.cache.is_waiting(), "somebody waits for ever");
        // Whatever happened, everything can be given back.
        for owner in 0..OWNERS {
            model.gone(owner, false);
        }
        for owner in 0..OWNERS {
            model.quarantine_over(owner);
        }
        model.clear(None, 0, false);
        model.in_pieces(|model| {
            model.cache.go_on_emptying(&mut || Heard::All);
            !model.cache.is_emptying()
        });
        model.check(&Op::GoOnEmptying);
        let stats = model.cache.stats();
        prop_assert_eq!(stats.slabs_free, stats.slabs_usable);
        prop_assert_eq!((stats.bytes_used, stats.pins), (0, 0));
    }
}
