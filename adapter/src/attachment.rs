//! One attachment: the engine's segments mapped and checked, an entry claimed, a channel that the engine reads.
//!
//! Made by the keeper alone, on its own thread (the claim belongs to that thread). An attempt that fails half-way takes
//! back what it did: the entry is given up as if its owner had died, the channel is unlinked, the mappings go.
//!
//! The *claim* ([`Claim`]) outlives an engine whose successor takes over the same arena: the keeper publishes its entry
//! again, with another nonce and channel. What the entry was writing is its own all the time.

use crate::arena::Arena;
use crate::client::Shared;
use crate::fork::ForkGuard;
use crate::gate::WriterGate;
use crate::health::Health;
use crate::link::{Link, LinkParts};
use crate::stand_ins;
use core::mem::ManuallyDrop;
use kvring_shm_abi::channel::{Channel, ChannelError};
use kvring_shm_abi::claims::{Claims, Locks};
use kvring_shm_abi::engine_segment::{self, AttachStatus, EngineSegment, OWNER_WORD, Places};
use kvring_shm_abi::epoch::Epoch;
use kvring_shm_abi::failpoint;
use kvring_shm_abi::futex::{Deadline, wait_any};
use kvring_shm_abi::life::{ClaimError, Life, LifeWord};
use kvring_shm_abi::lobby::{self, CLIENTS_MAX, EntryContent, LOBBY_BYTES, Lobby, Role};
use kvring_shm_abi::mapping::OutOfBounds;
use kvring_shm_abi::probe::{DeathNotice, Means};
use kvring_shm_abi::segment::{self, Access, SegmentError, SegmentFile};
use kvring_shm_abi::superblock::{
    ARENA_TRAILER, Geometry, Identity, Kind, Mismatch, SUPERBLOCK_BYTES, Superblock, random_u64,
};
use kvring_shm_abi::sync::{AtomicU32, Ordering};
use std::sync::Arc;
use std::time::Duration;

