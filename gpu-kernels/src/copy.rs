//! Copy loops in assembly.
//!
//! One side of every copy is the arena, which another process may write at the same time (when a load has become
//! stale while it runs). In Rust such a racing copy would be undefined behaviour. So both sides are only read and written in
//! assembly, which is opaque to the compiler, and for the processor it is a copy of bytes that the caller then refuses.
//! A checksum is computed from the very registers that are stored, so it is that of the bytes that have been copied.
//!
//! Which loop is the fastest depends on the machine, and not by a few percent: `loops` measures it. Non-temporal stores do not
//! read the destination's lines first. On an Emerald Rapids (one thread, cold to cold, 64 KiB at a time) they make 10.3 GB/s
//! where `memcpy` makes 7.3; with the source prefetched by `prefetchnta` it is 5.6. On a Zen 4 it is 16.5 without and 18 with it.
//! Non-temporal stores are weakly ordered, so a thread makes a [`store_fence`] before it tells anybody that it has copied.

use crate::checksum;

/// A loop that copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loop {
    /// Vectors, stored around the caches.
    Streaming,
    /// The same, and what is read next is prefetched into all caches.
    StreamingT0,
    /// The same, prefetched past the outer caches.
    StreamingNta,
    /// Vectors, stored through the caches.
    Cached,
    /// `rep movsb`; byte by byte where the architecture is another.
    Bytes,
}

impl Loop {
    /// All of them.
    pub const ALL: [Loop; 5] =
        [Loop::Streaming, Loop::StreamingT0, Loop::StreamingNta, Loop::Cached, Loop::Bytes];

    /// Its name in logs.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Loop::Streaming => "streaming",
            Loop::StreamingT0 => "streaming-t0",
            Loop::StreamingNta => "streaming-nta",
            Loop::Cached => "cached",
            Loop::Bytes => "bytes",
        }
    }

    /// Those that this processor can run.
    pub fn here() -> impl Iterator<Item = Loop> {
        Loop::ALL.into_iter().filter(|how| *how == Loop::Bytes || Vectors::widest().is_some())
    }
}

/// The vectors of a loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Vectors {
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Vectors {
    /// The widest that this processor has.
    #[cfg(target_arch = "x86_64")]
    fn widest() -> Option<Vectors> {
        if std::arch::is_x86_feature_detected!("avx512f") {
            Some(Vectors::Avx512)
        } else if std::arch::is_x86_feature_detected!("avx2") {
            Some(Vectors::Avx2)
        } else {
            None
        }
    }

    /// There are no loops for those of other architectures.
    #[cfg(not(target_arch = "x86_64"))]
    fn widest() -> Option<Vectors> {
        None
    }
}

/// Contiguous bytes to copy.
#[derive(Clone, Copy, Debug)]
pub struct Stretch {
    /// Where they go. Null in a copy with a checksum: they are only summed.
    pub to: *mut u8,
    /// Where they come from.
    pub from: *const u8,
    /// How many there are.
    pub bytes: usize,
    /// Where the bytes come from that this thread copies next. They are only prefetched, so any address will do.
    pub next: *const u8,
    /// The position of the first byte in its shard. Only a checksum asks.
    pub position: u64,
}

impl Stretch {
    /// Its first bytes, and the others.
    fn split(self, bytes: usize) -> (Stretch, Stretch) {
        let first = Stretch { bytes, ..self };
        let to = if self.to.is_null() { self.to } else { self.to.wrapping_add(bytes) };
        let (from, position) = (self.from.wrapping_add(bytes), self.position + bytes as u64);
        (first, Stretch { to, from, position, bytes: self.bytes - bytes, ..self })
    }
}

/// Copies a stretch, and with `SUM` returns its part of the shard's checksum (as [`checksum::part`]); 0 without. It must be
/// followed by [`store_fence`] before the copy is published.
///
/// # Safety
/// `from` is readable and `to` is writable for `bytes` bytes, and they do not overlap. Either may be accessed by
/// another process meanwhile; then the bytes copied are unspecified, and the checksum is that of the bytes copied.
#[inline]
pub unsafe fn copy<const SUM: bool>(how: Loop, stretch: Stretch) -> u64 {
    // SAFETY: as the caller promises; the processor has these vectors.
    unsafe { copy_with::<SUM>(Vectors::widest(), how, stretch) }
}

/// # Safety
/// As [`copy`]; the processor has these vectors.
#[inline]
unsafe fn copy_with<const SUM: bool>(vectors: Option<Vectors>, how: Loop, stretch: Stretch) -> u64 {
    match vectors.filter(|_| how != Loop::Bytes) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as the caller promises.
        Some(vectors) => unsafe { x86::copy::<SUM>(vectors, how, stretch) },
        // SAFETY: as the caller promises.
        _ => unsafe { few::<SUM>(stretch) },
    }
}

