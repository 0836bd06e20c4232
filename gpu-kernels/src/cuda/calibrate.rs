//! Measures once which way of copying is fastest here, for this layout, on memory of our own, in at most 100 ms.
//!
//! It makes a cache of the same shape in scratch memory: as many planes, pages as long, contiguous where the real ones are. So
//! nobody's KV is touched, whatever the GPU is doing.

use super::arena::Arena;
use super::error::GpuError;
use super::gpu::CudaBackend;
use super::objects::{DeviceBuffer, HostBuffer};
use super::plan::{Choice, Plan, RUN_MIN, SMALL_BYTES, Way};
use super::prepared::{Prepared, contiguous_bytes};
use crate::backend::{CopyError, Transfer};
use crate::batch::{CopyBatch, Direction};
use crate::layout::{KvGroup, Memory, PagedKv, Plane};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The time for all measurements. A copy that has begun by then still ends.
const BUDGET: Duration = Duration::from_millis(90);
/// The time for one measurement.
const EACH: Duration = Duration::from_millis(8);
/// Bytes of the batches that are measured, if the scratch memory allows it.
const BATCH_BYTES: u64 = 8 << 20;
/// Layouts with longer chunks are not measured: they go by [`Plan::by_rule`].
const SCRATCH_MAX: u64 = 64 << 20;
/// A way that uses SMs must be faster than DMA alone by this factor.
const WORTH_AN_SM: f64 = 1.05;

const DIRECTIONS: [Direction; 2] = [Direction::Store, Direction::Load];
const WAYS: [Way; 3] = [Way::Batch, Way::Staged, Way::ZeroCopy];

/// A cache of the same shape, and an arena for some of its chunks.
struct Scratch {
    paged: Arc<PagedKv>,
    prepared: Prepared,
    arena: Arc<Arena>,
    chunks: u32,
    host: Arc<HostBuffer>,
    _pages: DeviceBuffer,
}

/// Measures, and decides on a plan.
pub(super) fn calibrate(backend: &CudaBackend, paged: &PagedKv) -> Result<Plan, GpuError> {
    let until = Instant::now() + BUDGET;
    let contiguous = contiguous_bytes(paged);
    if paged.shard_bytes() > SCRATCH_MAX {
        return Ok(Plan::by_rule(contiguous));
    }
    let Some(scratch) = Scratch::of(backend, paged)? else { return Ok(Plan::by_rule(contiguous)) };
    let mut choices = Vec::with_capacity(2);
    for direction in DIRECTIONS {
        let bulk = scratch.best(backend, direction, scratch.chunks, contiguous, until)?;
        let small = if paged.shard_bytes() <= SMALL_BYTES {
            scratch.best(backend, direction, 1, contiguous, until)?
        } else {
            bulk
        };
        choices.push(Choice { bulk, small });
    }
    Ok(Plan([choices[0], choices[1]]))
}

impl Scratch {
    /// `None` if short pages lie so far apart that the scratch memory would be too long.
    fn of(backend: &CudaBackend, paged: &PagedKv) -> Result<Option<Scratch>, GpuError> {
        let context = backend.context();
        let chunks = (BATCH_BYTES / paged.shard_bytes().max(1)).clamp(1, 64) as u32;
        let mut places = Vec::new();
        let mut bytes = 0usize;
        for group in paged.groups() {
            let (offsets, stride) = places_of(group);
            let blocks = (chunks * group.blocks_per_chunk) as usize;
            places.push((bytes, offsets, stride, blocks as u32));
            bytes += stride * blocks;
        }
        if bytes as u64 > 2 * SCRATCH_MAX {
            return Ok(None);
        }
        let pages = DeviceBuffer::new(context, bytes)?;
        let groups = paged.groups().iter().zip(places).map(|(group, (at, offsets, stride, num_blocks))| {
            let planes = group.planes.iter().zip(offsets).map(|(plane, offset)| Plane {
                base: core::ptr::without_provenance_mut(pages.address() as usize + at + offset),
                block_stride: stride,
                page_bytes: plane.page_bytes,
            });
            KvGroup { planes: planes.collect(), num_blocks, blocks_per_chunk: group.blocks_per_chunk }
        });
        // SAFETY: nobody else knows of this memory, and it is kept until all transfers have ended.
        let scratch = unsafe { PagedKv::grouped(groups.collect()) };
        // It does not fail: the planes are like those of a cache that exists.
        let scratch = scratch.map_err(|error| GpuError::Mode { asked: "auto", why: error.to_string() })?;
        let scratch = Arc::new(scratch.on(Memory::Cuda(context.info.device)));
        let prepared = backend.prepare_unmeasured(&scratch)?;
        let host = Arc::new(HostBuffer::new(context, chunks as usize * paged.shard_bytes() as usize)?);
        let arena = Arena::pinned(context, &host);
        Ok(Some(Scratch { paged: scratch, prepared, arena, chunks, host, _pages: pages }))
    }

