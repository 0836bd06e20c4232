//! The other processes of a benchmark, a replay or chaos: this executable again. [`JOB_VARIABLE`] tells each of them its job.
//!
//! They exchange messages with us over their standard input and output. A child ends when its input does, and the kernel
//! kills it with its parent, so none is ever left spinning.

use crate::cores;
use anyhow::{Context, bail};
use kvring_adapter::{Client, ClientOptions, EngineView, Role};
use kvring_engine::config::EngineConfig;
use kvring_engine::stats::Stat;
use kvring_rig::child::{Peer, Stderr, thread_state};
use kvring_rig::pipe::{Abort, Pipe};
use kvring_shm_abi::segment::EngineName;
use nix::sys::signal::Signal;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The environment variable that tells a process that it is a child, and which job it has.
pub(crate) const JOB_VARIABLE: &str = "KVRING_JOB";

/// The line that `kvring serve` prints once clients can attach.
pub(crate) const READY_LINE: &str = "serving";

/// How long an engine may take to serve before the benchmark gives up.
const READY_TIMEOUT: Duration = Duration::from_secs(20);
/// Longer than a child can take for anything.
const PATIENCE: Duration = Duration::from_secs(3600);

/// A client's spin where nothing is said and there are two CPUs.
pub(crate) const DEFAULT_SPIN: Duration = Duration::from_micros(20);

/// How often to look whether the arena has been allocated.
const ALLOCATION_POLL: Duration = Duration::from_millis(20);
/// How many times: at 100 MiB/s that would do for 6 GiB.
const ALLOCATION_POLLS: u32 = 3000;

/// What a child does. `jobs` has a table of all of them.
pub(crate) trait Job: Serialize + DeserializeOwned {
    /// The name by which a child finds its job in the table.
    const NAME: &'static str;
    /// Does the child go on when its parent has ended? Only the process that cleans up after us does, for as long as that takes.
    const OUTLIVES_PARENT: bool = false;

    /// Does it.
    fn be(self, pipe: Pipe) -> anyhow::Result<()>;
}

/// How the engine's process is set up.
#[derive(Serialize, Deserialize)]
pub(crate) struct EngineJob {
    /// [`EngineConfig`] as it prints: the engine reads its own format back.
    config: serde_json::Value,
    /// CPUs of the whole process, from its start; empty: as inherited.
    cpus: Vec<usize>,
    /// The CPU that the service thread is pinned to once it is set up. A process that starts with one CPU would
    /// rightly not spin.
    service_cpu: Option<usize>,
    /// Never preempts another process when it is woken: so that requests gather.
    batch: bool,
}

/// A child's answer to its parent.
pub(crate) fn answer(pipe: &mut Pipe, message: &impl Serialize) -> anyhow::Result<()> {
    pipe.send(message, Instant::now() + PATIENCE).context("telling the parent")
}

/// Waits until the parent has closed its end.
pub(crate) fn until_closed(pipe: &mut Pipe) {
    while let Ok(Some(())) = pipe.receive(None) {}
}

/// This executable, to be started with a command's arguments.
pub(crate) fn kvring() -> anyhow::Result<Command> {
    Ok(Command::new(std::env::current_exe().context("this executable's path")?))
}

/// This executable, to be started as this child.
pub(crate) fn command<J: Job>(job: &J) -> anyhow::Result<Command> {
    let mut command = kvring()?;
    command.env(JOB_VARIABLE, serde_json::to_string(&(J::NAME, job))?);
    Ok(command)
}

/// A running child of a benchmark; killed when dropped.
pub(crate) struct Child(Peer);

impl Child {
    /// Starts one.
    pub(crate) fn spawn(job: &impl Job) -> anyhow::Result<Child> {
        let name = "a child of the benchmark".to_owned();
        Ok(Child(Peer::start(name, command(job)?, Stderr::Inherited, Abort::default())?))
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.0.pid()
    }

    /// Tells it something.
    pub(crate) fn send(&mut self, message: &impl Serialize) -> anyhow::Result<()> {
        self.0.send(message)
    }

    /// Tells it something and reads its answer.
    pub(crate) fn ask<T: DeserializeOwned>(&mut self, message: &impl Serialize) -> anyhow::Result<T> {
        self.send(message)?;
        self.read()
    }

    /// Reads its next message.
    pub(crate) fn read<T: DeserializeOwned>(&mut self) -> anyhow::Result<T> {
        self.0.receive(PATIENCE)
    }

    /// Its state: R running, S asleep, T stopped, Z dead and not waited for.
    pub(crate) fn state(&self) -> Option<char> {
        thread_state(Path::new(&format!("/proc/{}", self.pid())))
    }

    /// Sends it a signal, and does nothing else: the time of a death is measured from here.
    pub(crate) fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.pid())?);
        nix::sys::signal::kill(pid, signal).with_context(|| format!("sending {signal} to a child"))
    }

    /// Waits until nothing is left of one that has been killed.
    pub(crate) fn reap(self) {
        drop(self.0);
    }

    /// Lets it end by itself, and waits for that.
    pub(crate) fn finish(self) -> anyhow::Result<()> {
        self.0.finish()
    }
}

/// An engine in a process of its own.
pub(crate) struct Engine {
    /// Its process.
    pub(crate) child: Child,
    /// Its name, for clients.
    pub(crate) name: String,
}

/// Where and how an engine runs.
#[derive(Clone, Debug, Default)]
pub(crate) struct Placement {
    /// As [`EngineJob`]'s.
    pub(crate) cpus: Vec<usize>,
    /// As [`EngineJob`]'s.
    pub(crate) service_cpu: Option<usize>,
    /// As [`EngineJob`]'s.
    pub(crate) batch: bool,
}

