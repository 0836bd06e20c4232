//! Puts a batch on its lanes: launches kernels and starts copies, in this order.
//!
//! | way | store | load |
//! | --- | --- | --- |
//! | staged | gather into the lane's buffer, sum that, DMA to the arena | DMA into the buffer, sum that, scatter |
//! | zero-copy | gather into the arena, sum the pages | scatter from the arena, sum the pages |
//! | batch | DMA of each run, sum the pages | DMA of each run, sum the pages |
//!
//! A load's checksum is computed from memory that only this process can write: the staging buffer, or the pages. If there is no
//! staging buffer, the bytes of skipped blocks are an exception: they are not copied, and are summed in the arena.

use super::api::Api;
use super::arena::{Arena, Piece};
use super::error::GpuError;
use super::kernels::{Kernel, Kernels, Launch};
use super::lanes::Lanes;
use super::objects::Event;
use super::plan::Way;
use super::prepared::{Tiled, runs};
use super::sums::Sums;
use crate::batch::{CopyBatch, Direction};
use crate::layout::{PagedKv, SKIP};
use crate::tiles::Window;
use cudarc::driver::sys::{CUdeviceptr, CUstream};
use std::sync::Arc;

/// The most runs that one call gives to the driver.
const RUNS_AT_ONCE: usize = 1024;

/// A cache's windows, and how kernels may be launched on them.
#[derive(Clone, Copy)]
pub(super) struct Windows<'a> {
    pub(super) tiled: &'a Tiled,
    /// SMs that may take part.
    pub(super) grid_max: u32,
}

/// A batch that is being put on its lanes. The caller has entered the context.
pub(super) struct Put<'a> {
    pub(super) api: &'a Api,
    pub(super) kernels: Option<&'a Kernels>,
    pub(super) windows: Option<Windows<'a>>,
    pub(super) lanes: &'a mut Lanes,
    pub(super) arenas: &'a [Arc<Arena>],
    pub(super) fence: Option<&'a Event>,
    /// The host has waited for the fence.
    pub(super) waited: bool,
    pub(super) sums: Option<Sums>,
    pub(super) direction: Direction,
}

/// A shard and its blocks.
#[derive(Clone, Copy)]
struct Shard<'a> {
    /// Its place in the batch.
    index: usize,
    host: *mut u8,
    bytes: usize,
    blocks: &'a [u32],
    arena: Option<&'a Arena>,
}

impl<'a> Shard<'a> {
    /// A part of the shard, cut at the borders of registrations.
    fn pieces(&self, host: *mut u8, bytes: usize) -> impl Iterator<Item = Piece> + use<'a> {
        let known = self.arena.map(|arena| arena.pieces(host, bytes));
        let unknown = self.arena.is_none().then_some(Piece { host, bytes, registered: false });
        known.into_iter().flatten().chain(unknown)
    }

    /// The device's address of the whole shard, if it is registered.
    fn alias(&self) -> Option<u64> {
        self.arena.and_then(|arena| arena.alias(self.host, self.bytes))
    }
}

/// Copies for one call of the driver.
#[derive(Default)]
struct Copies {
    device: Vec<CUdeviceptr>,
    host: Vec<CUdeviceptr>,
    bytes: Vec<usize>,
}

impl<'a> Put<'a> {
    /// Puts the whole batch. After an error, the work that has been put on lanes before it still runs.
    pub(super) fn batch(&mut self, batch: &CopyBatch, way: Way) -> Result<(), GpuError> {
        let arenas = self.arenas;
        let bytes = batch.paged.shard_bytes() as usize;
        let mut runs_of: Vec<Shard<'_>> = Vec::new();
        let mut run_count = 0;
        for (index, (host, blocks)) in batch.shards().enumerate() {
            let arena = arenas.iter().find(|arena| arena.holds(host, bytes)).map(|arena| &**arena);
            let shard = Shard { index, host, bytes, blocks, arena };
            match self.possible(way, &shard)? {
                Way::Staged => self.staged(&shard)?,
                Way::ZeroCopy => self.zero_copy(&shard)?,
                Way::Batch => {
                    runs_of.push(shard);
                    run_count += runs(&batch.paged, blocks).count();
                    if run_count >= RUNS_AT_ONCE {
                        self.runs(&batch.paged, &runs_of)?;
                        (run_count, runs_of) = (0, Vec::new());
                    }
                    continue;
                }
            }
        }
        self.runs(&batch.paged, &runs_of)
    }

