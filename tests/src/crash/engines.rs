//! An engine dies at a place; the next one goes on.

use super::cast::{Cast, SHARD, SOLO, Whose, worker_spec};
use super::checks::Checks;
use super::settled::{is_gone, is_settled};
use super::table::Way;
use super::{FAIL_POINT, was_killed};
use crate::engine::{EngineProcess, has_stopped, thread_state, view_of, within_beats};
use crate::kv::chain;
use crate::peer::Peer;
use crate::proto::Ask;
use crate::wait::{LIMIT, eventually};
use kvring_adapter::Key;
use kvring_shm_abi::failpoint::Place;
use kvring_shm_abi::sync::{AtomicBool, Ordering};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::json;
use std::process::ExitStatus;
use std::time::Duration;

/// How an engine of the crash suite is configured: slabs of 1 MiB, a fast beat, and patience with who comes back.
#[must_use]
pub fn engine(tag: &str, slabs: u64) -> EngineProcess {
    let fields = json!({ "beat_interval_ms": 1, "reattach_grace_ms": 60_000, "client_share": 1.0 });
    EngineProcess::configured(tag, slabs, &fields)
}

/// An engine dies at the `time`th time that it comes to `place`, and with `twice` its successor does so, too.
///
/// # Panics
/// Where something else goes wrong than what is being tested.
#[must_use]
pub fn dies_at(place: Place, way: Way, time: u32, twice: bool) -> Vec<String> {
    let mut checks = Checks::new();
    let mut engine = engine("point", 8);
    let mut cast = Cast::new(&engine.name);
    engine.kill();
    let is_cold = matches!(way, Way::ColdStart { .. });
    engine.reconfigure(&json!({ "cold": is_cold }));
    for _ in 0..if twice { 2 } else { 1 } {
        let status = run_until_dead(&mut checks, &mut engine, &mut cast, way, &format!("{place}:{time}"));
        let Some(status) = status else {
            checks.holds(false, format_args!("{place}:{time} was not reached"));
            return checks.finish();
        };
        if !was_killed(status) {
            checks.holds(false, format_args!("{place}:{time} was not reached: the engine ended, {status}"));
            return checks.finish();
        }
    }
    let is_kept = match way {
        Way::Recovery { counted } => !(counted && twice),
        Way::Serving | Way::Broken(_) => true,
        Way::ColdStart { untouched } => untouched,
        Way::Stop | Way::Client => false,
    };
    if is_kept {
        cast.loads_what_is_leased(&mut checks, "without an engine");
    }
    for scheduler in [&mut cast.scheduler, &mut cast.planner] {
        let found = checks.within(Duration::ZERO, "a lookup without an engine", || {
            scheduler.lookup("dead", 0, &chain(1, 2)).expect("a lookup within the limits")
        });
        checks.same("a lookup without an engine", 0, found.chunks);
        scheduler.api().end_session("dead");
    }
    engine.reconfigure(&json!({ "cold": false }));
    if let Err(status) = engine.restart_with(&[]) {
        checks.holds(false, format_args!("the next engine did not start: {status}"));
        return checks.finish();
    }
    let is_warm = engine.stat("warm_start") == 1;
    if is_kept {
        checks.holds(is_warm, "the next engine kept nothing");
    } else {
        // Whoever copies into an arena that is gone keeps its claim on it until the copy has ended.
        cast.finish_copies(&mut checks);
        cast.lost_everything();
    }
    goes_on(&mut checks, &mut engine, cast);
    checks.finish()
}

/// An engine that takes over stops at the `time`th time that it comes to `place`; a client of its predecessor's, with a copy
/// that runs and a lease, is killed meanwhile. The engine goes on, and nothing of that client is left.
///
/// # Panics
/// Where something else goes wrong than what is being tested.
#[must_use]
pub fn stops_at(place: Place, way: Way, time: u32) -> Vec<String> {
    let mut checks = Checks::new();
    let mut engine = engine("stop", 8);
    let mut cast = Cast::new(&engine.name);
    let (keys, _) = cast.content(1);
    let victim = busy_peer(&engine.name, &keys);
    engine.kill();
    engine.launch(&[(FAIL_POINT, &format!("{place}:{time}:stop"))]);
    let (name, pid, theirs, over) = (engine.name.clone(), engine.pid(), victim.pid(), AtomicBool::new(false));
    let was_reached = std::thread::scope(|scope| {
        let killer = scope.spawn(|| {
            eventually("the engine stops, or has done every step", || {
                has_stopped(pid) || over.load(Ordering::Acquire)
            });
            // Also a moment after the last step: what that leads to may be still to come.
            if !has_stopped(pid) && !within_beats(&view_of(&name), LATE, || has_stopped(pid)) {
                return false;
            }
            let kill = |pid, signal| nix::sys::signal::kill(Pid::from_raw(pid as i32), signal);
            kill(theirs, Signal::SIGKILL).expect("a signal to our own child");
            eventually("the client has died", || {
                thread_state(&task_of(theirs)).is_none_or(|state| state == 'Z')
            });
            kill(pid, Signal::SIGCONT).expect("a signal to our own child");
            true
        });
        let started = engine.serves();
        checks.holds(started.is_ok(), format_args!("{place}: {started:?}"));
        engine.is_allocated();
        for step in STEPS.iter().take(if way == Way::Stop { 1 } else { STEPS.len() }) {
            step(&mut checks, &mut engine, &mut cast);
        }
        over.store(true, Ordering::Release);
        killer.join().expect("a thread that watches")
    });
    drop(victim);
    checks.holds(was_reached, format_args!("{place}:{time} was not reached"));
    if was_reached {
        goes_on(&mut checks, &mut engine, cast);
    } else {
        // It would stop while the clients leave it.
        engine.kill();
    }
    checks.finish()
}

