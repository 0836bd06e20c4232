//! An engine in a process of its own, and everything that a test does to it from outside.

use crate::isolate::segments;
use crate::wait::{becomes, eventually, until};
use kvring_adapter::EngineView;
use kvring_engine::stats::Snapshot;
use kvring_shm_abi::life::Life;
use kvring_shm_abi::lobby::Lobby;
use kvring_shm_abi::segment::EngineName;
use kvring_shm_abi::slot::SlotState;
use kvring_shm_abi::sync::{AtomicU32, Ordering};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// The binary that plays the other processes of a test. Cargo builds it with the tests of this package.
///
/// # Panics
/// When it is not beside the test's own binary.
#[must_use]
pub fn peer_binary() -> PathBuf {
    // target/<profile>/deps/<test> → target/<profile>/kvring-test-peer
    let exe = std::env::current_exe().expect("this test's own path");
    let candidates = exe.ancestors().skip(1).take(2).map(|dir| dir.join("kvring-test-peer"));
    candidates.into_iter().find(|path| path.is_file()).expect("kvring-test-peer beside the test binary")
}

/// The configuration of a test's engine. It beats faster than usual, and so checks itself more often.
#[must_use]
pub fn overrides(name: &str, arena_mib: u64) -> Value {
    json!({ "name": name, "arena": arena_mib << 20, "slab": 1 << 20, "beat_interval_ms": 2, "start_wait_ms": 30_000 })
}

