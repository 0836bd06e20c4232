//! A client for which devices write is not over before its process is: what it was writing waits for that, and nothing
//! else does. (The first of it, with its negative control, is in `crash_rules.rs`.)
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_adapter::{Role, Round};
use kvring_shm_abi::failpoint::{Place, Rule};
use kvring_shm_abi::life::Life;
use kvring_shm_abi::lobby::{DmaOwner, dma_lock_at};
use kvring_shm_abi::process::{ProcessIdentity, ProcessStat};
use kvring_shm_abi::segment::{Access, EngineName, SegmentFile};
use kvring_tests::crash::cast::{SHARD, SOLO, scheduler_spec, worker_spec};
use kvring_tests::crash::rules;
use kvring_tests::crash::{BREAK, FAIL_POINT};
use kvring_tests::engine::{EngineProcess, overrides, stat_of, unique_name};
use kvring_tests::held::HeldBackend;
use kvring_tests::kv::chain;
use kvring_tests::peer::Peer;
use kvring_tests::proto::{ClientSpec, all_stored};
use kvring_tests::raw::{Claimed, RawClient};
use kvring_tests::wait::{LIMIT, becomes, eventually};
use kvring_tests::worker::{WorkerSide, client};
use serde_json::json;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

fn engine(tag: &str) -> EngineProcess {
    EngineProcess::configured(tag, 4, &json!({ "beat_interval_ms": 1, "client_share": 1.0 }))
}

/// A process of somebody else's.
struct Stranger(Child);

impl Stranger {
    fn new() -> Stranger {
        Stranger(Command::new("sleep").arg("1200").spawn().unwrap())
    }

