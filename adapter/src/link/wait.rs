//! Waiting for an operation's answer, and undoing operations whose answers nobody waits for.
//!
//! A thread that looks at the ring drains it for all threads of the client: it keeps the answers of the others for
//! them, and wakes them.

use super::operations::{Delivered, Done};
use super::{Deferred, Inner, Link, Undo};
use crate::batch::Settled;
use crate::error::CallError;
use crate::health::Health;
use kvring_shm_abi::futex::{self, Deadline, monotonic_ns};
use kvring_shm_abi::life::{Life, LifeWord};
use kvring_shm_abi::message::{
    Completion, Key, Record, Records, ReserveAnswer, ReserveOutcome, SlotRecord, Status,
};
use kvring_shm_abi::park;
use kvring_shm_abi::ring::DEPTH;
use kvring_shm_abi::sync::spin_loop;
use std::sync::MutexGuard;
use std::time::Duration;

/// How often a caller polls the ring between two looks at the clock.
const BURST: u32 = 64;
/// The longest sleep without a look at the engine's beat. It is shorter than the longest gap between two looks that
/// still counts towards a stall (100 ms).
const SLEEP_MAX: Duration = Duration::from_millis(50);
/// The most completions handled under one hold of the lock.
const DRAIN_MAX: usize = DEPTH;

/// The result of a look at the completion ring.
enum Look {
    /// The answer that the caller looked for.
    Answer(Done),
    /// Another completion, which has been dealt with. True when another thread of this client may sleep until it
    /// arrives.
    Other(bool),
    /// There is no completion to take, or one that makes no sense.
    Nothing,
}

impl Link {
    /// Looks once at the ring, for the answer of `wanted`. It is inlined into its callers because it is all that runs
    /// between the arrival of an answer and the caller's next step.
    #[inline(always)]
    fn look(&self, inner: &mut Inner, wanted: Option<u16>) -> Look {
        let completion = match inner.completions.pop().map(|body| body.map(|body| Completion::decode(&body)))
        {
            Ok(None) => return Look::Nothing,
            Ok(Some(Ok(completion))) => completion,
            Ok(Some(Err(malformed))) => return self.broken(&malformed),
            Err(jump) => return self.broken(&jump),
        };
        if completion.ident == self.ident()
            && wanted == Some(completion.operation)
            && let Some(done) = inner.operations.complete(&completion)
        {
            return Look::Answer(done);
        }
        self.deliver(inner, &completion)
    }

    /// Deals with a completion that the thread that found it does not wait for.
    #[inline(never)]
    fn deliver(&self, inner: &mut Inner, completion: &Completion) -> Look {
        if completion.ident != self.ident() {
            // A completion of another life or attachment is stale, never a breach.
            return Look::Other(false);
        }
        match inner.operations.deliver(completion) {
            Delivered::Kept => Look::Other(true),
            Delivered::Undo { undo, region } => {
                self.undo(inner, undo, completion);
                inner.operations.free_region(region);
                Look::Other(false)
            }
            Delivered::Doubled => {
                self.broken(&format_args!("operation {} was not in flight", completion.operation))
            }
        }
    }

    #[cold]
    fn broken(&self, error: &dyn core::fmt::Display) -> Look {
        if self.stall.break_off() {
            tracing::error!(
                %error,
                "an answer of the kvring engine makes no sense (damaged shared memory, or a bug); connecting again"
            );
        }
        Look::Nothing
    }

    /// Drains the ring. True when another thread of this client may sleep until one of these completions arrives.
    #[inline]
    pub(super) fn drain(&self, inner: &mut Inner) -> bool {
        let mut others = false;
        for _ in 0..DRAIN_MAX {
            match self.look(inner, None) {
                Look::Other(anothers) => others |= anothers,
                Look::Answer(_) | Look::Nothing => break,
            }
        }
        others
    }

