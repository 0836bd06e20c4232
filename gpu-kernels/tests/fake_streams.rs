//! The fake CUDA driver's own tests, through cudarc: orderings, events, captures.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

mod support;

use cudarc::driver::{result, sys};
use std::ffi::c_void;
use std::ptr::null_mut;
use support::calls::*;
use support::fake::{Fake, Kernels, inside_with, pattern};
use sys::CUresult as E;

const NON_BLOCKING: u32 = 1;

fn inside(name: &str, env: &[(&str, &str)], body: impl FnOnce(&Fake)) {
    inside_with(Kernels::StandIn, name, env, || body(&Fake::get()));
}

#[test]
fn streams_race_unless_they_wait() {
    inside("streams_race_unless_they_wait", &[], |fake| {
        let _context = context();
        let (torch, side, ready) = (stream(), stream(), event());
        let memory = device(BYTES);
        let pinned = shared(BYTES);
        assert_eq!(register(pinned, BYTES), None);
        // How many of the copies saw what torch's stream had written before them.
        let seen = |wait: bool, seeds: std::ops::Range<u32>| {
            seeds
                .filter(|&seed| {
                    assert_eq!(fake.fill(torch as u64, memory, BYTES, seed, LATE_US), 0);
                    if wait {
                        assert_eq!(record(ready, torch), None);
                        assert_eq!(wait_for(side, ready), None);
                    }
                    assert_eq!(to_host(pinned, memory, BYTES, side), None);
                    assert_eq!(finish(side), None);
                    let new = bytes_at(pinned, BYTES) == pattern(seed, BYTES);
                    assert_eq!(finish(torch), None);
                    new
                })
                .count()
        };
        assert_eq!(seen(true, 0..10), 10);
        let racing = seen(false, 10..20);
        assert!(racing < 5, "{racing} of 10 copies that did not wait came late by themselves");
        fake.ignore("cuStreamWaitEvent");
        let ignored = seen(true, 20..30);
        assert!(ignored < 5, "{ignored} of 10 copies waited, though that was ignored");
    });
}

#[test]
fn an_overwrite_races_with_a_reader_unless_it_waits() {
    inside("an_overwrite_races_with_a_reader_unless_it_waits", &[], |fake| {
        let _context = context();
        let (torch, side, read) = (stream(), stream(), event());
        let memory = device(BYTES);
        let pinned = shared(BYTES);
        assert_eq!(register(pinned, BYTES), None);
        for wait in [true, false] {
            let kept = (0..10)
                .filter(|&seed| {
                    assert_eq!(fake.fill(torch as u64, memory, BYTES, seed, 0), 0);
                    assert_eq!(finish(torch), None);
                    let mut found = vec![0; BYTES];
                    let into = found.as_mut_ptr();
                    // SAFETY: `found` lives until the stream has done its work.
                    let result = unsafe { fake.read(torch as u64, memory, BYTES, into, LATE_US) };
                    assert_eq!(result, 0);
                    if wait {
                        assert_eq!(record(read, torch), None);
                        assert_eq!(wait_for(side, read), None);
                    }
                    assert_eq!(to_device(memory, pinned, BYTES, side), None);
                    assert_eq!(finish(torch).or(finish(side)), None);
                    found == pattern(seed, BYTES)
                })
                .count();
            assert!(
                if wait { kept == 10 } else { kept < 5 },
                "{kept} of 10 reads undisturbed (wait: {wait})"
            );
        }
    });
}

#[test]
fn the_legacy_stream_waits_for_blocking_streams_alone() {
    inside("the_legacy_stream_waits_for_blocking_streams_alone", &[], |fake| {
        let _context = context();
        let memory = device(BYTES);
        for (flags, sees) in [(0, true), (NON_BLOCKING, false)] {
            let mut one = null_mut();
            // SAFETY: the handle is written.
            assert_eq!(error(unsafe { sys::cuStreamCreate(&raw mut one, flags) }), None);
            assert_eq!(fake.fill(one as u64, memory, BYTES, 7 + flags, FAR_LATER_US), 0);
            let mut found = vec![0_u8; BYTES];
            // SAFETY: BYTES are allocated.
            unsafe { result::memcpy_dtoh_sync(&mut found, memory) }.unwrap();
            assert_eq!(found == pattern(7 + flags, BYTES), sees, "flags {flags}");
            assert_eq!(finish(one), None);
        }
    });
}

#[test]
fn events_stand_for_the_record_that_was_the_latest() {
    inside("events_stand_for_the_record_that_was_the_latest", &[], |fake| {
        let _context = context();
        let (torch, side) = (stream(), stream());
        let (never, event, after) = (event(), event(), event());
        let memory = device(BYTES);
        assert_eq!(query(never), None);
        assert_eq!(wait_for(side, never).or(finish(side)), None);
        assert_eq!(fake.fill(torch as u64, memory, 64, 1, 0), 0);
        assert_eq!(record(event, torch), None);
        assert_eq!(wait_for(side, event), None);
        // The event is recorded again, far later: a stream that waits for it already does not wait for that.
        assert_eq!(fake.fill(torch as u64, memory, 64, 1, FAR_LATER_US), 0);
        assert_eq!(record(event, torch).or(record(after, side)), None);
        // SAFETY: a handle of the fake's.
        assert_eq!(why(unsafe { result::event::synchronize(after) }), None);
        assert_eq!(query(event), Some(E::CUDA_ERROR_NOT_READY));
        // SAFETY: as above.
        assert_eq!(why(unsafe { result::event::synchronize(event) }), None);
        // SAFETY: as above.
        assert!(unsafe { result::event::elapsed(after, event) }.unwrap() > 50.0);
        // SAFETY: as above.
        unsafe { result::event::destroy(event) }.unwrap();
        assert_eq!(query(event), Some(E::CUDA_ERROR_INVALID_HANDLE));
    });
}

