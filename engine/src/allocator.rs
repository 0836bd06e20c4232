//! Allocates the arena: the first slab before serving starts, the rest in order, by a thread of its own, while
//! clients are already being served.
//!
//! Slabs are finished in order, so one number says which have been handed over, and one relaxed load tells whether
//! there are new ones. Before each piece the thread checks that there is room for it beside what is kept for others
//! (`preflight`): memory that was free when the engine started may be somebody else's by now, and the kernel would
//! kill a neighbour for ours. Too little room is no failure: the engine serves with the slabs that it has, `status`
//! shows the rest as missing, and the thread goes on trying. After a restart that is the normal case: clients that
//! still map the old arena unmap it soon.

use crate::preflight::{self, NoRoom, Room};
use kvring_shm_abi::failpoint::{self, Place};
use kvring_shm_abi::lobby::Lobby;
use kvring_shm_abi::park;
use kvring_shm_abi::segment::{SegmentError, SegmentFile};
use kvring_shm_abi::superblock::Geometry;
use kvring_shm_abi::sync::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How many bytes one system call allocates, which takes about a millisecond. Between two calls the thread rests,
/// and looks whether it is to stop.
const PIECE_BYTES: u64 = 4 << 20;
/// How long the thread waits before it tries a full file system again.
const RETRY: Duration = Duration::from_secs(1);
/// The thread's niceness. It costs less if a reservation waits for a slab than if the service thread waits for a
/// core.
const NICE: i32 = 10;

/// Why a piece was not allocated.
#[derive(Debug, thiserror::Error)]
pub enum PieceError {
    /// There is no room for it beside what is kept for others.
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
    /// The system refused it.
    #[error(transparent)]
    Segment(#[from] SegmentError),
}

/// Why the allocator could not begin.
#[derive(Debug, thiserror::Error)]
pub enum AllocatorError {
    /// The first slab could not be allocated.
    #[error("the arena's first slab: {0}")]
    FirstSlab(PieceError),
    /// Its thread could not be started.
    #[error("the allocator's thread: {0}")]
    Thread(std::io::Error),
}

/// The state of the allocation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// The thread is allocating.
    Running,
    /// There is no room at the moment; the thread tries again every second. Has the error's text.
    Waiting(String),
    /// It cannot go on. Has the error's text.
    Failed(String),
    /// The whole arena is allocated.
    Complete,
}

struct Shared {
    /// How many slabs are allocated, from the first one on.
    ready: AtomicU32,
    stop: AtomicBool,
    /// True in `Waiting` and `Failed`, for a look without the lock.
    stalled: AtomicBool,
    state: Mutex<State>,
}

impl Shared {
    fn set(&self, state: State) {
        let stalled = matches!(state, State::Waiting(_) | State::Failed(_));
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = state;
        self.stalled.store(stalled, Ordering::Relaxed);
    }
}

/// A view of the allocation for anybody who watches it: a progress bar, a log.
#[derive(Clone)]
pub struct Progress {
    shared: Arc<Shared>,
    geometry: Geometry,
}

impl Progress {
    /// How many slabs are allocated so far.
    #[must_use]
    pub fn slabs_ready(&self) -> u32 {
        self.shared.ready.load(Ordering::Relaxed)
    }

    /// How many bytes are allocated so far.
    #[must_use]
    pub fn bytes_ready(&self) -> u64 {
        u64::from(self.slabs_ready()) * self.geometry.slab_bytes
    }

    /// How many bytes the whole arena has.
    #[must_use]
    pub fn bytes_total(&self) -> u64 {
        self.geometry.arena_bytes
    }

    /// The state now.
    #[must_use]
    pub fn state(&self) -> State {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether the number of slabs will not grow any more.
    #[must_use]
    pub fn is_over(&self) -> bool {
        matches!(self.state(), State::Complete | State::Failed(_))
    }
}

/// The service loop's side of the allocator: takes finished slabs. Dropping it stops the thread.
pub struct Allocator {
    shared: Arc<Shared>,
    geometry: Geometry,
    /// How many slabs have been handed over.
    taken: u32,
    thread: Option<JoinHandle<()>>,
}

impl Allocator {
    /// Allocates the first slab and leaves the rest to a thread that rings the lobby's doorbell for each slab. An
    /// earlier engine has allocated the first `ready` slabs; then none is allocated here.
    ///
    /// There is no room for the first slab, or no thread.
    pub fn start(
        arena: Arc<SegmentFile>,
        geometry: Geometry,
        lobby: Lobby,
        ready: u32,
    ) -> Result<Allocator, AllocatorError> {
        let allocate = {
            let arena = arena.clone();
            move |offset, bytes| {
                preflight::check_piece(bytes, &Room::now())?;
                Ok(arena.allocate(offset, bytes)?)
            }
        };
        let populate = move |offset, bytes| arena.populate(offset, bytes);
        Allocator::start_with(geometry, lobby, ready, allocate, populate)
    }

