//! A worker's loads: what the lookup meant is checked before each copy and after it.

use super::Checksum;
use super::job::{Job, LoadChunk, LoadReport};
use super::mover::{Ended, Mover};
use crate::attachment::Attachment;
use kvring_gpu_kernels::Direction;
use kvring_shm_abi::futex::monotonic_ns;
use kvring_shm_abi::slot::ShardIdentity;

impl Mover {
    pub(super) fn load(&self, job: &Job, chunks: &[LoadChunk]) -> Ended {
        let mut report = LoadReport::default();
        let mut failed = Vec::new();
        for batch in chunks.chunks(self.chunks_per_batch(job, usize::MAX)) {
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
        let (attachment, namespace) = match self.client.to_load(&self.registered) {
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
        let Some(running) = job.begin_copy() else {
            for (chunk, ..) in good {
                fail(chunk, report, &"cancelled");
            }
            return;
        };
        let started = monotonic_ns();
        let verify = self.options.checksum == Checksum::Verify;
        let shards = good.iter().map(|(chunk, address, _)| (*address, &chunk.blocks[..]));
        let copied = self.start(Direction::Load, shards, job, verify).and_then(|transfer| transfer.wait());
        report.copy_ns += monotonic_ns().saturating_sub(started);
        drop(running);
        let checksums = match copied {
            Ok(done) => done.checksums,
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
}