/// Copies without vectors: few bytes, or where there are no vectors.
///
/// # Safety
/// As [`copy`].
#[inline]
unsafe fn few<const SUM: bool>(stretch: Stretch) -> u64 {
    if stretch.bytes == 0 {
        return 0;
    }
    if !SUM {
        // SAFETY: as the caller promises.
        unsafe { move_bytes(stretch.to, stretch.from, stretch.bytes) };
        return 0;
    }
    // SAFETY: as the caller promises.
    unsafe { few_summed(stretch) }
}

/// # Safety
/// As [`copy`].
unsafe fn few_summed(mut stretch: Stretch) -> u64 {
    // Through private memory, because the bytes that are summed must be those that are copied.
    let mut private = [0u8; 512];
    let mut sum = 0u64;
    while stretch.bytes > 0 {
        // A checksum may be cut only at a position that is a multiple of 8.
        let longest = private.len() - (stretch.position % 8) as usize;
        let (first, rest) = stretch.split(stretch.bytes.min(longest));
        // SAFETY: as the caller promises; `private` has room.
        unsafe {
            move_bytes(private.as_mut_ptr(), first.from, first.bytes);
            if !first.to.is_null() {
                move_bytes(first.to, private.as_ptr(), first.bytes);
            }
        }
        sum = sum.wrapping_add(checksum::part(&private[..first.bytes], first.position));
        stretch = rest;
    }
    sum
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

/// Takes bytes out of the caches, for measurements.
pub(crate) fn evict(bytes: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    x86::evict(bytes);
    let _ = bytes;
}

/// # Safety
/// As [`copy`].
#[cfg(target_arch = "x86_64")]
#[inline]
unsafe fn move_bytes(to: *mut u8, from: *const u8, bytes: usize) {
    // SAFETY: the caller promises the ranges. `rep movsb` reads and writes exactly them, and the direction flag is clear by the
    // ABI.
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

/// # Safety
/// As [`copy`].
#[cfg(not(target_arch = "x86_64"))]
unsafe fn move_bytes(to: *mut u8, from: *const u8, bytes: usize) {
    for index in 0..bytes {
        // SAFETY: inside the ranges that the caller promises; volatile, because either side may be raced.
        unsafe { to.add(index).write_volatile(from.add(index).read_volatile()) };
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Loop, Stretch, Vectors, few};
    use core::arch::asm;
    use core::arch::x86_64::{
        __cpuid_count, _MM_HINT_NTA, _MM_HINT_T0, _mm_clflush, _mm_mfence, _mm_prefetch,
    };

    /// A cache line, and the alignment of what is stored around the caches: a partial line would be read and written twice.
    const LINE: usize = 64;
    /// How far ahead of its reads a loop prefetches. A multiple of each loop's step.
    const AHEAD: usize = 2048;

    /// # Safety
    /// As [`super::copy`]; the processor has these vectors.
    pub(super) unsafe fn copy<const SUM: bool>(vectors: Vectors, how: Loop, stretch: Stretch) -> u64 {
        let mut how = how;
        let mut head = if stretch.to.is_null() { 0 } else { stretch.to.align_offset(LINE) };
        if SUM && !(stretch.position + head as u64).is_multiple_of(8) {
            // The vectors must begin with a word of the checksum, so they cannot be aligned.
            how = Loop::Cached;
            head = (stretch.position.next_multiple_of(8) - stretch.position) as usize;
        }
        let step = match vectors {
            Vectors::Avx2 => avx2::STEP,
            Vectors::Avx512 => avx512::STEP,
        };
        let (head, rest) = stretch.split(head.min(stretch.bytes));
        let (body, tail) = rest.split(rest.bytes / step * step);
        // SAFETY: these are consecutive parts of what the caller promises. The body has whole steps; its destination is null, or
        // aligned to a line unless `how` is `Cached`.
        unsafe {
            let sum = few::<SUM>(head);
            let sum = sum.wrapping_add(match vectors {
                _ if body.bytes == 0 => 0,
                Vectors::Avx2 => avx2::copy::<SUM>(how, body),
                Vectors::Avx512 => avx512::copy::<SUM>(how, body),
            });
            sum.wrapping_add(few::<SUM>(tail))
        }
    }

    pub(super) fn evict(bytes: &[u8]) {
        const CLFLUSHOPT: u32 = 1 << 23;
        // Without this feature the measurement takes as long as its budget allows.
        let quick = __cpuid_count(7, 0).ebx & CLFLUSHOPT != 0;
        for line in bytes.chunks(LINE) {
            // SAFETY: a flushed line is read again from memory. The first instruction is one that this processor has, and every
            // x86-64 has the second one.
            unsafe {
                if quick {
                    asm!("clflushopt [{line}]", line = in(reg) line.as_ptr(), options(nostack, preserves_flags));
                } else {
                    _mm_clflush(line.as_ptr());
                }
            }
        }
        // SAFETY: every x86-64 has it; it only orders.
        unsafe { _mm_mfence() };
    }

    #[inline(always)]
    fn prefetch(how: Loop, from: *const u8, bytes: usize) {
        for at in (0..bytes).step_by(LINE) {
            let line = from.wrapping_add(at).cast();
            // SAFETY: prefetching never faults, and is no access.
            unsafe {
                match how {
                    Loop::StreamingT0 => _mm_prefetch::<_MM_HINT_T0>(line),
                    Loop::StreamingNta => _mm_prefetch::<_MM_HINT_NTA>(line),
                    Loop::Streaming | Loop::Cached | Loop::Bytes => {}
                }
            }
        }
    }

    /// The loop over four vectors at a time, in terms of what the module around it names.
    macro_rules! vector_loop {
        ($feature:literal, $register:ident, $bytes:literal, $move:literal) => {
            use super::{AHEAD, Loop, Stretch, prefetch};
            use crate::checksum;
            use core::arch::asm;
            use core::mem::transmute;

            const WORDS: usize = $bytes / 8;
            /// Bytes of four vectors.
            pub(super) const STEP: usize = 4 * $bytes;

            /// # Safety
            /// As [`super::super::copy`]. The length is a multiple of [`STEP`]; `to` is null, or aligned to a line unless the loop is
            /// `Cached`; with `SUM` the position is a multiple of 8.
            #[target_feature(enable = $feature)]
            pub(super) unsafe fn copy<const SUM: bool>(how: Loop, stretch: Stretch) -> u64 {
                let Stretch { mut to, mut from, bytes, next, position } = stretch;
                let end = from.wrapping_add(bytes);
                // This runs ahead of `from`, and from the end of this stretch into the next one.
                let mut ahead =
                    if bytes > AHEAD { from.wrapping_add(AHEAD) } else { next.wrapping_add(AHEAD - bytes) };
                let (mut keys, mut sums) = ([zero(); 4], [zero(); 4]);
                if SUM {
                    for (key, first) in keys.iter_mut().zip((position / 8..).step_by(WORDS)) {
                        let words: [u64; WORDS] = core::array::from_fn(|word| checksum::keys(first + word as u64));
                        // SAFETY: a vector is its words.
                        *key = unsafe { transmute::<[u64; WORDS], Vector>(words) };
                    }
                }
                let stride = every(checksum::stride(4 * WORDS as u32) as i64);
                while from != end {
                    prefetch(how, ahead, STEP);
                    let (a, b, c, d): (Vector, Vector, Vector, Vector);
                    // SAFETY: four vectors of what the caller promises; `to` is aligned as the instruction needs it.
                    unsafe {
                        asm!(
                            concat!($move, " {a}, [{from}]"),
                            concat!($move, " {b}, [{from} + {bytes}]"),
                            concat!($move, " {c}, [{from} + 2 * {bytes}]"),
                            concat!($move, " {d}, [{from} + 3 * {bytes}]"),
                            a = out($register) a,
                            b = out($register) b,
                            c = out($register) c,
                            d = out($register) d,
                            from = in(reg) from,
                            bytes = const $bytes,
                            options(nostack, preserves_flags)
                        );
                        if to.is_null() {
                            // They are only summed.
                        } else if how == Loop::Cached {
                            asm!(
                                concat!($move, " [{to}], {a}"),
                                concat!($move, " [{to} + {bytes}], {b}"),
                                concat!($move, " [{to} + 2 * {bytes}], {c}"),
                                concat!($move, " [{to} + 3 * {bytes}], {d}"),
                                a = in($register) a,
                                b = in($register) b,
                                c = in($register) c,
                                d = in($register) d,
                                to = in(reg) to,
                                bytes = const $bytes,
                                options(nostack, preserves_flags)
                            );
                        } else {
                            asm!(
                                "vmovntdq [{to}], {a}",
                                "vmovntdq [{to} + {bytes}], {b}",
                                "vmovntdq [{to} + 2 * {bytes}], {c}",
                                "vmovntdq [{to} + 3 * {bytes}], {d}",
                                a = in($register) a,
                                b = in($register) b,
                                c = in($register) c,
                                d = in($register) d,
                                to = in(reg) to,
                                bytes = const $bytes,
                                options(nostack, preserves_flags)
                            );
                        }
                    }
                    if SUM {
                        // As `checksum::word`, for as many words as a vector has.
                        let values = [a, b, c, d];
                        for lane in 0..4 {
                            let keyed = add32(values[lane], xor(keys[lane], shift32::<15>(keys[lane])));
                            let product = multiply(keyed, shift64::<32>(keyed));
                            let swapped = shuffle32::<0b1011_0001>(values[lane]);
                            sums[lane] = add64(sums[lane], add64(product, swapped));
                            keys[lane] = add32(keys[lane], stride);
                        }
                    }
                    if !to.is_null() {
                        to = to.wrapping_add(STEP);
                    }
                    (from, ahead) = (from.wrapping_add(STEP), ahead.wrapping_add(STEP));
                    if ahead == end {
                        ahead = next;
                    }
                }
                sums.into_iter().fold(0u64, |total, sum| {
                    // SAFETY: a vector is its words.
                    let words = unsafe { transmute::<Vector, [u64; WORDS]>(sum) };
                    words.into_iter().fold(total, u64::wrapping_add)
                })
            }
        };
    }

    mod avx2 {
        use core::arch::x86_64::{
            __m256i as Vector, _mm256_add_epi32 as add32, _mm256_add_epi64 as add64,
            _mm256_mul_epu32 as multiply, _mm256_set1_epi64x as every, _mm256_setzero_si256 as zero,
            _mm256_shuffle_epi32 as shuffle32, _mm256_srli_epi32 as shift32, _mm256_srli_epi64 as shift64,
            _mm256_xor_si256 as xor,
        };
        vector_loop!("avx2", ymm_reg, 32, "vmovdqu");
    }

    mod avx512 {
        use core::arch::x86_64::{
            __m512i as Vector, _mm512_add_epi32 as add32, _mm512_add_epi64 as add64,
            _mm512_mul_epu32 as multiply, _mm512_set1_epi64 as every, _mm512_setzero_si512 as zero,
            _mm512_shuffle_epi32 as shuffle32, _mm512_srli_epi32 as shift32, _mm512_srli_epi64 as shift64,
            _mm512_xor_si512 as xor,
        };
        vector_loop!("avx512f", zmm_reg, 64, "vmovdqu64");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const AROUND: usize = 130;

    /// Every loop with all vectors that this processor has, and without any.
    fn ways() -> impl Strategy<Value = (Loop, Option<Vectors>)> {
        let mut vectors = vec![None, Vectors::widest()];
        #[cfg(target_arch = "x86_64")]
        if Vectors::widest() == Some(Vectors::Avx512) {
            vectors.push(Some(Vectors::Avx2));
        }
        let all = vectors.into_iter().flat_map(|vectors| Loop::here().map(move |how| (how, vectors)));
        prop::sample::select(all.collect::<Vec<_>>())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]
        /// Every loop with every kind of vectors writes exactly the bytes asked for, wherever they start, and not one more; and it
        /// sums up what the plain loop over words does.
        #[test]
        fn copies_and_sums_exactly(
            (how, vectors) in ways(),
            to_skip in 0..AROUND,
            from_skip in 0..AROUND,
            bytes in prop_oneof![0usize..600, 0usize..20_000],
            position in prop_oneof![Just(0u64), 0u64..200, (0u64..1 << 40).prop_map(|words| words * 8)],
            sum in any::<bool>(),
            to_nowhere in any::<bool>(),
        ) {
            let from: Vec<u8> = (0..bytes + 2 * AROUND).map(|i| (i * 31 + i / 251) as u8).collect();
            let mut to = vec![0xAAu8; bytes + 2 * AROUND];
            let copied = &from[from_skip..from_skip + bytes];
            let stretch = Stretch {
                to: to.as_mut_ptr().wrapping_add(to_skip),
                from: copied.as_ptr(),
                bytes,
                next: core::ptr::without_provenance(8),
                position,
            };
            let expected = checksum::part(copied, position);
            // SAFETY: both ranges are inside their vectors and the vectors are distinct.
            unsafe {
                if sum {
                    let to = if to_nowhere { core::ptr::null_mut() } else { stretch.to };
                    prop_assert_eq!(copy_with::<true>(vectors, how, Stretch { to, ..stretch }), expected);
                } else {
                    prop_assert_eq!(copy_with::<false>(vectors, how, stretch), 0);
                }
            }
            store_fence();
            if sum && to_nowhere {
                prop_assert!(to.iter().all(|b| *b == 0xAA), "wrote what it should only sum");
            } else {
                prop_assert!(to[..to_skip].iter().all(|b| *b == 0xAA), "wrote before the destination");
                prop_assert!(&to[to_skip..to_skip + bytes] == copied, "the bytes differ");
                prop_assert!(to[to_skip + bytes..].iter().all(|b| *b == 0xAA), "wrote behind the destination");
            }
        }
    }
}
