//! The mover: the thread that carries out a worker's jobs, so that vLLM's never waits for a copy or for the engine.
//!
//! Loads go first: somebody waits for them. A store goes batch by batch: while one batch is copied the next one's
//! reservation is on its way, and the commits of the last one too. What the engine did not grant, or could not be
//! asked for, is dropped and counted; what is half done when the engine goes away ends by itself.

use super::job::{Job, LoadChunk, LoadReport, StoreChunk, StoreReport, Work};
use super::queue::Queue;
use super::{Checksum, WorkerOptions};
use crate::attachment::Attachment;
use crate::client::{Client, Registered};
use crate::error::CallError;
use crate::link::{Answer, Pending, Undo, slot_words, write_slots};
use kvring_gpu_kernels::{CopyBackend, CopyBatch, CopyError, Direction};
use kvring_shm_abi::futex::monotonic_ns;
use kvring_shm_abi::message::{
    KEY_WORDS, Key, Record, Records, Request, ReserveAnswer, ReserveOutcome, Round, SlotOutcome, SlotRecord,
};
use kvring_shm_abi::slot::ShardIdentity;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// Bytes of one batch: large enough to hide a round trip, small enough that a load does not wait long behind it.
const BATCH_BYTES: u64 = 32 << 20;
/// Chunks of one batch.
const BATCH_CHUNKS: usize = 512;

pub(super) struct Mover {
    pub(super) client: Arc<Client>,
    pub(super) registered: Arc<Registered>,
    pub(super) queue: Arc<Queue>,
    pub(super) backend: Arc<dyn CopyBackend>,
    pub(super) options: WorkerOptions,
}

/// How a job ended.
enum Ended {
    Store(StoreReport),
    /// With the blocks that must be recomputed.
    Load(LoadReport, Vec<u32>),
}

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

impl Mover {
    /// Works until the queue is closed and empty.
    pub(super) fn run(&self) {
        while let Some(job) = self.queue.next() {
            self.carry_out(&job);
        }
    }

    /// One job, to its report: whatever happens, it is reported exactly once, or a request would hang.
    fn carry_out(&self, job: &Arc<Job>) {
        let ran = catch_unwind(AssertUnwindSafe(|| match &job.work {
            Work::Store { round, parent, chunks } => Ended::Store(self.store(job, *round, *parent, chunks)),
            Work::Load { chunks } => self.load(job, chunks),
        }));
        job.end_copies();
        match (ran, &job.work) {
            (Ok(Ended::Store(report)), _) => self.queue.finish_store(job, report),
            (Ok(Ended::Load(report, failed)), _) => self.queue.finish_load(job, report, &failed),
            (Err(_), Work::Store { chunks, .. }) => {
                tracing::error!(request = %job.request, "a store failed inside the mover; it is dropped");
                let report = StoreReport { dropped: chunks.len() as u32, ..StoreReport::default() };
                self.queue.finish_store(job, report);
            }
            (Err(_), Work::Load { chunks }) => {
                tracing::error!(request = %job.request, "a load failed inside the mover; its blocks are recomputed");
                let failed: Vec<u32> = chunks.iter().flat_map(|chunk| chunk.blocks.iter().copied()).collect();
                let report = LoadReport { failed: chunks.len() as u32, ..LoadReport::default() };
                self.queue.finish_load(job, report, &failed);
            }
        }
    }

    fn chunks_per_batch(&self, job: &Job) -> usize {
        let fit = BATCH_BYTES / job.paged.shard_bytes().max(1);
        usize::try_from(fit).unwrap_or(1).clamp(1, BATCH_CHUNKS)
    }

