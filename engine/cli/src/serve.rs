//! `kvring serve`: one engine, in the foreground.

use crate::console::{self, LogChoice};
use crate::flags::wrong;
use anyhow::{Context, bail};
use kvring_engine::byte_size::ByteSize;
use kvring_engine::cache;
use kvring_engine::config::{ConfigError, EngineConfig, Overrides};
use kvring_engine::policy::PolicyKind;
use kvring_engine::segments::SetupError;
use kvring_engine::{Engine, StartError, StopHandle, process};
use kvring_shm_abi::segment::EngineName;
use nix::sys::signal::Signal;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::io::Write;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

/// The line on stdout that says that clients can attach. A script that starts an engine waits for it.
const READY_LINE: &str = "serving";

/// How often the progress bar looks.
const BAR_INTERVAL: Duration = Duration::from_millis(50);

/// Run an engine in the foreground, until SIGTERM, Ctrl-C or the end of its terminal; a second SIGTERM or Ctrl-C ends it at once.
///
/// It prints the line `serving` on stdout as soon as clients can attach, which is when the first slab of its arena is
/// allocated; the rest follows in the background. Asked to stop, it leaves nothing in /dev/shm, unless started with
/// --keep. After a crash (or with --keep) the next engine of the same name and arena takes over what it held, and its
/// clients attach again by themselves.
///
/// Settings come from flags, then from the file given with --config, then from the defaults shown here.
#[derive(clap::Args, Debug)]
#[command(after_long_help = "Examples:
  kvring serve --arena 32GiB              the engine named `default`
  kvring serve --name b --arena 8GiB      a second engine on the same node
  kvring serve --config kvring.toml --policy arc
  kvring serve --arena 32GiB --print-config > kvring.toml

How much: an arena of A bytes holds A / (KV bytes per token) tokens.
Llama-3.1-8B in bf16 has 128 KiB per token: 100 GiB hold 819200 tokens.
`kvring simulate` says what hit rate that gives on a trace. In a container
/dev/shm is 64 MiB unless you say otherwise: docker run --shm-size=33g.")]
pub(crate) struct Args {
    /// Settings as a TOML file, with the names of the flags here (and `_` for `-`)
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    #[command(flatten)]
    settings: Settings,

    /// Print the settings that result as TOML, and do nothing else
    #[arg(long)]
    print_config: bool,

    /// Stop when this process, our parent, ends
    #[arg(long, value_name = "PID", hide = true)]
    stop_with_parent: Option<u32>,

    /// Undo what our starter has bound us to: CPUs, niceness, memory nodes, working directory
    #[arg(long, hide = true)]
    unbound: bool,
}

/// The help of a setting: a text, and the default from [`EngineConfig`].
fn with_default<T: ToString>(text: &str, of: impl FnOnce(EngineConfig) -> T) -> String {
    format!("{text} [default: {}]", of(EngineConfig::default()).to_string())
}

/// The flags of [`Overrides`]: each replaces a value from the file. None has a default here.
#[derive(clap::Args, Debug)]
struct Settings {
    #[arg(long, help = with_default("The engine's name: one engine per name and node", |c| c.name))]
    name: Option<EngineName>,

    /// Size of the arena, as 32GiB or 500MB [default: half of what /dev/shm, the cgroup and the machine have left]
    #[arg(long, value_name = "SIZE")]
    arena: Option<ByteSize>,

    /// Size of a slab, the piece in which the arena is allocated and divided: a power of two from 1MiB to 1GiB
    /// [default: 1/64 of the arena, from 1MiB to 64MiB]
    #[arg(long, value_name = "SIZE")]
    slab: Option<ByteSize>,

    #[arg(long, help = with_default("Which chunks go first when room is needed: lru, arc", |c| c.policy))]
    policy: Option<PolicyKind>,

    #[arg(long, value_name = "MS",
        help = with_default("How often the engine shows its clients that it lives, at least, in milliseconds", |c| c.beat_interval_ms))]
    beat_interval_ms: Option<u32>,

    #[arg(long, value_name = "US",
        help = with_default("How long the engine spins before it sleeps, in microseconds", |c| c.spin_us))]
    spin_us: Option<u32>,

    #[arg(long, value_name = "PART",
        help = with_default("The part of the arena that one client may hold at once", |c| c.client_share))]
    client_share: Option<f64>,

    #[arg(long, value_name = "N", help = with_default("Leases that one client can hold at once", |c| c.max_leases))]
    max_leases: Option<u32>,

    #[arg(long, value_name = "N", help = with_default("Chunks that one client's leases can pin at once", |c| c.max_pins))]
    max_pins: Option<u32>,

    /// The most chunks at one time [default: one for each 64 KiB of the arena, and at least 65536]
    #[arg(long, value_name = "N")]
    max_chunks: Option<u32>,

    #[arg(long, value_name = "MS",
        help = with_default("How long to wait for another start of this name, or the end of an engine that is dying, in milliseconds",
            |c| c.start_wait_ms))]
    start_wait_ms: Option<u32>,

    #[arg(long, value_name = "BOOL",
        help = with_default("May it dump core? That delays the notice of its death", |c| c.core_dumps))]
    core_dumps: Option<bool>,

    #[arg(long, value_name = "MS",
        help = with_default("How long after a restart nothing is evicted while clients come back, in milliseconds",
            |c| c.reattach_grace_ms))]
    reattach_grace_ms: Option<u32>,

    /// Take over what an earlier engine of this name has left, also where its arena has another size than --arena says
    #[arg(long)]
    any_arena: bool,

    /// Start empty, also where an earlier engine of this name has left its cache
    #[arg(long)]
    cold: bool,

    /// Leave the cache to the next engine of this name when asked to stop, as a crash does
    #[arg(long)]
    keep: bool,
}

