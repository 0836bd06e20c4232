//! Deaths of every kind, of an engine and of a client: each is noticed at once by whoever calls, sleeps, or does nothing,
//! and leaves nothing behind. Who is merely stopped is not dead.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_adapter::{CallError, Client, ClientOptions, Role, Round};
use kvring_shm_abi::probe::has_robust_lists;
use kvring_shm_abi::sync::{AtomicU32, Ordering};
use kvring_tests::crash::cast::{SHARD, SOLO, scheduler_spec, worker_spec};
use kvring_tests::ends::{ENDS, End};
use kvring_tests::engine::{EngineProcess, thread_state};
use kvring_tests::held::HeldBackend;
use kvring_tests::kv::chain;
use kvring_tests::peer::Peer;
use kvring_tests::proto::{Ask, ClientSpec, Tell, all_loaded, all_stored};
use kvring_tests::scheduler::SchedulerSide;
use kvring_tests::wait::{LIMIT, becomes, eventually, within};
use kvring_tests::worker::WorkerSide;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// No notice of it where a file lock stands in: that lasts as long as the process.
const KEEPERS_END: &str = "the end of its keepers";

fn round(number: u32) -> Round {
    Round { source: 1, number }
}

fn fast() -> serde_json::Value {
    json!({ "beat_interval_ms": 1, "client_share": 1.0 })
}

/// A client whose calls would wait for ever if nobody noticed that there is no answer to come: spinning all the time, or
/// sleeping from the first moment on.
fn client(engine: &str, spin: Duration) -> Arc<Client> {
    let options = ClientOptions { spin: Some(spin), ..ClientSpec::new(engine).options() };
    let client = Client::new(Role::Scheduler, options).unwrap();
    client.wait_ready(LIMIT).unwrap();
    client
}

/// A thread that is in a call which nobody answers.
struct Caller {
    thread: std::thread::JoinHandle<Result<(), CallError>>,
    tid: Arc<AtomicU32>,
}

impl Caller {
    fn begin(client: &Arc<Client>, state: char) -> Caller {
        let tid = Arc::new(AtomicU32::new(0));
        let (theirs, client) = (tid.clone(), client.clone());
        let thread = std::thread::spawn(move || {
            theirs.store(nix::unistd::gettid().as_raw() as u32, Ordering::Release);
            client.noop()
        });
        eventually("a thread that calls", || tid.load(Ordering::Acquire) != 0);
        let task = PathBuf::from(format!("/proc/self/task/{}", tid.load(Ordering::Acquire)));
        eventually("a thread that waits for its answer", || thread_state(&task) == Some(state));
        Caller { thread, tid }
    }

    fn fails_at_once(self, how: &str) {
        let error = within(Duration::ZERO, how, || self.thread.join().unwrap()).unwrap_err();
        assert!(
            matches!(error, CallError::Dead | CallError::Restarted | CallError::Degraded(_)),
            "{how}: {error} (thread {})",
            self.tid.load(Ordering::Relaxed)
        );
    }
}

