//! The limit of a copy: the best that plain loops can do between the same kinds of memory.

use crate::child;
use crate::clock::Clock;
use crate::stats::Windows;
use kvring_gpu_kernels::copy::{Loop, Stretch, copy, store_fence};
use kvring_shm_abi::mapping::Mapping;
use kvring_shm_abi::segment::{self, Access, SegmentFile};
use std::sync::Barrier;
use std::sync::Mutex;

/// How to copy.
#[derive(Clone, Copy, Debug)]
enum Plain {
    /// The C library's way.
    Memcpy,
    /// One of kvring's loops.
    Loop(Loop),
}

impl Plain {
    fn name(self) -> &'static str {
        match self {
            Plain::Memcpy => "memcpy",
            Plain::Loop(how) => how.as_str(),
        }
    }
}

/// Addresses that threads may take along.
#[derive(Clone, Copy)]
struct Address(*mut u8);

// SAFETY: only an address; `Limit::measure` says which thread may access it.
unsafe impl Send for Address {}
// SAFETY: as above.
unsafe impl Sync for Address {}

/// GB/s of every loop, window by window: into the segment, out of it.
pub(super) struct Found(Vec<(Plain, Windows, Windows)>);

impl Found {
    pub(super) fn new() -> Found {
        let loops = [Plain::Memcpy].into_iter().chain(Loop::here().map(Plain::Loop));
        Found(loops.map(|how| (how, Windows::default(), Windows::default())).collect())
    }

    /// The best loop into the segment: its name and its windows. The best over all windows, not of each: the best of
    /// several noisy numbers would be better than any of them.
    pub(super) fn best_into(&self) -> (&'static str, Windows) {
        best(self.0.iter().map(|(how, into, _)| (how.name(), into)))
    }

    /// The same, out of it.
    pub(super) fn best_out(&self) -> (&'static str, Windows) {
        best(self.0.iter().map(|(how, _, out)| (how.name(), out)))
    }
}

fn best<'a>(loops: impl Iterator<Item = (&'static str, &'a Windows)>) -> (&'static str, Windows) {
    let best = loops.max_by(|(_, a), (_, b)| a.median().total_cmp(&b.median()));
    best.map_or(("", Windows::default()), |(name, windows)| (name, windows.clone()))
}

/// A segment as large as the paged cache, every page of it touched.
pub(super) struct Limit {
    shared: Mapping,
    bytes: usize,
    /// Where the next window begins. Windows use different bytes, so that none finds its own in the CPU's caches.
    next: Mutex<usize>,
}

impl Limit {
    pub(super) fn new(bytes: usize) -> anyhow::Result<Limit> {
        let name = format!("kvring-{}", child::unique_name());
        let file = SegmentFile::create(&name, bytes as u64)?;
        let mapped = file.allocate(0, bytes as u64).and_then(|()| file.map(bytes as u64, Access::ReadWrite));
        segment::unlink(&name);
        let shared = mapped?;
        // SAFETY: all of a mapping that nobody else has.
        unsafe { shared.base().as_ptr().write_bytes(1, bytes) };
        Ok(Limit { shared, bytes, next: Mutex::new(0) })
    }

    /// One window of every loop, both ways, copying `total` bytes in pieces of `piece` bytes.
    pub(super) fn measure(
        &self,
        found: &mut Found,
        paged: *mut u8,
        piece: usize,
        threads: usize,
        total: usize,
        clock: &Clock,
    ) -> anyhow::Result<()> {
        for (how, into, out) in &mut found.0 {
            into.push(self.pass(*how, Address(paged), piece, threads, total, clock, true)?);
            out.push(self.pass(*how, Address(paged), piece, threads, total, clock, false)?);
        }
        Ok(())
    }

    #[allow(clippy::too_many_arguments, reason = "one pass of one loop, told everything")]
    fn pass(
        &self,
        how: Plain,
        paged: Address,
        piece: usize,
        threads: usize,
        total: usize,
        clock: &Clock,
        into: bool,
    ) -> anyhow::Result<f64> {
        let mut next = self.next.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let first = *next;
        *next = (first + total) % self.bytes;
        let shared = Address(self.shared.base().as_ptr());
        let barrier = Barrier::new(threads);
        // A piece belongs to one thread if there are enough of them; else it is cut, as the worker does.
        let piece = piece.min(total / threads);
        let one = |thread: usize| {
            let (paged, shared) = (paged, shared);
            barrier.wait();
            let started = clock.ticks();
            for index in (thread..total / piece).step_by(threads) {
                let sides = |index: usize| {
                    let at = (first + index * piece) % self.bytes;
                    let block = super::scattered(at / piece, self.bytes / piece) * piece;
                    let (paged, shared) = (paged.0.wrapping_add(block), shared.0.wrapping_add(at));
                    if into { (shared, paged) } else { (paged, shared) }
                };
                let ((to, from), (_, next)) = (sides(index), sides(index + threads));
                // SAFETY: both pieces are within their buffers (all three sizes are powers of two), the two are distinct, and
                // nobody else uses either while this runs.
                unsafe {
                    match how {
                        Plain::Memcpy => core::ptr::copy_nonoverlapping(from, to, piece),
                        Plain::Loop(how) => {
                            copy::<false>(how, Stretch { to, from, bytes: piece, next, position: 0 });
                            store_fence();
                        }
                    }
                }
            }
            (started, clock.ticks())
        };
        let spans: Vec<(u64, u64)> = if threads == 1 {
            vec![one(0)]
        } else {
            std::thread::scope(|scope| {
                let others: Vec<_> = (1..threads).map(|thread| scope.spawn(move || one(thread))).collect();
                let mut spans = vec![one(0)];
                for other in others {
                    spans.push(other.join().map_err(|_| anyhow::anyhow!("a copying thread panicked"))?);
                }
                Ok::<_, anyhow::Error>(spans)
            })?
        };
        let started = spans.iter().map(|span| span.0).min().unwrap_or(0);
        let ended = spans.iter().map(|span| span.1).max().unwrap_or(0);
        Ok(total as f64 / clock.ns(ended - started))
    }
}
