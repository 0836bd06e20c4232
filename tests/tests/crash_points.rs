//! Processes are killed at every place that the code names.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_tests::crash::table::{PLACES, Place, RULES, Way, names_in_source};
use kvring_tests::crash::{clients, engines};
use std::collections::BTreeSet;

/// Nobody adds a place, or a rule, without a scenario.
#[test]
fn the_table_of_places_is_complete() {
    let of = |names: &mut dyn Iterator<Item = &'static str>| -> BTreeSet<String> {
        names.map(str::to_owned).collect()
    };
    assert_eq!(of(&mut PLACES.iter().map(|place| place.name)), names_in_source("failpoint::here"));
    assert_eq!(of(&mut RULES.iter().copied()), names_in_source("failpoint::broken"));
}

/// Runs a scenario for each place of one way, two at a time: they wait more than they work.
fn each(of: impl Fn(&Way) -> bool, scenario: impl Fn(&Place, u32) -> Vec<String> + Sync) {
    let only = std::env::var("KVRING_ONLY").ok();
    let cases: Vec<(&Place, u32)> = PLACES
        .iter()
        .filter(|place| of(&place.way) && only.as_ref().is_none_or(|only| place.name == only))
        .flat_map(|place| place.times.iter().map(move |time| (place, *time)))
        .collect();
    let next = std::sync::Mutex::new(cases.iter());
    let wrong = std::sync::Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let Some((place, time)) = next.lock().unwrap().next() else { break };
                    let began = std::time::Instant::now();
                    let violations = scenario(place, *time);
                    eprintln!("{}:{time} {:?}", place.name, began.elapsed());
                    if !violations.is_empty() {
                        wrong.lock().unwrap().push(format!("{}:{time}: {violations:#?}", place.name));
                    }
                }
            });
        }
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
