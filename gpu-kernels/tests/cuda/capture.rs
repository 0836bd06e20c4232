//! vLLM captures CUDA graphs while transfers run.

use crate::support::calls;
use crate::world::*;
use kvring_gpu_kernels::{ComputeStream, CopyBackend, CopyError, CopyMode, Direction, Fence, GpuError};
use std::sync::Arc;

#[test]
fn nothing_here_breaks_the_capture_of_a_graph() {
    inside("capture::nothing_here_breaks_the_capture_of_a_graph", &[], |fake| {
        let context = calls::context();
        for mode in [CopyMode::Batch, CopyMode::Staged, CopyMode::ZeroCopy, CopyMode::Auto] {
            let torch = calls::stream();
            let memory = calls::device(64);
            // This thread captures in the strictest mode; another one copies.
            calls::begin(torch);
            let handle = torch as u64;
            std::thread::scope(|scope| {
                let work = scope.spawn(|| {
                    context.bind_to_thread().unwrap();
                    let mut rng = Rng(11);
                    // Allocating the cache's memory would break the capture. That is not the backend's doing, so this thread
                    // changes its mode meanwhile.
                    let before = calls::exchange(
                        cudarc::driver::sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED,
                    );
                    let cache = Cache::plain(2, 8192, 20, 3);
                    calls::exchange(before);
                    let backend = backend(mode);
                    let arena = Arena::new(5 * PART);
                    let mapped = backend.map_arena(arena.mapping(Arc::new(())));
                    backend.prepare(&cache.paged).unwrap();
                    let captured = backend.fence(ComputeStream(handle)).unwrap_err();
                    assert_eq!(captured, CopyError::Gpu(GpuError::Capturing));
                    let side = calls::stream();
                    for step in 0..6 {
                        let direction = [Direction::Store, Direction::Load][step % 2];
                        let blocks = cache.blocks(&mut rng, direction, 2);
                        let places = [arena.at(0), arena.at(PART - 4096)];
                        let shards: Vec<_> = places.into_iter().zip(blocks).collect();
                        let fence = backend.fence(ComputeStream(side as u64)).unwrap();
                        let mut transfer =
                            backend.submit(batch(direction, &cache, true, fence, &shards)).unwrap();
                        match step / 2 {
                            0 => while !transfer.poll() {},
                            1 => drop(transfer),
                            _ => drop(transfer.wait().unwrap()),
                        }
                    }
                    until("it is registered", || mapped.registered_bytes() == 5 * PART as u64);
                    drop(mapped);
                    drop(backend);
                    assert_eq!(fake.counts().registrations, 0);
                    // The backend has left this thread's capture mode as it was.
                    assert_eq!(calls::exchange(before), before);
                    calls::exchange(cudarc::driver::sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED);
                    drop(cache);
                });
                work.join().unwrap();
            });
            assert_eq!(fake.fill(torch as u64, memory, 64, 1, 0), 0, "captured");
            assert_eq!(calls::end(torch), None, "{mode}: the capture is whole");
            // After the capture the stream can be fenced again.
            let backend = backend(CopyMode::Batch);
            backend.fence(ComputeStream(torch as u64)).unwrap();
        }
    });
}

#[test]
fn without_the_relaxed_mode_it_breaks() {
    inside("capture::without_the_relaxed_mode_it_breaks", &[], |fake| {
        let context = calls::context();
        let torch = calls::stream();
        let cache = Cache::plain(1, 8192, 4, 2);
        let arena = Arena::new(PART);
        let backend = backend(CopyMode::Batch);
        let _mapped = backend.map_arena(arena.mapping(Arc::new(())));
        backend.prepare(&cache.paged).unwrap();
        calls::begin(torch);
        std::thread::scope(|scope| {
            let work = scope.spawn(|| {
                context.bind_to_thread().unwrap();
                fake.ignore("cuThreadExchangeStreamCaptureMode");
                let shards = [(arena.at(0), vec![1, 2])];
                let store = batch(Direction::Store, &cache, false, Fence::none(), &shards);
                backend.submit(store).and_then(|transfer| transfer.wait()).unwrap_err()
            });
            let error = work.join().unwrap();
            assert!(matches!(error, CopyError::Unended(GpuError::Call { code: 900, .. })), "{error}");
        });
        fake.reset();
        let broken = cudarc::driver::sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
        assert_eq!(calls::end(torch), Some(broken));
    });
}

/// A blocking stream: it waits for the default stream, and the default stream for it.
#[test]
fn the_default_stream_has_no_fence_while_a_blocking_stream_is_captured() {
    inside("capture::the_default_stream_has_no_fence_while_a_blocking_stream_is_captured", &[], |_| {
        let _context = calls::context();
        let backend = backend(CopyMode::Batch);
        let mut blocking = std::ptr::null_mut();
        // SAFETY: the call writes the handle.
        let made = unsafe { cudarc::driver::sys::cuStreamCreate(&raw mut blocking, 0) };
        assert_eq!(calls::error(made), None);
        calls::begin(blocking);
        for stream in [0, blocking as u64] {
            let error = backend.fence(ComputeStream(stream)).unwrap_err();
            assert_eq!(error, CopyError::Gpu(GpuError::Capturing));
        }
        assert_eq!(calls::end(blocking), None);
        backend.fence(ComputeStream(0)).unwrap();
    });
}
