//! The engine's segments: made or taken over at its start, given up at its end.
//!
//! **Who may.** Starts of one name take turns by a lock on the engine segment's *file*, which an engine holds for
//! its life (`takeover`). Whether an engine *lives* is decided by its owner word alone (and, where the kernel marks
//! no words, by the file lock that goes with the word). A living engine is never replaced.
//!
//! **In which order.** The engine's file is made first and removed last. The magics are written last, and the
//! engine's magic last of all. So the process that holds the lock on the current engine file may do with the other
//! segments what it likes, and a death at any line leaves something that the next start recognises as half-made and
//! sweeps (`sweep`).
//!
//! **Refuse first.** A start claims the name ([`Claim`]) and checks everything for which it could be refused,
//! before it changes anything: names that are not ours, an arena that does not fit even with what a sweep gives
//! back and, in `engine`, limits. So a user who misspells `--arena` still has the cache that the dead engine left.
//!
//! **Warm or cold.** The segments of a dead predecessor are taken over as they are (the same inodes, which living
//! clients still map) if they are whole, of this build, boot and geometry, and their recovery has not failed twice.
//! The order is: the owner word, the odd incarnation, the clients' words. So a client that sees its word alive
//! again also sees another incarnation.
//!
//! **Never in place.** Otherwise they are marked retired, their sleepers are woken, and they are unlinked. The new
//! segments are new inodes.

#[cfg(test)]
mod deaths;
mod error;
pub(crate) mod files;
mod found;
mod remove;
#[cfg(test)]
mod strangers;
mod sweep;
mod table_memory;
mod takeover;
#[cfg(test)]
mod tests;

pub use error::SetupError;
pub use found::ColdStart;
pub use remove::remove;
pub use sweep::Removed;
pub use table_memory::TableMemory;

use crate::preflight::{self, Room};
use crate::stats;
use crate::stop::StopHandle;
use kvring_shm_abi::claims::{Claims, Locks};
use kvring_shm_abi::engine_segment::{EngineSegment, LIFE_WORDS, LIFE_WORDS_AT, OWNER_WORD, Places};
use kvring_shm_abi::failpoint::{self, Place, Rule};
use kvring_shm_abi::futex;
use kvring_shm_abi::lobby::{self, LOBBY_BYTES, Lobby};
use kvring_shm_abi::mapping::{Mapping, OutOfBounds};
use kvring_shm_abi::means::{DeathNotice, Means, Waiting};
use kvring_shm_abi::probe;
use kvring_shm_abi::segment::{self, Access, EngineName, SegmentFile, SegmentLock};
use kvring_shm_abi::superblock::{ARENA_TRAILER, Geometry, Identity, Kind, Superblock, boot_id, random_u64};
use kvring_shm_abi::sync::Ordering;
use kvring_shm_abi::text::store_text;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use sweep::Sweep;
use takeover::{Claimed, Inherited};

/// How often a start that has swept a predecessor looks for room.
const ROOM_EVERY: Duration = Duration::from_millis(20);

/// What a start is asked for.
#[derive(Clone)]
pub struct Setup<'a> {
    /// The engine's name.
    pub name: &'a EngineName,
    /// The arena's geometry.
    pub geometry: Geometry,
    /// Whether a predecessor's geometry will do as well, whatever it is: nobody has asked for a size.
    pub any_geometry: bool,
    /// The longest time between two beats, in microseconds, for `status`.
    pub beat_interval_us: u32,
    /// The eviction policy's name, for `status`.
    pub policy: &'a str,
    /// How long to wait for another start, or for a predecessor's process that is still exiting.
    pub wait: Duration,
    /// Why nothing of a predecessor's is to be kept. `None`: whatever can be kept is kept.
    pub cold: Option<ColdStart>,
    /// Ends the start's waits.
    pub stop: StopHandle,
}