    /// As `start`, with the functions that allocate `(offset, bytes)` and then clear these pages: those of the
    /// arena, or of a test.
    fn start_with(
        geometry: Geometry,
        lobby: Lobby,
        ready: u32,
        allocate: impl Fn(u64, u64) -> Result<(), PieceError> + Send + 'static,
        populate: impl Fn(u64, u64) -> Result<(), SegmentError> + Send + 'static,
    ) -> Result<Allocator, AllocatorError> {
        let mut at = 0;
        while ready == 0 && at < geometry.slab_bytes {
            let piece = PIECE_BYTES.min(geometry.slab_bytes - at);
            allocate(at, piece).map_err(AllocatorError::FirstSlab)?;
            at += piece;
        }
        let shared = Arc::new(Shared {
            ready: AtomicU32::new(ready.max(1)),
            stop: AtomicBool::new(false),
            stalled: AtomicBool::new(false),
            state: Mutex::new(State::Running),
        });
        failpoint::here(Place::AllocatorStarts);
        let worker = Worker { shared: shared.clone(), geometry, lobby, inherited: ready, allocate, populate };
        let thread = thread::Builder::new()
            .name("kvring-alloc".to_owned())
            .spawn(move || worker.run())
            .map_err(AllocatorError::Thread)?;
        Ok(Allocator { shared, geometry, taken: 0, thread: Some(thread) })
    }

    /// Whether there is a slab to take. One relaxed load.
    #[inline]
    #[must_use]
    pub fn has_news(&self) -> bool {
        self.shared.ready.load(Ordering::Relaxed) != self.taken
    }

    /// The next finished slab, in order.
    #[inline]
    pub fn take(&mut self) -> Option<u32> {
        // SYNC POINT: Acquire; pairs with the Release in `Worker::run`. What the kernel did for that thread has
        // happened before anybody who hears of the slab touches it.
        if self.shared.ready.load(Ordering::Acquire) == self.taken {
            return None;
        }
        self.taken += 1;
        Some(self.taken - 1)
    }

    /// How many slabs have been handed over so far. The service thread publishes this as `slabs_allocated`.
    #[must_use]
    pub fn taken(&self) -> u32 {
        self.taken
    }

    /// Whether there is no memory for the rest of the arena at the moment. One relaxed load.
    #[inline]
    #[must_use]
    pub fn is_stalled(&self) -> bool {
        self.shared.stalled.load(Ordering::Relaxed)
    }

    /// A view of the allocation for somebody who watches it.
    #[must_use]
    pub fn progress(&self) -> Progress {
        Progress { shared: self.shared.clone(), geometry: self.geometry }
    }

    /// Ends the thread, within a few milliseconds, and waits for its end.
    pub fn stop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // If the thread panicked, the panic hook has reported it (and a release build has ended).
            let _ = thread.join();
        }
    }
}

impl Drop for Allocator {
    fn drop(&mut self) {
        self.stop();
    }
}

struct Worker<F, P> {
    shared: Arc<Shared>,
    geometry: Geometry,
    lobby: Lobby,
    /// How many slabs an earlier engine has allocated.
    inherited: u32,
    allocate: F,
    populate: P,
}

