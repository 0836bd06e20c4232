//! An engine dies at a place; the next one goes on.

use super::cast::{Cast, Whose};
use super::checks::Checks;
use super::scene::{SOLO, Scene, scheduler_spec, solo_spec};
use super::table::Way;
use super::{FAIL_POINT, was_killed};
use crate::engine::{EngineProcess, view_of, within_beats};
use crate::kv::chain;
use crate::peer::{Ask, Peer};
use crate::wait::{LIMIT, eventually};
use kvring_adapter::Round;
use kvring_rig::child::thread_state;
use kvring_shm_abi::failpoint::Place;
use kvring_shm_abi::sync::{AtomicBool, Ordering};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use std::process::ExitStatus;
use std::time::Duration;

/// An engine dies at the `time`th time that it comes to `place`, and with `twice` its successor does so, too.
pub fn dies_at(place: Place, way: Way, time: u32, twice: bool) -> Vec<String> {
    let Scene { mut checks, mut engine } = Scene::new("point", 8);
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
        cast.finds_everything(&mut checks, "without an engine");
    }
    for scheduler in [&mut cast.scheduler, &mut cast.planner] {
        let found = checks.within(Duration::ZERO, "a lookup without an engine", || {
            scheduler.lookup("dead", 0, &chain(1, 2))
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

/// An engine that takes over stops at the `time`th time that it comes to `place`. A client of its predecessor's, with a copy
/// that runs and a lease, is killed meanwhile. The engine goes on, and nothing of that client is left.
pub fn stops_at(place: Place, way: Way, time: u32) -> Vec<String> {
    let Scene { mut checks, mut engine } = Scene::new("stop", 8);
    let mut cast = Cast::new(&engine.name);
    let specs = (solo_spec(&engine.name), scheduler_spec(&engine.name, SOLO));
    let mut victim = Peer::holding(&specs.0, &specs.1, false, Round { source: 2, number: 1 }, &chain(66, 4));
    victim.lookup("theirs", 0, &cast.content(1).0);
    engine.kill();
    engine.launch(&[(FAIL_POINT, &format!("{place}:{time}:stop"))]);
    let (name, pids, over) = (engine.name.clone(), [engine.pid(), victim.pid()], AtomicBool::new(false));
    let [task, theirs] = [engine.task(), victim.task()];
    let was_reached = std::thread::scope(|scope| {
        let killer = scope.spawn(|| {
            let has_stopped = || thread_state(&task) == Some('T');
            eventually("the engine stops, or has done every step", || {
                has_stopped() || over.load(Ordering::Acquire)
            });
            // It may also stop a moment after the last step.
            if !has_stopped() && !within_beats(&view_of(&name), LATE, has_stopped) {
                return false;
            }
            let send =
                |pid, signal| kill(Pid::from_raw(pid as i32), signal).expect("a signal to our own child");
            send(pids[1], Signal::SIGKILL);
            eventually("the client has died", || thread_state(&theirs).is_none_or(|state| state == 'Z'));
            send(pids[0], Signal::SIGCONT);
            true
        });
        let started = engine.serves();
        checks.holds(started.is_ok(), format_args!("{place}: {started:?}"));
        engine.is_allocated();
        for step in STEPS.iter().take(if way == Way::Stop { 1 } else { STEPS.len() }) {
            step(&mut checks, &mut engine, &mut cast);
        }
        // Release; pairs with the killer's Acquire.
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
    checks.is_settled(engine, clients, leases, 0, false);
    checks.holds(engine.stat("refusals") <= clients, "clients were refused again and again");
    cast.ends_its_sessions();
    drop(cast);
    checks.is_gone(engine);
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
        engine.send(Signal::SIGTERM);
    }
    let mut status = None;
    within_beats(&view, LATE, || {
        status = engine.ended();
        status.is_some()
    });
    status
}

/// A client with a reservation and a second one, a scheduler, in its process are killed: what they have is reclaimed.
fn somebody_dies(checks: &mut Checks, engine: &mut EngineProcess, cast: &mut Cast) {
    let mut victim = Peer::spawn_with(&[(FAIL_POINT, Place::ClientGranted.name())]);
    let worker = Ask::Worker(Box::new(solo_spec(&engine.name)));
    let scheduler = Ask::Scheduler(Box::new(scheduler_spec(&engine.name, SOLO)));
    let store = Ask::store(cast.next_round(), &chain(77, 3), 1);
    for ask in [scheduler, worker, Ask::WaitReady, store] {
        if victim.try_ask(&ask).is_none() || engine.ended().is_some() {
            break;
        }
    }
    // An engine that has died of it may not have ended yet.
    let view = engine.view();
    let has_died =
        within_beats(&view, LATE, || victim.has_ended().is_some_and(was_killed) || engine.ended().is_some());
    checks.holds(has_died, "the victim was to die once it had slots");
}
