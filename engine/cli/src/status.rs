//! `kvring status`: how an engine is, read from its shared memory alone: it asks the engine nothing, so it works while
//! the engine hangs, and after its death.

mod show;

use crate::console;
use anyhow::Context;
use kvring_adapter::{AttachError, DEFAULT_ENGINE, EngineView, Role};
use kvring_engine::stats::Snapshot;
use kvring_shm_abi::claims::Locks;
use kvring_shm_abi::engine_segment::EngineSegment;
use kvring_shm_abi::epoch::Epoch;
use kvring_shm_abi::life::Life;
use kvring_shm_abi::lobby::LIFE_WORDS_AT;
use kvring_shm_abi::segment::EngineName;
use kvring_shm_abi::superblock::Mismatch;
use kvring_shm_abi::sync::Ordering;
use kvring_shm_abi::text::load_text;
use serde::Serialize;
use std::io::Write;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The exit code for an engine that does not serve.
const NOT_SERVING: u8 = 3;

/// How long the beat is watched before it counts as still: this, or [`WATCH_BEATS`] if that is longer.
const WATCH_MIN: Duration = Duration::from_millis(50);
/// Beats that must be missed: an engine that shares its core misses some.
const WATCH_BEATS: u32 = 20;

/// Show how an engine is and what it holds; works while it hangs, and after its death
///
/// It only reads shared memory, so it works while the engine hangs, and after its death. Exit code 0 when the engine
/// serves, else 3.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:
  kvring status                           the engine named `default`
  kvring status --name prod --json        one JSON object, for programs
  kvring status >/dev/null && echo up     is it well?

States: serving; stalled (its process lives, and does nothing); recovering;
unhealthy (it found itself broken); stopping; dead (its process is gone, its
memory is not); absent (there is none); incompatible (another release made
it); inaccessible (it is another user's, or cannot be read).")]
pub(crate) struct Args {
    /// The engine's name
    #[arg(long, default_value = DEFAULT_ENGINE)]
    name: EngineName,

    /// Print one JSON object instead of tables
    #[arg(long)]
    json: bool,
}

/// How an engine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    /// All is well.
    Serving,
    /// Its process lives, but its loop does not move.
    Stalled,
    /// Not ready yet.
    Recovering,
    /// It found its own invariants broken and serves nothing.
    Unhealthy,
    /// It has given up its segments.
    Stopping,
    /// Its process is gone.
    Dead,
    /// No such engine.
    Absent,
    /// There is one, of another release or build.
    Incompatible,
    /// There is one, and it is another user's, or cannot be read.
    Inaccessible,
}

/// Everything that is shown.
#[derive(Debug, Serialize)]
struct Status {
    name: String,
    state: State,
    /// The meaning of that, and the remedy.
    detail: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    engine: Option<EngineStatus>,
    clients: Vec<ClientStatus>,
    namespaces: Vec<NamespaceStatus>,
    /// Each counter and gauge under its name.
    #[serde(skip_serializing_if = "Option::is_none")]
    counters: Option<Snapshot>,
}

/// The engine itself.
#[derive(Debug, Serialize)]
struct EngineStatus {
    pid: u32,
    incarnation: u32,
    started_unix_ms: u64,
    uptime_s: f64,
    policy: String,
    arena_id: String,
    arena_bytes: u64,
    arena_bytes_allocated: u64,
    arena_bytes_used: u64,
    slab_bytes: u64,
    beat_interval_us: u32,
    /// The means by which its clients notice its death.
    death_notice: &'static str,
    /// How it waits for several things at once.
    waiting: &'static str,
}

/// A client's entry in the lobby.
#[derive(Debug, Serialize)]
struct ClientStatus {
    entry: usize,
    role: &'static str,
    name: String,
    pid: u32,
    alive: bool,
    /// Dead, but a device may still write for it: its entry and its slots wait until its process is gone.
    lingering: bool,
    /// The means by which the engine notices its death.
    death_notice: &'static str,
    /// How it waits for several things at once.
    waiting: &'static str,
}

