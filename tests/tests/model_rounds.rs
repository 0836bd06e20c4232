//! Every interleaving, within bounds, of two ranks that store one chunk in two rounds: see
//! `kvring_tests::model::rounds`.
#![allow(clippy::unwrap_used, reason = "test code: a panic is how a test fails")]

use kvring_tests::model::check;
use kvring_tests::model::rounds::{Break, Keeps, Rounds};

const STATES_MAX: usize = 4_000_000;

/// Two deaths of the engine, one of a rank.
const DEATHS: Rounds = Rounds { keeps: Keeps::All, engine_deaths: 2, client_deaths: 1, broken: None };

#[track_caller]
fn caught(model: Rounds, property: &str) {
    let Err(found) = check(&model, STATES_MAX) else { panic!("{model:?}: nothing was found") };
    println!("{model:?}: {found}");
    assert!(found.what.starts_with(property), "expected {property}, found: {found}");
}

#[test]
fn shards_of_different_rounds_never_combine() {
    match check(&DEATHS, STATES_MAX) {
        Ok(explored) => println!("{explored:?}"),
        Err(found) => panic!("{found}"),
    }
}

#[test]
fn controls_of_rounds() {
    caught(Rounds { broken: Some(Break::RoundsIgnored), ..DEATHS }, "S2");
    caught(Rounds { broken: Some(Break::FailureIsCommitted), ..DEATHS }, "S2");
}

/// A recovery that keeps incomplete chunks only while a sibling is WRITING loses an acknowledged shard whose sibling has
/// yet to be asked for: the round then ends with every commit acknowledged, and half a chunk.
#[test]
fn a_recovery_keeps_what_a_later_rank_will_complete() {
    caught(Rounds { keeps: Keeps::BeingWritten, engine_deaths: 1, ..DEATHS }, "S3");
    caught(Rounds { keeps: Keeps::None, engine_deaths: 1, ..DEATHS }, "S3");
}
