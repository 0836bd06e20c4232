//! Processes are killed at every fail point.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_shm_abi::failpoint::Place;
use kvring_tests::crash::table::{VISITS, Visit, Way};
use kvring_tests::crash::{clients, engines};
use kvring_tests::soak;
use std::collections::BTreeSet;
use std::sync::Mutex;
use std::time::Instant;

/// No process of a scenario comes to a place more often than this.
const TIMES_MAX: u32 = 24;

/// A new place needs a scenario.
#[test]
fn the_table_of_visits_has_every_place() {
    let is_visited = |place: &&Place| VISITS.iter().any(|visit| visit.place == **place);
    let missing: Vec<&Place> = Place::ALL.iter().filter(|place| !is_visited(place)).collect();
    assert!(missing.is_empty(), "no line of `VISITS` leads to {missing:?}");
}

/// Runs a scenario for each visit of one way, two at a time, because they wait more than they work. In a soak it runs for every
/// time that a process comes there.
fn each(of: impl Fn(&Way) -> bool, scenario: impl Fn(&Visit, u32) -> Vec<String> + Sync) {
    // `KVRING_ONLY` names one place, to look into that.
    let only = std::env::var("KVRING_ONLY").ok();
    let is_meant =
        |visit: &&Visit| of(&visit.way) && only.as_ref().is_none_or(|only| visit.place.name() == only);
    let mut cases: Vec<(&Visit, u32, bool)> = Vec::new();
    for visit in VISITS.iter().filter(is_meant) {
        // Only these ways lead a process to a place several times.
        let is_repeated = soak() > 1 && matches!(visit.way, Way::Serving | Way::Client);
        let wanted =
            if is_repeated { 1..=TIMES_MAX } else { 1..=visit.times.iter().copied().max().unwrap_or(1) };
        let times = wanted.map(|time| (time, visit.times.contains(&time)));
        cases.extend(
            times.filter(|(_, listed)| *listed || is_repeated).map(|(time, listed)| (visit, time, listed)),
        );
    }
    let next = Mutex::new(cases.into_iter());
    let wrong = Mutex::new(Vec::new());
    // Places that a process came to less often than it was asked to.
    let beyond = Mutex::new(BTreeSet::new());
    let run = || {
        loop {
            let Some((visit, time, listed)) = next.lock().unwrap().next() else { break };
            if beyond.lock().unwrap().contains(&visit.place) {
                continue;
            }
            let began = Instant::now();
            let violations = scenario(visit, time);
            eprintln!("{}:{time} {:?}", visit.place, began.elapsed());
            let is_beyond =
                !listed && violations.iter().any(|violation| violation.contains("was not reached"));
            if is_beyond {
                beyond.lock().unwrap().insert(visit.place);
            } else if !violations.is_empty() {
                wrong.lock().unwrap().push(format!("{}:{time}: {violations:#?}", visit.place));
            }
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(run);
        scope.spawn(run);
    });
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// A test for each scenario: it runs for all visits of one way.
macro_rules! scenarios {
    ($($(#[$doc:meta])* $name:ident: $way:pat => $scenario:expr;)+) => {
        $(
            $(#[$doc])*
            #[test]
            fn $name() {
                each(|way| matches!(way, $way), $scenario);
            }
        )+
    };
}

scenarios! {
    an_engine_that_dies_while_it_recovers_is_recovered_from:
        Way::Recovery { .. } => |visit, time| engines::dies_at(visit.place, visit.way, time, false);
    /// The third start is a cold one by design, if both attempts had been counted.
    engines_that_die_twice_in_a_row_while_they_recover_are_recovered_from:
        Way::Recovery { .. } => |visit, time| engines::dies_at(visit.place, visit.way, time, true);
    an_engine_that_dies_at_work_is_recovered_from:
        Way::Serving => |visit, time| engines::dies_at(visit.place, visit.way, time, false);
    an_engine_that_dies_while_it_starts_anew_is_swept:
        Way::ColdStart { .. } => |visit, time| engines::dies_at(visit.place, visit.way, time, false);
    an_engine_that_dies_while_it_gives_everything_up_is_swept:
        Way::Stop => |visit, time| engines::dies_at(visit.place, visit.way, time, false);
    a_client_that_dies_anywhere_leaves_nothing_and_is_replaced:
        Way::Client => |visit, time| clients::dies_at(visit.place, time);
    /// A client dies while the engine is stopped: as if it had died at any moment of the engine's.
    an_engine_that_stops_while_a_client_dies_goes_on:
        Way::Recovery { .. } | Way::Serving => |visit, time| engines::stops_at(visit.place, visit.way, time);
    /// Engines come and go while a client is stopped: as if they had at any moment of the client's.
    a_client_that_stops_while_engines_die_goes_on:
        Way::Client => |visit, time| clients::stops_at(visit.place, time, 1 + time % 2);
}
