//! Deaths of real processes. This test binary runs itself again ([`child`]), and the child is killed at a place
//! that is named in the code ([`failpoint`]), or at random.

use super::found::Found;
use super::tests::{Name, client_view};
use super::*;
use kvring_shm_abi::failpoint::Place;
use kvring_shm_abi::life::Life;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

const CHILD_NAME: &str = "KVRING_TEST_SEGMENTS";
const CHILD_MODE: &str = "KVRING_TEST_MODE";
const CHILD_DIES_AT: &str = "KVRING_FAIL_POINT";

/// No test of its own: the code of the child processes of the tests below.
#[test]
fn child() {
    let (Ok(name), Ok(mode)) = (std::env::var(CHILD_NAME), std::env::var(CHILD_MODE)) else { return };
    let name = Name(EngineName::new(&name).unwrap());
    if mode == "churn" {
        println!("ready");
        // Until it is killed, it starts after a death and after a clean end, by turns.
        loop {
            drop(name.start().unwrap());
            name.start().unwrap().retire_and_unlink().unwrap();
        }
    }
    let cold = (mode == "cold").then_some(ColdStart::Asked);
    let segments = Segments::open(&Setup { cold, ..name.setup() }).unwrap();
    println!("ready");
    if mode == "live" {
        std::thread::sleep(Duration::from_secs(60));
    }
    segments.retire_and_unlink().unwrap();
    println!("survived");
}

fn spawn_child(name: &Name, mode: &str, dies_at: Option<Place>) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "segments::deaths::child", "--nocapture", "--test-threads=1"])
        .env(CHILD_NAME, name.0.as_str())
        .env(CHILD_MODE, mode)
        .envs(dies_at.map(|place| (CHILD_DIES_AT, place.name())))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// The test harness writes its own text before ours on the same line.
fn wait_ready(child: &mut Child) -> bool {
    BufReader::new(child.stdout.take().unwrap())
        .lines()
        .map_while(Result::ok)
        .any(|line| line.ends_with("ready"))
}

fn kill(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_killed_engine_is_noticed_and_succeeded() {
    let name = Name::new("kill");
    let mut engine = spawn_child(&name, "live", None);
    assert!(wait_ready(&mut engine));
    let error = name.start().err().unwrap();
    assert!(matches!(&error, SetupError::AlreadyRunning { pid, .. } if *pid == engine.id()), "{error}");
    let (old, _) = client_view(&name.0);
    let raw = old.life_words[7].raw();
    kill(engine);
    assert_ne!(old.life_words[7].raw(), raw);
    assert!(old.life_words.iter().all(|word| word.life() == Life::Dead));
    assert_eq!(*name.start().unwrap().start(), Start::Warm);
}

/// The places of a start at which no client may find an engine yet.
const UNTIL_COMPLETE: [Place; 9] = [
    Place::Opened,
    Place::Claimed,
    Place::Allocated,
    Place::Owned,
    Place::Described,
    Place::Lobby,
    Place::Arena,
    Place::ArenaMagic,
    Place::LobbyMagic,
];
/// The end of a start, and a clean end.
const COMPLETE: [Place; 4] = [Place::EngineMagic, Place::Retired, Place::SatellitesGone, Place::Unlinked];
/// The places of a start that sweeps a predecessor.
const SWEEP_PLACES: [Place; 5] = [
    Place::SatellitesRetired,
    Place::LobbyGone,
    Place::PredecessorRetired,
    Place::PredecessorsSatellitesGone,
    Place::PredecessorGone,
];

/// The places of a start that takes a predecessor over.
const RECOVERY_PLACES: [Place; 4] =
    [Place::RecoveryOwner, Place::RecoveryOdd, Place::RecoveryCounted, Place::RecoveryWords];

/// Runs a child that is killed at `place`.
fn dies(name: &Name, mode: &str, place: Place) {
    let mut child = spawn_child(name, mode, Some(place));
    let output = std::io::read_to_string(child.stdout.take().unwrap()).unwrap();
    child.wait().unwrap();
    assert!(!output.contains("survived"), "{place} was not reached");
}

#[test]
fn a_death_at_any_place_leaves_what_the_next_start_sweeps() {
    let name = Name::new("places");
    for place in UNTIL_COMPLETE.into_iter().chain(COMPLETE).chain(SWEEP_PLACES) {
        let sweeps = SWEEP_PLACES.contains(&place);
        if sweeps {
            drop(name.start().unwrap());
        }
        dies(&name, if sweeps { "cold" } else { "once" }, place);
        if UNTIL_COMPLETE.contains(&place) {
            let file = SegmentFile::open(&name.0.engine_segment(), Access::ReadWrite);
            let complete = file.is_ok_and(|file| !matches!(Found::look(&file).unwrap(), Found::Incomplete));
            assert!(!complete, "{place}: the engine's magic comes last");
        }
        let segments = name.start().unwrap_or_else(|error| panic!("after a death at {place}: {error}"));
        assert_eq!(name.files().len(), 3, "{place}");
        segments.retire_and_unlink().unwrap();
        assert_eq!(name.files(), Vec::<String>::new(), "{place}");
    }
}

#[test]
fn a_death_in_the_middle_of_taking_over_leaves_what_the_next_one_takes_over() {
    let name = Name::new("recovery");
    for place in RECOVERY_PLACES {
        drop(name.start().unwrap());
        let (view, identity) = client_view(&name.0);
        let before = view.epoch().incarnation();
        dies(&name, "once", place);
        assert!(view.life_words.iter().all(|word| word.life() == Life::Dead), "{place}");
        let segments = name.start().unwrap();
        assert_eq!((segments.start(), segments.arena_id()), (&Start::Warm, identity.arena_id), "{place}");
        let now = view.epoch().incarnation();
        assert!(now % 2 == 1 && now > before, "{place}: {before} {now}");
        segments.retire_and_unlink().unwrap();
    }
}

#[test]
fn a_death_at_random_leaves_what_the_next_start_sweeps() {
    let name = Name::new("random");
    for round in 0..30u64 {
        let mut child = spawn_child(&name, "churn", None);
        assert!(wait_ready(&mut child));
        // Spread over several turns of the child's loop, which takes about a millisecond.
        std::thread::sleep(Duration::from_micros(round * 7919 % 5000));
        kill(child);
        let segments = name.start().unwrap_or_else(|error| panic!("round {round}: {error}"));
        assert_eq!(name.files().len(), 3);
        // Every other time the segments are left for the next child.
        if round % 2 == 0 {
            segments.retire_and_unlink().unwrap();
        }
    }
}
