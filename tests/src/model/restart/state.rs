//! The state of the restart protocol: shared memory, the engine's private memory, clients.
//!
//! Nonces are small numbers of which only equality counts: a fresh one is any that nothing refers to any more.

use super::bounds::{CLIENTS, ENTRIES, SLOTS};

/// No entry, no nonce.
pub(super) const NONE: u8 = 0;

/// A client's life word in the lobby.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Word {
    Unclaimed,
    /// It holds the TID of the client of this number.
    Alive(u8),
    Dead,
}

/// An entry of the lobby, behind its sequence: it is read whole, or not at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Entry {
    pub ready: bool,
    /// Names the attachment and its channel.
    pub nonce: u8,
    /// The incarnation of the engine that the client wants to attach to.
    pub incarnation: u8,
}

/// The engine's answer in an entry. It outlives the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Answer {
    /// The attachment that it answers.
    pub nonce: u8,
    /// True: attached. False: stale.
    pub attached: bool,
    /// Ghost: the incarnation of the engine that answered.
    pub by: u8,
}

/// What a slot is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Use {
    Free,
    /// The client in the entry of this number writes it.
    Writing(u8),
    Committed,
}

/// The bytes of a slot in the arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Bytes {
    /// Nothing, or a part of a shard.
    Torn,
    /// A whole shard of this key.
    Of(u8),
}

/// What the record of a chunk says. A chunk has one shard here, and its record leads to the slot of the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Record {
    Free,
    Visible,
    /// Marked: it may be evicted, and that is not decided yet.
    Evicting,
}

/// A slot's header, and its bytes; and the record of its chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Slot {
    /// State and owner.
    pub used: Use,
    /// Grows when it is freed.
    pub generation: u8,
    /// The key it was given for.
    pub key: u8,
    /// Its bytes in the arena.
    pub bytes: Bytes,
    /// Ghost: a commit of this generation has been acknowledged.
    pub acknowledged: bool,
    pub record: Record,
    /// The record's generation: it grows when the record ends.
    pub life: u8,
}

/// How far the engine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// There is no engine, and its words are marked.
    Down,
    /// Its process has ended, but the kernel has not marked its words yet.
    Ended,
    /// It has the owner word.
    Owner,
    /// It has stored its first incarnation, or (in the wrong order) has taken over the life words.
    Half,
    /// It has done both, and looks at the slot of this number next.
    Scan(u8),
    Serving,
}

/// What the engine's only thread is in the middle of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Busy {
    Idle,
    /// It reclaims an entry, and is at this step.
    Reclaim(u8, u8),
    /// It frees the slots of an entry that were not declared, and is at this slot.
    DeclareEnd(u8, u8),
    /// It has done what the mover of this client asked for, and has not answered yet.
    Acknowledge(u8),
    /// It evicts the chunk in this slot, whose record has ended.
    Free(u8),
}

/// What the engine is about to evict.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Batch {
    None,
    /// It has marked the record of this number, and decides when it has heard all rings.
    Marked(u8),
    /// It has heard them, and drops the chunk if nobody says meanwhile that it holds it.
    Heard(u8),
    /// In the wrong order: it has heard all rings, and marks the record of this number next.
    Listened(u8),
}

/// The engine's private memory, which is lost with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Engine {
    pub phase: Phase,
    pub busy: Busy,
    /// The attachment in each entry: the nonce of the channel that is read.
    pub connected: [u8; ENTRIES],
    /// The nonce that was judged last in each entry.
    pub judged: [u8; ENTRIES],
    /// Slots (bits) that the attachment in their owner's entry has named, or been granted.
    pub adopted: u8,
    /// Entries (bits) whose clients lived when this engine began, and have not declared yet.
    pub awaited: u8,
    /// Slots (bits) pinned for each entry.
    pub leases: [u8; ENTRIES],
    pub batch: Batch,
}

/// A slot as the client knows it that writes or loads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Grant {
    pub slot: u8,
    pub generation: u8,
    pub key: u8,
}

/// The thread of a client that stores. From `Granted` to `Acknowledged` the grant is in the ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mover {
    Idle,
    /// It has asked for a slot for a key, through a channel.
    Reserving(u8, u8),
    /// The answer lies in that channel.
    Answered(Grant, u8),
    /// It may write.
    Granted(Grant),
    /// It writes.
    Copying(Grant),
    /// Its copy has ended, and it owes the engine a commit or (false) an abort.
    Owing(Grant, bool),
    /// It has sent that, through a channel.
    Sent(Grant, bool, u8),
    /// The answer lies in that channel.
    Acknowledged(Grant, bool, u8),
}

/// A chunk as a lookup has found it: the number of its record, and the generation of that.
pub(super) type Handle = Grant;

