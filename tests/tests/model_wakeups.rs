//! Nobody sleeps on a dead engine, though its word may be another's by the time it looks: see
//! `kvring_tests::model::wakeups`.
#![allow(clippy::unwrap_used, reason = "test code: a panic is how a test fails")]

use kvring_tests::model::check;
use kvring_tests::model::wakeups::{Break, Wakeups};

const STATES_MAX: usize = 1_000_000;

#[test]
fn nobody_sleeps_on_a_dead_engine() {
    for equal_tids in [false, true] {
        match check(&Wakeups { equal_tids, broken: None }, STATES_MAX) {
            Ok(explored) => println!("{explored:?}"),
            Err(found) => panic!("{found}"),
        }
    }
}

#[test]
fn controls_of_waking() {
    for broken in [Break::PassesNothingOn, Break::EngineWakesNobody, Break::KeeperTellsNobody] {
        let Err(found) = check(&Wakeups { equal_tids: true, broken: Some(broken) }, STATES_MAX) else {
            panic!("{broken:?}: nothing was found")
        };
        println!("{broken:?}: {found}");
        assert!(found.what.starts_with("S5"), "{found}");
    }
}
