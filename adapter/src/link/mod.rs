//! Operations over one channel: submit, wait, abandon, undo.
//!
//! Invariants:
//! * An operation's id and its payload region are reused only after its completion has been drained,
//!   even if its caller has given up: a stalled engine may still write its answer there.
//! * At most [`DEPTH`] operations are in flight, so neither ring can be overrun and the engine never waits for this
//!   client.
//! * If an abandoned operation gained something (a lease, reserved slots), that is given back when its late completion
//!   arrives.
//! * A message that gives something back is never dropped: while there is no room for it, it waits in the outbox.

mod operations;
mod pending;
mod wait;

pub(crate) use pending::{Answer, Pending};

use crate::batch::{BatchId, Settled};
use crate::error::CallError;
use crate::fork::ForkGuard;
use crate::health::{Health, StallClock};
use kvring_shm_abi::channel::Channel;
use kvring_shm_abi::chunk::ChunkWord;
use kvring_shm_abi::claims::Locks;
use kvring_shm_abi::engine_segment::{AttachStatus, EngineSegment, LIFE_WORDS_AT};
use kvring_shm_abi::epoch::Epoch;
use kvring_shm_abi::futex;
use kvring_shm_abi::life::{Life, LifeWord};
use kvring_shm_abi::lobby::{Lobby, LookupTotals};
use kvring_shm_abi::lookup::{Marked, Unpublished};
use kvring_shm_abi::mapping::One;
use kvring_shm_abi::message::{Ident, Record, Records, Request, SlotRecord};
use kvring_shm_abi::payload::{Payload, Region};
use kvring_shm_abi::ring::{Consumer, Producer};
use kvring_shm_abi::segment::SegmentFile;
use kvring_shm_abi::sync::{AtomicU32, AtomicU64, Ordering};
use operations::Operations;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

/// The shortest time between two looks at the engine's file lock, if it has one: a look costs half a microsecond.
const LOCK_EVERY_NS: u64 = 40_000_000;

/// How an abandoned operation is undone when its completion arrives.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Undo {
    /// The operation gains nothing.
    Nothing,
    /// Abort the slots that the reservation got. Its keys and its answers lie at these places of the payload area.
    AbortSlots { keys: Records, answer: u32 },
    /// Tell the ledger what became of this batch's commit, so that it is not made again.
    Settle { batch: BatchId },
}

/// How an engine's tables may be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reading {
    /// What to make of chunks that are marked.
    pub(crate) marked: Marked,
    /// Does the engine serve, and listen to us?
    pub(crate) is_serving: bool,
}

/// A message that gives something back, and that is delivered later if it cannot be delivered now.
#[derive(Debug)]
enum Deferred {
    Plain(Request),
    Abort(Vec<SlotRecord>),
}

struct Inner {
    submissions: Producer,
    completions: Consumer,
    operations: Operations,
    outbox: VecDeque<Deferred>,
    /// Answers to commits that nobody waited for any more. The ledger takes them from here.
    settled: Vec<(BatchId, Settled)>,
}

/// One attachment's channel, shared by the threads of this process.
pub(crate) struct Link {
    inner: Mutex<Inner>,
    channel: Channel,
    pub(crate) lobby: Lobby,
    pub(crate) engine: EngineSegment,
    pub(crate) entry: usize,
    pub(crate) arena_id: [u64; 2],
    pub(crate) incarnation: u32,
    pub(crate) nonce: u64,
    pub(crate) stall: StallClock,
    spin: Duration,
    /// The process that made this link: no other process has its memory.
    fork: ForkGuard,
    /// The engine's life word for this client.
    life: One<LifeWord>,
    /// The engine's file, if only a file lock shows the engine's death, and when this client last looked at that lock.
    lock: Option<Arc<SegmentFile>>,
    lock_looked_ns: AtomicU64,
    /// The keeper sleeps on it. It is raised when a caller leaves work that only the keeper may ever get to.
    left: AtomicU32,
}