/// One death of an engine under everybody's eyes, and its successor.
fn an_engine_dies(how: &str, end: End, kill: impl FnOnce(&EngineProcess)) {
    let mut engine = EngineProcess::configured("death", 4, &fast());
    engine.kill();
    engine.restart_with(&[(ENDS, &end.name())]).unwrap();
    let [spins, sleeps, idle] =
        [LIMIT, Duration::ZERO, Duration::ZERO].map(|spin| client(&engine.name, spin));
    let backend = HeldBackend::new();
    let spec = worker_spec(&engine.name, SOLO, 1, 0, SHARD);
    let mut worker = WorkerSide::copying_with(&spec, backend.clone()).unwrap();
    let mut reader = WorkerSide::start(&spec).unwrap();
    for worker in [&worker, &reader] {
        worker.wait_ready(LIMIT).unwrap();
    }
    let mut scheduler = SchedulerSide::start(&scheduler_spec(&engine.name, SOLO, 1));
    scheduler.client().wait_ready(LIMIT).unwrap();
    assert_eq!(reader.store("r", round(1), None, &chain(1, 4), 1), all_stored(4));
    let found = scheduler.lookup("held", 0, &chain(1, 4)).unwrap();
    backend.hold();
    let job = worker.submit_store("r", round(2), None, &chain(2, 4), 2).unwrap();
    backend.holds(1);
    // The service thread hangs where it is: nobody is answered any more.
    engine.send(Signal::SIGUSR1);
    let still = engine.view();
    eventually("the service thread hangs", || {
        let beat = still.segment.epoch().beat();
        std::thread::sleep(Duration::from_millis(20));
        still.segment.epoch().beat() == beat
    });
    let callers = [Caller::begin(&spins, 'R'), Caller::begin(&sleeps, 'S')];
    kill(&engine);
    for caller in callers {
        caller.fails_at_once(how);
    }
    let next = within(Duration::ZERO, how, || idle.noop());
    assert!(next.is_err(), "{how}: an idle client's next call");
    for client in [&spins, &sleeps, &idle] {
        assert!(!client.is_healthy(), "{how}");
    }
    // A copy is not abandoned, and a load needs no engine.
    assert_eq!(worker.report_of(job), None, "{how}: a copy still runs");
    assert_eq!(reader.load("held", &found.ranks[0], 1), all_loaded(4), "{how}");
    // What is left of the process, if there is anything: it holds the lock on the name.
    engine.kill();
    engine.restart();
    if end == End::Panic {
        // What it held is not to be trusted. The worker gives its old arena up when nothing is copied into it any more.
        assert_eq!(engine.stat("warm_start"), 0, "{how}");
        backend.let_go();
        assert_eq!(worker.finished_store(job).dropped, 4, "{how}");
        worker.wait_ready(LIMIT).unwrap();
        drop((spins, sleeps, idle, worker, reader, scheduler));
        return engine.settles(0);
    }
    for client in [&spins, &sleeps, &idle, worker.client(), reader.client(), scheduler.client()] {
        client.wait_ready(LIMIT).unwrap();
    }
    assert_eq!(engine.stat("warm_start"), 1, "{how}");
    backend.let_go();
    assert_eq!(worker.finished_store(job), all_stored(4), "{how}");
    let found = scheduler.lookup("after", 0, &chain(2, 4)).unwrap();
    assert_eq!(reader.load("after", &found.ranks[0], 2), all_loaded(4), "{how}");
    scheduler.api().end_session("held");
    scheduler.api().end_session("after");
    drop((spins, sleeps, idle, worker, reader, scheduler));
    engine.settles(0);
}

#[test]
fn an_engine_that_is_killed_is_noticed() {
    an_engine_dies("SIGKILL", End::Abort, |engine| engine.send(Signal::SIGKILL));
}

#[test]
fn an_engine_that_is_asked_to_stop_and_then_killed_is_noticed() {
    an_engine_dies("SIGTERM, SIGKILL", End::Abort, |engine| {
        // It cannot: its service thread hangs.
        engine.send(Signal::SIGTERM);
        engine.send(Signal::SIGKILL);
    });
}

#[test]
fn an_engine_that_ends_in_any_other_way_is_noticed() {
    // A file lock belongs to the process: it says nothing of a thread that ends alone (see `claims`).
    for end in End::ALL.into_iter().filter(|end| *end != End::Thread || has_robust_lists()) {
        an_engine_dies(&format!("{end:?}"), end, |engine| engine.send(Signal::SIGUSR2));
    }
}

/// A worker with a copy that runs and a scheduler with a lease, in another process.
fn busy_peer(engine: &str, source: u32) -> Peer {
    let mut peer = Peer::spawn();
    for ask in [
        Ask::HeldWorker(Box::new(worker_spec(engine, SOLO, 1, 0, SHARD))),
        Ask::Scheduler(Box::new(scheduler_spec(engine, SOLO, 1))),
        Ask::WaitReady,
        Ask::HoldAStore { round: (source, 1), keys: chain(source.into(), 8), version: source.into() },
    ] {
        let told = peer.ask(&ask);
        assert!(matches!(told, Tell::Done), "{ask:?}: {told:?}");
    }
    peer
}

