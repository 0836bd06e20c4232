//! One attachment: the engine's segments mapped and checked, an entry claimed, a channel that the engine reads.
//!
//! Only the keeper makes one, on its own thread, because the claim belongs to that thread. An attempt that fails
//! half-way undoes what it did: it gives the entry up as if its owner had died, unlinks the channel, and unmaps what it
//! had mapped.
//!
//! The *claim* ([`Claim`]) outlives an engine whose successor takes over the same arena: the keeper publishes its entry
//! again, with another nonce and channel. The slots that the entry is writing stay its own all the time.

use crate::arena::Arena;
use crate::dma::Dma;
use crate::engine_view::{EngineView, open_arena};
use crate::error::AttachError;
use crate::fork::ForkGuard;
use crate::gate::WriterGate;
use crate::link::{Link, LinkParts};
use crate::options::Checked;
use crate::stand_ins;
use core::mem::ManuallyDrop;
use kvring_shm_abi::channel::Channel;
use kvring_shm_abi::claims::{Claims, Locks};
use kvring_shm_abi::engine_segment::{self, AttachStatus, EngineSegment};
use kvring_shm_abi::failpoint::{self, Place};
use kvring_shm_abi::futex::{Deadline, wait_any};
use kvring_shm_abi::life::{ClaimError, Life, LifeWord};
use kvring_shm_abi::lobby::{self, CLIENTS_MAX, EntryContent, Lobby, Role};
use kvring_shm_abi::means::DeathNotice;
use kvring_shm_abi::segment::{self, SegmentError};
use kvring_shm_abi::superblock::{Identity, random_u64};
use kvring_shm_abi::sync::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// The parts of an attachment.
pub(crate) struct Attached {
    pub(crate) link: Arc<Link>,
    pub(crate) arena: Option<Arena>,
    pub(crate) identity: Identity,
    pub(crate) writers: Arc<WriterGate>,
}

/// One attachment. Its users share it; it is unmapped when the last of them drops it.
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
        // A forked child inherits this handle but not the mappings: to unmap these addresses there would hit whatever
        // the child has mapped in their place.
        if self.fork.is_ours() {
            // SAFETY: this is the only place that drops it, and `drop` runs once.
            unsafe { ManuallyDrop::drop(&mut self.attached) };
        }
    }
}

/// An entry of the lobby that is ours as long as this lives. Dropping it gives the entry up, and the engine then frees
/// the slots that the entry was writing. So drop it only after the last copy into the arena has ended (`writers`).
pub(crate) struct Claim {
    claims: Claims,
    entry: usize,
    lobby: Lobby,
    engine: EngineSegment,
    arena: Option<Arena>,
    identity: Identity,
    pub(crate) writers: Arc<WriterGate>,
    /// Has an engine ever accepted it? If so, engines of this arena may hold slots and leases of ours under its entry.
    pub(crate) used: bool,
}

impl Claim {
    fn new(attempt: &Attempt<'_>, view: &EngineView) -> Result<Claim, AttachError> {
        let name = &attempt.checked.name;
        let lobby = view.open_lobby(name)?;
        let arena = match attempt.role {
            Role::Worker => Some(open_arena(name, &view.identity)?),
            Role::Scheduler => None,
        };
        // Opens the file by name and checks its arena id: the name may by now lead to the lobby of another start.
        let file = || {
            view.open_lobby_file(name).map_err(|error| match error {
                AttachError::Segment(error) => error,
                _ => SegmentError::NotFound(name.lobby()),
            })
        };
        let mut claims = Claims::register(lobby.life_words.clone(), lobby::LIFE_WORDS_AT, file)?;
        let entry = claim(&mut claims)?;
        failpoint::here(Place::ClientClaimed);
        stand_ins::told(claims.notice());
        let (engine, identity) = (view.segment.clone(), view.identity);
        // Before anything is published, and so before the engine can grant this entry a slot.
        attempt.dma.lock().unwrap_or_else(PoisonError::into_inner).claimed(name, &identity, &lobby, entry);
        Ok(Claim { claims, entry, lobby, engine, arena, identity, writers: Arc::default(), used: false })
    }

    /// Has its arena been replaced or removed? If so, no engine will ever serve it again.
    fn is_retired(&self) -> bool {
        self.engine.superblock().is_retired()
    }

    /// Is the entry still ours? Any peer can overwrite its life word.
    pub(crate) fn holds(&self) -> bool {
        self.claims.holds(self.entry)
    }

    /// The incarnation's word and its value, to sleep until that changes.
    pub(crate) fn incarnation(&self) -> (&AtomicU32, u32) {
        (self.engine.epoch().incarnation_word(), self.engine.epoch().incarnation())
    }
}

/// What the keeper passes to an attempt to attach.
pub(crate) struct Attempt<'a> {
    pub(crate) checked: &'a Checked,
    pub(crate) role: Role,
    pub(crate) fork: ForkGuard,
    pub(crate) dma: &'a Mutex<Dma>,
    /// The keeper's futex, which ends every sleep of the attempt.
    pub(crate) control: &'a AtomicU32,
    /// Set when the client is being shut down.
    pub(crate) stop: &'a AtomicBool,
    /// Called each time that the engine has not answered in time and the attempt goes on waiting.
    pub(crate) on_stall: &'a dyn Fn(),
}

