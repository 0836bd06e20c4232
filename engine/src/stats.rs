//! The statistics block: every counter and gauge, with its name and its help, in one table.
//!
//! The service thread writes them to the engine's segment, one word for each, and `kvring status` reads them from
//! there, even while the engine hangs. The block's last word holds a hash of the table, so that a `status` of
//! another build says so instead of showing numbers under wrong names.

use kvring_shm_abi::engine_segment::{STATS_WORDS, StatWord};
use kvring_shm_abi::lobby::LookupTotals;
use serde::ser::{Serialize, SerializeMap, Serializer};

/// How a value behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// It only grows during one life of the engine.
    Counter,
    /// It has the present value.
    Gauge,
}

macro_rules! stats {
    ($($name:ident $kind:ident $text:literal $help:literal;)+) => {
        /// A counter or gauge. Its number is its place in the block.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Stat {
            $(#[doc = $help] $name,)+
        }

        impl Stat {
            /// All of them, in the order of the block.
            pub const ALL: &'static [Stat] = &[$(Stat::$name),+];

            /// Its name, as in `status --json`.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Stat::$name => $text,)+ }
            }

            /// Its meaning, for people.
            #[must_use]
            pub const fn help(self) -> &'static str {
                match self { $(Stat::$name => $help,)+ }
            }

            /// Whether it is a counter or a gauge.
            #[must_use]
            pub const fn kind(self) -> Kind {
                match self { $(Stat::$name => Kind::$kind,)+ }
            }
        }
    };
}

stats! {
    Lookups Counter "lookups" "lookups answered";
    LookupsCut Counter "lookups_cut" "lookups cut because the client held as much as it may";
    LookupsNotServing Counter "lookups_not_serving" "lookups answered while no engine was serving";
    ChunksAsked Counter "chunks_asked" "chunks that lookups asked for";
    ChunksHit Counter "chunks_hit" "chunks that lookups found";
    TokensAsked Counter "tokens_asked" "tokens that lookups asked for";
    TokensHit Counter "tokens_hit" "tokens that lookups found";
    Holds Counter "holds" "messages of schedulers about what they hold";
    HoldsCut Counter "holds_cut" "those of which not all was there";
    ChunksHeld Counter "chunks_held" "chunks pinned for such messages";
    ShardsReserved Counter "shards_reserved" "shards for which a slot was given";
    ShardsSkipped Counter "shards_skipped" "shards not stored again because their chunk was visible";
    ShardsDropped Counter "shards_dropped" "shards for which there was no slot";
    ShardsCommitted Counter "shards_committed" "shards written and committed";
    ShardsAborted Counter "shards_aborted" "shards given up by their writer";
    ShardsGone Counter "shards_gone" "commits and aborts of slots that were no longer the writer's";
    ChunksInvalidated Counter "chunks_invalidated" "chunks dropped because a worker found a shard of theirs damaged";
    Evictions Counter "evictions" "chunks evicted to make room";
    SpansTaken Counter "spans_taken" "spans of slabs taken from another shard size";
    Clears Counter "clears" "times the cache was cleared on request";
    SlotsFree Gauge "slots_free" "slots of assigned slabs that are free";
    SlotsWriting Gauge "slots_writing" "slots that somebody may be writing";
    SlotsOrphaned Gauge "slots_orphaned" "slots being written for no chunk, until their writer says or dies";
    SlotsCommitted Gauge "slots_committed" "slots that hold a shard";
    ChunksVisible Gauge "chunks_visible" "chunks that lookups find";
    ChunksForming Gauge "chunks_forming" "chunks of which not all shards are committed";
    ChunksHidden Gauge "chunks_hidden" "damaged chunks that lookups find no longer and leases still hold";
    Leases Gauge "leases" "leases held";
    Pins Gauge "pins" "chunks in all leases, counted once for each";
    Namespaces Gauge "namespaces" "registered namespaces";
    Clients Gauge "clients" "attached clients";
    ArenaBytes Gauge "arena_bytes" "bytes of the arena";
    ArenaBytesAllocated Gauge "arena_bytes_allocated" "bytes of the arena that are backed by memory";
    ArenaBytesUsed Gauge "arena_bytes_used" "bytes of slots that are not free";
    SlabsFree Gauge "slabs_free" "allocated slabs that have no shard size yet";
    AllocationStalled Gauge "allocation_stalled" "1 while the rest of the arena cannot be allocated";
    Attaches Counter "attaches" "attachments accepted";
    Refusals Counter "refusals" "attachments refused";
    Detaches Counter "detaches" "clients that left";
    Breaches Counter "breaches" "clients detached because they broke the protocol";
    Deaths Counter "deaths" "clients that died";
    Registrations Counter "registrations" "ranks registered";
    Requests Counter "requests" "requests taken from rings";
    StaleRequests Counter "stale_requests" "requests of an earlier attachment, ignored";
    WarmStart Gauge "warm_start" "1 where this engine took over what an earlier one left";
    ChunksRecovered Gauge "chunks_recovered" "chunks that lookups found again after this engine's start";
    ChunksKept Gauge "chunks_kept" "incomplete chunks that go on forming after this engine's start";
    ChunksLost Gauge "chunks_lost" "chunks dropped at the start: a writer of theirs had died";
    SlotsQuarantined Gauge "slots_quarantined" "slots that living clients were writing at the start";
    Reattachments Counter "reattachments" "clients that came back after this engine's start, in the entry they had";
    ClientsAwaited Gauge "clients_awaited" "clients that have not come back yet; until then nothing is evicted, for a while";
    ClientsLingering Gauge "clients_lingering" "dead clients whose processes are waited for: a device may still write for them";
    SlotsDeclared Counter "slots_declared" "slots that clients came back to";
    SlotsUndeclared Counter "slots_undeclared" "slots freed because the client that came back did not name them";
    LongestTurnNs Gauge "longest_turn_ns" "the longest that the service loop has worked between two looks at the clock, in nanoseconds";
    LongestTurnCpuNs Gauge "longest_turn_cpu_ns" "the most CPU time of that kind, of turns that follow one of 0.1 ms or more: time without a core does not count";
    Wakes Counter "wakes" "sleeping clients woken";
    Parks Counter "parks" "times the service loop slept";
    CheckFailures Counter "check_failures" "self-checks that failed";
}

