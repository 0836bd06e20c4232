//! An engine, from a configuration to its end.

use crate::allocator::{Allocator, AllocatorError, Progress};
use crate::cache::{self, Cache, CacheConfig, NotRestorable};
use crate::config::{self, EngineConfig};
use crate::preflight::Room;
use crate::process;
use crate::recovery::{self, Inherited, NotRecoverable};
use crate::segments::{self, ColdStart, Segments, Setup, SetupError, Start};
use crate::service::{Pace, Parts, Placing, Registry, Service, SharedSlots};
use crate::stop::StopHandle;
use kvring_shm_abi::failpoint::{self, Place};
use kvring_shm_abi::message::KEYS_MAX;
use kvring_shm_abi::superblock::{Geometry, random_u64};
use kvring_shm_abi::sync::Ordering;
use std::sync::mpsc;
use std::thread::JoinHandle;

/// Why an engine did not start. Nothing of it is left behind.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration is refused.
    #[error(transparent)]
    Config(#[from] config::ConfigError),
    /// Its segments cannot be made: another engine runs, there is no room, or a name is not ours. Or the start was asked
    /// to stop.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// The arena's memory cannot be allocated.
    #[error(transparent)]
    Allocator(#[from] AllocatorError),
    /// A limit of the cache is out of range, or there is no memory for its tables.
    #[error(transparent)]
    Cache(#[from] cache::ConfigError),
    /// What an earlier engine left cannot be read now. It is left as it is.
    #[error("{0}; the earlier engine's cache is kept, `--cold` gives it up")]
    Recovery(String),
    /// A slab that an earlier engine had allocated cannot be added.
    #[error(transparent)]
    Slab(#[from] cache::AddSlabError),
    /// The system gave no random numbers, or no thread.
    #[error("{what}: {error}")]
    System {
        /// What was asked for.
        what: &'static str,
        /// The system's error.
        error: std::io::Error,
    },
}

/// An engine that is ready to serve. It belongs to the thread that made it, the service thread: for every client,
/// the death of that thread *is* the engine's death.
pub struct Engine {
    service: Service,
    progress: Progress,
    /// Whether a clean end leaves everything for a successor.
    keep: bool,
}

/// The result of an attempt to start.
enum Opened {
    Engine(Box<Engine>),
    /// The predecessor's cache cannot be taken over after all.
    NotRecoverable(NotRecoverable),
}

/// Ends a start that has failed. New segments are removed; a predecessor's are left as they were.
fn give_up(segments: Segments) {
    if *segments.start() == Start::Warm {
        // Nothing is known to be wrong with the predecessor's segments, so this does not count as a failed
        // recovery: the next start tries again, however often this happens.
        let recoveries = &segments.engine.info().recoveries;
        recoveries.store(recoveries.load(Ordering::Relaxed).saturating_sub(1), Ordering::Relaxed);
        return segments.leave();
    }
    if let Err(left) = segments.retire_and_unlink() {
        tracing::error!(error = %left, "a failed start leaves something behind");
    }
}

impl Engine {
    /// Claims the name, makes or takes over the segments, and allocates the first slab. The calling thread becomes
    /// the service thread. `stop` ends the start, and later the engine.
    pub fn create(config: &EngineConfig, stop: &StopHandle) -> Result<Engine, StartError> {
        if !config.core_dumps {
            process::disable_core_dumps();
        }
        let name = config.engine_name().map_err(config::ConfigError::from)?;
        let random = || random_u64().map_err(|error| StartError::System { what: "randomness", error });
        let seed = [random()?, random()?];
        let geometry = config.geometry(&Room::for_engine(&name))?;
        let mut setup = Setup {
            name: &name,
            geometry,
            any_geometry: config.any_arena
                || (config.arena.is_none() && config.slab.is_none() && config.max_chunks.is_none()),
            beat_interval_us: config.beat_interval_ms.saturating_mul(1000),
            policy: config.policy.name(),
            wait: config.start_wait(),
            cold: config.cold.then_some(ColdStart::Asked),
            stop: stop.clone(),
        };
        loop {
            match Engine::open(config, seed, &setup)? {
                Opened::Engine(engine) => return Ok(*engine),
                Opened::NotRecoverable(why) => {
                    tracing::error!(name = %name, %why, "nothing of the earlier engine's can be kept");
                    setup.cold = Some(ColdStart::Nonsense(why.to_string()));
                }
            }
        }
    }

    /// In this order: claims the name and checks everything for which the start can be refused; then takes over a
    /// predecessor's segments, or sweeps them.
    fn open(config: &EngineConfig, seed: [u64; 2], setup: &Setup<'_>) -> Result<Opened, StartError> {
        let claim = segments::Claim::new(setup)?;
        limits(config, seed, &claim.geometry()).check()?;
        let segments = claim.take()?;
        // The geometry may be another one by now: another start may have taken the name that was swept, and have
        // died.
        let limits = limits(config, seed, &segments.geometry());
        let made = Furniture::new(config, limits, &segments);
        let Furniture { mut cache, mut allocator, pace } = match made {
            Ok(furniture) => furniture,
            Err(error) => {
                give_up(segments);
                return Err(error);
            }
        };
        let mut registry = Registry::new(segments.geometry());
        let (mut inherited, mut placing) = (Inherited::nobody(), Placing::Over);
        if *segments.start() == Start::Warm {
            // Not one slab more: slabs that the allocator has finished since then are left to the service, which
            // publishes them when it takes them.
            let allocated = segments.engine.info().slabs_allocated.load(Ordering::Relaxed);
            for slab in (0..allocated).map_while(|_| allocator.take()) {
                cache.add_slab(slab)?;
            }
            match recovery::recover(&segments, &mut cache, &mut registry) {
                Ok(recovered) => (inherited, placing) = recovered,
                Err(NotRecoverable::Tables(why @ NotRestorable::Memory { .. })) => {
                    give_up(segments);
                    return Err(StartError::Recovery(why.to_string()));
                }
                Err(why) => return Ok(Opened::NotRecoverable(why)),
            }
        }
        if setup.stop.is_requested() {
            give_up(segments);
            return Err(SetupError::Stopped.into());
        }
        let progress = allocator.progress();
        let keep = config.keep;
        let stop = setup.stop.clone();
        let parts = Parts { segments, cache, registry, allocator, inherited, placing, pace, stop };
        Ok(Opened::Engine(Box::new(Engine { service: Service::new(parts), progress, keep })))
    }

    /// From now on a panic of this process means that the engine's tables cannot be trusted, and the next start is
    /// a cold one. Otherwise tables that make an engine panic would be taken over again and again. For a process
    /// that is an engine and nothing else.
    pub fn doubt_after_a_panic(&self) {
        let segment = self.service.segment();
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            segment.info().unhealthy.store(1, Ordering::Relaxed);
            before(panic);
        }));
    }

    /// How the allocation of the arena stands, for a progress bar.
    #[must_use]
    pub fn progress(&self) -> Progress {
        self.progress.clone()
    }

    /// Serves until it is stopped; calls `ready` once, when clients can attach. Then it retires everything, wakes
    /// sleepers and removes the names; or, with `keep`, leaves everything for a successor.
    pub fn run(self, ready: impl FnOnce()) {
        let segments = self.service.run(ready);
        if self.keep && !segments.is_retired() && segments.lost_name().is_none() {
            tracing::info!(name = %segments.name(), "stopped; what it held is kept for the next engine of this name");
            // This comes before our life words are given up: a client that sees those also sees that this is no
            // death.
            segments.engine.info().stopped.store(1, Ordering::Relaxed);
            return segments.leave();
        }
        match segments.retire_and_unlink() {
            Ok(removed) => {
                tracing::info!(
                    segments = removed.segments,
                    bytes = removed.bytes,
                    "stopped; its memory is given back"
                );
            }
            Err(error) => tracing::error!(%error, "stopped, but something is left behind"),
        }
    }
}

