//! A full `/dev/shm`, in a mount namespace of its own: errors and dropped stores, never a SIGBUS.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_adapter::{Role, Round};
use kvring_tests::attempts::{Others, fails_cleanly, mends_itself};
use kvring_tests::engine::{EngineProcess, Sweep, overrides};
use kvring_tests::isolate::{is_root, isolated_by, segments};
use kvring_tests::kv::chain;
use kvring_tests::peer::Peer;
use kvring_tests::proto::{SchedulerSpec, Stored, WorkerSpec, all_loaded, all_stored};
use kvring_tests::worker::WorkerSide;
use std::os::unix::fs::FileExt;

/// Mounts a `/dev/shm` of 24 MiB for one process and its children.
const SMALL_SHM: [&str; 6] =
    ["unshare", "-m", "sh", "-c", "mount -t tmpfs -o size=24m,mode=1777 tmpfs /dev/shm && exec \"$@\"", "sh"];

/// Takes all that is left in `/dev/shm`, until it is dropped.
struct Filler;

impl Filler {
    const PATH: &str = "/dev/shm/filler";

    fn new() -> Filler {
        let file = std::fs::File::create(Filler::PATH).unwrap();
        let mut at = 0;
        while file.write_all_at(&[1; 4096], at).is_ok() {
            at += 4096;
        }
        Filler
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(Filler::PATH);
    }
}

#[test]
fn a_client_without_room_for_its_channel_says_so_and_an_engine_without_room_too() {
    let name = "a_client_without_room_for_its_channel_says_so_and_an_engine_without_room_too";
    if !is_root(name) {
        return;
    }
    isolated_by(name, &SMALL_SHM, || {
        let engine = EngineProcess::start("full", 8);
        let others = Others { lobby: engine.lobby(), count: 0 };
        let filler = Filler::new();
        let parts = ["refused", "no room in /dev/shm", "4231168 more bytes"];
        fails_cleanly(&engine, &others, Role::Worker, &parts);
        mends_itself(&engine, Role::Worker, || drop(filler));
        engine.settles(0);
        // And a second engine has no room beside the first.
        let _sweep = Sweep("beside".to_owned());
        let error = EngineProcess::try_start(&overrides("beside", 32)).err().unwrap();
        for part in ["32MiB of arena", "/dev/shm has", "left", "--shm-size"] {
            assert!(error.contains(part), "{part}: {error}");
        }
        assert!(segments("beside").is_empty(), "{:?}", segments("beside"));
    });
}

/// Slot headers get their memory with the first store: without room for them it is dropped, and nobody dies.
#[test]
fn stores_without_room_for_their_headers_are_dropped() {
    let name = "stores_without_room_for_their_headers_are_dropped";
    if !is_root(name) {
        return;
    }
    isolated_by(name, &SMALL_SHM, || {
        let engine = EngineProcess::start("headers", 8);
        let mut worker = WorkerSide::start(&WorkerSpec::new(&engine.name)).unwrap();
        let mut scheduler = Peer::scheduler(&SchedulerSpec::new(&engine.name));
        let filler = Filler::new();
        let round = |number| Round { source: 1, number };
        let stored = worker.store("r", round(1), None, &chain(1, 8), 0);
        assert_eq!(stored, Stored { dropped: 8, ..Stored::default() });
        assert_eq!(scheduler.lookup("r", 0, &chain(1, 8)).chunks, 0);
        drop(filler);
        assert_eq!(worker.store("r", round(2), None, &chain(1, 8), 0), all_stored(8));
        // What is there goes on.
        let _filler = Filler::new();
        let found = scheduler.lookup("r", 1, &chain(1, 8));
        assert_eq!(worker.load("r", &found.ranks[0], 0), all_loaded(8));
        drop((worker, scheduler));
        engine.settles(0);
    });
}

/// A client that comes back has room for its channel, where it had room for the one before.
#[test]
fn a_client_comes_back_in_a_full_shm() {
    let name = "a_client_comes_back_in_a_full_shm";
    if !is_root(name) {
        return;
    }
    isolated_by(name, &SMALL_SHM, || {
        let mut engine = EngineProcess::start("full-back", 8);
        let mut worker = WorkerSide::start(&WorkerSpec::new(&engine.name)).unwrap();
        assert_eq!(worker.store("r", Round { source: 1, number: 1 }, None, &chain(1, 8), 1), all_stored(8));
        let _filler = Filler::new();
        engine.kill();
        engine.restart();
        assert_eq!(engine.stat("warm_start"), 1);
        let ready = worker.wait_ready(kvring_tests::wait::LIMIT);
        assert_eq!(ready, Ok(()), "its own old channel takes the room");
    });
}

/// A `/dev/shm` that has become read-only: nothing starts, nothing attaches anew, and nothing is lost.
#[test]
fn a_read_only_shm_is_an_error_and_costs_nothing() {
    let name = "a_read_only_shm_is_an_error_and_costs_nothing";
    if !is_root(name) {
        return;
    }
    isolated_by(name, &SMALL_SHM, || {
        let mut engine = EngineProcess::start("read-only", 8);
        let mut worker = WorkerSide::start(&WorkerSpec::new(&engine.name)).unwrap();
        assert_eq!(worker.store("r", Round { source: 1, number: 1 }, None, &chain(1, 8), 1), all_stored(8));
        engine.kill();
        let remount = |how: &str| {
            let done = std::process::Command::new("mount").args(["-o", how, "/dev/shm"]).status();
            done.unwrap().success()
        };
        // While somebody maps the arena to write the kernel refuses.
        drop(worker);
        assert!(remount("remount,bind,ro"));
        for _ in 0..3 {
            let error = engine.try_restart().unwrap_err();
            assert!(error.contains("Read-only file system"), "{error}");
        }
        assert!(remount("remount,bind,rw"));
        engine.restart();
        assert_eq!((engine.stat("warm_start"), engine.stat("chunks_recovered")), (1, 8));
    });
}