/// The thread of a client that looks up and loads. From `Entered` to `Copied` the hold is in the client's list of leases. Under
/// `Entered` and `Published` the thread has that list's lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reader {
    Idle,
    /// The first look has found this. (Only for a control: marks counted as there.)
    Found(Handle, bool),
    /// It is held, as the engine of this incarnation knows or will know. True: marked chunks count as there.
    Entered(Handle, u8, bool),
    /// That engine has been told, or cannot be told now.
    Published(Handle, u8, bool),
    /// The second look has confirmed it: the lookup is answered.
    Holding(Handle),
    /// The load has found the record as the handle says, and in its slot the key and this generation.
    Validated(Handle, u8),
    /// It has copied these bytes.
    Copied(Handle, u8, Bytes),
    /// It owes the engine the release of its lease.
    Releasing(u8),
}

/// Which engine knows of the leases.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum At {
    Nowhere,
    /// The keeper is declaring them.
    Declaring,
    /// The engine of the attachment `accepts`.
    Attached,
}

/// How far the keeper is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Keeper {
    Away,
    /// Its `list_op_pending` names the entry.
    Pending,
    /// The life word is its own, but not in its robust list yet.
    Claimed,
    /// It has its entry, and waits for an engine that serves.
    Owner,
    /// It writes the entry.
    Publishing,
    /// It waits for the answer.
    Waiting,
    /// It is attached, and has not declared anything yet.
    Attached,
    /// It declares its slots.
    DeclareSlots,
    /// It declares its leases, until none is left.
    DeclareLeases,
    /// It has said that the declaration is complete, and waits for the answer.
    DeclareEnd,
    /// The other threads may use the new channel.
    Ready,
    /// It lets no copy begin, waits for the copies that run, and then gives the entry up.
    Leaving,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Process {
    Alive,
    /// It has ended, and the kernel has not marked its word yet.
    Ended,
    Gone,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Client {
    pub process: Process,
    pub keeper: Keeper,
    /// The arena that it maps.
    pub arena: u8,
    /// Its entry there.
    pub entry: u8,
    /// Its attachment, or the one that it has asked for.
    pub nonce: u8,
    /// The incarnation of the engine that it is, or wants to be, attached to.
    pub incarnation: u8,
    /// The channel from which grants are accepted, and by which leases are told: set when the ledger is read.
    pub accepts: u8,
    /// The ledger as it was read: the slot being written.
    pub wrote: Option<Grant>,
    pub at: At,
    /// The incarnation of the engine to which the leases were moved last.
    pub knows: u8,
    /// The incarnation of the engine by whose attachment lookups read the tables. 0: there is none yet.
    pub reads: u8,
    /// The hold has been published through the channel `accepts`.
    pub told: bool,
    /// Ghost: the incarnation of the engine that has waited for this client in vain, so it need not know of what the client held
    /// then; or 0.
    pub late: u8,
    /// What the keeper is about to declare. From here on its release is due.
    pub piece: Option<Handle>,
    /// In the channel `accepts`, as far as its engine lives: a `Hold`.
    pub said: Option<Handle>,
    /// A `DeclareEnd`.
    pub ends: bool,
    /// The word that says that something is held which the ring had no room for.
    pub unpublished: bool,
    /// In the middle of a look at the engine's health: what its first load saw, plus 1. Else 0.
    pub look: u8,
    pub mover: Mover,
    pub reader: Reader,
    /// Stores that it may still begin.
    pub stores: u8,
    /// Lookups, each with a load, that it may still begin.
    pub loads: u8,
}

/// How often each event of the environment may still happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Left {
    pub engine_deaths: u8,
    pub client_deaths: u8,
    pub cold_starts: u8,
    pub evictions: u8,
    /// Holds for which there is no room in the ring.
    pub full_rings: u8,
    /// Attachments that stop waiting for an answer.
    pub timeouts: u8,
    /// Clients that leave.
    pub leaves: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct State {
    /// Which segments have the name now.
    pub arena: u8,
    /// Odd while an engine recovers.
    pub incarnation: u8,
    /// The engine's owner word says that it lives.
    pub owner_alive: bool,
    /// The engine's life words say that it lives.
    pub words_alive: bool,
    /// Ghost: the odd incarnation of the engine that took them over.
    pub words_by: u8,
    /// The kernel has still to mark the words of the engine with this odd incarnation, although its successor may run.
    pub marking: u8,
    /// The incarnation of the engine that evicts without clients that have not come back (`ReaderTerms`).
    pub evicting: u8,
    pub words: [Word; ENTRIES],
    pub entries: [Entry; ENTRIES],
    pub answers: [Answer; ENTRIES],
    /// The channel file of each entry, by its nonce.
    pub files: [u8; ENTRIES],
    /// The slot table and the arena.
    pub slots: [Slot; SLOTS],
    pub engine: Engine,
    pub clients: [Client; CLIENTS],
    pub left: Left,
    /// What a step has found wrong.
    pub failed: Option<&'static str>,
}

impl Slot {
    /// As in a new arena.
    pub(super) const FRESH: Slot = Slot {
        used: Use::Free,
        generation: 0,
        key: 0,
        bytes: Bytes::Torn,
        acknowledged: false,
        record: Record::Free,
        life: 0,
    };

    /// The record leaves its generation.
    pub(super) fn end(&mut self) {
        (self.record, self.life) = (Record::Free, self.life + 1);
    }

    /// Is the chunk of this generation there, marked or not?
    pub(super) fn has(&self, handle: Handle) -> bool {
        self.record != Record::Free && self.life == handle.generation
    }
}

impl Entry {
    pub(super) const EMPTY: Entry = Entry { ready: false, nonce: NONE, incarnation: 0 };
}

impl Answer {
    /// As in a new segment.
    pub(super) const EMPTY: Answer = Answer { nonce: NONE, attached: false, by: 0 };
}

impl Engine {
    pub(super) const FRESH: Engine = Engine {
        phase: Phase::Down,
        busy: Busy::Idle,
        connected: [NONE; ENTRIES],
        judged: [NONE; ENTRIES],
        adopted: 0,
        awaited: 0,
        leases: [0; ENTRIES],
        batch: Batch::None,
    };
}

impl Client {
    /// A process that has just begun.
    pub(super) fn new(stores: u8, loads: u8) -> Client {
        Client {
            process: Process::Alive,
            keeper: Keeper::Away,
            arena: 0,
            entry: 0,
            nonce: NONE,
            incarnation: 0,
            accepts: NONE,
            wrote: None,
            at: At::Nowhere,
            knows: 0,
            reads: 0,
            told: false,
            late: 0,
            piece: None,
            said: None,
            ends: false,
            unpublished: false,
            look: 0,
            mover: Mover::Idle,
            reader: Reader::Idle,
            stores,
            loads,
        }
    }

    /// It has no entry any more, and forgets everything that belonged to it.
    pub(super) fn forget(&mut self) {
        *self = Client { process: self.process, ..Client::new(self.stores, self.loads) };
    }

    /// Does it own a life word?
    pub(super) fn owns(&self) -> bool {
        !matches!(self.keeper, Keeper::Away | Keeper::Pending)
    }

    /// The slot that is in its ledger.
    pub(super) fn ledger(&self) -> Option<Grant> {
        match self.mover {
            Mover::Granted(grant) | Mover::Copying(grant) | Mover::Owing(grant, _) => Some(grant),
            Mover::Sent(grant, _, _) | Mover::Acknowledged(grant, _, _) => Some(grant),
            Mover::Idle | Mover::Reserving(..) | Mover::Answered(..) => None,
        }
    }

    /// What is in its list of leases.
    pub(super) fn hold(&self) -> Option<Handle> {
        match self.reader {
            Reader::Entered(handle, ..) | Reader::Published(handle, ..) => Some(handle),
            _ => self.answered(),
        }
    }

    /// What it holds by a lookup that has been answered.
    pub(super) fn answered(&self) -> Option<Handle> {
        match self.reader {
            Reader::Holding(handle) | Reader::Validated(handle, _) | Reader::Copied(handle, ..) => {
                Some(handle)
            }
            _ => None,
        }
    }

    /// Does its reading thread have the lock of the list of leases?
    pub(super) fn is_locked(&self) -> bool {
        matches!(self.reader, Reader::Entered(..) | Reader::Published(..))
    }

    /// Does it read, or may it begin to?
    fn may_read(&self) -> bool {
        self.loads > 0 || self.reader != Reader::Idle
    }
}

impl State {
    /// Is this what the slot holds: that generation, for that key?
    pub(super) fn is(&self, grant: Grant) -> bool {
        let slot = &self.slots[grant.slot as usize];
        slot.generation == grant.generation && slot.key == grant.key
    }

    /// Does the client map the segments that have the name now?
    pub(super) fn is_current(&self, client: usize) -> bool {
        self.clients[client].arena == self.arena
    }

    /// Forgets what nothing can depend on any more, so that equal states are equal.
    pub(super) fn tidy(&mut self) {
        let mut any_reads = false;
        for who in &mut self.clients {
            any_reads |= who.may_read();
            if !who.may_read() {
                (who.at, who.knows, who.reads) = (At::Nowhere, 0, 0);
            }
            if who.hold().is_none() {
                who.late = 0;
                who.told = false;
            }
        }
        if !any_reads {
            self.evicting = 0;
            self.slots.iter_mut().for_each(|slot| slot.life = 0);
        }
    }

    /// The slot becomes free, with the next generation.
    pub(super) fn free(&mut self, slot: usize) {
        let old = &mut self.slots[slot];
        if old.acknowledged {
            self.failed = Some("S3: an acknowledged commit was dropped, and nobody evicted it");
        }
        *old = Slot { used: Use::Free, generation: old.generation + 1, acknowledged: false, ..*old };
        self.engine.adopted &= !(1 << slot);
    }
}
