//! What the restart protocol is about: shared memory, the engine's private memory, clients.
//!
//! Nonces are small numbers of which only equality counts: a fresh one is any that nothing refers to any more.

use super::bounds::{CLIENTS, ENTRIES, SLOTS};

/// No entry, no nonce.
pub(super) const NONE: u8 = 0;

/// A client's life word in the lobby.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Word {
    /// 0.
    Unclaimed,
    /// That client's TID.
    Alive(u8),
    /// OWNER_DIED.
    Dead,
}

/// An entry of the lobby, behind its sequence: it is read whole, or not at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Entry {
    /// Complete.
    pub ready: bool,
    /// Names the attachment and its channel.
    pub nonce: u8,
    /// The incarnation that the client means.
    pub incarnation: u8,
}

/// What the engine has answered in an entry. It outlives the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Answer {
    /// Whom.
    pub nonce: u8,
    /// Attached, else stale.
    pub attached: bool,
    /// Ghost: the incarnation of who answered.
    pub by: u8,
}

/// What a slot is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Use {
    /// Nobody's.
    Free,
    /// That entry's.
    Writing(u8),
    /// A shard.
    Committed,
}

/// What is in the arena at a slot's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Bytes {
    /// Nothing, or half of something.
    Torn,
    /// A key's, whole.
    Of(u8),
}

/// A slot's header, and its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Slot {
    /// State and owner.
    pub used: Use,
    /// Grows when it is freed.
    pub generation: u8,
    /// The key it was given for.
    pub key: u8,
    /// The arena.
    pub bytes: Bytes,
    /// Ghost: a commit of this generation has been acknowledged.
    pub acknowledged: bool,
}

/// How far the engine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// There is none; its words are marked.
    Down,
    /// Its process has ended, but the kernel has not marked its words yet.
    Ended,
    /// Has the owner word.
    Owner,
    /// Has stored its first incarnation, or (in the order that is wrong) has taken over the life words.
    Half,
    /// Has done both; looks at that slot next.
    Scan(u8),
    /// Serves.
    Serving,
}

/// What the engine's one thread is in the middle of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Busy {
    /// Nothing.
    Idle,
    /// Reclaims an entry, at that step.
    Reclaim(u8, u8),
    /// Frees what was not declared in an entry, at that slot.
    DeclareEnd(u8, u8),
    /// Has done what that client's mover asked for, and not said so yet.
    Acknowledge(u8),
}

/// The engine's private memory: gone with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Engine {
    /// How far.
    pub phase: Phase,
    /// In the middle of what.
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
}

/// A slot as its holder knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Grant {
    /// Which.
    pub slot: u8,
    /// Of which generation.
    pub generation: u8,
    /// For which key.
    pub key: u8,
}

/// The thread that stores. From `Granted` to `Acknowledged` the grant is in the ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mover {
    /// Has nothing to do.
    Idle,
    /// Asked for a slot for a key, through a channel.
    Reserving(u8, u8),
    /// The answer lies in that channel.
    Answered(Grant, u8),
    /// May write.
    Granted(Grant),
    /// Writes.
    Copying(Grant),
    /// Has ended; owes the engine a commit, or (false) an abort.
    Owing(Grant, bool),
    /// Has sent it, through a channel.
    Sent(Grant, bool, u8),
    /// The answer to it lies in that channel.
    Acknowledged(Grant, bool, u8),
}

/// The thread that loads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Loader {
    /// Has nothing to do.
    Idle,
    /// A lookup's answer lies in that channel.
    Answered(Grant, u8),
    /// Has a handle, and a lease as far as it knows.
    Holding(Grant),
    /// Has found the slot as the handle says.
    Validated(Grant),
    /// Has copied these bytes.
    Copied(Grant, Bytes),
    /// Owes the engine the lease's release.
    Releasing(u8),
}

/// How far the keeper is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Keeper {
    /// Has no entry.
    Away,
    /// Its `list_op_pending` names the entry.
    Pending,
    /// The word is its own, but not linked yet.
    Claimed,
    /// Has its entry, and waits for an engine that serves.
    Owner,
    /// Writes the entry.
    Publishing,
    /// Waits for the answer.
    Waiting,
    /// Attached; has not said yet what it holds.
    Attached,
    /// Names its slots.
    DeclareSlots,
    /// Names its leases.
    DeclareLeases,
    /// Says that it is complete.
    DeclareEnd,
    /// Everybody may use the new channel.
    Ready,
    /// Lets nobody write any more, and waits for those who do; then gives the entry up.
    Leaving,
}

/// The process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Process {
    /// Lives.
    Alive,
    /// Has ended, but the kernel has not marked its word yet.
    Ended,
    /// Gone.
    Gone,
}