/// A registered namespace.
#[derive(Debug, Serialize)]
struct NamespaceStatus {
    id: u32,
    model: String,
    dtype: String,
    ranks: u32,
    ranks_registered: u32,
    chunk_tokens: u32,
    /// Of the ranks that have registered.
    shard_bytes: Vec<u64>,
    fingerprint: String,
}

/// A name as messages show it.
pub(crate) fn quoted_name(name: &EngineName) -> String {
    format!("`{name}`")
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let status = match EngineView::open(&args.name) {
        Ok(view) => read(&args.name, &view),
        Err(error) => unreadable(&args.name, &error),
    };
    let mut out = console::out();
    if args.json {
        let text = serde_json::to_string(&status).context("cannot print the status")?;
        writeln!(out, "{text}")?;
    } else {
        write!(out, "{}", show::tables(&status))?;
    }
    Ok(if status.state == State::Serving { ExitCode::SUCCESS } else { ExitCode::from(NOT_SERVING) })
}

/// There is no engine of that name, or its segment cannot be read: the error has the reason and the remedy.
fn unreadable(name: &EngineName, error: &AttachError) -> Status {
    let state = match error {
        AttachError::NoEngine(_) => State::Absent,
        // It is being made, or was left like this.
        AttachError::Mismatch { mismatch: Mismatch::Incomplete, .. } => State::Recovering,
        AttachError::Mismatch { .. } => State::Incompatible,
        _ => State::Inaccessible,
    };
    Status {
        name: name.to_string(),
        state,
        detail: error.to_string(),
        engine: None,
        clients: Vec::new(),
        namespaces: Vec::new(),
        counters: None,
    }
}

fn read(name: &EngineName, view: &EngineView) -> Status {
    let segment = &view.segment;
    let (state, detail) = judge(name, view);
    let counters =
        Snapshot::read(&segment.stats).inspect_err(|error| tracing::warn!(%error, "no counters")).ok();
    let counters = counters.map(|counters| match view.open_lobby(name) {
        Ok(lobby) => counters.with_lookups(&lobby.lookup_totals()),
        // The engine's last word, then; the list of clients says what is wrong.
        Err(_) => counters,
    });
    Status {
        name: name.to_string(),
        state,
        detail,
        engine: Some(engine(view, counters.as_ref())),
        clients: clients(name, view),
        namespaces: namespaces(segment),
        counters,
    }
}

/// The state that two words show, watched for a moment.
fn judge(name: &EngineName, view: &EngineView) -> (State, String) {
    let segment = &view.segment;
    let pid = segment.info().pid.load(Ordering::Relaxed);
    if segment.superblock().is_retired() {
        let detail = "it has given up its memory, and ends when its last copy has ended".to_owned();
        return (State::Stopping, detail);
    }
    if !view.owner_lives() {
        let detail = format!(
            "its process (pid {pid}) is gone: clients run without it; `kvring serve --name {name}` takes over what it held, \
             `kvring remove --name {name}` frees its memory"
        );
        return (State::Dead, detail);
    }
    let broken = segment.info().unhealthy.load(Ordering::Relaxed);
    if broken != 0 {
        let detail = format!(
            "its self-check {broken} failed, its log says how: stop it (pid {pid}) and start it again"
        );
        return (State::Unhealthy, detail);
    }
    if !Epoch::serves(segment.epoch().incarnation()) {
        return (
            State::Recovering,
            "not ready yet: clients wait for it without blocking anything".to_owned(),
        );
    }
    let interval = Duration::from_micros(segment.info().beat_interval_us.load(Ordering::Relaxed).into());
    let watch = WATCH_MIN.max(interval.saturating_mul(WATCH_BEATS));
    if beats(segment, watch) {
        return (State::Serving, "it answers".to_owned());
    }
    // It may have died under our eyes.
    if !view.owner_lives() {
        return (State::Dead, format!("its process (pid {pid}) has just ended"));
    }
    let detail = format!(
        "its process (pid {pid}) lives, but did nothing while this command watched it for {} ms: stopped, starved or stuck; \
         clients run without it until it goes on",
        watch.as_millis()
    );
    (State::Stalled, detail)
}

