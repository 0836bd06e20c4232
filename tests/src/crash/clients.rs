//! A client dies at a place; everybody else goes on, and somebody takes its part.

use super::cast::{Cast, PAIR, SHARD, Whose, scheduler_spec, worker_spec};
use super::checks::Checks;
use super::engines::engine;
use super::settled::{is_gone, is_settled};
use super::{FAIL_POINT, was_killed};
use crate::engine::EngineProcess;
use crate::peer::Peer;
use crate::proto::{Ask, Found, Tell, all_stored};
use crate::wait::until;
use kvring_adapter::Key;
use kvring_shm_abi::failpoint::Place;
use serde_json::json;
use std::time::Duration;

/// What a client in another process has come to.
type Step = fn(&mut Checks, &mut EngineProcess, &mut Cast, &mut Peer) -> bool;

fn ready() -> Ask {
    Ask::WaitReady
}

fn store(cast: &mut Cast, keys: &[Key], version: u64) -> Ask {
    let round = cast.latest_round();
    let round = (round.source, round.number);
    Ask::Store { request: "store".to_owned(), round, parent: None, keys: keys.to_vec(), version }
}

/// Both ranks store a group: rank 0 here, rank 1 there. False where the other one dies over it.
fn stores(checks: &mut Checks, _: &mut EngineProcess, cast: &mut Cast, victim: &mut Peer) -> bool {
    let group = cast.store_by(Whose::Pair, 3, 0..1);
    let (keys, version) = cast.content(group);
    let ask = store(cast, &keys, version);
    let told = victim.try_ask(&ask);
    cast.settle(checks, || false);
    // Whether its commit was done or not, nobody has been told.
    let done = matches!(told, Some(Tell::Stored(stored)) if stored == all_stored(3));
    cast.groups[group].acknowledged &= done;
    checks.holds(told.is_none() || done, format_args!("a store of both ranks: {told:?}"));
    told.is_some()
}

fn leases(checks: &mut Checks, _: &mut EngineProcess, cast: &mut Cast, victim: &mut Peer) -> bool {
    let (keys, _) = cast.content(0);
    let expected = keys.len() as u32;
    match victim.try_ask(&Ask::Lookup { request: "theirs".to_owned(), admission: 0, keys }) {
        Some(Tell::Found(Found { chunks, .. })) => {
            checks.same("what the other client finds", expected, chunks);
            true
        }
        _ => false,
    }
}

fn restarts(checks: &mut Checks, engine: &mut EngineProcess, cast: &mut Cast, victim: &mut Peer) -> bool {
    engine.kill();
    engine.restart();
    cast.is_ready(checks, || false);
    victim.try_ask(&ready()).is_some()
}

/// Another arena: whoever had a claim on the old one gives it up.
fn starts_anew(checks: &mut Checks, engine: &mut EngineProcess, cast: &mut Cast, victim: &mut Peer) -> bool {
    engine.kill();
    engine.reconfigure(&json!({ "cold": true }));
    engine.restart();
    cast.finish_copies(checks);
    cast.lost_everything();
    engine.is_allocated();
    cast.is_ready(checks, || false);
    victim.try_ask(&ready()).is_some()
}

/// A client with a worker (rank 1 of the pair) and a scheduler dies at the `time`th time that it comes to `place`.
///
/// # Panics
/// Where something else goes wrong than what is being tested.
#[must_use]
pub fn dies_at(place: Place, time: u32) -> Vec<String> {
    let mut checks = Checks::new();
    let mut engine = engine("client", 8);
    let mut cast = Cast::new(&engine.name);
    let mut victim = Peer::spawn_with(&[(FAIL_POINT, &format!("{place}:{time}"))]);
    let worker = worker_spec(&engine.name, PAIR, 2, 1, SHARD);
    let scheduler = scheduler_spec(&engine.name, PAIR, 2);
    let comes = [Ask::Worker(Box::new(worker.clone())), Ask::Scheduler(Box::new(scheduler)), ready()];
    let mut lives = comes.iter().all(|ask| victim.try_ask(ask).is_some());
    let steps: [Step; 5] = [stores, leases, restarts, stores, starts_anew];
    for step in steps {
        lives = lives && step(&mut checks, &mut engine, &mut cast, &mut victim);
    }
    if lives {
        checks.holds(false, format_args!("{place}:{time} was not reached"));
        return checks.finish();
    }
    let status = victim.has_ended();
    checks.holds(
        status.is_some_and(was_killed),
        format_args!("{place}:{time}: it ended by itself: {status:?}"),
    );
    // Nothing of it is left but a round that somebody has to do again.
    let (clients, held) = (cast.clients().len() as u64, cast.leases() as u64);
    let writing = if cast.is_copying() { 4 } else { 0 };
    is_settled(&mut checks, &engine, clients, held, writing, true);
    cast.loads_what_is_leased(&mut checks, "beside a client that died");
    cast.finds_everything(&mut checks, "beside a client that died");
    takes_its_part(&mut checks, &engine, &mut cast);
    cast.finish_copies(&mut checks);
    cast.stores_again_what_was_dropped(&mut checks);
    cast.finds_everything(&mut checks, "in the end");
    is_settled(&mut checks, &engine, clients, held, 0, false);
    cast.ends_its_sessions();
    drop(cast);
    is_gone(&mut checks, &mut engine);
    checks.finish()
}

