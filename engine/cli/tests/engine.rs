//! `serve`, `status`, `clear` and `remove`, as a user and a script see them.

mod support;

use kvring_adapter::{EngineView, Role};
use kvring_shm_abi::life::RobustList;
use kvring_shm_abi::lobby::{DmaOwner, EntryContent};
use kvring_shm_abi::process::ProcessIdentity;
use kvring_shm_abi::segment::EngineName;
use nix::sys::signal::Signal;
use std::io::Write;
use support::{Running, run, segments, unique_name};

#[test]
fn an_engine_serves_shows_itself_and_leaves_nothing_behind() {
    let mut engine = Running::serve("life");
    let status = run(&["status", "--name", &engine.name, "--json"]);
    let json = status.json();
    assert_eq!((status.code, json["state"].as_str()), (Some(0), Some("serving")), "{json}");
    assert_eq!(json["engine"]["pid"], engine.pid());
    assert_eq!(json["engine"]["arena_bytes"], 8 << 20);
    assert_eq!(json["engine"]["incarnation"], 2);
    assert_eq!(
        (json["engine"]["policy"].as_str(), json["counters"]["clients"].as_u64()),
        (Some("lru"), Some(0))
    );
    // No stand-in on the systems that this is tested on.
    let means = [&json["engine"]["death_notice"], &json["engine"]["waiting"]].map(|means| means.as_str());
    assert_eq!(means, [Some("robust futex"), Some("futex_waitv")]);
    let table = run(&["status", "--name", &engine.name]);
    assert_eq!(table.code, Some(0));
    assert!(
        table.stdout.contains("robust futex") && table.stdout.contains("futex_waitv"),
        "{}",
        table.stdout
    );
    assert!(
        table.stdout.contains("is serving") && table.stdout.contains("chunks_visible"),
        "{}",
        table.stdout
    );
    let cleared = run(&["clear", "--name", &engine.name]);
    assert_eq!(
        (cleared.code, cleared.stdout.as_str()),
        (Some(0), "dropped 0 chunks\n"),
        "{}",
        cleared.stderr
    );
    assert!(!segments(&format!("kvring.{}.", engine.name)).is_empty());
    engine.signal(Signal::SIGTERM);
    assert_eq!(engine.wait(), Some(0));
    assert_eq!(segments(&format!("kvring.{}.", engine.name)), Vec::<String>::new());
    let stderr = engine.stderr();
    assert!(stderr.contains("stopping") && !stderr.contains("ERROR"), "{stderr}");
}

/// It is read from shared memory alone: what an entry says is shown as what it is.
#[test]
fn a_dead_client_for_which_devices_may_write_is_shown_as_dying() {
    let mut engine = Running::serve("dying");
    engine.signal(Signal::SIGKILL);
    engine.wait();
    let name = EngineName::new(&engine.name).unwrap();
    let lobby = EngineView::open(&name).unwrap().open_lobby(&name).unwrap();
    let mut list = RobustList::register(lobby.life_words.clone()).unwrap();
    let content = EntryContent {
        role: Role::Worker as u32,
        nonce: 1,
        incarnation: 2,
        pid: std::process::id(),
        payload_words: 1,
        name: "device".to_owned(),
    };
    for entry in [0, 1] {
        list.claim(entry).unwrap();
        lobby.claim(entry, &content);
    }
    lobby.entries[1].register_dma(&DmaOwner { process: ProcessIdentity::own(), locked: false });
    let shown = || {
        let status = run(&["status", "--name", &engine.name, "--json"]).json();
        [0, 1].map(|entry| ["alive", "lingering"].map(|field| status["clients"][entry][field] == true))
    };
    assert_eq!(shown(), [[true, false], [true, false]]);
    (0..2).for_each(|entry| list.release(entry));
    assert_eq!(shown(), [[false, false], [false, true]]);
    let table = run(&["status", "--name", &engine.name]).stdout;
    assert!(table.contains("dying"), "{table}");
    assert_eq!(run(&["remove", "--name", &engine.name]).code, Some(0));
}

#[test]
fn ctrl_c_ends_it_as_well() {
    let mut engine = Running::serve("ctrl-c");
    engine.signal(Signal::SIGINT);
    assert_eq!(engine.wait(), Some(0));
    assert_eq!(segments(&format!("kvring.{}.", engine.name)), Vec::<String>::new());
}

#[test]
fn whoever_reads_its_log_may_go_away() {
    let mut engine = Running::serve("log");
    drop(engine.take_stderr());
    // An attachment is logged, to nobody.
    assert_eq!(run(&["clear", "--name", &engine.name]).code, Some(0));
    assert_eq!(run(&["status", "--name", &engine.name]).code, Some(0));
    engine.signal(Signal::SIGTERM);
    assert_eq!(engine.wait(), Some(0));
    assert_eq!(segments(&format!("kvring.{}.", engine.name)), Vec::<String>::new());
}

#[test]
fn whoever_reads_its_log_may_stop_reading() {
    let (reader, writer) = std::io::pipe().unwrap();
    // A page of it is full after a few lines.
    nix::fcntl::fcntl(&writer, nix::fcntl::FcntlArg::F_SETPIPE_SZ(4096)).unwrap();
    let mut engine = Running::serve_to("unread", writer.into());
    // Each attachment and each leave is a line of about a hundred bytes.
    for _ in 0..40 {
        let cleared = run(&["clear", "--name", &engine.name]);
        assert_eq!(cleared.code, Some(0), "{}", cleared.stderr);
    }
    drop(reader);
    engine.signal(Signal::SIGTERM);
    assert_eq!(engine.wait(), Some(0));
    assert_eq!(segments(&format!("kvring.{}.", engine.name)), Vec::<String>::new());
}

