//! What the other rules are for: each of these scenarios goes wrong where one is broken.

use super::FAIL_POINT;
use super::cast::{PAIR, SHARD, SOLO, scheduler_spec, worker_spec};
use super::checks::Checks;
use super::engines::{dies_at, engine};
use super::settled::is_gone;
use super::table::Way;
use crate::engine::{stat_of, within_beats};
use crate::kv::chain;
use crate::peer::Peer;
use crate::proto::{Loaded, all_loaded, all_stored};
use crate::raw::RawClient;
use crate::scheduler::SchedulerSide;
use crate::worker::WorkerSide;
use kvring_adapter::{Role, Round};
use kvring_shm_abi::failpoint::{self, Place, Rule};
use kvring_shm_abi::life::Life;
use serde_json::json;
use std::time::{Duration, Instant};

fn round(source: u32, number: u32) -> Round {
    Round { source, number }
}

fn ready(checks: &mut Checks, worker: &WorkerSide) {
    checks.becomes("a worker that is ready", true, || worker.wait_ready(Duration::from_millis(5)).is_ok());
}

fn scheduler_of(checks: &mut Checks, engine: &str, namespace: u64, world: u32) -> SchedulerSide {
    let scheduler = SchedulerSide::start(&scheduler_spec(engine, namespace, world));
    checks.becomes("a scheduler that is ready", true, || scheduler.client().is_healthy());
    scheduler
}

fn worker_of(checks: &mut Checks, engine: &str, namespace: u64, world: u32, rank: u32) -> WorkerSide {
    let worker = WorkerSide::start(&worker_spec(engine, namespace, world, rank, SHARD)).expect("a worker");
    ready(checks, &worker);
    worker
}

/// A death while a slot that nobody has used yet gets its header: a word without its fields is nonsense to a recovery.
///
/// # Panics
/// Where something else goes wrong than what is being tested.
#[must_use]
pub fn a_header_half_written() -> Vec<String> {
    let rule = Rule::WordLast;
    let place = if failpoint::broken(rule) { Place::WritingFields } else { Place::WritingWord };
    dies_at(place, Way::Broken(rule), 1, false)
}

/// Handles of an arena that is gone, where its successor has the same keys in the same slots, with other content.
///
/// # Panics
/// Where something else goes wrong than what is being tested.
#[must_use]
pub fn handles_of_another_arena() -> Vec<String> {
    let mut checks = Checks::new();
    let mut engine = engine("arena", 2);
    let mut worker = worker_of(&mut checks, &engine.name, SOLO, 1, 0);
    let mut scheduler = scheduler_of(&mut checks, &engine.name, SOLO, 1);
    let keys = chain(1, 8);
    checks.same("a store", all_stored(8), worker.store("r", round(1, 1), None, &keys, 1));
    let old = scheduler.lookup("r", 0, &keys).expect("a lookup within the limits");
    engine.kill();
    engine.reconfigure(&json!({ "cold": true }));
    engine.restart();
    engine.is_allocated();
    ready(&mut checks, &worker);
    checks.becomes("a scheduler that is ready", true, || scheduler.client().is_healthy());
    checks.same("a store", all_stored(8), worker.store("r", round(1, 2), None, &keys, 2));
    let new = scheduler.lookup("r", 1, &keys).expect("a lookup within the limits");
    let slots = |found: &crate::proto::Found| -> Vec<(u32, u64)> {
        found.ranks[0].iter().map(|handle| (handle.slot, handle.generation)).collect()
    };
    assert_eq!(slots(&old), slots(&new), "this scenario is about equal slots");
    let loaded = worker.load("r", &old.ranks[0], 1);
    checks.same("wrong bytes that were called right", 0, loaded.wrong);
    checks.same("loads of another arena", Loaded { failed: 8, ..Loaded::default() }, loaded);
    checks.same("loads of this arena", all_loaded(8), worker.load("r", &new.ranks[0], 2));
    drop((worker, scheduler));
    is_gone(&mut checks, &mut engine);
    checks.finish()
}

