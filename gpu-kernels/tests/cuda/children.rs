//! CUDA does not work in a forked child: the objects that it inherits call no function of the driver, and do not wait.

use crate::support::calls;
use crate::support::fake::Fake;
use crate::world::*;
use kvring_gpu_kernels::{ComputeStream, CopyBackend, CopyError, CopyMode, Direction, Fence, GpuError};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

// SAFETY: these are POSIX's.
unsafe extern "C" {
    fn fork() -> i32;
    fn waitpid(process: i32, status: *mut i32, options: i32) -> i32;
    fn _exit(status: i32) -> !;
    fn alarm(seconds: u32) -> u32;
}

/// Runs `body` in a child, and fails if it fails there.
fn child(body: impl FnOnce()) {
    // SAFETY: the child does what a child of vLLM might do, and ends without running destructors.
    unsafe {
        let process = fork();
        if process == 0 {
            alarm(20);
            _exit(i32::from(catch_unwind(AssertUnwindSafe(body)).is_err()));
        }
        let mut status = -1;
        assert_eq!(waitpid(process, &raw mut status, 0), process);
        assert_eq!(status, 0, "the child");
    }
}

const CALLS: [&str; 22] = [
    "cuCtxGetCurrent",
    "cuCtxPushCurrent",
    "cuCtxPopCurrent",
    "cuThreadExchangeStreamCaptureMode",
    "cuStreamSynchronize",
    "cuStreamDestroy",
    "cuStreamWaitEvent",
    "cuStreamIsCapturing",
    "cuEventCreate",
    "cuEventRecord",
    "cuEventQuery",
    "cuEventSynchronize",
    "cuEventDestroy",
    "cuMemAlloc",
    "cuMemFree",
    "cuMemHostAlloc",
    "cuMemFreeHost",
    "cuMemHostRegister",
    "cuMemHostUnregister",
    "cuModuleUnload",
    "cuDevicePrimaryCtxRelease",
    "cuLaunchKernel",
];

fn calls_made(fake: &Fake) -> Vec<u64> {
    CALLS.iter().map(|call| fake.calls(call)).collect()
}

#[test]
fn a_forked_child_makes_no_call() {
    inside("children::a_forked_child_makes_no_call", &[], |fake| {
        let _context = calls::context();
        let cache = Cache::plain(2, 8192, 40, 2);
        let arena = Arena::new(2 * PART);
        let backend = backend(CopyMode::Staged);
        let mapped = backend.map_arena(arena.mapping(Arc::new(())));
        until("registered", || mapped.registered_bytes() == arena.all.len as u64);
        let shards = [(arena.at(0), vec![7, 9])];
        copied(&backend, Direction::Store, &cache, true, &shards).unwrap();
        let fence = backend.fence(ComputeStream(0)).unwrap();
        let transfer = backend.submit(batch(Direction::Store, &cache, true, fence.clone(), &shards)).unwrap();
        // Waits until the streams are idle and their threads sleep: a lock of the fake's that a thread holds would stay taken in
        // the child.
        calls::finish_all();
        std::thread::sleep(std::time::Duration::from_millis(100));
        let (mut backend, mut transfer, mut mapped) = (Some(backend), Some(transfer), Some(mapped));
        child(|| {
            let before = calls_made(fake);
            let here = backend.take().unwrap();
            let forked = CopyError::Gpu(GpuError::Forked);
            let again = batch(Direction::Store, &cache, true, fence.clone(), &shards);
            assert_eq!(here.submit(again).err().unwrap(), forked);
            assert_eq!(here.fence(ComputeStream(0)).unwrap_err(), forked);
            assert_eq!(here.prepare(&Arc::new((*cache.paged).clone())).unwrap_err(), forked);
            let second = here.map_arena(arena.mapping(Arc::new(())));
            std::thread::sleep(std::time::Duration::from_millis(50));
            assert_eq!(second.registered_bytes(), 0);
            drop(second);
            assert_eq!(transfer.take().unwrap().wait().unwrap_err(), forked);
            drop(mapped.take());
            drop(here);
            assert_eq!(calls_made(fake), before);
        });
        // In the parent everything still works.
        transfer.unwrap().wait().unwrap();
        copied(backend.as_ref().unwrap(), Direction::Store, &cache, true, &shards).unwrap();
        // Now with a transfer in flight.
        let torch = calls::stream() as u64;
        let backend = backend.unwrap();
        assert_eq!(fake.fill(torch, cache.all.at as u64, cache.all.len, 3, 300_000), 0);
        let fence = backend.fence(ComputeStream(torch)).unwrap();
        let flying = backend.submit(batch(Direction::Store, &cache, true, fence, &shards)).unwrap();
        let (mut flying, mut backend) = (Some(flying), Some(backend));
        child(|| {
            drop(flying.take());
            drop(backend.take());
        });
        flying.unwrap().wait().unwrap();
        let done = copied(&backend.unwrap(), Direction::Load, &cache, true, &[(arena.at(0), vec![7, 9])]);
        assert_eq!(done.unwrap().checksums, cache.sums(Direction::Load, &[(arena.at(0), vec![7, 9])]));
        drop(Fence::none());
    });
}
