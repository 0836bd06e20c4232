//! Operations over one channel: submit, wait, abandon, undo.
//!
//! Invariants:
//! * An operation slot and its payload region are reused only after the operation's completion was drained, also when
//!   its caller has given up: a stalled engine may still write its answer there.
//! * At most [`DEPTH`] operations are in flight, so neither ring can be overrun and the engine never waits for us.
//! * What an abandoned operation gained (a lease, reserved slots) is given back when its late completion arrives.
//! * Messages that give something back are never dropped: without room they wait in the outbox.

mod pending;

pub(crate) use pending::{Answer, Pending};

use crate::error::CallError;
use crate::health::{Health, StallClock};
use kvring_shm_abi::channel::Channel;
use kvring_shm_abi::engine_segment::{AttachStatus, EngineSegment};
use kvring_shm_abi::epoch::Epoch;
use kvring_shm_abi::futex::{self, Deadline};
use kvring_shm_abi::life::{Life, LifeWord};
use kvring_shm_abi::lobby::Lobby;
use kvring_shm_abi::mapping::One;
use kvring_shm_abi::message::{
    Completion, Ident, Key, Record, Records, Request, ReserveAnswer, ReserveOutcome, SlotRecord, Status,
};
use kvring_shm_abi::park;
use kvring_shm_abi::payload::{Payload, Region, Regions};
use kvring_shm_abi::ring::{Consumer, DEPTH, Producer};
use kvring_shm_abi::sync::{AtomicU32, Ordering, spin_loop};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How an abandoned operation is undone when its completion arrives after all.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Undo {
    /// Nothing was gained.
    Nothing,
    /// Release the lease that the lookup got.
    ReleaseLease { session: u64, admission: u32 },
    /// Abort the slots that the reservation got: where its keys and answers are in the payload area.
    AbortSlots { keys: Records, answer: u32 },
}

/// A message that gives something back: delivered later where it cannot be delivered now.
#[derive(Debug)]
enum Deferred {
    Plain(Request),
    Abort(Vec<SlotRecord>),
}

#[derive(Debug)]
enum Operation {
    Free,
    InFlight { region: Region, undo: Undo, abandoned: bool },
    Done { region: Region, undo: Undo, completion: Completion },
}

struct Inner {
    submissions: Producer,
    completions: Consumer,
    regions: Regions,
    operations: Box<[Operation]>,
    free: Vec<u16>,
    outbox: VecDeque<Deferred>,
}

/// One attachment's channel, shared by the threads of this process.
pub(crate) struct Link {
    inner: Mutex<Inner>,
    channel: Channel,
    pub(crate) lobby: Lobby,
    pub(crate) engine: EngineSegment,
    pub(crate) entry: usize,
    pub(crate) incarnation: u32,
    pub(crate) nonce: u64,
    pub(crate) stall: StallClock,
    spin: Duration,
    /// The engine's life word for this client.
    life: One<LifeWord>,
    /// The keeper's futex: bumped when something is left for it that nobody else may ever look at.
    left: AtomicU32,
}

/// Where a link comes from.
pub(crate) struct LinkParts {
    pub(crate) channel: Channel,
    pub(crate) lobby: Lobby,
    pub(crate) engine: EngineSegment,
    pub(crate) entry: usize,
    pub(crate) incarnation: u32,
    pub(crate) nonce: u64,
    pub(crate) stall_after: Duration,
    pub(crate) spin: Duration,
}

impl core::fmt::Debug for Link {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Link").field("entry", &self.entry).field("incarnation", &self.incarnation).finish()
    }
}

/// Polls of the ring between two looks at the clock.
const BURST: u32 = 64;
/// The longest sleep without a look at the engine's beat: below the gap that still counts towards a stall.
const SLEEP_MAX: Duration = Duration::from_millis(50);
/// Completions handled under one hold of the lock.
const DRAIN_MAX: usize = DEPTH;