/// A client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Client {
    /// Its process.
    pub process: Process,
    /// Its keeper.
    pub keeper: Keeper,
    /// The arena that it maps.
    pub arena: u8,
    /// Its entry there.
    pub entry: u8,
    /// Its attachment, or the one that it asks for.
    pub nonce: u8,
    /// The incarnation that it means.
    pub incarnation: u8,
    /// The channel from which grants and leases are accepted: set when the ledger is read.
    pub accepts: u8,
    /// The ledger as it was read: the slot being written.
    pub wrote: Option<Grant>,
    /// The ledger as it was read: the lease.
    pub pinned: Option<Grant>,
    /// In the middle of a look at the engine's health: what its first load saw, + 1.
    pub look: u8,
    /// Stores.
    pub mover: Mover,
    /// Loads.
    pub loader: Loader,
    /// Stores that it may still begin.
    pub stores: u8,
    /// Loads that it may still begin.
    pub loads: u8,
}

/// What may still happen to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Left {
    /// Deaths of engines.
    pub engine_deaths: u8,
    /// Deaths of clients.
    pub client_deaths: u8,
    /// Cold starts.
    pub cold_starts: u8,
    /// Evictions.
    pub evictions: u8,
    /// Attachments that give up waiting for an answer.
    pub timeouts: u8,
    /// Clients that leave by themselves.
    pub leaves: u8,
}

/// Everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct State {
    /// Which segments have the name now.
    pub arena: u8,
    /// Odd while recovering.
    pub incarnation: u8,
    /// The engine's owner word says that it lives.
    pub owner_alive: bool,
    /// The engine's life words say that it lives.
    pub words_alive: bool,
    /// Ghost: the odd incarnation of the life that took them over.
    pub words_by: u8,
    /// The words of the life with that number are still to be marked, though another may have begun.
    pub marking: u8,
    /// The clients' life words.
    pub words: [Word; ENTRIES],
    /// The lobby's entries.
    pub entries: [Entry; ENTRIES],
    /// The engine's answers.
    pub answers: [Answer; ENTRIES],
    /// The channel file of each entry, by its nonce.
    pub files: [u8; ENTRIES],
    /// The slot table and the arena.
    pub slots: [Slot; SLOTS],
    /// The engine.
    pub engine: Engine,
    /// The clients.
    pub clients: [Client; CLIENTS],
    /// Bounds.
    pub left: Left,
    /// What a step found wrong.
    pub failed: Option<&'static str>,
}

impl Slot {
    /// As in a new arena.
    pub(super) const FRESH: Slot =
        Slot { used: Use::Free, generation: 0, key: 0, bytes: Bytes::Torn, acknowledged: false };
}

impl Entry {
    /// Cleared.
    pub(super) const EMPTY: Entry = Entry { ready: false, nonce: NONE, incarnation: 0 };
}

impl Answer {
    /// As in a new segment.
    pub(super) const EMPTY: Answer = Answer { nonce: NONE, attached: false, by: 0 };
}

impl Engine {
    /// Nothing in memory.
    pub(super) const FRESH: Engine = Engine {
        phase: Phase::Down,
        busy: Busy::Idle,
        connected: [NONE; ENTRIES],
        judged: [NONE; ENTRIES],
        adopted: 0,
        awaited: 0,
        leases: [0; ENTRIES],
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
            pinned: None,
            look: 0,
            mover: Mover::Idle,
            loader: Loader::Idle,
            stores,
            loads,
        }
    }

    /// Without an entry: everything that belonged to it is forgotten.
    pub(super) fn forget(&mut self) {
        *self = Client { process: self.process, ..Client::new(self.stores, self.loads) };
    }

    /// Does it own a life word?
    pub(super) fn owns(&self) -> bool {
        !matches!(self.keeper, Keeper::Away | Keeper::Pending)
    }

    /// What its ledger says that it was given and has not given back.
    pub(super) fn ledger(&self) -> Option<Grant> {
        match self.mover {
            Mover::Granted(grant) | Mover::Copying(grant) | Mover::Owing(grant, _) => Some(grant),
            Mover::Sent(grant, _, _) | Mover::Acknowledged(grant, _, _) => Some(grant),
            Mover::Idle | Mover::Reserving(..) | Mover::Answered(..) => None,
        }
    }

    /// What its ledger says that it has pinned.
    pub(super) fn lease(&self) -> Option<Grant> {
        match self.loader {
            Loader::Holding(handle) | Loader::Validated(handle) | Loader::Copied(handle, _) => Some(handle),
            Loader::Idle | Loader::Answered(..) | Loader::Releasing(_) => None,
        }
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

    /// The slot is nobody's, and of the next generation.
    pub(super) fn free(&mut self, slot: usize) {
        let old = &mut self.slots[slot];
        if old.acknowledged {
            self.failed = Some("S3: an acknowledged commit was dropped, and nobody evicted it");
        }
        *old = Slot { used: Use::Free, generation: old.generation + 1, acknowledged: false, ..*old };
        self.engine.adopted &= !(1 << slot);
    }
}
