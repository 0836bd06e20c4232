//! An engine beside other processes: it leaves memory to them, and notices when they remove its names.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_adapter::Role;
use kvring_shm_abi::failpoint::Place;
use kvring_tests::isolate::ControlGroup;
use kvring_tests::{
    ClientSpec, EngineProcess, FAIL_POINT, LIMIT, Sweep, becomes, client, eventually, segments, stat_of,
    unique_name,
};
use serde_json::json;

/// Memory that was free when the engine started is the neighbour's when the rest of the arena is to be allocated. The engine waits
/// until it is free again, and the kernel kills no process.
#[test]
fn memory_that_a_neighbour_has_taken_since_the_start_is_waited_for() {
    let name = "memory_that_a_neighbour_has_taken_since_the_start_is_waited_for";
    let limit = 420_000_000;
    ControlGroup::limited(name, limit, |group| {
        let name = unique_name("neighbour");
        let _sweep = Sweep(name.clone());
        let arena = 256u64 << 20;
        let fields = json!({ "name": name, "arena": arena, "slab": 1 << 20 });
        let mut engine =
            EngineProcess::launched(&fields, &[(FAIL_POINT, &format!("{}:1:stop", Place::AllocatorStarts))]);
        engine.has_stopped();
        // This process is the neighbour. It leaves less than the engine keeps for others.
        let spare = 24 << 20;
        let taken = vec![1u8; (limit - group.used() - spare) as usize];
        engine.resume();
        engine.serves().unwrap();
        let view = engine.view();
        becomes("allocation_stalled", 1, || stat_of(&view, "allocation_stalled"));
        assert!(stat_of(&view, "arena_bytes_allocated") < arena);
        assert!(group.used() <= limit - spare / 2, "the engine went on: {} bytes are used", group.used());
        assert!(std::hint::black_box(&taken).iter().all(|byte| *byte == 1));
        drop(taken);
        becomes("arena_bytes_allocated", arena, || stat_of(&view, "arena_bytes_allocated"));
        assert_eq!(engine.terminate(), Some(0));
        assert!(segments(&name).is_empty());
    });
}

/// The memory of a swept arena is not free before the last client has unmapped it, and a client that is stopped does not for a
/// while. The start waits until there is room, or until it is asked to stop.
#[test]
fn an_old_arena_that_somebody_still_maps_is_waited_for() {
    let name = "an_old_arena_that_somebody_still_maps_is_waited_for";
    ControlGroup::limited(name, 300_000_000, |group| {
        for asked_to_stop in [true, false] {
            let name = unique_name("mapped");
            let _sweep = Sweep(name.clone());
            let mut engine =
                EngineProcess::launched(&json!({ "name": name, "arena": 192 << 20, "slab": 1 << 20 }), &[]);
            engine.serves().unwrap();
            engine.is_allocated();
            let old = std::fs::File::open(engine.file("arena")).unwrap();
            engine.kill();
            engine.reconfigure(&json!({ "arena": 128 << 20, "slab": 128 << 20 }));
            engine.launch(&[]);
            let is_swept =
                || old.metadata().is_ok_and(|old| std::os::unix::fs::MetadataExt::nlink(&old) == 0);
            eventually("the old arena has no name any more", is_swept);
            if !asked_to_stop {
                // Longer than a client needs that is not stopped.
                std::thread::sleep(std::time::Duration::from_secs(5));
                assert!(engine.ended().is_none(), "it has given up, with {} bytes in use", group.used());
                assert!(!engine.file("arena").exists(), "there was room: the test is none");
                drop(old);
                engine.serves().unwrap();
            }
            assert_eq!(engine.terminate(), Some(0));
            assert!(segments(&name).is_empty());
        }
    });
}

/// After an `rm` in `/dev/shm` no client finds the engine, and a second one would start beside it. So the engine says so and ends,
/// and clients attach to the next one.
#[test]
fn an_engine_whose_names_are_removed_ends_and_takes_away_the_rest() {
    for lost in [&["engine"][..], &["lobby"], &["arena"], &["engine", "lobby", "arena"]] {
        let mut engine = EngineProcess::start("rm", 8);
        let client = client(Role::Worker, &ClientSpec::new(&engine.name));
        client.wait_ready(LIMIT).unwrap();
        for segment in lost {
            std::fs::remove_file(engine.file(segment)).unwrap();
        }
        eventually(&format!("an engine without {lost:?} ends"), || engine.ended().is_some());
        assert!(segments(&engine.name).is_empty(), "{lost:?}: {:?}", segments(&engine.name));
        eventually("its client runs without it", || !client.is_healthy());
        engine.restart();
        client.wait_ready(LIMIT).unwrap();
        drop(client);
        assert_eq!(engine.terminate(), Some(0));
    }
}
