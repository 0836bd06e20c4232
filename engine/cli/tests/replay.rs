//! `kvring replay`: right on real traffic, and wrong where it must be.

mod support;

use nix::sys::signal::Signal;
use serde_json::Value;
use support::{Running, Said, eventually, run, segments};

/// Small chunks in a small arena: hits, evictions, and done soon.
const SMALL: [&str; 7] = ["replay", "--limit", "150", "--arena", "16MiB", "--bytes-per-token", "16"];

fn small(more: &[&str]) -> Said {
    run(&[&SMALL[..], more].concat())
}

fn number(json: &Value, key: &str) -> f64 {
    json[key].as_f64().unwrap_or_else(|| panic!("{key} in {json}"))
}

#[test]
fn a_verified_replay_with_evictions_is_right_and_hits_as_simulated() {
    for policy in ["lru", "arc"] {
        let said = small(&["--verify", "--json", "--policy", policy]);
        let json = said.json();
        assert_eq!(said.code, Some(0), "{json} {}", said.stderr);
        for zero in ["wrong_bytes", "leaked_slots", "leaked_leases", "failed_loads", "lookups_degraded"] {
            assert_eq!(number(&json, zero), 0.0, "{zero}: {json}");
        }
        for more in [
            "requests",
            "tokens",
            "hit_rate",
            "lookups_per_s",
            "lookup_p50_us",
            "lookup_p99_us",
            "lookup_p999_us",
            "stored_gb",
            "loaded_gb",
            "store_gbs",
            "load_gbs",
            "evictions",
            "seconds",
        ] {
            assert!(number(&json, more) > 0.0, "{more}: {json}");
        }
        assert_eq!(number(&json, "requests"), 150.0);
        assert!(number(&json, "dropped_stores") >= 0.0);
        // 16 MiB by 512 tokens of 16 bytes.
        assert_eq!(number(&json, "capacity_chunks"), 2048.0);
        let (hit_rate, simulated) = (number(&json, "hit_rate"), number(&json, "simulated_hit_rate"));
        assert!((hit_rate - simulated).abs() <= 0.01, "{hit_rate} against {simulated}: {json}");
        assert_eq!(json["config"]["policy"], policy);
    }
}

#[test]
fn shapes_other_than_the_default_are_right_too() {
    for more in [
        &["--instances", "1", "--ranks", "1"][..],
        &["--instances", "3", "--ranks", "1", "--bytes-per-token", "100"],
        &["--instances", "1", "--ranks", "3", "--no-verify"],
        &["--speed", "1000", "--limit", "40"],
    ] {
        let base = ["replay", "--arena", "16MiB", "--json"];
        let limit: &[&str] = if more.contains(&"--limit") { &[] } else { &["--limit", "60"] };
        let said = run(&[&base[..], limit, more].concat());
        let json = said.json();
        assert_eq!(said.code, Some(0), "{more:?}: {json} {}", said.stderr);
        assert!(number(&json, "stored_gb") > 0.0);
    }
}

#[test]
fn the_table_says_what_matters() {
    let said = small(&[]);
    assert_eq!(said.code, Some(0), "{}", said.stderr);
    for part in [
        "hit rate",
        "simulated with room for 2048 chunks",
        "wrong bytes",
        "leaked slots",
        "every loaded byte",
    ] {
        assert!(said.stdout.contains(part), "{part}: {}", said.stdout);
    }
}

#[test]
fn negative_control_a_corrupted_arena_is_found_out() {
    let said = small(&["--json", "--sabotage", "corrupt"]);
    let json = said.json();
    assert_eq!(said.code, Some(1), "{json}");
    assert!(number(&json, "wrong_bytes") > 0.0, "{json}");
    assert_eq!((number(&json, "leaked_slots"), number(&json, "leaked_leases")), (0.0, 0.0), "{json}");
    for part in ["a loaded page is wrong", "failed: instance ", "wrong bytes"] {
        assert!(said.stderr.contains(part), "{part}: {}", said.stderr);
    }
    // Not compared is not found: it is the comparison that finds it.
    let said = small(&["--json", "--no-verify", "--sabotage", "corrupt"]);
    assert_eq!((said.code, number(&said.json(), "wrong_bytes")), (Some(0), 0.0));
}

