//! An engine, from a configuration to its end.

use crate::allocator::{Allocator, AllocatorError, Progress};
use crate::cache::{self, Cache, CacheConfig};
use crate::config::{self, EngineConfig};
use crate::preflight::Room;
use crate::process;
use crate::segments::{Segments, Setup, SetupError};
use crate::service::{Pace, Service, SharedSlots, StopHandle};
use crate::tier::{LowerTier, NoLowerTier};
use kvring_shm_abi::message::KEYS_MAX;
use kvring_shm_abi::superblock::random_u64;
use std::sync::mpsc;
use std::thread::JoinHandle;

/// Why an engine did not start. Nothing of it is left behind.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] config::ConfigError),
    /// Its segments: another engine, no room, not ours.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// The arena's memory.
    #[error(transparent)]
    Allocator(#[from] AllocatorError),
    /// Limits that do not go together.
    #[error(transparent)]
    Cache(#[from] cache::ConfigError),
    /// The system has no randomness, or no thread to give.
    #[error("{what}: {error}")]
    System {
        /// What was asked for.
        what: &'static str,
        /// What it said.
        error: std::io::Error,
    },
}

/// An engine that is ready to serve. It belongs to the thread that made it: the service thread, whose death *is* the
/// engine's death to every client.
pub struct Engine {
    service: Service,
    progress: Progress,
}

impl Engine {
    /// Takes the name, makes the segments, allocates the first slab. The calling thread becomes the service thread.
    pub fn create(config: &EngineConfig) -> Result<Engine, StartError> {
        Engine::create_with_tier(config, Box::new(NoLowerTier))
    }

    /// The same, with a lower tier.
    pub fn create_with_tier(config: &EngineConfig, tier: Box<dyn LowerTier>) -> Result<Engine, StartError> {
        if !config.core_dumps {
            process::disable_core_dumps();
        }
        let name = config.engine_name().map_err(config::ConfigError::from)?;
        let geometry = config.geometry(&Room::for_engine(&name))?;
        let segments = Segments::create(&Setup {
            name: &name,
            geometry,
            beat_interval_us: config.beat_interval_ms.saturating_mul(1000),
            policy: config.policy.name(),
            wait: config.start_wait(),
        })?;
        match Furniture::new(config, &segments) {
            Ok(Furniture { cache, allocator, pace }) => {
                let progress = allocator.progress();
                Ok(Engine { service: Service::new(segments, cache, allocator, tier, pace), progress })
            }
            Err(error) => {
                // Nothing of a failed start is left behind.
                if let Err(left) = segments.retire_and_unlink() {
                    tracing::error!(error = %left, "a failed start leaves something behind");
                }
                Err(error)
            }
        }
    }

    /// Stops the engine, from any thread.
    #[must_use]
    pub fn stop_handle(&self) -> StopHandle {
        self.service.stop_handle()
    }

    /// How the allocation of the arena stands, for a progress bar.
    #[must_use]
    pub fn progress(&self) -> Progress {
        self.progress.clone()
    }

    /// Serves until it is stopped; `ready` is called once, when clients can attach. Then everything is retired,
    /// sleepers are woken, and the names are gone.
    pub fn run(self, ready: impl FnOnce()) {
        let segments = self.service.run(ready);
        match segments.retire_and_unlink() {
            Ok(removed) => tracing::info!(?removed, "stopped"),
            Err(error) => tracing::error!(%error, "stopped, but something is left behind"),
        }
    }
}

/// What a service needs beside its segments.
struct Furniture {
    cache: Cache<SharedSlots>,
    allocator: Allocator,
    pace: Pace,
}

impl Furniture {
    fn new(config: &EngineConfig, segments: &Segments) -> Result<Furniture, StartError> {
        let geometry = segments.geometry();
        let allocator = Allocator::start(segments.arena(), geometry, segments.lobby.clone())?;
        let random = || random_u64().map_err(|error| StartError::System { what: "randomness", error });
        let mut limits = CacheConfig::new(geometry.slab_bytes, geometry.slab_count() as u32);
        limits.seed = [random()?, random()?];
        limits.policy = config.policy;
        limits.leases_max = config.max_leases;
        limits.pins_max = config.max_pins;
        limits.keys_max = KEYS_MAX as u32;
        limits.client_bytes_max = config.client_bytes_max(&geometry);
        if let Some(chunks) = config.max_chunks {
            limits.chunks_max = chunks;
        }
        let slots = SharedSlots::new(segments);
        let cache = Cache::new(limits, slots)?;
        let pace = Pace {
            beat_interval_ns: u64::try_from(config.beat_interval().as_nanos()).unwrap_or(u64::MAX),
            spin_ns: u64::try_from(config.spin().as_nanos()).unwrap_or(u64::MAX),
        };
        Ok(Furniture { cache, allocator, pace })
    }
}

/// An engine on a thread of this process: for tests, and for embedding where a process of its own is too much.
pub struct RunningEngine {
    stop: StopHandle,
    thread: Option<JoinHandle<()>>,
}

/// Starts an engine on a thread of its own, and returns when it serves.
pub fn spawn(config: EngineConfig) -> Result<RunningEngine, StartError> {
    spawn_with_tier(config, Box::new(NoLowerTier))
}

/// The same, with a lower tier.
pub fn spawn_with_tier(config: EngineConfig, tier: Box<dyn LowerTier>) -> Result<RunningEngine, StartError> {
    let (started, outcome) = mpsc::channel();
    let run = move || match Engine::create_with_tier(&config, tier) {
        Ok(engine) => {
            let stop = engine.stop_handle();
            // Nobody listens any more only if `spawn` itself has gone.
            engine.run(|| drop(started.send(Ok(stop))));
        }
        Err(error) => drop(started.send(Err(error))),
    };
    let system = |error| StartError::System { what: "a thread for the engine", error };
    let thread = std::thread::Builder::new().name("kvring-service".into()).spawn(run).map_err(system)?;
    match outcome.recv() {
        Ok(Ok(stop)) => Ok(RunningEngine { stop, thread: Some(thread) }),
        Ok(Err(error)) => {
            let _ = thread.join();
            Err(error)
        }
        Err(_) => Err(system(std::io::Error::other("the engine's thread ended before it served"))),
    }
}

impl RunningEngine {
    /// Stops the engine, from any thread.
    #[must_use]
    pub fn stop_handle(&self) -> StopHandle {
        self.stop.clone()
    }

    /// Stops it and waits for its end.
    pub fn stop_and_join(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.stop.stop();
        if let Some(thread) = self.thread.take() {
            // A panic of the service thread has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

impl Drop for RunningEngine {
    fn drop(&mut self) {
        self.end();
    }
}