    fn store(&self, job: &Job, round: Round, parent: Option<Key>, chunks: &[StoreChunk]) -> StoreReport {
        let mut report = StoreReport::default();
        let (attachment, namespace) = match self.client.registered(&self.registered, true) {
            Ok(context) => context,
            Err(error) => {
                tracing::debug!(request = %job.request, %error, "store dropped");
                report.dropped = chunks.len() as u32;
                return report;
            }
        };
        let batches: Vec<&[StoreChunk]> = chunks.chunks(self.chunks_per_batch(job)).collect();
        let reserve = |index: usize| {
            let before = index.checked_sub(1).and_then(|i| batches[i].last()).map(|chunk| chunk.key);
            self.reserve(&attachment, namespace, round, before.or(parent), batches[index])
        };
        let mut commits: Vec<(Pending, u32, u32)> = Vec::new();
        let mut next = batches.first().map(|_| reserve(0));
        for index in 0..batches.len() {
            let reserving = next.take();
            // The next reservation travels while this batch is copied.
            let granted = match reserving {
                Some(Ok(reserving)) => self.granted(&attachment, job, reserving, &mut report),
                Some(Err(error)) => {
                    tracing::debug!(request = %job.request, %error, "store dropped");
                    report.dropped += batches[index].len() as u32;
                    Vec::new()
                }
                None => Vec::new(),
            };
            if index + 1 < batches.len() {
                next = Some(reserve(index + 1));
            }
            if let Some(commit) = self.copy_out(&attachment, job, &granted, &mut report) {
                commits.push(commit);
            }
            self.loads_first();
        }
        for (pending, answer, count) in commits {
            self.committed(pending, answer, count, &mut report);
        }
        tracing::debug!(
            request = %job.request, stored = report.stored, skipped = report.skipped, dropped = report.dropped,
            bytes = report.bytes, ms = report.copy_ns / 1_000_000, "store"
        );
        report
    }

    /// Between two batches of a store: loads that have arrived meanwhile.
    fn loads_first(&self) {
        while let Some(job) = self.queue.next_load() {
            self.carry_out(&job);
        }
    }

