//! The other processes of a measurement: this executable again, told by [`CHILD_ENV`] what to be.
//!
//! They talk in lines over their standard input and output: a command in, an answer out. A child ends when its input
//! does, and the kernel kills it with its parent, so none is ever left spinning.

use crate::health::{bare, holder};
use crate::lookup::busy::{self, BusyJob};
use crate::pingpong::{self, PeerJob};
use crate::sweeper;
use crate::{cores, process};
use anyhow::{Context, bail};
use kvring_adapter::{Client, ClientOptions, EngineView, Role};
use kvring_engine::config::EngineConfig;
use kvring_engine::stats::Stat;
use kvring_shm_abi::futex::{self, Deadline};
use kvring_shm_abi::segment::EngineName;
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

/// The environment variable that makes a process a child of a benchmark.
pub const CHILD_ENV: &str = "KVRING_BENCH_CHILD";

/// How long an engine may take to serve before the benchmark gives up.
const READY_TIMEOUT: Duration = Duration::from_secs(20);

/// A client's spin where nothing is said and there are two CPUs.
pub(crate) const DEFAULT_SPIN: Duration = Duration::from_micros(20);

/// How often to look whether the arena has been allocated.
const ALLOCATION_POLL: Duration = Duration::from_millis(20);
/// How many times: at 100 MiB/s that would do for 6 GiB.
const ALLOCATION_POLLS: u32 = 3000;

/// What a child is to be.
#[derive(Serialize, Deserialize)]
pub(crate) enum Job {
    /// An engine.
    Engine(EngineJob),
    /// The other side of a raw ping-pong: a limit.
    Peer(PeerJob),
    /// A client that stores and loads.
    Busy(BusyJob),
    /// A process that ends at once: what starting one costs.
    Nothing,
    /// A process that does nothing but wake up this often, in nanoseconds: what being there costs.
    Naps(u64),
    /// A process that has a robust futex and nothing else: what noticing a death costs.
    Bare(bare::BareJob),
    /// A client that holds leases and half-written slots.
    Holder(holder::HolderJob),
    /// Removes what the benchmark's engines leave in shared memory, after the benchmark's end.
    Sweeper(sweeper::SweeperJob),
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

/// Becomes the child that a benchmark asked for and never returns; does nothing in a process that is none.
///
/// To be called first thing in `main` by every binary that calls [`run`](crate::run), before arguments are parsed and
/// threads are started.
pub fn child_main() {
    let Ok(job) = std::env::var(CHILD_ENV) else { return };
    let code = match be(&job) {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("benchmark child: {error:#}");
            1
        }
    };
    std::process::exit(code);
}

fn be(job: &str) -> anyhow::Result<()> {
    let job = serde_json::from_str(job).context("the job of a benchmark's child")?;
    // Only who cleans up after the benchmark outlives it, by as long as that takes.
    if !matches!(job, Job::Sweeper(_)) {
        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).context("prctl(PR_SET_PDEATHSIG)")?;
    }
    match job {
        Job::Engine(job) => be_engine(job),
        Job::Peer(job) => pingpong::be(job),
        Job::Busy(job) => busy::be(job),
        Job::Nothing => Ok(()),
        Job::Naps(interval_ns) => be_napping(interval_ns),
        Job::Bare(job) => bare::be(job),
        Job::Holder(job) => holder::be(job),
        Job::Sweeper(job) => sweeper::be(job),
    }
}

/// For every command, a number of naps.
fn be_napping(interval_ns: u64) -> anyhow::Result<()> {
    let never = kvring_shm_abi::sync::AtomicU32::new(0);
    let interval = Duration::from_nanos(interval_ns);
    for command in commands() {
        for _ in 0..command.parse::<u32>()? {
            futex::wait_any(&[(&never, 0)], Deadline::after(interval));
        }
        answer("awake")?;
    }
    Ok(())
}

/// A child's commands, one per line; ends with its parent's interest.
pub(crate) fn commands() -> impl Iterator<Item = String> {
    std::io::stdin().lock().lines().map_while(Result::ok)
}

/// A child's answer to a command.
#[allow(clippy::disallowed_methods, reason = "its parent reads it; a child without one fails")]
pub(crate) fn answer(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}")?;
    Ok(out.flush()?)
}