impl Link {
    /// `None` for an entry that the segment does not have.
    pub(crate) fn new(parts: LinkParts) -> Option<Link> {
        let beat = parts.engine.epoch().beat();
        Some(Link {
            life: parts.engine.life_words.one(parts.entry)?,
            inner: Mutex::new(Inner {
                submissions: Producer::new(parts.channel.submissions.clone()),
                completions: Consumer::new(parts.channel.completions.clone()),
                regions: Regions::new(u32::try_from(parts.channel.payload.len()).unwrap_or(u32::MAX)),
                operations: (0..DEPTH).map(|_| Operation::Free).collect(),
                free: (0..DEPTH as u16).rev().collect(),
                outbox: VecDeque::new(),
            }),
            stall: StallClock::new(parts.stall_after, beat),
            channel: parts.channel,
            lobby: parts.lobby,
            engine: parts.engine,
            entry: parts.entry,
            incarnation: parts.incarnation,
            nonce: parts.nonce,
            left: AtomicU32::new(0),
            spin: parts.spin,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing in here panics half-way through a change; a poisoned lock is as good as any.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ident(&self) -> Ident {
        Ident { incarnation: self.incarnation, nonce: self.nonce as u32 }
    }

    /// The payload area.
    pub(crate) fn payload(&self) -> &Payload {
        &self.channel.payload
    }

    /// The two loads of a health check: is the engine that we attached to still alive?
    #[inline]
    pub(crate) fn alive(&self) -> Result<(), CallError> {
        if !self.life.is_alive() {
            return Err(CallError::Dead);
        }
        if self.engine.epoch().incarnation() != self.incarnation {
            return Err(CallError::Restarted);
        }
        Ok(())
    }

    /// Everything a client can conclude about this attachment.
    pub(crate) fn health(&self) -> Health {
        let epoch = self.engine.epoch();
        let incarnation = epoch.incarnation();
        if !matches!(self.life.life(), Life::Alive { .. }) {
            Health::Dead
        } else if self.engine.info().unhealthy.load(Ordering::Relaxed) != 0 {
            Health::Unhealthy
        } else if incarnation != self.incarnation {
            if Epoch::serves(incarnation) { Health::Attaching } else { Health::Recovering }
        } else if self.is_broken() || self.detached().is_some() {
            Health::Attaching
        } else if self.stall.troubled(|| epoch.beat()) {
            Health::Stalled
        } else {
            Health::Healthy
        }
    }

    /// Healthy, in three loads: what every call asks first. (An engine that found itself unhealthy has an odd
    /// incarnation.)
    #[inline]
    pub(crate) fn is_healthy(&self) -> bool {
        let epoch = self.engine.epoch();
        self.life.is_alive()
            && epoch.incarnation() == self.incarnation
            && !self.stall.troubled(|| epoch.beat())
    }

    pub(crate) fn is_broken(&self) -> bool {
        self.stall.is_broken()
    }

    /// Did the engine stop reading this channel, and why?
    pub(crate) fn detached(&self) -> Option<AttachStatus> {
        let status = self.engine.attach[self.entry].read(self.nonce);
        (status != AttachStatus::Attached).then_some(status)
    }

    /// Submits an operation with `words` words of payload; `fill` writes them and says what is asked.
    pub(crate) fn submit(
        self: &Arc<Self>,
        words: usize,
        undo: impl FnOnce(Region) -> Undo,
        fill: impl FnOnce(&Payload, Region) -> Request,
    ) -> Result<Pending, CallError> {
        let beat = self.engine.epoch().beat();
        let mut inner = self.lock();
        self.drain(&mut inner, None);
        self.flush(&mut inner);
        let slot = self.start(&mut inner, words, undo, fill)?;
        drop(inner);
        park::notify(self.lobby.doorbell());
        Ok(Pending::new(self.clone(), slot, beat))
    }

    /// Puts one request into the ring. The doorbell is the caller's.
    fn start(
        &self,
        inner: &mut Inner,
        words: usize,
        undo: impl FnOnce(Region) -> Undo,
        fill: impl FnOnce(&Payload, Region) -> Request,
    ) -> Result<u16, CallError> {
        let slot = inner.free.pop().ok_or(CallError::Busy)?;
        let region = match words {
            0 => Some(Region::default()),
            words => u32::try_from(words).ok().and_then(|words| inner.regions.take(words)),
        };
        let Some(region) = region else {
            inner.free.push(slot);
            return Err(CallError::Busy);
        };
        let request = fill(&self.channel.payload, region);
        inner.operations[usize::from(slot)] =
            Operation::InFlight { region, undo: undo(region), abandoned: false };
        inner.submissions.push(&request.encode(slot, self.ident()));
        Ok(slot)
    }

    /// Delivers a message that gives something back, now or later; its completion is not waited for.
    pub(crate) fn post(&self, request: Request) {
        let mut inner = self.lock();
        inner.outbox.push_back(Deferred::Plain(request));
        self.deliver_outbox(inner);
    }

    /// As [`Link::post`], for slots that will not be written.
    pub(crate) fn post_abort(&self, slots: Vec<SlotRecord>) {
        if slots.is_empty() {
            return;
        }
        let mut inner = self.lock();
        inner.outbox.push_back(Deferred::Abort(slots));
        self.deliver_outbox(inner);
    }

    /// Sends what there is room for; the rest is the keeper's.
    fn deliver_outbox(&self, mut inner: MutexGuard<'_, Inner>) {
        self.drain(&mut inner, None);
        self.flush(&mut inner);
        let rest = !inner.outbox.is_empty();
        drop(inner);
        park::notify(self.lobby.doorbell());
        if rest {
            self.leave_to_keeper();
        }
    }

    /// A caller has gone and left something: a late answer to undo, or a message without room. It may be the last one
    /// that calls for a long time, so the keeper looks from now on.
    fn leave_to_keeper(&self) {
        // SYNC POINT: Release; pairs with the Acquire in `left`, whose value the keeper takes before it tends.
        self.left.fetch_add(1, Ordering::Release);
        futex::wake_all(&self.left);
    }

    /// For the keeper's sleep: the word and its value. Take it before `tend`.
    pub(crate) fn left(&self) -> (&AtomicU32, u32) {
        (&self.left, self.left.load(Ordering::Acquire))
    }

    /// Takes what has arrived and sends what waits: for the keeper, when nobody else calls.
    pub(crate) fn tend(&self) {
        let mut inner = self.lock();
        let kick = self.drain(&mut inner, None);
        let sent = self.flush(&mut inner);
        drop(inner);
        self.kick(kick);
        if sent {
            park::notify(self.lobby.doorbell());
        }
    }

    /// Is anything in flight or waiting to be sent?
    pub(crate) fn is_idle(&self) -> bool {
        let inner = self.lock();
        inner.outbox.is_empty() && inner.free.len() == DEPTH
    }

    /// Sends what the outbox holds, as far as there is room. True when something was sent.
    fn flush(&self, inner: &mut Inner) -> bool {
        let mut sent = false;
        while let Some(deferred) = inner.outbox.pop_front() {
            let started = match &deferred {
                Deferred::Plain(request) => self.start(inner, 0, |_| Undo::Nothing, |_, _| *request),
                Deferred::Abort(slots) => self.start(
                    inner,
                    slot_words(slots.len()),
                    |_| Undo::Nothing,
                    |payload, region| {
                        let (slots, answer) = write_slots(payload, region, slots);
                        Request::Abort { slots, answer }
                    },
                ),
            };
            match started {
                Ok(slot) => {
                    if let Operation::InFlight { abandoned, .. } = &mut inner.operations[usize::from(slot)] {
                        *abandoned = true;
                    }
                    sent = true;
                }
                Err(_) => {
                    inner.outbox.push_front(deferred);
                    break;
                }
            }
        }
        sent
    }

    /// Takes completions from the ring. Returns true when one of them was somebody else's than `mine`.
    fn drain(&self, inner: &mut Inner, mine: Option<u16>) -> bool {
        let mut others = false;
        for _ in 0..DRAIN_MAX {
            match inner.completions.pop() {
                Ok(Some(body)) => match Completion::decode(&body) {
                    Ok(completion) => {
                        let kept = self.deliver(inner, completion);
                        others |= kept && Some(completion.operation) != mine;
                        if kept && Some(completion.operation) == mine {
                            break;
                        }
                    }
                    Err(error) => {
                        self.break_off(&error);
                        break;
                    }
                },
                Ok(None) => break,
                Err(error) => {
                    self.break_off(&error);
                    break;
                }
            }
        }
        others
    }

    fn break_off(&self, error: &dyn core::fmt::Display) {
        if self.stall.break_off() {
            tracing::error!(%error, "the completion ring makes no sense; attaching again");
        }
    }

    /// One completion: to its waiter, or undone where nobody waits. True when a waiter may want it.
    fn deliver(&self, inner: &mut Inner, completion: Completion) -> bool {
        let index = usize::from(completion.operation);
        if completion.ident != self.ident() || index >= inner.operations.len() {
            // Of another life or attachment: stale, never a breach.
            return false;
        }
        match inner.operations[index] {
            Operation::InFlight { region, undo, abandoned: false } => {
                inner.operations[index] = Operation::Done { region, undo, completion };
                true
            }
            Operation::InFlight { region, undo, abandoned: true } => {
                self.undo(inner, undo, &completion);
                release_operation(inner, completion.operation, region);
                false
            }
            Operation::Free | Operation::Done { .. } => {
                self.break_off(&format_args!("a second completion for operation {index}"));
                false
            }
        }
    }

    /// Gives back what an operation gained that nobody waits for.
    fn undo(&self, inner: &mut Inner, undo: Undo, completion: &Completion) {
        if completion.status != Status::Ok {
            return;
        }
        match undo {
            Undo::Nothing => {}
            Undo::ReleaseLease { session, admission } => {
                if completion.results[0] > 0 {
                    let release = Request::Release { session, admission, keep: 0 };
                    inner.outbox.push_back(Deferred::Plain(release));
                }
            }
            Undo::AbortSlots { keys, answer } => {
                let slots = self.granted(keys, answer);
                if !slots.is_empty() {
                    inner.outbox.push_back(Deferred::Abort(slots));
                }
            }
        }
    }

    /// The slots that a completed reservation got.
    fn granted(&self, keys: Records, answer: u32) -> Vec<SlotRecord> {
        let mut slots = Vec::new();
        for index in 0..keys.count {
            let mut key: Key = [0; 2];
            let mut words = [0u64; ReserveAnswer::WORDS];
            let read = self
                .payload()
                .read(keys.offset + index * 2, &mut key)
                .and_then(|()| self.payload().read(answer + index * ReserveAnswer::WORDS as u32, &mut words));
            let answered: ReserveAnswer = bytemuck::cast(words);
            if read.is_ok() && answered.outcome() == Some(ReserveOutcome::Write) {
                slots.push(SlotRecord {
                    slot: u64::from(answered.shard.slot()),
                    generation: answered.shard.generation,
                    key,
                    checksum: 0,
                });
            }
        }
        slots
    }

    /// Wakes the other threads of this client that sleep for a completion: one of theirs has been drained.
    fn kick(&self, others: bool) {
        if others {
            park::notify(self.channel.client_parked());
        }
    }

    fn take_done(&self, inner: &mut Inner, slot: u16) -> Option<Completion> {
        match inner.operations[usize::from(slot)] {
            Operation::Done { completion, .. } => Some(completion),
            _ => None,
        }
    }

    /// Up to `looks` looks for the completion of `slot`, under one hold of the lock.
    #[inline]
    fn poll(&self, slot: u16, looks: u32) -> Option<Completion> {
        let mut inner = self.lock();
        let mut others = false;
        let mut found = self.take_done(&mut inner, slot);
        let mut left = looks;
        while found.is_none() && left > 0 {
            if inner.completions.has_news() {
                others |= self.drain(&mut inner, Some(slot));
                found = self.take_done(&mut inner, slot);
                if self.is_broken() {
                    break;
                }
            } else {
                spin_loop();
            }
            left -= 1;
        }
        // What undoing has queued goes out at once.
        let sent = !inner.outbox.is_empty() && self.flush(&mut inner);
        drop(inner);
        self.kick(others);
        if sent {
            park::notify(self.lobby.doorbell());
        }
        found
    }

    /// Sleeps for a completion, the engine's death or a restart; every return means: look again.
    fn sleep(&self, slot: u16, deadline: Deadline) {
        let parked = self.channel.client_parked();
        let ticket = park::announce(parked);
        if self.poll_only(slot) {
            return;
        }
        let (life, raw) = (&*self.life, self.life.raw());
        if !matches!(LifeWord::interpret(raw), Life::Alive { .. }) {
            return;
        }
        let soon = Deadline(deadline.0.min(Deadline::after(SLEEP_MAX).0));
        let words = [(life.futex(), raw), (self.engine.epoch().incarnation_word(), self.incarnation)];
        park::sleep(parked, ticket, &words, soon);
        if life.life() == Life::Dead {
            // The kernel wakes one waiter per word: pass it on.
            futex::wake_all(life.futex());
        }
        // The flag is not taken back: another thread of this client may sleep on it, and the engine would then not
        // wake it. A flag that stays costs one needless wake.
    }

    /// Has the completion of `slot` been drained, or is there anything to drain?
    fn poll_only(&self, slot: u16) -> bool {
        let mut inner = self.lock();
        inner.completions.has_news() || self.take_done(&mut inner, slot).is_some()
    }
}

fn release_operation(inner: &mut Inner, slot: u16, region: Region) {
    inner.operations[usize::from(slot)] = Operation::Free;
    inner.regions.give(region);
    inner.free.push(slot);
}

/// Payload words of a commit or abort of `count` slots: the records, then a word of answer for each.
pub(crate) fn slot_words(count: usize) -> usize {
    count * (SlotRecord::WORDS + 1)
}

/// Writes slot records into a region of [`slot_words`] words.
pub(crate) fn write_slots(payload: &Payload, region: Region, slots: &[SlotRecord]) -> (Records, u32) {
    let words: &[u64] = bytemuck::cast_slice(slots);
    // The region was taken with this length; were it not, the engine would answer "not yours" for each.
    let written = payload.write(region.offset, words);
    debug_assert!(written.is_ok());
    let answer = region.offset + words.len() as u32;
    (Records { offset: region.offset, count: slots.len() as u32 }, answer)
}

#[cfg(test)]
mod tests;