#[test]
fn negative_control_a_lease_that_is_kept_is_a_leak() {
    let said = small(&["--json", "--sabotage", "leak"]);
    let json = said.json();
    assert_eq!(said.code, Some(1), "{json}");
    assert!(number(&json, "leaked_leases") > 0.0 && number(&json, "leaked_slots") > 0.0, "{json}");
    assert_eq!(number(&json, "wrong_bytes"), 0.0);
    assert!(said.stderr.contains("are held after all sessions have ended"), "{}", said.stderr);
}

#[test]
fn a_dead_process_is_an_error_with_its_name_and_leaves_nothing() {
    for (sabotage, part) in [
        ("kill-engine", "the engine has ended (signal: 9"),
        ("kill-scheduler", "instance 0 scheduler has ended (signal: 9"),
    ] {
        let mut replay = Running::start("none", &[&SMALL[..], &["--json", "--sabotage", sabotage]].concat());
        let prefix = format!("kvring.replay-{}.", replay.pid());
        assert_eq!(replay.wait(), Some(1));
        let stderr = replay.stderr();
        assert!(stderr.contains(part), "{stderr}");
        assert_eq!(segments(&prefix), Vec::<String>::new());
    }
}

/// A replay that takes an hour, once its clients are attached.
fn slow_replay() -> (Running, String) {
    let slow = ["--speed", "0.0001", "--limit", "100000"];
    let replay = Running::start("none", &[&["replay", "--arena", "16MiB"][..], &slow].concat());
    let name = format!("replay-{}", replay.pid());
    let clients = || {
        let status = run(&["status", "--json", "--name", &name]);
        let json: Value = serde_json::from_str(&status.stdout).unwrap_or_default();
        ["clients", "registrations"].map(|counter| json["counters"][counter].as_u64())
    };
    eventually("all clients are attached, and all workers registered", || clients() == [Some(6), Some(4)]);
    (replay, name)
}

#[test]
fn ctrl_c_ends_everything() {
    let (mut replay, name) = slow_replay();
    replay.signal(Signal::SIGINT);
    assert_eq!(replay.wait(), Some(1));
    assert!(replay.stderr().ends_with("error: interrupted\n"));
    assert_eq!(segments(&format!("kvring.{name}.")), Vec::<String>::new());
}

#[test]
fn killing_the_coordinator_ends_everything() {
    let (mut replay, name) = slow_replay();
    replay.signal(Signal::SIGKILL);
    replay.wait();
    eventually("nothing is left", || segments(&format!("kvring.{name}.")).is_empty());
}

#[test]
fn status_shows_who_is_attached() {
    let (mut replay, name) = slow_replay();
    let json = run(&["status", "--json", "--name", &name]).json();
    let clients = json["clients"].as_array().expect("clients");
    let roles = |role: &str| clients.iter().filter(|c| c["role"] == role && c["alive"] == true).count();
    assert_eq!((roles("scheduler"), roles("worker")), (2, 4), "{json}");
    let namespace = &json["namespaces"][0];
    assert_eq!(
        (namespace["ranks"].as_u64(), namespace["ranks_registered"].as_u64()),
        (Some(2), Some(2)),
        "{json}"
    );
    assert_eq!(
        (namespace["model"].as_str(), namespace["chunk_tokens"].as_u64()),
        (Some("replay"), Some(512))
    );
    let table = run(&["status", "--name", &name]).stdout;
    assert!(table.contains("replay 1 scheduler") && table.contains("replay 0 rank 1"), "{table}");
    replay.signal(Signal::SIGTERM);
    assert_eq!(replay.wait(), Some(1));
}