/// Attaches, on the keeper's thread, with the claim in `held`, or with a new one, which it leaves there.
pub(crate) fn attach(attempt: &Attempt<'_>, held: &mut Option<Claim>) -> Result<Attachment, AttachError> {
    let name = &attempt.checked.name;
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
        None => held.insert(Claim::new(attempt, &view)?),
    };
    publish(attempt, claim, &view, incarnation)
}

/// Publishes a claim to the engine of this incarnation, and waits for its answer.
fn publish(
    attempt: &Attempt<'_>,
    claim: &mut Claim,
    view: &EngineView,
    incarnation: u32,
) -> Result<Attachment, AttachError> {
    let checked = attempt.checked;
    let (name, entry, identity) = (&checked.name, claim.entry, claim.identity);
    let nonce = random_u64().map_err(|error| AttachError::System { what: "random nonce", error })?;
    let (arena_id, geometry) = (identity.arena_id, identity.geometry);
    let channel = Channel::create(name, entry, nonce, checked.payload_words, arena_id, geometry)?;
    failpoint::here(Place::ClientChannel);
    let content = EntryContent {
        role: attempt.role as u32,
        nonce,
        incarnation,
        pid: std::process::id(),
        payload_words: checked.payload_words,
        name: checked.options.client.clone(),
    };
    claim.lobby.claim(entry, &content);
    failpoint::here(Place::ClientPublished);
    let answered = loop {
        match wait_for_answer(attempt, claim, view, nonce, incarnation) {
            // Wait on: this entry holds our slots, so no other one would do, and an engine judges a claim only once.
            Err(AttachError::TimedOut(_)) if claim.used => (attempt.on_stall)(),
            answered => break answered,
        }
    };
    // By now both sides have mapped the channel, or the engine never will. Without a name it cannot be left behind.
    segment::unlink(&name.client(entry, nonce));
    answered?;
    failpoint::here(Place::ClientAttached);
    claim.used = true;
    let life = claim.engine.life_words[entry].life();
    let by_lock = matches!(life, Life::Alive { notice: DeathNotice::FileLock, .. });
    let link = Link::new(LinkParts {
        channel,
        lobby: claim.lobby.clone(),
        engine: claim.engine.clone(),
        lock: by_lock.then(|| view.file.clone()),
        entry,
        arena_id: identity.arena_id,
        incarnation,
        nonce,
        stall_after: checked.options.stall_after,
        spin: checked.spin,
    })
    .ok_or(AttachError::TableFull)?;
    let (arena, writers) = (claim.arena.clone(), claim.writers.clone());
    let attached = Attached { link: Arc::new(link), arena, identity, writers };
    Ok(Attachment { attached: ManuallyDrop::new(attached), fork: attempt.fork })
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

/// The longest sleep between two looks at the engine's file lock, where the engine's kernel does not mark life words.
const LOCK_EVERY: Duration = Duration::from_millis(50);

fn wait_for_answer(
    attempt: &Attempt<'_>,
    claim: &Claim,
    view: &EngineView,
    nonce: u64,
    incarnation: u32,
) -> Result<(), AttachError> {
    // The view's segment is the inode that the claim has mapped, because it has the same arena id.
    let (engine, entry) = (&view.segment, claim.entry);
    let timeout = attempt.checked.options.attach_timeout;
    let deadline = Deadline::after(timeout);
    let life = &engine.life_words[entry];
    loop {
        let control = attempt.control.load(Ordering::Acquire);
        if attempt.stop.load(Ordering::Acquire) {
            return Err(AttachError::Cancelled);
        }
        let (word, value) = engine.attach[entry].word();
        match engine.attach[entry].read(nonce) {
            AttachStatus::None => {}
            AttachStatus::Attached => return Ok(()),
            refused => return Err(AttachError::Refused(refused)),
        }
        // An engine that finds the life word unclaimed never looks at the entry.
        if !claim.claims.holds(entry) {
            return Err(AttachError::ClaimLost(entry));
        }
        let raw = life.raw();
        let (lives, by_lock) = match LifeWord::interpret(raw) {
            Life::Alive { notice, .. } => (true, notice == DeathNotice::FileLock),
            Life::Dead | Life::Unclaimed => (false, false),
        };
        // Read the incarnation (Acquire) after the life word (Acquire): a successor makes the incarnation odd (Release)
        // before it revives the word (CAS AcqRel, in `segments.rs` of the engine).
        let is_dead =
            !lives || Locks::of(&view.file, engine_segment::LIFE_WORDS_AT).owner_is_dead(entry, raw);
        if engine.epoch().incarnation() != incarnation {
            return Err(AttachError::Restarted);
        }
        if is_dead {
            // The kernel marks an engine's life words one after the other, the owner word last, so for `view.end` the
            // engine may still live.
            let name = &attempt.checked.name;
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
                (attempt.control, control),
            ],
            if by_lock { Deadline(deadline.0.min(Deadline::after(LOCK_EVERY).0)) } else { deadline },
        );
    }
}