/// Two ranks committed in different rounds when the engine died: together they are no chunk.
///
/// # Panics
/// Where something else goes wrong than what is being tested.
#[must_use]
pub fn shards_of_two_rounds_at_a_restart() -> Vec<String> {
    let mut checks = Checks::new();
    let mut engine = engine("rounds", 2);
    let mut pair = [0, 1].map(|rank| worker_of(&mut checks, &engine.name, PAIR, 2, rank));
    let mut scheduler = scheduler_of(&mut checks, &engine.name, PAIR, 2);
    let keys = chain(1, 4);
    for (rank, worker) in (0..).zip(&mut pair) {
        let version = u64::from(rank);
        checks.same("a store", all_stored(4), worker.store("r", round(rank, 1), None, &keys, version));
    }
    engine.kill();
    engine.restart();
    pair.iter().for_each(|worker| ready(&mut checks, worker));
    checks.becomes("a scheduler that is ready", true, || scheduler.client().is_healthy());
    let found = scheduler.lookup("r", 0, &keys).expect("a lookup within the limits");
    checks.same("chunks that nobody has stored", 0, found.chunks);
    for (rank, worker) in pair.iter_mut().enumerate() {
        let loaded = worker.load("r", &found.ranks[rank], 1);
        checks.same("wrong bytes that were called right", 0, loaded.wrong);
    }
    // In one round they are one.
    for worker in &mut pair {
        checks.same("a store", all_stored(4), worker.store("r", round(2, 1), None, &keys, 7));
    }
    let found = scheduler.lookup("r", 1, &keys).expect("a lookup within the limits");
    checks.same("chunks that both have stored", 4, found.chunks);
    for (rank, worker) in pair.iter_mut().enumerate() {
        checks.same("loads", all_loaded(found.chunks as usize), worker.load("r", &found.ranks[rank], 7));
    }
    scheduler.api().end_session("r");
    drop((pair, scheduler));
    is_gone(&mut checks, &mut engine);
    checks.finish()
}

/// One rank stored garbage in a round that failed; both store the chunk again, in another.
///
/// # Panics
/// Where something else goes wrong than what is being tested.
#[must_use]
pub fn a_round_that_failed() -> Vec<String> {
    let mut checks = Checks::new();
    let mut engine = engine("failed", 2);
    let mut pair = [0, 1].map(|rank| worker_of(&mut checks, &engine.name, PAIR, 2, rank));
    let mut scheduler = scheduler_of(&mut checks, &engine.name, PAIR, 2);
    let keys = chain(1, 4);
    checks.same("garbage", all_stored(4), pair[0].store("r", round(1, 1), None, &keys, 66));
    for worker in &mut pair {
        let stored = worker.store("r", round(1, 2), None, &keys, 1);
        checks.same("dropped", 0, stored.dropped);
    }
    let found = scheduler.lookup("r", 0, &keys).expect("a lookup within the limits");
    checks.same("chunks that were stored", 4, found.chunks);
    for (rank, worker) in pair.iter_mut().enumerate() {
        let loaded = worker.load("r", &found.ranks[rank], 1);
        checks.same("wrong bytes that were called right", 0, loaded.wrong);
    }
    scheduler.api().end_session("r");
    drop((pair, scheduler));
    is_gone(&mut checks, &mut engine);
    checks.finish()
}

/// A lookup is given up while the engine has not looked at it; the next one must not share its memory.
///
/// # Panics
/// Where something else goes wrong than what is being tested.
#[must_use]
pub fn a_lookup_after_one_that_was_given_up() -> Vec<String> {
    let mut checks = Checks::new();
    let mut engine = engine("region", 2);
    let mut worker = worker_of(&mut checks, &engine.name, SOLO, 1, 0);
    let mut spec = scheduler_spec(&engine.name, SOLO, 1);
    spec.polling = false;
    let mut scheduler = SchedulerSide::start(&spec);
    checks.becomes("a scheduler that is ready", true, || scheduler.client().is_healthy());
    let keys = chain(1, 8);
    checks.same("a store", all_stored(8), worker.store("r", round(1, 1), None, &keys, 1));
    engine.stop();
    scheduler.api().submit_lookup("given up", 0, &chain(2, 1)).expect("a lookup within the limits");
    scheduler.api().end_session("given up");
    scheduler.api().submit_lookup("r", 0, &keys).expect("a lookup within the limits");
    engine.resume();
    let mut found = None;
    checks.becomes("a lookup that is answered", true, || {
        found = scheduler.check("r");
        found.is_some()
    });
    let found = found.unwrap_or_default();
    checks.same("chunks found that were acknowledged", 8, found.chunks);
    let handles = found.ranks.first().cloned().unwrap_or_default();
    checks.same("loads", all_loaded(handles.len()), worker.load("r", &handles, 1));
    scheduler.api().end_session("r");
    drop((worker, scheduler));
    is_gone(&mut checks, &mut engine);
    checks.finish()
}

