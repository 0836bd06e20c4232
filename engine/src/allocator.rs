//! Allocates the arena behind the engine's back: the first slab before serving starts, the rest from a thread of its
//! own, in order, while clients are already being served.
//!
//! Slabs are finished in order, so what has been handed over is one number, and "is there news?" is one relaxed load.
//! Before each piece it looks whether there is room for it beside what is kept for others (`preflight`): what was free when the
//! engine started may be somebody else's by now, and the kernel would kill a neighbour for ours.
//! No room is no failure: what is there is served, `status` shows the rest as missing, and the thread goes
//! on trying. After a restart that is the normal case: clients that still map the old arena let go of it soon.

use crate::preflight::{self, NoRoom, Room};
use kvring_shm_abi::lobby::Lobby;
use kvring_shm_abi::park;
use kvring_shm_abi::segment::{SegmentError, SegmentFile};
use kvring_shm_abi::superblock::Geometry;
use kvring_shm_abi::sync::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Bytes per system call: about a millisecond. Between two of them the thread rests, and looks whether to stop.
const PIECE_BYTES: u64 = 4 << 20;
/// How soon a full file system is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// The thread's niceness: a reservation that waits for a slab is cheaper than a service thread that waits for a core.
const NICE: i32 = 10;

/// Why a piece was not allocated.
#[derive(Debug, thiserror::Error)]
pub enum PieceError {
    /// There is no room for it, beside what is kept for others.
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
    /// The system refused it.
    #[error(transparent)]
    Segment(#[from] SegmentError),
}

/// Why the allocator could not begin.
#[derive(Debug, thiserror::Error)]
pub enum AllocatorError {
    /// The first slab.
    #[error("the arena's first slab: {0}")]
    FirstSlab(PieceError),
    /// Its thread.
    #[error("the allocator's thread: {0}")]
    Thread(std::io::Error),
}

/// How the allocation stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// At it.
    Running,
    /// No room at the moment; it is tried again every second. What was said.
    Waiting(String),
    /// It cannot go on. What was said.
    Failed(String),
    /// The whole arena is allocated.
    Complete,
}

struct Shared {
    /// Slabs allocated, from the first one on.
    ready: AtomicU32,
    stop: AtomicBool,
    /// True in `Waiting` and `Failed`: for a look without the lock.
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

/// The allocation as anybody may watch it: a progress bar, a log.
#[derive(Clone)]
pub struct Progress {
    shared: Arc<Shared>,
    geometry: Geometry,
}

impl Progress {
    /// Slabs allocated so far.
    #[must_use]
    pub fn slabs_ready(&self) -> u32 {
        self.shared.ready.load(Ordering::Relaxed)
    }

    /// Bytes allocated so far.
    #[must_use]
    pub fn bytes_ready(&self) -> u64 {
        u64::from(self.slabs_ready()) * self.geometry.slab_bytes
    }

    /// Bytes of the whole arena.
    #[must_use]
    pub fn bytes_total(&self) -> u64 {
        self.geometry.arena_bytes
    }

    /// How it stands.
    #[must_use]
    pub fn state(&self) -> State {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Will the number of slabs not grow any more?
    #[must_use]
    pub fn is_over(&self) -> bool {
        matches!(self.state(), State::Complete | State::Failed(_))
    }
}

/// The service loop's end: takes finished slabs. Dropping it stops the thread.
pub struct Allocator {
    shared: Arc<Shared>,
    geometry: Geometry,
    /// Slabs handed over.
    taken: u32,
    thread: Option<JoinHandle<()>>,
}

impl Allocator {
    /// Allocates the first slab, then leaves the rest to a thread that rings the lobby's doorbell for each slab. The first
    /// `ready` slabs have been allocated by an earlier engine.
    ///
    /// # Errors
    /// No room for the first slab, or no thread.
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

    /// With what allocates `(offset, bytes)`, and then clears their pages: the arena, or a test.
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
        let worker = Worker { shared: shared.clone(), geometry, lobby, inherited: ready, allocate, populate };
        let thread = thread::Builder::new()
            .name("kvring-alloc".to_owned())
            .spawn(move || worker.run())
            .map_err(AllocatorError::Thread)?;
        Ok(Allocator { shared, geometry, taken: 0, thread: Some(thread) })
    }

    /// Is there a slab to take? One relaxed load.
    #[inline]
    #[must_use]
    pub fn has_news(&self) -> bool {
        self.shared.ready.load(Ordering::Relaxed) != self.taken
    }

    /// The next finished slab, in order.
    #[inline]
    pub fn take(&mut self) -> Option<u32> {
        // SYNC POINT: Acquire; pairs with the Release in `Worker::run`. What the kernel did for that thread has happened
        // before whoever hears of the slab touches it.
        if self.shared.ready.load(Ordering::Acquire) == self.taken {
            return None;
        }
        self.taken += 1;
        Some(self.taken - 1)
    }

    /// Slabs handed over so far: what the service thread publishes as `slabs_allocated`.
    #[must_use]
    pub fn taken(&self) -> u32 {
        self.taken
    }

    /// Is the rest of the arena without memory at the moment? One relaxed load.
    #[inline]
    #[must_use]
    pub fn is_stalled(&self) -> bool {
        self.shared.stalled.load(Ordering::Relaxed)
    }

    /// For whoever watches.
    #[must_use]
    pub fn progress(&self) -> Progress {
        Progress { shared: self.shared.clone(), geometry: self.geometry }
    }

    /// Ends the thread, within a few milliseconds, and waits for its end.
    pub fn stop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // A panic of its has been reported by the panic hook (and ends a release build).
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
    /// Slabs that an earlier engine has allocated.
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
        // Signals belong to other threads: one that arrives during `fallocate` undoes the call.
        if let Err(errno) = nix::sys::signal::SigSet::all().thread_block() {
            tracing::debug!(%errno, "the allocator cannot block signals");
        }
        // On Linux this is the thread's own niceness. Where it is refused, it runs at the usual one.
        if let Err(errno) = rustix::process::nice(NICE) {
            tracing::debug!(%errno, "the allocator runs at normal priority");
        }
        let began = Instant::now();
        if self.inherited == 0 {
            // The first slab is in use already: serving did not wait for its pages to be cleared.
            self.clear_slab(0);
        }
        for slab in u64::from(self.inherited.max(1))..self.geometry.slab_count() as u64 {
            if !self.allocate_slab(slab * self.geometry.slab_bytes) {
                return;
            }
            // SYNC POINT: Release; pairs with the Acquire in `Allocator::take`.
            self.shared.ready.store(slab as u32 + 1, Ordering::Release);
            // The store above, a fence inside, then a look for a sleeper: see `park`.
            park::notify(self.lobby.doorbell());
        }
        self.shared.set(State::Complete);
        let seconds = began.elapsed().as_secs_f64();
        tracing::info!(bytes = self.geometry.arena_bytes, seconds, "the whole arena is allocated");
    }

    /// False when there is nothing more to do: stopped, or failed for good.
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
                    // Half of the time for the others: zeroing pages takes memory bandwidth from whoever copies.
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

    /// Has the kernel clear pages now rather than under somebody's first store.
    fn clear(&self, offset: u64, bytes: u64) {
        if let Err(error) = (self.populate)(offset, bytes) {
            tracing::debug!(%error, "first stores into fresh memory will be slower");
        }
    }

    /// Told once for each time that it begins.
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
        // A parked loop is woken for each slab.
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
