//! The GPU backend.

use super::arena::{Arena, Arenas};
use super::calibrate::calibrate;
use super::device::{Context, DeviceInfo};
use super::error::{GpuError, LOAD_PATIENCE, PATIENCE};
use super::kernels::Kernels;
use super::lanes::Lanes;
use super::objects::{Events, Recorded};
use super::plan::{CopyMode, Plan, Way};
use super::prepared::{Prepared, Tiled, check_memory, contiguous_bytes};
use super::put::{Put, Windows};
use super::sums::SumBuffers;
use super::transfer::GpuTransfer;
use crate::backend::{ArenaMapping, CopyBackend, CopyError, MappedArena, Transfer};
use crate::batch::{ComputeStream, CopyBatch, Direction, Fence};
use crate::layout::{Memory, PagedKv};
use crate::sync::release_fence;
use crate::tiles::Tiles;
use cudarc::driver::sys::CUstream;
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError, Weak};
use std::time::Duration;

/// The longest staging buffer: a longer shard goes through it in several windows.
const STAGING_MAX: u64 = 8 << 20;

const CAPTURE_IMPLICIT: u32 = 906;

/// How a GPU is to be used.
#[derive(Clone, Debug)]
pub struct GpuOptions {
    /// Its number for this process.
    pub device: u32,
    /// How bytes are moved. Default auto.
    pub mode: CopyMode,
    /// Streaming multiprocessors that a kernel of ours may occupy. Default 16: enough for the link with room to spare, and few
    /// of those with which the model computes.
    pub sm_count: u32,
    /// Bytes of one registration of the arena, a multiple of 4096. Default 1 GiB: no slab crosses a multiple of it.
    pub part_bytes: usize,
    /// How long the driver is asked again whether a load has ended, while it answers with errors that do not tell. Default
    /// 30 s: a driver that has not recovered by then does not recover.
    pub load_patience: Duration,
}

impl GpuOptions {
    /// The defaults, for a device.
    #[must_use]
    pub fn new(device: u32) -> GpuOptions {
        GpuOptions {
            device,
            mode: CopyMode::Auto,
            sm_count: 16,
            part_bytes: 1 << 30,
            load_patience: LOAD_PATIENCE,
        }
    }
}

