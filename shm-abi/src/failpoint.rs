//! Places at which a test may end the process, rules that it may break, and abilities of the kernel that it may take away: to see
//! that a death there is survived, and that the checks see what each rule is for. A process of a build with the feature
//! `failpoints`, which only tests switch on, reads them from its environment; nothing of it is in any other build.
//!
//! ```text
//! KVRING_FAIL_POINT=commit.word        SIGKILL at the first time that the process comes there
//! KVRING_FAIL_POINT=commit.word:3      at the third time
//! KVRING_FAIL_POINT=commit.word:3:stop SIGSTOP instead: somebody else goes on, then this process does
//! KVRING_FAIL_POINT=commit.word:3:pause only a pause, of 50 ms
//! KVRING_FAIL_POINT=commit.word:3:panic a panic
//! KVRING_BREAK=rounds                  the rule of that name does not hold
//! KVRING_WITHOUT=robust,waitv          these abilities of the kernel are not there (see `probe`, `futex`)
//! ```
//!
//! A text that is none of these is a panic when the process first asks. A new place or rule is a line in the table below, a call
//! where it belongs, and a line in `tests/src/crash/table.rs` or `tests/tests/crash_rules.rs`, whose tests find it missing.

/// An enum, and what its variants are called in the environment: the texts are there with the feature only.
macro_rules! called {
    ($(#[$about:meta])* $kind:ident { $($(#[$what:meta])+ $variant:ident = $text:literal,)+ }) => {
        $(#[$about])*
        #[derive(Clone, Copy, PartialEq, Eq)]
        #[cfg_attr(feature = "failpoints", derive(Debug, PartialOrd, Ord))]
        pub enum $kind {
            $($(#[$what])+ $variant,)+
        }

        #[cfg(feature = "failpoints")]
        impl $kind {
            /// All of them, in the order of their table.
            pub const ALL: &[$kind] = &[$($kind::$variant),+];

            /// What it is called in the environment.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $($kind::$variant => $text,)+
                }
            }
        }

        #[cfg(feature = "failpoints")]
        impl core::fmt::Display for $kind {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                f.write_str(self.name())
            }
        }

        #[cfg(feature = "failpoints")]
        impl core::str::FromStr for $kind {
            type Err = String;

            fn from_str(text: &str) -> Result<$kind, String> {
                let names = || $kind::ALL.iter().map(|one| one.name()).collect::<Vec<_>>().join(", ");
                let found = $kind::ALL.iter().find(|one| one.name() == text);
                found.copied().ok_or_else(|| format!("{text:?} is none of: {}", names()))
            }
        }
    };
}

called! {
    /// A place in the code, by what has happened when a process comes there.
    Place {
        // An engine starts.
        /// The engine has opened or created the file of its engine segment, and has not locked it.
        Opened = "opened",
        /// The first slab is allocated; the thread that allocates the others does not run yet.
        AllocatorStarts = "allocator starts",
        /// The first slab is allocated, and the allocator's thread runs; there is no cache yet.
        AllocatorStarted = "allocator started",

        // An engine takes over what a dead one has left.
        /// The successor has claimed its dead predecessor's owner word.
        RecoveryOwner = "recovery.owner",
        /// Only with [`Rule::OddBeforeTheWords`] broken: the successor has claimed all of the predecessor's life words, and the
        /// incarnation is still the predecessor's.
        RecoveryEarlyWords = "recovery.early words",
        /// The incarnation is odd, and those who slept on it have been woken.
        RecoveryOdd = "recovery.odd",
        /// The successor has counted this attempt to recover.
        RecoveryCounted = "recovery.counted",
        /// The successor has claimed all life words of the engine segment.
        RecoveryWords = "recovery.words",
        /// The successor knows the records of all visible chunks, and none of their shards.
        RecoveryRecords = "recovery.records",
        /// The shards of one span are in the successor's cache.
        RecoverySpan = "recovery.span",
        /// All shards are in the successor's cache, and what is of no use has been freed.
        RecoveryChunks = "recovery.chunks",
        /// The successor knows which clients live; what the others were writing is free, or waits for their processes.
        RecoveryOwners = "recovery.owners",

        // An engine serves.
        /// The attempts to recover count from zero again; the incarnation is still odd.
        ServingEven = "serving.even",
        /// The incarnation is even; nobody who sleeps on it has been woken.
        ServingBegun = "serving.begun",
        /// The engine has read an entry's life word, and has not acted on it.
        LookWord = "look.word",
        /// The engine has judged a claim, and the client cannot see the answer yet.
        AttachAnswer = "attach.answer",
        /// The client can see the answer to its claim.
        AttachAnswered = "attach.answered",
        /// The engine has read which slot a client declares, and has not adopted it.
        DeclareSlot = "declare.slot",
        /// The engine has read a piece of what a scheduler holds, and has not pinned it.
        Hold = "hold",
        /// A client has declared everything; what it has not named is not all freed.
        DeclareEnd = "declare.end",
        /// All that a client has not declared is freed, and the client has no answer yet.
        DeclareEnded = "declare.ended",
        /// Only with [`Rule::WordLast`] broken: a header's word says WRITING, and its fields are those of an earlier life.
        WritingFields = "writing.fields",
        /// A header's fields are written, and its word still says FREE.
        WritingWord = "writing.word",
        /// A header's word says WRITING.
        WritingDone = "writing.done",
        /// A shard's checksum is in its header, whose word still says WRITING.
        CommitWord = "commit.word",
        /// A header's word says COMMITTED.
        CommitDone = "commit.done",
        /// A namespace is no longer in shared memory; the engine's own table still has it.
        NamespaceEnded = "namespace.ended",
        /// A namespace is in shared memory, and not in the engine's own table yet.
        NamespaceBegun = "namespace.begun",
        /// The engine's own table knows a rank of a namespace that shared memory does not.
        RankRegistered = "rank.registered",
        /// The rank is in shared memory, too.
        RankPublished = "rank.published",
        /// The cache has cut a span, and no slab's record says so.
        SpanRecord = "span.record",
        /// The record of the span's first slab says how it is cut.
        SpanDone = "span.done",
        /// The cache has decided that a slot becomes an orphan; its word still says WRITING.
        OrphanWord = "orphan.word",
        /// A header's word says ORPHANED.
        OrphanDone = "orphan.done",
        /// The cache has freed a slot; its word still says what it was.
        FreeWord = "free.word",
        /// A header's word says FREE, with the next generation.
        FreeDone = "free.done",
        /// A chunk's record has its fields; its word says FREE, and no hint leads to it.
        ChunkFields = "chunk.fields",
        /// A hint leads to a chunk's record, whose word still says FREE.
        ChunkHint = "chunk.hint",
        /// A chunk's record says VISIBLE.
        ChunkShown = "chunk.shown",
        /// A chunk's record says EVICTING, and the engine has not listened to the schedulers.
        ChunkMarked = "chunk.marked",
        /// The cache has decided that a chunk ends; its record still says VISIBLE or EVICTING.
        ChunkEnds = "chunk.ends",
        /// A chunk's record says FREE, with the next generation; a hint still leads to it, and its slots are still COMMITTED.
        ChunkEnded = "chunk.ended",
        /// The cache has given a span up; its first slab's record still says how it was cut.
        SpanGone = "span.gone",
        /// No slab's record names the span any more.
        SpanCleared = "span.cleared",
        /// The engine has hung up on a client that died or left, and has taken nothing back.
        ReclaimSlots = "reclaim.slots",
        /// The engine has taken back all that the client had; its entry still says who it was.
        ReclaimEntry = "reclaim.entry",
        /// The client's entry is cleared; its life word still says that it is dead.
        ReclaimWord = "reclaim.word",
        /// The client's life word is reset, and the entry anybody's.
        ReclaimDone = "reclaim.done",
        /// A client's request has been put off until the client's next turn.
        RequestPutOff = "request.put off",

        // An engine sweeps what an earlier one has left, and makes new segments.
        /// The predecessor's engine segment is marked as retired.
        PredecessorRetired = "predecessor retired",
        /// The lobby and the arena are marked as retired, and all files still have their names. Also on the way down.
        SatellitesRetired = "satellites retired",
        /// The channels and the lobby have no names any more. Also on the way down.
        LobbyGone = "lobby gone",
        /// Of the predecessor's segments only the engine segment has a name.
        PredecessorsSatellitesGone = "predecessor's satellites gone",
        /// None of the predecessor's segments has a name.
        PredecessorGone = "predecessor gone",
        /// The engine has the lock on its engine segment, and has swept what else lay under its name.
        Claimed = "claimed",
        /// The engine segment has its memory, and not its length.
        Allocated = "allocated",
        /// The engine has claimed its owner word.
        Owned = "owned",
        /// The engine has claimed all its life words, and its segment says which process it is.
        Described = "described",
        /// There is a lobby, without a superblock.
        Lobby = "lobby",
        /// There is an arena, without a superblock.
        Arena = "arena",
        /// The arena's superblock is complete.
        ArenaMagic = "arena magic",
        /// The lobby's superblock is complete.
        LobbyMagic = "lobby magic",
        /// The engine segment's superblock is complete: clients find the engine.
        EngineMagic = "engine magic",

        // An engine is asked to stop.
        /// All its segments are marked as retired.
        Retired = "retired",
        /// Of its segments only the engine segment has a name.
        SatellitesGone = "satellites gone",
        /// None of its segments has a name.
        Unlinked = "unlinked",

        // A client comes, works, and follows the engine through restarts.
        /// The client has claimed an entry, which does not say who it is.
        ClientClaimed = "client.claimed",
        /// The client has made its channel, which its entry does not name.
        ClientChannel = "client.channel",
        /// The client's entry says all, and the client waits for the answer.
        ClientPublished = "client.published",
        /// The client has been attached, and its channel has no name any more.
        ClientAttached = "client.attached",
        /// The client's worker has been registered, or refused, and nobody who waits for that knows.
        ClientRegistered = "client.registered",
        /// The client holds slots that it is to write, and has written nothing.
        ClientGranted = "client.granted",
        /// The client's copy into its slots has ended, and the engine has not been told.
        ClientCopied = "client.copied",
        /// The client has sent its commit, or has found that it cannot.
        ClientCommitSent = "client.commit sent",
        /// After a restart: the client has listed what it holds, and has declared none of it.
        ClientTookStock = "client.took stock",
        /// After a restart: the client has declared all that it holds, and has not said that this was all.
        ClientDeclared = "client.declared",
        /// The client is registered, and has declared and settled what it held.
        ClientEntered = "client.entered",
        /// The client's last copy into an arena that it leaves has ended; it still has its claim.
        ClientGivesUp = "client.gives up",
    }
}

called! {
    /// A rule by which something bad does not happen. A test breaks it to see that the bad thing happens then, or to come to
    /// something rare.
    Rule {
        /// The engine writes the fields of a header before its word.
        WordLast = "word last",
        /// A load is good only while the slot has the generation that the load was given.
        Generation = "generation",
        /// A load is refused if its handle is for another arena than the one that the worker has mapped.
        ArenaId = "arena id",
        /// A recovery puts together only shards of the same round.
        Rounds = "rounds",
        /// A reservation puts together only shards of the same round.
        RoundsInAReservation = "rounds in a reservation",
        /// The payload region of an abandoned operation stays taken until its answer has been drained.
        RegionsUntilDrained = "regions until drained",
        /// An entry's life word is reset only after everything of its client has been taken back.
        ReclaimBeforeReset = "reclaim before reset",
        /// A successor makes the incarnation odd before it claims the life words that its clients look at.
        OddBeforeTheWords = "odd before the words",
        /// After a restart a slot that a living client is writing is given to nobody until that client has declared.
        Quarantine = "quarantine",
        /// An entry that was published for an earlier incarnation is not judged again.
        OutdatedClaims = "outdated claims",
        /// A client refuses slots that an engine has granted through an earlier attachment.
        LateGrants = "late grants",
        /// A client declares the slots into which it is still copying.
        DeclareRunningCopies = "declare running copies",
        /// Slots into which a device may write are freed only after the client's process is gone.
        WaitsForTheProcess = "waits for the process",
        /// Where the kernel has no robust lists, whoever claims a life word first locks the byte of the file where it lies.
        LifeLock = "life lock",
        /// Where the kernel has no robust lists, somebody looks whether those locks are still held.
        LooksAtLocks = "looks at locks",
        /// The engine marks a life word that it finds unclaimed as dead before it buries what is known of its entry.
        MarkBeforeBurying = "mark before burying",
        /// The engine resets the life word of an entry that it has cleared.
        ResetTheWord = "reset the word",
        /// After a scheduler has said what it holds, there is a fence before it looks at the chunks again.
        FenceAfterAHold = "fence after a hold",
        /// The engine begins a request in the turn in which it reads it.
        BeginAtOnce = "begin at once",
        /// There is memory for what a segment allocates.
        Memory = "memory",
        /// There is memory for the headers of new slots, and for the records of new chunks.
        MemoryForTables = "memory for tables",
    }
}

called! {
    /// Something that some kernels and sandboxes lack, and for which something slower stands in.
    Ability {
        /// The kernel marks the life words of a thread that ends.
        RobustLists = "robust",
        /// One system call, `futex_waitv`, waits for several words.
        WaitForMany = "waitv",
    }
}

/// Ends (or stops, or delays) the process here, if a test asks for it.
#[inline(always)]
pub fn here(_place: Place) {
    #[cfg(all(feature = "failpoints", not(loom)))]
    on::here(_place);
}

/// Does a test want this rule broken?
#[inline(always)]
#[must_use]
pub fn broken(_rule: Rule) -> bool {
    #[cfg(all(feature = "failpoints", not(loom)))]
    return on::broken(_rule);
    #[cfg(not(all(feature = "failpoints", not(loom))))]
    false
}

/// Does a test want the kernel to look as if it lacked this?
#[inline(always)]
#[must_use]
pub fn without(_ability: Ability) -> bool {
    #[cfg(all(feature = "failpoints", not(loom)))]
    return on::without(_ability);
    #[cfg(not(all(feature = "failpoints", not(loom))))]
    false
}

#[cfg(all(feature = "failpoints", not(loom)))]
mod on {
    use super::{Ability, Place, Rule};
    use crate::sync::{AtomicU32, Ordering};
    use nix::sys::signal::{Signal, raise};
    use std::sync::OnceLock;

    #[derive(Debug, PartialEq, Eq)]
    enum Act {
        Signal(Signal),
        Pause,
        Panic,
    }

    #[derive(Debug, PartialEq, Eq)]
    struct Wanted {
        place: Place,
        time: u32,
        act: Act,
    }

    fn parse(text: &str) -> Result<Wanted, String> {
        let mut parts = text.split(':');
        let place = parts.next().unwrap_or_default().parse()?;
        let time = match parts.next() {
            Some(time) => time.parse().map_err(|error| format!("{time:?}: {error}"))?,
            None => 1,
        };
        let act = match parts.next() {
            Some("stop") => Act::Signal(Signal::SIGSTOP),
            Some("pause") => Act::Pause,
            Some("panic") => Act::Panic,
            None => Act::Signal(Signal::SIGKILL),
            Some(other) => return Err(format!("{other:?} is none of stop, pause, panic")),
        };
        Ok(Wanted { place, time, act })
    }

    /// What `variable` says, if it is set and not empty.
    ///
    /// # Panics
    /// It says what `parse` does not know: a test would otherwise pass without what it is about.
    fn asked<T>(variable: &str, parse: impl FnOnce(&str) -> Result<T, String>) -> Option<T> {
        let text = std::env::var(variable).ok().filter(|text| !text.is_empty())?;
        Some(parse(&text).unwrap_or_else(|error| panic!("{variable}={text}: {error}")))
    }

    pub(super) fn here(place: Place) {
        static WANTED: OnceLock<Option<Wanted>> = OnceLock::new();
        static TIMES: AtomicU32 = AtomicU32::new(0);
        let wanted = WANTED.get_or_init(|| asked("KVRING_FAIL_POINT", parse));
        if let Some(wanted) = wanted
            && wanted.place == place
            && TIMES.fetch_add(1, Ordering::Relaxed) + 1 == wanted.time
        {
            match wanted.act {
                // It can only fail for a signal that does not exist.
                Act::Signal(signal) => drop(raise(signal)),
                Act::Pause => std::thread::sleep(std::time::Duration::from_millis(50)),
                Act::Panic => panic!("fail point {place}"),
            }
        }
    }

    pub(super) fn broken(rule: Rule) -> bool {
        static BROKEN: OnceLock<Option<Rule>> = OnceLock::new();
        *BROKEN.get_or_init(|| asked("KVRING_BREAK", str::parse)) == Some(rule)
    }

    /// Not cached: who asks keeps the answer.
    pub(super) fn without(ability: Ability) -> bool {
        let list = |text: &str| text.split(',').map(str::parse).collect::<Result<Vec<Ability>, String>>();
        asked("KVRING_WITHOUT", list).is_some_and(|missing| missing.contains(&ability))
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn a_place_is_found_by_its_text() {
            for place in Place::ALL {
                let wanted = Wanted { place: *place, time: 1, act: Act::Signal(Signal::SIGKILL) };
                assert_eq!(parse(place.name()), Ok(wanted));
            }
            let wanted = Wanted { place: Place::CommitWord, time: 3, act: Act::Pause };
            assert_eq!(parse("commit.word:3:pause"), Ok(wanted));
        }

        #[test]
        fn what_nobody_knows_is_an_error() {
            for text in ["", "commit.wrd", "commit.word:x", "commit.word:1:halt"] {
                assert!(parse(text).is_err(), "{text}");
            }
            assert!("round".parse::<Rule>().is_err());
            assert!("robust ".parse::<Ability>().is_err());
        }
    }
}
