//! Deaths of every kind, of an engine and of a client: clients that call, that sleep in a call, or that do nothing notice each
//! at once, and it leaves nothing behind. A process that is merely stopped does not pass for dead.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_adapter::{CallError, Client, ClientOptions, Role, Round};
use kvring_shm_abi::probe::has_robust_lists;
use kvring_tests::crash::scene::{SOLO, scheduler_spec, solo_spec};
use kvring_tests::ends::{ENDS, End};
use kvring_tests::{
    Ask, ClientSpec, EngineProcess, HeldBackend, LIMIT, Peer, SchedulerSide, Stored, WorkerSide, all_failed,
    all_loaded, all_stored, becomes, chain, eventually, in_a_call, round, within,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// A death that a file lock, which stands in for a robust list, does not tell: the lock lasts as long as the process.
const KEEPERS_END: &str = "the end of its keepers";

fn fast() -> serde_json::Value {
    json!({ "beat_interval_ms": 1, "client_share": 1.0 })
}

/// A client whose calls would wait for ever if they did not notice that no answer will come. They spin for `spin`, and then
/// sleep.
fn client(engine: &str, spin: Duration) -> Arc<Client> {
    let options = ClientOptions { spin: Some(spin), ..ClientSpec::new(engine).options() };
    let client = Client::new(Role::Scheduler, options).unwrap();
    client.wait_ready(LIMIT).unwrap();
    client
}

/// A call of this client's that no engine answers, on a thread that waits in this state.
fn call(client: &Arc<Client>, state: char) -> JoinHandle<Result<(), CallError>> {
    let client = client.clone();
    in_a_call(state, move || client.noop())
}

/// One death of an engine under everybody's eyes, and its successor.
fn an_engine_dies(how: &str, end: End, kill: impl FnOnce(&EngineProcess)) {
    let mut engine = EngineProcess::configured("death", 4, &fast());
    engine.kill();
    engine.restart_with(&[(ENDS, &end.name())]).unwrap();
    let [spins, sleeps, idle] =
        [LIMIT, Duration::ZERO, Duration::ZERO].map(|spin| client(&engine.name, spin));
    let backend = HeldBackend::new();
    let spec = solo_spec(&engine.name);
    let mut worker = WorkerSide::copying_with(&spec, backend.clone()).unwrap();
    let mut reader = WorkerSide::start(&spec).unwrap();
    for worker in [&worker, &reader] {
        worker.ready();
    }
    let mut scheduler = SchedulerSide::started(&scheduler_spec(&engine.name, SOLO));
    assert_eq!(reader.store(round(1), &chain(1, 4), 1), all_stored(4));
    let found = scheduler.lookup("held", 0, &chain(1, 4));
    let job = backend.hold_a_store(&mut worker, round(2), &chain(2, 4), 2);
    // The service thread hangs where it is: nobody is answered any more.
    engine.send(Signal::SIGUSR1);
    let still = engine.view();
    eventually("the service thread hangs", || {
        let beat = still.segment.epoch().beat();
        std::thread::sleep(Duration::from_millis(20));
        still.segment.epoch().beat() == beat
    });
    let callers = [call(&spins, 'R'), call(&sleeps, 'S')];
    kill(&engine);
    for caller in callers {
        let error = within(Duration::ZERO, how, || caller.join().unwrap()).unwrap_err();
        let is_told = matches!(error, CallError::Dead | CallError::Restarted | CallError::Degraded(_));
        assert!(is_told, "{how}: {error}");
    }
    let next = within(Duration::ZERO, how, || idle.noop());
    assert!(next.is_err(), "{how}: an idle client's next call");
    for client in [&spins, &sleeps, &idle] {
        assert!(!client.is_healthy(), "{how}");
    }
    // A copy is not abandoned, and loads need no engine.
    assert_eq!(worker.report_of(job), None, "{how}: a copy still runs");
    assert_eq!(reader.load(&found.handles, 1), all_loaded(4), "{how}");
    // Where some of the process is left, it holds the lock on the name.
    engine.kill_and_restart();
    if end == End::Panic {
        // Its successor trusts nothing of it. The worker gives the old arena up when its copy has ended.
        assert_eq!(engine.stat("warm_start"), 0, "{how}");
        backend.let_go();
        assert_eq!(worker.finished_store(job).dropped, 4, "{how}");
        worker.ready();
        return engine.settles_without((spins, sleeps, idle, worker, reader, scheduler));
    }
    for client in [&spins, &sleeps, &idle, worker.client(), reader.client(), scheduler.client()] {
        client.wait_ready(LIMIT).unwrap();
    }
    assert_eq!(engine.stat("warm_start"), 1, "{how}");
    backend.let_go();
    assert_eq!(worker.finished_store(job), all_stored(4), "{how}");
    let found = scheduler.lookup("after", 0, &chain(2, 4));
    assert_eq!(reader.load(&found.handles, 2), all_loaded(4), "{how}");
    scheduler.ends(&["held", "after"]);
    engine.settles_without((spins, sleeps, idle, worker, reader, scheduler));
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

/// A worker with a copy that runs, and a scheduler, in another process.
fn busy_peer(engine: &str, source: u32) -> Peer {
    let specs = (solo_spec(engine), scheduler_spec(engine, SOLO));
    Peer::holding(&specs.0, &specs.1, false, Round { source, number: 1 }, &chain(source.into(), 8))
}

#[test]
fn a_client_that_dies_in_any_way_leaves_nothing() {
    let engine = EngineProcess::configured("client-death", 4, &fast());
    let mut worker = WorkerSide::start(&solo_spec(&engine.name)).unwrap();
    worker.ready();
    let keys = worker.stores(round(1), chain(1, 4), 1);
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
        (KEEPERS_END, |peer| peer.end_keepers()),
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
    engine.settles_without(worker);
}

/// The kernel marks their words all the same, and the next engine finds the marks.
#[test]
fn clients_that_die_while_there_is_no_engine_leave_nothing() {
    let mut engine = EngineProcess::configured("nobody", 4, &fast());
    let mut worker = WorkerSide::start(&solo_spec(&engine.name)).unwrap();
    let mut scheduler = SchedulerSide::started(&scheduler_spec(&engine.name, SOLO));
    worker.ready();
    assert_eq!(worker.store(round(1), &chain(1, 4), 1), all_stored(4));
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
            // Perhaps while the engine looks at its word.
            second.kill();
        }
        worker.ready();
        scheduler.ready();
        second.kill();
        engine.settles(2);
        let found = scheduler.lookup("r", number, &chain(1, 4));
        assert_eq!(worker.load(&found.handles, 1), all_loaded(4));
        scheduler.api().end_session("r");
    }
    engine.settles_without((worker, scheduler));
}

