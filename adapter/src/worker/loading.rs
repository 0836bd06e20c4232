//! A worker's loads. By the chunk's record the mover finds its own rank's slot. Before and after each copy it checks that this
//! is still the slot of the chunk that the lookup found.
//! It hands each batch to the backend before the last one has ended, so that nothing waits in between.

use super::Checksum;
use super::job::{CopyRunning, Job, LoadChunk};
use super::mover::{Ended, Mover};
use super::report::{LoadError, LoadReport};
use crate::attachment::Attachment;
use kvring_gpu_kernels::{CopyError, Direction, Transfer};
use kvring_shm_abi::engine_segment::ChunkHandle;
use kvring_shm_abi::failpoint::{self, Rule};
use kvring_shm_abi::futex::monotonic_ns;
use kvring_shm_abi::message::{Key, Registration, Request};
use kvring_shm_abi::slot::{CommittedShard, ShardIdentity};
use std::sync::Arc;

/// This rank's shard of a chunk, as it was found before the copy.
struct Shard {
    slot: u32,
    generation: u64,
    key: Key,
    address: *mut u8,
    /// 0: it has none.
    checksum: u64,
}

/// A batch that is being copied to its blocks.
struct Copying<'a> {
    // Fields are dropped in this order, also when the mover unwinds: the copy ends before it stops counting as a
    // running copy, and before the arena may be unmapped.
    transfer: Box<dyn Transfer>,
    running: CopyRunning<'a>,
    attachment: Arc<Attachment>,
    /// Each chunk with its shard.
    chunks: Vec<(&'a LoadChunk, Shard)>,
    started_ns: u64,
}

/// One load while it is carried out.
struct Load<'a> {
    mover: &'a Mover,
    job: &'a Job,
    report: LoadReport,
    failed: Vec<u32>,
    /// Why the first of the failed chunks failed.
    first: Option<String>,
    /// The error of a copy of which nobody knows whether it has ended.
    lost: Option<CopyError>,
    /// When the last copy ended. Two copies are in flight at once, and the time in which both ran counts once.
    copied_until_ns: u64,
}

impl Mover {
    pub(super) fn load(&self, job: &Job, chunks: &[LoadChunk]) -> Ended {
        let (report, failed) = (LoadReport::default(), Vec::new());
        let mut load = Load { mover: self, job, report, failed, first: None, lost: None, copied_until_ns: 0 };
        let mut copying = None;
        for batch in chunks.chunks(self.chunks_per_batch(job, usize::MAX)) {
            // While this thread ends the batch before, the backend goes on with this one.
            let started = load.start(batch);
            if let Some(before) = core::mem::replace(&mut copying, started) {
                load.finish(before);
            }
            if load.lost.is_some() {
                break;
            }
        }
        if let Some(last) = copying {
            load.finish(last);
        }
        let Load { report, failed, first, lost, .. } = load;
        if let Some(error) = lost {
            return Ended::Lost(error);
        }
        if let Some(why) = first {
            // Log one line for the load: a cause that fails one chunk (an engine that is gone) fails thousands.
            let (chunks, failed_chunks) = (chunks.len(), report.failed);
            tracing::warn!(
                request = %job.request, failed_chunks, chunks, reason = %why,
                "load failed; vLLM computes these tokens again or fails the request, as its kv_load_failure_policy says"
            );
        }
        tracing::debug!(
            request = %job.request, loaded = report.loaded, failed = report.failed, bytes = report.bytes,
            ms = report.copy_ns / 1_000_000, "load"
        );
        Ended::Load(report, failed)
    }
}

impl<'a> Load<'a> {
    fn fail(&mut self, chunk: &LoadChunk, why: &LoadError) {
        self.first.get_or_insert_with(|| why.to_string());
        if let LoadError::Mismatch(found) = why {
            tracing::debug!(request = %self.job.request, chunk = chunk.chunk.word.chunk(), %found, "not what was looked up");
        }
        self.report.fail(why);
        self.failed.extend_from_slice(&chunk.blocks);
    }