/// How an engine's segments came to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Start {
    /// There was nothing of that name.
    First,
    /// A predecessor's segments were swept.
    Cold(ColdStart),
    /// A dead predecessor's segments were taken over.
    Warm,
}

/// Everything in shared memory that the service thread needs. It belongs to the thread that made it: the kernel
/// ties the life words to that thread, and a thread has one such list. A drop without
/// [`Segments::retire_and_unlink`] looks like the engine's death.
pub struct Segments {
    // Dropped first, so that the life words are given up while everything else still stands.
    claims: Claims,
    /// Views of the engine's own segment.
    pub engine: EngineSegment,
    /// Views of the lobby.
    pub lobby: Lobby,
    /// The lobby's file, for the locks of clients whose kernel marks no life word.
    lobby_file: SegmentFile,
    arena: Arc<SegmentFile>,
    engine_file: Arc<SegmentFile>,
    name: EngineName,
    geometry: Geometry,
    arena_id: [u64; 2],
    start: Start,
    // Dropped last, because nobody else sweeps while the lock is held.
    _lock: SegmentLock,
}

/// A claimed name: until this is dropped, nobody else starts or removes an engine of this name. Nothing has been
/// changed yet, and dropping it changes nothing.
pub struct Claim<'a> {
    setup: &'a Setup<'a>,
    claimed: Claimed,
}

impl<'a> Claim<'a> {
    /// Claims the name.
    ///
    /// # Errors
    /// An engine of that name lives or starts; the arena does not fit; a segment of that name is not ours.
    pub fn new(setup: &'a Setup<'a>) -> Result<Claim<'a>, SetupError> {
        Ok(Claim { setup, claimed: takeover::claim_name(setup, false)? })
    }

    /// The arena's geometry: the wanted one or, if a predecessor's segments are taken over, theirs.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        match &self.claimed {
            Claimed::Warm(inherited) => inherited.identity.geometry,
            Claimed::Fresh(_) | Claimed::Stale(_) => self.setup.geometry,
        }
    }

    /// Takes over a dead predecessor's segments, or sweeps them and makes new ones. The incarnation stays odd until
    /// the service loop begins to serve. Call it on the service thread.
    ///
    /// Another start took the name that we had just swept, or there is too little memory to begin with after all.
    pub fn take(self) -> Result<Segments, SetupError> {
        let Claim { setup, mut claimed } = self;
        // The first reason is kept. Later rounds only meet the traces of other starts.
        let mut swept = None;
        loop {
            claimed = match claimed {
                Claimed::Warm(inherited) => return Segments::take_over(setup, *inherited),
                Claimed::Fresh(unfinished) => return Segments::build(setup, unfinished, swept),
                Claimed::Stale(stale) => {
                    let why = stale.sweep(setup.name)?;
                    swept.get_or_insert(why);
                    takeover::claim_name(setup, true)?
                }
            };
        }
    }
}

/// Waits until there is room for as much as a start needs before it serves. A swept predecessor's memory becomes
/// free as soon as its clients unmap it: they have been woken, and do so when their copies have ended; a stopped
/// process does so later. The wait has no limit: giving up would gain nothing, now that the cache is gone. The
/// allocator takes the rest of the memory, and waits for it as well.
fn wait_for_room(geometry: &Geometry, stop: &StopHandle) -> Result<(), SetupError> {
    let mut said = false;
    while let Err(error) = preflight::check_first(geometry, &Room::now()) {
        if !said {
            tracing::warn!(%error, "waiting for the clients of the earlier engine to let go of its arena");
            said = true;
        }
        if stop.is_requested() {
            return Err(SetupError::Stopped);
        }
        std::thread::sleep(ROOM_EVERY);
    }
    Ok(())
}

impl Segments {
    /// [`Claim::new`] and [`Claim::take`].
    ///
    /// # Errors
    /// Those of both.
    pub fn open(setup: &Setup<'_>) -> Result<Segments, SetupError> {
        Claim::new(setup)?.take()
    }