impl Engine {
    /// Starts one under a name of its own; does not wait for it.
    pub(crate) fn spawn(mut config: EngineConfig, placement: &Placement) -> anyhow::Result<Engine> {
        config.name = unique_name();
        Engine::spawn_as(config, placement)
    }

    /// Starts one under the name that its configuration gives it: a successor.
    pub(crate) fn spawn_as(config: EngineConfig, placement: &Placement) -> anyhow::Result<Engine> {
        let job = EngineJob {
            config: serde_json::to_value(&config)?,
            cpus: placement.cpus.clone(),
            service_cpu: placement.service_cpu,
            batch: placement.batch,
        };
        Ok(Engine { child: Child::spawn(&job)?, name: config.name })
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.pid()
    }

    /// A client of it, attached.
    pub(crate) fn client(&self, role: Role, spin: Option<Duration>) -> anyhow::Result<Arc<Client>> {
        client(&self.name, role, spin)
    }

    /// Its statistics, now.
    pub(crate) fn stat(&self, stat: Stat) -> anyhow::Result<u64> {
        let view = EngineView::open(&EngineName::new(&self.name)?)?;
        Ok(stat.of(&view.segment.stats).get())
    }

    /// Waits until the background has allocated the whole arena: before that an engine is neither idle, nor does it
    /// keep all that is stored.
    pub(crate) fn wait_allocated(&self) -> anyhow::Result<()> {
        let mut seen = Ok((0, 0));
        for _ in 0..ALLOCATION_POLLS {
            // An error at first: its segments are not there yet.
            seen =
                self.stat(Stat::ArenaBytes).and_then(|all| Ok((all, self.stat(Stat::ArenaBytesAllocated)?)));
            if matches!(seen, Ok((all, allocated)) if all > 0 && all == allocated) {
                return Ok(());
            }
            if matches!(self.child.state(), None | Some('Z' | 'X')) {
                bail!("the benchmark's engine ended before its arena was allocated");
            }
            std::thread::sleep(ALLOCATION_POLL);
        }
        let (all, allocated) = seen?;
        let waited = ALLOCATION_POLL * ALLOCATION_POLLS;
        bail!("after {waited:?}, {allocated} of the arena's {all} bytes are allocated")
    }

    /// Stops it, and waits until it has cleaned up after itself.
    pub(crate) fn stop(self) -> anyhow::Result<()> {
        self.child.finish()
    }
}

/// A client of the engine of that name, attached.
pub(crate) fn client(engine: &str, role: Role, spin: Option<Duration>) -> anyhow::Result<Arc<Client>> {
    let options = ClientOptions {
        engine: engine.to_owned(),
        spin,
        backoff_min: Duration::from_millis(1),
        ..ClientOptions::default()
    };
    attached(role, options)
}

/// A client in the scheduler's role, attached, that has so long for each of its operations.
pub(crate) fn operator(engine: &EngineName, name: &str, timeout: Duration) -> anyhow::Result<Arc<Client>> {
    attached(
        Role::Scheduler,
        ClientOptions {
            engine: engine.to_string(),
            client: name.to_owned(),
            attach_timeout: timeout,
            operation_timeout: timeout,
            ..ClientOptions::default()
        },
    )
}

/// A client with these options, attached.
pub(crate) fn attached(role: Role, options: ClientOptions) -> anyhow::Result<Arc<Client>> {
    let client = Client::new(role, options)?;
    ready(&client)?;
    Ok(client)
}

/// Waits until a client is attached.
pub(crate) fn ready(client: &Client) -> anyhow::Result<()> {
    client.wait_ready(READY_TIMEOUT).map_err(|health| {
        let why = client.diagnose().map(|error| format!(": {error}")).unwrap_or_default();
        anyhow::anyhow!("after {READY_TIMEOUT:?} the engine is {health}{why}")
    })
}

/// A name that no other run uses.
pub(crate) fn unique_name() -> String {
    use kvring_shm_abi::sync::{AtomicU32, Ordering};
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("{}{}", name_prefix(), COUNT.fetch_add(1, Ordering::Relaxed))
}

/// The beginning of all names of this run.
pub(crate) fn name_prefix() -> String {
    format!("bench-{}-", std::process::id())
}

impl Job for EngineJob {
    const NAME: &'static str = "engine";

    fn be(self, mut pipe: Pipe) -> anyhow::Result<()> {
        if !self.cpus.is_empty() {
            cores::pin(&self.cpus)?;
        }
        let config = EngineConfig::default().with(serde_json::from_value(self.config)?)?;
        let stop = kvring_engine::StopHandle::default();
        let engine = kvring_engine::Engine::create(&config, &stop)?;
        if let Some(cpu) = self.service_cpu {
            cores::pin(&[cpu])?;
        }
        if self.batch {
            never_preempt()?;
        }
        std::thread::Builder::new().name("bench-parent".into()).stack_size(64 << 10).spawn(move || {
            until_closed(&mut pipe);
            stop.stop();
        })?;
        engine.run(|| ());
        Ok(())
    }
}

/// Makes the calling thread's wake-ups polite: it runs when the CPU is free, or its turn has come.
fn never_preempt() -> anyhow::Result<()> {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the parameters live through the call; 0 is the calling thread.
    let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &parameters) };
    if result == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error()).context("sched_setscheduler(SCHED_BATCH)")
    }
}