/// The last word of the block holds [`TABLE_HASH`].
const HASH_AT: usize = STATS_WORDS - 1;
const _: () = assert!(Stat::ALL.len() <= HASH_AT);

/// FNV-1a over all names, in order.
const TABLE_HASH: u64 = {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut stat = 0;
    while stat < Stat::ALL.len() {
        let name = Stat::ALL[stat].name().as_bytes();
        let mut at = 0;
        while at <= name.len() {
            // Each name is followed by a separator that no name contains.
            let byte = if at < name.len() { name[at] } else { 0 };
            hash = (hash ^ byte as u64).wrapping_mul(0x0000_0100_0000_01b3);
            at += 1;
        }
        stat += 1;
    }
    hash
};

impl Stat {
    /// Its word in the block ([`EngineSegment::stats`](kvring_shm_abi::engine_segment::EngineSegment::stats)).
    ///
    /// If the slice is shorter than the block.
    #[inline]
    #[must_use]
    pub fn of(self, block: &[StatWord]) -> &StatWord {
        &block[self as usize]
    }
}

/// Called by the engine before it serves: all values begin at 0, and the block says which table it follows.
pub fn initialise(block: &[StatWord]) {
    block.iter().for_each(|word| word.set(0));
    if let Some(word) = block.get(HASH_AT) {
        word.set(TABLE_HASH);
    }
}

/// The block was written by an engine with another table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "expected the statistics table {expected:#018x}, found {found:#018x}: the engine is another build; \
     use the kvring that started it"
)]
pub struct OtherTable {
    /// The hash of our table.
    pub expected: u64,
    /// The hash of the engine's table.
    pub found: u64,
}

/// All values at one moment. Each word is read by itself, so two of them may be of neighbouring turns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot([u64; Stat::ALL.len()]);

