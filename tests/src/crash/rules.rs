//! Scenarios for the other rules: each goes wrong where its rule is broken.

use super::FAIL_POINT;
use super::engines::dies_at;
use super::scene::{PAIR, SHARD, SOLO, Scene, scheduler_spec, solo_spec};
use super::table::Way;
use crate::engine::{stat_of, within_beats};
use crate::kv::chain;
use crate::peer::Peer;
use crate::proto::{Found, all_failed, all_loaded, all_stored, round};
use crate::raw::RawClient;
use crate::scheduler::SchedulerSide;
use kvring_adapter::{Role, Round};
use kvring_shm_abi::failpoint::{self, Place, Rule};
use kvring_shm_abi::life::Life;
use serde_json::json;
use std::time::Instant;

/// A death while a slot that nobody has used yet gets its header: a word without its fields is nonsense to a recovery.
pub fn a_header_half_written() -> Vec<String> {
    let rule = Rule::WordLast;
    let place = if failpoint::broken(rule) { Place::WritingFields } else { Place::WritingWord };
    dies_at(place, Way::Broken(rule), 1, false)
}

/// Handles of an arena that is gone, where its successor has the same keys in the same slots, with other content.
pub fn handles_of_another_arena() -> Vec<String> {
    let mut scene = Scene::new("arena", 2);
    let (mut worker, mut scheduler) = (scene.worker(SOLO, 1, 0), scene.scheduler(SOLO));
    let keys = chain(1, 8);
    scene.checks.same("a store", all_stored(8), worker.store(round(1), &keys, 1));
    let old = scheduler.lookup("r", 0, &keys);
    scene.engine.reconfigure(&json!({ "cold": true }));
    scene.engine.kill_and_restart();
    scene.engine.is_allocated();
    scene.checks.is_ready(&worker);
    scene.checks.is_attached(&scheduler);
    scene.checks.same("a store", all_stored(8), worker.store(round(2), &keys, 2));
    let new = scheduler.lookup("r", 1, &keys);
    let words = |found: &Found| found.handles.iter().map(|handle| handle.word).collect::<Vec<_>>();
    assert_eq!(words(&old), words(&new), "this scenario is about equal chunks");
    let loaded = worker.load(&old.handles, 1);
    scene.checks.same("wrong bytes that were called right", 0, loaded.wrong);
    scene.checks.same("loads of another arena", all_failed(8), loaded);
    scene.checks.same("loads of this arena", all_loaded(8), worker.load(&new.handles, 2));
    scene.ends_without((worker, scheduler))
}

/// Two ranks committed in different rounds when the engine died: together they are no chunk.
pub fn shards_of_two_rounds_at_a_restart() -> Vec<String> {
    let mut scene = Scene::new("rounds", 2);
    let mut pair = [0, 1].map(|rank| scene.worker(PAIR, 2, rank));
    let mut scheduler = scene.scheduler(PAIR);
    let keys = chain(1, 4);
    for (rank, worker) in (0..).zip(&mut pair) {
        let stored = worker.store(Round { source: rank, number: 1 }, &keys, u64::from(rank));
        scene.checks.same("a store", all_stored(4), stored);
    }
    scene.engine.kill_and_restart();
    pair.iter().for_each(|worker| scene.checks.is_ready(worker));
    scene.checks.is_attached(&scheduler);
    let found = scheduler.lookup("r", 0, &keys);
    scene.checks.same("chunks that nobody has stored", 0, found.chunks);
    for worker in &mut pair {
        let loaded = worker.load(&found.handles, 1);
        scene.checks.same("wrong bytes that were called right", 0, loaded.wrong);
    }
    // In one round they are one.
    for worker in &mut pair {
        let stored = worker.store(Round { source: 2, number: 1 }, &keys, 7);
        scene.checks.same("a store", all_stored(4), stored);
    }
    let found = scheduler.lookup("r", 1, &keys);
    scene.checks.same("chunks that both have stored", 4, found.chunks);
    for worker in &mut pair {
        let loaded = worker.load(&found.handles, 7);
        scene.checks.same("loads", all_loaded(found.chunks as usize), loaded);
    }
    scheduler.api().end_session("r");
    scene.ends_without((pair, scheduler))
}

