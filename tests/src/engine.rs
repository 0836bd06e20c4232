//! An engine in a process of its own, and everything that a test does to it from outside.

use crate::held::HeldBackend;
use crate::isolate::segments;
use crate::process::Process;
use crate::proto::{SchedulerSpec, WorkerSpec};
use crate::scheduler::SchedulerSide;
use crate::traffic::Bystander;
use crate::wait::{becomes, eventually, until};
use crate::worker::WorkerSide;
use kvring_adapter::EngineView;
use kvring_engine::stats::Snapshot;
use kvring_rig::child::thread_state;
use kvring_rig::wire::Handle;
use kvring_shm_abi::chunk::ChunkWord;
use kvring_shm_abi::life::Life;
use kvring_shm_abi::lobby::Lobby;
use kvring_shm_abi::segment::EngineName;
use kvring_shm_abi::slot::{SlotContent, SlotState};
use kvring_shm_abi::sync::{AtomicU32, Ordering};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The configuration of a test's engine. It beats faster than usual, and so checks itself more often.
pub fn overrides(name: &str, arena_mib: u64) -> Value {
    json!({ "name": name, "arena": arena_mib << 20, "slab": 1 << 20, "beat_interval_ms": 2, "start_wait_ms": 30_000 })
}

/// A configuration with these fields added or replaced.
pub fn merged(mut overrides: Value, fields: &Value) -> Value {
    for (key, value) in fields.as_object().expect("fields") {
        overrides[key] = value.clone();
    }
    overrides
}

