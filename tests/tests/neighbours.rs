//! An engine among others: it leaves memory to its neighbours, and notices what they do to its names.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_adapter::{EngineView, Role};
use kvring_shm_abi::failpoint::Place;
use kvring_shm_abi::segment::EngineName;
use kvring_tests::crash::FAIL_POINT;
use kvring_tests::engine::{EngineProcess, Sweep, stat_of, unique_name};
use kvring_tests::isolate::{ControlGroup, segments};
use kvring_tests::proto::ClientSpec;
use kvring_tests::wait::{LIMIT, becomes, eventually};
use kvring_tests::worker::client;
use serde_json::json;

/// What was free when the engine started is the neighbour's when the rest of the arena is allocated: the engine waits until it is
/// free again, and the kernel kills nobody.
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
        // This process is the neighbour: it takes all but less than the engine keeps for others.
        let spare = 24 << 20;
        let taken = vec![1u8; (limit - group.used() - spare) as usize];
        engine.resume();
        engine.serves().unwrap();
        let view = EngineView::open(&EngineName::new(&name).unwrap()).unwrap();
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

/// The arena of a predecessor that was swept is not free before the last of its clients has let go of it. A client that is
/// stopped may take its time: the start waits, until there is room or it is asked to stop.
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
                // Longer than anybody needs who is awake.
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

/// `rm` in `/dev/shm`: nobody finds the engine any more, and a second one would start beside it. So it says so and ends, and
/// clients go over to the next one.
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
