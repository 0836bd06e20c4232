//! What the command line refuses, with which exit code and in which words; and that printing to nobody is no failure.

#![allow(clippy::unwrap_used, reason = "a test fails where it cannot go on")]

mod support;

use std::io::Write;
use std::process::Stdio;
use support::{Running, Said, kvring, run, segments, unique_name};

fn file_with(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

#[test]
fn wrong_usage_is_2_and_what_this_machine_cannot_do_is_1() {
    let name = unique_name("wrong");
    let [unknown, outside, level] =
        ["slabs = 3", "beat_interval_ms = 0", "log_level = \"inof\""].map(file_with);
    let [unknown, outside, level] = [&unknown, &outside, &level].map(|file| file.path().to_str().unwrap());
    for (code, arguments, part) in [
        (2, &["nonsense"][..], "nonsense"),
        (2, &["serve", "--policy", "fifo"], "--policy"),
        (2, &["serve", "--arena", "8 apples"], "--arena"),
        (2, &["serve", "--name", "a/b"], "--name"),
        (2, &["status", "--name", "a/b"], "--name"),
        (2, &["serve", "--name", &name, "--arena", "4KiB"], "--arena"),
        (2, &["serve", "--name", &name, "--arena", "8MiB", "--slab", "3MiB"], "slabs of 3145728"),
        (2, &["serve", "--name", &name, "--arena", "15000000TiB"], "16 TiB"),
        (2, &["serve", "--name", &name, "--spin-us", "5000"], "spin_us: expected 0 to 1000, got 5000"),
        (2, &["serve", "--config", unknown], "unknown field `slabs`"),
        (2, &["serve", "--config", outside], "beat_interval_ms: expected 1 to 1000, got 0"),
        (2, &["serve", "--config", level], "log_level: expected off, error"),
        (2, &["clear", "--timeout", "0"], "--timeout"),
        (2, &["clear", "--timeout", "18446744073709551615"], "--timeout"),
        (2, &["replay", "--speed", "0"], "--speed"),
        (2, &["replay", "--instances", "40"], "at most 64 clients of one engine, got 121"),
        (2, &["replay", "--instances", "0"], "--instances"),
        (2, &["replay", "--ranks", "65"], "--ranks"),
        (2, &["chaos", "--seconds", "0"], "--seconds"),
        (2, &["simulate", "--capacity", "0"], "--capacity"),
        (2, &["bench", "lookup", "--index", "1"], "--index"),
        (2, &["bench", "health", "--seconds", "18446744073709551615"], "--seconds"),
        (2, &["bench", "gpu", "--seconds", "nan"], "--seconds"),
        (2, &["bench", "gpu", "--chunks", "3MiB"], "--chunks"),
        (1, &["serve", "--name", &name, "--arena", "8TiB"], "expected room for 8TiB"),
        (1, &["serve", "--config", "/nonexistent/kvring.toml"], "/nonexistent/kvring.toml"),
        (1, &["replay", "--trace", "/nonexistent/t.jsonl"], "/nonexistent/t.jsonl"),
        (1, &["replay", "--bytes-per-token", "16777216"], "smaller --arena or --bytes-per-token"),
        (1, &["replay", "--arena", "18446744073709551615"], "smaller --arena or --bytes-per-token"),
    ] {
        let said = run(arguments);
        assert_eq!((said.code, said.stdout.as_str()), (Some(code), ""), "{arguments:?}: {}", said.stderr);
        assert!(
            said.stderr.starts_with("error: ") && said.stderr.contains(part),
            "{arguments:?}: {}",
            said.stderr
        );
    }
    assert_eq!(segments(&format!("kvring.{name}.")), Vec::<String>::new());
}

#[test]
fn no_number_is_so_large_that_a_flag_panics() {
    let engine = Running::serve("absurd");
    let numbers = ["0", "1", "4294967295", "18446744073709551615", "1e308", "inf", "nan", "-1"];
    let flags = [
        "--arena",
        "--slab",
        "--beat-interval-ms",
        "--spin-us",
        "--client-share",
        "--max-leases",
        "--max-pins",
        "--max-chunks",
        "--start-wait-ms",
        "--reattach-grace-ms",
    ];
    for number in numbers {
        let mut tried: Vec<Vec<&str>> =
            flags.iter().map(|flag| vec!["serve", "--print-config", flag, number]).collect();
        tried.push(vec!["clear", "--name", &engine.name, "--timeout", number]);
        tried.push(vec!["simulate", "--policy", "lru", "--capacity", number]);
        tried.push(vec!["replay", "--trace", "/nonexistent", "--limit", number]);
        for arguments in tried {
            let said = run(&arguments);
            assert!(matches!(said.code, Some(0..=2)), "{arguments:?}: {:?} {}", said.code, said.stderr);
            assert!(!said.stderr.contains("panicked"), "{arguments:?}: {}", said.stderr);
        }
    }
}

/// A key in an error is one that a file may have, and that `--print-config` shows.
#[test]
fn an_error_names_a_setting_that_exists() {
    let printed = run(&["serve", "--print-config"]).stdout;
    let absurd = "4294967295";
    for flag in [
        "--beat-interval-ms",
        "--spin-us",
        "--max-leases",
        "--max-pins",
        "--start-wait-ms",
        "--reattach-grace-ms",
    ] {
        let name = unique_name("key");
        let said = run(&["serve", "--name", &name, "--arena", "8MiB", flag, absurd]);
        assert_eq!(said.code, Some(2), "{flag}: {}", said.stderr);
        let key = flag.trim_start_matches('-').replace('-', "_");
        assert!(said.stderr.contains(&format!("{key}: expected")), "{flag}: {}", said.stderr);
        assert!(printed.contains(&format!("\n{key} = ")), "{key}: {printed}");
        assert!(said.stderr.contains(&format!("got {absurd}")), "{flag}: {}", said.stderr);
    }
}

#[test]
fn what_failed_is_told_once() {
    for arguments in [
        &["serve", "--config", "/nonexistent/kvring.toml"][..],
        &["serve", "--config", "/dev"],
        &["replay", "--trace", "/nonexistent/t.jsonl"],
        &["simulate", "/nonexistent/t.jsonl"],
    ] {
        let said = run(arguments).stderr;
        assert_eq!(said.matches("os error").count(), 1, "{arguments:?}: {said}");
    }
}

/// A filter for something that does not exist would let nothing through, errors included.
#[test]
fn a_misspelt_log_level_is_refused_wherever_it_comes_from() {
    for wrong in ["inof", "kvring_engin=debug", "kvring_engine=debgu", "a=b=c"] {
        let flag = run(&["--log-level", wrong, "status"]);
        assert_eq!(flag.code, Some(2), "{wrong}: {}", flag.stderr);
        assert!(flag.stderr.contains("--log-level: expected off, error, warn"), "{}", flag.stderr);
        let environment = Said::of(kvring(&["status"]).env("KVRING_LOG", wrong).output().unwrap());
        assert_eq!(environment.code, Some(2), "{wrong}: {}", environment.stderr);
        assert!(environment.stderr.contains("KVRING_LOG: expected"), "{}", environment.stderr);
    }
    let filtered = run(&["--log-level", "off,kvring_engine=debug", "serve", "--print-config"]);
    assert_eq!(filtered.code, Some(0), "{}", filtered.stderr);
}

/// `kvring status --json | head -c 1`: the reader has gone when we print.
#[test]
fn nobody_has_to_read_what_a_command_prints() {
    let engine = Running::serve("unread-out");
    let (name, absent) = (engine.name.as_str(), unique_name("nobody"));
    for (code, arguments) in [
        (0, &["status", "--name", name][..]),
        (0, &["status", "--name", name, "--json"]),
        (3, &["status", "--name", &absent, "--json"]),
        (0, &["clear", "--name", name]),
        (0, &["remove", "--name", &absent]),
        (0, &["simulate", "--policy", "lru", "--capacity", "2000"]),
        (0, &["simulate", "--policy", "lru", "--capacity", "2000", "--json"]),
        (0, &["serve", "--print-config"]),
        (0, &["--help"]),
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = kvring(arguments);
        command.stdout(Stdio::from(writer)).stderr(Stdio::piped());
        let said = Said::of(command.spawn().unwrap().wait_with_output().unwrap());
        assert_eq!((said.code, said.stderr.as_str()), (Some(code), ""), "{arguments:?}");
    }
}

#[test]
fn flags_win_over_the_file_and_the_file_over_the_defaults() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(b"arena = \"2GiB\"\nspin_us = 7\n").unwrap();
    let path = file.path().to_str().unwrap();
    let said = run(&["serve", "--config", path, "--arena", "3GiB", "--print-config"]);
    assert_eq!(said.code, Some(0), "{}", said.stderr);
    for line in ["arena = \"3GiB\"", "spin_us = 7", "beat_interval_ms = 25", "name = \"default\""] {
        assert!(said.stdout.contains(line), "{line}: {}", said.stdout);
    }
    // What is printed can be read back.
    let mut printed = tempfile::NamedTempFile::new().unwrap();
    printed.write_all(said.stdout.as_bytes()).unwrap();
    let again = run(&["serve", "--config", printed.path().to_str().unwrap(), "--print-config"]);
    assert_eq!(again.stdout, said.stdout);
}
