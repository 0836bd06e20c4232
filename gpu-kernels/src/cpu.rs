//! The CPU backend: `threads − 1` workers, and the thread that waits for a transfer helps. With one thread nothing is handed
//! over at all.
//!
//! A batch is cut into pieces of at most [`PIECE`] bytes, none of which crosses a shard; threads take the next piece, or a few short
//! ones, until there is none. So one shard of 32 MiB is copied by all threads, and so are a thousand of 64 KiB.

use crate::apart::Apart;
use crate::backend::{CopyBackend, CopyDone, CopyError, Transfer};
use crate::batch::{CopyBatch, Direction};
use crate::checksum;
use crate::copy::{Stretch, copy, store_fence};
use crate::loops::Loops;
use crate::sync::{Sum, Word, release_fence};
use crossbeam_utils::CachePadded;
use std::collections::VecDeque;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Bytes of a piece: long enough to stream, short enough to share. A multiple of 8, because checksums are cut there.
const PIECE: usize = 512 << 10;

/// A batch of short pieces is copied in at least so many turns, which threads share.
const TURNS: usize = 16;

/// One contiguous piece of the paged side. In a load its address may be null: these bytes of the shard are not copied.
#[derive(Clone, Copy, Debug)]
struct Page {
    address: *mut u8,
    bytes: usize,
}

impl Page {
    fn at(self, skip: usize) -> *mut u8 {
        if self.address.is_null() { self.address } else { self.address.wrapping_add(skip) }
    }
}

/// One contiguous range of the arena, and the pages that it is made of, in order.
#[derive(Clone, Copy, Debug)]
struct Shard {
    arena: *mut u8,
    first_page: usize,
    pages: usize,
    bytes: usize,
}

/// A part of one shard.
#[derive(Clone, Copy, Debug)]
struct Piece {
    shard: u32,
    /// The page in which it begins, counted over the batch, and its offset in that page.
    page: u32,
    skip: usize,
    /// Its offset in the shard.
    position: usize,
    bytes: usize,
}

struct Job {
    direction: Direction,
    checksum: bool,
    loops: Loops,
    shards: Vec<Shard>,
    pages: Vec<Page>,
    pieces: Vec<Piece>,
    sums: Vec<Sum>,
    /// How many pieces a thread takes at a time.
    turn: u32,
    /// The next piece that nobody has taken. All threads write this and `left` all the time, so each has cache lines of its own.
    next: CachePadded<Word>,
    /// Pieces that have not been copied.
    left: CachePadded<Word>,
    /// 0; 1 when all pieces have been copied.
    done: Word,
    /// Turns in which a thread has panicked.
    failed: Word,
}

// SAFETY: addresses only; `CopyBatch::shard` states who may touch the memory behind them, from any thread.
unsafe impl Send for Job {}
// SAFETY: as above.
unsafe impl Sync for Job {}

impl Job {
    fn new(batch: &CopyBatch, loops: Loops) -> Job {
        let CopyBatch { direction, checksum, .. } = *batch;
        let (mut shards, mut pages) = (Vec::with_capacity(batch.len()), Vec::new());
        for (arena, blocks) in batch.shards() {
            let first_page = pages.len();
            pages.extend(batch.paged.pages(blocks).map(|(address, bytes)| Page { address, bytes }));
            let bytes = batch.paged.shard_bytes() as usize;
            shards.push(Shard { arena, first_page, pages: pages.len() - first_page, bytes });
        }
        let mut pieces = Vec::new();
        for (index, shard) in shards.iter().enumerate() {
            let (mut page, mut skip, mut position) = (shard.first_page, 0, 0);
            while position < shard.bytes {
                let bytes = PIECE.min(shard.bytes - position);
                pieces.push(Piece { shard: index as u32, page: page as u32, skip, position, bytes });
                position += bytes;
                skip += bytes;
                while page < shard.first_page + shard.pages && skip >= pages[page].bytes {
                    skip -= pages[page].bytes;
                    page += 1;
                }
            }
        }
        let sums = if checksum { shards.iter().map(|_| Sum::default()).collect() } else { Vec::new() };
        // A turn has its costs, most of all the fence that waits for its stores. So it may have as many bytes as a long piece, as
        // long as there are enough turns to share.
        let turn = (PIECE / batch.paged.shard_bytes() as usize).min(pieces.len() / TURNS).max(1) as u32;
        let left = CachePadded::new(Word::new(pieces.len() as u32));
        let done = Word::new(u32::from(pieces.is_empty()));
        Job {
            direction,
            checksum,
            loops,
            shards,
            pages,
            pieces,
            sums,
            turn,
            next: CachePadded::default(),
            left,
            done,
            failed: Word::default(),
        }
    }

