//! What the measurements share: memory on both sides, streams for plain copies; one turn of a backend, one of its ceiling, and the
//! check of what a backend has copied.
//!
//! Host memory is three working sets: where stores go, where loads come from, and a mirror of the device's. Device memory is two:
//! what is stored, and what is loaded into. The plain copies move whole chunks between the same places, on streams of their own.

use super::layout::{Layout, Shape};
use super::memory::{Host, fill, same};
use anyhow::{Context, bail, ensure};
use kvring_gpu_kernels::raw::{Device, DeviceMemory, PlainStream};
use kvring_gpu_kernels::{
    ArenaMapping, CopyBackend, CopyBatch, CudaBackend, Direction, GpuOptions, MappedArena, Transfer,
};
use serde::Serialize;
use std::cell::Cell;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Chunks of a batch: a request's, as a worker submits them.
const BATCH_CHUNKS: usize = 8;
/// Streams of the ceiling for each direction: while one copy ends the next one begins.
const STREAMS: usize = 2;
/// Longer than registering takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Which way a row's bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Ways {
    Store,
    Load,
    Both,
}

impl Ways {
    pub(super) const ALL: [Ways; 3] = [Ways::Store, Ways::Load, Ways::Both];

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Ways::Store => "store",
            Ways::Load => "load",
            Ways::Both => "both",
        }
    }

    fn directions(self) -> &'static [Direction] {
        match self {
            Ways::Store => &[Direction::Store],
            Ways::Load => &[Direction::Load],
            Ways::Both => &[Direction::Store, Direction::Load],
        }
    }

    fn stores(self) -> bool {
        self != Ways::Load
    }

    fn loads(self) -> bool {
        self != Ways::Store
    }
}

/// One turn.
#[derive(Clone, Copy, Debug)]
pub(super) struct Turn {
    /// Bytes of both directions together.
    pub(super) bytes: usize,
    pub(super) seconds: f64,
    /// The seconds in `submit`, for each chunk.
    pub(super) submit_seconds: f64,
}

impl Turn {
    pub(super) fn gbs(&self) -> f64 {
        self.bytes as f64 / self.seconds / 1e9
    }
}

pub(super) struct Rig {
    // Streams are dropped before the memory that they copy.
    to_host: Vec<PlainStream>,
    to_device: Vec<PlainStream>,
    stored: DeviceMemory,
    loaded: DeviceMemory,
    pub(super) host: Arc<Host>,
    pub(super) device: Device,
    /// Bytes of a working set.
    pub(super) working_set: usize,
    /// The seed that was used last: each filling of memory has other bytes.
    seed: Cell<u64>,
}

/// The caches that a row copies from and into.
pub(super) struct Caches {
    pub(super) store: Layout,
    load: Layout,
}

/// A backend that has registered the rig's host memory.
pub(super) struct Mounted {
    pub(super) backend: CudaBackend,
    _arena: Arc<dyn MappedArena>,
}

impl Rig {
    pub(super) fn new(device: u32, working_set: usize) -> anyhow::Result<Rig> {
        let device = Device::open(device)?;
        let streams = || (0..STREAMS).map(|_| device.stream()).collect::<Result<Vec<_>, _>>();
        let memory = || device.allocate(working_set).context("device memory for the working set");
        Ok(Rig {
            to_host: streams()?,
            to_device: streams()?,
            stored: memory()?,
            loaded: memory()?,
            host: Arc::new(Host::new(3 * working_set)?),
            device,
            working_set,
            seed: Cell::new(1),
        })
    }

