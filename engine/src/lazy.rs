//! Zeroed arrays that take pages only where they are touched, aligned to cache lines.
//!
//! The tables are sized for the largest arena that they may serve, and most of each is never used. `alloc_zeroed`
//! with an alignment above 16 writes every byte, so the memory is asked for as `u128` and aligned here. All tables
//! are taken when an engine starts, and a start fails with [`NoMemory`] if the address space is limited. So nothing
//! that a client does later depends on an allocation.

use std::alloc::Layout;
use std::ops::{Deref, DerefMut};

use bytemuck::Zeroable;

/// Bytes of a cache line, and the alignment of every array.
const LINE_BYTES: usize = 64;
/// Bytes of a page; advice to the kernel begins and ends at a page.
const PAGE_BYTES: usize = 4096;

/// There is no address space for a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "expected {bytes} bytes of address space for a table of the index, and the system gives none; raise the limit \
     (`ulimit -v`), or lower --max-chunks or --max-pins"
)]
pub struct NoMemory {
    /// The bytes that were asked for; most of them are never touched.
    pub bytes: u64,
}

/// A fixed-length array of zeroed `T`.
pub(crate) struct Lazy<T> {
    /// The first element. It lies inside `_memory`, whose heap block never moves because it never grows.
    first: *mut T,
    len: usize,
    _memory: Vec<u128>,
}

// SAFETY: a `Lazy` owns its elements like a `Vec<T>`; the pointer is into its own heap block.
unsafe impl<T: Send> Send for Lazy<T> {}
// SAFETY: as above; a shared reference gives only shared references to the elements.
unsafe impl<T: Sync> Sync for Lazy<T> {}

impl<T: Zeroable + Copy> Lazy<T> {
    /// Takes `len` zeroed elements, and touches none of their pages.
    ///
    /// # Errors
    ///
    /// The system has no address space for them.
    pub(crate) fn new(len: usize) -> Result<Self, NoMemory> {
        const { assert!(align_of::<T>() <= LINE_BYTES && size_of::<T>() > 0) };
        let bytes = len.saturating_mul(size_of::<T>());
        let units = bytes.div_ceil(size_of::<u128>()) + LINE_BYTES / size_of::<u128>();
        let none = NoMemory { bytes: bytes as u64 };
        let layout = Layout::array::<u128>(units).map_err(|_| none)?;
        // SAFETY: the layout has at least one line, so it is not empty.
        let zeroed = unsafe { std::alloc::alloc_zeroed(layout) }.cast::<u128>();
        if zeroed.is_null() {
            return Err(none);
        }
        // SAFETY: the memory was just allocated, with the layout of that many `u128`s, all of them zero.
        let mut memory = unsafe { Vec::from_raw_parts(zeroed, units, units) };
        let skip = memory.as_ptr().align_offset(LINE_BYTES);
        // SAFETY: at most LINE_BYTES are skipped, and that many more than needed were allocated.
        let first = unsafe { memory.as_mut_ptr().add(skip) }.cast();
        Ok(Self { first, len, _memory: memory })
    }

    /// As `new`, for an array that is filled densely from its start and read at random. Asks for huge pages,
    /// because half of the time of such a read is the page walk. That is a hint; nothing depends on it.
    ///
    /// # Errors
    ///
    /// As `new`.
    pub(crate) fn new_dense(len: usize) -> Result<Self, NoMemory> {
        use nix::sys::mman::{MmapAdvise, madvise};

        let lazy = Self::new(len)?;
        let bytes = len * size_of::<T>();
        let skip = (lazy.first.cast::<u8>()).align_offset(PAGE_BYTES);
        if let Some(whole) =
            bytes.checked_sub(skip).map(|rest| rest - rest % PAGE_BYTES).filter(|whole| *whole > 0)
        {
            // SAFETY: these are whole pages inside `_memory`; the advice changes how they are backed, not what they
            // hold.
            unsafe {
                let first = std::ptr::NonNull::new_unchecked(lazy.first.cast::<u8>().add(skip)).cast();
                let _ = madvise(first, whole, MmapAdvise::MADV_HUGEPAGE);
            }
        }
        Ok(lazy)
    }
}

impl<T> Deref for Lazy<T> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        // SAFETY: `len` elements from `first` on lie in `_memory`; they are aligned, zeroed or written since, and
        // `T` is `Zeroable` (see `new`).
        unsafe { std::slice::from_raw_parts(self.first, self.len) }
    }
}

impl<T> DerefMut for Lazy<T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as for `deref`, and `&mut self` makes the borrow unique.
        unsafe { std::slice::from_raw_parts_mut(self.first, self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_are_zeroed_aligned_and_as_many_as_asked() {
        let mut lazy = Lazy::<[u64; 3]>::new(1001).unwrap();
        assert_eq!(lazy.len(), 1001);
        assert_eq!(lazy.as_ptr() as usize % LINE_BYTES, 0);
        assert!(lazy.iter().all(|element| *element == [0; 3]));
        lazy[1000] = [7; 3];
        assert_eq!(lazy[1000], [7; 3]);
        assert!(Lazy::<u8>::new(0).unwrap().is_empty());
    }

    #[test]
    fn what_the_address_space_has_no_room_for_is_an_error() {
        let error = Lazy::<u64>::new(1 << 50).err().unwrap();
        assert_eq!(error, NoMemory { bytes: 1 << 53 });
        assert!(error.to_string().contains("ulimit -v"), "{error}");
        assert!(Lazy::<u64>::new(usize::MAX).is_err());
    }
}