/// A running child; killed when dropped.
pub(crate) struct Child {
    process: std::process::Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Child {
    /// Starts one.
    pub(crate) fn spawn(job: &Job) -> anyhow::Result<Child> {
        let program = std::env::current_exe().context("this executable's path")?;
        let mut command = Command::new(program);
        command.env(CHILD_ENV, serde_json::to_string(job)?).stdin(Stdio::piped()).stdout(Stdio::piped());
        if matches!(job, Job::Sweeper(_)) {
            // Ctrl-C is for its parent.
            command.process_group(0);
        }
        let mut process = command.spawn().context("starting a child of the benchmark")?;
        let input = process.stdin.take();
        let output = process.stdout.take().context("the child's output")?;
        Ok(Child { process, input, output: BufReader::new(output) })
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Tells it something and reads its answer.
    pub(crate) fn ask(&mut self, command: &str) -> anyhow::Result<String> {
        let input = self.input.as_mut().context("the child has been let go")?;
        writeln!(input, "{command}").and_then(|()| input.flush()).context("telling the child")?;
        self.read()
    }

    /// Reads a line that it prints by itself.
    pub(crate) fn read(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        if self.output.read_line(&mut line).context("reading from the child")? == 0 {
            bail!("a child of the benchmark ended early: {}", self.process.wait()?);
        }
        Ok(line.trim_end().to_owned())
    }

    /// Its state: R running, S asleep, T stopped, Z dead and not waited for.
    pub(crate) fn state(&self) -> anyhow::Result<char> {
        process::state(&format!("/proc/{}/stat", self.pid()))
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.pid())?);
        nix::sys::signal::kill(pid, signal).with_context(|| format!("sending {signal} to a child"))
    }

    /// Waits until nothing is left of one that has been killed.
    pub(crate) fn reap(&mut self) -> anyhow::Result<()> {
        self.process.wait().map(|_| ()).context("waiting for a killed child")
    }

    /// Lets it end by itself, and waits for that.
    pub(crate) fn finish(&mut self) -> anyhow::Result<()> {
        self.input = None;
        let status = self.process.wait()?;
        anyhow::ensure!(status.success(), "a child of the benchmark failed: {status}");
        Ok(())
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // One that has ended already cannot be killed; that is fine.
        let _ = self.process.kill();
        let _ = self.process.wait();
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
        let job = Job::Engine(EngineJob {
            config: serde_json::to_value(&config)?,
            cpus: placement.cpus.clone(),
            service_cpu: placement.service_cpu,
            batch: placement.batch,
        });
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
            if matches!(self.child.state()?, 'Z' | 'X') {
                bail!("the benchmark's engine ended before its arena was allocated");
            }
            std::thread::sleep(ALLOCATION_POLL);
        }
        let (all, allocated) = seen?;
        let waited = ALLOCATION_POLL * ALLOCATION_POLLS;
        bail!("after {waited:?}, {allocated} of the arena's {all} bytes are allocated")
    }

    /// Stops it, and waits until it has cleaned up after itself.
    pub(crate) fn stop(mut self) -> anyhow::Result<()> {
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
    let client = Client::new(role, options)?;
    client.wait_ready(READY_TIMEOUT).map_err(|health| {
        let why = client.diagnose().map(|error| format!(": {error}")).unwrap_or_default();
        anyhow::anyhow!("the benchmark's engine is {health}{why}")
    })?;
    Ok(client)
}

/// A name that no other run uses.
pub(crate) fn unique_name() -> String {
    use kvring_shm_abi::sync::{AtomicU32, Ordering};
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("{}{}", name_prefix(), COUNT.fetch_add(1, Ordering::Relaxed))
}

/// What all names of this run begin with.
pub(crate) fn name_prefix() -> String {
    format!("bench-{}-", std::process::id())
}

fn be_engine(job: EngineJob) -> anyhow::Result<()> {
    if !job.cpus.is_empty() {
        cores::pin(&job.cpus)?;
    }
    let config = EngineConfig::default().with(serde_json::from_value(job.config)?)?;
    let stop = kvring_engine::StopHandle::default();
    let engine = kvring_engine::Engine::create(&config, &stop)?;
    if let Some(cpu) = job.service_cpu {
        cores::pin(&[cpu])?;
    }
    if job.batch {
        never_preempt()?;
    }
    std::thread::Builder::new().name("bench-parent".into()).stack_size(64 << 10).spawn(move || {
        commands().for_each(drop);
        stop.stop();
    })?;
    engine.run(|| ());
    Ok(())
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