/// Why an attempt to attach did not succeed. The keeper tries again after all of them.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// No engine of that name.
    #[error("no kvring engine named {0} runs here; start one with `kvring serve --name {0}`")]
    NoEngine(String),
    /// Its segments are there, but their owner is dead.
    #[error("the kvring engine named {0} has died; start it again with `kvring serve --name {0}`")]
    Dead(String),
    /// The same, but it was asked to stop (`kvring serve --keep`).
    #[error(
        "the kvring engine named {0} was stopped, and has kept what it held; start it again with `kvring serve --name {0}`"
    )]
    Stopped(String),
    /// It is not ready yet.
    #[error("the kvring engine is starting, and takes over what it held before (incarnation {0})")]
    Recovering(u32),
    /// It found its own invariants broken.
    #[error(
        "the kvring engine named {0} found an error in its own tables and stopped serving; see its log, and restart it"
    )]
    Unhealthy(String),
    /// It was restarted while we attached.
    #[error("the kvring engine was restarted during the attempt")]
    Restarted,
    /// Another release or build, or half-created.
    #[error("segment {segment}: {mismatch}")]
    Mismatch {
        /// Which segment.
        segment: String,
        /// What differs.
        mismatch: Mismatch,
    },
    /// The arena that we hold a claim on is not this name's any more: the engine was started anew, or removed.
    #[error("the kvring engine named {0} was started anew, or removed")]
    AnotherStart(String),
    /// Two segments of different cold starts: a restart was half-way. Mends itself.
    #[error("segment {0} belongs to another start of the kvring engine")]
    OtherArena(String),
    /// All entries are taken.
    #[error(
        "the kvring engine's client table is full: all {CLIENTS_MAX} entries are taken; `kvring status` lists them"
    )]
    TableFull,
    /// The engine did not answer in time.
    #[error("the kvring engine did not answer within {} ms", .0.as_millis())]
    TimedOut(Duration),
    /// The client is being shut down.
    #[error("the client is being shut down")]
    Cancelled,
    /// Somebody has written into the word that makes the entry ours. Mends itself, with another entry.
    #[error("the claim on entry {0} was overwritten by another process")]
    ClaimLost(usize),
    /// The engine refused.
    #[error("the kvring engine refused the connection: {}", .0.as_str())]
    Refused(AttachStatus),
    /// A segment could not be opened.
    #[error(transparent)]
    Segment(#[from] SegmentError),
    /// A segment is shorter than its own geometry says.
    #[error(transparent)]
    Bounds(#[from] OutOfBounds),
    /// The channel could not be made.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// The kernel has no randomness, or refuses a file lock.
    #[error("{what}: {error}")]
    System {
        /// The call.
        what: &'static str,
        /// What it said.
        error: std::io::Error,
    },
}

impl AttachError {
    /// The health that this amounts to.
    #[must_use]
    pub fn health(&self) -> Health {
        match self {
            AttachError::NoEngine(_) => Health::Absent,
            AttachError::Dead(_) | AttachError::Stopped(_) => Health::Dead,
            AttachError::Recovering(_) => Health::Recovering,
            AttachError::Unhealthy(_) => Health::Unhealthy,
            AttachError::Mismatch { mismatch: Mismatch::Incomplete, .. }
            | AttachError::Restarted
            | AttachError::AnotherStart(_)
            | AttachError::ClaimLost(_)
            | AttachError::OtherArena(_) => Health::Attaching,
            AttachError::TimedOut(_) => Health::Stalled,
            AttachError::Cancelled => Health::ShutDown,
            AttachError::Mismatch { .. } => Health::Incompatible(self.to_string()),
            other => Health::Refused(other.to_string()),
        }
    }
}

/// What an attachment is made of.
pub(crate) struct Attached {
    pub(crate) link: Arc<Link>,
    pub(crate) arena: Option<Arena>,
    pub(crate) identity: Identity,
    pub(crate) writers: Arc<WriterGate>,
}

/// One attachment. Shared by the adapters that use it; unmapped when the last of them lets go.
pub(crate) struct Attachment {
    attached: ManuallyDrop<Attached>,
    fork: ForkGuard,
}

impl core::ops::Deref for Attachment {
    type Target = Attached;
    fn deref(&self) -> &Attached {
        &self.attached
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        // A forked child inherited the handle but not the mappings: unmapping the same addresses there would hit
        // whatever the child has put in their place.
        if self.fork.is_ours() {
            // SAFETY: dropped once, here.
            unsafe { ManuallyDrop::drop(&mut self.attached) };
        }
    }
}

/// The engine's own segment, opened read-only and checked: what `status` needs, and the first step of attaching.
pub struct EngineView {
    /// The segment.
    pub segment: EngineSegment,
    /// Its superblock.
    pub identity: Identity,
    file: Arc<SegmentFile>,
}

impl EngineView {
    /// Opens the segment of the engine of that name, alive or not.
    pub fn open(name: &segment::EngineName) -> Result<EngineView, AttachError> {
        let segment = name.engine_segment();
        let file = match SegmentFile::open(&segment, Access::ReadOnly) {
            Err(SegmentError::NotFound(_)) => return Err(AttachError::NoEngine(name.to_string())),
            other => other?,
        };
        let mismatch = |mismatch| AttachError::Mismatch { segment: segment.clone(), mismatch };
        let length = file.len()?;
        if length < SUPERBLOCK_BYTES as u64 {
            return Err(mismatch(Mismatch::Incomplete));
        }
        // The superblock first: the rest follows from the geometry in it.
        let head = file.map(SUPERBLOCK_BYTES as u64, Access::ReadOnly)?;
        let identity = head.at::<Superblock>(0)?.read(Kind::Engine, length).map_err(mismatch)?;
        let expected = Places::of(&identity.geometry).bytes;
        if length < expected {
            return Err(mismatch(Mismatch::Size { expected, found: length }));
        }
        let mapping = Arc::new(file.map(expected, Access::ReadOnly)?);
        let segment = EngineSegment::new(mapping, &identity.geometry)?;
        Ok(EngineView { segment, identity, file: Arc::new(file) })
    }

    /// Does the process that owns the segment live?
    #[must_use]
    pub fn owner_lives(&self) -> bool {
        let locks = Locks::of(&self.file, engine_segment::LIFE_WORDS_AT);
        matches!(locks.life(&self.segment.life_words, OWNER_WORD), Life::Alive { .. })
    }

    /// How an engine that has ended came to its end; `None`: it lives. `name`: its own.
    #[must_use]
    pub fn end(&self, name: &segment::EngineName) -> Option<AttachError> {
        let name = name.to_string();
        if self.owner_lives() {
            None
        } else if self.segment.superblock().is_retired() {
            // It has ended cleanly, or been removed, since we opened it by name.
            Some(AttachError::NoEngine(name))
        } else if self.segment.info().stopped.load(Ordering::Relaxed) != 0 {
            Some(AttachError::Stopped(name))
        } else {
            Some(AttachError::Dead(name))
        }
    }

    /// The incarnation of an engine that serves; why it does not, else. `name`: its own.
    pub fn serving(&self, name: &segment::EngineName) -> Result<u32, AttachError> {
        if let Some(end) = self.end(name) {
            return Err(end);
        }
        let incarnation = self.segment.epoch().incarnation();
        if self.segment.info().unhealthy.load(Ordering::Relaxed) != 0 {
            return Err(AttachError::Unhealthy(name.to_string()));
        }
        if !Epoch::serves(incarnation) {
            return Err(AttachError::Recovering(incarnation));
        }
        Ok(incarnation)
    }

    /// How the engine waits, and what tells of its death, as it says itself.
    #[must_use]
    pub fn means(&self) -> Means {
        Means::from_bits(self.segment.info().stand_ins.load(Ordering::Relaxed))
    }

    /// The file of that lobby, for the locks of clients whose kernel marks no life word.
    pub fn open_lobby_file(&self, name: &segment::EngineName) -> Result<SegmentFile, AttachError> {
        open_lobby_file(name, &self.identity)
    }

    /// The lobby of the same start of the engine.
    pub fn open_lobby(&self, name: &segment::EngineName) -> Result<Lobby, AttachError> {
        let mapping = Arc::new(segment::open_shared(&name.lobby(), LOBBY_BYTES)?);
        let length = mapping.len() as u64;
        let lobby = Lobby::new(mapping)?;
        let block = lobby.superblock()?;
        check_sibling(block, Kind::Lobby, length, &name.lobby(), &self.identity)?;
        Ok(lobby)
    }
}

/// The file of the lobby of the same start as an engine's segment.
pub(crate) fn open_lobby_file(
    name: &segment::EngineName,
    engine: &Identity,
) -> Result<SegmentFile, AttachError> {
    let file = SegmentFile::open(&name.lobby(), Access::ReadWrite)?;
    let head = file.map(SUPERBLOCK_BYTES as u64, Access::ReadOnly)?;
    check_sibling(head.at(0)?, Kind::Lobby, file.len()?, &name.lobby(), engine)?;
    Ok(file)
}

fn check_sibling(
    block: &Superblock,
    kind: Kind,
    length: u64,
    segment: &str,
    engine: &Identity,
) -> Result<(), AttachError> {
    let identity = block
        .read(kind, length)
        .map_err(|mismatch| AttachError::Mismatch { segment: segment.to_owned(), mismatch })?;
    if identity.arena_id == engine.arena_id && identity.geometry == engine.geometry {
        Ok(())
    } else {
        Err(AttachError::OtherArena(segment.to_owned()))
    }
}

fn open_arena(name: &segment::EngineName, engine: &Identity) -> Result<Arena, AttachError> {
    let Geometry { arena_bytes, .. } = engine.geometry;
    let bytes = arena_bytes + ARENA_TRAILER;
    let file = SegmentFile::open(&name.arena(), Access::ReadWrite)?;
    let mapping = Arc::new(file.map(bytes, Access::ReadWrite)?);
    check_sibling(mapping.at(arena_bytes as usize)?, Kind::Arena, bytes, &name.arena(), engine)?;
    Ok(Arena::new(mapping, arena_bytes))
}

/// An entry of the lobby that is ours as long as this lives: dropping it gives the entry up, and the engine frees what it
/// was writing. So that is done only after the last copy into the arena has ended (`writers`).
pub(crate) struct Claim {
    claims: Claims,
    entry: usize,
    lobby: Lobby,
    engine: EngineSegment,
    arena: Option<Arena>,
    identity: Identity,
    pub(crate) writers: Arc<WriterGate>,
    /// Was it ever attached? Then what an engine of this arena has for its entry may be ours.
    pub(crate) used: bool,
}

impl Claim {
    fn new(shared: &Shared, view: &EngineView) -> Result<Claim, AttachError> {
        let name = &shared.checked.name;
        let lobby = view.open_lobby(name)?;
        let arena = match shared.role {
            Role::Worker => Some(open_arena(name, &view.identity)?),
            Role::Scheduler => None,
        };
        // Of the same lobby, by its arena id: a name may lead to another one by now.
        let file = || {
            view.open_lobby_file(name).map_err(|error| match error {
                AttachError::Segment(error) => error,
                _ => SegmentError::NotFound(name.lobby()),
            })
        };
        let mut claims = Claims::register(lobby.life_words.clone(), lobby::LIFE_WORDS_AT, file)?;
        let entry = claim(&mut claims)?;
        failpoint::here("client.claimed");
        stand_ins::told(claims.notice());
        let (engine, identity) = (view.segment.clone(), view.identity);
        // Before anything is published, and so before the engine gives it a slot.
        shared.dma().claimed(name, &identity, &lobby, entry);
        Ok(Claim { claims, entry, lobby, engine, arena, identity, writers: Arc::default(), used: false })
    }

    /// Has its arena been replaced or removed? Then nobody comes back to it.
    fn is_retired(&self) -> bool {
        self.engine.superblock().is_retired()
    }

    /// Is the entry still ours? Peers can write there.
    pub(crate) fn holds(&self) -> bool {
        self.claims.holds(self.entry)
    }

    /// For a sleep until something becomes of its engine: the word, and its value.
    pub(crate) fn incarnation(&self) -> (&AtomicU32, u32) {
        (self.engine.epoch().incarnation_word(), self.engine.epoch().incarnation())
    }
}

impl AttachError {
    /// Is there no room for a channel at the moment?
    pub(crate) fn is_no_room(&self) -> bool {
        matches!(self, AttachError::Channel(ChannelError::Segment(SegmentError::NoSpace { .. })))
    }

    /// Is the claim of no further use? Else the same one is tried again: with the next engine, or the next moment.
    pub(crate) fn ends_claim(&self) -> bool {
        match self {
            AttachError::Dead(_)
            | AttachError::Stopped(_)
            // What it holds is not believed, but can be loaded: each load is checked. Its successor starts cold.
            | AttachError::Unhealthy(_)
            | AttachError::Recovering(_)
            | AttachError::Restarted
            | AttachError::TimedOut(_)
            | AttachError::Refused(AttachStatus::Stale)
            | AttachError::System { .. } => false,
            // No room for a channel, or no descriptor, at the moment.
            AttachError::Channel(_) => false,
            AttachError::Segment(SegmentError::Os { .. } | SegmentError::Crate { .. }) => false,
            _ => true,
        }
    }
}

/// Attaches, on the keeper's thread: with the claim that is held, or a new one, which is then held.
pub(crate) fn attach(shared: &Shared, held: &mut Option<Claim>) -> Result<Attachment, AttachError> {
    let name = &shared.checked.name;
    if held.as_ref().is_some_and(Claim::is_retired) {
        return Err(AttachError::AnotherStart(name.to_string()));
    }
    let view = EngineView::open(name)?;
    if held.as_ref().is_some_and(|claim| claim.identity.arena_id != view.identity.arena_id) {
        return Err(AttachError::AnotherStart(name.to_string()));
    }
    let incarnation = view.serving(name)?;
    let claim = match held {
        Some(claim) => claim,
        None => held.insert(Claim::new(shared, &view)?),
    };
    publish(shared, claim, &view, incarnation)
}

/// Publishes a claim to the engine of this incarnation, and waits for its answer.
fn publish(
    shared: &Shared,
    claim: &mut Claim,
    view: &EngineView,
    incarnation: u32,
) -> Result<Attachment, AttachError> {
    let checked = &shared.checked;
    let (name, entry, identity) = (&checked.name, claim.entry, claim.identity);
    let nonce = random_u64().map_err(|error| AttachError::System { what: "random nonce", error })?;
    let (arena_id, geometry) = (identity.arena_id, identity.geometry);
    let channel = Channel::create(name, entry, nonce, checked.payload_words, arena_id, geometry)?;
    failpoint::here("client.channel");
    let content = EntryContent {
        role: shared.role as u32,
        nonce,
        incarnation,
        pid: std::process::id(),
        payload_words: checked.payload_words,
        name: checked.options.client.clone(),
    };
    claim.lobby.claim(entry, &content);
    failpoint::here("client.published");
    let answered = loop {
        match wait_for_answer(shared, claim, view, nonce, incarnation) {
            // What this entry is writing keeps it ours, so there is no other to try with; and a claim is judged once.
            Err(AttachError::TimedOut(_)) if claim.used => shared.set_suspended(Health::Stalled),
            answered => break answered,
        }
    };
    // Both sides map it now, or never will: without a name it cannot be left behind.
    segment::unlink(&name.client(entry, nonce));
    answered?;
    failpoint::here("client.attached");
    claim.used = true;
    let life = claim.engine.life_words[entry].life();
    let by_lock = matches!(life, Life::Alive { notice: DeathNotice::FileLock, .. });
    let link = Link::new(LinkParts {
        channel,
        lobby: claim.lobby.clone(),
        engine: claim.engine.clone(),
        lock: by_lock.then(|| view.file.clone()),
        ledger: shared.ledger.clone(),
        entry,
        incarnation,
        nonce,
        stall_after: checked.options.stall_after,
        spin: checked.spin,
    })
    .ok_or(AttachError::TableFull)?;
    let (arena, writers) = (claim.arena.clone(), claim.writers.clone());
    let attached = Attached { link: Arc::new(link), arena, identity, writers };
    Ok(Attachment { attached: ManuallyDrop::new(attached), fork: shared.fork })
}

fn claim(claims: &mut Claims) -> Result<usize, AttachError> {
    for entry in 0..CLIENTS_MAX {
        match claims.claim(entry) {
            Ok(()) => return Ok(entry),
            Err(ClaimError::Taken(_) | ClaimError::Locked) => {}
            Err(ClaimError::Lock(errno)) => {
                return Err(AttachError::System { what: "a file lock", error: errno.into() });
            }
            Err(ClaimError::NoSuchWord { .. }) => break,
        }
    }
    Err(AttachError::TableFull)
}

/// The longest sleep without a look at the file lock of an engine whose kernel marks no words.
const LOCK_EVERY: Duration = Duration::from_millis(50);

fn wait_for_answer(
    shared: &Shared,
    claim: &Claim,
    view: &EngineView,
    nonce: u64,
    incarnation: u32,
) -> Result<(), AttachError> {
    // The same inode as the claim's: it has the same arena id.
    let (engine, entry) = (&view.segment, claim.entry);
    let timeout = shared.checked.options.attach_timeout;
    let deadline = Deadline::after(timeout);
    let life = &engine.life_words[entry];
    loop {
        let control = shared.control.load(Ordering::Acquire);
        if shared.stop.load(Ordering::Acquire) {
            return Err(AttachError::Cancelled);
        }
        let (word, value) = engine.attach[entry].word();
        match engine.attach[entry].read(nonce) {
            AttachStatus::None => {}
            AttachStatus::Attached => return Ok(()),
            refused => return Err(AttachError::Refused(refused)),
        }
        // An engine that finds it unclaimed does not look at what we publish.
        if !claim.claims.holds(entry) {
            return Err(AttachError::ClaimLost(entry));
        }
        let raw = life.raw();
        let (lives, by_lock) = match LifeWord::interpret(raw) {
            Life::Alive { notice, .. } => (true, notice == DeathNotice::FileLock),
            Life::Dead | Life::Unclaimed => (false, false),
        };
        // The incarnation is looked at after the word: a successor makes it odd before it revives the word.
        let is_dead =
            !lives || Locks::of(&view.file, engine_segment::LIFE_WORDS_AT).owner_is_dead(entry, raw);
        if engine.epoch().incarnation() != incarnation {
            return Err(AttachError::Restarted);
        }
        if is_dead {
            // The kernel marks an engine's words one after the other: that of its owner may not be marked yet.
            let name = &shared.checked.name;
            return Err(view.end(name).unwrap_or_else(|| AttachError::Dead(name.to_string())));
        }
        if deadline.passed() {
            return Err(AttachError::TimedOut(timeout));
        }
        wait_any(
            &[
                (word, value),
                (life.futex(), raw),
                (engine.epoch().incarnation_word(), incarnation),
                (&shared.control, control),
            ],
            if by_lock { Deadline(deadline.0.min(Deadline::after(LOCK_EVERY).0)) } else { deadline },
        );
    }
}
