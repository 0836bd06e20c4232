//! How much of everything there is in one check, and which rule is broken in it.

use super::state::Left;

/// Clients, at most.
pub const CLIENTS: usize = 2;
/// Entries of the lobby, at most.
pub const ENTRIES: usize = 2;
/// Slots of the arena, at most.
pub const SLOTS: usize = 2;

/// How far a check goes.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Clients.
    pub clients: usize,
    /// Entries of the lobby.
    pub entries: usize,
    /// Slots of the arena.
    pub slots: usize,
    /// Keys.
    pub keys: u8,
    /// Stores that each client may begin.
    pub stores: [u8; CLIENTS],
    /// Loads that each client may begin.
    pub loads: [u8; CLIENTS],
    /// Deaths and the like.
    pub left: Left,
    /// The second client names every slot of the table as its own.
    pub liar: bool,
    /// The clients are attached in the beginning.
    pub attached: bool,
    /// Some steps are one with the next, so that more clients fit in: of the start of an engine, a publication, a
    /// declaration, a commit. Smaller checks see every part of them.
    pub coarse: bool,
    /// Clients look at the engine's health.
    pub health: bool,
    /// A client's threads do not end at once: a copy may still run when the kernel has marked its keeper's word.
    pub threads_linger: bool,
    /// What would help against that: an engine that reclaims when the process is gone, not when the word is marked.
    pub waits_for_process: bool,
    /// Processes of different PID namespaces have the same TIDs.
    pub equal_tids: bool,
    /// What would help against that: whoever is about to claim an entry holds a file lock on it, which the kernel
    /// releases after it has walked the robust list.
    pub claim_lock: bool,
}

impl Bounds {
    /// One client in one entry, one slot, one key, and nothing that happens.
    pub const LEAST: Bounds = Bounds {
        clients: 1,
        entries: 1,
        slots: 1,
        keys: 1,
        stores: [0; CLIENTS],
        loads: [0; CLIENTS],
        left: Left {
            engine_deaths: 0,
            client_deaths: 0,
            cold_starts: 0,
            evictions: 0,
            timeouts: 0,
            leaves: 0,
        },
        liar: false,
        attached: false,
        coarse: false,
        health: false,
        threads_linger: false,
        waits_for_process: false,
        equal_tids: false,
        claim_lock: false,
    };
}

/// A rule of the protocol, left out or turned round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Break {
    /// Grants are taken from an old channel after the ledger has been read.
    NoGrantFence,
    /// A slot that is being copied into is not declared.
    OmitsRunningCopy,
    /// `declare_end` frees all WRITING slots of the entry.
    DeclareEndFreesAdopted,
    /// Everybody may use a new channel before the ledger has been read and declared.
    EarlyChannel,
    /// Commits that were sent to a dead engine are not sent again.
    ForgetsOwedCommits,
    /// The word is set to 0 first, then the rest is reclaimed.
    ResetsBeforeReclaim,
    /// Life words are taken over before the odd incarnation is stored.
    WordsBeforeOdd,
    /// A recovery frees every WRITING slot.
    RecoveryFreesLiving,
    /// Whoever names a WRITING slot gets it.
    AdoptsOthers,
    /// A cold start zeroes the slot table in place.
    ZeroesInPlace,
    /// A load looks at the slot's state and key alone.
    NoGenerationCheck,
    /// A claim is not announced by `list_op_pending`.
    NoPending,
    /// An entry is judged once, not once for each nonce: what the last engine left in it counts.
    JudgesOnce,
    /// An entry is judged whatever incarnation it means.
    JudgesAnyIncarnation,
    /// A new engine adds 1 to the incarnation that it finds.
    PlusOne,
    /// A client loads the incarnation first, the life word second.
    IncarnationFirst,
    /// An entry is given up while copies run.
    LeavesWhileCopying,
    /// `declare_end` clears nothing of what the last engine granted and nobody took.
    NeverFreesUndeclared,
    /// Leases are taken from an old channel after the ledger has been read.
    NoLeaseFence,
    /// Leases are not declared.
    OmitsLeases,
    /// The engine evicts before everybody had the time to declare.
    EvictsInGrace,
    /// As [`Break::ZeroesInPlace`], but only when nobody writes.
    ZeroesWhenNobodyWrites,
    /// The kernel marks the engine's owner word before its other words.
    OwnerMarkedFirst,
    /// A freed slot keeps its generation.
    RecyclesGenerations,
}