    /// The fastest way for batches of so many chunks.
    fn best(
        &self,
        backend: &CudaBackend,
        direction: Direction,
        chunks: u32,
        contiguous: u64,
        until: Instant,
    ) -> Result<Way, GpuError> {
        let rule = if contiguous >= RUN_MIN { Way::Batch } else { Way::Staged };
        let mut best: Option<(Way, f64)> = None;
        // The way that is likely the best is first: it is taken if there is no time for the others.
        for way in [rule].into_iter().chain(WAYS.into_iter().filter(|way| *way != rule)) {
            if Instant::now() >= until {
                break;
            }
            let seconds = self.measure(backend, direction, way, chunks, until)?;
            tracing::debug!(
                direction = direction.as_str(),
                way = way.as_str(),
                chunks,
                gb_per_s = chunks as f64 * self.paged.shard_bytes() as f64 / seconds / 1e9,
                "measured"
            );
            let cost = if way == Way::Batch { seconds } else { seconds * WORTH_AN_SM };
            if best.is_none_or(|(_, than)| cost < than) {
                best = Some((way, cost));
            }
        }
        Ok(best.map_or(rule, |(way, _)| way))
    }

    /// The shortest time of one batch.
    fn measure(
        &self,
        backend: &CudaBackend,
        direction: Direction,
        way: Way,
        chunks: u32,
        until: Instant,
    ) -> Result<f64, GpuError> {
        // The first run is slower than the others. It counts only if there is no time for another.
        let mut shortest = self.timed(backend, direction, way, chunks)?;
        let until = until.min(Instant::now() + EACH);
        while Instant::now() < until {
            shortest = shortest.min(self.timed(backend, direction, way, chunks)?);
        }
        Ok(shortest)
    }

    fn timed(
        &self,
        backend: &CudaBackend,
        direction: Direction,
        way: Way,
        chunks: u32,
    ) -> Result<f64, GpuError> {
        let began = Instant::now();
        self.run(backend, direction, way, chunks)?;
        Ok(began.elapsed().as_secs_f64())
    }

    fn run(
        &self,
        backend: &CudaBackend,
        direction: Direction,
        way: Way,
        chunks: u32,
    ) -> Result<(), GpuError> {
        let mut batch = CopyBatch::new(direction, &self.paged, false);
        for chunk in 0..chunks {
            let at = chunk as usize * self.paged.shard_bytes() as usize;
            let per_chunk = |group: &KvGroup| {
                // A chunk takes every `self.chunks`th block: blocks that follow one another would make longer runs than those of
                // a real chunk.
                (0..group.blocks_per_chunk).map(move |block| block * self.chunks + chunk).collect::<Vec<_>>()
            };
            let blocks: Vec<u32> = self.paged.groups().iter().flat_map(per_chunk).collect();
            // SAFETY: both sides are this scratch's, and the transfer ends in this function.
            let added = unsafe { batch.shard(self.host.host().wrapping_add(at), &blocks) };
            added.map_err(|error| GpuError::Mode { asked: "auto", why: error.to_string() })?;
        }
        let transfer = backend.start(batch, &self.prepared, way, Some(&self.arena));
        match transfer.and_then(|transfer| Box::new(transfer).wait()) {
            Ok(_) => Ok(()),
            Err(CopyError::Gpu(error) | CopyError::Unended(error)) => Err(error),
            Err(error) => Err(GpuError::Mode { asked: "auto", why: error.to_string() }),
        }
    }
}

/// The offsets of a block's pages, and the bytes from block to block. Pages are contiguous where they are in the real cache, and
/// apart where they are not.
fn places_of(group: &KvGroup) -> (Vec<usize>, usize) {
    const APART: usize = 256;
    let mut offsets = Vec::with_capacity(group.planes.len());
    let mut at = 0usize;
    for (index, plane) in group.planes.iter().enumerate() {
        let before = index.checked_sub(1).map(|index| &group.planes[index]);
        let follows = before.is_some_and(|before| {
            before.base.wrapping_add(before.page_bytes) == plane.base
                && before.block_stride == plane.block_stride
        });
        if !follows {
            at = (at + 1).next_multiple_of(APART);
        }
        offsets.push(at);
        at += plane.page_bytes;
    }
    (offsets, (at + 1).next_multiple_of(APART))
}
