//! A child of `fork` does not pass for its parent: every call says so, nothing hangs, and the parent does not notice.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_adapter::{CallError, Health, Lookup, Role, Round, StoreChunk, SubmitError};
use kvring_tests::engine::EngineProcess;
use kvring_tests::isolate::isolated;
use kvring_tests::kv::chain;
use kvring_tests::proto::{SchedulerSpec, WorkerSpec, all_loaded, all_stored};
use kvring_tests::scheduler::SchedulerSide;
use kvring_tests::traffic::Bystander;
use kvring_tests::wait::{LIMIT, eventually};
use kvring_tests::worker::{WorkerSide, client};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

/// Runs `body` in a forked child; a panic there, a signal or a hang is a failure here.
fn in_a_child(body: impl FnOnce()) {
    // SAFETY: the child runs `body` and then exits without unwinding. glibc makes its allocator usable in the child of a
    // process with several threads, and the adapter's own promise is what is tested here.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            let code = match std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)) {
                Ok(()) => 0,
                Err(_) => 1,
            };
            // SAFETY: ends the process, and nothing of the parent's is run down.
            unsafe { libc::_exit(code) };
        }
        ForkResult::Parent { child } => {
            let mut status = WaitStatus::StillAlive;
            eventually("the child ends", || {
                status = waitpid(child, Some(WaitPidFlag::WNOHANG)).unwrap();
                status != WaitStatus::StillAlive
            });
            assert_eq!(status, WaitStatus::Exited(child, 0), "what the child did is above");
        }
    }
}

#[test]
fn a_child_of_fork_lets_go_of_a_pending_lookup_and_the_parent_gets_its_answer() {
    isolated("a_child_of_fork_lets_go_of_a_pending_lookup_and_the_parent_gets_its_answer", || {
        let mut engine = EngineProcess::start("fork-pending", 16);
        let mut worker = WorkerSide::start(&WorkerSpec::new(&engine.name)).unwrap();
        let spec = SchedulerSpec { polling: false, ..SchedulerSpec::new(&engine.name) };
        let mut sides = [SchedulerSide::start(&spec), SchedulerSide::start(&spec)];
        for side in &sides {
            side.client().wait_ready(LIMIT).unwrap();
        }
        let keys = chain(1, 8);
        assert_eq!(worker.store("r", Round { source: 1, number: 1 }, None, &keys, 0), all_stored(8));
        engine.stop();
        for side in &mut sides {
            side.api().submit_lookup("r", 0, &keys).unwrap();
        }
        in_a_child(|| {
            // One asks, one ends its session: both would touch memory that the child does not have.
            let [asks, ends] = &mut sides;
            assert!(matches!(asks.api().check_lookup("r"), Lookup::Hit(hit) if hit.chunks == 0));
            ends.api().end_session("r");
        });
        let mut dropped = Some(sides);
        in_a_child(|| drop(dropped.take()));
        let mut sides = dropped.unwrap();
        engine.resume();
        for side in &mut sides {
            eventually("the parent's answer", || {
                side.check("r").is_some_and(|found| {
                    assert_eq!(found.chunks, 8);
                    true
                })
            });
        }
        drop((worker, sides));
        engine.settles(0);
    });
}

#[test]
fn a_child_of_fork_is_told_so_and_the_parent_goes_on() {
    isolated("a_child_of_fork_is_told_so_and_the_parent_goes_on", || {
        let engine = EngineProcess::start("fork", 16);
        let bystander = Bystander::start(&engine.name);
        let mut worker = WorkerSide::start(&WorkerSpec::new(&engine.name)).unwrap();
        let mut polling = SchedulerSide::start(&SchedulerSpec::new(&engine.name));
        let mut pending =
            SchedulerSide::start(&SchedulerSpec { polling: false, ..SchedulerSpec::new(&engine.name) });
        for scheduler in [&polling, &pending] {
            scheduler.client().wait_ready(LIMIT).unwrap();
        }
        let keys = chain(1, 8);
        assert_eq!(worker.store("r", Round { source: 1, number: 1 }, None, &keys, 0), all_stored(8));
        let found = polling.lookup("r", 0, &keys).unwrap();

        in_a_child(|| {
            for scheduler in [&mut polling, &mut pending] {
                assert_eq!(scheduler.lookup("new", 0, &keys), Err(CallError::Forked));
                assert_eq!(scheduler.api().reset_cache(), Err(CallError::Forked));
                scheduler.api().free_lookup_locks("r", 0, 0);
                scheduler.api().end_session("r");
                assert!(!scheduler.api().is_healthy());
                assert_eq!(scheduler.api().health(), Health::ShutDown);
                let client = scheduler.client();
                assert_eq!(client.noop(), Err(CallError::Forked));
                assert_eq!(client.clear(), Err(CallError::Forked));
                assert_eq!(client.wait_ready(LIMIT), Err(Health::ShutDown));
                scheduler.api().shutdown();
            }
            let adapter = worker.adapter();
            let store = vec![StoreChunk { key: keys[0], blocks: vec![0, 1, 2, 3] }];
            let submitted = adapter.submit_store("r", Round { source: 1, number: 2 }, None, store, None);
            assert_eq!(submitted, Err(SubmitError::Ended(Health::ShutDown)));
            assert_eq!(adapter.submit_load("r", vec![], None), Err(SubmitError::Ended(Health::ShutDown)));
            assert_eq!(adapter.get_finished(), kvring_adapter::Finished::default());
            assert!(adapter.get_block_ids_with_load_errors().is_empty());
            adapter.handle_preemptions(None);
            assert!(adapter.wait_idle(LIMIT));
            assert!(!adapter.is_healthy());
            adapter.shutdown();
        });
        // A child that drops everything, as Python does at its end.
        let mut sides = Some((worker, polling, pending));
        in_a_child(|| drop(sides.take()));
        let (mut worker, mut polling, pending) = sides.unwrap();

        // A child may make a client of its own.
        let name = engine.name.clone();
        in_a_child(|| {
            let own = client(Role::Scheduler, &SchedulerSpec::new(&name).client);
            own.wait_ready(LIMIT).unwrap();
            own.noop().unwrap();
        });

        // The parent: the lease still holds, the copies still work.
        assert_eq!(worker.load("r", &found.ranks[0], 0), all_loaded(8));
        assert_eq!(polling.lookup("again", 0, &keys).unwrap().chunks, 8);
        assert_eq!(engine.stat("breaches"), 0);
        drop((worker, polling, pending));
        bystander.was_undisturbed();
        engine.settles(0);
    });
}