#[test]
fn a_forked_child_does_not_keep_its_parents_entry_alive() {
    let engine = EngineProcess::configured("client-fork", 4, &fast());
    let mut peer = busy_peer(&engine.name, 2);
    let child = Pid::from_raw(peer.get(&Ask::Fork));
    engine.stat_becomes("slots_writing", 8);
    peer.kill();
    engine.settles(0);
    assert_eq!(kill(child, None), Ok(()), "the child lives on all the time");
    kill(child, Signal::SIGKILL).unwrap();
}

/// The child keeps the engine's mappings and its lock on the name, but the engine's life ended with its own thread.
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
        // Where the thread that forked it has ended, it is listed under another thread.
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
    engine.settles_without(client);
}

/// A client that is stopped is not reaped: not by the engine, however often it ticks, and not by its successor after the grace.
#[test]
fn a_client_that_is_stopped_keeps_its_entry_and_what_it_writes() {
    let mut fields = fast();
    fields["reattach_grace_ms"] = json!(20);
    let mut engine = EngineProcess::configured("stopped", 2, &fields);
    let mut worker = WorkerSide::start(&solo_spec(&engine.name)).unwrap();
    let mut scheduler = SchedulerSide::started(&scheduler_spec(&engine.name, SOLO));
    worker.ready();
    assert_eq!(worker.store(round(1), &chain(1, 4), 1), all_stored(4));
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
        engine.kill_and_restart();
        worker.ready();
        scheduler.ready();
        engine.stat_becomes("clients", 2);
        engine.beats(500);
        assert_eq!(engine.stat("clients_awaited"), 2, "both of its entries are theirs still");
        // The grace has passed, so others get all slots but those that it writes.
        for number in 2..6 {
            let stored = worker.store(round(number), &chain(10 + u64::from(number), 12), 3);
            assert_eq!(stored, all_stored(12));
        }
        assert!(engine.stat("evictions") > 0);
        assert_eq!(now(&engine), [0, 8, 2]);
    }
    peer.resume();
    peer.ready();
    assert_eq!(peer.get::<Stored>(&Ask::FinishTheStore), all_stored(8));
    let found = scheduler.lookup("after", 0, &chain(2, 8));
    assert_eq!(found.chunks, 8);
    assert_eq!(worker.load(&found.handles, 2), all_loaded(8));
    // What it had leased was evicted meanwhile: its load is an error, and nothing else.
    assert_eq!(worker.load(&theirs.handles, 1), all_failed(4));
    scheduler.api().end_session("after");
    peer.shutdown();
    engine.settles_without((peer, worker, scheduler));
}