/// A name that no other test has, in any process.
pub fn unique_name(tag: &str) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("t-{tag}-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

/// An engine that is told its configuration and serves until it is ended. What it leaves in `/dev/shm` is removed when
/// it is dropped.
pub struct EngineProcess {
    pub name: String,
    overrides: Value,
    /// Variables that are added to its environment, also when it is restarted.
    environment: Vec<(&'static str, String)>,
    process: Process,
    sweep: bool,
}

impl Deref for EngineProcess {
    type Target = Process;

    fn deref(&self) -> &Process {
        &self.process
    }
}

impl DerefMut for EngineProcess {
    fn deref_mut(&mut self) -> &mut Process {
        &mut self.process
    }
}

/// An engine whose beat has not moved for so long has been stopped by its test.
const STOPPED: Duration = Duration::from_secs(2);

/// Starts an engine's process, with what is in its environment always and what this once.
fn launched(overrides: &Value, always: &[(&'static str, String)], once: &[(&str, &str)]) -> Process {
    let stderr = if std::env::var_os("KVRING_LOG").is_some() { Stdio::inherit() } else { Stdio::piped() };
    let environment = always.iter().map(|(name, value)| (*name, value.as_str())).chain(once.iter().copied());
    Process::start(&["engine", &overrides.to_string()], environment, stderr)
}

/// Waits for an engine's first line: false where it has ended without one.
fn says_serving(process: &Process) -> bool {
    process.lines.recv().is_ok_and(|line| line == "serving")
}

impl EngineProcess {
    /// Starts an engine with an arena of `arena_mib` MiB and waits until it serves all of it.
    pub fn start(tag: &str, arena_mib: u64) -> EngineProcess {
        EngineProcess::configured(tag, arena_mib, &json!({}))
    }

    /// The same with further fields of its configuration.
    pub fn configured(tag: &str, arena_mib: u64, fields: &Value) -> EngineProcess {
        let overrides = merged(overrides(&unique_name(tag), arena_mib), fields);
        let engine = EngineProcess::try_start(&overrides);
        let engine = engine.unwrap_or_else(|error| panic!("the engine did not start: {error}"));
        engine.is_allocated();
        engine
    }

    /// The same as [`EngineProcess::start`] with variables in its environment, also for its restarts.
    pub fn start_in(environment: &[(&'static str, &str)], tag: &str, arena_mib: u64) -> EngineProcess {
        let mut engine = EngineProcess::launched(&overrides(&unique_name(tag), arena_mib), environment);
        engine.move_to(environment);
        engine.serves().unwrap_or_else(|status| panic!("the engine did not start: {status}"));
        engine.is_allocated();
        engine
    }

    /// An engine with an arena of 16 MiB, a worker, and a scheduler.
    pub fn with_clients(tag: &str) -> (EngineProcess, WorkerSide, SchedulerSide) {
        let engine = EngineProcess::start(tag, 16);
        let (worker, scheduler) = (engine.worker(), engine.scheduler());
        (engine, worker, scheduler)
    }

    /// An engine with an arena of 16 MiB, and a bystander.
    pub fn with_bystander(tag: &str) -> (EngineProcess, Bystander) {
        let engine = EngineProcess::start(tag, 16);
        let bystander = Bystander::start(&engine.name);
        (engine, bystander)
    }

    /// Launches an engine with variables in its environment that its restarts do not have, and does not wait until it
    /// serves: [`EngineProcess::serves`] does.
    pub fn launched(overrides: &Value, environment: &[(&str, &str)]) -> EngineProcess {
        let name = overrides["name"].as_str().expect("a name").to_owned();
        let process = launched(overrides, &[], environment);
        EngineProcess { name, overrides: overrides.clone(), environment: Vec::new(), process, sweep: true }
    }

    /// Starts an engine. The error is what it said last.
    pub fn try_start(overrides: &Value) -> Result<EngineProcess, String> {
        let mut engine = EngineProcess::launched(overrides, &[]);
        if says_serving(&engine.process) {
            return Ok(engine);
        }
        engine.sweep = false;
        Err(engine.process.last_words())
    }

    /// The variables in its environment after the next restart.
    pub fn move_to(&mut self, environment: &[(&'static str, &str)]) {
        self.environment = environment.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
    }

    /// Further fields of its configuration after the next restart.
    pub fn reconfigure(&mut self, fields: &Value) {
        self.overrides = merged(self.overrides.take(), fields);
    }

    /// Starts it again with the same name and configuration, after [`Process::kill`] or [`EngineProcess::terminate`].
    pub fn restart(&mut self) {
        self.try_restart().unwrap_or_else(|error| panic!("no restart: {error}"));
    }

    /// `kill -9`, and a new start.
    pub fn kill_and_restart(&mut self) {
        self.kill();
        self.restart();
    }

    /// The same as [`EngineProcess::restart`] where it may not start. The error is what it said last.
    pub fn try_restart(&mut self) -> Result<(), String> {
        self.launch(&[]);
        if says_serving(&self.process) { Ok(()) } else { Err(self.process.last_words()) }
    }

    /// Starts it again with another arena.
    pub fn restart_with_arena(&mut self, arena_mib: u64) {
        self.reconfigure(&json!({ "arena": arena_mib << 20 }));
        self.restart();
    }

    /// The same as [`EngineProcess::restart`] with further variables in its environment. The error is how it ended before
    /// it served.
    pub fn restart_with(&mut self, environment: &[(&str, &str)]) -> Result<(), ExitStatus> {
        self.launch(environment);
        self.serves()
    }

    /// The same, and does not wait until it serves: [`EngineProcess::serves`] does.
    pub fn launch(&mut self, environment: &[(&str, &str)]) {
        self.process = launched(&self.overrides, &self.environment, environment);
    }

    /// Waits until an engine that was launched serves. The error is how it ended before that.
    pub fn serves(&mut self) -> Result<(), ExitStatus> {
        if says_serving(&self.process) { Ok(()) } else { Err(self.process.wait()) }
    }

    /// Waits until the whole arena has its memory: a store that comes earlier may be dropped.
    pub fn is_allocated(&self) {
        self.stat_becomes("arena_bytes_allocated", self.view().identity.geometry.arena_bytes);
    }

    /// The same for an engine that may die before it has.
    pub fn is_allocated_or_dead(&mut self) {
        let view = self.view();
        let bytes = view.identity.geometry.arena_bytes;
        eventually("the arena is allocated, or its engine dead", || {
            stat_of(&view, "arena_bytes_allocated") == bytes || self.ended().is_some()
        });
    }

    /// A worker of namespace 1, attached and registered.
    pub fn worker(&self) -> WorkerSide {
        WorkerSide::start(&WorkerSpec::new(&self.name)).expect("a worker")
    }

    /// The same, and the backend that holds its copies.
    pub fn held_worker(&self) -> (WorkerSide, Arc<HeldBackend>) {
        let backend = HeldBackend::new();
        let worker = WorkerSide::copying_with(&WorkerSpec::new(&self.name), backend.clone());
        (worker.expect("a worker"), backend)
    }

    /// A scheduler of namespace 1, attached.
    pub fn scheduler(&self) -> SchedulerSide {
        SchedulerSide::started(&SchedulerSpec::new(&self.name))
    }

    /// SIGTERM: a clean end. Returns its exit code.
    pub fn terminate(&mut self) -> Option<i32> {
        self.send(Signal::SIGTERM);
        self.wait().code()
    }

    /// The engine's own segment, read-only.
    pub fn view(&self) -> EngineView {
        view_of(&self.name)
    }

    /// The id of the namespace that tests know by this number: see [`fingerprint`](crate::proto::fingerprint).
    pub fn namespace(&self, number: u64) -> u32 {
        let id = self.view().segment.find_namespace(&crate::proto::fingerprint(number));
        id.unwrap_or_else(|| panic!("namespace {number} is not registered"))
    }

    /// A counter or gauge of its statistics, of a moment after this call began: gauges are published with each tick,
    /// just after the beat, so one whole tick is waited for. A stopped engine's are as old as they are.
    pub fn stat(&self, name: &str) -> u64 {
        let view = self.view();
        let (before, began) = (view.segment.epoch().beat(), Instant::now());
        while view.segment.epoch().beat().wrapping_sub(before) < 2 && began.elapsed() < STOPPED {
            std::thread::sleep(Duration::from_millis(1));
        }
        stat_of(&view, name)
    }

    /// Waits until a counter or gauge has this value. An engine that has ended changes none any more.
    pub fn stat_becomes(&self, name: &str, value: u64) {
        let (view, task) = (self.view(), self.task());
        becomes(name, value, || {
            let is_over = thread_state(&task).is_none_or(|state| state == 'Z');
            let now = stat_of(&view, name);
            assert!(
                !is_over || now == value,
                "{name}: expected {value}, it is {now}, and the engine has ended"
            );
            now
        });
    }

    /// Waits until the engine has gone on: its beat has moved `beats` times.
    pub fn beats(&self, beats: u32) {
        let view = self.view();
        let before = view.segment.epoch().beat();
        eventually("the engine's beat moves", || view.segment.epoch().beat().wrapping_sub(before) >= beats);
    }

    /// The lobby.
    pub fn lobby(&self) -> Lobby {
        let name = EngineName::new(&self.name).expect("a good name");
        self.view().open_lobby(&name).expect("the lobby")
    }

    /// These clients go, and nothing of any client is left.
    pub fn settles_without<T>(&self, clients: T) {
        drop(clients);
        self.settles(0);
    }

    /// These clients go, and so does the bystander, to which nothing has happened. Nothing of any client is left.
    pub fn settles_beside<T>(&self, bystander: Bystander, clients: T) {
        drop(clients);
        bystander.was_undisturbed();
        self.settles(0);
    }

    /// Nothing of any client is left: no lease, no slot that is being written, no forming chunk, no channel. `clients` are
    /// attached, and the engine has found nothing wrong with itself.
    pub fn settles(&self, clients: u64) {
        let view = self.view();
        let all = [
            "leases",
            "pins",
            "slots_writing",
            "slots_orphaned",
            "chunks_forming",
            "chunks_hidden",
            "clients",
            "check_failures",
        ];
        let now = || all.map(|name| stat_of(&view, name));
        becomes(&format!("{all:?}"), [0, 0, 0, 0, 0, 0, clients, 0], now);
        let lobby = self.lobby();
        becomes("claimed entries", clients as usize, || claimed_entries(&lobby));
        becomes("channels with a name", Vec::<String>::new(), || channels(&self.name));
        self.is_sound();
    }

    /// The self-check has gone through everything, and found nothing. For an engine without traffic: it checks while
    /// it is idle, 64 entries with each beat.
    pub fn is_sound(&self) {
        self.beats(200);
        let view = self.view();
        assert_eq!(view.segment.info().unhealthy.load(Ordering::Relaxed), 0, "a self-check failed");
        assert_eq!(stat_of(&view, "check_failures"), 0);
    }

    /// The slots that somebody may be writing, for a chunk or for none, with the entry that writes each.
    pub fn written_slots(&self) -> BTreeMap<u32, u8> {
        let view = self.view();
        let words = (0..).map_while(|slot| Some((slot, view.segment.slot(slot)?.word())));
        let written =
            words.filter(|(_, word)| matches!(word.state, SlotState::Writing | SlotState::Orphaned));
        written.map(|(slot, word)| (slot, word.owner)).collect()
    }

    /// A rank's shard of a chunk that is there, in a namespace of `world` ranks.
    pub fn shard(&self, handle: &Handle, world: u32, rank: u32) -> SlotContent {
        let view = self.view();
        let (_, content) = shard_of(&view, handle.chunk().word, world, rank).expect("a chunk that is there");
        content
    }

    /// A file of the engine's in `/dev/shm`: `engine`, `lobby` or `arena`.
    pub fn file(&self, segment: &str) -> PathBuf {
        PathBuf::from(format!("/dev/shm/kvring.{}.{segment}", self.name))
    }

    /// What it leaves in `/dev/shm` stays there when it is dropped.
    pub fn keep_segments(&mut self) {
        self.sweep = false;
    }
}

/// The slot of a rank's shard of this chunk, and what is in it; `None` if the chunk is not there any more.
pub fn shard_of(view: &EngineView, word: ChunkWord, world: u32, rank: u32) -> Option<(u32, SlotContent)> {
    let content = view.segment.chunks.find(word)?;
    let slot = view.segment.chunks.slot(&content, world, rank)?;
    Some((slot, view.segment.slot(slot)?.read()))
}

/// The channels of clients that have a name in `/dev/shm`.
pub fn channels(engine: &str) -> Vec<String> {
    segments(engine).into_iter().filter(|name| name.contains(".client.")).collect()
}

/// How many entries of the client table are claimed, by the living or the dead.
pub fn claimed_entries(lobby: &Lobby) -> usize {
    lobby.life_words.iter().filter(|word| word.life() != Life::Unclaimed).count()
}

/// The segment of the engine of this name, read-only.
pub fn view_of(name: &str) -> EngineView {
    let name = EngineName::new(name).expect("a good name");
    EngineView::open(&name).unwrap_or_else(|error| panic!("the engine's segment: {error}"))
}

/// Does it come to be so before this engine has beaten so often? A bound in the engine's own time.
pub fn within_beats(view: &EngineView, beats: u32, mut state: impl FnMut() -> bool) -> bool {
    let began = view.segment.epoch().beat();
    until(format_args!("it is so, or the engine has beaten {beats} times"), || {
        // Looked at before the state, or what came with the last beat would be missed.
        let is_over = view.segment.epoch().beat().wrapping_sub(began) >= beats;
        if state() { Some(true) } else { is_over.then_some(false) }
    })
}

/// A counter or gauge of an engine's statistics.
pub fn stat_of(view: &EngineView, name: &str) -> u64 {
    let snapshot = Snapshot::read(&view.segment.stats).expect("our own statistics table");
    let found = snapshot.iter().find(|(stat, _)| stat.name() == name);
    found.unwrap_or_else(|| panic!("no statistic {name}")).1
}

impl Drop for EngineProcess {
    fn drop(&mut self) {
        self.kill();
        if self.sweep {
            remove_segments(&self.name);
        }
    }
}

/// Removes everything that an engine's name has in `/dev/shm`.
pub fn remove_segments(name: &str) {
    for segment in segments(name) {
        let _ = std::fs::remove_file(Path::new("/dev/shm").join(segment));
    }
}

/// Removes what an engine's name has in `/dev/shm` when it is dropped, also by a panic.
pub struct Sweep(pub String);

impl Drop for Sweep {
    fn drop(&mut self) {
        remove_segments(&self.0);
    }
}
