//! `kvring.<name>.lobby`: where clients claim their entries and ring the engine's doorbell. Every client can write here, so
//! the engine believes nothing of it: it copies an entry out once and checks it.

use crate::abi;
use crate::life::LifeWord;
use crate::mapping::{Mapping, One, OutOfBounds, Pad, Shared, View};
use crate::means::Means;
use crate::park;
use crate::probe;
use crate::process::ProcessIdentity;
use crate::superblock::{SUPERBLOCK_BYTES, Superblock};
use crate::sync::{AtomicU32, AtomicU64, Ordering, fence};
use crate::text::{load_text, store_text};
use std::sync::Arc;

abi! {
    /// The most clients that an engine can have. It sleeps on their life words and its doorbell at once, and the kernel
    /// takes at most 128 words for one sleep.
    pub const CLIENTS_MAX: usize = 64;

    /// Bytes of a client's name; longer names are cut.
    pub const CLIENT_NAME_BYTES: usize = 48;

    const DOORBELL_AT: usize = SUPERBLOCK_BYTES;

    /// Offset of the clients' life words.
    pub const LIFE_WORDS_AT: usize = 4096;

    /// Offset of the entries.
    pub const ENTRIES_AT: usize = LIFE_WORDS_AT + CLIENTS_MAX * size_of::<LifeWord>();

    /// Offset of the schedulers' counts of lookups.
    pub const LOOKUPS_AT: usize = ENTRIES_AT + CLIENTS_MAX * size_of::<Entry>();

    /// Bytes of the segment.
    pub const LOBBY_BYTES: usize = (LOOKUPS_AT + LOOKUP_LINES * size_of::<LookupCounts>()).next_multiple_of(4096);

    /// One line of counts for each entry, and one for all clients that are gone.
    const LOOKUP_LINES: usize = CLIENTS_MAX + 1;

    /// What a client is.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub enum Role: u32 {
        /// Looks up, holds leases.
        Scheduler = 1,
        /// Stores and loads.
        Worker = 2,
    }

    /// One client's entry, valid while its life word is claimed and `state` says ready.
    ///
    /// A client publishes it again, in the same place, for each engine that it attaches to: `state` is the sequence number of
    /// a seqlock. 0 means empty, an odd number ready, any other even number that the client is writing it.
    #[repr(C, align(128))]
    pub struct Entry {
        state: AtomicU32,
        role: AtomicU32,
        nonce: AtomicU64,
        incarnation: AtomicU32,
        pid: AtomicU32,
        payload_words: AtomicU32,
        /// For people: [`Means::to_bits`] of the client's process.
        stand_ins: AtomicU32,
        name: [AtomicU64; CLIENT_NAME_BYTES / 8],
        dma: Dma,
        _pad1: Pad<16>,
    }

    /// Offset of an entry's word, process and namespaces for devices (`Dma`).
    pub const DMA_AT: usize = core::mem::offset_of!(Entry, dma);

    /// A client's declaration that devices write into the arena for it. From then on its slots may be written into until its
    /// *process* is gone for good, whatever its life word says. The seqlock does not cover it: a client declares it once for
    /// each claim, publishing the entry does not change it, and the engine can read it while the entry is being written.
    #[repr(C)]
    struct Dma {
        /// 0, or [`DMA`] with [`DMA_LOCKED`] or without.
        word: AtomicU32,
        pid: AtomicU32,
        pid_namespace: AtomicU64,
        time_namespace: AtomicU64,
        started: AtomicU64,
    }

    const DMA: u32 = 1;

    /// The client's process also holds the lock on [`dma_lock_at`].
    const DMA_LOCKED: u32 = 2;

    /// What a scheduler counts of its lookups, which no engine sees: for people.
    #[repr(C, align(64))]
    pub struct LookupCounts {
        counts: [AtomicU64; LOOKUP_COUNTS],
        _pad: Pad<8>,
    }

    /// How many counts a scheduler has.
    const LOOKUP_COUNTS: usize = 7;

    const ENTRY_EMPTY: u32 = 0;

    /// How clients call the engine.
    #[repr(C, align(128))]
    struct Doorbell {
        /// The word that the engine sleeps on, see [`crate::park`].
        parked: AtomicU32,
        /// Each client adds 1 after it has published its entry. Before it sleeps the engine looks at this word, not at every
        /// entry.
        claims: AtomicU32,
        _pad: Pad<120>,
    }
}