    fn take_over(setup: &Setup<'_>, inherited: Inherited) -> Result<Segments, SetupError> {
        let Inherited { file, lock, engine, lobby, arena, identity } = inherited;
        let lobby_file = SegmentFile::open(&setup.name.lobby(), Access::ReadWrite)?;
        let mut claims = Claims::register(engine.life_words.clone(), LIFE_WORDS_AT, || file.reopen())?;
        claims.take_over(OWNER_WORD)?;
        failpoint::here(Place::RecoveryOwner);
        let words = |claims: &mut Claims| client_words().try_for_each(|index| claims.take_over(index));
        if failpoint::broken(Rule::OddBeforeTheWords) {
            words(&mut claims)?;
            failpoint::here(Place::RecoveryEarlyWords);
        }
        // This comes before anything else changes. Clients that sleep on the incarnation hear of the successor at
        // once.
        engine.epoch().begin_recovery();
        futex::wake_all(engine.epoch().incarnation_word());
        failpoint::here(Place::RecoveryOdd);
        let begun = engine.info().recoveries.load(Ordering::Relaxed);
        engine.info().recoveries.store(begun.saturating_add(1), Ordering::Relaxed);
        failpoint::here(Place::RecoveryCounted);
        if !failpoint::broken(Rule::OddBeforeTheWords) {
            words(&mut claims)?;
        }
        failpoint::here(Place::RecoveryWords);
        describe(&engine, setup, claims.notice());
        stats::initialise(&engine.stats);
        tracing::info!(
            name = %setup.name, arena_id = %arena_id_text(identity.arena_id), failed_recoveries = begun,
            "an earlier engine's segments were taken over"
        );
        Ok(Segments {
            claims,
            engine,
            lobby,
            lobby_file,
            arena: Arc::new(arena),
            engine_file: Arc::new(file),
            name: setup.name.clone(),
            geometry: identity.geometry,
            arena_id: identity.arena_id,
            start: Start::Warm,
            _lock: lock,
        })
    }

    fn build(
        setup: &Setup<'_>,
        mut unfinished: takeover::Unfinished,
        why: Option<ColdStart>,
    ) -> Result<Segments, SetupError> {
        let (name, geometry) = (setup.name, setup.geometry);
        unfinished.begin()?;
        failpoint::here(Place::Claimed);
        if why.is_some() {
            wait_for_room(&geometry, &setup.stop)?;
        }
        let places = Places::of(&geometry);
        let file = unfinished.file();
        // The file is allocated before it gets its length, so no peer ever maps a page of it that has no memory.
        file.allocate(0, places.records_at)?;
        failpoint::here(Place::Allocated);
        file.grow(places.bytes)?;
        let arena_id = [random_u64().map_err(SetupError::Random)?, random_u64().map_err(SetupError::Random)?];
        let mapping = Arc::new(file.map(places.bytes, Access::ReadWrite)?);
        let engine = EngineSegment::new(mapping, &geometry, arena_id)?;
        engine.epoch().begin_recovery();
        let mut claims = Claims::register(engine.life_words.clone(), LIFE_WORDS_AT, || file.reopen())?;
        // The owner word is claimed first: from here on our death is noticed.
        claims.claim(OWNER_WORD)?;
        failpoint::here(Place::Owned);
        for index in client_words() {
            claims.claim(index)?;
        }
        describe(&engine, setup, claims.notice());
        stats::initialise(&engine.stats);
        failpoint::here(Place::Described);

        let identity =
            |kind, segment_bytes| Identity { kind, segment_bytes, arena_id, boot_id: boot_id(), geometry };
        let lobby = Lobby::new(Arc::new(segment::create_shared(&name.lobby(), LOBBY_BYTES)?))?;
        let lobby_file = SegmentFile::open(&name.lobby(), Access::ReadWrite)?;
        failpoint::here(Place::Lobby);
        let arena_file_bytes = geometry.arena_bytes + ARENA_TRAILER;
        let arena = SegmentFile::create(&name.arena(), arena_file_bytes)?;
        arena.allocate(geometry.arena_bytes, ARENA_TRAILER)?;
        failpoint::here(Place::Arena);
        let trailer = arena.map(arena_file_bytes, Access::ReadWrite)?;
        arena_superblock(&trailer)?.write(&identity(Kind::Arena, arena_file_bytes));
        // The engine does not keep the arena mapped: it never looks at the arena's bytes, and it dies faster
        // without the mapping.
        drop(trailer);
        failpoint::here(Place::ArenaMagic);
        lobby.superblock()?.write(&identity(Kind::Lobby, LOBBY_BYTES as u64));
        failpoint::here(Place::LobbyMagic);
        if !file.is_current() {
            return Err(SetupError::Removed { name: name.clone() });
        }
        engine.superblock().write(&identity(Kind::Engine, places.bytes));
        failpoint::here(Place::EngineMagic);
        tracing::info!(
            name = %name, arena_bytes = geometry.arena_bytes, slab_bytes = geometry.slab_bytes,
            arena_id = %arena_id_text(arena_id), "segments are ready"
        );
        let (engine_file, lock) = unfinished.finish();
        Ok(Segments {
            claims,
            engine,
            lobby,
            lobby_file,
            arena: Arc::new(arena),
            engine_file: Arc::new(engine_file),
            name: name.clone(),
            geometry,
            arena_id,
            start: why.map_or(Start::First, Start::Cold),
            _lock: lock,
        })
    }