    /// Takes and copies one piece, or a few that are short; false when there is none left to take.
    fn step(&self) -> bool {
        if self.next.get() as usize >= self.pieces.len() {
            return false;
        }
        let pieces = self.pieces.get(self.next.add(self.turn) as usize..).unwrap_or_default();
        let pieces = &pieces[..pieces.len().min(self.turn as usize)];
        if pieces.is_empty() {
            return false;
        }
        let ran = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pieces.iter().for_each(|piece| self.run(piece));
        }));
        if ran.is_err() {
            self.failed.add(1);
        }
        // Before the pieces are counted down, because non-temporal stores are weakly ordered.
        store_fence();
        if self.left.sub(pieces.len() as u32) {
            // SYNC POINT: Release in `bump_and_wake`; pairs with the Acquire in `is_done`. All pieces have been copied before,
            // because each was counted down with AcqRel.
            self.done.bump_and_wake();
        }
        true
    }

    fn is_done(&self) -> bool {
        self.done.get() != 0
    }

    fn run(&self, piece: &Piece) {
        let shard = &self.shards[piece.shard as usize];
        if self.direction == Direction::Store {
            // SYNC POINT: Release fence before the first store into a slot; pairs with the Acquire fence of a worker that still
            // loads the slot's previous generation (kvring-shm-abi, `SlotHeader::still_valid`).
            release_fence();
        }
        let (mut page, mut skip) = (piece.page as usize, piece.skip);
        let (mut position, mut left) = (piece.position, piece.bytes);
        let mut sum = 0u64;
        while left > 0 {
            let here = self.pages[page];
            let bytes = left.min(here.bytes - skip);
            let (arena, paged) = (shard.arena.wrapping_add(position), here.at(skip));
            (page, skip) = if skip + bytes == here.bytes { (page + 1, 0) } else { (page, skip + bytes) };
            let (to, from, next) = match self.direction {
                Direction::Store => {
                    (arena, paged, self.pages.get(page).map_or(paged, |following| following.at(skip)))
                }
                Direction::Load => (paged, arena, arena.wrapping_add(bytes)),
            };
            let stretch = Stretch { to, from, bytes, next, position: position as u64 };
            let how = self.loops.of(self.direction, here.bytes, self.checksum);
            // SAFETY: both ranges were promised to `CopyBatch::shard`; pieces of a batch do not overlap. A page that is skipped
            // (its address is null) is only summed.
            unsafe {
                if self.checksum {
                    sum = sum.wrapping_add(copy::<true>(how, stretch));
                } else if !to.is_null() {
                    copy::<false>(how, stretch);
                }
            }
            (position, left) = (position + bytes, left - bytes);
        }
        if let Some(total) = self.sums.get(piece.shard as usize) {
            total.add(sum);
        }
    }

    /// Copies the pieces that nobody has taken, then sleeps until the other threads have finished theirs.
    fn finish(&self) {
        while self.step() {}
        while !self.is_done() {
            self.done.wait(0);
        }
    }
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Arc<Job>>,
    closed: bool,
}