    /// Gives back what an abandoned operation gained.
    fn undo(&self, inner: &mut Inner, undo: Undo, completion: &Completion) {
        if completion.status != Status::Ok {
            return;
        }
        match undo {
            Undo::Nothing => {}
            Undo::Settle { batch } => inner.settled.push((batch, Settled::by(completion))),
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

    /// Releases the lock, then wakes the other threads of this client if answers of theirs have been drained
    /// (`others`), and the engine if something was sent (`sent`).
    #[inline(always)]
    pub(super) fn unlock(&self, inner: MutexGuard<'_, Inner>, others: bool, sent: bool) {
        drop(inner);
        if others {
            self.rouse();
        }
        if sent {
            park::notify(self.lobby.doorbell());
        }
    }

    /// Looks up to `looks` times for the completion of `operation`, under one hold of the lock.
    #[inline(always)]
    pub(super) fn poll(&self, operation: u16, looks: u32) -> Option<Done> {
        let mut inner = self.lock();
        let mut others = false;
        let mut found = inner.operations.take(operation);
        let mut left = looks;
        while found.is_none() && left > 0 {
            match self.look(&mut inner, Some(operation)) {
                Look::Answer(done) => found = Some(done),
                Look::Other(anothers) => others |= anothers,
                Look::Nothing => {
                    spin_loop();
                    left -= 1;
                }
            }
        }
        // Undoing may have put messages into the outbox: send them at once.
        let sent = self.flush(&mut inner);
        self.unlock(inner, others, sent);
        found
    }

    /// Waits at most `timeout` for the completion of `operation`, which was submitted under the engine's beat `beat`.
    pub(super) fn wait(&self, operation: u16, beat: u32, timeout: Duration) -> Result<Done, CallError> {
        // If the engine and this thread share one CPU, spinning is pointless: every look beyond the first keeps the
        // engine from running.
        let looks = if self.spin.is_zero() { 1 } else { BURST };
        // Read the clock only after the first looks: an engine that is awake answers in less time than reading it
        // takes.
        let mut started = None;
        loop {
            if let Some(done) = self.poll(operation, looks) {
                return Ok(done);
            }
            self.hopeless()?;
            let now = monotonic_ns();
            let started = *started.get_or_insert(now);
            let deadline = Deadline::after_ns(started, timeout);
            if now >= deadline.0 {
                self.stall.deadline_missed(beat, self.engine.epoch().beat());
                let waited_ms = now.saturating_sub(started) / 1_000_000;
                return Err(CallError::TimedOut { waited_ms });
            }
            if now < Deadline::after_ns(started, self.spin).0 {
                continue;
            }
            self.stall.look_at(self.engine.epoch().beat(), now);
            self.look_at_lock(now);
            let soon = Deadline(deadline.0.min(Deadline::after_ns(now, SLEEP_MAX).0));
            self.sleep(operation, soon);
        }
    }

    /// An error if no answer can be expected any more, or not soon. An engine that let one operation reach its deadline
    /// and has not moved since would do the same to each other one.
    fn hopeless(&self) -> Result<(), CallError> {
        self.alive()?;
        if self.is_broken() || self.detached().is_some() {
            return Err(CallError::Degraded(Health::Attaching));
        }
        if self.stall.troubled(|| self.engine.epoch().beat()) {
            return Err(CallError::Degraded(Health::Stalled));
        }
        Ok(())
    }

    /// Sleeps until a completion arrives, the engine dies, or `soon` has passed. Whenever it returns, the caller must
    /// look again. A restart reaches the sleeper through the keeper, which watches the incarnation for all threads and
    /// then calls [`Link::rouse`]: each word costs every sleep a quarter of a microsecond.
    fn sleep(&self, operation: u16, soon: Deadline) {
        let parked = self.channel.client_parked();
        let ticket = park::announce(parked);
        // Look again after the announcement: a `rouse` between the last look and the announcement wakes nobody.
        if self.has_news_for(operation) || self.hopeless().is_err() {
            return;
        }
        let (life, raw) = (&*self.life, self.life.raw());
        if !matches!(LifeWord::interpret(raw), Life::Alive { .. }) {
            return;
        }
        futex::wait_any(&[ticket.word(parked), (life.futex(), raw)], soon);
        if life.life() == Life::Dead {
            // The kernel wakes only one sleeper for each marked word: wake the others.
            futex::wake_all(life.futex());
        }
        // Do not take the flag back: if another thread of this client sleeps on it, the engine would not wake that one.
        // A flag that stays costs one needless wake-up.
    }

    /// Makes every sleeper of this client look again.
    pub(crate) fn rouse(&self) {
        park::notify(self.channel.client_parked());
    }

    /// Has the completion of `operation` been drained, or is there anything to drain?
    fn has_news_for(&self, operation: u16) -> bool {
        let inner = self.lock();
        inner.completions.has_news() || inner.operations.has_arrived(operation)
    }

    /// The waiter of `operation` does not need its region any more.
    pub(super) fn give_back(&self, operation: u16) {
        self.lock().operations.give_back(operation);
    }

    /// The waiter of `operation` gives up: what the operation gains is given back, now if it has completed, or when it does.
    pub(super) fn abandon(&self, operation: u16) {
        let mut inner = self.lock();
        let arrived = inner.operations.abandon(operation);
        // If it has completed since the caller's last look, undo it at once.
        let sent = arrived.is_some_and(|(undo, region, completion)| {
            self.undo(&mut inner, undo, &completion);
            inner.operations.free_region(region);
            self.flush(&mut inner)
        });
        self.unlock(inner, false, sent);
        if arrived.is_none() {
            self.leave_to_keeper();
        }
    }
}