#[test]
fn a_second_engine_of_the_same_name_is_refused_and_the_first_goes_on() {
    let engine = Running::serve("second");
    let second = run(&["serve", "--name", &engine.name, "--arena", "8MiB"]);
    assert_eq!(second.code, Some(1));
    assert_eq!(second.stdout, "");
    for part in
        [format!("an engine named {} runs already (pid {})", engine.name, engine.pid()), "--name".to_owned()]
    {
        assert!(second.stderr.contains(&part), "{}", second.stderr);
    }
    assert_eq!(run(&["status", "--name", &engine.name]).code, Some(0));
}

#[test]
fn status_tells_a_stopped_engine_from_a_dead_one() {
    let mut engine = Running::serve("stop");
    let state = || {
        let status = run(&["status", "--name", &engine.name, "--json"]);
        let json = status.json();
        assert_eq!(status.code, Some(if json["state"] == "serving" { 0 } else { 3 }));
        json["state"].as_str().expect("a state").to_owned()
    };
    engine.signal(Signal::SIGSTOP);
    support::eventually("it stands still", || state() == "stalled");
    let clear = run(&["clear", "--timeout", "1", "--name", &engine.name]);
    assert_eq!(clear.code, Some(1));
    assert!(clear.stderr.contains("kvring status"), "{}", clear.stderr);
    engine.signal(Signal::SIGCONT);
    support::eventually("it goes on", || state() == "serving");
    engine.signal(Signal::SIGKILL);
    support::eventually("it is dead", || state() == "dead");
    engine.wait();
    let name = engine.name.clone();
    let table = run(&["status", "--name", &name]);
    assert!(table.stdout.contains(&format!("kvring serve --name {name}")), "{}", table.stdout);
    let clear = run(&["clear", "--name", &name]);
    assert_eq!(clear.code, Some(1));
    assert!(clear.stderr.contains("has died; start it again with"), "{}", clear.stderr);
    let removed = run(&["remove", "--name", &name]);
    assert_eq!(removed.code, Some(0), "{}", removed.stderr);
    assert_eq!(segments(&format!("kvring.{name}.")), Vec::<String>::new());
}

#[test]
fn a_living_engine_is_removed_by_force_alone_and_then_ends() {
    let mut engine = Running::serve("force");
    let refused = run(&["remove", "--name", &engine.name]);
    assert_eq!(refused.code, Some(1));
    assert!(refused.stderr.contains("--force"), "{}", refused.stderr);
    let removed = run(&["remove", "--force", "--name", &engine.name]);
    assert_eq!(removed.code, Some(0), "{}", removed.stderr);
    assert!(removed.stdout.contains(&format!("(pid {}) was alive", engine.pid())), "{}", removed.stdout);
    engine.wait();
    assert_eq!(segments(&format!("kvring.{}.", engine.name)), Vec::<String>::new());
}

#[test]
fn an_engine_that_is_not_there_gets_advice() {
    let name = unique_name("absent");
    let status = run(&["status", "--name", &name]);
    assert_eq!(status.code, Some(3));
    let advice = format!("no engine named {name} runs here; start one with `kvring serve --name {name}`");
    assert!(status.stdout.contains(&advice), "{}", status.stdout);
    assert_eq!(run(&["status", "--json", "--name", &name]).json()["state"], "absent");
    let clear = run(&["clear", "--name", &name]);
    assert_eq!((clear.code, clear.stdout.as_str()), (Some(1), ""));
    assert!(clear.stderr.contains(&advice), "{}", clear.stderr);
    let removed = run(&["remove", "--name", &name]);
    assert_eq!(removed.code, Some(0));
    assert!(removed.stdout.contains("nothing to remove"), "{}", removed.stdout);
}

#[test]
fn wrong_usage_is_2_and_what_cannot_be_is_1() {
    for usage in [
        &["serve", "--policy", "fifo"][..],
        &["serve", "--arena", "8 apples"],
        &["nonsense"],
        &["replay", "--speed", "0"],
    ] {
        assert_eq!(run(usage).code, Some(2), "{usage:?}");
    }
    let name = unique_name("wrong");
    for (arguments, part) in [
        (&["serve", "--name", "a/b"][..], "a/b"),
        (&["serve", "--name", &name, "--arena", "4KiB"], "--arena"),
        (&["serve", "--name", &name, "--arena", "8TiB"], "expected room for 8TiB"),
        (&["serve", "--name", &name, "--spin-us", "5000"], "spin_us: expected 0 to 1000, got 5000"),
        (&["serve", "--config", "/nonexistent/kvring.toml"], "/nonexistent/kvring.toml"),
        (&["--log-level", "a=b=c", "status"], "KVRING_LOG"),
        (&["replay", "--trace", "/nonexistent/t.jsonl"], "/nonexistent/t.jsonl"),
        (&["replay", "--instances", "40"], "at most 64 clients of one engine, got 121"),
        (&["replay", "--instances", "0"], "--instances: expected at least 1, got 0"),
        (&["replay", "--ranks", "65"], "--ranks: expected 1 to 64, got 65"),
        (&["replay", "--bytes-per-token", "16777216"], "smaller --arena or --bytes-per-token"),
    ] {
        let said = run(arguments);
        assert_eq!((said.code, said.stdout.as_str()), (Some(1), ""), "{arguments:?}");
        assert!(
            said.stderr.starts_with("error: ") && said.stderr.contains(part),
            "{arguments:?}: {}",
            said.stderr
        );
    }
    assert_eq!(segments(&format!("kvring.{name}.")), Vec::<String>::new());
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
