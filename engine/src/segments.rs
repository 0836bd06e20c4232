//! The engine's segments: made at its start, given up at its end.
//!
//! **Who may.** Starts of one name are put in order by a lock on the engine segment's *file*, held for the engine's
//! life (`takeover`); that an engine *lives* is told by its owner word alone (and where the kernel
//! marks no words, by the file lock that goes with the word). A living engine is never replaced.
//!
//! **In which order.** The engine's file comes first and goes last, the magics are written last and the engine's last
//! of all: so whoever holds the lock on the current engine file may do with the other segments what it likes, and a
//! death at any line leaves something that the next start recognises as half-made and sweeps (`sweep`).
//!
//! **Refuse first.** A start claims the name ([`Claim`]) and looks at everything that it could be refused for, before it
//! changes anything: names that are not ours, an arena that does not fit beside what a sweep gives back, and, in
//! `engine`, limits. So whoever misspells `--arena` still has the cache that the dead engine left.
//!
//! **Warm or cold.** What a dead predecessor left is taken over as it is, if it is whole, of this build, boot and
//! geometry, and its recovery has not failed twice: the same inodes, which living clients still map. In this order: the
//! owner word, the odd incarnation, the clients' words; so a client that sees its word alive again sees another
//! incarnation too.
//!
//! **Never in place.** Else it is marked retired, its sleepers woken, and unlinked; the new segments are new inodes.

#[cfg(test)]
mod deaths;
mod error;
mod slot_memory;
#[cfg(test)]
mod strangers;
pub(crate) mod sweep;
mod takeover;
#[cfg(test)]
mod tests;

pub use error::SetupError;
pub use slot_memory::SlotMemory;
pub use sweep::{Removed, remove};
pub use takeover::ColdStart;

use crate::preflight::{self, Room};
use crate::stats;
use kvring_shm_abi::claims::{Claims, Locks};
use kvring_shm_abi::engine_segment::{
    EngineSegment, LIFE_WORDS, LIFE_WORDS_AT, OWNER_WORD, Places, store_text,
};
use kvring_shm_abi::failpoint;
use kvring_shm_abi::futex;
use kvring_shm_abi::lobby::{self, LOBBY_BYTES, Lobby};
use kvring_shm_abi::mapping::{Mapping, OutOfBounds};
use kvring_shm_abi::probe::{self, DeathNotice, Means, Waiting};
use kvring_shm_abi::segment::{self, Access, EngineName, SegmentFile, SegmentLock};
use kvring_shm_abi::superblock::{ARENA_TRAILER, Geometry, Identity, Kind, Superblock, boot_id, random_u64};
use kvring_shm_abi::sync::Ordering;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use sweep::Sweep;
use takeover::{Claimed, Inherited};

/// The time between two looks for room, by a start that has swept a predecessor.
const ROOM_EVERY: Duration = Duration::from_millis(20);

/// What an engine is to be.
#[derive(Clone, Debug)]
pub struct Setup<'a> {
    /// Its name.
    pub name: &'a EngineName,
    /// Its arena.
    pub geometry: Geometry,
    /// Would a predecessor's do as well, whatever it is? So where nobody has asked for a size.
    pub any_geometry: bool,
    /// How often its beat moves at least, in microseconds: for `status`.
    pub beat_interval_us: u32,
    /// The eviction policy's name: for `status`.
    pub policy: &'a str,
    /// How long to wait for another start, or for a predecessor that is still exiting.
    pub wait: Duration,
    /// Why nothing of a predecessor's is to be kept; `None`: what can be kept is.
    pub cold: Option<ColdStart>,
}

/// How an engine's segments came to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Start {
    /// There was nothing of that name.
    First,
    /// What there was has been swept.
    Cold(ColdStart),
    /// A dead predecessor's, taken over.
    Warm,
}

/// Everything in shared memory that the service thread needs. It belongs to the thread that made it (the kernel ties
/// the life words to that thread, and a thread has one such list), and a drop without
/// [`Segments::retire_and_unlink`] looks like the engine's death.
pub struct Segments {
    // Dropped first: the life words are given up while everything else still stands.
    claims: Claims,
    /// Views of the engine's own segment.
    pub engine: EngineSegment,
    /// Views of the lobby.
    pub lobby: Lobby,
    /// For the locks of clients whose kernel marks no life word.
    lobby_file: SegmentFile,
    arena: Arc<SegmentFile>,
    engine_file: Arc<SegmentFile>,
    name: EngineName,
    geometry: Geometry,
    arena_id: [u64; 2],
    start: Start,
    // Dropped last: while the lock is held, nobody else sweeps.
    _lock: SegmentLock,
}

