//! A worker's stores: reserve, copy, commit, batch by batch and overlapping.
//!
//! While the mover copies one batch, the next one's reservation is on its way, and so is the commit of the last one.
//! The mover hands the next copy to the backend before the last one has ended, so that the backend's threads never wait
//! in between. Shards that the engine does not grant, or that it cannot be asked for, are dropped and counted.

use super::Checksum;
use super::job::{CopyRunning, Job, StoreChunk};
use super::mover::Mover;
use super::report::{Dropped, StoreReport};
use super::unsettled::Unsettled;
use crate::attachment::Attachment;
use crate::batch::BatchId;
use crate::error::CallError;
use crate::gate::WriterPass;
use crate::ledger::Ledger;
use crate::link::{Answer, Pending, Undo};
use kvring_gpu_kernels::{CopyError, Direction, Transfer};
use kvring_shm_abi::failpoint::{self, Place};
use kvring_shm_abi::futex::monotonic_ns;
use kvring_shm_abi::message::{
    KEY_WORDS, Key, Record, Records, Request, ReserveAnswer, ReserveOutcome, Round, SlotOutcome, SlotRecord,
};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// How many batches are reserved ahead of the one that is copied.
const RESERVED_AHEAD: usize = 2;
/// How many commits may be unanswered at a time: each keeps an operation and a region of the payload area.
const COMMITS_OPEN: usize = 2;

/// A batch whose reservation has been sent.
struct Reserving<'a> {
    chunks: &'a [StoreChunk],
    pending: Pending,
    answer: u32,
}

/// A shard that the engine granted.
struct Granted<'a> {
    chunk: &'a StoreChunk,
    slot: u32,
    generation: u64,
    address: *mut u8,
}

/// The shards of a batch that the engine granted and that are in the ledger. If this is dropped without a commit, it
/// aborts them, whatever happened: otherwise nobody could use their slots until this client ends.
struct Grant<'a> {
    shards: Vec<Granted<'a>>,
    batch: BatchId,
    ledger: &'a Ledger,
    /// The batch has been committed or kept, so the drop does not abort it.
    committed: bool,
}

impl Grant<'_> {
    /// Keeps the slots, because a device may still write there: they stay ours, and in the ledger, as long as this
    /// client has its entry.
    fn keep(mut self) {
        self.ledger.leave(self.batch);
        self.committed = true;
    }
}

impl Drop for Grant<'_> {
    fn drop(&mut self) {
        if !self.committed
            && let Some((link, records)) = self.ledger.abort(self.batch)
        {
            link.post_abort(records);
        }
    }
}

/// A batch that is being copied into the arena.
struct Copying<'a> {
    // Fields are dropped in this order, also when the mover unwinds: the copy ends before its slots are given back,
    // before it stops counting as a running copy, and before this client may give its entry up.
    transfer: Box<dyn Transfer>,
    grant: Grant<'a>,
    running: CopyRunning<'a>,
    pass: WriterPass,
    started_ns: u64,
}

/// A commit that is due.
struct Commit {
    batch: BatchId,
    /// If it has been sent: the pending answer, and where in the payload area the outcomes will be. `None`: the keeper
    /// sends it once there is an engine again.
    sent: Option<(Pending, u32)>,
    /// How many shards.
    count: u32,
}

/// One store while it is carried out.
struct Store<'a> {
    mover: &'a Mover,
    job: &'a Job,
    attachment: &'a Attachment,
    report: StoreReport,
    /// The copy of the batch before the one that is being prepared.
    copying: Option<Copying<'a>>,
    /// Commits that have not been answered yet, the oldest first.
    commits: VecDeque<Commit>,
    /// Commits (batch, shards) that will get no answer from the engine that they were sent to.
    unsettled: Vec<(BatchId, u32)>,
    /// When the last copy ended. Two copies are in flight at once, and the time in which both ran counts once.
    copied_until_ns: u64,
}