#[derive(Default)]
struct Pool {
    queue: Mutex<Queue>,
    /// Changes when there is a new job, or the queue has been closed.
    news: Word,
}

impl Pool {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        loop {
            let seen = self.news.get();
            let (job, closed) = {
                let mut queue = self.queue();
                // Jobs of which every piece has been taken need no more threads.
                while queue.jobs.front().is_some_and(|job| job.next.get() as usize >= job.pieces.len()) {
                    queue.jobs.pop_front();
                }
                (queue.jobs.front().cloned(), queue.closed)
            };
            match job {
                Some(job) => while job.step() {},
                None if closed => return,
                None => self.news.wait(seen),
            }
        }
    }
}

/// Copies with the threads of this process. See the module's documentation.
pub struct CpuBackend {
    pool: Arc<Pool>,
    workers: Vec<JoinHandle<()>>,
    apart: Apart,
    loops: Loops,
}

impl CpuBackend {
    /// A backend of `threads` threads, the waiting one included; at least one. If the system cannot start as many, the backend
    /// has fewer. The first one in a process measures with which loops it copies.
    #[must_use]
    pub fn new(threads: usize) -> CpuBackend {
        CpuBackend::with(threads, Loops::measured())
    }

    fn with(threads: usize, loops: Loops) -> CpuBackend {
        let pool = Arc::new(Pool::default());
        let (tell, told) = mpsc::channel();
        let workers: Vec<_> = (1..threads)
            .filter_map(|index| {
                let (pool, tell) = (pool.clone(), tell.clone());
                let work = move || {
                    // Fails only if `new` has panicked, so that nobody listens.
                    let _ = tell.send(rustix::thread::gettid());
                    drop(tell);
                    pool.work();
                };
                std::thread::Builder::new().name(format!("kvring-copy-{index}")).spawn(work).ok()
            })
            .collect();
        drop(tell);
        CpuBackend { pool, workers, apart: Apart::new(told.iter().collect()), loops }
    }
}

impl CopyBackend for CpuBackend {
    crate::copies_host_memory!();

    fn submit(&self, batch: CopyBatch) -> Result<Box<dyn Transfer>, CopyError> {
        self.prepare(&batch.paged)?;
        let job = Arc::new(Job::new(&batch, self.loops));
        if !self.workers.is_empty() && job.pieces.len() > 1 {
            self.apart.keep_off_this_cpu();
            let mut queue = self.pool.queue();
            queue.jobs.push_back(job.clone());
            drop(queue);
            self.pool.news.bump_and_wake();
        }
        Ok(Box::new(CpuTransfer { job }))
    }

    fn name(&self) -> &'static str {
        "cpu"
    }
}

impl Drop for CpuBackend {
    fn drop(&mut self) {
        self.pool.queue().closed = true;
        self.pool.news.bump_and_wake();
        for worker in self.workers.drain(..) {
            // A worker catches the panics of its pieces, so there is nothing to report here.
            let _ = worker.join();
        }
    }
}

struct CpuTransfer {
    job: Arc<Job>,
}

impl Transfer for CpuTransfer {
    fn poll(&mut self) -> bool {
        // Copies one piece, so that a transfer that is only polled gets on.
        if !self.job.is_done() {
            self.job.step();
        }
        self.job.is_done()
    }

    fn wait(self: Box<Self>) -> Result<CopyDone, CopyError> {
        self.job.finish();
        if self.job.failed.get() != 0 {
            return Err(CopyError::ThreadFailed);
        }
        let shards = self.job.sums.iter().zip(&self.job.shards);
        let checksums = shards.map(|(sum, shard)| checksum::finish(sum.get(), shard.bytes as u64)).collect();
        Ok(CopyDone { checksums })
    }
}

impl Drop for CpuTransfer {
    fn drop(&mut self) {
        self.job.finish();
    }
}

#[cfg(test)]
#[path = "cpu_tests.rs"]
mod tests;