/// How much later than the last step an engine may come to a place, in beats: some three seconds.
const LATE: u32 = 3000;

fn task_of(pid: u32) -> std::path::PathBuf {
    format!("/proc/{pid}/task/{pid}").into()
}

/// A worker whose copy stands still, and a scheduler with a lease, in another process.
fn busy_peer(engine: &str, keys: &[Key]) -> Peer {
    let mut peer = Peer::spawn();
    for ask in [
        Ask::HeldWorker(Box::new(worker_spec(engine, SOLO, 1, 0, SHARD))),
        Ask::Scheduler(Box::new(super::cast::scheduler_spec(engine, SOLO, 1))),
        Ask::WaitReady,
        Ask::HoldAStore { round: (2, 1), keys: chain(66, 4), version: 2 },
        Ask::Lookup { request: "theirs".to_owned(), admission: 0, keys: keys.to_vec() },
    ] {
        peer.ask(&ask);
    }
    peer
}

/// After the last start: everybody is there again, with everything, and in the end nothing is left.
fn goes_on(checks: &mut Checks, engine: &mut EngineProcess, mut cast: Cast) {
    engine.is_allocated();
    cast.is_ready(checks, || false);
    cast.finish_copies(checks);
    cast.loads_what_is_leased(checks, "by the next engine");
    cast.finds_everything(checks, "by the next engine");
    cast.store(Whose::Pair, 2);
    cast.store(Whose::Other, 2);
    cast.settle(checks, || false);
    cast.stores_again_what_was_dropped(checks);
    cast.finds_everything(checks, "in the end");
    let (clients, leases) = (cast.clients().len() as u64, cast.leases() as u64);
    is_settled(checks, engine, clients, leases, 0, false);
    checks.holds(engine.stat("refusals") <= clients, "clients were refused again and again");
    cast.ends_its_sessions();
    drop(cast);
    is_gone(checks, engine);
}

/// What leads an engine to each of its places, in the order in which it is done.
const STEPS: [fn(&mut Checks, &mut EngineProcess, &mut Cast); 6] = [
    |checks, engine, cast| cast.is_ready(checks, || engine.ended().is_some()),
    |checks, engine, cast| {
        cast.store(Whose::Pair, 3);
        cast.settle(checks, || engine.ended().is_some());
    },
    |checks, engine, cast| {
        cast.store(Whose::Other, 3);
        cast.settle(checks, || engine.ended().is_some());
    },
    |checks, engine, cast| {
        cast.late_pair_comes();
        cast.is_ready(checks, || engine.ended().is_some());
        cast.store(Whose::Late, 3);
        cast.settle(checks, || engine.ended().is_some());
    },
    |checks, _, cast| checks.within(LIMIT, "a clear", || cast.clear()),
    somebody_dies,
];

/// Starts an engine that is to die, and gives it everything to do until it has; `None` where it has not.
fn run_until_dead(
    checks: &mut Checks,
    engine: &mut EngineProcess,
    cast: &mut Cast,
    way: Way,
    point: &str,
) -> Option<ExitStatus> {
    if let Err(status) = engine.restart_with(&[(FAIL_POINT, point)]) {
        return Some(status);
    }
    let view = engine.view();
    if way != Way::Stop {
        engine.is_allocated_or_dead();
    }
    let steps = if way == Way::Stop { &STEPS[..1] } else { &STEPS[..] };
    for step in steps {
        step(checks, engine, cast);
        if let Some(status) = engine.ended() {
            return Some(status);
        }
    }
    if way == Way::Stop {
        engine.send(nix::sys::signal::Signal::SIGTERM);
    }
    let mut status = None;
    within_beats(&view, LATE, || {
        status = engine.ended();
        status.is_some()
    });
    status
}

/// A client with a lease, a reservation, and another client's role beside it is killed: what it has is reclaimed.
fn somebody_dies(checks: &mut Checks, engine: &mut EngineProcess, cast: &mut Cast) {
    let mut victim = Peer::spawn_with(&[(FAIL_POINT, Place::ClientGranted.name())]);
    let worker = worker_spec(&engine.name, SOLO, 1, 0, SHARD);
    let scheduler = super::cast::scheduler_spec(&engine.name, SOLO, 1);
    let round = cast.next_round();
    let ready = Ask::WaitReady;
    let store = Ask::Store {
        request: "victim".to_owned(),
        round: (round.source, round.number),
        parent: None,
        keys: chain(77, 3),
        version: 1,
    };
    for ask in [Ask::Scheduler(Box::new(scheduler)), Ask::Worker(Box::new(worker)), ready, store] {
        if victim.try_ask(&ask).is_none() || engine.ended().is_some() {
            break;
        }
    }
    // An engine that has died over it may not have been seen to, by the kernel.
    let view = engine.view();
    let has_died =
        within_beats(&view, LATE, || victim.has_ended().is_some_and(was_killed) || engine.ended().is_some());
    checks.holds(has_died, "the victim was to die once it had slots");
}