    /// The next best way that is possible for this shard, or `way` itself.
    fn possible(&self, way: Way, shard: &Shard<'_>) -> Result<Way, GpuError> {
        let vector = self.windows.map_or(0, |windows| windows.tiled.vector);
        let can_stage = self.windows.is_some_and(|windows| !windows.tiled.staged.is_empty());
        let is_reachable =
            shard.alias().is_some_and(|alias| vector != 0 && alias.is_multiple_of(u64::from(vector)));
        // Without a staging buffer, a kernel sums the bytes of skipped blocks in the arena, and must be able to reach it.
        let sums_skipped = self.sums.is_some() && shard.blocks.contains(&SKIP);
        let way = match way {
            // A copy through the driver's buffers is waited for, so one for each window is better than one for each run.
            Way::ZeroCopy | Way::Batch if !is_reachable => Way::Staged,
            way => way,
        };
        match way {
            Way::Staged if can_stage => Ok(Way::Staged),
            Way::Staged if sums_skipped && !is_reachable => Err(GpuError::NoPlaceForChecksum),
            Way::Staged => Ok(Way::Batch),
            way => Ok(way),
        }
    }

    fn staged(&mut self, shard: &Shard<'_>) -> Result<(), GpuError> {
        let (Some(windows), Some(kernels)) = (self.windows, self.kernels) else { return Ok(()) };
        for window in &windows.tiled.staged {
            let turn = self.lanes.turn(self.fence)?;
            let launch =
                windows.launch(window, turn.staging.wrapping_sub(u64::from(window.offset)), shard.blocks);
            let host = shard.host.wrapping_add(window.offset as usize);
            match self.direction {
                Direction::Store => {
                    // SAFETY: what was promised to `CopyBatch::shard` holds for the pages while the transfer runs; the buffer is
                    // this lane's, and all work that used it before comes earlier on its stream.
                    unsafe { kernels.copy(Kernel::Gather, &launch, turn.stream) }?;
                    self.sum(shard, &launch, false, turn.stream)?;
                    self.dma(shard, host, turn.staging, window.bytes as usize, turn.stream)?;
                }
                Direction::Load => {
                    self.dma(shard, host, turn.staging, window.bytes as usize, turn.stream)?;
                    self.sum(shard, &launch, false, turn.stream)?;
                    // SAFETY: as above.
                    unsafe { kernels.copy(Kernel::Scatter, &launch, turn.stream) }?;
                }
            }
        }
        Ok(())
    }

    fn zero_copy(&mut self, shard: &Shard<'_>) -> Result<(), GpuError> {
        let (Some(windows), Some(kernels)) = (self.windows, self.kernels) else { return Ok(()) };
        let alias = shard.alias().unwrap_or_default();
        let kernel = match self.direction {
            Direction::Store => Kernel::Gather,
            Direction::Load => Kernel::Scatter,
        };
        for window in &windows.tiled.whole {
            let turn = self.lanes.turn(self.fence)?;
            let launch = windows.launch(window, alias, shard.blocks);
            // SAFETY: as in `staged`; the shard is registered (`possible`).
            unsafe { kernels.copy(kernel, &launch, turn.stream) }?;
            self.sum(shard, &launch, true, turn.stream)?;
        }
        Ok(())
    }

