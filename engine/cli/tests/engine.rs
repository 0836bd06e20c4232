//! `serve`, `status`, `clear` and `remove`, as a user and a script see them.

mod support;

use kvring_adapter::{EngineView, Role};
use kvring_shm_abi::life::RobustList;
use kvring_shm_abi::lobby::{DmaOwner, EntryContent};
use kvring_shm_abi::process::ProcessIdentity;
use kvring_shm_abi::segment::{EngineName, SegmentFile};
use nix::sys::signal::Signal;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::process::Stdio;
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

/// The kernel and the shell both send it.
#[test]
fn the_end_of_its_terminal_ends_it_as_well() {
    let mut engine = Running::serve("hangup");
    engine.signal(Signal::SIGHUP);
    engine.signal(Signal::SIGHUP);
    assert_eq!(engine.wait(), Some(0));
    assert_eq!(segments(&format!("kvring.{}.", engine.name)), Vec::<String>::new());
}

#[test]
fn the_end_of_its_terminal_is_nothing_to_an_engine_under_nohup() {
    let mut engine = Running::serve_by("nohup", &["sh", "-c", "trap '' HUP && exec \"$@\"", "sh"]);
    engine.signal(Signal::SIGHUP);
    // It still answers, after that.
    assert_eq!(run(&["clear", "--name", &engine.name]).code, Some(0));
    assert_eq!(run(&["status", "--name", &engine.name]).code, Some(0));
    engine.signal(Signal::SIGTERM);
    assert_eq!(engine.wait(), Some(0));
}

/// Another start of its name is under way, and does not come to its end.
#[test]
fn a_start_that_waits_is_ended_by_a_signal() {
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        let name = unique_name("waits");
        let other = SegmentFile::create(&EngineName::new(&name).unwrap().engine_segment(), 0).unwrap();
        let lock = other.try_lock();
        let mut engine =
            Running::start(&name, &["serve", "--name", &name, "--arena", "8MiB", "--start-wait-ms", "60000"]);
        let file = format!("/dev/shm/kvring.{name}.engine");
        support::eventually("it looks at the file of the other start", || {
            let open = std::fs::read_dir(format!("/proc/{}/fd", engine.pid())).unwrap();
            open.flatten().any(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| to.as_os_str() == &*file))
        });
        engine.signal(signal);
        assert_eq!(engine.wait(), Some(0), "{signal}: {}", engine.stderr());
        assert!(lock.is_some() && other.is_current());
        // Else the removal of what this test leaves would wait for the lock.
        drop(lock);
    }
}

/// Whoever may write to /dev/shm can make files there with our names.
#[test]
fn what_is_not_ours_under_an_engines_name_keeps_nobody_from_serving_ending_or_removing() {
    let name = unique_name("stranger");
    let stranger = format!("/dev/shm/kvring.{name}.client.0.x");
    std::fs::create_dir(&stranger).unwrap();
    let ended = std::panic::catch_unwind(|| {
        let mut engine = Running::serve_as(&name, &[], &[], Stdio::piped());
        engine.signal(Signal::SIGTERM);
        assert_eq!(engine.wait(), Some(0));
        let stderr = engine.stderr();
        assert!(stderr.contains("left where it is") && stderr.contains(&stranger[8..]), "{stderr}");
        let mut engine = Running::serve_as(&name, &[], &[], Stdio::piped());
        engine.signal(Signal::SIGKILL);
        engine.wait();
        let removed = run(&["remove", "--name", &name]);
        assert_eq!(removed.code, Some(0), "{}", removed.stderr);
        assert!(removed.stdout.contains("removed 3 segments"), "{}", removed.stdout);
        assert!(removed.stderr.contains("left where it is"), "{}", removed.stderr);
        assert_eq!(segments(&format!("kvring.{name}.")), [format!("kvring.{name}.client.0.x")]);
    });
    std::fs::remove_dir(&stranger).unwrap();
    ended.unwrap();
}

