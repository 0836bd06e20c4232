//! An engine that is killed and started again under the same name; and waits for states of its clients and threads.

use crate::child::{DEFAULT_SPIN, Engine, Placement, attached, ready, unique_name};
use anyhow::{Context, ensure};
use kvring_adapter::{Client, ClientOptions, Role};
use kvring_engine::byte_size::ByteSize;
use kvring_engine::config::EngineConfig;
use kvring_rig::child::thread_state;
use kvring_shm_abi::futex::{Deadline, monotonic_ns};
use kvring_shm_abi::segment::EngineName;
use nix::sys::signal::Signal;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Longer than a start, an attachment or the change of a process's state takes.
const PATIENCE: Duration = Duration::from_secs(30);
/// Between two looks at a process.
const LOOK_EVERY: Duration = Duration::from_millis(1);
/// Looks that must find a thread asleep: one alone may have come just before it goes on.
const ASLEEP_LOOKS: u32 = 3;

/// One name, and the engine that has it now.
pub(super) struct Life {
    config: EngineConfig,
    placement: Placement,
    name: EngineName,
    engine: Option<Engine>,
}

impl Life {
    /// Starts the first one, with its service thread on `cpu` and a table for `max_chunks` chunks where these are given.
    pub(super) fn start(arena: u64, max_chunks: Option<u32>, cpu: Option<usize>) -> anyhow::Result<Life> {
        let arena = Some(ByteSize(arena));
        let config = EngineConfig { name: unique_name(), arena, max_chunks, ..EngineConfig::default() };
        let name = config.engine_name()?;
        let mut life = Life {
            config,
            placement: Placement { service_cpu: cpu, ..Placement::default() },
            name,
            engine: None,
        };
        life.restart()?;
        Ok(life)
    }

    /// Its name.
    pub(super) fn name(&self) -> &EngineName {
        &self.name
    }

    /// The engine that runs.
    pub(super) fn engine(&self) -> anyhow::Result<&Engine> {
        self.engine.as_ref().context("the engine has been killed")
    }

    /// Starts a successor, and says when its process began to be made. Does not wait for it.
    pub(super) fn restart(&mut self) -> anyhow::Result<u64> {
        let before = monotonic_ns();
        self.engine = Some(Engine::spawn_as(self.config.clone(), &self.placement)?);
        Ok(before)
    }

    /// Stops the process where it is, so that nothing is answered any more, and waits until it stands still.
    pub(super) fn freeze(&self) -> anyhow::Result<()> {
        let engine = self.engine()?;
        engine.child.signal(Signal::SIGSTOP)?;
        until(1, || Ok(engine.child.state() == Some('T'))).context("stopping the engine")
    }

    /// Kills it, and says when. Something of it is left until it is buried.
    pub(super) fn kill(&self) -> anyhow::Result<u64> {
        let engine = self.engine()?;
        let before = monotonic_ns();
        engine.child.signal(Signal::SIGKILL)?;
        Ok(before)
    }

    /// Waits until nothing of the killed process is left.
    pub(super) fn bury(&mut self) {
        if let Some(engine) = self.engine.take() {
            engine.child.reap();
        }
    }

    /// Waits until `client` is attached to the engine that runs, and that has allocated its whole arena.
    pub(super) fn settle(&self, client: &Client) -> anyhow::Result<()> {
        ready(client)?;
        self.engine()?.wait_allocated()
    }

    /// Ends it for good.
    pub(super) fn stop(mut self) -> anyhow::Result<()> {
        self.engine.take().map_or(Ok(()), Engine::stop)
    }
}

/// A client that is not kept from measuring by its pauses between two attempts to attach.
pub(super) fn eager_client(name: &EngineName) -> anyhow::Result<Arc<Client>> {
    let options = ClientOptions {
        engine: name.to_string(),
        // Where its thread is pinned the client would take the machine for one with a single CPU.
        spin: Some(DEFAULT_SPIN),
        backoff_min: Duration::from_millis(1),
        backoff_max: Duration::from_millis(10),
        ..ClientOptions::default()
    };
    attached(Role::Scheduler, options)
}

/// Waits until a thread of this process sleeps.
pub(super) fn asleep(thread: nix::unistd::Pid) -> anyhow::Result<()> {
    let task = PathBuf::from(format!("/proc/self/task/{thread}"));
    until(ASLEEP_LOOKS, || Ok(thread_state(&task) == Some('S')))
        .context("waiting for a thread to fall asleep")
}

/// Waits until a condition has held at `looks` looks in a row.
pub(super) fn until(looks: u32, condition: impl Fn() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let deadline = Deadline::after(PATIENCE);
    let mut held = 0;
    loop {
        held = if condition()? { held + 1 } else { 0 };
        if held >= looks {
            return Ok(());
        }
        ensure!(!deadline.passed(), "it did not happen within {PATIENCE:?}");
        std::thread::sleep(LOOK_EVERY);
    }
}
