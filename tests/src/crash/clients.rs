//! A client dies at a place; everybody else goes on, and another client takes its part.

use super::cast::{Cast, Whose};
use super::checks::Checks;
use super::scene::{PAIR, SHARD, Scene, scheduler_spec, worker_spec};
use super::{FAIL_POINT, was_killed};
use crate::engine::EngineProcess;
use crate::peer::{Ask, Peer, value_of};
use crate::proto::{Found, Stored, all_stored};
use crate::wait::until;
use kvring_shm_abi::failpoint::Place;
use serde_json::json;
use std::time::Duration;

/// A step of a client in another process: false where it dies.
type Step = fn(&mut Checks, &mut EngineProcess, &mut Cast, &mut Peer) -> bool;

/// The store of a group by the latest round.
fn store(cast: &Cast, group: usize) -> Ask {
    let (keys, version) = cast.content(group);
    Ask::store(cast.latest_round(), &keys, version)
}

/// What brings a worker (rank 1 of the pair) and a scheduler up.
fn comes(engine: &EngineProcess) -> [Ask; 3] {
    let worker = worker_spec(&engine.name, PAIR, 2, 1, SHARD);
    let scheduler = scheduler_spec(&engine.name, PAIR);
    [Ask::Worker(Box::new(worker)), Ask::Scheduler(Box::new(scheduler)), Ask::WaitReady]
}

/// Both ranks store a group: rank 0 here, rank 1 there. False where the other one dies over it.
fn stores(checks: &mut Checks, _: &mut EngineProcess, cast: &mut Cast, victim: &mut Peer) -> bool {
    let group = cast.store_by(Whose::Pair, 3, 0..1);
    let told = victim.try_ask(&store(cast, group));
    cast.settle(checks, || false);
    // A client that has died has told nobody whether its commit was done.
    let done = told.as_ref().and_then(value_of::<Stored>) == Some(all_stored(3));
    cast.groups[group].acknowledged &= done;
    checks.holds(told.is_none() || done, format_args!("a store of both ranks: {told:?}"));
    told.is_some()
}

fn leases(checks: &mut Checks, _: &mut EngineProcess, cast: &mut Cast, victim: &mut Peer) -> bool {
    let (keys, _) = cast.content(0);
    let Some(found) = victim.try_ask(&Ask::lookup("theirs", 0, &keys)) else { return false };
    let chunks = value_of::<Found>(&found).map(|found| found.chunks);
    checks.same("what the other client finds", Some(keys.len() as u32), chunks);
    true
}

fn restarts(checks: &mut Checks, engine: &mut EngineProcess, cast: &mut Cast, victim: &mut Peer) -> bool {
    engine.kill_and_restart();
    cast.is_ready(checks, || false);
    victim.try_ask(&Ask::WaitReady).is_some()
}

/// Another arena: every client gives up its claim on the old one.
fn starts_anew(checks: &mut Checks, engine: &mut EngineProcess, cast: &mut Cast, victim: &mut Peer) -> bool {
    engine.kill();
    engine.reconfigure(&json!({ "cold": true }));
    engine.restart();
    cast.finish_copies(checks);
    cast.lost_everything();
    engine.is_allocated();
    cast.is_ready(checks, || false);
    victim.try_ask(&Ask::WaitReady).is_some()
}

/// A client with a worker (rank 1 of the pair) and a scheduler dies at the `time`th time that it comes to `place`.
pub fn dies_at(place: Place, time: u32) -> Vec<String> {
    let Scene { mut checks, mut engine } = Scene::new("client", 8);
    let mut cast = Cast::new(&engine.name);
    let mut victim = Peer::spawn_with(&[(FAIL_POINT, &format!("{place}:{time}"))]);
    let mut lives = comes(&engine).iter().all(|ask| victim.try_ask(ask).is_some());
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
    // Nothing of it is left but a round that another client has to do again.
    let (clients, held) = (cast.clients().len() as u64, cast.leases() as u64);
    let writing = if cast.is_copying() { 4 } else { 0 };
    checks.is_settled(&engine, clients, held, writing, true);
    cast.loads_what_is_leased(&mut checks, "beside a client that died");
    cast.finds_everything(&mut checks, "beside a client that died");
    takes_its_part(&mut checks, &engine, &mut cast);
    cast.finish_copies(&mut checks);
    cast.stores_again_what_was_dropped(&mut checks);
    cast.finds_everything(&mut checks, "in the end");
    checks.is_settled(&engine, clients, held, 0, false);
    cast.ends_its_sessions();
    drop(cast);
    checks.is_gone(&mut engine);
    checks.finish()
}