const _: () = assert!(LOBBY_BYTES.is_multiple_of(4096));

impl Role {
    /// For people.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Scheduler => "scheduler",
            Role::Worker => "worker",
        }
    }
}

// SAFETY: atomics and padding.
unsafe impl Shared for Entry {}
const _: () = assert!(size_of::<Entry>() == 128);

const _: () = assert!(DMA_AT == 80 && size_of::<Dma>() == 32);

/// The process whose end the engine waits for before it frees the slots that an entry was writing, as the entry itself says.
/// The engine believes it. A client that lies here, or names another process than its own, can make its own slots wait, and its
/// entry with them, for as long as that process lives or that lock is held: at most its share of the arena and one entry, and
/// `status` shows it. Or it can keep them from waiting; then its devices may write into slots that others have got, as the client
/// itself could at any time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaOwner {
    /// The client's process.
    pub process: ProcessIdentity,
    /// Does that process hold the lock on [`dma_lock_at`], until it ends?
    pub locked: bool,
}

/// The byte of the lobby's file on which a client's process holds a lock while devices may write for it.
#[must_use]
pub fn dma_lock_at(entry: usize) -> u64 {
    (ENTRIES_AT + entry * size_of::<Entry>() + DMA_AT) as u64
}

fn is_ready(state: u32) -> bool {
    state & 1 == 1
}

/// What an entry says, copied out once and not yet checked. The engine checks it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntryContent {
    /// The role's number.
    pub role: u32,
    /// Random: names the attachment and its channel.
    pub nonce: u64,
    /// The incarnation that the client wants to attach to.
    pub incarnation: u32,
    /// The client's process id, in its PID namespace: for people.
    pub pid: u32,
    /// Words of its channel's payload area.
    pub payload_words: u32,
    /// The client's name: for people.
    pub name: String,
}

impl Entry {
    /// Client: publishes the entry as ready. It has claimed the life word of the same index and prepared its channel before.
    pub fn publish(&self, content: &EntryContent) {
        // Even and not 0, whatever was there.
        let writing = (self.state.load(Ordering::Relaxed) | 1).wrapping_add(1).max(2);
        self.state.store(writing, Ordering::Relaxed);
        // SYNC POINT: Release fence; pairs with the Acquire fence in `read`: a reader that saw any of the new fields sees
        // this state, or a later one.
        fence(Ordering::Release);
        self.role.store(content.role, Ordering::Relaxed);
        self.nonce.store(content.nonce, Ordering::Relaxed);
        self.incarnation.store(content.incarnation, Ordering::Relaxed);
        self.pid.store(content.pid, Ordering::Relaxed);
        self.payload_words.store(content.payload_words, Ordering::Relaxed);
        self.stand_ins.store(probe::means().to_bits(), Ordering::Relaxed);
        store_text(&self.name, content.name.as_bytes());
        // SYNC POINT: Release; pairs with the Acquire in `read`.
        self.state.store(writing.wrapping_add(1), Ordering::Release);
    }

    /// What a ready entry says; `None` while it is not ready, or if it has changed while it was read.
    #[must_use]
    pub fn read(&self) -> Option<EntryContent> {
        // SYNC POINT: Acquire; pairs with the Release in `publish`.
        let state = self.state.load(Ordering::Acquire);
        if !is_ready(state) {
            return None;
        }
        let content = EntryContent {
            role: self.role.load(Ordering::Relaxed),
            nonce: self.nonce.load(Ordering::Relaxed),
            incarnation: self.incarnation.load(Ordering::Relaxed),
            pid: self.pid.load(Ordering::Relaxed),
            payload_words: self.payload_words.load(Ordering::Relaxed),
            name: load_text(&self.name),
        };
        // SYNC POINT: Acquire fence; pairs with the Release fence in `publish`.
        fence(Ordering::Acquire);
        (self.state.load(Ordering::Relaxed) == state).then_some(content)
    }

    /// The nonce of a ready entry: two loads and no allocation, for a loop that looks often.
    #[must_use]
    pub fn read_nonce(&self) -> Option<u64> {
        is_ready(self.state.load(Ordering::Acquire)).then(|| self.nonce.load(Ordering::Relaxed))
    }

    /// How the process of a ready entry waits, and how others learn of its death, as the entry itself says: for people.
    #[must_use]
    pub fn means(&self) -> Means {
        Means::from_bits(self.stand_ins.load(Ordering::Relaxed))
    }

