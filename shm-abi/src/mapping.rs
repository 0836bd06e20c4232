//! A mapped segment, and the only checked way to look into it.

use crate::abi::{Described, Type};
use core::cell::UnsafeCell;
#[cfg(not(loom))]
use core::mem::ManuallyDrop;
use core::mem::MaybeUninit;
use core::ptr::NonNull;
use std::sync::Arc;

/// Types that may be looked at inside memory which other processes write at any time.
///
/// # Safety
/// The type is `#[repr(C)]` (or `transparent`), consists of atomics and [`Pad`] only, and accepts every bit pattern (if only as a
/// useless value). A `&T` to it then asserts nothing about the bytes behind it.
pub unsafe trait Shared: Described {}

/// Padding that nobody reads, and that another process may scribble on.
#[repr(transparent)]
pub struct Pad<const N: usize>(UnsafeCell<MaybeUninit<[u8; N]>>);

impl<const N: usize> Described for Pad<N> {
    const TYPE: &'static Type = &Type::itself::<Self>("padding");
}

// SAFETY: the bytes are never accessed through a `Pad`.
unsafe impl<const N: usize> Sync for Pad<N> {}

impl<const N: usize> Pad<N> {
    /// Padding for structures that are made in private memory (tests, models).
    #[must_use]
    pub const fn new() -> Self {
        Pad(UnsafeCell::new(MaybeUninit::uninit()))
    }
}

impl<const N: usize> Default for Pad<N> {
    fn default() -> Self {
        Self::new()
    }
}

/// Memory that stays mapped as long as this handle, or any [`View`] made from it, lives.
///
/// Dropping the last one unmaps; nothing here ever unlinks a name.
#[cfg(not(loom))]
pub struct Mapping {
    base: NonNull<u8>,
    len: usize,
    writable: bool,
    backing: Backing,
}

/// Where the memory comes from, and the process that mapped it. A forked child does not have the mapping (`MADV_DONTFORK`),
/// and must not unmap whatever it may have mapped at the same address itself.
#[cfg(not(loom))]
enum Backing {
    /// Mapped by `nix`: unmapped here.
    Nix(u32),
    /// Mapped by the crate `shared_memory`, which unmaps when it is dropped.
    Crate(ManuallyDrop<shared_memory::Shmem>, u32),
}

// SAFETY: a `Mapping` is an address range; all access goes through `Shared` types, which are atomics, or through raw
// pointers whose users state their own reasons. `Shmem` is only held for its `Drop`, which may run on any thread.
#[cfg(not(loom))]
unsafe impl Send for Mapping {}
// SAFETY: as above.
#[cfg(not(loom))]
unsafe impl Sync for Mapping {}

/// A look at items that would lie out of bounds or misaligned.
#[cfg(not(loom))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected {count} items of {size} bytes at offset {offset} inside a segment of {len} bytes")]
pub struct OutOfBounds {
    /// Where the look began, in bytes.
    pub offset: usize,
    /// Size of one item, in bytes.
    pub size: usize,
    /// How many items.
    pub count: usize,
    /// The segment's length, in bytes.
    pub len: usize,
}

#[cfg(not(loom))]
impl Mapping {
    /// Wraps a mapping made by `mmap`; it is unmapped on drop.
    ///
    /// # Safety
    /// `base..base + len` is a mapping that nobody else unmaps, writable if `writable`.
    pub(crate) unsafe fn from_mmap(base: NonNull<u8>, len: usize, writable: bool) -> Mapping {
        Mapping { base, len, writable, backing: Backing::Nix(std::process::id()) }
    }

    /// Takes over a mapping of the crate `shared_memory`, whose owner flag must be clear already.
    pub(crate) fn from_shmem(shmem: shared_memory::Shmem) -> Option<Mapping> {
        let base = NonNull::new(shmem.as_ptr())?;
        let len = shmem.len();
        let backing = Backing::Crate(ManuallyDrop::new(shmem), std::process::id());
        Some(Mapping { base, len, writable: true, backing })
    }

    /// Private zeroed memory of `len` bytes, page aligned, that looks like a segment: for unit tests. It takes memory only where
    /// it is touched.
    ///
    /// # Panics
    /// When `len` is zero or memory is exhausted.
    #[must_use]
    #[allow(clippy::expect_used)]
    pub fn private(len: usize) -> Mapping {
        use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};

        let len = core::num::NonZeroUsize::new(len).expect("a length above 0");
        let (protection, flags) = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE);
        // SAFETY: a mapping of new memory, at a place that the kernel chooses.
        let base = unsafe { mmap_anonymous(None, len, protection, flags) }.expect("memory");
        // SAFETY: just mapped, and nobody else knows of it.
        unsafe { Mapping::from_mmap(base.cast(), len.get(), true) }
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// A mapping is never empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        false
    }

    /// May this process write through it? Storing through a read-only mapping is a SIGSEGV.
    #[must_use]
    pub fn writable(&self) -> bool {
        self.writable
    }

    /// The first byte. Each use of it says why it is sound.
    #[must_use]
    pub fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// `count` items of `T` from `offset`, which must be aligned and inside the segment.
    pub fn slice<T: Shared>(&self, offset: usize, count: usize) -> Result<&[T], OutOfBounds> {
        let size = size_of::<T>();
        let fits = size
            .checked_mul(count)
            .and_then(|bytes| bytes.checked_add(offset))
            .is_some_and(|end| end <= self.len);
        if !fits || !(self.base.as_ptr() as usize + offset).is_multiple_of(align_of::<T>()) {
            return Err(OutOfBounds { offset, size, count, len: self.len });
        }
        // SAFETY: in bounds and aligned as just checked; `Shared` types accept every bit pattern and are only
        // changed through atomics; the mapping outlives the borrow of `self`.
        Ok(unsafe { core::slice::from_raw_parts(self.base.as_ptr().add(offset).cast::<T>(), count) })
    }

    /// One `T` at `offset`.
    pub fn at<T: Shared>(&self, offset: usize) -> Result<&T, OutOfBounds> {
        Ok(&self.slice::<T>(offset, 1)?[0])
    }
}