    /// The engine's name.
    #[must_use]
    pub fn name(&self) -> &EngineName {
        &self.name
    }

    /// The arena's geometry.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The arena's id. No other arena ever has the same.
    #[must_use]
    pub fn arena_id(&self) -> [u64; 2] {
        self.arena_id
    }

    /// How the segments came to be.
    #[must_use]
    pub fn start(&self) -> &Start {
        &self.start
    }

    /// The arena's file, for the [allocator](crate::allocator).
    #[must_use]
    pub fn arena(&self) -> Arc<SegmentFile> {
        self.arena.clone()
    }

    /// Gives slot headers their memory, for the cache's slot table.
    #[must_use]
    pub fn table_memory(&self) -> TableMemory {
        TableMemory::new(self.engine_file.clone(), &self.geometry)
    }

    /// Looks at the clients whose deaths only a file lock tells, and marks the life words of those that have died,
    /// as the kernel would have. Costs half a microsecond for each such client; no other client is looked at.
    pub fn mark_dead_clients(&self) {
        Locks::of(&self.lobby_file, lobby::LIFE_WORDS_AT).mark_dead(&self.lobby.life_words);
    }

    /// Whether somebody holds the lock of this entry's client, for which devices write. If that cannot be found
    /// out, the answer is yes.
    #[must_use]
    pub fn holds_dma_lock(&self, entry: usize) -> bool {
        self.lobby_file.is_byte_locked(lobby::dma_lock_at(entry)).unwrap_or(true)
    }

    /// Whether somebody has taken the segments away (`kvring remove --force`). Then the engine must end: new
    /// clients cannot find it, and a successor may run already. One load.
    #[inline]
    #[must_use]
    pub fn is_retired(&self) -> bool {
        self.engine.superblock().is_retired()
    }

    /// A name of ours that no longer leads to our segment, if there is one: somebody has removed it, or put another
    /// file in its place. Then the engine must end as well, although nobody has told it. Costs three system calls,
    /// so it is not called in each turn.
    #[must_use]
    pub fn lost_name(&self) -> Option<&str> {
        let files = [&self.engine_file, &self.lobby_file, &self.arena];
        files.into_iter().find(|file| !file.is_current()).map(|file| file.name())
    }

