//! A worker's loads. Before and after each copy the mover checks that the slot holds the shard that the lookup found.
//! It hands each batch to the backend before the last one has ended, so that nothing waits in between.

use super::Checksum;
use super::job::{CopyRunning, Job, LoadChunk};
use super::mover::{Ended, Mover};
use super::report::{LoadError, LoadReport};
use crate::attachment::Attachment;
use kvring_gpu_kernels::{CopyError, Direction, Transfer};
use kvring_shm_abi::failpoint::{self, Rule};
use kvring_shm_abi::futex::monotonic_ns;
use kvring_shm_abi::message::Request;
use kvring_shm_abi::slot::ShardIdentity;
use std::sync::Arc;

/// A batch that is being copied to its blocks.
struct Copying<'a> {
    // Fields are dropped in this order, also when the mover unwinds: the copy ends before it stops counting as a
    // running copy, and before the arena may be unmapped.
    transfer: Box<dyn Transfer>,
    running: CopyRunning<'a>,
    attachment: Arc<Attachment>,
    /// Each chunk with its stored checksum.
    chunks: Vec<(&'a LoadChunk, u64)>,
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
        if let LoadError::Slot(found) = why {
            tracing::debug!(request = %self.job.request, slot = chunk.shard.slot, %found, "not what was looked up");
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
        // Before the copy: does each slot hold the shard that the lookup found?
        let mut good: Vec<(&LoadChunk, *mut u8, u64)> = Vec::with_capacity(chunks.len());
        for chunk in chunks {
            match mover.before_copy(&attachment, namespace, job, chunk) {
                Ok((address, checksum)) => good.push((chunk, address, checksum)),
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
        let shards = good.iter().map(|(chunk, address, _)| (*address, &chunk.blocks[..]));
        match mover.start(Direction::Load, &attachment, shards, job, verify) {
            Ok(transfer) => {
                let chunks = good.into_iter().map(|(chunk, _, checksum)| (chunk, checksum)).collect();
                Some(Copying { transfer, running, attachment, chunks, started_ns })
            }
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
        for (index, (chunk, stored)) in chunks.into_iter().enumerate() {
            let header = attachment.link.engine.slot(chunk.shard.slot);
            let still = header.map(|header| header.still_valid(chunk.shard.generation));
            let computed = checksums.get(index).copied().unwrap_or(0);
            match still {
                Some(Ok(())) if verify && stored != 0 && stored != computed => {
                    // Send this before the load is reported, and so before anybody stores the chunk again.
                    let shard = &chunk.shard;
                    attachment.link.post(Request::Invalidate {
                        slot: shard.slot,
                        generation: shard.generation,
                        key: shard.key,
                    });
                    self.fail(chunk, &LoadError::Corrupt { stored, computed });
                }
                Some(Ok(())) => {
                    self.report.loaded += 1;
                    self.report.bytes += self.job.paged.shard_bytes();
                }
                Some(Err(error)) => self.fail(chunk, &error.into()),
                None => self.fail(chunk, &outside(chunk)),
            }
        }
    }
}

impl Mover {
    /// Checks arena, key, namespace, rank, place and generation of one shard. Returns its address and stored checksum.
    fn before_copy(
        &self,
        attachment: &Attachment,
        namespace: u32,
        job: &Job,
        chunk: &LoadChunk,
    ) -> Result<(*mut u8, u64), LoadError> {
        let shard = &chunk.shard;
        if shard.arena_id != attachment.identity.arena_id && !failpoint::broken(Rule::ArenaId) {
            return Err(LoadError::OtherArena);
        }
        let header = attachment.link.engine.slot(shard.slot).ok_or_else(|| outside(chunk))?;
        let expected = ShardIdentity {
            key: shard.key,
            namespace,
            rank: self.registered.record.rank,
            offset: shard.offset,
            length: job.paged.shard_bytes(),
        };
        let checksum = header.validate(&expected, shard.generation)?;
        let arena = attachment.arena.as_ref();
        let address = arena.and_then(|arena| arena.address(shard.offset, expected.length));
        let address = address.ok_or_else(|| outside(chunk))?;
        Ok((address, checksum))
    }
}

fn outside(chunk: &LoadChunk) -> LoadError {
    LoadError::Outside { slot: chunk.shard.slot, offset: chunk.shard.offset }
}
