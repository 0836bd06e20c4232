//! Engines that cannot start: typed errors with the values in them, and nothing is left behind.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_engine::byte_size::ByteSize;
use kvring_engine::config::EngineConfig;
use kvring_engine::segments::SetupError;
use kvring_engine::{Engine, StartError, StopHandle};
use kvring_shm_abi::failpoint::Rule;
use kvring_shm_abi::lobby::Role;
use kvring_shm_abi::message::Status;
use kvring_tests::engine::{merged, remove_segments};
use kvring_tests::isolate::ControlGroup;
use kvring_tests::raw::registration;
use kvring_tests::{
    BREAK, Bystander, EngineProcess, RawClient, Shape, Sweep, WorkerSide, WorkerSpec, all_stored, chain,
    overrides, round, segments, unique_name,
};
use serde_json::json;
use std::os::unix::fs::MetadataExt;
use tracing_subscriber::util::SubscriberInitExt;

fn config(name: &str, arena: u64) -> EngineConfig {
    EngineConfig {
        name: name.to_owned(),
        arena: Some(ByteSize(arena)),
        start_wait_ms: 200,
        ..EngineConfig::default()
    }
}

/// An engine of 8 MiB that was killed when it held 8 chunks, and the worker that has stored them.
fn dead_with_8_chunks(tag: &str) -> (EngineProcess, WorkerSide) {
    let mut engine = EngineProcess::start(tag, 8);
    let mut worker = engine.worker();
    worker.stores(round(1), chain(1, 8), 0);
    engine.kill();
    (engine, worker)
}

fn refused(config: EngineConfig) -> StartError {
    kvring_engine::spawn(config).err().expect("an engine that does not start")
}

#[test]
fn a_bad_configuration_says_what_is_bad() {
    for (change, parts) in [
        (json!({ "name": "a/b" }), ["\"a/b\"", "1 to 64 characters"]),
        (json!({ "arena": "64KiB", "slab": "1MiB" }), ["1MiB", "64KiB"]),
        (json!({ "arena": "64MiB", "slab": "3MiB" }), ["power of two", "3145728"]),
        (json!({ "arena": "64MiB", "client_share": 2.0 }), ["client_share", "got 2"]),
        (json!({ "arena": "64MiB", "policy": "fifo" }), ["fifo", "arc"]),
        (json!({ "arena": "64 apples" }), ["64 apples", "8GiB"]),
        (json!({ "arenas": "64MiB" }), ["unknown field", "arenas"]),
    ] {
        let name = unique_name("config");
        let _sweep = Sweep(name.clone());
        let error = EngineProcess::try_start(&merged(json!({ "name": name }), &change)).err().unwrap();
        for part in parts {
            assert!(error.contains(part), "{change}: {part} is not in: {error}");
        }
        assert!(segments(&name).is_empty());
    }
}

#[test]
fn an_arena_that_does_not_fit_is_refused_before_anything_is_made() {
    let name = unique_name("huge");
    let error = refused(config(&name, 8 << 40));
    assert!(matches!(error, StartError::Setup(SetupError::NoRoom(_))), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("8TiB of arena") && text.contains("left"), "{text}");
    assert!(segments(&name).is_empty(), "{:?}", segments(&name));
}

