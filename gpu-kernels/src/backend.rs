//! The trait that all ways of moving KV share.

use crate::batch::{ComputeStream, CopyBatch, Fence};
use crate::layout::PagedKv;
use std::any::Any;
use std::path::PathBuf;
use std::sync::Arc;

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
    /// The GPU or its driver failed. Nothing is being copied any more.
    #[error(transparent)]
    Gpu(#[from] crate::cuda::GpuError),
    /// The driver does not say whether the copy has ended, so a device may still write to its destination. A store's slots must
    /// not be given to anybody else; a load's blocks must not be used by anybody.
    #[error("it is not known whether a copy has ended: {0}")]
    Unended(crate::cuda::GpuError),
}

/// The arena as this process has mapped it. A backend is told of each mapping once.
#[derive(Clone)]
pub struct ArenaMapping {
    /// Its first byte.
    pub base: *mut u8,
    /// Its length, without anything that follows it in the same mapping.
    pub bytes: usize,
    /// How many bytes, from the first on, have memory by now. Grows up to `bytes`. Nothing beyond it may be touched.
    pub allocated: Arc<dyn Fn() -> u64 + Send + Sync>,
    /// A file that all processes with this arena know. A process locks it while it does what only one should do at a time.
    pub lock: Option<PathBuf>,
    /// Keeps it mapped.
    pub keep: Arc<dyn Any + Send + Sync>,
}

// SAFETY: an address, and a handle that keeps it valid; `CopyBatch::shard` says who may touch the bytes.
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

/// An arena's mapping, as a backend has prepared it (registered for DMA). It is dropped when nothing is copied there any more.
pub trait MappedArena: Send + Sync {
    /// How many of its bytes are registered by now: copies there run at the speed of the link. 0 for a backend that registers
    /// nothing.
    fn registered_bytes(&self) -> u64;
}

/// A completed transfer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CopyDone {
    /// One checksum for each shard, in order, if the batch asked for them; empty otherwise.
    pub checksums: Vec<u64>,
}

/// A transfer in flight. A thread that has seen it complete sees all that it has copied. Dropping it waits for its end: a copy
/// is never abandoned half-way.
pub trait Transfer: Send {
    /// Has it completed? The call may do a part of the work, so that a transfer that is only polled gets on.
    fn poll(&mut self) -> bool;

    /// Waits for its end, and helps where that is possible.
    fn wait(self: Box<Self>) -> Result<CopyDone, CopyError>;
}

/// A way of moving KV. No default methods: a wrapper must not forget to forward one.
pub trait CopyBackend: Send + Sync {
    /// Gets ready for a cache, before its first batch. Refuses a cache that it cannot copy from or to.
    fn prepare(&self, paged: &Arc<PagedKv>) -> Result<(), CopyError>;

    /// Announces a mapping of the arena, in which the shards of later batches may lie. The caller keeps the result as long as
    /// the mapping. Registering takes long, so it goes on in the background. If the same memory is announced again soon after
    /// the result was dropped, this waits until the earlier registration has been undone.
    fn map_arena(&self, arena: ArenaMapping) -> Arc<dyn MappedArena>;

    /// Does it let a device write into the arena (DMA)? Such a write can outlive the threads of this process.
    fn writes_by_device(&self) -> bool;

    /// The point that `stream` has reached, for [`CopyBatch::after`]. Called by the thread that submits the job, not by the one
    /// that copies.
    fn fence(&self, stream: ComputeStream) -> Result<Fence, CopyError>;

    /// Starts a batch. Several may be in flight; they may complete in any order.
    fn submit(&self, batch: CopyBatch) -> Result<Box<dyn Transfer>, CopyError>;

    /// Its name, for logs.
    fn name(&self) -> &'static str;
}

/// A mapping that a backend uses as it is: its threads copy from and to it, and nothing is registered.
#[derive(Debug)]
pub struct MappedAsItIs;

impl MappedArena for MappedAsItIs {
    fn registered_bytes(&self) -> u64 {
        0
    }
}

/// The methods that all backends share that copy host memory with threads. Stands inside an `impl CopyBackend`, in place of all
/// methods but `submit` and `name`.
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

        /// There are no streams to wait for: the caller's earlier accesses to host memory have ended.
        fn fence(
            &self,
            _: $crate::ComputeStream,
        ) -> ::core::result::Result<$crate::Fence, $crate::CopyError> {
            Ok($crate::Fence::none())
        }
    };
}