/// Somebody comes while the engine is at reclaiming what a dead client had.
///
/// # Panics
/// Where something else goes wrong than what is being tested.
#[must_use]
pub fn a_newcomer_during_a_reclaim() -> Vec<String> {
    let mut checks = Checks::new();
    let mut engine = engine("newcomer", 2);
    engine.kill();
    let started = engine.restart_with(&[(FAIL_POINT, &format!("{}:1:stop", Place::ReclaimSlots))]);
    checks.holds(started.is_ok(), "the engine did not start");
    engine.is_allocated();
    let mut victim = Peer::worker(&worker_spec(&engine.name, SOLO, 1, 0, SHARD));
    victim.kill();
    engine.has_stopped();
    let newcomer = SchedulerSide::start(&scheduler_spec(&engine.name, SOLO, 1));
    let lobby = engine.lobby();
    checks.becomes("an entry that the newcomer has published", true, || {
        let mut entries = lobby.life_words.iter().zip(lobby.entries.iter());
        let ours = std::process::id();
        entries.any(|(word, entry)| {
            matches!(word.life(), Life::Alive { .. }) && entry.read().is_some_and(|said| said.pid == ours)
        })
    });
    engine.resume();
    checks.becomes("a newcomer that is attached", true, || newcomer.client().is_healthy());
    if checks.is_clean() {
        drop(newcomer);
        is_gone(&mut checks, &mut engine);
    }
    checks.finish()
}

/// An engine is in the middle of taking over; a client that was stopped when its engine died wakes up.
///
/// # Panics
/// Where something else goes wrong than what is being tested.
#[must_use]
pub fn a_client_that_wakes_up_during_a_recovery() -> Vec<String> {
    let is_early = failpoint::broken(Rule::OddBeforeTheWords);
    let place = if is_early { Place::RecoveryEarlyWords } else { Place::RecoveryWords };
    let mut checks = Checks::new();
    let mut engine = engine("wakes", 2);
    let mut peer = Peer::worker(&worker_spec(&engine.name, SOLO, 1, 0, SHARD));
    checks.same("a store", all_stored(4), peer.store(round(1, 1), &chain(1, 4), 1));
    peer.stop();
    engine.kill();
    engine.launch(&[(FAIL_POINT, &format!("{place}:1:stop"))]);
    engine.has_stopped();
    peer.resume();
    let health = peer.health();
    checks.holds(health != "healthy", "an engine that has not recovered yet passes for a healthy one");
    engine.resume();
    checks.holds(engine.serves().is_ok(), "the engine did not start");
    peer.ready();
    let stored = peer.store(round(1, 2), &chain(1, 6), 1);
    checks.same("dropped", 0, stored.dropped);
    peer.shutdown();
    drop(peer);
    is_gone(&mut checks, &mut engine);
    checks.finish()
}

/// A client that is stopped does not come back for a while: what its entry says was meant for an earlier engine.
///
/// # Panics
/// Where something else goes wrong than what is being tested.
#[must_use]
pub fn an_entry_that_was_meant_for_an_earlier_engine() -> Vec<String> {
    let mut checks = Checks::new();
    let mut engine = engine("outdated", 2);
    let mut peer = Peer::worker(&worker_spec(&engine.name, SOLO, 1, 0, SHARD));
    peer.stop();
    engine.kill();
    engine.restart();
    engine.beats(20);
    checks.same("refusals of a client that has not asked", 0, engine.stat("refusals"));
    peer.resume();
    peer.ready();
    checks.same("refusals of a client that came back", 0, engine.stat("refusals"));
    checks.same("reattachments", 1, engine.stat("reattachments"));
    peer.shutdown();
    drop(peer);
    is_gone(&mut checks, &mut engine);
    checks.finish()
}

