//! The memory of `kvring bench gpu`: host memory as the arena is, fresh random bytes, and a look at what has arrived.

use anyhow::{Context, ensure};
use kvring_rig::random::{GAMMA, mix};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use std::ffi::c_void;
use std::num::NonZero;
use std::ptr::NonNull;
use std::thread;

/// What is given to one thread at least.
const SLICE_MIN: usize = 1 << 20;
const PAGE: usize = 4096;

/// Host memory: shared and of whole pages, as the arena is, and touched, as the arena's is by its engine.
pub(super) struct Host {
    base: NonNull<c_void>,
    bytes: NonZero<usize>,
}

// SAFETY: memory; `Host::part` says who may touch it when.
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

    /// A part of it.
    ///
    /// # Safety
    /// As long as the slice is used nobody else touches these bytes: no other slice of them, and no copy of a device's.
    #[allow(clippy::mut_from_ref, reason = "the device's memory too: borrows cannot tell, the caller does")]
    pub(super) unsafe fn part(&self, from: usize, bytes: usize) -> &mut [u8] {
        debug_assert!(from + bytes <= self.bytes());
        // SAFETY: mapped, and the caller's.
        unsafe { std::slice::from_raw_parts_mut(self.base().wrapping_add(from), bytes) }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`; whoever had a part of it has ended.
        let _ = unsafe { munmap(self.base, self.bytes.get()) };
    }
}

/// Gives threads a slice each, and where it begins.
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

/// The `index`th word of a stream of random ones (splitmix64): each by itself, so that threads share the work.
fn random(seed: u64, index: u64) -> u64 {
    mix((seed << 40).wrapping_add(index).wrapping_mul(GAMMA))
}

/// Random bytes that no other seed gives.
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
    for at in (1..all.len()).rev() {
        all.swap(at, (random(seed, at as u64) % (at as u64 + 1)) as usize);
    }
    all
}

/// Are these bytes the same? Where not: the first that is another, and both.
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