/// Copies between a GPU's memory and the arena. See the module's documentation.
pub struct CudaBackend {
    // Dropped in this order, so that copies in flight end first.
    lanes: [Mutex<Lanes>; 2],
    layouts: Mutex<Vec<(Weak<PagedKv>, Arc<Prepared>)>>,
    arenas: Arenas,
    /// `Err`: why there are none.
    kernels: Result<Kernels, GpuError>,
    events: Arc<Events>,
    sums: Arc<SumBuffers>,
    /// The warning that there is no memory for staging buffers.
    said_so: Once,
    options: GpuOptions,
    context: Arc<Context>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl CudaBackend {
    /// Opens the device, in the context that torch uses.
    pub fn new(options: GpuOptions) -> Result<CudaBackend, GpuError> {
        let context = Context::open(options.device)?;
        let kernels = Kernels::load(&context);
        if let Err(error) = &kernels {
            if let Some(asked) =
                [CopyMode::Staged, CopyMode::ZeroCopy].into_iter().find(|mode| *mode == options.mode)
            {
                return Err(GpuError::Mode { asked: asked.as_str(), why: without_kernels(error) });
            }
            tracing::warn!(%error, "{}: each contiguous piece of the KV cache is copied by itself, which is slower", without_kernels(error));
        }
        let lanes = || Lanes::new(&context).map(Mutex::new);
        Ok(CudaBackend {
            lanes: [lanes()?, lanes()?],
            layouts: Mutex::default(),
            arenas: Arenas::new(&context, options.part_bytes),
            kernels,
            events: Events::new(&context),
            sums: SumBuffers::new(&context),
            said_so: Once::new(),
            options,
            context,
        })
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &DeviceInfo {
        &self.context.info
    }

    /// The plan for a cache that has been prepared: for people.
    #[must_use]
    pub fn describe(&self, paged: &Arc<PagedKv>) -> String {
        let Ok(prepared) = self.prepared(paged) else { return String::new() };
        let Some(Plan([store, load])) = prepared.plan.get() else { return String::new() };
        let [store, load] = [store, load].map(|choice| match (choice.bulk.as_str(), choice.small.as_str()) {
            (bulk, small) if bulk == small => bulk.to_owned(),
            (bulk, small) => format!("{bulk}, small ones {small}"),
        });
        format!("stores by {store}; loads by {load}")
    }

    pub(super) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// What is known of a cache. Prepares a new one.
    fn prepared(&self, paged: &Arc<PagedKv>) -> Result<Arc<Prepared>, CopyError> {
        let known = |layouts: &[(Weak<PagedKv>, Arc<Prepared>)]| {
            let mut layouts = layouts.iter();
            layouts
                .find(|(layout, _)| Weak::as_ptr(layout) == Arc::as_ptr(paged))
                .map(|(_, prepared)| prepared.clone())
        };
        if let Some(prepared) = known(&locked(&self.layouts)) {
            return Ok(prepared);
        }
        let expected = Memory::Cuda(self.context.info.device);
        if paged.memory() != expected {
            let (expected, got) = (expected.to_string(), paged.memory().to_string());
            return Err(CopyError::OtherMemory { backend: self.name(), expected, got });
        }
        check_memory(&self.context, paged)?;
        let prepared = Arc::new(self.prepare_unmeasured(paged)?);
        self.decide(paged, &prepared)?;
        let mut layouts = locked(&self.layouts);
        // The weak reference keeps a dropped cache's allocation, so no other cache can have its address. Transfers hold their
        // cache, so none uses the table of a cache that is gone.
        let gone: Vec<_> = layouts.extract_if(.., |(layout, _)| layout.strong_count() == 0).collect();
        layouts.push((Arc::downgrade(paged), prepared.clone()));
        drop(layouts);
        // Without the lock, because freeing waits for the device.
        drop(gone);
        Ok(prepared)
    }

    /// Prepares a cache without deciding which way its bytes go.
    pub(super) fn prepare_unmeasured(&self, paged: &PagedKv) -> Result<Prepared, GpuError> {
        let tiled = match &self.kernels {
            Err(_) => None,
            Ok(_) => match Tiled::of(&self.context, paged, |tiles| self.stage(tiles, paged)) {
                Ok(tiled) => Some(tiled),
                Err(error @ GpuError::Tiles(_)) => {
                    if let Some(asked) = Way::of(self.options.mode).filter(|way| *way != Way::Batch) {
                        return Err(GpuError::Mode { asked: asked.as_str(), why: error.to_string() });
                    }
                    tracing::warn!(%error, "kernels cannot copy this KV cache: each contiguous piece of it is copied by itself, which is slower");
                    None
                }
                Err(error) => return Err(error),
            },
        };
        Ok(Prepared { tiled, plan: std::sync::OnceLock::new() })
    }

    /// Makes staging buffers for a cache. Returns their length, or 0 if there are none that are long enough.
    fn stage(&self, tiles: &Tiles, paged: &PagedKv) -> u32 {
        let longest = tiles.table().iter().map(|tile| tile.bytes).max().unwrap_or(0);
        let wanted = paged.shard_bytes().min(STAGING_MAX) as u32;
        let mut least = u32::MAX;
        for lanes in &self.lanes {
            let mut lanes = locked(lanes);
            if let Err(error) = lanes.stage(wanted.max(longest)) {
                self.said_so.call_once(|| {
                    tracing::warn!(%error, "no GPU memory for staging buffers: short pieces of the KV cache are copied more slowly");
                });
                return 0;
            }
            least = least.min(lanes.staging_bytes());
        }
        if least < longest { 0 } else { least }
    }

    fn decide(&self, paged: &Arc<PagedKv>, prepared: &Prepared) -> Result<(), GpuError> {
        let contiguous = contiguous_bytes(paged);
        let has_staging = prepared.tiled.as_ref().is_some_and(|tiled| !tiled.staged.is_empty());
        let plan = match Way::of(self.options.mode) {
            Some(Way::Staged) if !has_staging => {
                let why = "there is no GPU memory for staging buffers".to_owned();
                return Err(GpuError::Mode { asked: CopyMode::Staged.as_str(), why });
            }
            Some(way) => Plan::only(way),
            None if !has_staging => Plan::only(Way::Batch),
            None => match calibrate(self, paged) {
                Ok(plan) => plan,
                Err(error) => {
                    let rule = Plan::by_rule(contiguous);
                    tracing::warn!(%error, contiguous_bytes = contiguous, "cannot measure which way of copying is fastest; it is chosen by the length of contiguous pieces");
                    rule
                }
            },
        };
        let Plan([store, load]) = plan;
        tracing::info!(
            device = %self.context.info.name, mode = %self.options.mode, contiguous_bytes = contiguous,
            store = store.bulk.as_str(), load = load.bulk.as_str(),
            small_store = store.small.as_str(), small_load = load.small.as_str(),
            "copies between GPU and arena"
        );
        // It is set once, here.
        let _ = prepared.plan.set(plan);
        Ok(())
    }

    /// Starts a batch. Shards for which `way` is not possible go the next best way.
    pub(super) fn start(
        &self,
        batch: CopyBatch,
        prepared: &Prepared,
        way: Way,
        pinned: Option<&Arc<Arena>>,
    ) -> Result<GpuTransfer, CopyError> {
        if batch.checksum && prepared.tiled.is_none() {
            let why = match &self.kernels {
                Err(error) => without_kernels(error),
                Ok(_) => "kernels cannot copy this cache".to_owned(),
            };
            return Err(GpuError::Mode { asked: "checksum", why }.into());
        }
        let _entered = self.context.enter()?;
        let shard_bytes = batch.paged.shard_bytes() as usize;
        let mut arenas: Vec<Arc<Arena>> = pinned.cloned().into_iter().collect();
        for arena in &batch.arena {
            if !arenas.iter().any(|known| known.holds(*arena, shard_bytes)) {
                arenas.extend(self.arenas.holding(*arena, shard_bytes));
            }
        }
        let grid_max = self.options.sm_count.max(1);
        let sums = match &prepared.tiled {
            Some(tiled) if batch.checksum => {
                let partials = batch.len() * Windows { tiled, grid_max }.partials();
                Some(self.sums.take(batch.len(), partials)?)
            }
            _ => None,
        };
        if batch.direction == Direction::Store {
            // SYNC POINT: Release fence before the first store into a slot; pairs with the Acquire fence of a worker that still
            // loads the slot's previous generation (kvring-shm-abi, `SlotHeader::still_valid`).
            release_fence();
        }
        let mut lanes = locked(&self.lanes[batch.direction as usize]);
        let fence = batch.after.0.as_ref().and_then(|fence| fence.downcast_ref::<Recorded>());
        let mut put = Put {
            api: self.context.api,
            kernels: self.kernels.as_ref().ok(),
            windows: prepared.tiled.as_ref().map(|tiled| Windows { tiled, grid_max }),
            lanes: &mut lanes,
            arenas: &arenas,
            fence: fence.and_then(Recorded::event),
            waited: false,
            sums,
            direction: batch.direction,
        };
        let patience = match batch.direction {
            Direction::Store => PATIENCE,
            Direction::Load => self.options.load_patience,
        };
        let done = put.batch(&batch, way);
        let sums = put.sums.take();
        match done.and_then(|()| lanes.end_batch(&self.events)) {
            Ok(events) => Ok(GpuTransfer {
                context: self.context.clone(),
                events,
                sums,
                failed: None,
                unsure: None,
                patience,
                batch,
                _arenas: arenas,
            }),
            Err(error) => {
                // A part of the batch may be running. If waiting for it fails, the next batch fails too, and says why.
                if lanes.synchronize(patience).is_err_and(|error| !error.is_final()) {
                    // Kernels may still write the sums, so their memory is not given to another batch.
                    core::mem::forget(sums);
                    return Err(CopyError::Unended(error));
                }
                Err(error.into())
            }
        }
    }
}

fn without_kernels(error: &GpuError) -> String {
    match error {
        GpuError::Call { code: 222, .. } => {
            "the driver is too old for kvring's kernels (570 or later)".to_owned()
        }
        error => format!("kvring's kernels cannot be loaded: {error}"),
    }
}

impl CopyBackend for CudaBackend {
    fn prepare(&self, paged: &Arc<PagedKv>) -> Result<(), CopyError> {
        self.prepared(paged).map(|_| ())
    }

    fn map_arena(&self, arena: ArenaMapping) -> Arc<dyn MappedArena> {
        self.arenas.map(arena)
    }

    fn writes_by_device(&self) -> bool {
        true
    }

    fn fence(&self, stream: ComputeStream) -> Result<Fence, CopyError> {
        let _entered = self.context.enter()?;
        let stream = stream.0 as CUstream;
        let mut capturing = 0;
        // SAFETY: writes a status; for a handle that is no stream the driver returns an error.
        match unsafe { self.context.api.cuStreamIsCapturing(stream, &raw mut capturing) } {
            Ok(()) if capturing == 0 => {}
            // The default stream is not captured itself, but would have to wait for one that is.
            Ok(()) | Err(GpuError::Call { code: CAPTURE_IMPLICIT, .. }) => {
                return Err(GpuError::Capturing.into());
            }
            Err(error) => return Err(error.into()),
        }
        Ok(Fence(Some(Arc::new(self.events.record(stream)?))))
    }

    fn submit(&self, batch: CopyBatch) -> Result<Box<dyn Transfer>, CopyError> {
        let prepared = self.prepared(&batch.paged)?;
        let way = prepared.plan.get().map_or(Way::Batch, |plan| plan.way(batch.direction, batch.bytes()));
        Ok(Box::new(self.start(batch, &prepared, way, None)?))
    }

    fn name(&self) -> &'static str {
        "cuda"
    }
}