#[test]
fn pageable_memory_is_read_at_the_call() {
    inside("pageable_memory_is_read_at_the_call", &[], |fake| {
        let _context = context();
        let side = stream();
        let memory = device(BYTES);
        for pinned in [false, true] {
            let source = shared(BYTES);
            assert!(!pinned || register(source, BYTES).is_none());
            assert_eq!(fake.fill(side as u64, memory, BYTES, 3, FAR_LATER_US), 0);
            assert_eq!(to_device(memory, source, BYTES, side), None);
            // SAFETY: the mapping's own bytes; the test is about which of them a copy reads.
            unsafe { source.cast::<u8>().write_bytes(1, BYTES) };
            assert_eq!(finish(side), None);
            let found = bytes_at(memory as *const c_void, BYTES);
            assert_eq!(found, vec![u8::from(pinned); BYTES], "pinned: {pinned}");
        }
    });
}

#[test]
fn an_unsafe_call_breaks_a_capture() {
    inside("an_unsafe_call_breaks_a_capture", &[], |fake| {
        let context = context();
        let (torch, side) = (stream(), stream());
        let (mine, captured) = (event(), event());
        let memory = device(BYTES);
        // Calls that are allowed in a capture: work is recorded, not run.
        begin(torch);
        assert_eq!(fake.fill(torch as u64, memory, 64, 1, 0), 0);
        assert_eq!(record(mine, side), None);
        assert_eq!(record(captured, torch), None);
        assert_eq!(wait_for(side, captured), Some(E::CUDA_ERROR_STREAM_CAPTURE_ISOLATION));
        assert_eq!(end(torch), None);
        assert_eq!(bytes_at(memory as *const c_void, 64), vec![0; 64]);
        // Calls that are not allowed break the capture from any thread, unless the thread has changed its mode.
        for (mode, breaks) in [
            (sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED, false),
            (sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL, false),
            (sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL, true),
        ] {
            assert_eq!(finish(side), None);
            begin(torch);
            let (event, stream) = (mine as usize, torch as usize);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let (mine, torch) = (event as sys::CUevent, stream as sys::CUstream);
                    context.bind_to_thread().unwrap();
                    exchange(mode);
                    let result = query(mine);
                    assert_eq!(result, breaks.then_some(E::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED));
                    assert_eq!(end(torch), Some(E::CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD));
                });
            });
            assert_eq!(end(torch), breaks.then_some(E::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED), "{mode:?}");
        }
        // Calls that are never allowed.
        begin(torch);
        exchange(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED);
        assert_eq!(finish(torch), Some(E::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED));
        assert_eq!(end(torch), Some(E::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED));
        begin(torch);
        assert_eq!(
            record(mine, side).or(wait_for(torch, mine)),
            Some(E::CUDA_ERROR_STREAM_CAPTURE_ISOLATION)
        );
        assert_eq!(end(torch), Some(E::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED));
        assert_eq!(end(torch), Some(E::CUDA_ERROR_ILLEGAL_STATE));
    });
}

#[test]
fn a_stream_that_waits_for_a_captured_event_can_join() {
    inside("a_stream_that_waits_for_a_captured_event_can_join", &[("FAKE_CUDA_CAPTURE", "join")], |fake| {
        let _context = context();
        let (torch, side, fork, back) = (stream(), stream(), event(), event());
        let memory = device(BYTES);
        for returns in [true, false] {
            begin(torch);
            assert_eq!(record(fork, torch).or(wait_for(side, fork)), None);
            assert_eq!(fake.fill(side as u64, memory, 64, 1, 0), 0);
            assert_eq!(record(back, side), None);
            exchange(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED);
            assert_eq!(query(back), Some(E::CUDA_ERROR_CAPTURED_EVENT));
            if returns {
                assert_eq!(wait_for(torch, back), None);
            }
            assert_eq!(end(torch), (!returns).then_some(E::CUDA_ERROR_STREAM_CAPTURE_UNJOINED));
        }
        // The stream works again.
        assert_eq!(fake.fill(side as u64, memory, 64, 1, 0), 0);
        assert_eq!(finish(side), None);
        assert_eq!(bytes_at(memory as *const c_void, 64), pattern(1, 64));
    });
}

#[test]
fn a_lost_device_answers_nothing_but_errors() {
    inside("a_lost_device_answers_nothing_but_errors", &[], |fake| {
        let context = context();
        let (torch, done) = (stream(), event());
        let memory = device(BYTES);
        let arena = shared(BYTES);
        assert_eq!(register(arena, BYTES), None);
        assert_eq!(fake.fill(torch as u64, memory, BYTES, 1, 10 * FAR_LATER_US), 0);
        assert_eq!(to_host(arena, memory, BYTES, torch).or(record(done, torch)), None);
        let gone = Some(E::CUDA_ERROR_DEVICE_UNAVAILABLE);
        std::thread::scope(|scope| {
            // A thread that waits is woken.
            let waits = scope.spawn(|| {
                context.bind_to_thread().unwrap();
                why(result::ctx::synchronize())
            });
            // The call holds the fake's lock from the moment it is counted until it waits.
            while fake.calls("cuCtxSynchronize") == 0 {
                std::thread::yield_now();
            }
            fake.lose(0);
            assert_eq!(waits.join().unwrap(), gone);
        });
        assert_eq!(query(done), gone);
        assert_eq!(finish(torch), gone);
        assert_eq!(to_host(arena, memory, BYTES, torch), gone);
        // SAFETY: not used any more.
        assert_eq!(why(unsafe { result::event::destroy(done) }), gone);
        assert_eq!(fake.counts().events, 0);
    });
}