/// The keepers of a process for which devices write end, and it does not: the kernel marks their words while a copy goes
/// on. Then an engine comes and goes, if `restarts`; then the process ends.
///
/// # Panics
/// Where something else goes wrong than what is being tested.
#[must_use]
pub fn a_keeper_ends_before_its_process(restarts: bool) -> Vec<String> {
    let mut checks = Checks::new();
    let mut engine = engine("device", 4);
    let mut worker = worker_of(&mut checks, &engine.name, SOLO, 1, 0);
    let mut scheduler = scheduler_of(&mut checks, &engine.name, SOLO, 1);
    let keys = chain(1, 4);
    checks.same("a store", all_stored(4), worker.store("r", round(1, 1), None, &keys, 1));
    // Held, so that they outlive who takes all there is.
    checks.same("chunks", 4, scheduler.lookup("r", 0, &keys).expect("a lookup within the limits").chunks);
    let specs = (worker_spec(&engine.name, SOLO, 1, 0, SHARD), scheduler_spec(&engine.name, SOLO, 1));
    let mut peer = Peer::holding(&specs.0, &specs.1, true, &chain(2, 8));
    checks.same("chunks", 4, peer.lookup("theirs", 0, &keys).chunks);
    checks.becomes("leases", 2, || engine.stat("leases"));
    let written = engine.written_slots();
    checks.same("slots that are being written", 8, written.len());

    peer.end_keepers();
    let view = engine.view();
    // Also that with the slots: a client is not thrown out of anything but what a device may write.
    checks.becomes("leases and clients", [1, 2], || ["leases", "clients"].map(|name| stat_of(&view, name)));
    if restarts {
        engine.kill();
        engine.restart();
        checks.becomes("a worker and a scheduler that are ready", true, || {
            worker.client().is_healthy() && scheduler.client().is_healthy()
        });
    }
    checks.becomes("clients whose processes are waited for", 1, || engine.stat("clients_lingering"));
    checks.same("slots of a process that has not ended", &written, &engine.written_slots());
    let entry = written.values().next().copied().unwrap_or_default();
    let lobby = engine.lobby();
    checks.same("its life", Life::Dead, lobby.life_words[usize::from(entry)].life());
    checks.holds(lobby.entries[usize::from(entry)].read().is_some(), "its entry is not shown any more");

    // Somebody takes all there is.
    let mut raw = RawClient::attach(&engine.name, Role::Worker);
    let namespace = raw.register(SOLO, 1, 0, SHARD.shard_bytes());
    let taken = raw.take_all(namespace, 100);
    checks.holds(!taken.is_empty(), "nobody gets anything");
    let given = taken.iter().filter(|slot| written.contains_key(&(slot.slot as u32))).count();
    checks.same("slots given away while a device may write", 0, given);
    // Others go on.
    let found = scheduler.lookup("r", 1, &keys).expect("a lookup within the limits");
    checks.same("chunks", 4, found.chunks);
    checks.same("loads", all_loaded(found.chunks as usize), worker.load("r", &found.ranks[0], 1));
    engine.beats(100);
    checks.same("clients whose processes are waited for", 1, engine.stat("clients_lingering"));

    let view = engine.view();
    let began = Instant::now();
    peer.kill();
    let ended = Instant::now();
    let what = "the end of its process, and its slots are free";
    checks.holds(within_beats(&view, 2000, || stat_of(&view, "slots_orphaned") == 0), what);
    eprintln!("killed {:?}, free {:?} after that", ended.duration_since(began), ended.elapsed());
    if checks.is_clean() {
        // What it had, and nothing but that.
        let freed = raw.take_all(namespace, 200);
        checks.same("slots that were its", 8, freed.len());
        checks.holds(freed.iter().all(|slot| written.contains_key(&(slot.slot as u32))), "others' slots");
    }
    checks.same("clients whose processes are waited for", 0, engine.stat("clients_lingering"));
    scheduler.api().end_session("r");
    drop((raw, worker, scheduler, peer));
    is_gone(&mut checks, &mut engine);
    checks.finish()
}

/// See [`a_keeper_ends_before_its_process`].
#[must_use]
pub fn a_keeper_that_ends_before_its_process() -> Vec<String> {
    a_keeper_ends_before_its_process(false)
}