/// Does the beat move within `watch`? Returns as soon as it does.
fn beats(segment: &EngineSegment, watch: Duration) -> bool {
    let first = segment.epoch().beat();
    let until = Instant::now() + watch;
    loop {
        if segment.epoch().beat() != first {
            return true;
        }
        if Instant::now() >= until {
            return false;
        }
        thread::sleep(Duration::from_millis(1));
    }
}

fn engine(view: &EngineView, counters: Option<&Snapshot>) -> EngineStatus {
    use kvring_engine::stats::Stat;
    let info = view.segment.info();
    let geometry = view.identity.geometry;
    let started_ns = info.started_unix_ns.load(Ordering::Relaxed);
    let now_ns = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos());
    let uptime_ns = now_ns.saturating_sub(u128::from(started_ns));
    let allocated = u64::from(info.slabs_allocated.load(Ordering::Relaxed)) * geometry.slab_bytes;
    let [low, high] = view.identity.arena_id;
    let means = view.means();
    EngineStatus {
        pid: info.pid.load(Ordering::Relaxed),
        incarnation: view.segment.epoch().incarnation(),
        started_unix_ms: started_ns / 1_000_000,
        uptime_s: uptime_ns as f64 / 1e9,
        policy: load_text(&info.policy),
        arena_id: format!("{high:016x}{low:016x}"),
        arena_bytes: geometry.arena_bytes,
        arena_bytes_allocated: allocated,
        arena_bytes_used: counters.map_or(0, |counters| counters.get(Stat::ArenaBytesUsed)),
        slab_bytes: geometry.slab_bytes,
        beat_interval_us: info.beat_interval_us.load(Ordering::Relaxed),
        death_notice: means.death_notice.as_str(),
        waiting: means.waiting.as_str(),
    }
}

/// The client that claims an entry, as the lobby says; that is only displayed, and nothing else relies on it.
fn clients(name: &EngineName, view: &EngineView) -> Vec<ClientStatus> {
    // The file for its locks: some clients' words may not be marked when they die.
    let opened = view.open_lobby(name).and_then(|lobby| Ok((lobby, view.open_lobby_file(name)?)));
    let (lobby, file) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            tracing::warn!(%error, "no list of clients");
            return Vec::new();
        }
    };
    let locks = Locks::of(&file, LIFE_WORDS_AT);
    let shown = lobby.entries.iter().enumerate().filter_map(|(entry, published)| {
        let life = locks.life(&lobby.life_words, entry);
        // Claimed but not ready yet: it is attaching.
        let content = published.read().filter(|_| life != Life::Unclaimed)?;
        let means = published.means();
        // A living client's word itself says it.
        let death_notice = match life {
            Life::Alive { notice, .. } => notice,
            Life::Dead | Life::Unclaimed => means.death_notice,
        };
        Some(ClientStatus {
            entry,
            role: Role::from_number(content.role.into()).map_or("unknown", Role::as_str),
            name: content.name,
            pid: content.pid,
            alive: matches!(life, Life::Alive { .. }),
            lingering: life == Life::Dead && published.dma().is_some(),
            death_notice: death_notice.as_str(),
            waiting: means.waiting.as_str(),
        })
    });
    shown.collect()
}

fn namespaces(segment: &EngineSegment) -> Vec<NamespaceStatus> {
    let registered = (0u8..).zip(segment.namespaces.iter());
    let shown = registered.filter_map(|(index, namespace)| {
        let info = namespace.read(index)?;
        Some(NamespaceStatus {
            id: info.id,
            model: info.model,
            dtype: info.dtype,
            ranks: info.world,
            ranks_registered: info.ranks.count_ones(),
            chunk_tokens: info.chunk_tokens,
            shard_bytes: info.shard_bytes,
            fingerprint: info.fingerprint.iter().map(|word| format!("{word:016x}")).collect(),
        })
    });
    shown.collect()
}
