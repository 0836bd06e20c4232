//! The arena, registered with the driver: only then do copies from and to it run by DMA, at the speed of the link.
//!
//! Registering takes some 0.1 s for each GB and holds locks that all of the driver's users share. So it is done in the
//! background, in parts of 1 GiB, with pauses, and by one process at a time (a lock on a file that all of them know). Until a
//! part is registered, and where it cannot be (a limit of locked memory), copies go through the driver's own buffers: slower,
//! and otherwise the same.
//!
//! The driver refuses a copy across the border of two registrations. No slab crosses a multiple of 1 GiB, so no shard crosses a
//! border; [`Arena::pieces`] cuts there all the same.

use super::device::Context;
use super::error::GpuError;
use super::objects::HostBuffer;
use crate::backend::{ArenaMapping, MappedArena};
use crate::sync::Word;
use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// `CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP`.
const FLAGS: u32 = 1 | 2;
const PAGE: usize = 4096;
/// No arena is longer, so sums of offsets and parts do not overflow.
const PART_MAX: usize = 1 << 47;
/// How often a registering thread looks whether the engine has allocated more, and whether the lock is free.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// The longest pause between two parts.
const PAUSE_MAX: Duration = Duration::from_millis(50);

/// How long a registering thread waits for the lock. The lock is a courtesy: a process that stands still while it holds the lock,
/// or has left it to a forked child, delays the others by no more than this.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

const PENDING: u32 = 0;
const REGISTERED: u32 = 1;

/// A part of the arena.
struct Part {
    /// [`PENDING`] or [`REGISTERED`].
    state: Word,
    /// The device's address of its first byte, once it is registered.
    alias: std::sync::OnceLock<u64>,
}

/// What the registering thread shares with those that copy.
struct Shared {
    context: Arc<Context>,
    mapping: ArenaMapping,
    part_bytes: usize,
    parts: Vec<Part>,
    /// Changes when the thread is to end.
    ended: Word,
}

/// An arena that is registered part by part. When it is dropped, it is unregistered in the background.
pub(super) struct Arena {
    shared: Arc<Shared>,
}

impl MappedArena for Arena {
    fn registered_bytes(&self) -> u64 {
        let Shared { mapping, part_bytes, parts, .. } = &*self.shared;
        let lengths = parts.iter().enumerate().filter(|(_, part)| part.state.get() == REGISTERED);
        lengths.map(|(index, _)| (mapping.bytes - index * part_bytes).min(*part_bytes) as u64).sum()
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        self.shared.ended.bump_and_wake();
    }
}

/// A contiguous piece of an arena that lies in one part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) host: *mut u8,
    pub(super) bytes: usize,
    /// Is it registered?
    pub(super) registered: bool,
}

impl Arena {
    /// Pinned memory in the form of an arena.
    pub(super) fn pinned(context: &Arc<Context>, buffer: &Arc<HostBuffer>) -> Arc<Arena> {
        let bytes = buffer.bytes();
        let mapping = ArenaMapping {
            base: buffer.host(),
            bytes,
            allocated: Arc::new(move || bytes as u64),
            lock: None,
            keep: buffer.clone(),
        };
        let part = Part { state: Word::new(REGISTERED), alias: std::sync::OnceLock::from(buffer.alias()) };
        let (part_bytes, parts, ended) = (bytes.max(1), vec![part], Word::default());
        Arc::new(Arena {
            shared: Arc::new(Shared { context: context.clone(), mapping, part_bytes, parts, ended }),
        })
    }

    /// Is this range of addresses in it?
    pub(super) fn holds(&self, host: *mut u8, bytes: usize) -> bool {
        let from = (host as usize).checked_sub(self.shared.mapping.base as usize);
        from.and_then(|from| from.checked_add(bytes)).is_some_and(|end| end <= self.shared.mapping.bytes)
    }

    /// The pieces of a range that it holds.
    pub(super) fn pieces(&self, host: *mut u8, bytes: usize) -> impl Iterator<Item = Piece> + use<'_> {
        let Shared { mapping, part_bytes, parts, .. } = &*self.shared;
        let mut at = host as usize - mapping.base as usize;
        let end = at + bytes;
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let part = at / part_bytes;
            let until = ((part + 1) * part_bytes).min(end);
            let registered = parts.get(part).is_some_and(|part| part.state.get() == REGISTERED);
            let piece = Piece { host: mapping.base.wrapping_add(at), bytes: until - at, registered };
            at = until;
            Some(piece)
        })
    }

    /// The device's address of a range that lies in one registered part.
    pub(super) fn alias(&self, host: *mut u8, bytes: usize) -> Option<u64> {
        let Shared { mapping, part_bytes, parts, .. } = &*self.shared;
        let at = host as usize - mapping.base as usize;
        let part = at / part_bytes;
        if at + bytes > (part + 1) * part_bytes {
            return None;
        }
        let part_at = part * part_bytes;
        let part = parts.get(part).filter(|part| part.state.get() == REGISTERED)?;
        part.alias.get().map(|alias| alias + (at - part_at) as u64)
    }
}

