//! A full `/dev/shm`, in a mount namespace of its own: errors and dropped stores, never a SIGBUS.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_adapter::Role;
use kvring_engine::byte_size::ByteSize;
use kvring_tests::attempts::{Others, fails_cleanly, mends_itself};
use kvring_tests::isolate::{is_root, isolated_by};
use kvring_tests::{
    ClientSpec, EngineProcess, LIMIT, Peer, SchedulerSpec, Sweep, all_dropped, all_loaded, all_stored, chain,
    client, eventually, overrides, round, segments,
};
use std::os::unix::fs::FileExt;

/// Mounts a `/dev/shm` of 32 MiB for one process and its children.
const SMALL_SHM: [&str; 6] =
    ["unshare", "-m", "sh", "-c", "mount -t tmpfs -o size=32m,mode=1777 tmpfs /dev/shm && exec \"$@\"", "sh"];

/// Runs `body` with a `/dev/shm` of 32 MiB, where this user may mount one.
fn in_a_small_shm(name: &str, body: impl FnOnce()) {
    if is_root(name) {
        isolated_by(name, &SMALL_SHM, body);
    }
}

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
    in_a_small_shm("a_client_without_room_for_its_channel_says_so_and_an_engine_without_room_too", || {
        let engine = EngineProcess::start("full", 8);
        let others = Others { lobby: engine.lobby(), count: 0 };
        let filler = Filler::new();
        let parts = ["refused", "4231168 more bytes in /dev/shm", "--shm-size"];
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
    in_a_small_shm("stores_without_room_for_their_headers_are_dropped", || {
        let engine = EngineProcess::start("headers", 8);
        let mut worker = engine.worker();
        let mut scheduler = Peer::scheduler(&SchedulerSpec::new(&engine.name));
        let filler = Filler::new();
        let stored = worker.store(round(1), &chain(1, 8), 0);
        assert_eq!(stored, all_dropped(8));
        assert_eq!(scheduler.lookup("r", 0, &chain(1, 8)).chunks, 0);
        drop(filler);
        // The engine asks for it again once a second.
        let mut number = 1;
        eventually("stores have room again", || {
            number += 1;
            worker.store(round(number), &chain(1, 8), 0) == all_stored(8)
        });
        // Loads of what is there need no memory.
        let _filler = Filler::new();
        let found = scheduler.lookup("r", 1, &chain(1, 8));
        assert_eq!(worker.load(&found.handles, 0), all_loaded(8));
        engine.settles_without((worker, scheduler));
    });
}

/// The arena size that is advised where one does not fit leaves room for clients.
#[test]
fn an_arena_of_the_advised_size_leaves_room_for_clients() {
    in_a_small_shm("an_arena_of_the_advised_size_leaves_room_for_clients", || {
        let error = EngineProcess::try_start(&overrides("advised", 31)).err().unwrap();
        let (_, advised) = error.rsplit_once("--arena ").unwrap_or_else(|| panic!("no advice: {error}"));
        let advised: ByteSize = advised.trim().parse().unwrap();
        let engine = EngineProcess::start("advised", advised.0 >> 20);
        assert_eq!(engine.view().identity.geometry.arena_bytes, advised.0);
        let clients: Vec<_> = [Role::Scheduler, Role::Worker, Role::Worker, Role::Scheduler]
            .map(|role| client(role, &ClientSpec::new(&engine.name)))
            .into();
        for client in &clients {
            client.wait_ready(LIMIT).unwrap();
        }
        engine.settles_without(clients);
    });
}

/// A client that comes back has room for its channel, because it gives up the one before.
#[test]
fn a_client_comes_back_in_a_full_shm() {
    in_a_small_shm("a_client_comes_back_in_a_full_shm", || {
        let mut engine = EngineProcess::start("full-back", 8);
        let mut worker = engine.worker();
        assert_eq!(worker.store(round(1), &chain(1, 8), 1), all_stored(8));
        let _filler = Filler::new();
        engine.kill_and_restart();
        assert_eq!(engine.stat("warm_start"), 1);
        let ready = worker.client().wait_ready(LIMIT);
        assert_eq!(ready, Ok(()), "its own old channel takes the room");
    });
}

/// A `/dev/shm` that has become read-only: nothing starts, nothing attaches anew, and nothing is lost.
#[test]
fn a_read_only_shm_is_an_error_and_costs_nothing() {
    in_a_small_shm("a_read_only_shm_is_an_error_and_costs_nothing", || {
        let mut engine = EngineProcess::start("read-only", 8);
        let mut worker = engine.worker();
        assert_eq!(worker.store(round(1), &chain(1, 8), 1), all_stored(8));
        engine.kill();
        let remount = |how: &str| {
            let done = std::process::Command::new("mount").args(["-o", how, "/dev/shm"]).status();
            done.unwrap().success()
        };
        // The kernel refuses to remount while a client has mapped the arena to write.
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
