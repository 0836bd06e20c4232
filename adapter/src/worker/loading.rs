//! A worker's loads: what the lookup meant is checked before each copy and after it.

use super::Checksum;
use super::job::{Job, LoadChunk};
use super::mover::{Ended, Mover};
use super::report::{LoadError, LoadReport};
use crate::attachment::Attachment;
use kvring_gpu_kernels::Direction;
use kvring_shm_abi::failpoint;
use kvring_shm_abi::futex::monotonic_ns;
use kvring_shm_abi::slot::ShardIdentity;

impl Mover {
    pub(super) fn load(&self, job: &Job, chunks: &[LoadChunk]) -> Ended {
        let mut report = LoadReport::default();
        let mut failed = Vec::new();
        let mut first = None;
        for batch in chunks.chunks(self.chunks_per_batch(job, usize::MAX)) {
            self.load_batch(job, batch, &mut report, &mut failed, &mut first);
        }
        if let Some(why) = first {
            // One line: what fails one chunk (an engine that is gone) fails thousands.
            let (of, failed) = (chunks.len(), report.failed);
            tracing::warn!(request = %job.request, failed, of, %why, "load failed; its blocks are recomputed");
        }
        tracing::debug!(
            request = %job.request, loaded = report.loaded, failed = report.failed, bytes = report.bytes,
            ms = report.copy_ns / 1_000_000, "load"
        );
        Ended::Load(report, failed)
    }

    fn load_batch(
        &self,
        job: &Job,
        chunks: &[LoadChunk],
        report: &mut LoadReport,
        failed: &mut Vec<u32>,
        first: &mut Option<String>,
    ) {
        let mut fail = |chunk: &LoadChunk, report: &mut LoadReport, why: &LoadError| {
            first.get_or_insert_with(|| format!("slot {}: {why}", chunk.shard.slot));
            report.fail(why);
            failed.extend_from_slice(&chunk.blocks);
        };
        let (attachment, namespace) = match self.client.to_load(&self.registered) {
            Ok(context) => context,
            Err(error) => {
                let error = LoadError::Unavailable(error);
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
        let Some(running) = job.begin_copy() else {
            for (chunk, ..) in good {
                fail(chunk, report, &LoadError::Cancelled);
            }
            return;
        };
        let started = monotonic_ns();
        let verify = self.options.checksum == Checksum::Verify;
        let shards = good.iter().map(|(chunk, address, _)| (*address, &chunk.blocks[..]));
        let copied = self
            .start(Direction::Load, &attachment, shards, job, verify)
            .and_then(|transfer| transfer.wait());
        report.copy_ns += monotonic_ns().saturating_sub(started);
        drop(running);
        let checksums = match copied {
            Ok(done) => done.checksums,
            Err(error) => {
                let error = LoadError::Copy(error);
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
                    fail(chunk, report, &LoadError::Corrupt { stored, computed });
                }
                Some(Ok(())) => {
                    report.loaded += 1;
                    report.bytes += job.paged.shard_bytes();
                }
                Some(Err(error)) => fail(chunk, report, &error.into()),
                None => fail(chunk, report, &outside(chunk)),
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
    ) -> Result<(*mut u8, u64), LoadError> {
        let shard = &chunk.shard;
        if shard.arena_id != attachment.identity.arena_id && !failpoint::broken("arena id") {
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