    /// Copies shards by DMA, run by run, on one lane.
    fn runs(&mut self, paged: &PagedKv, shards: &[Shard<'_>]) -> Result<(), GpuError> {
        if shards.is_empty() {
            return Ok(());
        }
        let turn = self.lanes.turn(self.fence)?;
        let mut copies = Copies::default();
        for shard in shards {
            for run in runs(paged, shard.blocks) {
                let mut device = run.address;
                for piece in shard.pieces(shard.host.wrapping_add(run.offset as usize), run.bytes) {
                    if piece.registered && self.api.has_batch_copy() {
                        copies.device.push(device);
                        copies.host.push(piece.host as u64);
                        copies.bytes.push(piece.bytes);
                    } else {
                        self.copy(piece, device, turn.stream)?;
                    }
                    device += piece.bytes as u64;
                }
            }
        }
        let Copies { device, host, bytes } = &mut copies;
        for at in (0..bytes.len()).step_by(RUNS_AT_ONCE) {
            let some = at..(at + RUNS_AT_ONCE).min(bytes.len());
            let (device, host, bytes) =
                (&mut device[some.clone()], &mut host[some.clone()], &mut bytes[some]);
            let (to, from) = match self.direction {
                Direction::Store => (host, device),
                Direction::Load => (device, host),
            };
            // SAFETY: as in `staged`; no copy writes what another one reads or writes.
            if let Some(copied) = unsafe { self.api.copy_batch(to, from, bytes, turn.stream) } {
                copied?;
            }
        }
        let Some(windows) = self.windows.filter(|_| self.sums.is_some()) else { return Ok(()) };
        for shard in shards {
            for window in &windows.tiled.whole {
                // If no block is skipped, the kernel does not use the shard's address.
                let launch = windows.launch(window, shard.alias().unwrap_or_default(), shard.blocks);
                self.sum(shard, &launch, true, turn.stream)?;
            }
        }
        Ok(())
    }

    /// Copies a window between the arena and device memory.
    fn dma(
        &mut self,
        shard: &Shard<'_>,
        host: *mut u8,
        device: u64,
        bytes: usize,
        stream: CUstream,
    ) -> Result<(), GpuError> {
        let mut at = device;
        for piece in shard.pieces(host, bytes) {
            self.copy(piece, at, stream)?;
            at += piece.bytes as u64;
        }
        Ok(())
    }

    /// Makes one copy. If the memory is not registered, the driver copies within this call, in the same order. Within the call it
    /// would also wait for the fence, and hold its locks meanwhile; so the host waits for the fence before.
    fn copy(&mut self, piece: Piece, device: u64, stream: CUstream) -> Result<(), GpuError> {
        if !piece.registered && !core::mem::replace(&mut self.waited, true) {
            self.fence.map_or(Ok(()), Event::synchronize)?;
        }
        // SAFETY: as in `staged`.
        unsafe {
            match self.direction {
                Direction::Store => {
                    self.api.cuMemcpyDtoHAsync_v2(piece.host.cast(), device, piece.bytes, stream)
                }
                Direction::Load => {
                    self.api.cuMemcpyHtoDAsync_v2(device, piece.host.cast(), piece.bytes, stream)
                }
            }
        }
    }

    /// Puts the checksum of a window on the stream, if the batch has checksums.
    fn sum(
        &mut self,
        shard: &Shard<'_>,
        launch: &Launch<'_>,
        paged: bool,
        stream: CUstream,
    ) -> Result<(), GpuError> {
        let (Some(sums), Some(kernels)) = (&mut self.sums, self.kernels) else { return Ok(()) };
        let partial = sums.place(shard.index, launch.grid())?;
        // SAFETY: as in `staged`; there is room for the sums.
        unsafe { kernels.checksum(launch, paged, partial, stream) }
    }
}

impl<'a> Windows<'a> {
    /// How many partial sums a shard's checksum has at most, whichever way the shard goes.
    pub(super) fn partials(&self) -> usize {
        let of = |windows: &[Window]| {
            let grids = windows.iter().map(|window| self.launch(window, 0, &[]).grid() as usize);
            grids.sum::<usize>()
        };
        of(&self.tiled.staged).max(of(&self.tiled.whole))
    }

    fn launch(&self, window: &'a Window, shard: u64, blocks: &'a [u32]) -> Launch<'a> {
        let Tiled { vector, table, .. } = self.tiled;
        Launch { vector: *vector, tiles: table.address(), window, shard, blocks, grid_max: self.grid_max }
    }
}