    /// Called by a client after it has claimed its life word and before its first reservation. Declares that devices may write
    /// into the slots that it is granted. This Release store precedes the reservation in the ring, so an engine that has
    /// granted a slot has seen it, also later, when it handles the client's death.
    pub fn register_dma(&self, owner: &DmaOwner) {
        let ProcessIdentity { pid, pid_namespace, time_namespace, started } = owner.process;
        self.dma.pid.store(pid, Ordering::Relaxed);
        self.dma.pid_namespace.store(pid_namespace, Ordering::Relaxed);
        self.dma.time_namespace.store(time_namespace, Ordering::Relaxed);
        self.dma.started.store(started, Ordering::Relaxed);
        // SYNC POINT: Release; pairs with the Acquire in `dma`.
        self.dma.word.store(if owner.locked { DMA | DMA_LOCKED } else { DMA }, Ordering::Release);
    }

    /// Called by a client when all its copies have ended and none will begin, before it gives up its life word. Declares that
    /// nothing writes for it any more. The mark on its life word (Release) and `life` (Acquire) let the engine see this store.
    pub fn withdraw_dma(&self) {
        self.dma.word.store(0, Ordering::Release);
    }

    /// Do devices write for this entry's client, and which process is it? Also for an entry that is not ready.
    #[must_use]
    pub fn dma(&self) -> Option<DmaOwner> {
        // SYNC POINT: Acquire; pairs with the Release in `register_dma`.
        let word = self.dma.word.load(Ordering::Acquire);
        (word != 0).then(|| DmaOwner {
            process: ProcessIdentity {
                pid: self.dma.pid.load(Ordering::Relaxed),
                pid_namespace: self.dma.pid_namespace.load(Ordering::Relaxed),
                time_namespace: self.dma.time_namespace.load(Ordering::Relaxed),
                started: self.dma.started.load(Ordering::Relaxed),
            },
            locked: word & DMA_LOCKED != 0,
        })
    }

    /// Engine: empties the entry. It resets the life word after that.
    pub fn clear(&self) {
        self.dma.word.store(0, Ordering::Relaxed);
        self.state.store(ENTRY_EMPTY, Ordering::Release);
    }
}

// SAFETY: atomics and padding.
unsafe impl Shared for Doorbell {}
const _: () = assert!(size_of::<Doorbell>() == 128);

// SAFETY: atomics and padding.
unsafe impl Shared for LookupCounts {}
const _: () = assert!(size_of::<LookupCounts>() == 64);

/// What lookups came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LookupTotals {
    /// Lookups that could be answered, also with nothing.
    pub lookups: u64,
    /// Chunks that were asked for.
    pub chunks_asked: u64,
    /// Chunks that were found, and are held.
    pub chunks_hit: u64,
    /// Tokens of the chunks that were asked for.
    pub tokens_asked: u64,
    /// Tokens of the chunks that were found.
    pub tokens_hit: u64,
    /// Lookups whose answer was cut because the client holds as much as it may.
    pub cut: u64,
    /// Lookups that were answered while the engine did not serve.
    pub not_serving: u64,
}

impl LookupTotals {
    fn parts(&mut self) -> [&mut u64; LOOKUP_COUNTS] {
        let LookupTotals { lookups, chunks_asked, chunks_hit, tokens_asked, tokens_hit, cut, not_serving } =
            self;
        [lookups, chunks_asked, chunks_hit, tokens_asked, tokens_hit, cut, not_serving]
    }

    /// Adds others to these.
    pub fn add(&mut self, mut other: LookupTotals) {
        for (to, from) in self.parts().into_iter().zip(other.parts()) {
            // What clients write is shown and never trusted.
            *to = to.wrapping_add(*from);
        }
    }
}

impl LookupCounts {
    fn add(&self, mut more: LookupTotals) {
        // Relaxed: numbers for people.
        for (count, more) in self.counts.iter().zip(more.parts()) {
            count.store(count.load(Ordering::Relaxed).wrapping_add(*more), Ordering::Relaxed);
        }
    }

    fn read(&self) -> LookupTotals {
        let mut totals = LookupTotals::default();
        for (to, count) in totals.parts().into_iter().zip(&self.counts) {
            *to = count.load(Ordering::Relaxed);
        }
        totals
    }

