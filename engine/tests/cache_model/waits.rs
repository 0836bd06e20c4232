//! What schedulers say and when they are heard; and the requests that have to wait for that.
#![allow(clippy::unwrap_used, reason = "a test")]

use kvring_engine::cache::{Going, Heard, Held, Hold, Key, Round, SlotId, SlotTable};
use kvring_shm_abi::chunk::ChunkWord;
use kvring_shm_abi::lookup::Marked;

use crate::cache_support::{LeaseName, State, key, search};
use crate::model::{Chunk, Model, WORLDS};
use crate::ops::Listen;

/// A message in a scheduler's ring: it holds these chunks.
#[derive(Clone, Debug)]
pub(crate) struct Said {
    pub(crate) name: LeaseName,
    namespace: u32,
    first: u32,
    words: Vec<ChunkWord>,
    pub(crate) ids: Vec<u64>,
}

/// A reservation that goes on.
pub(crate) struct Asked {
    pub(crate) owner: u8,
    pub(crate) nonce: u64,
    pub(crate) namespace: u32,
    pub(crate) rank: u32,
    pub(crate) round: Round,
    pub(crate) parent: Option<Key>,
    pub(crate) keys: Vec<Key>,
    pub(crate) going: Going,
    pub(crate) done: usize,
    pub(crate) was_waiting: bool,
}

/// A request that had to wait.
pub(crate) enum Waiting {
    Reserve(Asked),
    Clear { namespace: Option<u32>, from: u32 },
}

impl Model {
    /// What the ears say when they are asked now.
    pub(crate) fn ears(&self) -> Heard {
        match self.listen {
            Listen::Never => Heard::Never,
            Listen::Truly if self.said.is_empty() => Heard::All,
            Listen::Truly | Listen::Slowly => Heard::NotYet,
        }
    }

    /// A scheduler looks up, and publishes what it holds.
    pub(crate) fn find(&mut self, name: LeaseName, namespace: u32, chain: u64, len: u64, split: u64) {
        let keys: Vec<Key> = (0..len).map(|place| key(chain, place)).collect();
        let words = search(&self.cache, namespace, &keys, Marked::Missing);
        let is_there =
            |key: &Key| self.visible(namespace, *key).is_some_and(|chunk| !self.marked.contains(&chunk.id));
        let expected: Vec<&Chunk> = keys
            .iter()
            .take_while(|key| is_there(key))
            .filter_map(|key| self.visible(namespace, *key))
            .collect();
        assert_eq!(words.len(), expected.len(), "a lookup finds what is visible and not marked");
        for (chunk, word) in expected.iter().zip(&words) {
            let identity = self.cache.table().chunks().find(*word).unwrap().identity;
            assert_eq!((identity.key, identity.namespace), (chunk.key, namespace));
            let shards = self.cache.table().shards(*word);
            let found = shards.iter().map(|shard| (shard.slot, shard.generation));
            let own = chunk.shards.values().map(|shard| (shard.slot, shard.generation));
            assert!(found.eq(own), "{shards:?}, {chunk:?}");
        }
        let ids: Vec<u64> = expected.iter().map(|chunk| chunk.id).collect();
        // A miss is not worth a message.
        if words.is_empty() {
            return;
        }
        let at = if split == 0 { words.len() } else { words.len().min(split as usize) };
        for (first, until) in [(0, at), (at, words.len())] {
            if first < until || first == 0 {
                let (words, ids) = (words[first..until].to_vec(), ids[first..until].to_vec());
                self.said.push(Said { name, namespace, first: first as u32, words, ids });
            }
        }
    }

    /// The engine reads what this client's ring, or each ring, has.
    pub(crate) fn read_rings(&mut self, owner: Option<u8>) {
        while let Some(at) = self.said.iter().position(|said| owner.is_none_or(|own| said.name.0 == own)) {
            let said = self.said[at].clone();
            self.hold(&said);
            self.said.remove(at);
        }
    }

    fn hold(&mut self, said: &Said) {
        let Said { name, namespace, first, words, ids } = said;
        let (owner, session, admission) = *name;
        let before = self.leases.get(name).map_or(0, Vec::len);
        // It is cut at a chunk that turned out to be damaged. Nothing else is lost on the way from the lookup to here.
        let is_there = |id: &&u64| self.chunks.iter().any(|chunk| chunk.id == **id);
        let expected: Vec<u64> = ids.iter().take_while(is_there).copied().collect();
        if before < *first as usize {
            // The message in front of it was cut.
            let mut hold = Hold::new(owner, session, admission, *namespace, *first, words.len() as u32);
            assert!(self.cache.hold_piece(&mut hold, words.iter().copied()).is_err());
            return;
        }
        self.cache.table_mut().touches.clear();
        let mut hold = Hold::new(owner, session, admission, *namespace, *first, words.len() as u32);
        let piece = if self.allowed == 0 { 64 } else { 1 + self.allowed as usize % 3 };
        self.in_pieces(|model| {
            let rest = &words[hold.held as usize..];
            let rest = &rest[..rest.len().min(piece)];
            let held = model.cache.hold_piece(&mut hold, rest.iter().copied()).unwrap();
            model.cache.check_all().unwrap();
            held == Held::Cut || held == Held::All && hold.held as usize == words.len()
        });
        assert_eq!(hold.held as usize, expected.len(), "what a lookup has found is held");
        let is_again = before > *first as usize;
        let touches = if is_again { 0 } else { expected.len() * WORLDS[*namespace as usize].len() };
        assert_eq!(self.cache.table().touches.len(), touches, "a repetition is not an access");
        let lease = self.leases.entry(*name).or_default();
        lease.truncate(*first as usize);
        lease.extend(expected);
        self.leases.retain(|_, chunks| !chunks.is_empty());
    }

