//! A kernel that lacks robust lists or `futex_waitv`, for the engine, for its clients, or for both: that costs promptness and
//! nothing else. The variable `KVRING_WITHOUT`, which only test builds obey, switches them off.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_adapter::{EngineView, Role};
use kvring_shm_abi::engine_segment::OWNER_WORD;
use kvring_shm_abi::failpoint::{Place, Rule};
use kvring_shm_abi::life::Life;
use kvring_shm_abi::lobby::Lobby;
use kvring_shm_abi::means::{DeathNotice, Means, Waiting};
use kvring_shm_abi::segment::EngineName;
use kvring_shm_abi::sync::Ordering;
use kvring_tests::engine::{merged, within_beats};
use kvring_tests::{
    Ask, BREAK, EngineProcess, FAIL_POINT, LIMIT, Peer, SchedulerSpec, WorkerSpec, all_dropped, all_loaded,
    all_stored, chain, client, eventually, isolated, overrides, round, segments, stat_of,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{ForkResult, fork};
use serde_json::json;
use std::time::Duration;

const WITHOUT: &str = "KVRING_WITHOUT";
const SECOND: Duration = Duration::from_secs(1);
const CHUNKS: usize = 8;

/// The means of a process that is without these.
fn means_without(list: &str) -> Means {
    Means {
        death_notice: if list.contains("robust") { DeathNotice::FileLock } else { DeathNotice::RobustFutex },
        waiting: if list.contains("waitv") { Waiting::Slices } else { Waiting::Waitv },
    }
}

fn worker_in(environment: &[(&'static str, &str)], engine: &EngineProcess) -> Peer {
    let mut peer = Peer::spawn_with(environment);
    peer.add_worker(&WorkerSpec::new(&engine.name)).unwrap();
    peer.ready();
    peer
}

fn scheduler_in(environment: &[(&'static str, &str)], engine: &EngineProcess) -> Peer {
    let mut peer = Peer::spawn_with(environment);
    peer.add_scheduler(&SchedulerSpec::new(&engine.name));
    peer.ready();
    peer
}

/// Within some seconds of the engine's own, in which it beats 500 times each; [`eventually`] would wait for a hang.
fn within_seconds(view: &EngineView, what: &str, state: impl FnMut() -> bool) {
    assert!(within_beats(view, 1500, state), "the engine has beaten 1500 times, and still not: {what}");
}

/// How the deaths of the engine and of each client are told, as everybody can see.
fn notices(view: &EngineView, lobby: &Lobby) -> (Vec<DeathNotice>, Vec<DeathNotice>) {
    let of = |life: Life| match life {
        Life::Alive { notice, .. } => Some(notice),
        Life::Dead | Life::Unclaimed => None,
    };
    let engine = view.segment.life_words.iter().filter_map(|word| of(word.life())).collect();
    (engine, lobby.life_words.iter().filter_map(|word| of(word.life())).collect())
}

/// Everything that matters, once, with an engine and with clients that are without these means.
fn essentials(tag: &str, engine_without: &str, clients_without: &str) {
    let environment: &[(&'static str, &str)] = &[(WITHOUT, clients_without)];
    let mut engine = EngineProcess::start_in(&[(WITHOUT, engine_without)], tag, 16);
    let mut worker = worker_in(environment, &engine);
    let mut scheduler = scheduler_in(environment, &engine);
    let (view, lobby) = (engine.view(), engine.lobby());

    // The engine and the clients publish their means.
    let (engines, clients) = (means_without(engine_without), means_without(clients_without));
    let (told_by_engine, told_by_clients) = notices(&view, &lobby);
    assert_eq!(view.means(), engines);
    assert_eq!(told_by_engine, vec![engines.death_notice; OWNER_WORD + 1]);
    assert_eq!(told_by_clients, [clients.death_notice; 2]);
    for entry in lobby.entries.iter().filter(|entry| entry.read().is_some()) {
        assert_eq!(entry.means(), clients);
    }

    // Store, look up, load.
    let keys = worker.stores(round(1), chain(1, CHUNKS), 7);
    let held = scheduler.lookup("held", 0, &keys);
    assert_eq!(held.chunks, CHUNKS as u32);
    assert_eq!(worker.load(&held.handles, 7), all_loaded(CHUNKS));

    // A client that is stopped in the middle of a store is not reaped. One that is killed there is, with all that it held.
    let mut victims = [
        worker_in(&[environment[0], (FAIL_POINT, &format!("{}:1:stop", Place::ClientGranted))], &engine),
        scheduler_in(environment, &engine),
    ];
    victims[0].begin(&Ask::store(round(2), &chain(2, CHUNKS), 1));
    assert_eq!(victims[1].lookup("doomed", 0, &keys).chunks, CHUNKS as u32);
    engine.stat_becomes("slots_writing", CHUNKS as u64);
    engine.stat_becomes("leases", 2);
    victims[1].stop();
    // Long enough for several looks.
    std::thread::sleep(Duration::from_millis(250));
    let held_by = || ["slots_writing", "leases", "clients", "deaths"].map(|name| stat_of(&view, name));
    assert_eq!(held_by(), [CHUNKS as u64, 2, 4, 0]);
    victims[1].resume();
    assert_eq!(victims[1].lookup("more", 0, &keys).chunks, CHUNKS as u32);
    victims.iter_mut().for_each(|victim| victim.kill());
    within_seconds(&view, "what the dead held is free", || held_by() == [0, 1, 2, 2]);
    let claimed = || lobby.life_words.iter().filter(|word| word.life() != Life::Unclaimed).count();
    within_seconds(&view, "their entries are free", || claimed() == 2);
    drop(victims);

    // An engine that is stopped does not pass for dead, and its clients are well again when it goes on.
    engine.stop();
    std::thread::sleep(Duration::from_millis(250));
    assert_ne!(scheduler.health(), "dead");
    assert!(view.owner_lives());
    let second = json!({ "start_wait_ms": 0 });
    let again = EngineProcess::try_start(&merged(overrides(&engine.name, 16), &second));
    assert!(again.as_ref().is_err_and(|said| said.contains("runs already")), "{:?}", again.err());
    engine.resume();
    eventually("the scheduler is well", || scheduler.health() == "healthy");

    // Every client notices that an engine is killed, and the next engine has everything.
    engine.kill();
    eventually("the worker knows", || worker.health() == "dead");
    eventually("the scheduler knows", || scheduler.health() == "dead");
    assert!(!view.owner_lives());
    // Stores are dropped; lookups and loads need no engine.
    scheduler.finds("meanwhile", 0, &keys);
    scheduler.end_session("meanwhile");
    assert_eq!(worker.store(round(3), &chain(3, 2), 1), all_dropped(2));
    assert_eq!(worker.load(&held.handles, 7), all_loaded(CHUNKS));
    engine.restart();
    worker.ready();
    scheduler.ready();
    assert_eq!((engine.stat("warm_start"), engine.stat("chunks_recovered")), (1, CHUNKS as u64));
    engine.stat_becomes("leases", 1);
    assert_eq!(engine.stat("reattachments"), 2);
    assert_eq!(scheduler.lookup("after", 0, &keys).chunks, CHUNKS as u32);
    assert_eq!(worker.store(round(4), &chain(4, CHUNKS), 3), all_stored(CHUNKS));

    // A clean end leaves nothing.
    scheduler.end_session("after");
    scheduler.end_session("held");
    worker.shutdown();
    scheduler.shutdown();
    engine.settles(0);
    assert_eq!(engine.terminate(), Some(0));
    assert!(segments(&engine.name).is_empty());
}

/// A test for each combination of what the engine and the clients are without.
macro_rules! essentials {
    ($($name:ident: $tag:literal, $engine:literal, $clients:literal;)+) => {
        $(
            #[test]
            fn $name() {
                essentials($tag, $engine, $clients);
            }
        )+
    };
}

essentials! {
    with_everything_neither_stand_in_is_used: "with", "", "";
    an_engine_without_robust_lists: "er", "robust", "";
    clients_without_robust_lists: "cr", "", "robust";
    nobody_has_robust_lists: "br", "robust", "robust";
    an_engine_without_waitv: "ew", "waitv", "";
    clients_without_waitv: "cw", "", "waitv";
    nobody_has_either: "b", "robust,waitv", "robust,waitv";
}

/// Clients of either kind outlive engines of either kind.
#[test]
fn engines_with_and_without_robust_lists_follow_one_another() {
    let mut engine = EngineProcess::start_in(&[(WITHOUT, "robust")], "turns", 16);
    let mut peers = [worker_in(&[(WITHOUT, "robust")], &engine), worker_in(&[], &engine)];
    let mut scheduler = scheduler_in(&[(WITHOUT, "robust,waitv")], &engine);
    let keys = chain(1, CHUNKS);
    assert_eq!(peers[0].store(round(1), &keys, 7), all_stored(CHUNKS));
    for (cycle, without) in (2u32..).zip(["", "robust", "robust,waitv", ""]) {
        // A client of either kind dies while there is no engine.
        let mut orphans = [worker_in(&[(WITHOUT, "robust")], &engine), worker_in(&[], &engine)];
        engine.kill();
        orphans.iter_mut().for_each(|orphan| orphan.kill());
        engine.move_to(&[(WITHOUT, without)]);
        engine.restart();
        peers.iter_mut().for_each(Peer::ready);
        scheduler.ready();
        assert_eq!(engine.view().means(), means_without(without));
        assert_eq!((engine.stat("warm_start"), engine.stat("reattachments")), (1, 3));
        let found = scheduler.lookup(&format!("r{cycle}"), 0, &keys);
        assert_eq!(peers[0].load(&found.handles, 7), all_loaded(CHUNKS));
        assert_eq!(peers[1].store(round(cycle), &chain(u64::from(cycle), 2), 1), all_stored(2));
        engine.stat_becomes("clients", 3);
    }
    engine.settles_without((peers, scheduler));
}

/// A lock belongs to an open file, and `fork` copies descriptors. A child that lives on must not keep the lock of its parent.
#[test]
fn a_child_of_fork_does_not_keep_its_dead_parent_alive() {
    const NAME: &str = "a_child_of_fork_does_not_keep_its_dead_parent_alive";
    isolated(NAME, || {
        let engine = EngineProcess::start_in(&[], "orphan", 16);
        let (gone, going) = nix::unistd::pipe().unwrap();
        // SAFETY: this process has one other thread, the harness's; the child goes on alone (see tests/fork.rs).
        let parent = match unsafe { fork() }.unwrap() {
            ForkResult::Parent { child } => child,
            ForkResult::Child => {
                // SAFETY: no other thread of this process reads its environment now.
                unsafe { std::env::set_var(WITHOUT, "robust") };
                let own = client(Role::Scheduler, &SchedulerSpec::new(&engine.name).client);
                own.wait_ready(LIMIT).unwrap();
                // SAFETY: the child calls `read` and `_exit`.
                if let ForkResult::Child = unsafe { fork() }.unwrap() {
                    drop(going);
                    let _ = nix::unistd::read(&gone, &mut [0]);
                    // SAFETY: ends the process at once.
                    unsafe { libc::_exit(0) };
                }
                loop {
                    std::thread::sleep(SECOND);
                }
            }
        };
        engine.stat_becomes("clients", 1);
        let (_, told) = notices(&engine.view(), &engine.lobby());
        assert_eq!(told, [DeathNotice::FileLock]);
        // Waits until the grandchild is there.
        let children = format!("/proc/{parent}/task/{parent}/children");
        eventually("the child has a child", || !std::fs::read_to_string(&children).unwrap().is_empty());
        kill(parent, Signal::SIGKILL).unwrap();
        let view = engine.view();
        within_seconds(&view, "the parent is dead", || {
            (stat_of(&view, "clients"), stat_of(&view, "deaths")) == (0, 1)
        });
        nix::sys::wait::waitpid(parent, None).unwrap();
        drop(going);
    });
}

/// Negative control: where no process looks at locks, a death is never noticed.
#[test]
fn without_looks_at_locks_nobody_notices_a_death() {
    let broken: &[(&'static str, &str)] = &[(WITHOUT, "robust"), (BREAK, Rule::LooksAtLocks.name())];
    let mut engine = EngineProcess::start_in(broken, "blind", 16);
    let mut worker = worker_in(broken, &engine);
    let mut victim = worker_in(broken, &engine);
    victim.kill();
    std::thread::sleep(SECOND);
    assert_eq!((engine.stat("clients"), engine.stat("deaths")), (2, 0));
    engine.kill();
    std::thread::sleep(SECOND);
    assert_ne!(worker.health(), "dead");
}

/// Negative control: a claim without its lock passes for a dead owner's.
#[test]
fn without_the_lock_the_living_pass_for_dead() {
    let broken: &[(&'static str, &str)] = &[(WITHOUT, "robust"), (BREAK, Rule::LifeLock.name())];
    let engine = EngineProcess::start_in(broken, "lockless", 16);
    assert!(!engine.view().owner_lives());
    let mut peer = Peer::spawn();
    peer.add_scheduler(&SchedulerSpec::new(&engine.name));
    eventually("its clients think it dead", || peer.health() == "dead");
    // And the other way round.
    let engine = EngineProcess::start("lockless-too", 16);
    let mut peer = Peer::spawn_with(broken);
    peer.add_scheduler(&SchedulerSpec::new(&engine.name));
    let lobby = engine.lobby();
    eventually("it is reaped", || stat_of(&engine.view(), "deaths") > 0);
    drop(peer);
    eventually("all is free", || lobby.life_words.iter().all(|word| word.life() == Life::Unclaimed));
}

/// `kvring remove`, like a start, learns from locks which engine is dead, and leaves a living one alone.
#[test]
fn what_a_dead_engine_without_robust_lists_left_is_removed_a_living_ones_is_not() {
    let mut engine = EngineProcess::start_in(&[(WITHOUT, "robust")], "remove", 16);
    let name = EngineName::new(&engine.name).unwrap();
    let refused = kvring_engine::segments::remove(&name, false, Duration::ZERO);
    assert!(
        matches!(refused, Err(kvring_engine::segments::SetupError::AlreadyRunning { .. })),
        "{refused:?}"
    );
    engine.kill();
    let view = engine.view();
    assert!(view.segment.life_words[OWNER_WORD].is_alive(), "nobody has looked yet");
    assert!(!view.owner_lives());
    let removed = kvring_engine::segments::remove(&name, false, SECOND).unwrap();
    assert_eq!((removed.segments, removed.forced_pid), (3, None));
    assert!(view.segment.superblock().is_retired());
    assert_eq!(view.segment.info().unhealthy.load(Ordering::Relaxed), 0);
    assert!(segments(&engine.name).is_empty());
}