    fn clear(&self) {
        for count in &self.counts {
            count.store(0, Ordering::Relaxed);
        }
    }
}

/// The mapped lobby.
#[derive(Clone)]
pub struct Lobby {
    mapping: Arc<Mapping>,
    /// One per entry.
    pub life_words: View<LifeWord>,
    /// One per client.
    pub entries: View<Entry>,
    lookups: View<LookupCounts>,
    doorbell: One<Doorbell>,
}

impl Lobby {
    /// Views into a mapped lobby.
    pub fn new(mapping: Arc<Mapping>) -> Result<Lobby, OutOfBounds> {
        Ok(Lobby {
            life_words: View::new(&mapping, LIFE_WORDS_AT, CLIENTS_MAX)?,
            entries: View::new(&mapping, ENTRIES_AT, CLIENTS_MAX)?,
            lookups: View::new(&mapping, LOOKUPS_AT, LOOKUP_LINES)?,
            doorbell: One::new(&mapping, DOORBELL_AT)?,
            mapping,
        })
    }

    /// The superblock.
    pub fn superblock(&self) -> Result<&Superblock, OutOfBounds> {
        self.mapping.at(0)
    }

    /// The word that the engine sleeps on.
    #[must_use]
    #[inline]
    pub fn doorbell(&self) -> &AtomicU32 {
        &self.doorbell.parked
    }

    /// The scheduler of this entry: adds to its counts. One thread at a time does that.
    pub fn count_lookup(&self, entry: usize, more: LookupTotals) {
        self.lookups[entry].add(more);
    }

    /// Engine: the client of this entry is gone.
    pub fn forget_lookups(&self, entry: usize) {
        self.lookups[CLIENTS_MAX].add(self.lookups[entry].read());
        self.lookups[entry].clear();
    }

    /// What the lookups of all clients came to, since the arena was made.
    #[must_use]
    pub fn lookup_totals(&self) -> LookupTotals {
        let mut totals = LookupTotals::default();
        self.lookups.iter().for_each(|counts| totals.add(counts.read()));
        totals
    }

    /// Client: publishes its entry, and wakes the engine if it sleeps.
    pub fn claim(&self, entry: usize, content: &EntryContent) {
        self.entries[entry].publish(content);
        // SYNC POINT: Release; pairs with the Acquire in `claims`: an engine that sees the count sees the entry.
        self.doorbell.claims.fetch_add(1, Ordering::Release);
        // SYNC POINT: SeqCst fence in `notify`; pairs with the one in `park::announce`, after which the engine looks at
        // `claims` once more: either it sees this count, or `notify` sees that it may sleep.
        park::notify(&self.doorbell.parked);
    }

    /// Engine: how many entries have been published. A hint to look at the entries and no more: every client can write it.
    #[must_use]
    #[inline]
    pub fn claims(&self) -> u32 {
        self.doorbell.claims.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_of_dma_outlives_publications_and_ends_with_the_entry() {
        let mapping = Arc::new(Mapping::private(4096));
        let entries: View<Entry> = View::new(&mapping, 0, 2).unwrap();
        let entry = &entries[1];
        let said = DmaOwner { process: ProcessIdentity::own(), locked: true };
        assert_eq!(entry.dma(), None);
        // A client may declare it before its entry is ready.
        entry.register_dma(&said);
        assert_eq!((entry.dma(), entry.read()), (Some(said), None));
        let content = EntryContent {
            role: Role::Worker as u32,
            nonce: 1,
            incarnation: 2,
            pid: 3,
            payload_words: 4,
            name: "x".repeat(CLIENT_NAME_BYTES),
        };
        for nonce in 1..4 {
            entry.publish(&EntryContent { nonce, ..content.clone() });
            assert_eq!(entry.read().map(|read| (read.nonce, read.name.len())), Some((nonce, 48)));
            assert_eq!(entry.dma(), Some(said));
        }
        entry.register_dma(&DmaOwner { locked: false, ..said });
        assert_eq!(entry.dma(), Some(DmaOwner { locked: false, ..said }));
        entry.withdraw_dma();
        assert_eq!(entry.dma(), None);
        entry.register_dma(&said);
        entry.clear();
        assert_eq!((entry.dma(), entry.read()), (None, None));
        assert_eq!(entries[0].dma(), None);
        assert_eq!(dma_lock_at(1) - dma_lock_at(0), size_of::<Entry>() as u64);
    }
}
