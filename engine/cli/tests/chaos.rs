//! `kvring chaos`: nothing wrong where nothing may be, and everything that is done wrong on purpose is found.

mod support;

use nix::sys::signal::Signal;
use serde_json::Value;
use std::sync::{Mutex, MutexGuard, PoisonError};
use support::{Running, Said, eventually, run, segments};

/// What must be 0 in any case.
const ZEROS: [&str; 11] = [
    "wrong_bytes",
    "lost_committed",
    "leaked_slots",
    "leaked_leases",
    "leaked_segments",
    "hangs",
    "deadline_misses",
    "crashes",
    "breaches",
    "check_failures",
    "roomy_evictions",
];

/// One run at a time: each keeps a small machine busy by itself.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn chaos(more: &[&str]) -> Said {
    let _alone = alone();
    run(&[&["chaos", "--json"], more].concat())
}

fn number(json: &Value, key: &str) -> u64 {
    json[key].as_u64().unwrap_or_else(|| panic!("{key} in {json}"))
}

/// All are 0 except these.
fn only(json: &Value, except: &[&str], said: &Said) {
    for zero in ZEROS.iter().filter(|zero| !except.contains(zero)) {
        assert_eq!(number(json, zero), 0, "{zero}: {json} {}", said.stderr);
    }
}

#[test]
fn nothing_is_wrong_however_often_everything_dies() {
    let said = chaos(&["--seconds", "8", "--seed", "1"]);
    let json = said.json();
    only(&json, &[], &said);
    for more in
        ["kills", "stops", "restarts", "operations", "shards_stored", "shards_loaded", "chunks_judged"]
    {
        assert!(number(&json, more) > 0, "{more}: {json}");
    }
    assert_eq!((number(&json, "seed"), number(&json, "seconds"), number(&json, "phases")), (1, 8, 2));
    assert_eq!(said.code, Some(0), "{json} {}", said.stderr);
}

#[test]
fn negative_control_a_corrupted_arena_is_found_out() {
    let said = chaos(&["--seconds", "4", "--sabotage", "corrupt"]);
    let json = said.json();
    assert_eq!(said.code, Some(1));
    assert!(number(&json, "wrong_bytes") > 0, "{json}");
    only(&json, &["wrong_bytes"], &said);
    assert!(said.stderr.contains("wrong bytes: loaded, and not what was stored"), "{}", said.stderr);
}

#[test]
fn negative_control_a_lease_that_is_kept_is_a_leak() {
    let said = chaos(&["--seconds", "4", "--sabotage", "leak"]);
    let json = said.json();
    assert_eq!(said.code, Some(1));
    assert!(number(&json, "leaked_leases") > 0 && number(&json, "leaked_slots") > 0, "{json}");
    only(&json, &["leaked_leases", "leaked_slots"], &said);
}

#[test]
fn negative_control_what_was_acknowledged_and_is_gone_is_a_loss() {
    let said = chaos(&["--seconds", "4", "--sabotage", "lose"]);
    let json = said.json();
    assert_eq!(said.code, Some(1));
    assert!(number(&json, "lost_committed") > 0, "{json}");
    only(&json, &["lost_committed"], &said);
}

#[test]
fn negative_control_a_worker_that_stops_for_ever_hangs() {
    let said = chaos(&["--seconds", "3", "--sabotage", "hang", "--hang-limit-ms", "1000"]);
    let json = said.json();
    assert_eq!(said.code, Some(1));
    assert!(number(&json, "hangs") > 0, "{json}");
    assert!(said.stderr.contains("instance 0 rank 0 hangs: it has said nothing for"), "{}", said.stderr);
}

#[test]
fn negative_control_a_preemption_without_a_word_to_the_adapter_is_found_out() {
    let said = chaos(&["--seconds", "4", "--sabotage", "careless"]);
    let json = said.json();
    assert_eq!(said.code, Some(1));
    assert!(number(&json, "wrong_bytes") > 0, "{json}");
    only(&json, &["wrong_bytes"], &said);
}

#[test]
fn the_table_says_what_was_done_and_what_was_found() {
    let _alone = alone();
    let said = run(&["chaos", "--seconds", "2", "--seed", "3"]);
    for part in ["seed 3, 2 s in 1 phases", "kills", "wrong bytes", "lost chunks", "deadline misses"] {
        assert!(said.stdout.contains(part), "{part}: {} {}", said.stdout, said.stderr);
    }
}

/// A run that takes an hour, once it is in the middle of everything.
fn long_run() -> (Running, String) {
    let run = Running::start("none", &["chaos", "--seconds", "3600", "--seed", "5"]);
    let prefix = format!("kvring.chaos-{}.", run.pid());
    eventually("an engine is there", || segments(&prefix).len() >= 3);
    std::thread::sleep(std::time::Duration::from_secs(2));
    (run, prefix)
}

#[test]
fn ctrl_c_ends_everything() {
    let _alone = alone();
    let (mut run, prefix) = long_run();
    run.signal(Signal::SIGINT);
    assert_eq!(run.wait(), Some(1));
    assert!(run.stderr().ends_with("error: interrupted\n"));
    assert_eq!(segments(&prefix), Vec::<String>::new());
}

#[test]
fn killing_the_coordinator_leaves_nothing_whatever_stands_still_at_that_moment() {
    let _alone = alone();
    let (mut run, prefix) = long_run();
    run.signal(Signal::SIGKILL);
    run.wait();
    eventually("nothing is left", || segments(&prefix).is_empty());
    // Nor does anybody come back.
    std::thread::sleep(std::time::Duration::from_millis(500));
    assert_eq!(segments(&prefix), Vec::<String>::new());
}