#[test]
fn a_client_that_dies_in_any_way_leaves_nothing() {
    let engine = EngineProcess::configured("client-death", 4, &fast());
    let mut worker = WorkerSide::start(&worker_spec(&engine.name, SOLO, 1, 0, SHARD)).unwrap();
    worker.wait_ready(LIMIT).unwrap();
    let keys = chain(1, 4);
    assert_eq!(worker.store("r", round(1), None, &keys, 1), all_stored(4));
    type Death = fn(&mut Peer);
    let deaths: [(&str, Death); 6] = [
        ("SIGKILL", |peer| peer.kill()),
        ("SIGKILL while it is stopped", |peer| {
            peer.stop();
            peer.kill();
        }),
        ("a segmentation fault", |peer| assert!(peer.try_ask(&Ask::End { how: End::Segv as u32 }).is_none())),
        ("abort", |peer| assert!(peer.try_ask(&Ask::End { how: End::Abort as u32 }).is_none())),
        // Its pipes stay open in the other program.
        ("exec", |peer| peer.begin(&Ask::End { how: End::Exec as u32 })),
        (KEEPERS_END, |peer| assert!(matches!(peer.ask(&Ask::EndKeepers), Tell::Done))),
    ];
    for (number, (how, death)) in (0..).zip(deaths) {
        let mut peer = busy_peer(&engine.name, 2);
        assert_eq!(peer.lookup("theirs", number, &keys).chunks, 4);
        engine.stat_becomes("slots_writing", 8);
        assert_eq!((engine.stat("leases"), engine.stat("clients")), (1, 3), "{how}");
        if how == KEEPERS_END && !has_robust_lists() {
            drop(peer);
            continue;
        }
        death(&mut peer);
        becomes(how, [0; 3], || ["leases", "pins", "slots_writing"].map(|name| engine.stat(name)));
        engine.settles(1);
    }
    drop(worker);
    engine.settles(0);
}

/// The kernel marks their words all the same; the next engine finds them so.
#[test]
fn clients_that_die_while_there_is_no_engine_leave_nothing() {
    let mut engine = EngineProcess::configured("nobody", 4, &fast());
    let mut worker = WorkerSide::start(&worker_spec(&engine.name, SOLO, 1, 0, SHARD)).unwrap();
    let mut scheduler = SchedulerSide::start(&scheduler_spec(&engine.name, SOLO, 1));
    worker.wait_ready(LIMIT).unwrap();
    scheduler.client().wait_ready(LIMIT).unwrap();
    assert_eq!(worker.store("r", round(1), None, &chain(1, 4), 1), all_stored(4));
    for number in 0..4 {
        let mut peers = [busy_peer(&engine.name, 2), busy_peer(&engine.name, 3)];
        for peer in &mut peers {
            assert_eq!(peer.lookup("theirs", number, &chain(1, 4)).chunks, 4);
        }
        assert_eq!((engine.stat("slots_writing"), engine.stat("leases")), (16, 2));
        let [first, second] = &mut peers;
        if number % 2 == 0 {
            engine.kill();
            first.kill();
        } else {
            first.kill();
            engine.kill();
        }
        engine.restart();
        if number >= 2 {
            // While its word is being looked at, perhaps.
            second.kill();
        }
        worker.wait_ready(LIMIT).unwrap();
        scheduler.client().wait_ready(LIMIT).unwrap();
        second.kill();
        engine.settles(2);
        let found = scheduler.lookup("r", number, &chain(1, 4)).unwrap();
        assert_eq!(worker.load("r", &found.ranks[0], 1), all_loaded(4));
        scheduler.api().end_session("r");
    }
    drop((worker, scheduler));
    engine.settles(0);
}

#[test]
fn a_forked_child_does_not_keep_its_parents_entry_alive() {
    let engine = EngineProcess::configured("client-fork", 4, &fast());
    let mut peer = busy_peer(&engine.name, 2);
    let Tell::Count(child) = peer.ask(&Ask::Fork) else { panic!("no child") };
    let child = Pid::from_raw(child as i32);
    engine.stat_becomes("slots_writing", 8);
    peer.kill();
    engine.settles(0);
    assert_eq!(kill(child, None), Ok(()), "the child lives on all the time");
    kill(child, Signal::SIGKILL).unwrap();
}