/// The statistics that schedulers count.
pub(crate) fn of_lookups(totals: &LookupTotals) -> [(Stat, u64); 7] {
    [
        (Stat::Lookups, totals.lookups),
        (Stat::LookupsCut, totals.cut),
        (Stat::LookupsNotServing, totals.not_serving),
        (Stat::ChunksAsked, totals.chunks_asked),
        (Stat::ChunksHit, totals.chunks_hit),
        (Stat::TokensAsked, totals.tokens_asked),
        (Stat::TokensHit, totals.tokens_hit),
    ]
}

impl Snapshot {
    /// Reads the block.
    ///
    /// # Errors
    /// The engine has another table.
    pub fn read(block: &[StatWord]) -> Result<Snapshot, OtherTable> {
        let found = block.get(HASH_AT).map_or(0, StatWord::get);
        if found != TABLE_HASH {
            return Err(OtherTable { expected: TABLE_HASH, found });
        }
        let mut values = [0; Stat::ALL.len()];
        for (to, from) in values.iter_mut().zip(block) {
            *to = from.get();
        }
        Ok(Snapshot(values))
    }

    /// The same with what lookups came to by now: schedulers count them themselves, also while no engine runs.
    #[must_use]
    pub fn with_lookups(mut self, totals: &LookupTotals) -> Snapshot {
        for (stat, value) in of_lookups(totals) {
            self.0[stat as usize] = value;
        }
        self
    }

    /// One value.
    #[must_use]
    pub fn get(&self, stat: Stat) -> u64 {
        self.0[stat as usize]
    }

    /// All values, in the order of the table.
    pub fn iter(&self) -> impl Iterator<Item = (Stat, u64)> + '_ {
        Stat::ALL.iter().copied().zip(self.0.iter().copied())
    }

    /// What happened since `earlier`: counters as differences, gauges with their present values.
    #[must_use]
    pub fn since(&self, earlier: &Snapshot) -> Snapshot {
        let mut values = self.0;
        for (stat, before) in earlier.iter().filter(|(stat, _)| stat.kind() == Kind::Counter) {
            values[stat as usize] = values[stat as usize].wrapping_sub(before);
        }
        Snapshot(values)
    }
}

/// A map from name to value.
impl Serialize for Snapshot {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (stat, value) in self.iter() {
            map.serialize_entry(stat.name(), &value)?;
        }
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvring_shm_abi::mapping::{Mapping, View};
    use std::collections::BTreeSet;
    use std::sync::Arc;

    fn block() -> View<StatWord> {
        View::new(&Arc::new(Mapping::private(4096)), 0, STATS_WORDS).unwrap()
    }

    #[test]
    fn names_are_unique_and_well_formed() {
        let names: BTreeSet<&str> = Stat::ALL.iter().map(|stat| stat.name()).collect();
        assert_eq!(names.len(), Stat::ALL.len());
        for (index, stat) in Stat::ALL.iter().enumerate() {
            assert_eq!(*stat as usize, index);
            assert!(stat.name().bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{stat:?}");
            assert!(!stat.help().is_empty());
        }
    }

    #[test]
    fn what_is_written_is_read_under_its_name() {
        let block = block();
        assert_eq!(Snapshot::read(&block), Err(OtherTable { expected: TABLE_HASH, found: 0 }));
        initialise(&block);
        let before = Snapshot::read(&block).unwrap();
        for (value, stat) in (1..).zip(Stat::ALL) {
            stat.of(&block).add(value);
        }
        let now = Snapshot::read(&block).unwrap();
        assert_eq!(now.get(Stat::Lookups), 1);
        let json = serde_json::to_value(&now).unwrap();
        for (value, stat) in (1u64..).zip(Stat::ALL) {
            assert_eq!(json[stat.name()], value, "{stat:?}");
        }
        Stat::Leases.of(&block).set(1);
        let later = Snapshot::read(&block).unwrap().since(&now);
        assert_eq!((later.get(Stat::Lookups), later.get(Stat::Leases)), (0, 1));
        assert_eq!(now.since(&before), now);
    }
}