/// Whoever starts an engine for the node may itself be bound to a part of it.
#[test]
fn an_engine_is_not_bound_as_its_starter_is() {
    // Nothing of this takes a privilege: one CPU, and a blocked signal; a niceness of its own is taken back where that is allowed.
    let starter =
        "cd /tmp && exec taskset -c \"$(taskset -cp $$ | sed 's/.*: \\([0-9]*\\).*/\\1/')\" nice -n 5 \"$@\"";
    let status = |engine: &Running, key: &str| {
        let text = std::fs::read_to_string(format!("/proc/{}/status", engine.pid())).unwrap();
        text.lines().find_map(|line| line.strip_prefix(key)).unwrap().trim().to_owned()
    };
    let nice = |engine: &Running| {
        let text = std::fs::read_to_string(format!("/proc/{}/stat", engine.pid())).unwrap();
        text.rsplit_once(") ").unwrap().1.split(' ').nth(16).unwrap().to_owned()
    };
    let free = Running::serve("free");
    let starter = ["sh", "-c", starter, "sh"];
    let bound = Running::serve_by("bound", &starter);
    assert_ne!(nice(&bound), "0");
    let unbound = Running::serve_as(&unique_name("unbound"), &starter, &["--unbound"], Stdio::piped());
    assert_eq!(status(&unbound, "Cpus_allowed:"), status(&free, "Cpus_allowed:"));
    if std::thread::available_parallelism().unwrap().get() > 1 {
        assert_ne!(status(&bound, "Cpus_allowed:"), status(&free, "Cpus_allowed:"));
    } else {
        eprintln!("SKIPPED the part with CPUs: there is one");
    }
    let directory = |engine: &Running| std::fs::read_link(format!("/proc/{}/cwd", engine.pid())).unwrap();
    assert_eq!(
        [directory(&bound), directory(&unbound)].map(|path| path.display().to_string()),
        ["/tmp", "/"]
    );
    if nix::unistd::geteuid().is_root() {
        assert_eq!(nice(&unbound), "0");
    } else {
        eprintln!("SKIPPED the part with niceness: it takes a privilege to go back");
    }
    // Each thread has its own.
    let tasks = std::fs::read_dir(format!("/proc/{}/task", unbound.pid())).unwrap();
    for task in tasks.flatten() {
        let text = std::fs::read_to_string(task.path().join("status")).unwrap();
        assert!(text.contains(&format!("Cpus_allowed:\t{}\n", status(&free, "Cpus_allowed:"))), "{text}");
    }
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
    let stalled = run(&["status", "--name", &engine.name]).stdout;
    assert!(
        stalled.contains("did nothing while this command watched it for"),
        "for longer, perhaps: {stalled}"
    );
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
    assert!(
        !removed.stderr.contains("kvring remove"),
        "nobody is advised to do what they do: {}",
        removed.stderr
    );
    assert!(removed.stdout.contains(&format!("(pid {}) was alive", engine.pid())), "{}", removed.stdout);
    engine.wait();
    assert_eq!(segments(&format!("kvring.{}.", engine.name)), Vec::<String>::new());
}

#[test]
fn an_engine_that_is_not_there_gets_advice() {
    let name = unique_name("absent");
    let status = run(&["status", "--name", &name]);
    assert_eq!(status.code, Some(3));
    let advice =
        format!("no kvring engine named {name} runs here; start one with `kvring serve --name {name}`");
    assert!(status.stdout.contains(&advice), "{}", status.stdout);
    assert_eq!(run(&["status", "--json", "--name", &name]).json()["state"], "absent");
    let clear = run(&["clear", "--name", &name]);
    assert_eq!((clear.code, clear.stdout.as_str()), (Some(1), ""));
    assert!(clear.stderr.contains(&advice), "{}", clear.stderr);
    let removed = run(&["remove", "--name", &name]);
    assert_eq!(removed.code, Some(0));
    assert!(removed.stdout.contains("nothing to remove"), "{}", removed.stdout);
}

/// Somebody else's, another release's, half-made: "there is none" would send people to start a second one.
#[test]
fn an_engine_that_is_there_and_cannot_be_read_is_not_absent() {
    let state = |name: &str| {
        let status = run(&["status", "--name", name, "--json"]);
        let json = status.json();
        assert_eq!(status.code, Some(3));
        (json["state"].as_str().unwrap().to_owned(), json["detail"].as_str().unwrap().to_owned())
    };
    let engine = Running::serve("unreadable");
    let path = format!("/dev/shm/kvring.{}.engine", engine.name);
    let abi_version = |version: u32| {
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&version.to_le_bytes(), 8).unwrap();
    };
    let mode = |mode| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    mode(0o640);
    let (inaccessible, detail) = state(&engine.name);
    assert_eq!(inaccessible, "inaccessible");
    assert!(detail.contains("expected mode 0600, found 0640; `chmod 600 /dev/shm/kvring."), "{detail}");
    mode(0o600);
    abi_version(77);
    let (incompatible, detail) = state(&engine.name);
    assert_eq!(incompatible, "incompatible");
    assert!(detail.contains("different releases"), "{detail}");
    abi_version(kvring_shm_abi::superblock::ABI_VERSION);
    assert_eq!(run(&["status", "--name", &engine.name]).code, Some(0));
    if nix::unistd::geteuid().is_root() {
        let name = unique_name("theirs");
        let theirs = format!("/dev/shm/kvring.{name}.engine");
        std::fs::write(&theirs, []).unwrap();
        assert_eq!(state(&name).0, "inaccessible", "its mode is wrong");
        std::fs::set_permissions(&theirs, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(state(&name).0, "recovering", "half-made");
        std::os::unix::fs::chown(&theirs, Some(65534), None).unwrap();
        let (state, detail) = state(&name);
        std::fs::remove_file(&theirs).unwrap();
        assert_eq!(state, "inaccessible");
        assert!(detail.contains("found one of uid 65534; run this as that user"), "{detail}");
    }
}
