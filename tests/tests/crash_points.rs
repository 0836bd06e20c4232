//! Processes are killed at every place that the code names.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_tests::crash::table::{PLACES, Place, RULES, Way, names_in_source};
use kvring_tests::crash::{clients, engines};
use kvring_tests::soak;
use std::collections::BTreeSet;
use std::sync::Mutex;
use std::time::Instant;

/// No process of a scenario comes to a place more often.
const TIMES_MAX: u32 = 24;

/// Nobody adds a place, or a rule, without a scenario.
#[test]
fn the_table_of_places_is_complete() {
    let of = |names: &mut dyn Iterator<Item = &'static str>| -> BTreeSet<String> {
        names.map(str::to_owned).collect()
    };
    assert_eq!(of(&mut PLACES.iter().map(|place| place.name)), names_in_source("failpoint::here"));
    assert_eq!(of(&mut RULES.iter().copied()), names_in_source("failpoint::broken"));
}

/// Runs a scenario for each place of one way, two at a time: they wait more than they work. In a soak, for every time that a
/// process comes there.
fn each(of: impl Fn(&Way) -> bool, scenario: impl Fn(&Place, u32) -> Vec<String> + Sync) {
    // For whoever looks into one.
    let only = std::env::var("KVRING_ONLY").ok();
    let is_meant = |place: &&Place| of(&place.way) && only.as_ref().is_none_or(|only| place.name == only);
    let mut cases: Vec<(&Place, u32, bool)> = Vec::new();
    for place in PLACES.iter().filter(is_meant) {
        // A process comes to the others once.
        let is_repeated = soak() > 1 && matches!(place.way, Way::Serving | Way::Client);
        let wanted =
            if is_repeated { 1..=TIMES_MAX } else { 1..=place.times.iter().copied().max().unwrap_or(1) };
        let times = wanted.map(|time| (time, place.times.contains(&time)));
        cases.extend(
            times.filter(|(_, listed)| *listed || is_repeated).map(|(time, listed)| (place, time, listed)),
        );
    }
    let next = Mutex::new(cases.into_iter());
    let wrong = Mutex::new(Vec::new());
    // Places that a process came to less often than it was asked to.
    let beyond = Mutex::new(BTreeSet::new());
    let run = || {
        loop {
            let Some((place, time, listed)) = next.lock().unwrap().next() else { break };
            if beyond.lock().unwrap().contains(place.name) {
                continue;
            }
            let began = Instant::now();
            let violations = scenario(place, time);
            eprintln!("{}:{time} {:?}", place.name, began.elapsed());
            let is_beyond =
                !listed && violations.iter().any(|violation| violation.contains("was not reached"));
            if is_beyond {
                beyond.lock().unwrap().insert(place.name);
            } else if !violations.is_empty() {
                wrong.lock().unwrap().push(format!("{}:{time}: {violations:#?}", place.name));
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

#[test]
fn an_engine_that_dies_while_it_recovers_is_recovered_from() {
    each(
        |way| matches!(way, Way::Recovery { .. }),
        |place, time| engines::dies_at(place.name, place.way, time, false),
    );
}

/// The third start is a cold one by design, if both attempts had been counted.
#[test]
fn engines_that_die_twice_in_a_row_while_they_recover_are_recovered_from() {
    each(
        |way| matches!(way, Way::Recovery { .. }),
        |place, time| engines::dies_at(place.name, place.way, time, true),
    );
}

#[test]
fn an_engine_that_dies_at_work_is_recovered_from() {
    each(|way| *way == Way::Serving, |place, time| engines::dies_at(place.name, place.way, time, false));
}

#[test]
fn an_engine_that_dies_while_it_starts_anew_is_swept() {
    each(
        |way| matches!(way, Way::ColdStart { .. }),
        |place, time| engines::dies_at(place.name, place.way, time, false),
    );
}

#[test]
fn an_engine_that_dies_while_it_gives_everything_up_is_swept() {
    each(|way| *way == Way::Stop, |place, time| engines::dies_at(place.name, place.way, time, false));
}

#[test]
fn a_client_that_dies_anywhere_leaves_nothing_and_is_replaced() {
    each(|way| *way == Way::Client, |place, time| clients::dies_at(place.name, time));
}

/// A client dies while the engine is there: as if it had died at any moment of the engine's.
#[test]
fn an_engine_that_stops_while_a_client_dies_goes_on() {
    let places = |way: &Way| matches!(way, Way::Recovery { .. } | Way::Serving);
    each(places, |place, time| engines::stops_at(place.name, place.way, time));
}

/// Engines come and go while a client is there: as if they had at any moment of the client's.
#[test]
fn a_client_that_stops_while_engines_die_goes_on() {
    each(|way| *way == Way::Client, |place, time| clients::stops_at(place.name, time, 1 + time % 2));
}