/// The parts from which a link is made.
pub(crate) struct LinkParts {
    pub(crate) channel: Channel,
    pub(crate) lobby: Lobby,
    pub(crate) engine: EngineSegment,
    /// The engine's file, if only a file lock shows the engine's death.
    pub(crate) lock: Option<Arc<SegmentFile>>,
    pub(crate) entry: usize,
    pub(crate) arena_id: [u64; 2],
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

impl Link {
    /// `None` if the segment has no such entry.
    pub(crate) fn new(parts: LinkParts) -> Option<Link> {
        let beat = parts.engine.epoch().beat();
        Some(Link {
            life: parts.engine.life_words.one(parts.entry)?,
            lock: parts.lock,
            lock_looked_ns: AtomicU64::new(0),
            inner: Mutex::new(Inner {
                submissions: Producer::new(parts.channel.submissions.clone()),
                completions: Consumer::new(parts.channel.completions.clone()),
                operations: Operations::new(parts.channel.payload.len()),
                outbox: VecDeque::new(),
                settled: Vec::new(),
            }),
            stall: StallClock::new(parts.stall_after, beat),
            channel: parts.channel,
            lobby: parts.lobby,
            engine: parts.engine,
            entry: parts.entry,
            arena_id: parts.arena_id,
            incarnation: parts.incarnation,
            nonce: parts.nonce,
            left: AtomicU32::new(0),
            fork: ForkGuard::new(),
            spin: parts.spin,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // No code panics half-way through a change under this lock, so a poisoned one can be used like any.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ident(&self) -> Ident {
        Ident { incarnation: self.incarnation, nonce: self.nonce as u32 }
    }

    /// The payload area.
    pub(crate) fn payload(&self) -> &Payload {
        &self.channel.payload
    }

    /// Is the engine of this attachment alive, and not restarted since?
    #[inline]
    pub(crate) fn alive(&self) -> Result<(), CallError> {
        if !self.life.is_alive() || self.stall.is_gone() {
            return Err(CallError::Dead);
        }
        if self.engine.epoch().incarnation() != self.incarnation {
            return Err(CallError::Restarted);
        }
        Ok(())
    }

    /// All that the client can conclude about this attachment's engine.
    pub(crate) fn health(&self) -> Health {
        let epoch = self.engine.epoch();
        // Read the life word first (Acquire), then the incarnation (Acquire): a successor makes the incarnation odd
        // (Release) before it takes the life word over (CAS AcqRel), so whoever sees the word alive again sees the new
        // incarnation too.
        let life = self.life.life();
        let incarnation = epoch.incarnation();
        if !matches!(life, Life::Alive { .. }) || self.stall.is_gone() {
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

    /// Is the engine healthy? Three loads, because every call asks this first. (An engine that found itself unhealthy
    /// makes its incarnation odd.)
    #[inline]
    pub(crate) fn is_healthy(&self) -> bool {
        let epoch = self.engine.epoch();
        self.life.is_alive()
            && epoch.incarnation() == self.incarnation
            && !self.stall.troubled(|| epoch.beat())
    }

    /// Does only a file lock show the engine's death? If so, somebody must look at it.
    pub(crate) fn has_lock(&self) -> bool {
        self.lock.is_some()
    }

    /// Looks at the engine's file lock, if it has one and nobody has looked for [`LOCK_EVERY_NS`]. Once the lock is
    /// found free, the engine is dead for all threads of this client.
    pub(crate) fn look_at_lock(&self, now_ns: u64) {
        let Some(file) = &self.lock else { return };
        // Relaxed: two threads may look at once, which does no harm.
        if now_ns.saturating_sub(self.lock_looked_ns.load(Ordering::Relaxed)) < LOCK_EVERY_NS {
            return;
        }
        self.lock_looked_ns.store(now_ns, Ordering::Relaxed);
        let is_dead = Locks::of(file, LIFE_WORDS_AT).owner_is_dead(self.entry, self.life.raw());
        if is_dead && self.stall.engine_gone() {
            // Nothing else wakes the threads that sleep for an answer.
            self.rouse();
        }
    }

    pub(crate) fn is_broken(&self) -> bool {
        self.stall.is_broken()
    }

    /// Why the engine has stopped reading this channel; `None` while it reads it.
    pub(crate) fn detached(&self) -> Option<AttachStatus> {
        let status = self.engine.attach[self.entry].read(self.nonce);
        (status != AttachStatus::Attached).then_some(status)
    }

    /// Submits an operation with `words` words of payload; `fill` writes them and returns the request.
    pub(crate) fn submit(
        self: &Arc<Self>,
        words: usize,
        undo: impl FnOnce(Region) -> Undo,
        fill: impl FnOnce(&Payload, Region) -> Request,
    ) -> Result<Pending, CallError> {
        let beat = self.engine.epoch().beat();
        let operation = self.send(words, undo, fill)?;
        Ok(Pending::new(self.clone(), operation, beat))
    }

    /// Drains what has arrived, sends what waits in the outbox, then puts this request into the ring. Returns the
    /// operation's id.
    #[inline(always)]
    fn send(
        &self,
        words: usize,
        undo: impl FnOnce(Region) -> Undo,
        fill: impl FnOnce(&Payload, Region) -> Request,
    ) -> Result<u16, CallError> {
        let mut inner = self.lock();
        let others = !inner.operations.is_idle() && self.drain(&mut inner);
        self.flush(&mut inner);
        let started = self.start(&mut inner, words, undo, fill);
        self.unlock(inner, others, true);
        started
    }

    /// Sends one request without payload, waits for its answer, and returns its results.
    pub(crate) fn call(&self, request: Request, timeout: Duration) -> Result<[u64; 4], CallError> {
        let beat = self.engine.epoch().beat();
        let operation = self.send(0, |_| Undo::Nothing, |_, _| request)?;
        match self.wait(operation, beat, timeout) {
            Ok(done) => {
                crate::status::check(&done.completion)?;
                Ok(done.completion.results)
            }
            Err(error) => {
                self.abandon(operation);
                Err(error)
            }
        }
    }

    /// Sends the commit of a batch. Returns its pending answer, and where in the payload area the outcomes will be.
    pub(crate) fn commit(
        self: &Arc<Self>,
        batch: BatchId,
        records: &[SlotRecord],
    ) -> Result<(Pending, u32), CallError> {
        let mut answer = 0;
        let pending = self.submit(
            slot_words(records.len()),
            |_| Undo::Settle { batch },
            |payload, region| {
                let (slots, at) = write_slots(payload, region, records);
                answer = at;
                Request::Commit { slots, answer: at }
            },
        )?;
        Ok((pending, answer))
    }

    /// The answers to commits that nobody waited for, since the last call.
    pub(crate) fn take_settled(&self) -> Vec<(BatchId, Settled)> {
        core::mem::take(&mut self.lock().settled)
    }

    /// Puts one request into the ring; the caller rings the doorbell.
    #[inline(always)]
    fn start(
        &self,
        inner: &mut Inner,
        words: usize,
        undo: impl FnOnce(Region) -> Undo,
        fill: impl FnOnce(&Payload, Region) -> Request,
    ) -> Result<u16, CallError> {
        let (operation, region) = inner.operations.start(words, undo).ok_or(CallError::Busy)?;
        let request = fill(&self.channel.payload, region);
        inner.submissions.push(&request.encode(operation, self.ident()));
        Ok(operation)
    }

    /// Delivers a message that gives something back, now or later, and does not wait for its completion.
    pub(crate) fn post(&self, request: Request) {
        self.deliver_message(Deferred::Plain(request), true);
    }

    /// As [`Link::post`], for what is not urgent: an engine that sleeps is woken only if its ring is half full. So it costs no
    /// system call.
    pub(crate) fn post_quietly(&self, request: Request) {
        self.deliver_message(Deferred::Plain(request), false);
    }

    /// Tells the engine that (session, admission) holds these chunks, after the first `first` of its lease; waits for nothing,
    /// and wakes an engine that sleeps only if its ring is half full. False: there is no room now, something else waits for
    /// room already, or another thread is at the ring.
    pub(crate) fn publish_hold(
        &self,
        session: u64,
        admission: u32,
        namespace: u32,
        first: u32,
        words: &[ChunkWord],
    ) -> bool {
        let mut inner = match self.inner.try_lock() {
            Ok(inner) => inner,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        let others = self.drain(&mut inner);
        self.flush(&mut inner);
        let fill = |payload: &Payload, region: Region| {
            // The region was taken with this length.
            if let Ok(mut writer) = payload.writer(region.offset, words.len()) {
                words.iter().for_each(|word| {
                    writer.push(word.bits());
                });
            }
            let chunks = Records { offset: region.offset, count: words.len() as u32 };
            Request::Hold { session, admission, namespace, first, chunks }
        };
        // Whatever waits in the outbox was decided before this.
        let operation = if inner.outbox.is_empty() {
            self.start(&mut inner, words.len(), |_| Undo::Nothing, fill).ok()
        } else {
            None
        };
        if let Some(operation) = operation {
            let arrived = inner.operations.abandon(operation);
            debug_assert!(arrived.is_none());
        }
        let is_half_full = inner.operations.is_half_full();
        self.unlock(inner, others, is_half_full);
        operation.is_some()
    }

    /// Whether this client holds something that it could not publish.
    pub(crate) fn unpublished(&self) -> &Unpublished {
        self.channel.unpublished()
    }

    /// May the tables of this engine be read, and how? `None` for an engine that was removed, has found itself broken, has sent
    /// answers that make no sense, or lives and does not listen to this client. It may sleep, be stopped, dead or recovering.
    pub(crate) fn reading(&self) -> Option<Reading> {
        let engine = &self.engine;
        let is_broken = engine.info().unhealthy.load(Ordering::Relaxed) != 0 || self.is_broken();
        if is_broken || engine.superblock().is_retired() {
            return None;
        }
        let lives = self.alive().is_ok();
        if lives && self.detached().is_some() {
            return None;
        }
        let marked = if lives { Marked::Missing } else { Marked::There };
        Some(Reading { marked, is_serving: lives && self.is_healthy() })
    }

    /// Counts a lookup, for people.
    pub(crate) fn count_lookup(&self, totals: LookupTotals) {
        self.lobby.count_lookup(self.entry, totals);
    }

    /// As [`Link::post`], to abort slots that will not be written.
    pub(crate) fn post_abort(&self, slots: Vec<SlotRecord>) {
        if !slots.is_empty() {
            self.deliver_message(Deferred::Abort(slots), true);
        }
    }

    /// Sends as much of the outbox as there is room for, this message last, and leaves the rest to the keeper.
    fn deliver_message(&self, message: Deferred, is_urgent: bool) {
        let mut inner = self.lock();
        let had_rest = !inner.outbox.is_empty();
        inner.outbox.push_back(message);
        let others = self.drain(&mut inner);
        self.flush(&mut inner);
        let has_rest = !inner.outbox.is_empty();
        let wakes = is_urgent || inner.operations.is_half_full();
        self.unlock(inner, others, wakes);
        // Once: the keeper comes back by itself until nothing is left.
        if has_rest && !had_rest {
            self.leave_to_keeper();
        }
    }

    /// Wakes the keeper because a caller has left something behind: an answer that will come late and must be undone,
    /// or a message without room. No other call may come for a long time, so the keeper looks from now on.
    pub(crate) fn leave_to_keeper(&self) {
        // SYNC POINT: Release; pairs with the Acquire in `left`, whose value the keeper takes before it tends.
        self.left.fetch_add(1, Ordering::Release);
        futex::wake_all(&self.left);
    }

    /// The word for the keeper's sleep, and its value. The keeper takes them before it calls `tend`.
    pub(crate) fn left(&self) -> (&AtomicU32, u32) {
        (&self.left, self.left.load(Ordering::Acquire))
    }

    /// Drains what has arrived and sends what waits in the outbox. The keeper calls it, because no caller may come for
    /// a long time.
    pub(crate) fn tend(&self) {
        let mut inner = self.lock();
        let others = self.drain(&mut inner);
        let sent = self.flush(&mut inner);
        self.unlock(inner, others, sent);
    }

    /// Is nothing in flight, and nothing waiting to be sent?
    pub(crate) fn is_idle(&self) -> bool {
        let inner = self.lock();
        inner.outbox.is_empty() && inner.operations.is_idle()
    }

    /// Sends as much of the outbox as there is room for. True when something was sent.
    #[inline(always)]
    fn flush(&self, inner: &mut Inner) -> bool {
        !inner.outbox.is_empty() && self.send_outbox(inner)
    }

    #[cold]
    fn send_outbox(&self, inner: &mut Inner) -> bool {
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
                Ok(operation) => {
                    // Nobody can have drained its answer yet, because this thread holds the lock.
                    let arrived = inner.operations.abandon(operation);
                    debug_assert!(arrived.is_none());
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
}

/// Payload words of a commit or abort of `count` slots: the records, then a word of answer for each.
pub(crate) fn slot_words(count: usize) -> usize {
    count * (SlotRecord::WORDS + 1)
}

/// Writes slot records into a region of [`slot_words`] words.
pub(crate) fn write_slots(payload: &Payload, region: Region, slots: &[SlotRecord]) -> (Records, u32) {
    let words: &[u64] = bytemuck::cast_slice(slots);
    // The region was taken with this length. If it were shorter, the engine would answer "not yours" for each slot.
    let written = payload.write(region.offset, words);
    debug_assert!(written.is_ok());
    let answer = region.offset + words.len() as u32;
    (Records { offset: region.offset, count: slots.len() as u32 }, answer)
}

#[cfg(test)]
pub(crate) mod tests;