/// One rank stored garbage in a round that failed; both store the chunk again, in another round.
pub fn a_round_that_failed() -> Vec<String> {
    let mut scene = Scene::new("failed", 2);
    let mut pair = [0, 1].map(|rank| scene.worker(PAIR, 2, rank));
    let mut scheduler = scene.scheduler(PAIR);
    let keys = chain(1, 4);
    scene.checks.same("garbage", all_stored(4), pair[0].store(round(1), &keys, 66));
    for worker in &mut pair {
        scene.checks.same("dropped", 0, worker.store(round(2), &keys, 1).dropped);
    }
    let found = scheduler.lookup("r", 0, &keys);
    scene.checks.same("chunks that were stored", 4, found.chunks);
    for worker in &mut pair {
        let loaded = worker.load(&found.handles, 1);
        scene.checks.same("wrong bytes that were called right", 0, loaded.wrong);
    }
    scheduler.api().end_session("r");
    scene.ends_without((pair, scheduler))
}

/// A scheduler says that it holds some chunks, and then others, while the engine has not looked. Nobody waits for the answers;
/// still the messages must not share their memory, or the engine knows of the later chunks alone, and evicts the others.
pub fn a_hold_behind_one_that_was_not_read() -> Vec<String> {
    let mut scene = Scene::new("region", 2);
    let mut worker = scene.worker(SOLO, 1, 0);
    let mut scheduler = scene.scheduler(SOLO);
    let keys = chain(1, 8);
    scene.checks.same("a store", all_stored(8), worker.store(round(1), &keys, 1));
    scene.engine.stop();
    let found = [("first", &keys[..4]), ("second", &keys[4..])].map(|(request, keys)| {
        let found = scheduler.lookup(request, 0, keys);
        scene.checks.same("chunks found that were acknowledged", 4, found.chunks);
        found
    });
    scene.engine.resume();
    // More than twice what the arena has room for.
    for number in 2..12 {
        worker.store(round(number), &chain(number.into(), 8), 1);
    }
    for found in found {
        scene.checks.same("loads of what is held", all_loaded(4), worker.load(&found.handles, 1));
    }
    scheduler.ends(&["first", "second"]);
    scene.ends_without((worker, scheduler))
}

/// A client attaches while the engine is reclaiming what a dead client had.
pub fn a_newcomer_during_a_reclaim() -> Vec<String> {
    let mut scene = Scene::new("newcomer", 2);
    scene.engine.kill();
    let started = scene.engine.restart_with(&[(FAIL_POINT, &format!("{}:1:stop", Place::ReclaimSlots))]);
    scene.checks.holds(started.is_ok(), "the engine did not start");
    scene.engine.is_allocated();
    Peer::worker(&solo_spec(&scene.engine.name)).kill();
    scene.engine.has_stopped();
    let newcomer = SchedulerSide::start(&scheduler_spec(&scene.engine.name, SOLO));
    let lobby = scene.engine.lobby();
    scene.checks.becomes("an entry that the newcomer has published", true, || {
        let mut entries = lobby.life_words.iter().zip(lobby.entries.iter());
        let ours = std::process::id();
        entries.any(|(word, entry)| {
            matches!(word.life(), Life::Alive { .. }) && entry.read().is_some_and(|said| said.pid == ours)
        })
    });
    scene.engine.resume();
    scene.checks.becomes("a newcomer that is attached", true, || newcomer.client().is_healthy());
    if scene.checks.is_clean() { scene.ends_without(newcomer) } else { scene.checks.finish() }
}

/// A client was stopped when its engine died, and wakes up while another engine takes over.
pub fn a_client_that_wakes_up_during_a_recovery() -> Vec<String> {
    let is_early = failpoint::broken(Rule::OddBeforeTheWords);
    let place = if is_early { Place::RecoveryEarlyWords } else { Place::RecoveryWords };
    let mut scene = Scene::new("wakes", 2);
    let mut peer = Peer::worker(&solo_spec(&scene.engine.name));
    scene.checks.same("a store", all_stored(4), peer.store(round(1), &chain(1, 4), 1));
    peer.stop();
    scene.engine.kill();
    scene.engine.launch(&[(FAIL_POINT, &format!("{place}:1:stop"))]);
    scene.engine.has_stopped();
    peer.resume();
    let health = peer.health();
    scene.checks.holds(health != "healthy", "an engine that has not recovered yet passes for a healthy one");
    scene.engine.resume();
    scene.checks.holds(scene.engine.serves().is_ok(), "the engine did not start");
    peer.ready();
    scene.checks.same("dropped", 0, peer.store(round(2), &chain(1, 6), 1).dropped);
    peer.shutdown();
    scene.ends_without(peer)
}

