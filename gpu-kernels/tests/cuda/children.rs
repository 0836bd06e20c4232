//! CUDA does not work in a forked child: the objects that it inherits call no function of the driver, and do not wait.

use crate::support::world::*;
use crate::{calls_of_the_driver, inside};
use kvring_gpu_kernels::{ComputeStream, CopyBackend, CopyError, CopyMode, Direction, GpuError};
use std::panic::{AssertUnwindSafe, catch_unwind};

// SAFETY: these are POSIX's.
unsafe extern "C" {
    fn fork() -> i32;
    fn waitpid(process: i32, status: *mut i32, options: i32) -> i32;
    fn _exit(status: i32) -> !;
}

/// Runs `body` in a child, and fails if it fails there. A child that hangs ends with this process.
fn child(body: impl FnOnce()) {
    use rustix::process::{Signal, set_parent_process_death_signal};
    // SAFETY: the child makes the calls that a child of vLLM might make, and ends without running destructors.
    unsafe {
        let process = fork();
        if process == 0 {
            let body = || set_parent_process_death_signal(Some(Signal::KILL)).map(|()| body()).unwrap();
            _exit(i32::from(catch_unwind(AssertUnwindSafe(body)).is_err()));
        }
        let mut status = -1;
        assert_eq!(waitpid(process, &raw mut status, 0), process);
        assert_eq!(status, 0, "the child");
    }
}

#[test]
fn a_forked_child_makes_no_call() {
    inside(&[], |fake| {
        let world = World::plain(CopyMode::Staged, 2, 2 * PART);
        let shards = world.shard(0, &[7, 9]);
        world.store(true, &shards).unwrap();
        let fence = world.fence();
        let transfer = world.submit(Direction::Store, true, fence.clone(), &shards).unwrap();
        // Waits until the streams are idle and their threads sleep: a lock of the fake's that a thread holds would stay taken in
        // the child.
        cudarc::driver::result::ctx::synchronize().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(100));
        let (mut world, mut transfer) = (Some(world), Some(transfer));
        child(|| {
            let calls = calls_of_the_driver();
            let made = || calls.iter().map(|call| fake.calls(call)).collect::<Vec<_>>();
            let before = made();
            let World { backend, mapped, cache, arena, torch } = world.take().unwrap();
            let forked = CopyError::Gpu(GpuError::Forked);
            let again = batch(Direction::Store, &cache, true, fence.clone(), &shards);
            assert_eq!(backend.submit(again).err().unwrap(), forked);
            assert_eq!(backend.fence(ComputeStream(torch)).unwrap_err(), forked);
            assert_eq!(backend.prepare(&cache.again()).unwrap_err(), forked);
            let second = backend.map_arena(arena.mapping());
            std::thread::sleep(std::time::Duration::from_millis(50));
            assert_eq!(second.registered_bytes(), 0);
            drop(second);
            assert_eq!(transfer.take().unwrap().wait().unwrap_err(), forked);
            drop((mapped, backend));
            assert_eq!(made(), before);
            // The test itself would free the cache's memory by a call.
            std::mem::forget(cache);
        });
        // In the parent everything still works.
        let world = world.unwrap();
        transfer.unwrap().wait().unwrap();
        world.store(true, &shards).unwrap();
        // Now a child is made while a transfer is in flight, and drops all that it has inherited.
        let fence = world.written_late(fake, 3, 300_000);
        let mut flying = Some(world.submit(Direction::Store, true, fence, &shards).unwrap());
        let mut world = Some(world);
        child(|| {
            drop(flying.take());
            let World { backend, mapped, cache, .. } = world.take().unwrap();
            drop((mapped, backend));
            std::mem::forget(cache);
        });
        flying.unwrap().wait().unwrap();
        world.unwrap().check(true);
    });
}
