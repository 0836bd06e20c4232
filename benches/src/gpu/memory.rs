//! The memory of `kvring bench gpu`: host memory that is like the arena, fresh random bytes, and the comparison of bytes.

use anyhow::{Context, ensure};
use kvring_rig::random::{GAMMA, Random, mix};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use std::ffi::c_void;
use std::num::NonZero;
use std::ptr::NonNull;
use std::thread;

/// The fewest bytes for which there is another thread.
const SLICE_MIN: usize = 1 << 20;
const PAGE: usize = 4096;

/// Host memory that is like an arena: shared, of whole pages, and touched, as an engine touches its arena.
pub(super) struct Host {
    base: NonNull<c_void>,
    bytes: NonZero<usize>,
}

// SAFETY: an address of memory; whoever uses that memory has made the promise of `Host::part`.
unsafe impl Send for Host {}
// SAFETY: as above.
unsafe impl Sync for Host {}

impl Host {
    pub(super) fn new(bytes: usize) -> anyhow::Result<Host> {
        let bytes = NonZero::new(bytes.next_multiple_of(PAGE)).context("no memory to measure with")?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping, unmapped by `drop`.
        let base = unsafe { mmap_anonymous(None, bytes, access, MapFlags::MAP_SHARED) };
        let base = base.with_context(|| format!("cannot map {bytes} bytes"))?;
        let host = Host { base, bytes };
        // SAFETY: nobody else knows of it.
        let all = unsafe { host.part(0, bytes.get()) };
        spread(all, |_, slice| slice.iter_mut().step_by(PAGE).for_each(|byte| *byte = 1));
        Ok(host)
    }

    pub(super) fn base(&self) -> *mut u8 {
        self.base.as_ptr().cast()
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes.get()
    }

    /// A part of the memory.
    ///
    /// # Safety
    /// As long as the slice is used, nobody else touches these bytes, neither through another slice nor by a device's copy.
    #[allow(
        clippy::mut_from_ref,
        reason = "devices use the memory too, so only the caller can tell who uses it when"
    )]
    pub(super) unsafe fn part(&self, from: usize, bytes: usize) -> &mut [u8] {
        debug_assert!(from + bytes <= self.bytes());
        // SAFETY: the bytes are mapped, and the rest is our caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.base().wrapping_add(from), bytes) }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and nobody uses a part of it any more.
        let _ = unsafe { munmap(self.base, self.bytes.get()) };
    }
}

/// Calls `work` on several threads, each time with a slice of the bytes and the offset at which the slice begins.
fn spread(all: &mut [u8], work: impl Fn(usize, &mut [u8]) + Sync) {
    let threads = thread::available_parallelism().map_or(1, NonZero::get).min(8);
    let length = all.len().div_ceil(threads).next_multiple_of(PAGE).max(SLICE_MIN);
    thread::scope(|scope| {
        for (index, slice) in all.chunks_mut(length).enumerate() {
            let work = &work;
            scope.spawn(move || work(index * length, slice));
        }
    });
}

/// A word of a stream of random words. Each word is computed by itself, so that threads can share the work.
fn random(seed: u64, index: u64) -> u64 {
    mix((seed << 40).wrapping_add(index).wrapping_mul(GAMMA))
}

/// Writes random bytes, other ones for each seed.
pub(super) fn fill(all: &mut [u8], seed: u64) {
    spread(all, |from, slice| {
        for (index, word) in slice.chunks_mut(8).enumerate() {
            let bytes = random(seed, (from / 8 + index) as u64).to_le_bytes();
            word.copy_from_slice(&bytes[..word.len()]);
        }
    });
}

/// Numbers below `count` in random order.
pub(super) fn shuffled(count: u32, seed: u64) -> Vec<u32> {
    let mut all: Vec<u32> = (0..count).collect();
    Random::new(seed, 0).shuffle(&mut all);
    all
}

/// Compares bytes. The error names the first byte that differs, and both of its values.
pub(super) fn same(expected: &[u8], got: &[u8], from: usize) -> anyhow::Result<()> {
    if expected == got {
        return Ok(());
    }
    let at = expected.iter().zip(got).position(|(a, b)| a != b).unwrap_or(0);
    let (expected, got) = (expected[at], got[at]);
    ensure!(false, "byte {}: expected {expected:#04x}, got {got:#04x}", from + at);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_and_places_give_other_bytes() {
        let host = Host::new(3 * SLICE_MIN).unwrap();
        // SAFETY: nobody else knows of it.
        let (a, b) = unsafe { (host.part(0, SLICE_MIN + 13), host.part(SLICE_MIN + 13, SLICE_MIN + 13)) };
        fill(a, 1);
        fill(b, 1);
        assert!(a == b && a[..PAGE] != a[PAGE..2 * PAGE]);
        fill(b, 2);
        assert!(a != b);
        assert!(same(a, a, 0).is_ok());
        let (mut c, at) = (a.to_vec(), SLICE_MIN + 5);
        c[at] ^= 1;
        let error = same(a, &c, 100).unwrap_err().to_string();
        assert!(error.starts_with(&format!("byte {}: expected", at + 100)), "{error}");
    }

    #[test]
    fn shuffled_numbers_are_all_there() {
        let mut all = shuffled(1000, 7);
        assert_ne!(all, shuffled(1000, 8));
        all.sort_unstable();
        assert!(all.into_iter().eq(0..1000));
    }
}
