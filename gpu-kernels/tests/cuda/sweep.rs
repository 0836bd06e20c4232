//! Each of the driver's functions fails once, at its first, second or third use. There must be no panic, no hang and no wrong
//! bytes that are called good, and afterwards everything works as if nothing had happened.

use crate::support::calls;
use crate::support::fake::{Counts, Fake};
use crate::world::*;
use kvring_gpu_kernels::{ComputeStream, CopyBackend, CopyError, CopyMode, CudaBackend, Direction, GpuError};
use std::sync::Arc;

const CALLS: [&str; 38] = [
    "cuDeviceGetCount",
    "cuDeviceGet",
    "cuDeviceGetName",
    "cuDeviceGetAttribute",
    "cuDeviceTotalMem",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease",
    "cuCtxGetCurrent",
    "cuCtxPushCurrent",
    "cuCtxPopCurrent",
    "cuCtxGetStreamPriorityRange",
    "cuThreadExchangeStreamCaptureMode",
    "cuStreamCreateWithPriority",
    "cuStreamDestroy",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
    "cuStreamIsCapturing",
    "cuEventCreate",
    "cuEventDestroy",
    "cuEventRecord",
    "cuEventQuery",
    "cuEventSynchronize",
    "cuMemAlloc",
    "cuMemFree",
    "cuMemHostAlloc",
    "cuMemFreeHost",
    "cuMemHostRegister",
    "cuMemHostUnregister",
    "cuMemHostGetDevicePointer",
    "cuMemGetAddressRange",
    "cuPointerGetAttribute",
    "cuMemcpyDtoHAsync",
    "cuMemcpyHtoDAsync",
    "cuMemcpyBatchAsync",
    "cuModuleLoadDataEx",
    "cuModuleUnload",
    "cuModuleGetFunction",
    "cuLaunchKernel",
];

/// Does a failure of this call leave something behind, because giving back fails, or a call that giving back needs?
fn gives_back(call: &str) -> bool {
    ["Destroy", "Free", "Unregister", "Unload", "Release"].iter().any(|word| call.contains(word))
        || ["cuCtxGetCurrent", "cuCtxPushCurrent", "cuThreadExchangeStreamCaptureMode"].contains(&call)
}

struct Ground {
    cache: Cache,
    arena: Arena,
    torch: u64,
    rng: Rng,
}

impl Ground {
    /// Makes a store and a load, and checks that each has copied the right bytes or failed. Returns the errors.
    fn copies(&mut self, backend: &CudaBackend) -> Vec<CopyError> {
        let mut errors = Vec::new();
        for direction in [Direction::Store, Direction::Load] {
            let Ground { cache, arena, torch, rng } = self;
            let (mut image, mut shared) = (cache.all.renew(rng), arena.all.renew(rng));
            let bytes = cache.shard_bytes();
            // The second shard lies across two registrations.
            let places = [0, PART - bytes / 2];
            let blocks = cache.blocks(rng, direction, 2);
            for (at, blocks) in places.iter().zip(&blocks) {
                match direction {
                    Direction::Store => {
                        shared[*at..][..bytes].copy_from_slice(&cache.gather(&image, blocks));
                    }
                    Direction::Load => cache.scatter(&mut image, &shared[*at..][..bytes], blocks),
                }
            }
            let shards: Vec<_> = places.iter().map(|at| arena.at(*at)).zip(blocks).collect();
            let outcome = backend
                .fence(ComputeStream(*torch))
                .and_then(|fence| backend.submit(batch(direction, cache, true, fence, &shards))?.wait());
            match outcome {
                Ok(done) => {
                    assert!(arena.all.read() == shared && cache.all.read() == image, "{direction:?}");
                    assert_eq!(done.checksums, cache.sums(direction, &shards), "{direction:?}");
                }
                Err(error) => {
                    let then = (arena.all.read(), cache.all.read());
                    std::thread::sleep(std::time::Duration::from_millis(2));
                    assert!((arena.all.read(), cache.all.read()) == then, "{direction:?} went on: {error}");
                    errors.push(error);
                }
            }
        }
        errors
    }

    /// Everything that a process does with a backend.
    fn life(&mut self, fake: &Fake, mode: CopyMode, call: &str) {
        let backend = match CudaBackend::new(options(mode)) {
            Ok(backend) => backend,
            Err(error) => {
                assert!(fake.calls(call) > 0, "{error}");
                fake.reset();
                backend(mode)
            }
        };
        let kept = Arc::new(());
        let mapped = backend.map_arena(self.arena.mapping(kept.clone()));
        let first = self.copies(&backend);
        fake.reset();
        let mut then = self.copies(&backend);
        // Some decisions stay: that there are no kernels, or no staging buffers.
        then.retain(|error| match error {
            CopyError::Gpu(GpuError::Mode { asked: "checksum", .. }) => mode != CopyMode::Batch,
            CopyError::Gpu(GpuError::NoPlaceForChecksum) => call != "cuMemAlloc",
            _ => true,
        });
        assert!(then.is_empty(), "{mode} {call}: {then:?} after {first:?}");
        drop(mapped);
        drop(backend);
        assert_eq!(Arc::strong_count(&kept), 1);
    }
}

fn sweep(name: &str, mode: CopyMode, codes: &[i32]) {
    inside(name, &[("FAKE_CUDA_DELAY_US", "30")], |fake| {
        let _context = calls::context();
        let cache = Cache::plain(2, 4096, 12, 3);
        let arena = Arena::new(2 * PART);
        let mut ground = Ground { cache, arena, torch: calls::stream() as u64, rng: Rng(1) };
        ground.life(fake, mode, "");
        let mut failed = 0;
        for call in CALLS {
            for code in codes {
                for use_ in 1..=3 {
                    let before = fake.counts();
                    fake.fail_once(call, *code, use_);
                    let uses = fake.calls(call);
                    ground.life(fake, mode, call);
                    failed += i32::from(fake.calls(call) > uses);
                    fake.reset();
                    if !gives_back(call) {
                        let left: Counts = fake.counts();
                        assert_eq!(left, before, "{mode}: {call} gave {code} at its use {use_}");
                    }
                }
            }
        }
        assert!(failed > 250, "{failed}");
    });
}

#[test]
fn staged() {
    sweep("sweep::staged", CopyMode::Staged, &[1, 2, 999]);
}

#[test]
fn by_batch() {
    sweep("sweep::by_batch", CopyMode::Batch, &[1, 2, 999]);
}

#[test]
fn zero_copy() {
    sweep("sweep::zero_copy", CopyMode::ZeroCopy, &[1, 2, 999]);
}