    /// A clean end that leaves everything for a successor, as a death does. The memory stays taken until a
    /// successor comes, or `kvring remove`.
    pub fn leave(self) {
        drop(self.claims);
        futex::wake_all(self.engine.epoch().incarnation_word());
    }

    /// A clean end: retires and unlinks everything, and wakes every sleeper. Nothing of ours stays in `/dev/shm`.
    ///
    /// A name could not be removed. Everything else has been done.
    pub fn retire_and_unlink(self) -> Result<Removed, SetupError> {
        // If somebody else has retired the segments, or the engine's name leads elsewhere, the names may be a
        // successor's by now, and we remove only those that lead to our own files. (If this process were stopped
        // between that look and the unlink, for as long as a forced removal and a new start take, it would unlink
        // the successor's names. Only that can go wrong.)
        let ours = !self.is_retired() && self.engine_file.is_current();
        sweep::retire_engine(&self.engine);
        let lobby = self.lobby.superblock().map(Superblock::retire).map_err(SetupError::from);
        for retired in [lobby, sweep::retire_arena(&self.arena)] {
            if let Err(error) = retired {
                tracing::debug!(%error, "not retired");
            }
        }
        failpoint::here(Place::Retired);
        let mut sweep = Sweep::default();
        if ours {
            sweep.satellites(&self.name);
            failpoint::here(Place::SatellitesGone);
            sweep.unlink(self.engine_file.name());
        } else {
            for file in [&self.lobby_file, &*self.arena].into_iter().filter(|file| file.is_current()) {
                sweep.unlink(file.name());
            }
        }
        failpoint::here(Place::Unlinked);
        drop(self.claims);
        futex::wake_all(self.engine.epoch().incarnation_word());
        sweep.end()
    }
}

/// The superblock of a wholly mapped arena. It lies on the last page, whatever the geometry.
fn arena_superblock(mapping: &Mapping) -> Result<&Superblock, OutOfBounds> {
    let last_page = mapping.len().saturating_sub(ARENA_TRAILER as usize);
    mapping.at(last_page)
}

fn arena_id_text(id: [u64; 2]) -> String {
    format!("{:016x}{:016x}", id[1], id[0])
}

/// The clients' words, in the order in which an engine claims them. When it dies, the kernel marks the word first
/// that was claimed last. So the entries that clients take first hear of the death first, and the owner word, which
/// was claimed before all these, is marked last. (If a successor in another PID namespace has the same TID, nothing
/// of its own is left to be marked by then.)
fn client_words() -> impl Iterator<Item = usize> {
    (0..LIFE_WORDS).rev().filter(|index| *index != OWNER_WORD)
}

/// Writes down what `status` shows. A stand-in for something that this system lacks is also named in the log, once.
fn describe(engine: &EngineSegment, setup: &Setup<'_>, death_notice: DeathNotice) {
    let info = engine.info();
    let means = Means { death_notice, waiting: probe::means().waiting };
    info.stand_ins.store(means.to_bits(), Ordering::Relaxed);
    if death_notice == DeathNotice::FileLock {
        tracing::warn!(
            "no robust futexes here (gVisor? seccomp?): a file lock tells of this engine's death, which clients notice \
             within some 50 ms instead of 0.05"
        );
    }
    if means.waiting == Waiting::Slices {
        tracing::warn!(
            "no futex_waitv here (Linux before 5.16? gVisor? seccomp?): a client's death is noticed with the next beat"
        );
    }
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    info.pid.store(std::process::id(), Ordering::Relaxed);
    info.stopped.store(0, Ordering::Relaxed);
    info.beat_interval_us.store(setup.beat_interval_us, Ordering::Relaxed);
    info.started_unix_ns.store(u64::try_from(since_epoch.as_nanos()).unwrap_or(0), Ordering::Relaxed);
    store_text(&info.policy, setup.policy.as_bytes());
}
