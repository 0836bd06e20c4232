//! How large the world of one check is, and which rule is broken in it.

use super::state::Left;

/// Clients, at most.
pub const CLIENTS: usize = 2;
/// Entries of the lobby, at most.
pub const ENTRIES: usize = 2;
/// Slots of the arena, at most.
pub const SLOTS: usize = 2;

/// How much of everything there is in a check.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    pub clients: usize,
    pub entries: usize,
    pub slots: usize,
    pub keys: u8,
    /// Stores that each client may begin.
    pub stores: [u8; CLIENTS],
    /// Lookups that each client may begin, each with a load.
    pub loads: [u8; CLIENTS],
    /// How often each event of the environment may happen.
    pub left: Left,
    /// The second client declares every slot of the table as its own.
    pub liar: bool,
    /// The clients are attached in the beginning.
    pub attached: bool,
    /// A chunk of the first key is in the first slot in the beginning.
    pub stored: bool,
    /// Some steps are taken together with the next one, so that checks with more clients are small enough: in the start of an
    /// engine, a publication, a declaration, a commit. Smaller checks take each of them alone.
    pub coarse: bool,
    /// Clients look at the engine's health.
    pub health: bool,
    /// A client's threads do not end at once: a copy may still run when the kernel has marked its keeper's word.
    pub threads_linger: bool,
    /// The remedy: the engine reclaims when the process is gone, not when the word is marked.
    pub waits_for_process: bool,
    /// Processes of different PID namespaces have the same TIDs.
    pub equal_tids: bool,
    /// A remedy: a client that is about to claim an entry holds a file lock on it, which the kernel releases after it has
    /// walked the robust list.
    pub claim_lock: bool,
}

impl Bounds {
    /// One client in one entry, one slot, one key, and no event of the environment.
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
            full_rings: 0,
            timeouts: 0,
            leaves: 0,
        },
        liar: false,
        attached: false,
        stored: false,
        coarse: false,
        health: false,
        threads_linger: false,
        waits_for_process: false,
        equal_tids: false,
        claim_lock: false,
    };
}

/// A rule of the protocol that is left out or reversed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Break {
    /// Grants are taken from an old channel after the ledger has been read.
    NoGrantFence,
    /// A slot that is being copied into is not declared.
    OmitsRunningCopy,
    /// `declare_end` frees all WRITING slots of the entry.
    DeclareEndFreesAdopted,
    /// All threads may use a new channel before the ledger has been read and declared.
    EarlyChannel,
    /// Commits that were sent to a dead engine are not sent again.
    ForgetsOwedCommits,
    /// The word is set to 0 first, then the rest is reclaimed.
    ResetsBeforeReclaim,
    /// Life words are taken over before the odd incarnation is stored.
    WordsBeforeOdd,
    /// A recovery frees every WRITING slot.
    RecoveryFreesLiving,
    /// A client that declares a WRITING slot gets it, whoever writes it.
    AdoptsOthers,
    /// A cold start zeroes the slot table in place.
    ZeroesInPlace,
    /// A load looks at the slot's state and key alone, and not at generations.
    NoGenerationCheck,
    /// A claim is not announced by `list_op_pending`.
    NoPending,
    /// An entry is judged once, not once for each nonce, so that an entry that was left for an earlier engine counts.
    JudgesOnce,
    /// An entry is judged whatever incarnation it names.
    JudgesAnyIncarnation,
    /// A new engine adds 1 to the incarnation that it finds.
    PlusOne,
    /// A client loads the incarnation first, the life word second.
    IncarnationFirst,
    /// An entry is given up while copies run.
    LeavesWhileCopying,
    /// `declare_end` frees no slot that the last engine granted and no client took.
    NeverFreesUndeclared,
    /// Leases are not declared.
    OmitsLeases,
    /// The engine evicts before all clients had the time to declare.
    EvictsInGrace,
    /// As [`Break::ZeroesInPlace`], but only while no client writes.
    ZeroesWhenNobodyWrites,
    /// The kernel marks the engine's owner word before its other words.
    OwnerMarkedFirst,
    /// A freed slot keeps its generation.
    RecyclesGenerations,
    /// A lookup is answered without a second look.
    NoSecondLook,
    /// The engine hears the rings first, and marks what it evicts after that.
    RingsBeforeTheMark,
    /// The engine does not look whether something is unpublished.
    IgnoresUnpublished,
    /// What marks mean is not decided again when a hold is entered.
    JudgesMarksOnce,
    /// A hold is entered after the second look, as what has been told already.
    EntersLate,
    /// A client that is not attached does not look whether it is evicted without it.
    IgnoresEvicting,
    /// `DeclareEnd` is sent while a hold is still to be declared.
    EarlyDeclareEnd,
    /// A client that gets no answer to `DeclareEnd` goes back to declaring, so that what it holds from then on is not told.
    DeclaresAfterTheEnd,
    /// An answer counts as good again as soon as its words are there, declared or not.
    TrustsWhatIsNotDeclared,
    /// What is released while it is about to be declared is released first.
    SendsReleasesFirst,
    /// A release during a declaration is not sent.
    ForgetsOwedReleases,
    /// A recovery leaves marks as they are.
    KeepsMarks,
    /// A hold is published after the second look.
    SaysAfterTheLook,
    /// The engine pins what is held, and drops it all the same if it is marked.
    DropsWhatIsHeld,
    /// The slot of an evicted chunk is freed before the record ends.
    FreesTheSlotFirst,
    /// The engine says that it evicts without clients that have not come back after it has marked the first chunk.
    AnnouncesAfterTheMark,
    /// `unpublished` stays set when everything has been told.
    StaysUnpublished,
    /// A client that declares again by the same attachment forgets what it owes there.
    ForgetsAtASecondAttempt,
}