    /// Makes a backend, and waits until it has registered the host memory.
    pub(super) fn mount(&self, options: GpuOptions) -> anyhow::Result<Mounted> {
        let backend = CudaBackend::new(options)?;
        let bytes = self.host.bytes();
        let arena = backend.map_arena(ArenaMapping {
            base: self.host.base(),
            bytes,
            allocated: Arc::new(move || bytes as u64),
            lock: None,
            keep: self.host.clone(),
        });
        let until = Instant::now() + PATIENCE;
        while arena.registered_bytes() < bytes as u64 {
            if Instant::now() >= until {
                let got = arena.registered_bytes();
                bail!("only {got} of {bytes} bytes could be registered with the GPU; look at `ulimit -l`");
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(Mounted { backend, _arena: arena })
    }

    fn next_seed(&self) -> u64 {
        self.seed.set(self.seed.get() + 1);
        self.seed.get()
    }

    /// The offset at which the host's side of a direction begins.
    fn host_side(&self, direction: Direction) -> usize {
        match direction {
            Direction::Store => 0,
            Direction::Load => self.working_set,
        }
    }

    fn mirror(&self) -> usize {
        2 * self.working_set
    }

    pub(super) fn caches(&self, shape: Shape) -> anyhow::Result<Caches> {
        let (device, bytes) = (self.device.info().device, self.working_set);
        let layout = |memory: &DeviceMemory| {
            // SAFETY: the rig's memory, of so many bytes. It outlives the backends, and turns come one after the other.
            unsafe { Layout::new(shape, device, memory.address(), bytes, self.next_seed()) }
        };
        Ok(Caches { store: layout(&self.stored)?, load: layout(&self.loaded)? })
    }

    /// Batches that copy these chunks. Those of the two directions alternate.
    fn batches(
        &self,
        caches: &Caches,
        ways: Ways,
        chunks: core::ops::Range<usize>,
    ) -> anyhow::Result<Vec<CopyBatch>> {
        let mut batches = Vec::new();
        for from in chunks.clone().step_by(BATCH_CHUNKS) {
            for direction in ways.directions() {
                let layout = match direction {
                    Direction::Store => &caches.store,
                    Direction::Load => &caches.load,
                };
                let mut batch = CopyBatch::new(*direction, &layout.paged, false);
                for chunk in from..(from + BATCH_CHUNKS).min(chunks.end) {
                    let at = self.host_side(*direction) + chunk * layout.shape.chunk;
                    // SAFETY: the rig's memory, and mapped as long as the rig lives; turns come one after the other, and
                    // nobody but them touches either side.
                    unsafe { batch.shard(self.host.base().wrapping_add(at), layout.blocks(chunk)) }?;
                }
                batches.push(batch);
            }
        }
        Ok(batches)
    }

    /// One turn of a backend: it submits batches of all chunks, and then waits for all of them.
    pub(super) fn turn(&self, mounted: &Mounted, caches: &Caches, ways: Ways) -> anyhow::Result<Turn> {
        self.turn_over(mounted, caches, ways, 0..caches.store.chunks())
    }

    /// The same for some of the chunks.
    pub(super) fn turn_over(
        &self,
        mounted: &Mounted,
        caches: &Caches,
        ways: Ways,
        chunks: core::ops::Range<usize>,
    ) -> anyhow::Result<Turn> {
        let batches = self.batches(caches, ways, chunks)?;
        let count: usize = batches.iter().map(CopyBatch::len).sum();
        let mut transfers: Vec<Box<dyn Transfer>> = Vec::with_capacity(batches.len());
        let mut submitting = Duration::ZERO;
        let began = Instant::now();
        for batch in batches {
            let before = Instant::now();
            transfers.push(mounted.backend.submit(batch)?);
            submitting += before.elapsed();
        }
        // As with the ceiling, this thread does not sleep: the time that it would take to wake up is not to be measured.
        for transfer in &mut transfers {
            while !transfer.poll() {
                std::thread::yield_now();
            }
        }
        let seconds = began.elapsed().as_secs_f64();
        for transfer in transfers {
            transfer.wait()?;
        }
        let bytes = count * caches.store.shape.chunk;
        Ok(Turn { bytes, seconds, submit_seconds: submitting.as_secs_f64() / count.max(1) as f64 })
    }

    /// One turn of the ceiling: plain copies of `chunks` pieces as long as a chunk, from and to registered memory.
    pub(super) fn ceiling(
        &self,
        chunk: usize,
        ways: Ways,
        chunks: core::ops::Range<usize>,
    ) -> anyhow::Result<Turn> {
        let bytes = chunks.len() * chunk * ways.directions().len();
        let began = Instant::now();
        let copied = self.plain(chunk, ways, chunks, |direction| self.host_side(direction));
        let seconds = began.elapsed().as_secs_f64();
        copied?;
        Ok(Turn { bytes, seconds, submit_seconds: 0.0 })
    }

    /// Makes plain copies of pieces, and waits for their end. `host_side` says at which offset a direction's host side begins.
    fn plain(
        &self,
        chunk: usize,
        ways: Ways,
        chunks: core::ops::Range<usize>,
        host_side: impl Fn(Direction) -> usize,
    ) -> anyhow::Result<()> {
        debug_assert!(chunks.end * chunk <= self.working_set);
        let submit = || {
            for index in chunks {
                let at = index * chunk;
                for direction in ways.directions() {
                    let host = self.host.base().wrapping_add(host_side(*direction) + at);
                    // SAFETY: both sides are the rig's and hold a working set; the copies end in this function.
                    unsafe {
                        match direction {
                            Direction::Store => self.to_host[index % STREAMS].to_host(
                                host,
                                self.stored.address() + at as u64,
                                chunk,
                            ),
                            Direction::Load => self.to_device[index % STREAMS].to_device(
                                self.loaded.address() + at as u64,
                                host,
                                chunk,
                            ),
                        }
                    }?;
                }
            }
            Ok(())
        };
        self.end(submit())
    }

    /// Waits until no plain copy is under way any more, also after an error.
    fn end(&self, submitted: anyhow::Result<()>) -> anyhow::Result<()> {
        let marks: Result<Vec<_>, _> =
            self.to_host.iter().chain(&self.to_device).map(PlainStream::mark).collect();
        if let (Ok(()), Ok(marks)) = (&submitted, &marks) {
            for mark in marks {
                while !mark.has_come()? {
                    std::thread::yield_now();
                }
            }
        } else {
            for stream in self.to_host.iter().chain(&self.to_device) {
                // The first error says more than those that follow it.
                let _ = stream.synchronize();
            }
        }
        submitted.and(marks.map(drop).map_err(Into::into))
    }

    /// A part of the host memory, for use while no copy runs.
    #[allow(clippy::mut_from_ref, reason = "as `Host::part`")]
    fn part(&self, from: usize, bytes: usize) -> &mut [u8] {
        // SAFETY: every copy of the rig's ends in the function that starts it, and callers use one slice of a place at a time.
        unsafe { self.host.part(from, bytes) }
    }

    /// Copies between the mirror and device memory, in pieces that do not cross from one registration into the next.
    fn mirror_copy(&self, memory: &DeviceMemory, out: bool, piece: usize) -> anyhow::Result<()> {
        let submit = || {
            for at in (0..self.working_set).step_by(piece) {
                let host = self.host.base().wrapping_add(self.mirror() + at);
                let device = memory.address() + at as u64;
                let bytes = piece.min(self.working_set - at);
                // SAFETY: as in `plain`.
                unsafe {
                    if out {
                        self.to_host[0].to_host(host, device, bytes)
                    } else {
                        self.to_device[0].to_device(device, host, bytes)
                    }
                }?;
            }
            Ok(())
        };
        self.end(submit())
    }

    /// Writes fresh random bytes into the memory that is stored, and the same ones into the mirror.
    pub(super) fn renew_stored(&self, piece: usize) -> anyhow::Result<()> {
        fill(self.part(self.mirror(), self.working_set), self.next_seed());
        self.mirror_copy(&self.stored, false, piece)
    }

    /// Compares the pages in the mirror with the chunks in the host memory from `at` on.
    fn compare(&self, layout: &Layout, at: usize, mirror_is_expected: bool) -> anyhow::Result<()> {
        let mirror = &*self.part(self.mirror(), self.working_set);
        let chunks = &*self.part(at, self.working_set);
        for chunk in 0..layout.chunks() {
            let mut from = 0;
            for (page, bytes) in layout.places(chunk) {
                let start = chunk * layout.shape.chunk + from;
                let (page, shard) = (&mirror[page..][..bytes], &chunks[start..][..bytes]);
                let (expected, got) = if mirror_is_expected { (page, shard) } else { (shard, page) };
                same(expected, got, from).with_context(|| format!("chunk {chunk}"))?;
                from += bytes;
            }
            ensure!(from == layout.shape.chunk, "pages of {from} bytes in a chunk of {}", layout.shape.chunk);
        }
        Ok(())
    }

    /// Checks that the chunks that were stored are made of the bytes in the mirror.
    pub(super) fn compare_stored(&self, layout: &Layout) -> anyhow::Result<()> {
        self.compare(layout, self.host_side(Direction::Store), true)
    }

    /// Copies fresh random bytes once, and verifies each of them.
    pub(super) fn check(&self, mounted: &Mounted, caches: &Caches, ways: Ways) -> anyhow::Result<()> {
        let piece = caches.store.shape.chunk;
        let source = self.host_side(Direction::Load);
        if ways.stores() {
            self.renew_stored(piece)?;
        }
        if ways.loads() {
            fill(self.part(source, self.working_set), self.next_seed());
        }
        self.turn(mounted, caches, ways)?;
        if ways.stores() {
            self.compare_stored(&caches.store).context("wrong bytes after a store")?;
        }
        if ways.loads() {
            self.mirror_copy(&self.loaded, true, piece)?;
            self.compare(&caches.load, source, false).context("wrong bytes after a load")?;
        }
        Ok(())
    }

    /// The device memory that gathers write.
    pub(super) fn gathered(&self) -> &DeviceMemory {
        &self.loaded
    }

    /// Copies what was gathered to the host memory that stores write.
    pub(super) fn fetch_gathered(&self, piece: usize) -> anyhow::Result<()> {
        let submit = || {
            for at in (0..self.working_set).step_by(piece) {
                let host = self.host.base().wrapping_add(self.host_side(Direction::Store) + at);
                // SAFETY: as in `plain`.
                unsafe { self.to_host[0].to_host(host, self.loaded.address() + at as u64, piece) }?;
            }
            Ok(())
        };
        self.end(submit())
    }
}