    fn identity(&self) -> ProcessIdentity {
        let started = ProcessStat::of(self.0.id()).unwrap().unwrap().started;
        ProcessIdentity { pid: self.0.id(), started, ..ProcessIdentity::own() }
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// A client that writes eight slots, has said this of its process, and whose word is marked.
fn marked(engine: &EngineProcess, owner: DmaOwner) -> RawClient {
    let mut raw = RawClient::attach(&engine.name, Role::Worker);
    raw.lobby.entries[raw.entry].register_dma(&owner);
    let namespace = raw.register(SOLO, 1, 0, SHARD.shard_bytes());
    assert_eq!(raw.reserve(namespace, 0, Round { source: 9, number: 1 }, &chain(9, 8)).len(), 8);
    raw.give_up();
    raw
}

fn known(process: ProcessIdentity) -> DmaOwner {
    DmaOwner { process, locked: false }
}

#[test]
fn the_next_engine_waits_for_the_process_too() {
    assert_eq!(rules::a_keeper_ends_before_its_process(true), Vec::<String>::new());
}

#[test]
fn without_devices_the_mark_is_enough() {
    let engine = engine("no-device");
    let specs = (worker_spec(&engine.name, SOLO, 1, 0, SHARD), scheduler_spec(&engine.name, SOLO, 1));
    let mut peer = Peer::holding(&specs.0, &specs.1, false, &chain(2, 8));
    engine.stat_becomes("slots_writing", 8);
    peer.end_keepers();
    engine.settles(0);
    // Its process has not ended.
    assert_eq!(peer.ended(), None);
}

/// All at once, as the usual death is: the mark first, its end some milliseconds later.
#[test]
fn a_process_that_is_killed_as_a_whole_leaves_nothing() {
    let mut engine = engine("whole");
    let specs = (worker_spec(&engine.name, SOLO, 1, 0, SHARD), scheduler_spec(&engine.name, SOLO, 1));
    for without_engine in [false, true] {
        let mut peer = Peer::holding(&specs.0, &specs.1, true, &chain(2, 8));
        engine.stat_becomes("slots_writing", 8);
        if without_engine {
            engine.kill();
        }
        peer.kill();
        if without_engine {
            engine.restart();
        }
        engine.settles(0);
    }
}

/// It has waited for its copies: nobody waits for its process.
#[test]
fn who_gives_its_entry_up_is_not_waited_for() {
    let mut engine = engine("orderly");
    let backend = HeldBackend::new();
    let mut spec = worker_spec(&engine.name, SOLO, 1, 0, SHARD);
    // It waits so long for an engine to take its commits.
    spec.client.drain_ms = 100;
    let mut worker = WorkerSide::copying_with(&spec, backend.clone()).unwrap();
    worker.client().register_dma();
    worker.wait_ready(LIMIT).unwrap();
    backend.hold();
    worker.submit_store("r", Round { source: 1, number: 1 }, None, &chain(1, 4), 1).unwrap();
    backend.holds(1);
    engine.stat_becomes("slots_writing", 4);
    // No engine hears what becomes of them, nor a goodbye; this process, which is the worker's, lives on.
    engine.kill();
    backend.let_go();
    drop(worker);
    assert_eq!(engine.written_slots().len(), 4);
    engine.restart();
    engine.settles(0);
    assert_eq!(engine.stat("clients_lingering"), 0);
}

#[test]
fn an_id_that_is_nobodys_or_anothers_by_now_is_not_waited_for() {
    let engine = engine("reused");
    let gone = {
        let stranger = Stranger::new();
        stranger.identity()
    };
    let stranger = Stranger::new();
    let theirs = stranger.identity();
    for process in [
        gone,
        ProcessIdentity { started: theirs.started - 1, ..theirs },
        ProcessIdentity { pid: 0, ..theirs },
        ProcessIdentity { pid: u32::MAX, ..theirs },
    ] {
        let raw = marked(&engine, known(process));
        becomes(&format!("{process:?}"), [0, 0], || {
            ["slots_writing", "clients_lingering"].map(|name| engine.stat(name))
        });
        drop(raw);
    }
    engine.settles(0);
}

#[test]
fn who_names_a_living_stranger_has_its_own_slots_kept_and_nothing_else() {
    let mut engine = engine("stranger");
    let mut worker = WorkerSide::start(&worker_spec(&engine.name, SOLO, 1, 0, SHARD)).unwrap();
    worker.wait_ready(LIMIT).unwrap();
    let stranger = Stranger::new();
    let raw = marked(&engine, known(stranger.identity()));
    engine.stat_becomes("clients_lingering", 1);
    assert_eq!(engine.stat("slots_orphaned"), 8);
    // As long as it lives; the others have all the rest.
    for number in 1..10 {
        let keys = chain(100 + u64::from(number), 12);
        assert_eq!(worker.store("r", Round { source: 1, number }, None, &keys, 1), all_stored(12));
    }
    assert!(engine.stat("evictions") > 0);
    // Its word is written over: that changes nothing.
    raw.lobby.life_words[raw.entry].futex().store(0, kvring_shm_abi::sync::Ordering::Release);
    engine.beats(100);
    assert_eq!((engine.stat("slots_orphaned"), engine.stat("clients_lingering")), (8, 1));
    raw.lobby.life_words[raw.entry]
        .futex()
        .store(libc::FUTEX_OWNER_DIED, kvring_shm_abi::sync::Ordering::Release);
    engine.kill();
    engine.restart();
    worker.wait_ready(LIMIT).unwrap();
    engine.stat_becomes("clients_lingering", 1);
    assert_eq!(engine.stat("slots_orphaned"), 8);
    drop(stranger);
    engine.stat_becomes("slots_orphaned", 0);
    drop((raw, worker));
    engine.settles(0);
}

/// 0 in a word is no death: anybody could have written it there. Nor is it one to the next engine.
#[test]
fn who_loses_its_word_to_a_zero_is_waited_for_as_well() {
    let mut engine = engine("zero");
    for without_engine in [false, true] {
        let stranger = Stranger::new();
        let mut raw = RawClient::attach(&engine.name, Role::Worker);
        raw.lobby.entries[raw.entry].register_dma(&known(stranger.identity()));
        let namespace = raw.register(SOLO, 1, 0, SHARD.shard_bytes());
        assert_eq!(raw.reserve(namespace, 0, Round { source: 9, number: 1 }, &chain(9, 8)).len(), 8);
        if without_engine {
            engine.kill();
        }
        raw.lobby.life_words[raw.entry].futex().store(0, kvring_shm_abi::sync::Ordering::Release);
        if without_engine {
            engine.restart();
        }
        engine.stat_becomes("clients_lingering", 1);
        assert_eq!(engine.written_slots().len(), 8, "without an engine: {without_engine}");
        drop(stranger);
        engine.stat_becomes("slots_writing", 0);
        drop(raw);
        engine.settles(0);
    }
}

/// The engine finds an entry unclaimed, and before it has looked further a client has claimed it and has said that devices write
/// for it. With the rule that a word is marked before its entry is buried, what it said stays; without it, it is wiped out.
#[test]
fn what_a_newcomer_says_of_its_devices_is_not_taken_for_its_predecessors() {
    for is_marked_first in [true, false] {
        let look = format!("{}:1:stop", Place::LookWord);
        let mut environment = vec![(FAIL_POINT, look.as_str())];
        if !is_marked_first {
            environment.push((BREAK, Rule::MarkBeforeBurying.name()));
        }
        let name = unique_name("newcomer");
        let mut engine = EngineProcess::launched(&overrides(&name, 4), &environment);
        engine.serves().unwrap();
        engine.has_stopped();
        let newcomer = Claimed::new(&name, Role::Worker);
        let said = known(ProcessIdentity::own());
        let entry = newcomer.entry();
        assert_eq!(entry, 0, "the engine has stopped at the first one");
        engine.lobby().entries[entry].register_dma(&said);
        engine.resume();
        engine.beats(3);
        assert_eq!(engine.lobby().entries[entry].dma(), is_marked_first.then_some(said));
        if is_marked_first {
            let attached = newcomer.publish(|_| {}).unwrap();
            assert_eq!(attached.lobby.entries[entry].dma(), Some(said));
        }
    }
}

/// Where an id means nothing: a lock, and then a grace.
#[test]
fn a_process_of_another_namespace_is_waited_for_by_its_lock() {
    let engine = engine("elsewhere");
    let elsewhere = ProcessIdentity { pid_namespace: 1, ..ProcessIdentity::own() };
    let raw = marked(&engine, DmaOwner { process: elsewhere, locked: true });
    let lobby = EngineName::new(&engine.name).unwrap().lobby();
    let file = SegmentFile::open(&lobby, Access::ReadWrite).unwrap();
    // Within the grace.
    assert!(file.try_lock_byte(dma_lock_at(raw.entry)).unwrap());
    // Held by a mapping alone, as the adapter holds it.
    let lock = file.map(1, Access::ReadOnly).unwrap();
    drop(file);
    std::thread::sleep(Duration::from_secs(12));
    assert_eq!((engine.stat("slots_orphaned"), engine.stat("clients_lingering")), (8, 1));
    let began = Instant::now();
    drop(lock);
    let view = engine.view();
    eventually("they are free", || stat_of(&view, "slots_orphaned") == 0);
    assert!(began.elapsed() >= Duration::from_secs(9), "no grace: {:?}", began.elapsed());
    drop(raw);
    engine.settles(0);
}

/// The adapter's lock ends with its process, and belongs to no child of it.
#[test]
fn an_adapters_word_is_seen_whenever_it_is_given() {
    let mut engine = engine("told");
    let lobby = engine.lobby();
    let file = SegmentFile::open(&EngineName::new(&engine.name).unwrap().lobby(), Access::ReadOnly).unwrap();
    let own = ProcessIdentity::own();
    let told = |count: usize| {
        let alive = |entry: &usize| matches!(lobby.life_words[*entry].life(), Life::Alive { .. });
        let told: Vec<usize> =
            (0..64).filter(alive).filter(|entry| lobby.entries[*entry].dma().is_some()).collect();
        for entry in &told {
            assert_eq!(lobby.entries[*entry].dma(), Some(DmaOwner { process: own, locked: true }));
            assert!(file.is_byte_locked(dma_lock_at(*entry)).unwrap());
        }
        told.len() == count
    };
    let spec = ClientSpec::new(&engine.name);
    let [before, after, never] = [(); 3].map(|()| client(Role::Worker, &spec));
    before.register_dma();
    for client in [&before, &after, &never] {
        client.wait_ready(LIMIT).unwrap();
    }
    assert!(told(1));
    after.register_dma();
    after.register_dma();
    assert!(told(2));
    // The same claims, published again.
    engine.kill();
    engine.restart();
    for client in [&before, &after, &never] {
        client.wait_ready(LIMIT).unwrap();
    }
    assert!(told(2));
    // Other claims, in another arena.
    engine.kill();
    engine.reconfigure(&json!({ "cold": true }));
    engine.restart();
    let lobby = engine.lobby();
    for client in [&before, &after, &never] {
        client.wait_ready(LIMIT).unwrap();
    }
    let seen =
        lobby.entries.iter().filter(|entry| entry.dma() == Some(DmaOwner { process: own, locked: true }));
    assert_eq!(seen.count(), 2);
    drop((before, after, never));
    engine.settles(0);
    assert!(lobby.entries.iter().all(|entry| entry.dma().is_none()));
}

/// A registration in the middle of an attachment is not lost, whoever is first.
#[test]
fn a_registration_that_races_with_an_attachment_is_not_lost() {
    let engine = engine("races");
    let lobby = engine.lobby();
    for round in 0..30 {
        let client = client(Role::Worker, &ClientSpec::new(&engine.name));
        std::thread::sleep(Duration::from_micros(round * 50));
        client.register_dma();
        client.wait_ready(LIMIT).unwrap();
        assert_eq!(lobby.entries.iter().filter(|entry| entry.dma().is_some()).count(), 1);
        drop(client);
        engine.settles(0);
    }
}
