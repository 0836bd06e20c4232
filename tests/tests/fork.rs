//! A child of `fork` does not pass for its parent: every call says so, nothing hangs, and the parent does not notice.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_adapter::{CallError, Health, PagedKv, Plane, RegisterError, Role, StoreChunk, SubmitError};
use kvring_tests::{EngineProcess, LIMIT, SchedulerSpec, all_loaded, chain, client, isolated, round, until};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

/// Runs `body` in a forked child; a panic there, a signal or a hang is a failure here.
fn in_a_child(body: impl FnOnce()) {
    // SAFETY: the child runs `body` and then exits without unwinding. glibc makes its allocator usable in the child of a
    // process with several threads, and the adapter's own promise is what is tested here.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            let code = i32::from(std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).is_err());
            // SAFETY: ends the process, and nothing of the parent's is run down.
            unsafe { libc::_exit(code) };
        }
        ForkResult::Parent { child } => {
            let status = until("the child ends", || {
                let status = waitpid(child, Some(WaitPidFlag::WNOHANG)).unwrap();
                (status != WaitStatus::StillAlive).then_some(status)
            });
            assert_eq!(status, WaitStatus::Exited(child, 0), "what the child did is above");
        }
    }
}

#[test]
fn a_child_of_fork_holds_nothing_of_its_parents_and_reads_no_tables() {
    isolated("a_child_of_fork_holds_nothing_of_its_parents_and_reads_no_tables", || {
        let engine = EngineProcess::start("fork-holds", 16);
        let mut worker = engine.worker();
        let mut sides = [engine.scheduler(), engine.scheduler()];
        let keys = worker.stores(round(1), chain(1, 8), 0);
        engine.stop();
        let found = sides.each_mut().map(|side| side.finds("r", 0, &keys));
        in_a_child(|| {
            // One asks again and one ends its session. Neither tells the engine, whose ring the parent uses.
            let [asks, ends] = &mut sides;
            assert!(!asks.api().is_current("r"), "in the child nothing is held");
            assert_eq!(asks.try_lookup("r", 0, &keys), Err(CallError::Forked));
            ends.api().end_session("r");
        });
        let mut dropped = Some(sides);
        in_a_child(|| drop(dropped.take()));
        let mut sides = dropped.unwrap();
        engine.resume();
        engine.stat_becomes("pins", 16);
        for (side, found) in sides.iter_mut().zip(found) {
            assert!(side.api().is_current("r"));
            assert_eq!(worker.load(&found.handles, 0), all_loaded(8));
        }
        engine.settles_without((worker, sides));
    });
}

#[test]
fn a_child_of_fork_is_told_so_and_the_parent_goes_on() {
    isolated("a_child_of_fork_is_told_so_and_the_parent_goes_on", || {
        let (engine, bystander) = EngineProcess::with_bystander("fork");
        let mut worker = engine.worker();
        let mut scheduler = engine.scheduler();
        let keys = worker.stores(round(1), chain(1, 8), 0);
        let found = scheduler.lookup("r", 0, &keys);

        in_a_child(|| {
            assert_eq!(scheduler.try_lookup("new", 0, &keys), Err(CallError::Forked));
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
            let adapter = worker.adapter();
            let store = vec![StoreChunk { key: keys[0], blocks: vec![0, 1, 2, 3] }];
            let submitted = adapter.submit_store("r", round(2), None, store, None);
            assert_eq!(submitted, Err(SubmitError::Ended(Health::ShutDown)));
            assert_eq!(adapter.submit_load("r", vec![], None), Err(SubmitError::Ended(Health::ShutDown)));
            let mut cache = [0u8; 16];
            let plane = Plane { base: cache.as_mut_ptr(), block_stride: 16, page_bytes: 16 };
            // SAFETY: the plane is `cache`. The registration is refused, so nothing keeps it.
            let paged = unsafe { PagedKv::new(vec![plane], 1, 1) }.unwrap();
            assert_eq!(adapter.register_kv_caches(paged), Err(RegisterError::Call(CallError::Forked)));
            assert_eq!(adapter.get_finished(), kvring_adapter::Finished::default());
            assert!(adapter.get_block_ids_with_load_errors().is_empty());
            adapter.handle_preemptions(None);
            assert!(adapter.wait_idle(LIMIT));
            assert!(!adapter.is_healthy());
            adapter.shutdown();
        });
        // A child that drops everything, as Python does at its end.
        let mut sides = Some((worker, scheduler));
        in_a_child(|| drop(sides.take()));
        let (mut worker, mut scheduler) = sides.unwrap();

        // A child may make a client of its own.
        let name = engine.name.clone();
        in_a_child(|| {
            let own = client(Role::Scheduler, &SchedulerSpec::new(&name).client);
            own.wait_ready(LIMIT).unwrap();
            own.noop().unwrap();
        });

        // The parent's lease still holds, and its copies still work.
        assert_eq!(worker.load(&found.handles, 0), all_loaded(8));
        assert_eq!(scheduler.lookup("again", 0, &keys).chunks, 8);
        assert_eq!(engine.stat("breaches"), 0);
        engine.settles_beside(bystander, (worker, scheduler));
    });
}