/// The name is claimed: nobody else starts or removes an engine of this name meanwhile. Nothing has been changed yet, and
/// dropping it changes nothing.
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

    /// The arena's geometry: the wanted one, or that of the predecessor's that is taken over.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        match &self.claimed {
            Claimed::Warm(inherited) => inherited.identity.geometry,
            Claimed::Fresh(_) | Claimed::Stale(_) => self.setup.geometry,
        }
    }

    /// Takes over what a dead predecessor left, or sweeps it and makes new segments. The incarnation is odd until the
    /// service loop begins to serve. Call it on the service thread.
    ///
    /// # Errors
    /// Somebody else was faster with a name that we had just swept, or there is no memory to begin with after all.
    pub fn take(self) -> Result<Segments, SetupError> {
        let Claim { setup, mut claimed } = self;
        // The first reason is the one that says something: later rounds only meet other starters' traces.
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

/// What the clients of a swept predecessor still map is free as soon as they let go: they have been woken, and do so when their
/// copies have ended; one that is stopped does so later. Waits for as much as a start needs before it serves, however long
/// that takes: nothing would be won by giving up, now that the cache is gone. The rest is the allocator's, which waits as well.
fn wait_for_room(geometry: &Geometry) {
    let mut said = false;
    while let Err(error) = preflight::check_first(geometry, &Room::now()) {
        if !said {
            tracing::warn!(%error, "waiting for the clients of the earlier engine to let go of its arena");
            said = true;
        }
        std::thread::sleep(ROOM_EVERY);
    }
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
        failpoint::here("recovery.owner");
        let words = |claims: &mut Claims| client_words().try_for_each(|index| claims.take_over(index));
        if failpoint::broken("odd before the words") {
            words(&mut claims)?;
            failpoint::here("recovery.early words");
        }
        // Before anything else changes. Whoever sleeps on it hears of the successor at once.
        engine.epoch().begin_recovery();
        futex::wake_all(engine.epoch().incarnation_word());
        failpoint::here("recovery.odd");
        let begun = engine.info().recoveries.load(Ordering::Relaxed);
        engine.info().recoveries.store(begun.saturating_add(1), Ordering::Relaxed);
        failpoint::here("recovery.counted");
        if !failpoint::broken("odd before the words") {
            words(&mut claims)?;
        }
        failpoint::here("recovery.words");
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
        failpoint::here("claimed");
        if why.is_some() {
            wait_for_room(&geometry);
        }
        let places = Places::of(&geometry);
        let file = unfinished.file();
        // Allocated before it gets its length: no peer ever maps a page of it that is not there.
        file.allocate(0, places.slots_at)?;
        failpoint::here("allocated");
        file.grow(places.bytes)?;
        let engine = EngineSegment::new(Arc::new(file.map(places.bytes, Access::ReadWrite)?), &geometry)?;
        engine.epoch().begin_recovery();
        let mut claims = Claims::register(engine.life_words.clone(), LIFE_WORDS_AT, || file.reopen())?;
        // The owner word first: from here on our death is noticed.
        claims.claim(OWNER_WORD)?;
        failpoint::here("owned");
        for index in client_words() {
            claims.claim(index)?;
        }
        describe(&engine, setup, claims.notice());
        stats::initialise(&engine.stats);
        failpoint::here("described");

        let arena_id = [random_u64().map_err(SetupError::Random)?, random_u64().map_err(SetupError::Random)?];
        let identity =
            |kind, segment_bytes| Identity { kind, segment_bytes, arena_id, boot_id: boot_id(), geometry };
        let lobby = Lobby::new(Arc::new(segment::create_shared(&name.lobby(), LOBBY_BYTES)?))?;
        let lobby_file = SegmentFile::open(&name.lobby(), Access::ReadWrite)?;
        failpoint::here("lobby");
        let arena_file_bytes = geometry.arena_bytes + ARENA_TRAILER;
        let arena = SegmentFile::create(&name.arena(), arena_file_bytes)?;
        arena.allocate(geometry.arena_bytes, ARENA_TRAILER)?;
        failpoint::here("arena");
        let trailer = arena.map(arena_file_bytes, Access::ReadWrite)?;
        arena_superblock(&trailer)?.write(&identity(Kind::Arena, arena_file_bytes));
        // The engine does not keep the arena mapped: it never looks at its bytes, and dies faster without.
        drop(trailer);
        failpoint::here("arena magic");
        lobby.superblock()?.write(&identity(Kind::Lobby, LOBBY_BYTES as u64));
        failpoint::here("lobby magic");
        if !file.is_current() {
            return Err(SetupError::Removed { name: name.clone() });
        }
        engine.superblock().write(&identity(Kind::Engine, places.bytes));
        failpoint::here("engine magic");
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

    /// Names this arena; no other ever has the same.
    #[must_use]
    pub fn arena_id(&self) -> [u64; 2] {
        self.arena_id
    }

    /// How they came to be.
    #[must_use]
    pub fn start(&self) -> &Start {
        &self.start
    }

    /// The arena's file, for the [allocator](crate::allocator).
    #[must_use]
    pub fn arena(&self) -> Arc<SegmentFile> {
        self.arena.clone()
    }

    /// What gives slot headers their memory, for the cache's slot table.
    #[must_use]
    pub fn slot_memory(&self) -> SlotMemory {
        SlotMemory::new(self.engine_file.clone(), &self.geometry)
    }

    /// Marks the dead among the clients whose deaths a file lock tells: their words say so from here on, as if the
    /// kernel had marked them. Half a microsecond for each such client; nothing is asked about others.
    pub fn mark_dead_clients(&self) {
        Locks::of(&self.lobby_file, lobby::LIFE_WORDS_AT).mark_dead(&self.lobby.life_words);
    }

    /// Does somebody hold the lock of a client for which devices write? What cannot be asked is not known: yes.
    #[must_use]
    pub fn holds_dma_lock(&self, entry: usize) -> bool {
        self.lobby_file.is_byte_locked(lobby::dma_lock_at(entry)).unwrap_or(true)
    }

    /// Has somebody taken the segments away (`kvring remove --force`)? Then the engine must end: new clients cannot
    /// find it, and a successor may run already. One load.
    #[inline]
    #[must_use]
    pub fn is_retired(&self) -> bool {
        self.engine.superblock().is_retired()
    }

    /// A name of ours that leads to our segment no more, if there is one: somebody has removed it, or put another file in its
    /// place. Then the engine must end as well, although nobody has told it: three system calls, so not in each turn.
    #[must_use]
    pub fn lost_name(&self) -> Option<&str> {
        let files = [&self.engine_file, &self.lobby_file, &self.arena];
        files.into_iter().find(|file| !file.is_current()).map(|file| file.name())
    }

    /// A clean end that leaves everything for a successor, as a death does. The memory stays taken until that comes, or
    /// `kvring remove`.
    pub fn leave(self) {
        drop(self.claims);
        futex::wake_all(self.engine.epoch().incarnation_word());
    }

    /// A clean end: everything is retired, unlinked, and every sleeper woken. Nothing of ours stays in `/dev/shm`.
    ///
    /// # Errors
    /// A name could not be removed; everything else has been done all the same.
    pub fn retire_and_unlink(self) -> Result<Removed, SetupError> {
        // Retired by somebody else, or the engine's name leads elsewhere: then the names may be a successor's by now, and only
        // those that lead to our own files are ours to remove. (A process that is stopped between such a look and the unlink, for
        // as long as a forced removal and a new start take, would unlink the successor's names. Nothing short of that does.)
        let ours = !self.is_retired() && self.engine_file.is_current();
        sweep::retire_engine(&self.engine);
        let lobby = self.lobby.superblock().map(Superblock::retire).map_err(SetupError::from);
        for retired in [lobby, sweep::retire_arena(&self.arena)] {
            if let Err(error) = retired {
                tracing::debug!(%error, "not retired");
            }
        }
        failpoint::here("retired");
        let mut sweep = Sweep::default();
        if ours {
            sweep.satellites(&self.name);
            failpoint::here("satellites gone");
            sweep.unlink(self.engine_file.name());
        } else {
            for file in [&self.lobby_file, &*self.arena].into_iter().filter(|file| file.is_current()) {
                sweep.unlink(file.name());
            }
        }
        failpoint::here("unlinked");
        drop(self.claims);
        futex::wake_all(self.engine.epoch().incarnation_word());
        sweep.end()
    }
}

/// The superblock of a wholly mapped arena: on its last page, whatever its geometry.
fn arena_superblock(mapping: &Mapping) -> Result<&Superblock, OutOfBounds> {
    let last_page = mapping.len().saturating_sub(ARENA_TRAILER as usize);
    mapping.at(last_page)
}

fn arena_id_text(id: [u64; 2]) -> String {
    format!("{:016x}{:016x}", id[1], id[0])
}

/// The clients' words, in the order in which an engine claims them. At its death the kernel marks the last one first: so
/// the entries that clients take first hear of it first, and the owner word, which is claimed before all these, is marked
/// last. (Where a successor has the same TID, in another PID namespace, nothing of its own is left to be marked then.)
fn client_words() -> impl Iterator<Item = usize> {
    (0..LIFE_WORDS).rev().filter(|index| *index != OWNER_WORD)
}

/// What `status` shows. What stands in for something that this system lacks is said in the log as well, once.
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