    fn fail_all<'c>(&mut self, chunks: impl IntoIterator<Item = &'c LoadChunk>, why: &LoadError) {
        chunks.into_iter().for_each(|chunk| self.fail(chunk, why));
    }

    /// Deals with a copy that failed. If nobody knows whether it has ended, the load is lost, and the arena that the
    /// copy reads stays mapped for ever.
    fn copy_failed<'c>(
        &mut self,
        chunks: impl IntoIterator<Item = &'c LoadChunk>,
        error: CopyError,
        attachment: Arc<Attachment>,
    ) {
        if matches!(error, CopyError::Unended(_)) {
            core::mem::forget(attachment);
            self.lost.get_or_insert(error);
        } else {
            self.fail_all(chunks, &LoadError::Copy(error));
        }
    }

    /// Starts copying those chunks of a batch whose slots hold the shards that the lookup found.
    fn start(&mut self, chunks: &'a [LoadChunk]) -> Option<Copying<'a>> {
        let (mover, job) = (self.mover, self.job);
        let (attachment, namespace) = match mover.client.to_load(&mover.registered) {
            Ok(context) => context,
            Err(error) => {
                self.fail_all(chunks, &LoadError::Unavailable(error));
                return None;
            }
        };
        // Before the copy: is each chunk still there, and where?
        let mut good: Vec<(&LoadChunk, Shard)> = Vec::with_capacity(chunks.len());
        for chunk in chunks {
            match mover.before_copy(&attachment, namespace, job, chunk) {
                Ok(shard) => good.push((chunk, shard)),
                Err(why) => self.fail(chunk, &why),
            }
        }
        if good.is_empty() {
            return None;
        }
        let Some(running) = job.begin_copy() else {
            self.fail_all(good.into_iter().map(|(chunk, ..)| chunk), &LoadError::Cancelled);
            return None;
        };
        let started_ns = monotonic_ns();
        let verify = mover.options.checksum == Checksum::Verify;
        let shards = good.iter().map(|(chunk, shard)| (shard.address, &chunk.blocks[..]));
        match mover.start(Direction::Load, &attachment, shards, job, verify) {
            Ok(transfer) => Some(Copying { transfer, running, attachment, chunks: good, started_ns }),
            Err(error) => {
                self.copy_failed(good.into_iter().map(|(chunk, ..)| chunk), error, attachment);
                None
            }
        }
    }

    /// Ends a copy, and checks that each slot has held the shard that the lookup found all the time.
    fn finish(&mut self, copying: Copying<'a>) {
        let Copying { transfer, running, attachment, chunks, started_ns } = copying;
        let copied = transfer.wait();
        let now = monotonic_ns();
        self.report.copy_ns += now.saturating_sub(started_ns.max(self.copied_until_ns));
        self.copied_until_ns = now;
        drop(running);
        let checksums = match copied {
            Ok(done) => done.checksums,
            Err(error) => {
                self.copy_failed(chunks.into_iter().map(|(chunk, _)| chunk), error, attachment);
                return;
            }
        };
        let verify = self.mover.options.checksum == Checksum::Verify;
        for (index, (chunk, shard)) in chunks.into_iter().enumerate() {
            let Shard { slot, generation, key, checksum: stored, .. } = shard;
            let header = attachment.link.engine.slot(slot);
            let computed = checksums.get(index).copied().unwrap_or(0);
            if header.is_none_or(|header| header.still_valid(generation).is_err()) {
                self.fail(chunk, &LoadError::Gone);
            } else if verify && stored != 0 && stored != computed {
                // Send this before the load is reported, and so before anybody stores the chunk again.
                attachment.link.post(Request::Invalidate { slot, generation, key });
                self.fail(chunk, &LoadError::Corrupt { stored, computed });
            } else {
                self.report.loaded += 1;
                self.report.bytes += self.job.paged.shard_bytes();
            }
        }
    }
}

impl Mover {
    /// Finds this rank's shard of a chunk, in this order: the chunk's record, the slot that it names, the record again.
    fn before_copy(
        &self,
        attachment: &Attachment,
        namespace: u32,
        job: &Job,
        chunk: &LoadChunk,
    ) -> Result<Shard, LoadError> {
        let ChunkHandle { arena_id, word } = chunk.chunk;
        if arena_id != attachment.identity.arena_id && !failpoint::broken(Rule::ArenaId) {
            return Err(LoadError::OtherArena);
        }
        let engine = &attachment.link.engine;
        let content = engine.chunks.find(word).ok_or(LoadError::Gone)?;
        let Registration { rank, world, .. } = self.registered.record;
        let key = content.identity.key;
        let expected = ShardIdentity { key, namespace, rank, offset: 0, length: job.paged.shard_bytes() };
        let slot = engine.chunks.slot(&content, world, rank).ok_or(LoadError::Gone)?;
        let header = engine.slot(slot).ok_or(LoadError::Outside { slot, offset: 0 })?;
        let found = header.validate(&expected);
        // Whatever the slot said, it is the chunk's only if the chunk is still there.
        if !engine.chunks.is_still_there(word) {
            return Err(LoadError::Gone);
        }
        let CommittedShard { generation, offset, checksum } = found.map_err(LoadError::Mismatch)?;
        let arena = attachment.arena.as_ref();
        let address = arena.and_then(|arena| arena.address(offset, expected.length));
        let address = address.ok_or(LoadError::Outside { slot, offset })?;
        Ok(Shard { slot, generation, key, address, checksum })
    }
}