/// A control group (version 1 or 2) with a limit below the arena is an error at the start. Otherwise the kernel would kill the
/// engine later.
#[test]
fn an_arena_beyond_the_control_groups_limit_is_refused() {
    let name = "an_arena_beyond_the_control_groups_limit_is_refused";
    ControlGroup::limited(name, 200_000_000, |_| {
        let name = unique_name("cgroup");
        let text = refused(config(&name, 512 << 20)).to_string();
        for part in ["512MiB of arena", "the control group", "kvring-test-", "left", "--memory"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(segments(&name).is_empty());
        // One that fits starts in it.
        let small = kvring_engine::spawn(config(&name, 32 << 20)).unwrap();
        small.stop_and_join();
        assert!(segments(&name).is_empty());
    });
}

/// A start is refused before it destroys anything, for whatever reason: the next engine still finds what the dead one left.
#[test]
fn a_refused_start_leaves_the_warm_cache_as_it_was() {
    let (mut engine, worker) = dead_with_8_chunks("typo");
    drop(worker);
    let files = || -> Vec<(String, u64)> {
        let inode = |file: &String| std::fs::metadata(format!("/dev/shm/{file}")).unwrap().ino();
        segments(&engine.name).into_iter().map(|file| (file.clone(), inode(&file))).collect()
    };
    let before = files();
    assert_eq!(before.len(), 3, "{before:?}");
    for (change, part) in [
        (json!({ "arena": "8TiB" }), "8TiB of arena"),
        (json!({ "arena": "256KiB" }), "at least one slab"),
        (json!({ "slab": "3MiB" }), "power of two"),
        (json!({ "max_pins": u32::MAX }), "pins"),
        (json!({ "max_leases": u32::MAX }), "leases"),
        (json!({ "max_chunks": u32::MAX }), "chunks"),
        (json!({ "client_share": 2.0 }), "client_share"),
        (json!({ "beat_interval_ms": 0 }), "beat_interval_ms"),
        (json!({ "policy": "fifo" }), "fifo"),
        (json!({ "arenas": "8MiB" }), "arenas"),
    ] {
        // With another arena it would be a cold start, with the same arena a warm one. Several refused warm starts do not
        // count as failed recoveries.
        for arena_mib in [16, 8] {
            let overrides = merged(overrides(&engine.name, arena_mib), &change);
            let error = EngineProcess::try_start(&overrides).err();
            let error = error.unwrap_or_else(|| panic!("{change}: started"));
            assert!(error.contains(part), "{change}: {error}");
            assert_eq!(files(), before, "{change}");
        }
    }
    engine.restart();
    assert_eq!((engine.stat("warm_start"), engine.stat("chunks_recovered")), (1, 8));
}

/// Where memory is short at the moment the cache is not given up: the next start has it.
#[test]
fn a_start_without_memory_leaves_the_warm_cache_as_it_was() {
    let (mut engine, worker) = dead_with_8_chunks("short");
    for what in [Rule::Memory, Rule::MemoryForTables].repeat(4) {
        let status = engine.restart_with(&[(BREAK, what.name())]).expect_err("it does not start");
        assert!(!status.success(), "{what}: {status}");
    }
    engine.restart();
    assert_eq!((engine.stat("warm_start"), engine.stat("chunks_recovered")), (1, 8));
    worker.ready();
    engine.settles_without(worker);
}

/// A start is asked to stop when it has the name and the segments already: with the first line that it logs.
#[test]
fn a_start_that_is_asked_to_stop_leaves_what_was_there() {
    let asked_to_stop = |name: &str| {
        let stop = StopHandle::default();
        let on_a_line = stop.clone();
        let log = tracing_subscriber::fmt().with_writer(move || {
            on_a_line.stop();
            std::io::sink()
        });
        let config = config(name, 8 << 20);
        let _of_this_thread = log.set_default();
        let error = Engine::create(&config, &stop).err().expect("a start that ends");
        assert!(matches!(error, StartError::Setup(SetupError::Stopped)), "{error:?}");
    };
    let name = unique_name("asked");
    asked_to_stop(&name);
    assert!(segments(&name).is_empty(), "{:?}", segments(&name));
    let (mut engine, worker) = dead_with_8_chunks("asked");
    drop(worker);
    asked_to_stop(&engine.name);
    engine.restart();
    assert_eq!((engine.stat("warm_start"), engine.stat("chunks_recovered")), (1, 8));
}

#[test]
fn a_second_engine_of_the_same_name_is_refused_and_the_first_goes_on() {
    let (engine, bystander) = EngineProcess::with_bystander("twice");
    let before = segments(&engine.name);
    for _ in 0..3 {
        let error = refused(config(&engine.name, 32 << 20));
        assert!(matches!(error, StartError::Setup(SetupError::AlreadyRunning { .. })), "{error:?}");
        let text = error.to_string();
        assert!(text.contains(&engine.name) && text.contains(&format!("pid {}", engine.pid())), "{text}");
        bystander.goes_on();
    }
    assert_eq!(segments(&engine.name), before);
    engine.settles_beside(bystander, ());
}

#[test]
fn a_stopped_engine_is_not_replaced_either() {
    let engine = EngineProcess::start("asleep", 16);
    engine.stop();
    let error = refused(config(&engine.name, 16 << 20));
    assert!(matches!(error, StartError::Setup(SetupError::AlreadyRunning { .. })), "{error:?}");
    engine.resume();
    Bystander::start(&engine.name).was_undisturbed();
}

/// The files that a killed start leaves do not keep the next engine from starting.
#[test]
fn what_a_killed_start_leaves_is_swept() {
    let name = unique_name("half");
    let _sweep = Sweep(name.clone());
    let engine = |prefix: &str| std::path::PathBuf::from(format!("/dev/shm/kvring.{name}.{prefix}"));
    let overrides = overrides(&name, 16);
    for length in [0, 17, 256, 4096, 1 << 20] {
        std::fs::write(engine("engine"), vec![0; length]).unwrap();
        std::fs::write(engine("lobby"), vec![1; 100]).unwrap();
        std::fs::write(engine("arena"), []).unwrap();
        std::fs::write(engine("client.3.00000000000000ff"), vec![7; 5000]).unwrap();
        for file in segments(&name) {
            use std::os::unix::fs::PermissionsExt;
            let path = format!("/dev/shm/{file}");
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
        }
        let mut started = EngineProcess::try_start(&overrides).unwrap();
        Bystander::start(&name).was_undisturbed();
        started.settles(0);
        assert_eq!(started.terminate(), Some(0));
        assert!(segments(&name).is_empty(), "a clean end leaves {:?}", segments(&name));
    }
    remove_segments(&name);
}

#[test]
fn a_shard_larger_than_the_arena_is_refused_with_both_sizes() {
    let engine = EngineProcess::start("shard", 2);
    let bystander = Bystander::start(&engine.name);
    // 3 MiB a shard.
    let shape = Shape { page_bytes: [768 << 10, 768 << 10], blocks: 4, ..Shape::LARGE };
    let spec = WorkerSpec { shape, ..WorkerSpec::new(&engine.name) };
    let error = WorkerSide::start(&spec).err().unwrap().to_string();
    assert!(error.contains("3145728 bytes on each rank") && error.contains("up to 2097152"), "{error}");
    // The limit is exact to the byte.
    let mut raw = RawClient::attach(&engine.name, Role::Worker);
    for (bytes, status) in
        [((2 << 20) + 1, Status::ShardTooLarge), (u64::MAX, Status::ShardTooLarge), (2 << 20, Status::Ok)]
    {
        assert_eq!(raw.call_register(&registration(bytes, 1, 0, bytes)).status, status, "{bytes}");
    }
    drop(raw);
    // The refused worker is gone, and others are welcome.
    let fits = WorkerSpec { namespace: 5, ..WorkerSpec::new(&engine.name) };
    let mut worker = WorkerSide::start(&fits).unwrap();
    assert_eq!(worker.store(round(1), &chain(1, 2), 0), all_stored(2));
    engine.settles_beside(bystander, worker);
}