#[cfg(not(loom))]
impl Drop for Mapping {
    fn drop(&mut self) {
        match &mut self.backing {
            Backing::Nix(process) | Backing::Crate(_, process) if *process != std::process::id() => {}
            Backing::Nix(_) => {
                // SAFETY: the range came from `mmap` and nobody else unmaps it; all borrows have ended.
                let unmapped = unsafe { nix::sys::mman::munmap(self.base.cast(), self.len) };
                debug_assert!(unmapped.is_ok(), "munmap of our own range failed: {unmapped:?}");
            }
            // SAFETY: dropped once, here.
            Backing::Crate(shmem, _) => unsafe { ManuallyDrop::drop(shmem) },
        }
    }
}

/// Prefetches the cache line of item `i`, if there is one.
#[inline(always)]
pub fn prefetch<T>(of: &[T], i: usize) {
    if let Some(item) = of.get(i) {
        let address: *const T = item;
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a prefetch of a valid address changes nothing but the caches.
        unsafe {
            use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T0>(address.cast());
        }
        #[cfg(target_arch = "aarch64")]
        // SAFETY: as above.
        unsafe {
            core::arch::asm!("prfm pldl1keep, [{0}]", in(reg) address, options(nostack, readonly, preserves_flags));
        }
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        let _ = address;
    }
}

/// `count` items of `T` inside a mapping that the view keeps alive: bounds are checked once, when it is made.
pub struct View<T: Shared + 'static> {
    items: NonNull<T>,
    count: usize,
    // Held so that `items` stays mapped (or allocated, in models).
    _keep: Arc<dyn Keep>,
}

/// Whatever keeps a view's memory alive.
pub trait Keep: Send + Sync {}
#[cfg(not(loom))]
impl Keep for Mapping {}
impl<T: Send + Sync> Keep for Vec<T> {}

// SAFETY: a `View` is a shared reference to `Shared` data (atomics) plus the handle that keeps it mapped.
unsafe impl<T: Shared> Send for View<T> {}
// SAFETY: as above.
unsafe impl<T: Shared> Sync for View<T> {}

impl<T: Shared> View<T> {
    /// `count` items from `offset`.
    #[cfg(not(loom))]
    pub fn new(mapping: &Arc<Mapping>, offset: usize, count: usize) -> Result<View<T>, OutOfBounds> {
        let items = NonNull::from(mapping.slice::<T>(offset, count)?).cast::<T>();
        Ok(View { items, count, _keep: mapping.clone() })
    }

    /// Items in private memory, for models and unit tests.
    #[must_use]
    pub fn from_vec(items: Vec<T>) -> View<T>
    where
        T: Send + Sync,
    {
        let count = items.len();
        let first = NonNull::from(items.as_slice()).cast::<T>();
        // The buffer of a Vec does not move when the Vec itself does.
        View { items: first, count, _keep: Arc::new(items) }
    }
}

/// One item inside a mapping that this keeps alive: bounds are checked when it is made, and never again.
pub struct One<T: Shared + 'static> {
    item: NonNull<T>,
    // Held so that `item` stays mapped.
    _keep: Arc<dyn Keep>,
}

// SAFETY: as `View`.
unsafe impl<T: Shared> Send for One<T> {}
// SAFETY: as `View`.
unsafe impl<T: Shared> Sync for One<T> {}

impl<T: Shared> View<T> {
    /// One of the items; `None` beyond the end.
    #[must_use]
    pub fn one(&self, index: usize) -> Option<One<T>> {
        Some(One { item: NonNull::from(self.get(index)?), _keep: self._keep.clone() })
    }
}

#[cfg(not(loom))]
impl<T: Shared> One<T> {
    /// The item at `offset`.
    pub fn new(mapping: &Arc<Mapping>, offset: usize) -> Result<One<T>, OutOfBounds> {
        Ok(One { item: NonNull::from(mapping.at::<T>(offset)?), _keep: mapping.clone() })
    }
}

impl<T: Shared> Clone for One<T> {
    fn clone(&self) -> Self {
        One { item: self.item, _keep: self._keep.clone() }
    }
}

impl<T: Shared> core::ops::Deref for One<T> {
    type Target = T;
    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: checked when it was made; `_keep` keeps the memory mapped.
        unsafe { self.item.as_ref() }
    }
}

impl<T: Shared> Clone for View<T> {
    fn clone(&self) -> Self {
        View { items: self.items, count: self.count, _keep: self._keep.clone() }
    }
}

impl<T: Shared> core::ops::Deref for View<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: checked when the view was made; `_keep` keeps the memory mapped.
        unsafe { core::slice::from_raw_parts(self.items.as_ptr(), self.count) }
    }
}