impl<F, P> Worker<F, P>
where
    F: Fn(u64, u64) -> Result<(), PieceError>,
    P: Fn(u64, u64) -> Result<(), SegmentError>,
{
    fn run(self) {
        // Other threads handle signals: one that arrived here during `fallocate` would undo the call.
        if let Err(errno) = nix::sys::signal::SigSet::all().thread_block() {
            tracing::debug!(%errno, "the allocator cannot block signals");
        }
        // On Linux this is the niceness of this thread alone. If it is refused, the thread runs at the usual one.
        if let Err(errno) = rustix::process::nice(NICE) {
            tracing::debug!(%errno, "the allocator runs at normal priority");
        }
        let began = Instant::now();
        if self.inherited == 0 {
            // The first slab is in use already: the engine did not wait for its pages to be cleared.
            self.clear_slab(0);
        }
        for slab in u64::from(self.inherited.max(1))..self.geometry.slab_count() as u64 {
            if !self.allocate_slab(slab * self.geometry.slab_bytes) {
                return;
            }
            // SYNC POINT: Release; pairs with the Acquire in `Allocator::take`.
            self.shared.ready.store(slab as u32 + 1, Ordering::Release);
            // The order is: the store above, a fence in `notify`, a look for a sleeper. See `park`.
            park::notify(self.lobby.doorbell());
        }
        self.shared.set(State::Complete);
        let seconds = began.elapsed().as_secs_f64();
        tracing::info!(bytes = self.geometry.arena_bytes, seconds, "the whole arena is allocated");
    }

    /// False: there is nothing more to do, because the thread is stopped or the allocation has failed for good.
    fn allocate_slab(&self, start: u64) -> bool {
        let mut at = start;
        while at < start + self.geometry.slab_bytes {
            let piece = PIECE_BYTES.min(start + self.geometry.slab_bytes - at);
            let began = Instant::now();
            let result = (self.allocate)(at, piece);
            match result {
                Ok(()) => {
                    self.clear(at, piece);
                    at += piece;
                    self.recovered();
                    // Half of the time is left to others: zeroing pages takes memory bandwidth away from copies.
                    self.rest(began.elapsed());
                }
                Err(error @ (PieceError::NoRoom(_) | PieceError::Segment(SegmentError::NoSpace { .. }))) => {
                    self.waits(&error);
                    self.rest(RETRY);
                }
                Err(PieceError::Segment(error)) => {
                    tracing::error!(%error, "the rest of the arena is not allocated");
                    self.shared.set(State::Failed(error.to_string()));
                    return false;
                }
            }
            if self.shared.stop.load(Ordering::Relaxed) {
                return false;
            }
        }
        true
    }

    fn clear_slab(&self, start: u64) {
        let mut at = start;
        while at < start + self.geometry.slab_bytes && !self.shared.stop.load(Ordering::Relaxed) {
            let piece = PIECE_BYTES.min(start + self.geometry.slab_bytes - at);
            let began = Instant::now();
            self.clear(at, piece);
            self.rest(began.elapsed());
            at += piece;
        }
    }

    /// Lets the kernel clear the pages now and not during a client's first store.
    fn clear(&self, offset: u64, bytes: u64) {
        if let Err(error) = (self.populate)(offset, bytes) {
            tracing::debug!(%error, "first stores into fresh memory will be slower");
        }
    }

    /// Enters the state `Waiting`. Logs it once each time that a shortage begins.
    fn waits(&self, error: &PieceError) {
        if !self.shared.stalled.load(Ordering::Relaxed) {
            let slabs = self.shared.ready.load(Ordering::Relaxed);
            tracing::warn!(%error, slabs, "serving goes on with the slabs that are there; trying again every second");
        }
        self.shared.set(State::Waiting(error.to_string()));
    }

    fn recovered(&self) {
        if self.shared.stalled.load(Ordering::Relaxed) {
            tracing::info!("there is room again: the allocation of the arena goes on");
            self.shared.set(State::Running);
        }
    }

    fn rest(&self, time: Duration) {
        let until = Instant::now() + time;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || self.shared.stop.load(Ordering::Relaxed) {
                return;
            }
            thread::park_timeout(left);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvring_shm_abi::futex::{self, Deadline, Woken};
    use kvring_shm_abi::lobby::LOBBY_BYTES;
    use kvring_shm_abi::mapping::Mapping;
    use kvring_shm_abi::segment::{self, EngineName};
    use std::os::unix::fs::MetadataExt;
    use std::sync::mpsc;

    fn lobby() -> Lobby {
        Lobby::new(Arc::new(Mapping::private(LOBBY_BYTES))).unwrap()
    }

    fn geometry(slabs: u64) -> Geometry {
        Geometry::new(slabs << 20, 1 << 20).unwrap()
    }

    fn started(
        geometry: Geometry,
        lobby: Lobby,
        allocate: impl Fn(u64, u64) -> Result<(), PieceError> + Send + 'static,
    ) -> Result<Allocator, AllocatorError> {
        Allocator::start_with(geometry, lobby, 0, allocate, |_, _| Ok(()))
    }

    fn no_space() -> PieceError {
        SegmentError::NoSpace { name: "arena".to_owned(), bytes: 1, available: 0 }.into()
    }

    fn wait_for(what: impl Fn() -> bool) {
        while !what() {
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn slabs_come_in_order_the_first_at_once_and_are_backed_by_memory() {
        let name = EngineName::new(&format!("t-alloc-{}", std::process::id())).unwrap().arena();
        let file = Arc::new(SegmentFile::create(&name, 9 << 20).unwrap());
        let lobby = lobby();
        let mut allocator = Allocator::start(file, geometry(9), lobby.clone(), 0).unwrap();
        assert_eq!(allocator.take(), Some(0), "the first slab is there before serving begins");
        let progress = allocator.progress();
        // A parked service loop is woken for each slab.
        for expected in 1..9 {
            while !allocator.has_news() {
                let ticket = park::announce(lobby.doorbell());
                if !allocator.has_news() {
                    let woken = futex::wait_any(&[ticket.word(lobby.doorbell())], Deadline::NEVER);
                    assert_eq!(woken, Woken::LookAgain, "nobody rang");
                }
                park::retract(lobby.doorbell(), ticket);
            }
            assert_eq!(allocator.take(), Some(expected));
        }
        wait_for(|| progress.is_over());
        assert_eq!((allocator.take(), allocator.taken(), progress.state()), (None, 9, State::Complete));
        assert_eq!(progress.bytes_ready(), progress.bytes_total());
        allocator.stop();
        let path = std::path::Path::new(segment::SHM_DIR).join(name.trim_start_matches('/'));
        let blocks = std::fs::metadata(path).unwrap().blocks();
        segment::unlink(&name);
        assert_eq!(blocks * 512, 9 << 20, "holes");
    }

    #[test]
    fn what_an_earlier_engine_has_allocated_is_there_at_once_and_the_rest_follows() {
        let (tell, told) = mpsc::channel();
        let allocate = move |offset: u64, _| tell.send(offset >> 20).map_err(|_| no_space());
        let mut allocator = Allocator::start_with(geometry(4), lobby(), 3, allocate, |_, _| Ok(())).unwrap();
        assert_eq!([allocator.take(), allocator.take(), allocator.take()], [Some(0), Some(1), Some(2)]);
        wait_for(|| allocator.progress().is_over());
        assert_eq!((allocator.take(), allocator.take()), (Some(3), None));
        assert_eq!(told.try_iter().collect::<Vec<_>>(), [3], "and nothing is allocated twice");
    }

    #[test]
    fn a_full_file_system_is_waited_for_and_serving_goes_on() {
        let (give, have) = mpsc::channel::<()>();
        let have = Mutex::new(have);
        let mut allocator = started(geometry(3), lobby(), move |offset, _| {
            let free = offset < 2 << 20 || have.lock().unwrap().try_recv().is_ok();
            if free { Ok(()) } else { Err(no_space()) }
        })
        .unwrap();
        let progress = allocator.progress();
        wait_for(|| allocator.is_stalled());
        assert!(matches!(progress.state(), State::Waiting(text) if text.contains("expected room")));
        assert_eq!((allocator.take(), allocator.take(), allocator.take()), (Some(0), Some(1), None));
        give.send(()).unwrap();
        wait_for(|| progress.is_over());
        assert_eq!(allocator.take(), Some(2));
        assert!(!allocator.is_stalled());
    }

    #[test]
    fn it_stops_also_while_it_waits() {
        let mut allocator =
            started(geometry(3), lobby(), |offset, _| if offset == 0 { Ok(()) } else { Err(no_space()) })
                .unwrap();
        wait_for(|| allocator.is_stalled());
        allocator.stop();
        assert_eq!(allocator.progress().slabs_ready(), 1);
    }

    #[test]
    fn other_errors_end_it_and_no_first_slab_is_an_error() {
        let os = || {
            let (name, errno) = ("arena".to_owned(), nix::errno::Errno::EOPNOTSUPP);
            PieceError::Segment(SegmentError::Os { name, what: "fallocate", errno })
        };
        let refused = started(geometry(2), lobby(), move |_, _| Err(no_space()));
        let error = refused.err().unwrap();
        assert!(matches!(
            error,
            AllocatorError::FirstSlab(PieceError::Segment(SegmentError::NoSpace { .. }))
        ));
        let allocator =
            started(geometry(2), lobby(), move |offset, _| if offset == 0 { Ok(()) } else { Err(os()) })
                .unwrap();
        wait_for(|| allocator.progress().is_over());
        assert!(matches!(allocator.progress().state(), State::Failed(_)));
        assert!(allocator.is_stalled());
    }
}
