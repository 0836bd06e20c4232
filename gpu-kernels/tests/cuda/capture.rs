//! vLLM captures CUDA graphs while transfers run.

use crate::inside;
use crate::support::calls;
use crate::support::world::*;
use cudarc::driver::sys::CUresult;
use kvring_gpu_kernels::{ComputeStream, CopyBackend, CopyError, CopyMode, GpuError};

#[test]
fn nothing_here_breaks_the_capture_of_a_graph() {
    inside(&[], |fake| {
        for mode in CopyMode::ALL {
            let torch = calls::stream();
            let memory = calls::device(64);
            // This thread captures in the strictest mode; another one copies.
            calls::begin(torch);
            let handle = torch as u64;
            let work = || {
                let _context = calls::context();
                let mut rng = Random::new(11, 0);
                // Allocating the cache's memory would break the capture. That is not the backend's doing, so this thread changes
                // its mode meanwhile.
                let before = calls::relax();
                let cache = Cache::plain(2, 8192, 20, 3);
                calls::exchange(before);
                let world = World::unregistered(options(mode), cache, 5 * PART);
                let captured = world.backend.fence(ComputeStream(handle)).unwrap_err();
                assert_eq!(captured, CopyError::Gpu(GpuError::Capturing));
                for step in 0..6 {
                    let World { cache, arena, .. } = &world;
                    let places = vec![0, PART - 4096];
                    let round = Round::new(&mut rng, cache, arena.all, DIRECTIONS[step % 2], true, places);
                    let mut transfer = world.backend.submit(round.batch(world.fence())).unwrap();
                    let done = match step / 2 {
                        0 => {
                            while !transfer.poll() {}
                            drop(transfer);
                            None
                        }
                        1 => {
                            drop(transfer);
                            None
                        }
                        _ => Some(transfer.wait().unwrap()),
                    };
                    round.check(mode, done);
                }
                until_registered(&world.mapped, 5 * PART);
                let World { backend, mapped, cache, .. } = world;
                drop((mapped, backend));
                assert_eq!(fake.counts().registrations, 0);
                // The backend has left this thread's capture mode as it was.
                assert_eq!(calls::relax(), before);
                drop(cache);
            };
            std::thread::scope(|scope| scope.spawn(work).join().unwrap());
            assert_eq!(fake.fill(torch as u64, memory, 64, 1, 0), 0, "captured");
            assert_eq!(calls::end(torch), None, "{mode}: the capture is whole");
            // After the capture the stream can be fenced again.
            backend(CopyMode::Batch).fence(ComputeStream(torch as u64)).unwrap();
        }
    });
}

#[test]
fn without_the_relaxed_mode_it_breaks() {
    inside(&[], |fake| {
        let torch = calls::stream();
        let world = World::new(options(CopyMode::Batch), Cache::plain(1, 8192, 4, 2), PART);
        calls::begin(torch);
        let work = || {
            let _context = calls::context();
            fake.ignore("cuThreadExchangeStreamCaptureMode");
            let error = world.store(false, &world.shard(0, &[1, 2])).unwrap_err();
            assert!(matches!(error, CopyError::Unended(GpuError::Call { code: 900, .. })), "{error}");
        };
        std::thread::scope(|scope| scope.spawn(work).join().unwrap());
        fake.reset();
        assert_eq!(calls::end(torch), Some(CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED));
    });
}

#[test]
fn the_default_stream_has_no_fence_while_a_blocking_stream_is_captured() {
    inside(&[], |_| {
        let backend = backend(CopyMode::Batch);
        let blocking = calls::blocking_stream();
        calls::begin(blocking);
        for stream in [0, blocking as u64] {
            let error = backend.fence(ComputeStream(stream)).unwrap_err();
            assert_eq!(error, CopyError::Gpu(GpuError::Capturing));
        }
        assert_eq!(calls::end(blocking), None);
        backend.fence(ComputeStream(0)).unwrap();
    });
}