    /// Everything that was said is heard: the cache may decide.
    pub(crate) fn hear(&mut self) {
        self.read_rings(None);
        self.cache.heard(self.cache.awaits().unwrap_or_default());
    }

    /// Drops the next of what is marked, after it was heard.
    pub(crate) fn go_on_dropping(&mut self) {
        if !self.cache.is_dropping() {
            return;
        }
        self.in_pieces(|model| {
            model.cache.go_on_dropping();
            true
        });
        self.marked_went();
    }

    /// Removes the chunks that were dropped although no message has caused it just now.
    pub(crate) fn marked_went(&mut self) {
        let freed = self.take_freed();
        self.evicted(&freed, u32::MAX, &[]);
    }

    pub(crate) fn clear(&mut self, namespace: Option<u32>, from: u32, was_waiting: bool) {
        let mut next = Some(from);
        let ears = self.ears();
        self.in_pieces(|model| {
            next = model.cache.clear_step(namespace, next.unwrap(), &mut || ears);
            next.is_none() || model.cache.is_waiting() || ears == Heard::Never
        });
        let freed = self.take_freed();
        let mut at = 0;
        while at < self.chunks.len() {
            let chunk = &self.chunks[at];
            let is_meant = namespace.is_none_or(|namespace| namespace == chunk.namespace);
            if !self.is_dropped(chunk, &freed) {
                let stays = !is_meant || chunk.visible && self.is_held(chunk);
                assert!(stays || was_waiting || next.is_some(), "not cleared: {chunk:?}");
                at += 1;
                continue;
            }
            assert!(is_meant && !(chunk.visible && self.is_held(chunk)), "cleared: {chunk:?}");
            assert!(!chunk.visible || ears == Heard::All, "cleared before all were heard: {chunk:?}");
            self.dropped(at, &freed);
        }
        if let Some(from) = next {
            self.waiting.push(Waiting::Clear { namespace, from });
        }
    }

    /// Whether the chunk was dropped: its committed slots were freed, and those that are being written are orphans.
    fn is_dropped(&self, chunk: &Chunk, freed: &[SlotId]) -> bool {
        chunk.shards.values().any(|shard| {
            let entry = self.cache.table().entries[shard.slot as usize];
            if shard.committed {
                freed.contains(&shard.slot)
            } else {
                matches!(entry.state, State::Orphaned(_)) && entry.generation == shard.generation
            }
        })
    }

    /// A request that had to wait goes on; unless its client is gone.
    pub(crate) fn go_on_waiting(&mut self, which: usize) {
        if self.waiting.is_empty() {
            return;
        }
        let at = which % self.waiting.len();
        match self.waiting.remove(at) {
            Waiting::Clear { namespace, from } => self.clear(namespace, from, true),
            Waiting::Reserve(asked) if self.nonces[usize::from(asked.owner)] != asked.nonce => {}
            Waiting::Reserve(asked) => self.go_on_reserving(asked),
        }
    }

    /// Each visible chunk is found by the same word all the time, by readers of a living engine if it is not marked. Returns
    /// those that are.
    pub(crate) fn check_words(&mut self) -> std::collections::BTreeSet<u64> {
        let (mut marked, mut words) = (std::collections::BTreeSet::new(), Vec::new());
        for (at, chunk) in self.chunks.iter().enumerate().filter(|(_, chunk)| chunk.visible) {
            let find = |marked| search(&self.cache, chunk.namespace, &[chunk.key], marked);
            let (alive, dead) = (find(Marked::Missing), find(Marked::There));
            assert_eq!(dead.len(), 1, "{chunk:?}");
            assert!(chunk.word.is_none_or(|word| word == dead[0]), "{dead:?}: {chunk:?}");
            assert!(alive.is_empty() || alive == dead);
            words.push((at, dead[0]));
            if alive.is_empty() {
                assert!(!self.is_leased(chunk), "marked and leased: {chunk:?}");
                marked.insert(chunk.id);
            }
        }
        for (at, word) in words {
            self.chunks[at].word = Some(word);
        }
        marked
    }
}
