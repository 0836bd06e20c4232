//! The bystander: a client in another process that stores, looks up, loads and verifies all the time, while a test does
//! its worst to the engine or to somebody else. Whatever happens to others must not happen to it.

use crate::engine::{peer_binary, put_down};
use crate::kv::{Shape, chain, mix};
use crate::proto::{SchedulerSpec, WorkerSpec, all_stored};
use crate::scheduler::SchedulerSide;
use crate::wait::{LIMIT, eventually};
use crate::worker::WorkerSide;
use kvring_adapter::Round;
use kvring_shm_abi::sync::{AtomicBool, Ordering};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Chunks of one round of its traffic.
const CHUNKS: usize = 4;

/// What it has come to so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Rounds: store, look up, load, verify, end.
    pub rounds: u64,
    /// Chunks whose store was dropped.
    pub dropped: u64,
    /// Chunks that were stored and not found.
    pub missed: u64,
    /// Chunks that were found and could not be loaded.
    pub failed: u64,
    /// Chunks that were loaded with wrong bytes.
    pub wrong: u64,
}

impl Traffic {
    /// Everything it asked for went as it should.
    #[must_use]
    pub fn undisturbed(&self) -> bool {
        Traffic { rounds: 0, ..*self } == Traffic::default()
    }
}

/// The process, from the test's side.
pub struct Bystander {
    child: Child,
    input: Option<ChildStdin>,
    latest: Arc<Mutex<Traffic>>,
}

impl Bystander {
    /// Starts it and waits for its first round. It has a namespace of its own.
    ///
    /// # Panics
    /// When it does not get going.
    #[must_use]
    pub fn start(engine: &str) -> Bystander {
        let mut child = Command::new(peer_binary())
            .args(["traffic", engine])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a bystander");
        let input = child.stdin.take();
        let stdout = child.stdout.take().expect("its stdout");
        let latest = Arc::new(Mutex::new(Traffic::default()));
        let theirs = latest.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if let Ok(traffic) = serde_json::from_str(&line) {
                    *theirs.lock().expect("no panic under this lock") = traffic;
                }
            }
        });
        let bystander = Bystander { child, input, latest };
        eventually("the bystander's first round is done", || bystander.now().rounds > 0);
        bystander
    }

    /// What it has come to.
    ///
    /// # Panics
    /// Never.
    #[must_use]
    pub fn now(&self) -> Traffic {
        *self.latest.lock().expect("no panic under this lock")
    }

    /// Waits until it has begun and finished a round after this call: the engine serves it now.
    pub fn goes_on(&self) {
        let before = self.now().rounds;
        eventually("the bystander goes on", || self.now().rounds >= before + 2);
    }

    /// Ends it, and returns what it came to.
    ///
    /// # Panics
    /// When it failed or hangs.
    #[must_use]
    pub fn finish(mut self) -> Traffic {
        self.goes_on();
        drop(self.input.take());
        let mut status = None;
        eventually("the bystander ends", || {
            status = self.child.try_wait().expect("our own child");
            status.is_some()
        });
        assert!(status.is_some_and(|status| status.success()), "the bystander failed: {status:?}");
        self.now()
    }

    /// Ends it; nothing of its traffic went wrong.
    ///
    /// # Panics
    /// When something did.
    pub fn was_undisturbed(self) {
        let traffic = self.finish();
        assert!(traffic.undisturbed(), "{traffic:?}");
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        put_down(&mut self.child);
    }
}

/// The other process's side: goes on until its input ends.
///
/// # Panics
/// When the engine does not take it, or a call hangs.
pub fn run(engine: &str) {
    let worker = WorkerSpec {
        namespace: 99,
        shape: Shape { pages: [1024, 3072], blocks_per_chunk: 2, blocks: 64 },
        ..WorkerSpec::new(engine)
    };
    let scheduler = SchedulerSpec { namespace: 99, ..SchedulerSpec::new(engine) };
    let mut worker = WorkerSide::start(&worker).expect("a worker");
    let mut scheduler = SchedulerSide::start(&scheduler);
    worker.wait_ready(LIMIT).expect("a worker that is attached");
    scheduler.client().wait_ready(LIMIT).expect("a scheduler that is attached");
    let ended = Arc::new(AtomicBool::new(false));
    let flag = ended.clone();
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        flag.store(true, Ordering::Release);
    });
    let me = mix(u64::from(std::process::id()));
    let mut traffic = Traffic::default();
    while !ended.load(Ordering::Acquire) {
        round(&mut worker, &mut scheduler, me, &mut traffic);
        // It neither fills the arena nor takes the cores from those it stands by.
        if traffic.rounds.is_multiple_of(32) {
            let _ = scheduler.api().reset_cache();
        }
        std::thread::sleep(Duration::from_millis(1));
        let line = serde_json::to_string(&traffic).expect("JSON");
        if writeln!(std::io::stdout(), "{line}").is_err() {
            return;
        }
    }
}

fn round(worker: &mut WorkerSide, scheduler: &mut SchedulerSide, me: u64, traffic: &mut Traffic) {
    let count = traffic.rounds;
    let keys = chain(me.wrapping_add(count), CHUNKS);
    let request = format!("traffic-{count}");
    let round = Round { source: me as u32, number: count as u32 };
    let stored = worker.store(&request, round, None, &keys, count);
    if stored != all_stored(CHUNKS) {
        traffic.dropped += u64::from(stored.dropped + stored.skipped);
    }
    let found = scheduler.lookup(&request, 0, &keys).expect("a lookup within the limits");
    traffic.missed += (CHUNKS as u64).saturating_sub(u64::from(found.chunks));
    let loaded = worker.load(&request, &found.ranks[0], count);
    traffic.failed += u64::from(loaded.failed);
    traffic.wrong += u64::from(loaded.wrong);
    scheduler.api().free_lookup_locks(&request, 0, 0);
    scheduler.api().end_session(&request);
    traffic.rounds += 1;
}