impl Settings {
    fn overrides(self) -> Overrides {
        // Taken apart and put together by name: a flag that is forgotten does not compile. The log level is a flag of
        // every command.
        let Settings {
            name,
            arena,
            slab,
            policy,
            beat_interval_ms,
            spin_us,
            client_share,
            max_leases,
            max_pins,
            max_chunks,
            start_wait_ms,
            core_dumps,
            reattach_grace_ms,
            any_arena,
            cold,
            keep,
        } = self;
        Overrides {
            name: name.map(|name| name.to_string()),
            arena,
            slab,
            policy,
            beat_interval_ms,
            spin_us,
            client_share,
            max_leases,
            max_pins,
            max_chunks,
            start_wait_ms,
            core_dumps,
            reattach_grace_ms,
            // Not given is not "no": the file may say yes.
            any_arena: any_arena.then_some(true),
            cold: cold.then_some(true),
            keep: keep.then_some(true),
            log_level: None,
        }
    }
}

/// Runs the command. The calling thread becomes the service thread.
pub(crate) fn run(args: Args, log: &LogChoice) -> anyhow::Result<()> {
    let base = match &args.config {
        Some(path) => EngineConfig::from_toml(path).map_err(config_error)?,
        None => EngineConfig::default(),
    };
    let config = base.with(args.settings.overrides()).map_err(config_error)?;
    console::check_log("log_level", &config.log_level)?;
    // This comes before the first thread is started, because threads inherit these bindings.
    let bound = if args.unbound { process::belong_to_the_node() } else { Vec::new() };
    // Written to its end when we return.
    let _log = log.start_unwaited(&config.log_level)?;
    for (what, error) in bound {
        tracing::warn!(%error, "this engine keeps the {what} of the process that started it");
    }
    if args.print_config {
        let text = toml::to_string(&config).context("cannot print the configuration")?;
        console::out().write_all(text.as_bytes())?;
        return Ok(());
    }
    if let Some(parent) = args.stop_with_parent {
        stop_with_parent(parent)?;
    }
    let stop = StopHandle::default();
    stop_on_signal(stop.clone(), args.stop_with_parent.is_some())?;
    let engine = match Engine::create(&config, &stop) {
        Err(StartError::Setup(stopped @ SetupError::Stopped)) => {
            tracing::info!("{stopped}");
            return Ok(());
        }
        created => created.map_err(|error| match error {
            StartError::Config(error) => config_error(error),
            StartError::Cache(error) if !matches!(error, cache::ConfigError::Memory(_)) => wrong(error),
            error => error.into(),
        }),
    };
    let engine = engine.with_context(|| format!("cannot start engine `{}`", config.name))?;
    engine.doubt_after_a_panic();
    show_allocation(engine.progress());
    engine.run(|| {
        // A script that has gone away again does not end the engine.
        let mut out = console::out();
        let _ = writeln!(out, "{READY_LINE}").and_then(|()| out.flush());
    });
    Ok(())
}

/// Settings that cannot be are wrong usage; a file that cannot be read, or a machine that is too small, is not.
fn config_error(error: ConfigError) -> anyhow::Error {
    match error {
        ConfigError::Read { .. } | ConfigError::ArenaTooSmall { by_default: true, .. } => error.into(),
        error => wrong(error),
    }
}

fn stop_with_parent(parent: u32) -> anyhow::Result<()> {
    nix::sys::prctl::set_pdeathsig(Signal::SIGTERM).context("prctl(PR_SET_PDEATHSIG)")?;
    // It may have ended before we asked to be told.
    if nix::unistd::getppid().as_raw().unsigned_abs() != parent {
        bail!("the process that started this engine (pid {parent}) has ended");
    }
    Ok(())
}

/// Draws the allocation of the arena, on a thread of its own, until it is over.
fn show_allocation(progress: kvring_engine::allocator::Progress) {
    let bar = console::byte_bar("allocating the arena", progress.bytes_total());
    if bar.is_hidden() {
        return;
    }
    let draw = move || {
        while !progress.is_over() {
            bar.set_position(progress.bytes_ready());
            thread::sleep(BAR_INTERVAL);
        }
        bar.finish_and_clear();
    };
    if let Err(error) = thread::Builder::new().name("kvring-bar".to_owned()).spawn(draw) {
        tracing::debug!(%error, "no progress bar");
    }
}

/// From here on SIGTERM, SIGINT and SIGHUP (its terminal is gone) are ours, and ask the engine to stop, also while it starts.
/// Where SIGHUP is ignored from the start (`nohup`) it stays ignored.
///
/// A second one ends the process at once; but no SIGHUP, which the kernel and the shell both send; and with `by_parent` not a
/// second SIGTERM: the kernel sends one for each thread of a dying parent that we are handed on to.
fn stop_on_signal(stop: StopHandle, by_parent: bool) -> anyhow::Result<()> {
    let hangup = (!process::ignores(Signal::SIGHUP)).then_some(SIGHUP);
    let mut signals = Signals::new([SIGTERM, SIGINT].into_iter().chain(hangup))
        .context("cannot watch for SIGTERM, SIGINT and SIGHUP")?;
    let watch = move || {
        let mut insisted = 0;
        for signal in signals.forever() {
            let again = signal == SIGHUP || by_parent && signal == SIGTERM;
            insisted += u32::from(insisted == 0 && signal != SIGHUP || !again);
            if insisted > 1 {
                // The segments stay as they are, for the next engine of this name.
                std::process::exit(1);
            }
            tracing::info!(signal, "asked to stop; another signal ends the process at once");
            stop.stop();
        }
    };
    thread::Builder::new()
        .name("kvring-signals".to_owned())
        .spawn(watch)
        .context("cannot start the thread that watches for signals")?;
    Ok(())
}