/// A client that is stopped does not come back for a while: its entry still names an earlier engine.
pub fn an_entry_that_was_meant_for_an_earlier_engine() -> Vec<String> {
    let mut scene = Scene::new("outdated", 2);
    let mut peer = Peer::worker(&solo_spec(&scene.engine.name));
    peer.stop();
    scene.engine.kill_and_restart();
    scene.engine.beats(20);
    let refusals = scene.engine.stat("refusals");
    scene.checks.same("refusals of a client that has not asked", 0, refusals);
    peer.resume();
    peer.ready();
    let refusals = scene.engine.stat("refusals");
    scene.checks.same("refusals of a client that came back", 0, refusals);
    scene.checks.same("reattachments", 1, scene.engine.stat("reattachments"));
    peer.shutdown();
    scene.ends_without(peer)
}

/// The keepers of a process for which devices write end, and the process does not: the kernel marks their words while a
/// copy goes on. Then, if `restarts`, the engine is restarted. Then the process ends.
pub fn a_keeper_ends_before_its_process(restarts: bool) -> Vec<String> {
    let mut scene = Scene::new("device", 4);
    let (mut worker, mut scheduler) = (scene.worker(SOLO, 1, 0), scene.scheduler(SOLO));
    let name = scene.engine.name.clone();
    let keys = chain(1, 4);
    scene.checks.same("a store", all_stored(4), worker.store(round(1), &keys, 1));
    // Leased, so that another client that takes all slots does not get these.
    scene.checks.same("chunks", 4, scheduler.lookup("r", 0, &keys).chunks);
    let (spec, theirs) = (solo_spec(&name), scheduler_spec(&name, SOLO));
    let mut peer = Peer::holding(&spec, &theirs, true, Round { source: 77, number: 1 }, &chain(2, 8));
    scene.checks.same("chunks", 4, peer.lookup("theirs", 0, &keys).chunks);
    scene.checks.becomes("leases", 2, || scene.engine.stat("leases"));
    let written = scene.engine.written_slots();
    scene.checks.same("slots that are being written", 8, written.len());

    peer.end_keepers();
    let view = scene.engine.view();
    // Only the slots that a device may write wait for the process: its lease is free, and neither client is attached.
    let left = || ["leases", "clients"].map(|name| stat_of(&view, name));
    scene.checks.becomes("leases and clients", [1, 2], left);
    if restarts {
        scene.engine.kill_and_restart();
        scene.checks.is_ready(&worker);
        scene.checks.is_attached(&scheduler);
    }
    let lingering = "clients whose processes are waited for";
    scene.checks.becomes(lingering, 1, || scene.engine.stat("clients_lingering"));
    let now = scene.engine.written_slots();
    scene.checks.same("slots of a process that has not ended", &written, &now);
    let entry = usize::from(written.values().next().copied().unwrap_or_default());
    let lobby = scene.engine.lobby();
    scene.checks.same("its life", Life::Dead, lobby.life_words[entry].life());
    scene.checks.holds(lobby.entries[entry].read().is_some(), "its entry is not shown any more");

    // Another client takes all slots that it gets.
    let mut raw = RawClient::attach(&name, Role::Worker);
    let namespace = raw.register(SOLO, 1, 0, SHARD.shard_bytes());
    let taken = raw.take_all(namespace, 100);
    scene.checks.holds(!taken.is_empty(), "nobody gets anything");
    let given = taken.iter().filter(|slot| written.contains_key(&(slot.slot as u32))).count();
    scene.checks.same("slots given away while a device may write", 0, given);
    // Others go on.
    let found = scheduler.lookup("r", 1, &keys);
    scene.checks.same("chunks", 4, found.chunks);
    scene.checks.same("loads", all_loaded(found.chunks as usize), worker.load(&found.handles, 1));
    scene.engine.beats(100);
    scene.checks.same(lingering, 1, scene.engine.stat("clients_lingering"));

    let view = scene.engine.view();
    let began = Instant::now();
    peer.kill();
    let ended = Instant::now();
    let what = "the end of its process, and its slots are free";
    scene.checks.holds(within_beats(&view, 2000, || stat_of(&view, "slots_orphaned") == 0), what);
    eprintln!("killed {:?}, free {:?} after that", ended.duration_since(began), ended.elapsed());
    if scene.checks.is_clean() {
        // What it had, and nothing but that.
        let freed = raw.take_all(namespace, 200);
        scene.checks.same("slots that were its", 8, freed.len());
        let is_its = freed.iter().all(|slot| written.contains_key(&(slot.slot as u32)));
        scene.checks.holds(is_its, "others' slots");
    }
    scene.checks.same(lingering, 0, scene.engine.stat("clients_lingering"));
    scheduler.api().end_session("r");
    scene.ends_without((raw, worker, scheduler, peer))
}

/// See [`a_keeper_ends_before_its_process`].
pub fn a_keeper_that_ends_before_its_process() -> Vec<String> {
    a_keeper_ends_before_its_process(false)
}
