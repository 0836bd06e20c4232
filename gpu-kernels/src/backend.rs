//! The trait that all ways of moving KV share.

use crate::batch::CopyBatch;
use crate::layout::PagedKv;
use std::any::Any;
use std::path::PathBuf;
use std::sync::Arc;

/// A stream of the caller's device (a `CUstream`), after whose work a transfer must come: the kernels that write the
/// KV of a store, the last readers of the blocks of a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ComputeStream(pub u64);

/// A point in a [`ComputeStream`]: all that had been put on it when the fence was made ([`CopyBackend::fence`]).
#[derive(Clone, Default)]
pub struct Fence(pub(crate) Option<Arc<dyn Any + Send + Sync>>);

impl Fence {
    /// Nothing to wait for: the order of the caller's program is the order.
    #[must_use]
    pub fn none() -> Fence {
        Fence(None)
    }
}

impl core::fmt::Debug for Fence {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(if self.0.is_some() { "Fence(event)" } else { "Fence(none)" })
    }
}

/// Why bytes could not be moved.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CopyError {
    /// The backend has been shut down.
    #[error("the copy backend has been shut down")]
    ShutDown,
    /// A thread that copied has failed.
    #[error("a copy thread failed")]
    ThreadFailed,
    /// The cache is in memory that this backend does not copy from or to.
    #[error("the {backend} backend expected a KV cache in {expected}, got one in {got}")]
    OtherMemory {
        /// Which backend.
        backend: &'static str,
        /// Memory that it copies from and to.
        expected: String,
        /// Where the cache is.
        got: String,
    },
    /// The GPU, or its driver. Nothing is being copied any more.
    #[error(transparent)]
    Gpu(#[from] crate::cuda::GpuError),
    /// The driver will not say whether the copy has ended: a device may still write where it was to. What a store was to write may be
    /// given to nobody else; where a load was to write, nobody may go on to use any of it.
    #[error("it is not known whether a copy has ended: {0}")]
    Unended(crate::cuda::GpuError),
}

/// The arena as this process has mapped it, told to a backend once for each mapping.
#[derive(Clone)]
pub struct ArenaMapping {
    /// Its first byte.
    pub base: *mut u8,
    /// Its length, without what follows it in the same mapping.
    pub bytes: usize,
    /// How many bytes, from the first on, have memory behind them by now. Grows up to `bytes`. Beyond it nothing may be touched.
    pub allocated: Arc<dyn Fn() -> u64 + Send + Sync>,
    /// A file of which everybody who maps this arena knows, to lock while something is done that only one process should do
    /// at a time.
    pub lock: Option<PathBuf>,
    /// Keeps it mapped.
    pub keep: Arc<dyn Any + Send + Sync>,
}

// SAFETY: an address and what keeps it valid; who may touch the bytes is `CopyBatch::shard`'s contract.
unsafe impl Send for ArenaMapping {}
// SAFETY: as above.
unsafe impl Sync for ArenaMapping {}

impl core::fmt::Debug for ArenaMapping {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("ArenaMapping")
            .field("base", &self.base)
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

/// What a backend made of an arena's mapping (registrations for DMA). Dropped when nothing is copied there any more.
pub trait MappedArena: Send + Sync {
    /// How many of its bytes are registered by now: copies there run at the speed of the link. 0 where nothing needs to be.
    fn registered_bytes(&self) -> u64;
}

/// A completed transfer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CopyDone {
    /// One checksum for each shard, in order, if the batch asked for them; empty otherwise.
    pub checksums: Vec<u64>,
}

/// A transfer in flight. All it copied is visible to whoever saw it complete. Dropping it waits for its end: a copy is
/// never abandoned half-way.
pub trait Transfer: Send {
    /// Has it completed? Makes progress by itself where nobody else does.
    fn poll(&mut self) -> bool;

    /// Waits for its end, lending a hand where that helps.
    fn wait(self: Box<Self>) -> Result<CopyDone, CopyError>;
}

/// A way of moving KV. No default methods: a wrapper must not forget to forward one.
pub trait CopyBackend: Send + Sync {
    /// Gets ready for a cache before the first batch of it: what it cannot copy from or to is refused here.
    fn prepare(&self, paged: &Arc<PagedKv>) -> Result<(), CopyError>;

    /// Tells of a mapping of the arena, in which the shards of later batches may lie. What comes back is kept as long as
    /// it is mapped. What takes long is done in the background; the same memory again, soon after what came back was let go, waits
    /// until that has been undone.
    fn map_arena(&self, arena: ArenaMapping) -> Arc<dyn MappedArena>;

    /// Does it let a device write into the arena (DMA)? Such a write can outlive the threads of this process.
    fn writes_by_device(&self) -> bool;

    /// The point that `stream` has reached, for [`CopyBatch::after`]. Called from the caller's own thread.
    fn fence(&self, stream: ComputeStream) -> Result<Fence, CopyError>;

    /// Starts a batch. Several may be in flight; they may complete in any order.
    fn submit(&self, batch: CopyBatch) -> Result<Box<dyn Transfer>, CopyError>;

    /// Its name, for logs.
    fn name(&self) -> &'static str;
}

/// Nothing is made of a mapping: threads copy from and to it as it is.
#[derive(Debug)]
pub struct MappedAsItIs;

impl MappedArena for MappedAsItIs {
    fn registered_bytes(&self) -> u64 {
        0
    }
}

/// What all backends have in common that copy host memory with threads: inside an `impl CopyBackend`, in place of everything but
/// `submit` and `name`.
#[macro_export]
macro_rules! copies_host_memory {
    () => {
        fn prepare(
            &self,
            paged: &::std::sync::Arc<$crate::PagedKv>,
        ) -> ::core::result::Result<(), $crate::CopyError> {
            let (expected, got) = ($crate::Memory::Host, paged.memory());
            if got == expected {
                return Ok(());
            }
            let (expected, got) = (expected.to_string(), got.to_string());
            Err($crate::CopyError::OtherMemory { backend: self.name(), expected, got })
        }

        fn map_arena(&self, _: $crate::ArenaMapping) -> ::std::sync::Arc<dyn $crate::MappedArena> {
            ::std::sync::Arc::new($crate::MappedAsItIs)
        }

        fn writes_by_device(&self) -> bool {
            false
        }

        /// There are no streams: the order of the caller's program is the order.
        fn fence(
            &self,
            _: $crate::ComputeStream,
        ) -> ::core::result::Result<$crate::Fence, $crate::CopyError> {
            Ok($crate::Fence::none())
        }
    };
}