/// The same client stops there instead, and engines die until it goes on: it finds the latest one, with all that it holds.
pub fn stops_at(place: Place, time: u32, restarts: u32) -> Vec<String> {
    let Scene { mut checks, mut engine } = Scene::new("client-stop", 8);
    let mut cast = Cast::new(&engine.name);
    let mut victim = Peer::spawn_with(&[(FAIL_POINT, &format!("{place}:{time}:stop"))]);
    let mut has_stopped = false;
    let mut ask = |checks: &mut Checks, engine: &mut EngineProcess, cast: &Cast, ask: &Ask| {
        victim.begin(ask);
        until(format_args!("{ask:?} is answered"), || {
            if !has_stopped && victim.is_stopped() {
                has_stopped = true;
                for _ in 0..restarts {
                    engine.kill_and_restart();
                    cast.is_ready(checks, || false);
                }
                victim.resume();
            }
            victim.end_within(Duration::from_millis(1))
        })
    };
    for comes in comes(&engine) {
        let told = ask(&mut checks, &mut engine, &cast, &comes);
        checks.holds(told.is_ok(), format_args!("{comes:?}: {told:?}"));
    }
    for step in 0..4 {
        if step == 1 {
            engine.kill_and_restart();
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
        let _ = ask(&mut checks, &mut engine, &cast, &Ask::WaitReady);
        if step == 3 {
            break;
        }
        let group = cast.store_by(Whose::Pair, 3, 0..1);
        let store = store(&cast, group);
        let told = ask(&mut checks, &mut engine, &cast, &store);
        cast.settle(&mut checks, || false);
        let stored = value_of::<Stored>(&told);
        cast.groups[group].acknowledged &= stored == Some(all_stored(3));
        checks.holds(stored.is_some(), format_args!("a store: {told:?}"));
        // Its scheduler may be later than its worker: until then it finds nothing, as it may.
        let _ = ask(&mut checks, &mut engine, &cast, &Ask::WaitReady);
        let lookup = Ask::lookup(&format!("theirs-{step}"), 0, &cast.content(group).0);
        let told = ask(&mut checks, &mut engine, &cast, &lookup);
        let expected = if cast.groups[group].acknowledged { 3 } else { 0 };
        let found = value_of::<Found>(&told).is_some_and(|found| found.chunks >= expected);
        checks.holds(found, format_args!("{expected} chunks were stored: {told:?}"));
    }
    let told = ask(&mut checks, &mut engine, &cast, &Ask::Shutdown);
    checks.holds(told.is_ok(), format_args!("a client's end: {told:?}"));
    checks.holds(has_stopped, format_args!("{place}:{time} was not reached"));
    cast.is_ready(&mut checks, || false);
    cast.finish_copies(&mut checks);
    cast.stores_again_what_was_dropped(&mut checks);
    cast.finds_everything(&mut checks, "in the end");
    let (clients, held) = (cast.clients().len() as u64, cast.leases() as u64);
    checks.is_settled(&engine, clients, held, 0, false);
    cast.ends_its_sessions();
    drop(cast);
    checks.is_gone(&mut engine);
    checks.finish()
}

/// Another process stores for the same rank what the dead one did not.
fn takes_its_part(checks: &mut Checks, engine: &EngineProcess, cast: &mut Cast) {
    let mut heir = Peer::spawn();
    for ask in [Ask::Worker(Box::new(worker_spec(&engine.name, PAIR, 2, 1, SHARD))), Ask::WaitReady] {
        let told = heir.try_ask(&ask);
        checks.holds(matches!(told, Some(Ok(_))), format_args!("the heir: {told:?}"));
    }
    for group in cast.unfinished(Whose::Pair) {
        cast.submit(group, 0..1);
        let told = heir.try_ask(&store(cast, group));
        cast.settle(checks, || false);
        let Some(stored) = told.as_ref().and_then(value_of::<Stored>) else {
            checks.holds(false, format_args!("the heir's store: {told:?}"));
            return;
        };
        checks.same("dropped by the heir", 0, stored.dropped);
    }
    heir.shutdown();
}
