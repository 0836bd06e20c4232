//! The bystander: a client in another process that stores, looks up, loads and verifies all the time, while a test does
//! its worst to the engine or to another client. Nothing of that may happen to the bystander.

use crate::kv::chain;
use crate::process::Process;
use crate::proto::{SchedulerSpec, WorkerSpec, all_stored};
use crate::scheduler::SchedulerSide;
use crate::wait::eventually;
use crate::worker::WorkerSide;
use kvring_adapter::Round;
use kvring_rig::pages::Shape;
use kvring_rig::random::mix;
use kvring_shm_abi::sync::{AtomicBool, Ordering};
use serde::{Deserialize, Serialize};
use std::io::{Read, Write};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Chunks of one round of its traffic.
const CHUNKS: usize = 4;

/// What has become of its traffic so far.
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

/// The process, from the test's side.
pub struct Bystander {
    process: Process,
    latest: Mutex<Traffic>,
}

impl Bystander {
    /// Starts it and waits for its first round. It has a namespace of its own.
    pub fn start(engine: &str) -> Bystander {
        let process = Process::start(&["traffic", engine], [], Stdio::inherit());
        let bystander = Bystander { process, latest: Mutex::default() };
        eventually("the bystander's first round is done", || bystander.now().rounds > 0);
        bystander
    }

    /// What has become of its traffic by now.
    pub fn now(&self) -> Traffic {
        let mut latest = self.latest.lock().expect("no panic under this lock");
        if let Some(line) = self.process.lines.try_iter().last() {
            *latest = serde_json::from_str(&line).expect("a line of the bystander's");
        }
        *latest
    }

    /// Waits until it has begun and finished a round after this call: the engine serves it now.
    pub fn goes_on(&self) {
        let before = self.now().rounds;
        eventually("the bystander goes on", || self.now().rounds >= before + 2);
    }

    /// Ends it, and returns what has become of its traffic.
    pub fn finish(mut self) -> Traffic {
        self.goes_on();
        self.process.hang_up();
        eventually("the bystander ends", || self.process.ended().is_some());
        let status = self.process.wait();
        assert!(status.success(), "the bystander failed: {status:?}");
        self.now()
    }

    /// Ends it; nothing of its traffic went wrong.
    pub fn was_undisturbed(self) {
        let traffic = self.finish();
        assert_eq!(Traffic { rounds: 0, ..traffic }, Traffic::default());
    }
}

/// What the other process does, until its input ends.
pub fn run(engine: &str) {
    let worker = WorkerSpec {
        namespace: 99,
        shape: Shape { page_bytes: [1024, 3072], blocks_per_chunk: 2, blocks: 64, ..Shape::SMALL },
        ..WorkerSpec::new(engine)
    };
    let mut worker = WorkerSide::start(&worker).expect("a worker");
    let scheduler = SchedulerSpec { namespace: 99, ..SchedulerSpec::new(engine) };
    let mut scheduler = SchedulerSide::started(&scheduler);
    let ended = Arc::new(AtomicBool::new(false));
    let flag = ended.clone();
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        // Release; pairs with the Acquire below.
        flag.store(true, Ordering::Release);
    });
    let me = mix(u64::from(std::process::id()));
    let mut traffic = Traffic::default();
    while !ended.load(Ordering::Acquire) {
        round(&mut worker, &mut scheduler, me, &mut traffic);
        // It must neither fill the arena nor take the cores from the processes that the test is about.
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
    let stored = worker.store(Round { source: me as u32, number: count as u32 }, &keys, count);
    if stored != all_stored(CHUNKS) {
        traffic.dropped += u64::from(stored.dropped + stored.skipped);
    }
    let found = scheduler.lookup(&request, 0, &keys);
    traffic.missed += (CHUNKS as u64).saturating_sub(u64::from(found.chunks));
    let loaded = worker.load(&found.handles, count);
    traffic.failed += u64::from(loaded.failed);
    traffic.wrong += u64::from(loaded.wrong);
    scheduler.api().free_lookup_locks(&request, 0, 0);
    scheduler.api().end_session(&request);
    traffic.rounds += 1;
}