    fn reserve<'a>(
        &self,
        attachment: &Attachment,
        namespace: u32,
        round: Round,
        parent: Option<Key>,
        chunks: &'a [StoreChunk],
    ) -> Result<Reserving<'a>, CallError> {
        let count = chunks.len();
        let rank = self.registered.record.rank;
        let words = (1 + count) * KEY_WORDS + count * ReserveAnswer::WORDS;
        let keys_at = KEY_WORDS as u32;
        let answer_at = keys_at + (count * KEY_WORDS) as u32;
        let mut answer = 0;
        let pending = attachment.link.submit(
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

    /// What the engine granted of a batch.
    fn granted<'a>(
        &self,
        attachment: &Attachment,
        job: &Job,
        reserving: Reserving<'a>,
        report: &mut StoreReport,
    ) -> Vec<Granted<'a>> {
        let Reserving { chunks, pending, answer } = reserving;
        let answered = pending.wait(self.client.options().operation_timeout).and_then(|answered| {
            crate::status::check(&answered.completion)?;
            Ok(answered)
        });
        let answered: Answer = match answered {
            Ok(answered) => answered,
            Err(error) => {
                tracing::debug!(request = %job.request, %error, "store dropped");
                report.dropped += chunks.len() as u32;
                return Vec::new();
            }
        };
        let mut granted = Vec::with_capacity(chunks.len());
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
                    let arena = attachment.arena.as_ref();
                    match arena.and_then(|arena| arena.address(shard.offset(), job.paged.shard_bytes())) {
                        Some(address) => granted.push(Granted {
                            chunk,
                            slot: shard.slot(),
                            generation: shard.generation,
                            address,
                        }),
                        None => {
                            tracing::error!(
                                offset = shard.offset(),
                                "the engine granted a slot outside the arena"
                            );
                            report.dropped += 1;
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
                    report.skipped += 1;
                }
                Some(ReserveOutcome::NoSpace | ReserveOutcome::Busy) | None => report.dropped += 1,
            }
        }
        drop(answered);
        attachment.link.post_abort(useless);
        granted
    }

    /// Copies granted shards into the arena and sends their commit; an abort where the copy may not begin.
    fn copy_out(
        &self,
        attachment: &Attachment,
        job: &Job,
        granted: &[Granted<'_>],
        report: &mut StoreReport,
    ) -> Option<(Pending, u32, u32)> {
        if granted.is_empty() {
            return None;
        }
        let records = |checksums: &[u64]| -> Vec<SlotRecord> {
            granted
                .iter()
                .enumerate()
                .map(|(index, shard)| SlotRecord {
                    slot: u64::from(shard.slot),
                    generation: shard.generation,
                    key: shard.chunk.key,
                    checksum: checksums.get(index).copied().unwrap_or(0),
                })
                .collect()
        };
        let pass = attachment.writers.enter();
        if pass.is_none() || !job.begin_copy() {
            // Preempted before the copy began, or the attachment is being given up.
            report.dropped += granted.len() as u32;
            attachment.link.post_abort(records(&[]));
            return None;
        }
        let started = monotonic_ns();
        let copied = self.copy(
            Direction::Store,
            granted.iter().map(|shard| (shard.address, &shard.chunk.blocks[..])),
            job,
            self.options.checksum != Checksum::Off,
        );
        report.copy_ns += monotonic_ns().saturating_sub(started);
        job.end_copy();
        drop(pass);
        let checksums = match copied {
            Ok(checksums) => checksums,
            Err(error) => {
                tracing::error!(request = %job.request, %error, "a copy into the arena failed; the store is dropped");
                report.dropped += granted.len() as u32;
                attachment.link.post_abort(records(&[]));
                return None;
            }
        };
        report.bytes += granted.len() as u64 * job.paged.shard_bytes();
        let records = records(&checksums);
        let mut answer = 0;
        // SYNC POINT: the submission's Release publishes the payload: the copy has completed (with an `sfence` by
        // each thread that stored non-temporally) before this message is pushed.
        let submitted = attachment.link.submit(
            slot_words(records.len()),
            |_| Undo::Nothing,
            |payload, region| {
                let (slots, at) = write_slots(payload, region, &records);
                answer = at;
                Request::Commit { slots, answer: at }
            },
        );
        match submitted {
            Ok(pending) => Some((pending, answer, records.len() as u32)),
            Err(error) => {
                tracing::debug!(request = %job.request, %error, "commit not sent; the store is dropped");
                report.dropped += records.len() as u32;
                attachment.link.post_abort(records);
                None
            }
        }
    }

    fn committed(&self, pending: Pending, answer: u32, count: u32, report: &mut StoreReport) {
        let answered = match pending.wait(self.client.options().operation_timeout) {
            Ok(answered) => answered,
            Err(error) => {
                // The engine went away with the commit: whether it counts is the successor's to know.
                tracing::debug!(%error, "commit not acknowledged");
                report.dropped += count;
                return;
            }
        };
        for index in 0..count {
            let mut word = [0u64; 1];
            let read = answered.payload().read(answer + index, &mut word);
            match read.ok().and_then(|()| SlotOutcome::from_word(word[0])) {
                Some(SlotOutcome::Done) => report.stored += 1,
                Some(SlotOutcome::Gone) => report.dropped += 1,
                Some(SlotOutcome::NotYours) | None => {
                    tracing::error!("the engine does not know a slot that it granted");
                    report.dropped += 1;
                }
            }
        }
    }

    fn load(&self, job: &Job, chunks: &[LoadChunk]) -> Ended {
        let mut report = LoadReport::default();
        let mut failed = Vec::new();
        for batch in chunks.chunks(self.chunks_per_batch(job)) {
            self.load_batch(job, batch, &mut report, &mut failed);
        }
        tracing::debug!(
            request = %job.request, loaded = report.loaded, failed = report.failed, bytes = report.bytes,
            ms = report.copy_ns / 1_000_000, "load"
        );
        Ended::Load(report, failed)
    }

    fn load_batch(&self, job: &Job, chunks: &[LoadChunk], report: &mut LoadReport, failed: &mut Vec<u32>) {
        let mut fail = |chunk: &LoadChunk, report: &mut LoadReport, why: &dyn core::fmt::Display| {
            tracing::warn!(request = %job.request, slot = chunk.shard.slot, %why, "load failed; its blocks are recomputed");
            report.failed += 1;
            failed.extend_from_slice(&chunk.blocks);
        };
        let (attachment, namespace) = match self.client.registered(&self.registered, false) {
            Ok(context) => context,
            Err(error) => {
                for chunk in chunks {
                    fail(chunk, report, &error);
                }
                return;
            }
        };
        // Before the copy: is each slot the shard that the lookup meant?
        let mut good: Vec<(&LoadChunk, *mut u8, u64)> = Vec::with_capacity(chunks.len());
        for chunk in chunks {
            match self.before_copy(&attachment, namespace, job, chunk) {
                Ok((address, checksum)) => good.push((chunk, address, checksum)),
                Err(why) => fail(chunk, report, &why),
            }
        }
        if good.is_empty() {
            return;
        }
        if !job.begin_copy() {
            for (chunk, ..) in good {
                fail(chunk, report, &"cancelled");
            }
            return;
        }
        let started = monotonic_ns();
        let verify = self.options.checksum == Checksum::Verify;
        let copied = self.copy(
            Direction::Load,
            good.iter().map(|(chunk, address, _)| (*address, &chunk.blocks[..])),
            job,
            verify,
        );
        report.copy_ns += monotonic_ns().saturating_sub(started);
        job.end_copy();
        let checksums = match copied {
            Ok(checksums) => checksums,
            Err(error) => {
                for (chunk, ..) in good {
                    fail(chunk, report, &error);
                }
                return;
            }
        };
        // After the copy: was it that shard all the time?
        for (index, (chunk, _, stored)) in good.into_iter().enumerate() {
            let header = attachment.link.engine.slot(chunk.shard.slot);
            let still = header.map(|header| header.still_valid(chunk.shard.generation));
            let computed = checksums.get(index).copied().unwrap_or(0);
            match still {
                Some(Ok(())) if verify && stored != 0 && stored != computed => {
                    let why = format!("expected checksum {stored:#018x}, the bytes have {computed:#018x}");
                    fail(chunk, report, &why);
                }
                Some(Ok(())) => {
                    report.loaded += 1;
                    report.bytes += job.paged.shard_bytes();
                }
                Some(Err(error)) => fail(chunk, report, &error),
                None => fail(chunk, report, &"no such slot"),
            }
        }
    }

    /// Arena, key, namespace, rank, place and generation of one shard; its address and stored checksum.
    fn before_copy(
        &self,
        attachment: &Attachment,
        namespace: u32,
        job: &Job,
        chunk: &LoadChunk,
    ) -> Result<(*mut u8, u64), String> {
        let shard = &chunk.shard;
        if shard.arena_id != attachment.identity.arena_id {
            return Err("the lookup was answered by another start of the engine".to_owned());
        }
        let header = attachment.link.engine.slot(shard.slot).ok_or_else(|| "no such slot".to_owned())?;
        let expected = ShardIdentity {
            key: shard.key,
            namespace,
            rank: self.registered.record.rank,
            offset: shard.offset,
            length: job.paged.shard_bytes(),
        };
        let checksum = header.validate(&expected, shard.generation).map_err(|error| error.to_string())?;
        let arena = attachment.arena.as_ref().ok_or_else(|| "this client maps no arena".to_owned())?;
        let address = arena
            .address(shard.offset, expected.length)
            .ok_or_else(|| format!("offset {} is outside the arena", shard.offset))?;
        Ok((address, checksum))
    }

    /// Copies shards between the arena and their blocks; checksums in the same order, if asked for.
    fn copy<'a>(
        &self,
        direction: Direction,
        shards: impl Iterator<Item = (*mut u8, &'a [u32])>,
        job: &Job,
        checksum: bool,
    ) -> Result<Vec<u64>, CopyError> {
        let mut batch = CopyBatch::new(direction, checksum);
        for (address, blocks) in shards {
            // SAFETY: the address has been checked against the arena for a whole shard, and the attachment that maps
            // it is held by the caller; the pages are as `PagedKv::new` was promised, for as long as the job runs. A
            // store's slot is ours (WRITING, under a writer pass); a load's bytes are not believed before its slot's
            // word has been looked at again.
            unsafe { batch.shard(address, job.paged.pages(blocks)) };
        }
        Ok(self.backend.submit(batch)?.wait()?.checksums)
    }
}