/// The same client stops there instead, and engines die until it goes on: it finds the latest one, with all that it holds.
///
/// # Panics
/// Where something else goes wrong than what is being tested.
#[must_use]
pub fn stops_at(place: Place, time: u32, restarts: u32) -> Vec<String> {
    let mut checks = Checks::new();
    let mut engine = engine("client-stop", 8);
    let mut cast = Cast::new(&engine.name);
    let mut victim = Peer::spawn_with(&[(FAIL_POINT, &format!("{place}:{time}:stop"))]);
    let mut has_stopped = false;
    let mut ask = |checks: &mut Checks, engine: &mut EngineProcess, cast: &Cast, ask: &Ask| {
        victim.begin(ask);
        until(format_args!("{ask:?} is answered"), || {
            if !has_stopped && crate::engine::has_stopped(victim.pid()) {
                has_stopped = true;
                for _ in 0..restarts {
                    engine.kill();
                    engine.restart();
                    cast.is_ready(checks, || false);
                }
                victim.resume();
            }
            victim.end_within(ask, Duration::from_millis(1))
        })
    };
    let worker = worker_spec(&engine.name, PAIR, 2, 1, SHARD);
    let scheduler = scheduler_spec(&engine.name, PAIR, 2);
    for comes in [Ask::Worker(Box::new(worker)), Ask::Scheduler(Box::new(scheduler)), ready()] {
        let told = ask(&mut checks, &mut engine, &cast, &comes);
        checks.holds(matches!(told, Tell::Done), format_args!("{comes:?}: {told:?}"));
    }
    for step in 0..4 {
        if step == 1 {
            engine.kill();
            engine.restart();
        } else if step == 2 {
            cast.loads_what_is_leased(&mut checks, "beside a client that stopped");
            cast.finds_everything(&mut checks, "beside a client that stopped");
            engine.kill();
            engine.reconfigure(&json!({ "cold": true }));
            engine.restart();
            engine.reconfigure(&json!({ "cold": false }));
            cast.finish_copies(&mut checks);
            cast.lost_everything();
            engine.is_allocated();
        }
        cast.is_ready(&mut checks, || false);
        ask(&mut checks, &mut engine, &cast, &ready());
        if step == 3 {
            break;
        }
        let group = cast.store_by(Whose::Pair, 3, 0..1);
        let (keys, version) = cast.content(group);
        let store = store(&mut cast, &keys, version);
        let told = ask(&mut checks, &mut engine, &cast, &store);
        cast.settle(&mut checks, || false);
        let done = matches!(told, Tell::Stored(stored) if stored == all_stored(3));
        cast.groups[group].acknowledged &= done;
        checks.holds(matches!(told, Tell::Stored(_)), format_args!("a store: {told:?}"));
        // Its scheduler may be later than its worker: until then it finds nothing, as it may.
        ask(&mut checks, &mut engine, &cast, &ready());
        let lookup = Ask::Lookup { request: format!("theirs-{step}"), admission: 0, keys };
        let told = ask(&mut checks, &mut engine, &cast, &lookup);
        let expected = if cast.groups[group].acknowledged { 3 } else { 0 };
        let found = matches!(&told, Tell::Found(found) if found.chunks >= expected);
        checks.holds(found, format_args!("{expected} chunks were stored: {told:?}"));
    }
    let told = ask(&mut checks, &mut engine, &cast, &Ask::Shutdown);
    checks.holds(matches!(told, Tell::Done), format_args!("a client's end: {told:?}"));
    checks.holds(has_stopped, format_args!("{place}:{time} was not reached"));
    cast.is_ready(&mut checks, || false);
    cast.finish_copies(&mut checks);
    cast.stores_again_what_was_dropped(&mut checks);
    cast.finds_everything(&mut checks, "in the end");
    let (clients, held) = (cast.clients().len() as u64, cast.leases() as u64);
    is_settled(&mut checks, &engine, clients, held, 0, false);
    cast.ends_its_sessions();
    drop(cast);
    is_gone(&mut checks, &mut engine);
    checks.finish()
}

/// Another process stores for the same rank what the dead one did not.
fn takes_its_part(checks: &mut Checks, engine: &EngineProcess, cast: &mut Cast) {
    let mut heir = Peer::spawn();
    for ask in [Ask::Worker(Box::new(worker_spec(&engine.name, PAIR, 2, 1, SHARD))), ready()] {
        let told = heir.try_ask(&ask);
        checks.holds(matches!(told, Some(Tell::Done)), format_args!("the heir: {told:?}"));
    }
    for group in cast.unfinished(Whose::Pair) {
        cast.store_again_by(group, 0..1);
        let (keys, version) = cast.content(group);
        let ask = store(cast, &keys, version);
        let told = heir.try_ask(&ask);
        cast.settle(checks, || false);
        let Some(Tell::Stored(stored)) = told else {
            checks.holds(false, format_args!("the heir's store: {told:?}"));
            return;
        };
        checks.same("dropped by the heir", 0, stored.dropped);
    }
    heir.shutdown();
}