/// Its mappings, and its hold on the name, go with the last process that has them; its life went with its own thread.
#[test]
fn a_forked_child_of_an_engine_does_not_pass_for_it() {
    let mut engine = EngineProcess::configured("engine-fork", 4, &fast());
    engine.kill();
    engine.restart_with(&[(ENDS, &End::Fork.name())]).unwrap();
    let client = client(&engine.name, Duration::ZERO);
    engine.send(Signal::SIGUSR2);
    let tasks = format!("/proc/{}/task", engine.pid());
    let mut child = None;
    eventually("the engine has a child", || {
        // A child whose thread has ended is another thread's.
        let tasks = std::fs::read_dir(&tasks).unwrap().flatten();
        let texts = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
        let all: Vec<String> = texts.collect();
        child = all.iter().find_map(|text| text.split_whitespace().next()?.parse().ok());
        child.is_some()
    });
    let child = Pid::from_raw(child.unwrap());
    client.noop().unwrap();
    engine.kill();
    let next = within(Duration::ZERO, "a call of a dead engine", || client.noop());
    assert!(next.is_err() && !client.is_healthy());
    assert_eq!(kill(child, None), Ok(()), "the child lives on all the time");
    kill(child, Signal::SIGKILL).unwrap();
    engine.restart();
    client.wait_ready(LIMIT).unwrap();
    drop(client);
    engine.settles(0);
}

/// Nobody reaps a client that does not move: not the engine, however often it ticks; not its successor, after its grace.
#[test]
fn a_client_that_is_stopped_keeps_its_entry_and_what_it_writes() {
    let mut fields = fast();
    fields["reattach_grace_ms"] = json!(20);
    let mut engine = EngineProcess::configured("stopped", 2, &fields);
    let mut worker = WorkerSide::start(&worker_spec(&engine.name, SOLO, 1, 0, SHARD)).unwrap();
    let mut scheduler = SchedulerSide::start(&scheduler_spec(&engine.name, SOLO, 1));
    worker.wait_ready(LIMIT).unwrap();
    scheduler.client().wait_ready(LIMIT).unwrap();
    assert_eq!(worker.store("r", round(1), None, &chain(1, 4), 1), all_stored(4));
    let mut peer = busy_peer(&engine.name, 2);
    let theirs = peer.lookup("theirs", 0, &chain(1, 4));
    assert_eq!(theirs.chunks, 4);
    engine.stat_becomes("slots_writing", 8);
    peer.stop();
    // A second of ticks.
    engine.beats(1000);
    let now = |engine: &EngineProcess| ["leases", "slots_writing", "clients"].map(|name| engine.stat(name));
    assert_eq!(now(&engine), [1, 8, 4]);
    for _ in 0..2 {
        engine.kill();
        engine.restart();
        worker.wait_ready(LIMIT).unwrap();
        scheduler.client().wait_ready(LIMIT).unwrap();
        engine.stat_becomes("clients", 2);
        engine.beats(500);
        assert_eq!(engine.stat("clients_awaited"), 2, "both of its entries are theirs still");
        // The grace has passed, so others get what they want: all but what it writes.
        for number in 2..6 {
            let stored = worker.store("r", round(number), None, &chain(10 + u64::from(number), 12), 3);
            assert_eq!(stored, all_stored(12));
        }
        assert!(engine.stat("evictions") > 0);
        assert_eq!(now(&engine), [0, 8, 2]);
    }
    peer.resume();
    peer.ready();
    assert!(matches!(peer.ask(&Ask::FinishTheStore), Tell::Stored(stored) if stored == all_stored(8)));
    let found = scheduler.lookup("after", 0, &chain(2, 8)).unwrap();
    assert_eq!(found.chunks, 8);
    assert_eq!(worker.load("after", &found.ranks[0], 2), all_loaded(8));
    // What it had leased was evicted meanwhile: an error, and nothing else.
    let late = worker.load("theirs", &theirs.ranks[0], 1);
    assert_eq!((late.loaded, late.failed, late.wrong), (0, 4, 0));
    scheduler.api().end_session("after");
    peer.shutdown();
    drop((peer, worker, scheduler));
    engine.settles(0);
}
