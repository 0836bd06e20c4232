//! Each of the driver's functions fails once, at its first, second or third use. There must be no panic, no hang and no wrong
//! bytes that are called good, and afterwards everything works as if nothing had happened.

use crate::support::calls;
use crate::support::fake::Fake;
use crate::support::world::*;
use crate::{calls_of_the_driver, inside};
use kvring_gpu_kernels::{ComputeStream, CopyBackend, CopyError, CopyMode, CudaBackend, GpuError};

/// Does a failure of this call leave something behind, because giving back fails, or a call that giving back needs?
fn gives_back(call: &str) -> bool {
    ["Destroy", "Free", "Unregister", "Unload", "Release"].iter().any(|word| call.contains(word))
        || ["cuCtxGetCurrent", "cuCtxPushCurrent", "cuThreadExchangeStreamCaptureMode"].contains(&call)
}

struct Ground {
    cache: Cache,
    arena: Arena,
    torch: u64,
    rng: Random,
}

impl Ground {
    /// Makes a store and a load, and checks that each has copied the right bytes or failed. Returns the errors.
    fn copies(&mut self, backend: &CudaBackend) -> Vec<CopyError> {
        let Ground { cache, arena, torch, rng } = self;
        let outcomes = DIRECTIONS.map(|direction| {
            // The second shard lies across two registrations.
            let places = vec![0, PART - cache.shard_bytes() / 2];
            let round = Round::new(rng, cache, arena.all, direction, true, places);
            let outcome = backend
                .fence(ComputeStream(*torch))
                .and_then(|fence| backend.submit(round.batch(fence))?.wait());
            match outcome {
                Ok(done) => {
                    round.check("a call has failed", Some(done));
                    None
                }
                Err(error) => {
                    let then = (arena.all.read(), cache.read());
                    std::thread::sleep(std::time::Duration::from_millis(2));
                    assert!((arena.all.read(), cache.read()) == then, "{direction:?} went on: {error}");
                    Some(error)
                }
            }
        });
        outcomes.into_iter().flatten().collect()
    }

    /// Everything that a process does with a backend.
    fn life(&mut self, fake: &Fake, mode: CopyMode, call: &str) {
        let backend = CudaBackend::new(options(mode)).unwrap_or_else(|error| {
            assert!(fake.calls(call) > 0, "{error}");
            fake.reset();
            backend(mode)
        });
        let mapped = backend.map_arena(self.arena.mapping());
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
        drop((mapped, backend));
        assert!(self.arena.is_let_go());
    }
}

fn sweep(fake: &Fake, mode: CopyMode) {
    let (cache, arena) = (Cache::plain(2, 4096, 12, 3), Arena::new(2 * PART));
    let mut ground = Ground { cache, arena, torch: calls::stream() as u64, rng: Random::new(1, 0) };
    ground.life(fake, mode, "");
    let mut failed = 0;
    for call in calls_of_the_driver() {
        for (code, use_) in [1, 2, 999].into_iter().flat_map(|code| (1..=3).map(move |use_| (code, use_))) {
            let before = fake.counts();
            fake.fail_once(call, code, use_);
            let uses = fake.calls(call);
            ground.life(fake, mode, call);
            failed += i32::from(fake.calls(call) > uses);
            fake.reset();
            if !gives_back(call) {
                assert_eq!(fake.counts(), before, "{mode}: {call} gave {code} at its use {use_}");
            }
        }
    }
    assert!(failed > 250, "{failed}");
}

#[test]
fn staged() {
    inside(&[("FAKE_CUDA_DELAY_US", "30")], |fake| sweep(fake, CopyMode::Staged));
}

#[test]
fn by_batch() {
    inside(&[("FAKE_CUDA_DELAY_US", "30")], |fake| sweep(fake, CopyMode::Batch));
}

#[test]
fn zero_copy() {
    inside(&[("FAKE_CUDA_DELAY_US", "30")], |fake| sweep(fake, CopyMode::ZeroCopy));
}