/// A name that no other test has, in any process.
#[must_use]
pub fn unique_name(tag: &str) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("t-{tag}-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

/// Kills a child process and waits for its end, whatever its state.
pub(crate) fn put_down(child: &mut Child) {
    // SIGKILL also ends a stopped process. It may have ended already.
    let _ = child.kill();
    let _ = child.wait();
}

/// An engine that is told its configuration and serves until it is ended.
pub struct EngineProcess {
    /// Its name.
    pub name: String,
    overrides: Value,
    /// Environment variables of its own.
    environment: Vec<(&'static str, String)>,
    child: Child,
    stopped: bool,
    /// Does dropping it remove what it leaves in `/dev/shm`?
    sweep: bool,
}

/// An engine whose beat has not moved for so long has been stopped by its test.
const STOPPED: Duration = Duration::from_secs(2);

impl EngineProcess {
    /// Starts an engine with an arena of `arena_mib` MiB and waits until it serves all of it.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn start(tag: &str, arena_mib: u64) -> EngineProcess {
        EngineProcess::configured(tag, arena_mib, &json!({}))
    }

    /// The same, with further fields of its configuration.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn configured(tag: &str, arena_mib: u64, fields: &Value) -> EngineProcess {
        let mut overrides = overrides(&unique_name(tag), arena_mib);
        for (key, value) in fields.as_object().expect("fields") {
            overrides[key] = value.clone();
        }
        let engine = EngineProcess::try_start(&overrides);
        let engine = engine.unwrap_or_else(|error| panic!("the engine did not start: {error}"));
        engine.is_allocated();
        engine
    }

    /// Starts an engine with an arena of `arena_mib` MiB in another environment, also for its restarts, and waits until
    /// it serves all of it.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn start_in(environment: &[(&'static str, &str)], tag: &str, arena_mib: u64) -> EngineProcess {
        let environment: Vec<_> =
            environment.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
        let engine = EngineProcess::spawn(&overrides(&unique_name(tag), arena_mib), environment);
        let engine = engine.unwrap_or_else(|error| panic!("the engine did not start: {error}"));
        engine.is_allocated();
        engine
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

    /// Launches an engine with variables in its environment that its restarts do not have, without waiting until it serves:
    /// [`EngineProcess::serves`] does.
    ///
    /// # Panics
    /// When there is no process to be had.
    #[must_use]
    pub fn launched(overrides: &Value, environment: &[(&str, &str)]) -> EngineProcess {
        let name = overrides["name"].as_str().expect("a name").to_owned();
        let child = launch(overrides, &[], environment).expect("an engine process");
        let (overrides, environment) = (overrides.clone(), Vec::new());
        EngineProcess { name, overrides, environment, child, stopped: false, sweep: true }
    }

    /// Starts an engine; the error is what it said.
    ///
    /// # Errors
    /// Its last words.
    pub fn try_start(overrides: &Value) -> Result<EngineProcess, String> {
        EngineProcess::spawn(overrides, Vec::new())
    }

    fn spawn(overrides: &Value, environment: Vec<(&'static str, String)>) -> Result<EngineProcess, String> {
        let name = overrides["name"].as_str().expect("a name").to_owned();
        let child = spawn_engine(overrides, &environment)?;
        let overrides = overrides.clone();
        Ok(EngineProcess { name, overrides, environment, child, stopped: false, sweep: true })
    }

    /// Another environment, for the next restart.
    pub fn move_to(&mut self, environment: &[(&'static str, &str)]) {
        self.environment = environment.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
    }

    /// The same name and configuration again, after [`EngineProcess::kill`] or [`EngineProcess::terminate`].
    ///
    /// # Panics
    /// When it does not start.
    pub fn restart(&mut self) {
        self.try_restart().unwrap_or_else(|error| panic!("no restart: {error}"));
    }

    /// The same where it may not start; the error is what it said.
    ///
    /// # Errors
    /// Its last words.
    pub fn try_restart(&mut self) -> Result<(), String> {
        self.child = spawn_engine(&self.overrides, &self.environment)?;
        self.stopped = false;
        Ok(())
    }

    /// The same name and configuration again, with further variables in its environment.
    ///
    /// # Errors
    /// How it ended, where it did before it served.
    ///
    /// # Panics
    /// When there is no process to be had.
    pub fn restart_with(&mut self, environment: &[(&str, &str)]) -> Result<(), ExitStatus> {
        self.launch(environment);
        self.serves()
    }

    /// Starts it again without waiting until it serves: [`EngineProcess::serves`] does.
    ///
    /// # Panics
    /// When there is no process to be had.
    pub fn launch(&mut self, environment: &[(&str, &str)]) {
        self.child = launch(&self.overrides, &self.environment, environment).expect("an engine process");
        self.stopped = false;
    }

    /// Waits until an engine that was launched serves.
    ///
    /// # Errors
    /// How it ended, where it did before that.
    ///
    /// # Panics
    /// When it was not launched, or has been waited for.
    pub fn serves(&mut self) -> Result<(), ExitStatus> {
        if says_serving(&mut self.child) {
            return Ok(());
        }
        Err(self.child.wait().expect("our own child"))
    }

    /// Waits until it has stopped itself, as a fail point asked it to.
    pub fn has_stopped(&mut self) {
        all_stopped(self.child.id());
        self.stopped = true;
    }

    /// How it ended, if it has.
    ///
    /// # Panics
    /// When it cannot be waited for.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("our own child")
    }

    /// The same name with another arena, after [`EngineProcess::kill`] or [`EngineProcess::terminate`].
    ///
    /// # Panics
    /// When it does not start.
    pub fn restart_with_arena(&mut self, arena_mib: u64) {
        self.overrides = overrides(&self.name, arena_mib);
        self.restart();
    }

    /// Further fields of the configuration, for the next restart.
    ///
    /// # Panics
    /// For something that is no object.
    pub fn reconfigure(&mut self, fields: &Value) {
        for (key, value) in fields.as_object().expect("fields") {
            self.overrides[key] = value.clone();
        }
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).expect("a signal to our own child");
    }

    /// `kill -9`, and waits until the process is gone.
    pub fn kill(&mut self) {
        put_down(&mut self.child);
        self.stopped = false;
    }

    /// SIGTERM: a clean end. Returns its exit code.
    ///
    /// # Panics
    /// When it cannot be waited for.
    pub fn terminate(&mut self) -> Option<i32> {
        self.signal(Signal::SIGTERM);
        self.child.wait().expect("our own child").code()
    }

    /// SIGSTOP, and waits until all its threads stand still.
    pub fn stop(&mut self) {
        self.signal(Signal::SIGSTOP);
        all_stopped(self.child.id());
        self.stopped = true;
    }

    /// Sends it a signal.
    ///
    /// # Panics
    /// When it is gone.
    pub fn send(&self, signal: Signal) {
        self.signal(signal);
    }

    /// SIGCONT.
    pub fn resume(&mut self) {
        self.signal(Signal::SIGCONT);
        self.stopped = false;
    }

    /// Is the process there (and not a zombie)?
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// The engine's own segment, read-only.
    ///
    /// # Panics
    /// When it is not there.
    #[must_use]
    pub fn view(&self) -> EngineView {
        view_of(&self.name)
    }

    /// A counter or gauge of its statistics, of a moment after this call began: gauges are published with each tick,
    /// just after the beat, so one whole tick is waited for. A stopped engine's are as old as they are.
    ///
    /// # Panics
    /// For a name that does not exist.
    #[must_use]
    pub fn stat(&self, name: &str) -> u64 {
        let view = self.view();
        let (before, began) = (view.segment.epoch().beat(), Instant::now());
        while view.segment.epoch().beat().wrapping_sub(before) < 2 && began.elapsed() < STOPPED {
            std::thread::sleep(Duration::from_millis(1));
        }
        stat_of(&view, name)
    }

    /// Waits until a counter or gauge has this value.
    ///
    /// # Panics
    /// When the engine ends meanwhile: its statistics do not change any more.
    pub fn stat_becomes(&self, name: &str, value: u64) {
        let view = self.view();
        let task = PathBuf::from(format!("/proc/{0}/task/{0}", self.pid()));
        becomes(name, value, || {
            let is_over = thread_state(&task).is_none_or(|state| state == 'Z');
            let now = stat_of(&view, name);
            assert!(!is_over || now == value, "{name}: expected {value}, it is {now}, and the engine has ended");
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
    ///
    /// # Panics
    /// When it cannot be opened.
    #[must_use]
    pub fn lobby(&self) -> Lobby {
        let name = EngineName::new(&self.name).expect("a good name");
        self.view().open_lobby(&name).expect("the lobby")
    }

    /// Nothing of any client is left: no lease, no slot being written, no forming chunk, no channel, and `clients`
    /// attached. The engine has not found anything wrong with itself.
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
        becomes("segments of clients", Vec::<String>::new(), || {
            segments(&self.name).into_iter().filter(|name| name.contains(".client.")).collect()
        });
        self.is_sound();
    }

    /// The self-check has gone through everything, and found nothing. For an engine without traffic: it checks while
    /// it is idle, 64 entries with each beat.
    ///
    /// # Panics
    /// When it has found something.
    pub fn is_sound(&self) {
        self.beats(200);
        let view = self.view();
        assert_eq!(view.segment.info().unhealthy.load(Ordering::Relaxed), 0, "a self-check failed");
        assert_eq!(stat_of(&view, "check_failures"), 0);
    }

    /// The slots that somebody may be writing, for a chunk or for none, with the entry that writes each.
    #[must_use]
    pub fn written_slots(&self) -> BTreeMap<u32, u8> {
        let view = self.view();
        let words = (0..).map_while(|slot| Some((slot, view.segment.slot(slot)?.word())));
        let written =
            words.filter(|(_, word)| matches!(word.state, SlotState::Writing | SlotState::Orphaned));
        written.map(|(slot, word)| (slot, word.owner)).collect()
    }

    /// A file of the engine's in `/dev/shm`: `engine`, `lobby` or `arena`.
    #[must_use]
    pub fn file(&self, segment: &str) -> PathBuf {
        PathBuf::from(format!("/dev/shm/kvring.{}.{segment}", self.name))
    }

    /// Leaves what it leaves.
    pub fn keep_segments(&mut self) {
        self.sweep = false;
    }
}

/// How many entries of the client table are claimed, by the living or the dead.
#[must_use]
pub fn claimed_entries(lobby: &Lobby) -> usize {
    lobby.life_words.iter().filter(|word| word.life() != Life::Unclaimed).count()
}

/// Waits until every thread of a process has stopped.
///
/// # Panics
/// When the process is gone, or does not stop.
pub fn all_stopped(pid: u32) {
    let tasks = format!("/proc/{pid}/task");
    eventually("every thread of a process has stopped", || {
        let tasks = std::fs::read_dir(&tasks).expect("the process's threads");
        tasks.flatten().all(|task| thread_state(&task.path()).is_none_or(|state| state == 'T'))
    });
}

/// Has this process stopped?
#[must_use]
pub fn has_stopped(pid: u32) -> bool {
    thread_state(Path::new(&format!("/proc/{pid}/task/{pid}"))) == Some('T')
}

/// `R`, `S`, `T` …, or `None` when the thread is gone.
#[must_use]
pub fn thread_state(task: &Path) -> Option<char> {
    let stat = std::fs::read_to_string(task.join("stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

/// The segment of the engine of this name, read-only.
///
/// # Panics
/// When it is not there.
#[must_use]
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
///
/// # Panics
/// For a name that does not exist.
#[must_use]
pub fn stat_of(view: &EngineView, name: &str) -> u64 {
    let snapshot = Snapshot::read(&view.segment.stats).expect("our own statistics table");
    let found = snapshot.iter().find(|(stat, _)| stat.name() == name);
    found.unwrap_or_else(|| panic!("no statistic {name}")).1
}

fn launch(
    overrides: &Value,
    environment: &[(&'static str, String)],
    further: &[(&str, &str)],
) -> std::io::Result<Child> {
    let stderr = if std::env::var_os("KVRING_LOG").is_some() { Stdio::inherit() } else { Stdio::piped() };
    Command::new(peer_binary())
        .args(["engine", &overrides.to_string()])
        .envs(environment.iter().map(|(name, value)| (*name, value.as_str())))
        .envs(further.iter().copied())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(stderr)
        .spawn()
}

/// Waits for its first line: false where it ended without.
fn says_serving(child: &mut Child) -> bool {
    let stdout = child.stdout.take().expect("an engine that nobody has listened to");
    let mut line = String::new();
    let _ = BufReader::new(stdout).read_line(&mut line);
    line.trim() == "serving"
}

fn spawn_engine(overrides: &Value, environment: &[(&'static str, String)]) -> Result<Child, String> {
    let mut child = launch(overrides, environment, &[]).map_err(|error| error.to_string())?;
    if says_serving(&mut child) {
        return Ok(child);
    }
    put_down(&mut child);
    let mut said = String::new();
    let _ = child.stderr.take().map(|mut stderr| stderr.read_to_string(&mut said));
    Err(said.trim().to_owned())
}

impl Drop for EngineProcess {
    fn drop(&mut self) {
        put_down(&mut self.child);
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