impl Mover {
    pub(super) fn store(
        &self,
        job: &Job,
        round: Round,
        parent: Option<Key>,
        chunks: &[StoreChunk],
    ) -> Result<StoreReport, Unsettled> {
        let (attachment, namespace) = match self.client.to_store(&self.registered) {
            Ok(context) => context,
            Err(error) => {
                tracing::debug!(request = %job.request, %error, "store dropped");
                return Ok(StoreReport::dropped(chunks.len(), Dropped::by(&error)));
            }
        };
        let mut store = Store {
            mover: self,
            job,
            attachment: &attachment,
            report: StoreReport::default(),
            copying: None,
            commits: VecDeque::new(),
            unsettled: Vec::new(),
            copied_until_ns: 0,
        };
        store.carry_out(namespace, round, parent, chunks);
        let Store { report, unsettled: commits, .. } = store;
        if commits.is_empty() {
            Ok(report)
        } else {
            let until = crate::options::until(self.client.options().operation_timeout);
            Err(Unsettled { report, commits, until })
        }
    }
}

impl<'a> Store<'a> {
    fn carry_out(&mut self, namespace: u32, round: Round, parent: Option<Key>, chunks: &'a [StoreChunk]) {
        let words = self.attachment.link.payload().len();
        let mut batches = chunks.chunks(self.mover.chunks_per_batch(self.job, words));
        let (mut before, mut left) = (parent, chunks.len());
        let mut asked: VecDeque<(usize, Result<Reserving<'a>, CallError>)> = VecDeque::new();
        loop {
            // Reservations are on their way while earlier batches are copied.
            while asked.len() < RESERVED_AHEAD
                && let Some(batch) = batches.next()
            {
                asked.push_back((batch.len(), self.reserve(namespace, round, before, batch)));
                before = batch.last().map(|chunk| chunk.key);
            }
            let Some((count, reserving)) = asked.pop_front() else { break };
            if self.job.is_cancelled() || !self.attachment.link.is_healthy() {
                // Slots of reservations that are under way are given back when their answers arrive.
                let cancelled = self.job.is_cancelled();
                let why = if cancelled { Dropped::Cancelled } else { Dropped::Unavailable };
                self.report.drop_shards(left as u32, why);
                break;
            }
            left -= count;
            let granted = match reserving {
                Ok(reserving) => self.granted(reserving),
                Err(error) => {
                    tracing::debug!(request = %self.job.request, %error, "store dropped");
                    self.report.drop_shards(count as u32, Dropped::by(&error));
                    None
                }
            };
            self.settle_commits();
            // While this thread ends the batch before, the backend's threads go on with this one.
            let started = granted.and_then(|grant| self.start_copy(grant));
            self.finish_running();
            self.copying = started;
            if self.mover.queue.has_load() {
                self.finish_running();
                self.mover.loads_first();
            }
        }
        self.finish_running();
        // A preemption waits for copies, not for answers to commits.
        self.job.end_copies();
        // All these commits have one deadline.
        let until = crate::options::until(self.timeout());
        while let Some(commit) = self.commits.pop_front() {
            self.end_commit(commit, until);
        }
    }

    fn timeout(&self) -> Duration {
        self.mover.client.options().operation_timeout
    }

    /// Ends the copy that runs, if one does, and sends its commit. Called before anything that may take long, because a
    /// preemption waits as long as a copy counts as running.
    fn finish_running(&mut self) {
        let Some(copying) = self.copying.take() else { return };
        let commit = self.finish_copy(copying);
        self.commits.extend(commit);
    }

    /// Makes room for another commit: waits for the oldest one's answer if that has not come.
    fn settle_commits(&mut self) {
        while self.commits.len() >= COMMITS_OPEN
            && let Some(mut commit) = self.commits.pop_front()
        {
            if let Some((pending, at)) = commit.sent.take() {
                match pending.try_take() {
                    Ok(answer) => {
                        self.count_outcomes(&answer, at, &commit);
                        continue;
                    }
                    Err(pending) => commit.sent = Some((pending, at)),
                }
            }
            self.finish_running();
            self.end_commit(commit, crate::options::until(self.timeout()));
        }
    }

    fn reserve(
        &self,
        namespace: u32,
        round: Round,
        parent: Option<Key>,
        chunks: &'a [StoreChunk],
    ) -> Result<Reserving<'a>, CallError> {
        let count = chunks.len();
        let rank = self.mover.registered.record.rank;
        let words = (1 + count) * KEY_WORDS + count * ReserveAnswer::WORDS;
        let keys_at = KEY_WORDS as u32;
        let answer_at = keys_at + (count * KEY_WORDS) as u32;
        let mut answer = 0;
        let pending = self.attachment.link.submit(
            words,
            |region| Undo::AbortSlots {
                keys: Records { offset: region.offset + keys_at, count: count as u32 },
                answer: region.offset + answer_at,
            },
            |payload, region| {
                let mut keys: Vec<Key> = Vec::with_capacity(count + 1);
                keys.push(parent.unwrap_or_default());
                keys.extend(chunks.iter().map(|chunk| chunk.key));
                let written = payload.write(region.offset, bytemuck::cast_slice(&keys));
                debug_assert!(written.is_ok());
                answer = region.offset + answer_at;
                Request::Reserve {
                    round,
                    namespace,
                    rank,
                    keys: Records { offset: region.offset + keys_at, count: count as u32 },
                    answer,
                    parent: parent.map(|_| region.offset),
                }
            },
        )?;
        Ok(Reserving { chunks, pending, answer })
    }

