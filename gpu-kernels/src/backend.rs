//! The trait that all ways of moving KV share.

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// From the paged cache into the arena.
    Store,
    /// From the arena into the paged cache.
    Load,
}

/// A stream of the caller's device (a `CUstream`), after whose work a transfer must come: the kernels that write the
/// KV of a store, the last readers of the blocks of a load. The CPU backend has no streams: there the order of the
/// caller's program is the order, and this is ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ComputeStream(pub u64);

/// Why bytes could not be moved.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CopyError {
    /// The backend has been shut down.
    #[error("the copy backend has been shut down")]
    ShutDown,
    /// A thread that copied has failed.
    #[error("a copy thread failed")]
    ThreadFailed,
    /// A page of a store has no address: there is nothing to copy from.
    #[error("expected the address of every page of a store, got none for one")]
    NothingToStore,
}

/// One contiguous piece of the paged side. A null address in a load: these bytes of the shard go nowhere.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Page {
    pub(crate) address: *mut u8,
    pub(crate) bytes: usize,
}

/// One contiguous range of the arena, and which pages it is made of, in order.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shard {
    pub(crate) arena: *mut u8,
    pub(crate) first_page: usize,
    pub(crate) pages: usize,
    pub(crate) bytes: usize,
}

/// What to move: shards of the arena and the pages that they are made of.
#[derive(Debug)]
pub struct CopyBatch {
    pub(crate) direction: Direction,
    pub(crate) checksum: bool,
    pub(crate) after: Option<ComputeStream>,
    pub(crate) shards: Vec<Shard>,
    pub(crate) pages: Vec<Page>,
    /// A store with a page that has no address.
    pub(crate) nothing_to_store: bool,
}

// SAFETY: addresses only; `CopyBatch::shard` states who may touch the memory behind them, from any thread.
unsafe impl Send for CopyBatch {}
// SAFETY: as above.
unsafe impl Sync for CopyBatch {}

impl CopyBatch {
    /// An empty batch. With `checksum`, each shard's checksum is computed in the copy (see [`crate::checksum`]).
    #[must_use]
    pub fn new(direction: Direction, checksum: bool) -> CopyBatch {
        CopyBatch {
            direction,
            checksum,
            after: None,
            shards: Vec::new(),
            pages: Vec::new(),
            nothing_to_store: false,
        }
    }

    /// Orders the batch after the work that is on `stream` when it is submitted.
    #[must_use]
    pub fn after(mut self, stream: ComputeStream) -> CopyBatch {
        self.after = Some(stream);
        self
    }

    /// Adds a shard: the range of the arena from `arena` on, made of `pages` (address, bytes) in order.
    ///
    /// A page of a *load* whose address is null is skipped: nothing is written for these bytes of the shard, which count in
    /// its checksum all the same. In a store it makes the batch an error ([`CopyError::NothingToStore`]).
    ///
    /// # Safety
    /// Until the batch's transfer has completed, `arena` up to the sum of the pages' bytes and every page with an address are mapped;
    /// the destination is writable, and nobody else accesses it; the pages of a store are not written by anybody. The
    /// arena side of a *load* may be written by another process meanwhile: then the bytes loaded are meaningless, and
    /// the caller finds that out by looking at the slot's word again.
    pub unsafe fn shard(&mut self, arena: *mut u8, pages: impl IntoIterator<Item = (*mut u8, usize)>) {
        let first_page = self.pages.len();
        self.pages.extend(pages.into_iter().map(|(address, bytes)| Page { address, bytes }));
        let pages = &self.pages[first_page..];
        let bytes = pages.iter().map(|page| page.bytes).sum();
        if self.direction == Direction::Store {
            self.nothing_to_store |= pages.iter().any(|page| page.address.is_null());
        }
        self.shards.push(Shard { arena, first_page, pages: pages.len(), bytes });
    }

    /// Number of shards.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shards.len()
    }

    /// Is there nothing to move?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.shards.is_empty()
    }

    /// Bytes to move.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.shards.iter().map(|shard| shard.bytes).sum()
    }
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

/// A way of moving KV.
pub trait CopyBackend: Send + Sync {
    /// Starts a batch. Several may be in flight; they may complete in any order.
    fn submit(&self, batch: CopyBatch) -> Result<Box<dyn Transfer>, CopyError>;

    /// Its name, for logs.
    fn name(&self) -> &'static str;
}