/// What a service needs besides its segments.
struct Furniture {
    cache: Cache<SharedSlots>,
    allocator: Allocator,
    pace: Pace,
}

/// The cache's limits for an arena.
fn limits(config: &EngineConfig, seed: [u64; 2], geometry: &Geometry) -> CacheConfig {
    let mut limits = CacheConfig::new(geometry.slab_bytes, geometry.slab_count() as u32);
    limits.seed = seed;
    limits.policy = config.policy;
    limits.leases_max = config.max_leases;
    limits.pins_max = config.max_pins;
    limits.keys_max = KEYS_MAX as u32;
    limits.client_bytes_max = config.client_bytes_max(geometry);
    limits.chunks_max = geometry.max_chunks;
    limits
}

impl Furniture {
    fn new(config: &EngineConfig, limits: CacheConfig, segments: &Segments) -> Result<Furniture, StartError> {
        let geometry = segments.geometry();
        let ready = match segments.start() {
            Start::Warm => segments.engine.info().slabs_allocated.load(Ordering::Relaxed),
            Start::First | Start::Cold(_) => 0,
        };
        let allocator = Allocator::start(segments.arena(), geometry, segments.lobby.clone(), ready)?;
        failpoint::here(Place::AllocatorStarted);
        let slots = SharedSlots::new(segments);
        let cache = Cache::new(limits, slots)?;
        let pace = Pace {
            beat_interval_ns: u64::try_from(config.beat_interval().as_nanos()).unwrap_or(u64::MAX),
            spin_ns: u64::try_from(config.spin().as_nanos()).unwrap_or(u64::MAX),
            reattach_grace_ns: u64::from(config.reattach_grace_ms) * 1_000_000,
        };
        Ok(Furniture { cache, allocator, pace })
    }
}

/// An engine on a thread of this process, for tests and for programs that do not want a process of its own for it.
pub struct RunningEngine {
    stop: StopHandle,
    thread: Option<JoinHandle<()>>,
}

/// Starts an engine on a thread of its own, and returns when it serves.
pub fn spawn(config: EngineConfig) -> Result<RunningEngine, StartError> {
    let (started, outcome) = mpsc::channel();
    let stop = StopHandle::default();
    let of_the_thread = stop.clone();
    // The receiver is gone only if `spawn` itself is.
    let run = move || match Engine::create(&config, &of_the_thread) {
        Ok(engine) => engine.run(|| drop(started.send(Ok(())))),
        Err(error) => drop(started.send(Err(error))),
    };
    let system = |error| StartError::System { what: "a thread for the engine", error };
    let thread = std::thread::Builder::new().name("kvring-service".into()).spawn(run).map_err(system)?;
    match outcome.recv() {
        Ok(Ok(())) => Ok(RunningEngine { stop, thread: Some(thread) }),
        Ok(Err(error)) => {
            let _ = thread.join();
            Err(error)
        }
        Err(_) => Err(system(std::io::Error::other("the engine's thread ended before it served"))),
    }
}

impl RunningEngine {
    /// A handle by which any thread can stop the engine.
    #[must_use]
    pub fn stop_handle(&self) -> StopHandle {
        self.stop.clone()
    }

    /// Stops the engine and waits for its end.
    pub fn stop_and_join(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.stop.stop();
        if let Some(thread) = self.thread.take() {
            // If the service thread panicked, the panic hook has reported it.
            let _ = thread.join();
        }
    }
}

impl Drop for RunningEngine {
    fn drop(&mut self) {
        self.end();
    }
}