/// The arenas of a backend, and the threads that register them.
pub(super) struct Arenas {
    context: Arc<Context>,
    part_bytes: usize,
    known: Mutex<Vec<Known>>,
}

/// An arena that somebody may still hold, or that may not have been unregistered yet.
struct Known {
    arena: Weak<Arena>,
    /// Has no owner any more when the arena has been unregistered.
    shared: Weak<Shared>,
    /// Its addresses.
    from: usize,
    until: usize,
    /// `None` if no thread could be started.
    thread: Option<JoinHandle<()>>,
}

impl Known {
    /// Is nothing left of it, neither an arena nor registrations?
    fn is_over(&self) -> bool {
        self.arena.strong_count() == 0 && self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Arenas {
    pub(super) fn new(context: &Arc<Context>, part_bytes: usize) -> Arenas {
        // A multiple of the page's size, or two parts would share a page.
        let part_bytes = part_bytes.clamp(PAGE, PART_MAX) / PAGE * PAGE;
        Arenas { context: context.clone(), part_bytes, known: Mutex::default() }
    }

    fn known(&self) -> MutexGuard<'_, Vec<Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to register a mapping. If somebody, such as a copy, still holds an arena with these addresses, it is that one.
    /// If one that overlaps has been dropped, this waits until it has been unregistered: memory cannot be registered twice, and
    /// no copy may begin under a registration that is about to be undone.
    pub(super) fn map(&self, mapping: ArenaMapping) -> Arc<Arena> {
        let (from, until) = (mapping.base as usize, mapping.base as usize + mapping.bytes);
        if !self.context.is_ours() {
            // The arenas that are known, and their threads, are those of the parent of this forked child.
            return self.register(mapping, from, until, Vec::new());
        }
        let mut known = self.known();
        known.retain(|known| !known.is_over());
        let same = known.iter().filter(|known| (known.from, known.until) == (from, until));
        if let Some(arena) = same.filter_map(|known| known.arena.upgrade()).next() {
            return arena;
        }
        let is_gone = |known: &Known| known.arena.strong_count() == 0;
        let is_here = |known: &Known| known.from < until && from < known.until;
        let here: Vec<Known> = known.extract_if(.., |known| is_gone(known) && is_here(known)).collect();
        let going = known.iter().filter(|known| is_gone(known)).map(|known| known.shared.clone()).collect();
        drop(known);
        // Without the lock, so that copies elsewhere go on.
        join(here);
        self.register(mapping, from, until, going)
    }

    /// Registers once `going` have been unregistered, which have been dropped: the limit of locked memory may be enough for one
    /// arena only.
    fn register(
        &self,
        mapping: ArenaMapping,
        from: usize,
        until: usize,
        going: Vec<Weak<Shared>>,
    ) -> Arc<Arena> {
        let count = mapping.bytes.div_ceil(self.part_bytes);
        let part = |_| Part { state: Word::new(PENDING), alias: std::sync::OnceLock::new() };
        let shared = Arc::new(Shared {
            context: self.context.clone(),
            mapping,
            part_bytes: self.part_bytes,
            parts: (0..count).map(part).collect(),
            ended: Word::default(),
        });
        let (arena, weak) = (Arc::new(Arena { shared: shared.clone() }), Arc::downgrade(&shared));
        let work = move || {
            let registered = shared.register(&going);
            while shared.ended.get() == 0 {
                shared.ended.wait(0);
            }
            shared.unregister(registered);
        };
        let thread = std::thread::Builder::new().name("kvring-register".into()).spawn(work);
        let thread = thread.inspect_err(|error| {
            tracing::warn!(%error, "the arena is not registered with the GPU, for want of a thread: copies are slower");
        });
        let (of, shared, thread) = (Arc::downgrade(&arena), weak, thread.ok());
        self.known().push(Known { arena: of, shared, from, until, thread });
        arena
    }

    /// The arena that holds this range.
    pub(super) fn holding(&self, host: *mut u8, bytes: usize) -> Option<Arc<Arena>> {
        let known = self.known();
        known.iter().rev().filter_map(|known| known.arena.upgrade()).find(|arena| arena.holds(host, bytes))
    }
}

impl Drop for Arenas {
    fn drop(&mut self) {
        if !self.context.is_ours() {
            return;
        }
        let known = core::mem::take(&mut *self.known());
        for arena in known.iter().filter_map(|known| known.arena.upgrade()) {
            arena.shared.ended.bump_and_wake();
        }
        join(known);
    }
}

/// Waits until these arenas have been unregistered. Nobody holds them.
fn join(gone: Vec<Known>) {
    for thread in gone.into_iter().filter_map(|known| known.thread) {
        // A thread that panicked has said so.
        let _ = thread.join();
    }
}

impl Shared {
    /// Registers part after part, once the others have been unregistered. Returns how many parts it has registered.
    fn register(&self, others: &[Weak<Shared>]) -> usize {
        while others.iter().any(|other| other.strong_count() > 0) {
            if self.pause(LOOK_EVERY) {
                return 0;
            }
        }
        let began = Instant::now();
        let mut lock = self.mapping.lock.as_ref().and_then(|path| match File::open(path) {
            Ok(file) => Some(file),
            Err(error) => {
                tracing::debug!(path = %path.display(), %error, "registering without a lock");
                None
            }
        });
        for index in 0..self.parts.len() {
            let end = ((index + 1) * self.part_bytes).min(self.mapping.bytes);
            // Registering touches every page, so this waits until the engine has allocated memory for the part.
            while (self.mapping.allocated)() < end as u64 {
                if self.pause(LOOK_EVERY) {
                    return index;
                }
            }
            let Some(locked) = self.lock(lock.as_ref()) else { return index };
            let started = Instant::now();
            let outcome = self.register_part(index, end);
            let is_alone = locked.0.is_none();
            drop(locked);
            if is_alone {
                // The lock could not be had in time, so this thread does not wait for it again.
                lock = None;
            }
            if let Err(error) = outcome {
                let (registered, of) = (index * self.part_bytes, self.mapping.bytes);
                let hint = if error.is_out_of_memory() {
                    " (raise `ulimit -l`, docker: --ulimit memlock=-1)"
                } else {
                    ""
                };
                tracing::warn!(
                    %error, registered_bytes = registered, of_bytes = of,
                    "the arena cannot be registered with the GPU{hint}: copies from and to the rest of it are slower"
                );
                return index;
            }
            if self.pause(started.elapsed().min(PAUSE_MAX)) {
                return index + 1;
            }
        }
        let (bytes, seconds) = (self.mapping.bytes, began.elapsed().as_secs_f64());
        tracing::info!(bytes, seconds, "arena registered with the GPU");
        self.parts.len()
    }

    fn register_part(&self, index: usize, end: usize) -> Result<(), GpuError> {
        let at = index * self.part_bytes;
        let host = self.mapping.base.wrapping_add(at);
        let api = self.context.api;
        let _entered = self.context.enter()?;
        // SAFETY: the range is mapped and allocated, as `map_arena` was told; it is unregistered before the mapping is dropped.
        unsafe { api.cuMemHostRegister_v2(host.cast(), end - at, FLAGS) }?;
        let mut alias = host as u64;
        if !self.context.host_pointers {
            // SAFETY: writes one address; registered above.
            let found = unsafe { api.cuMemHostGetDevicePointer_v2(&raw mut alias, host.cast(), 0) };
            if let Err(error) = found {
                // SAFETY: registered above, and used by nobody yet.
                let _ = unsafe { api.cuMemHostUnregister(host.cast()) };
                return Err(error);
            }
        }
        let part = &self.parts[index];
        // It is set once, because each part is registered once.
        let _ = part.alias.set(alias);
        part.state.bump_and_wake();
        Ok(())
    }

    fn unregister(&self, registered: usize) {
        let Ok(_entered) = self.context.enter() else { return };
        for index in 0..registered {
            let host = self.mapping.base.wrapping_add(index * self.part_bytes);
            // SAFETY: registered by this thread. Transfers hold the arena, so none is left.
            let gone = unsafe { self.context.api.cuMemHostUnregister(host.cast()) };
            if let Err(error) = gone {
                tracing::debug!(%error, "cannot unregister a part of the arena");
            }
        }
    }

    /// Waits for the lock, and goes on without it after [`LOCK_PATIENCE`]. `None` if the thread is to end.
    fn lock<'a>(&self, file: Option<&'a File>) -> Option<Locked<'a>> {
        let Some(file) = file else { return Some(Locked(None)) };
        let until = Instant::now() + LOCK_PATIENCE;
        loop {
            match file.try_lock() {
                Ok(()) => return Some(Locked(Some(file))),
                Err(std::fs::TryLockError::WouldBlock) if Instant::now() < until => {}
                Err(std::fs::TryLockError::WouldBlock) => return Some(Locked(None)),
                // The lock is only a courtesy.
                Err(std::fs::TryLockError::Error(_)) => return Some(Locked(None)),
            }
            if self.pause(LOOK_EVERY) {
                return None;
            }
        }
    }

    /// Sleeps; true if the thread is to end.
    fn pause(&self, time: Duration) -> bool {
        if self.ended.get() == 0 {
            std::thread::sleep(time);
        }
        self.ended.get() != 0
    }
}

/// The lock is held, if there is a file in this.
struct Locked<'a>(Option<&'a File>);

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        if let Some(file) = self.0 {
            // The lock ends with the descriptor at the latest.
            let _ = file.unlock();
        }
    }
}
