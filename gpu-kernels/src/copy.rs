//! Copy loops in assembly.
//!
//! One side of every copy is the arena, which another process may write at the same time (when a load has become
//! stale while it runs). In Rust such a racing copy would be undefined behaviour. Assembly is opaque to the compiler, and for
//! the processor it is a copy of bytes that the caller then refuses.
//!
//! Non-temporal stores do not read the destination's lines first: on Zen 4, cold to cold, 18.8 GB/s against 11–13 for
//! `memcpy`. The source is prefetched past the outer caches, 2 KiB ahead (17.9–19.1 GB/s against 16.3–16.8 without, one
//! thread, 64 KiB to 32 MiB). Non-temporal stores are weakly ordered, so a thread makes a [`store_fence`] before it tells
//! anybody that it has copied.

/// The loop to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Through the caches: for bytes that are read next, or few bytes.
    Plain,
    /// Around the caches.
    NonTemporal,
}

/// Below this many bytes a plain copy wins, whatever the destination.
pub const NON_TEMPORAL_MIN: usize = 4096;

/// Copies `bytes` bytes. Non-temporal stores must be followed by [`store_fence`] before the copy is published.
///
/// # Safety
/// `from` is readable and `to` is writable for `bytes` bytes, and they do not overlap. Either may be accessed by
/// another process meanwhile; then the bytes copied are unspecified.
#[inline]
pub unsafe fn copy(method: Method, to: *mut u8, from: *const u8, bytes: usize) {
    if method == Method::NonTemporal && bytes >= NON_TEMPORAL_MIN && has_non_temporal() {
        // SAFETY: as the caller promises; the processor has AVX2.
        unsafe { copy_nontemporal(to, from, bytes) }
    } else {
        // SAFETY: as the caller promises.
        unsafe { copy_plain(to, from, bytes) }
    }
}

/// Can this processor run [`copy_nontemporal`]?
#[must_use]
pub fn has_non_temporal() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        std::arch::is_x86_feature_detected!("avx2")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

/// Orders this thread's non-temporal stores before everything that it stores afterwards.
#[inline]
pub fn store_fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has SSE; the intrinsic only orders stores.
    unsafe {
        core::arch::x86_64::_mm_sfence();
    }
}

/// Copies through the caches.
///
/// # Safety
/// As [`copy`].
#[cfg(target_arch = "x86_64")]
#[inline]
pub unsafe fn copy_plain(to: *mut u8, from: *const u8, bytes: usize) {
    // SAFETY: the caller promises the ranges. `rep movsb` (fast on everything since Ivy Bridge and Zen 3) reads and writes
    // exactly them, and the direction flag is clear by the ABI.
    unsafe {
        core::arch::asm!(
            "rep movsb",
            inout("rcx") bytes => _,
            inout("rsi") from => _,
            inout("rdi") to => _,
            options(nostack, preserves_flags)
        );
    }
}

/// Copies through the caches.
///
/// # Safety
/// As [`copy`].
#[cfg(not(target_arch = "x86_64"))]
pub unsafe fn copy_plain(to: *mut u8, from: *const u8, bytes: usize) {
    for index in 0..bytes {
        // SAFETY: inside the ranges that the caller promises; volatile, because either side may be raced.
        unsafe { to.add(index).write_volatile(from.add(index).read_volatile()) };
    }
}

/// Copies around the caches of the destination.
///
/// # Safety
/// As [`copy`]; the processor has AVX2 ([`has_non_temporal`]).
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
pub unsafe fn copy_nontemporal(to: *mut u8, from: *const u8, bytes: usize) {
    const LINE: usize = 64;
    const STEP: usize = 4 * LINE;
    // Only whole lines of the destination: a partial line would be read and written twice.
    let head = to.align_offset(LINE).min(bytes);
    let body = (bytes - head) / STEP * STEP;
    let tail = bytes - head - body;
    // SAFETY: head, body and tail are consecutive parts of the caller's ranges; `to + head` is aligned to 64 bytes. The
    // loop reads and writes `STEP` bytes at a time, `body` in all, and prefetches (which never faults) ahead of it.
    unsafe {
        copy_plain(to, from, head);
        if body > 0 {
            core::arch::asm!(
                "2:",
                "prefetchnta [{from} + 2048]",
                "prefetchnta [{from} + 2112]",
                "prefetchnta [{from} + 2176]",
                "prefetchnta [{from} + 2240]",
                "vmovdqu {a}, [{from}]",
                "vmovdqu {b}, [{from} + 32]",
                "vmovdqu {c}, [{from} + 64]",
                "vmovdqu {d}, [{from} + 96]",
                "vmovntdq [{to}], {a}",
                "vmovntdq [{to} + 32], {b}",
                "vmovntdq [{to} + 64], {c}",
                "vmovntdq [{to} + 96], {d}",
                "vmovdqu {a}, [{from} + 128]",
                "vmovdqu {b}, [{from} + 160]",
                "vmovdqu {c}, [{from} + 192]",
                "vmovdqu {d}, [{from} + 224]",
                "vmovntdq [{to} + 128], {a}",
                "vmovntdq [{to} + 160], {b}",
                "vmovntdq [{to} + 192], {c}",
                "vmovntdq [{to} + 224], {d}",
                "add {from}, 256",
                "add {to}, 256",
                "sub {left}, 256",
                "jnz 2b",
                "vzeroupper",
                from = inout(reg) from.add(head) => _,
                to = inout(reg) to.add(head) => _,
                left = inout(reg) body => _,
                a = out(ymm_reg) _,
                b = out(ymm_reg) _,
                c = out(ymm_reg) _,
                d = out(ymm_reg) _,
                options(nostack)
            );
        }
        copy_plain(to.add(head + body), from.add(head + body), tail);
    }
}

/// Copies through the caches: this architecture has no other loop, see [`has_non_temporal`].
///
/// # Safety
/// As [`copy`].
#[cfg(not(target_arch = "x86_64"))]
pub unsafe fn copy_nontemporal(to: *mut u8, from: *const u8, bytes: usize) {
    // SAFETY: as the caller promises.
    unsafe { copy_plain(to, from, bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]
        /// A copy writes exactly the bytes asked for, wherever they start, and not one more.
        #[test]
        fn copies_exactly(to_skip in 0usize..130, from_skip in 0usize..130, bytes in 0usize..20_000, plain in any::<bool>()) {
            let from: Vec<u8> = (0..bytes + 260).map(|i| (i * 31 + i / 251) as u8).collect();
            let mut to = vec![0xAAu8; bytes + 260];
            let method = if plain { Method::Plain } else { Method::NonTemporal };
            // SAFETY: both ranges are inside their vectors and the vectors are distinct.
            unsafe { copy(method, to.as_mut_ptr().add(to_skip), from.as_ptr().add(from_skip), bytes) };
            store_fence();
            prop_assert!(to[..to_skip].iter().all(|b| *b == 0xAA), "wrote before the destination");
            prop_assert_eq!(&to[to_skip..to_skip + bytes], &from[from_skip..from_skip + bytes]);
            prop_assert!(to[to_skip + bytes..].iter().all(|b| *b == 0xAA), "wrote behind the destination");
        }
    }
}
