//! A client for which devices write ends only with its process: the slots that it was writing wait for that, and nothing
//! else of it does. (The first test of this, with its negative control, is in `crash_rules.rs`.)
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_adapter::{Role, Round};
use kvring_shm_abi::failpoint::{Place, Rule};
use kvring_shm_abi::life::Life;
use kvring_shm_abi::lobby::{DmaOwner, dma_lock_at};
use kvring_shm_abi::process::{ProcessIdentity, ProcessStat};
use kvring_shm_abi::segment::{Access, EngineName, SegmentFile};
use kvring_shm_abi::sync::Ordering;
use kvring_tests::crash::rules;
use kvring_tests::crash::scene::{SHARD, SOLO, scheduler_spec, solo_spec};
use kvring_tests::{
    BREAK, Claimed, ClientSpec, EngineProcess, FAIL_POINT, HeldBackend, LIMIT, Peer, RawClient, WorkerSide,
    becomes, chain, client, eventually, overrides, round, stat_of, unique_name,
};
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

/// A client that writes eight slots and names this owner of its devices.
fn writing(engine: &EngineProcess, owner: DmaOwner) -> RawClient {
    let mut raw = RawClient::attach(&engine.name, Role::Worker);
    raw.lobby.entries[raw.entry].register_dma(&owner);
    let namespace = raw.register(SOLO, 1, 0, SHARD.shard_bytes());
    assert_eq!(raw.reserve(namespace, 0, Round { source: 9, number: 1 }, &chain(9, 8)).len(), 8);
    raw
}

/// The same, and its word is marked.
fn marked(engine: &EngineProcess, owner: DmaOwner) -> RawClient {
    let mut raw = writing(engine, owner);
    raw.give_up();
    raw
}

/// A process with a copy of eight slots that stands still, for which devices write or not.
fn holding(engine: &EngineProcess, dma: bool) -> Peer {
    let specs = (solo_spec(&engine.name), scheduler_spec(&engine.name, SOLO));
    Peer::holding(&specs.0, &specs.1, dma, Round { source: 77, number: 1 }, &chain(2, 8))
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
    let mut peer = holding(&engine, false);
    engine.stat_becomes("slots_writing", 8);
    peer.end_keepers();
    engine.settles(0);
    // Its process has not ended.
    assert_eq!(peer.ended(), None);
}

/// The usual death: first the mark, and the end of the process some milliseconds later.
#[test]
fn a_process_that_is_killed_as_a_whole_leaves_nothing() {
    let mut engine = engine("whole");
    for without_engine in [false, true] {
        let mut peer = holding(&engine, true);
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

/// A client that gives its entry up has waited for its copies, so the engine does not wait for its process.
#[test]
fn who_gives_its_entry_up_is_not_waited_for() {
    let mut engine = engine("orderly");
    let backend = HeldBackend::new();
    let mut spec = solo_spec(&engine.name);
    // How long it waits for an engine that takes its commits.
    spec.client.drain_ms = 100;
    let mut worker = WorkerSide::copying_with(&spec, backend.clone()).unwrap();
    worker.client().register_dma();
    worker.ready();
    backend.hold_a_store(&mut worker, round(1), &chain(1, 4), 1);
    engine.stat_becomes("slots_writing", 4);
    // No engine hears of the commits or of the end of the worker. The worker's process, which is this one, lives on.
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
    let mut worker = WorkerSide::start(&solo_spec(&engine.name)).unwrap();
    worker.ready();
    let stranger = Stranger::new();
    let raw = marked(&engine, known(stranger.identity()));
    engine.stat_becomes("clients_lingering", 1);
    assert_eq!(engine.stat("slots_orphaned"), 8);
    // As long as the stranger lives, others have all the other slots.
    for number in 1..10 {
        worker.stores(round(number), chain(100 + u64::from(number), 12), 1);
    }
    assert!(engine.stat("evictions") > 0);
    // That its word is overwritten changes nothing.
    raw.lobby.life_words[raw.entry].futex().store(0, Ordering::Release);
    engine.beats(100);
    assert_eq!((engine.stat("slots_orphaned"), engine.stat("clients_lingering")), (8, 1));
    raw.lobby.life_words[raw.entry].futex().store(libc::FUTEX_OWNER_DIED, Ordering::Release);
    engine.kill_and_restart();
    worker.ready();
    engine.stat_becomes("clients_lingering", 1);
    assert_eq!(engine.stat("slots_orphaned"), 8);
    drop(stranger);
    engine.stat_becomes("slots_orphaned", 0);
    engine.settles_without((raw, worker));
}

/// 0 in a life word is no death, because any client can write it there. Nor is it one to the next engine.
#[test]
fn who_loses_its_word_to_a_zero_is_waited_for_as_well() {
    let mut engine = engine("zero");
    for without_engine in [false, true] {
        let stranger = Stranger::new();
        let raw = writing(&engine, known(stranger.identity()));
        if without_engine {
            engine.kill();
        }
        raw.lobby.life_words[raw.entry].futex().store(0, Ordering::Release);
        if without_engine {
            engine.restart();
        }
        engine.stat_becomes("clients_lingering", 1);
        assert_eq!(engine.written_slots().len(), 8, "without an engine: {without_engine}");
        drop(stranger);
        engine.stat_becomes("slots_writing", 0);
        engine.settles_without(raw);
    }
}

/// The engine finds an entry unclaimed. Before it looks further, a client claims the entry and declares its devices. With the
/// rule that a word is marked before its entry is buried the declaration stays; without the rule the engine erases it.
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

/// Where a process id means nothing, the engine waits for a lock, and then for a grace.
#[test]
fn a_process_of_another_namespace_is_waited_for_by_its_lock() {
    let engine = engine("elsewhere");
    let elsewhere = ProcessIdentity { pid_namespace: 1, ..ProcessIdentity::own() };
    let raw = marked(&engine, DmaOwner { process: elsewhere, locked: true });
    let lobby = EngineName::new(&engine.name).unwrap().lobby();
    let file = SegmentFile::open(&lobby, Access::ReadWrite).unwrap();
    // Within the grace.
    assert!(file.try_lock_byte(dma_lock_at(raw.entry)).unwrap());
    // Only a mapping holds the lock, as in the adapter.
    let lock = file.map(1, Access::ReadOnly).unwrap();
    drop(file);
    std::thread::sleep(Duration::from_secs(12));
    assert_eq!((engine.stat("slots_orphaned"), engine.stat("clients_lingering")), (8, 1));
    let began = Instant::now();
    drop(lock);
    let view = engine.view();
    eventually("they are free", || stat_of(&view, "slots_orphaned") == 0);
    assert!(began.elapsed() >= Duration::from_secs(9), "no grace: {:?}", began.elapsed());
    engine.settles_without(raw);
}

/// An adapter declares its devices before or after it is attached, and its claims declare them again after a restart.
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
    // The same claims are published again.
    engine.kill_and_restart();
    for client in [&before, &after, &never] {
        client.wait_ready(LIMIT).unwrap();
    }
    assert!(told(2));
    // Other claims, on another arena.
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
    engine.settles_without((before, after, never));
    assert!(lobby.entries.iter().all(|entry| entry.dma().is_none()));
}

/// `register_dma` during an attachment is not lost, whichever of the two is first.
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
        engine.settles_without(client);
    }
}