    /// The shards of a batch that the engine has granted.
    fn granted(&mut self, reserving: Reserving<'a>) -> Option<Grant<'a>> {
        let Reserving { chunks, pending, answer } = reserving;
        let answered = pending.try_take().or_else(|pending| {
            self.finish_running();
            pending.wait(self.mover.client.options().operation_timeout)
        });
        let answered = answered.and_then(|answered| {
            crate::status::check(&answered.completion)?;
            Ok(answered)
        });
        let answered: Answer = match answered {
            Ok(answered) => answered,
            Err(error) => {
                tracing::debug!(request = %self.job.request, %error, "store dropped");
                self.report.drop_shards(chunks.len() as u32, Dropped::by(&error));
                return None;
            }
        };
        let mut shards = Vec::with_capacity(chunks.len());
        let mut useless = Vec::new();
        for (index, chunk) in chunks.iter().enumerate() {
            let mut words = [0u64; ReserveAnswer::WORDS];
            let at = answer + (index * ReserveAnswer::WORDS) as u32;
            let read = answered.payload().read(at, &mut words);
            let reservation: ReserveAnswer = bytemuck::cast(words);
            let outcome = read.ok().and_then(|()| reservation.outcome());
            match outcome {
                Some(ReserveOutcome::Write) => {
                    let shard = reservation.shard;
                    let arena = self.attachment.arena.as_ref();
                    match arena.and_then(|arena| arena.address(shard.offset(), self.job.paged.shard_bytes()))
                    {
                        Some(address) => shards.push(Granted {
                            chunk,
                            slot: shard.slot(),
                            generation: shard.generation,
                            address,
                        }),
                        None => {
                            tracing::error!(
                                offset = shard.offset(),
                                "the kvring engine assigned a place outside its own memory; this KV is not stored"
                            );
                            self.report.drop_shards(1, Dropped::Failed);
                            useless.push(SlotRecord {
                                slot: u64::from(shard.slot()),
                                generation: shard.generation,
                                key: chunk.key,
                                checksum: 0,
                            });
                        }
                    }
                }
                Some(ReserveOutcome::Present | ReserveOutcome::Held | ReserveOutcome::Superseded) => {
                    self.report.skipped += 1;
                }
                Some(ReserveOutcome::NoSpace) => self.report.drop_shards(1, Dropped::NoSpace),
                Some(ReserveOutcome::Busy) => self.report.drop_shards(1, Dropped::Busy),
                None => self.report.drop_shards(1, Dropped::Failed),
            }
        }
        drop(answered);
        self.attachment.link.post_abort(useless);
        if shards.is_empty() { None } else { self.hold(shards) }
    }

    /// Enters granted shards into the ledger. Only after that may anything be written into their slots.
    fn hold(&mut self, shards: Vec<Granted<'a>>) -> Option<Grant<'a>> {
        let shared = &self.mover.client.shared;
        let record = |shard: &Granted<'_>| SlotRecord {
            slot: u64::from(shard.slot),
            generation: shard.generation,
            key: shard.chunk.key,
            checksum: 0,
        };
        let records = shards.iter().map(record).collect();
        match shared.ledger.hold(&self.attachment.link, records) {
            Some(batch) => {
                let ledger = &shared.ledger;
                failpoint::here(Place::ClientGranted);
                Some(Grant { shards, batch, ledger, committed: false })
            }
            None => {
                self.report.drop_shards(shards.len() as u32, Dropped::Unavailable);
                shared.counters.late_grants.add(shards.len() as u64);
                None
            }
        }
    }

    /// Starts copying granted shards into the arena; aborts them if the copy may not begin.
    fn start_copy(&mut self, grant: Grant<'a>) -> Option<Copying<'a>> {
        let (Some(pass), Some(running)) = (self.attachment.writers.enter(), self.job.begin_copy()) else {
            // The job was preempted before the copy began, or the claim is being given up.
            self.report.drop_shards(grant.shards.len() as u32, Dropped::Cancelled);
            return None;
        };
        let started_ns = monotonic_ns();
        let checksum = self.mover.options.checksum != Checksum::Off;
        let shards = grant.shards.iter().map(|shard| (shard.address, &shard.chunk.blocks[..]));
        match self.mover.start(Direction::Store, self.attachment, shards, self.job, checksum) {
            Ok(transfer) => Some(Copying { transfer, grant, running, pass, started_ns }),
            Err(error) => {
                self.copy_failed(grant, &error);
                None
            }
        }
    }

    /// Ends a copy into the arena and sends its commit, if there is an engine to send it to.
    fn finish_copy(&mut self, copying: Copying<'a>) -> Option<Commit> {
        let Copying { transfer, grant, running, pass, started_ns } = copying;
        let copied = transfer.wait();
        let now = monotonic_ns();
        // Two copies are in flight at once, and the time in which both ran counts once.
        self.report.copy_ns += now.saturating_sub(started_ns.max(self.copied_until_ns));
        self.copied_until_ns = now;
        drop(running);
        drop(pass);
        let checksums = match copied {
            Ok(done) => done.checksums,
            Err(error) => {
                self.copy_failed(grant, &error);
                return None;
            }
        };
        failpoint::here(Place::ClientCopied);
        let count = grant.shards.len() as u32;
        self.report.bytes += u64::from(count) * self.job.paged.shard_bytes();
        // SYNC POINT: the ring's Release publishes the shard's bytes together with the message. The copy has completed
        // (with an `sfence` by each thread that stored non-temporally) before this message is pushed.
        let sent = match grant.ledger.commit(grant.batch, &checksums) {
            None => None,
            Some((link, records)) => match link.commit(grant.batch, &records) {
                Ok(sent) => Some(sent),
                Err(error) => {
                    tracing::debug!(request = %self.job.request, %error, "commit not sent; the store is dropped");
                    self.report.drop_shards(count, Dropped::by(&error));
                    return None;
                }
            },
        };
        failpoint::here(Place::ClientCommitSent);
        let batch = grant.batch;
        let mut grant = grant;
        grant.committed = true;
        Some(Commit { batch, sent, count })
    }

    fn copy_failed(&mut self, grant: Grant<'_>, error: &CopyError) {
        tracing::error!(request = %self.job.request, %error, "copying to the kvring engine's memory failed; this KV is not stored");
        self.report.drop_shards(grant.shards.len() as u32, Dropped::Failed);
        if matches!(error, CopyError::Unended(_)) {
            grant.keep();
        }
    }

    /// Waits for a commit's answer, at most until `until`, and not at all if its engine is gone.
    fn end_commit(&mut self, mut commit: Commit, until: Instant) {
        if let Some((pending, at)) = commit.sent.take() {
            match pending.wait(until.saturating_duration_since(Instant::now())) {
                Ok(answer) => return self.count_outcomes(&answer, at, &commit),
                Err(error) => tracing::debug!(%error, "commit not acknowledged yet"),
            }
        }
        self.unsettled.push((commit.batch, commit.count));
    }

    fn count_outcomes(&mut self, answered: &Answer, answer: u32, commit: &Commit) {
        if let Err(error) = crate::status::check(&answered.completion) {
            tracing::warn!(request = %self.job.request, %error, "the kvring engine refused what was copied; this KV is not stored");
            self.report.drop_shards(commit.count, Dropped::by(&error));
            if let Some((link, records)) = self.mover.client.shared.ledger.abort(commit.batch) {
                link.post_abort(records);
            }
            return;
        }
        for index in 0..commit.count {
            let mut word = [0u64; 1];
            let read = answered.payload().read(answer + index, &mut word);
            match read.ok().and_then(|()| SlotOutcome::from_number(word[0])) {
                Some(SlotOutcome::Done) => self.report.stored += 1,
                Some(SlotOutcome::Gone) => self.report.drop_shards(1, Dropped::Gone),
                Some(SlotOutcome::NotYours) | None => {
                    tracing::error!(
                        "the kvring engine does not know a place that it assigned; this KV is not stored"
                    );
                    self.report.drop_shards(1, Dropped::Failed);
                }
            }
        }
        self.mover.client.shared.ledger.close(commit.batch);
    }
}
