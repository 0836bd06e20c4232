//! The fake CUDA driver's own tests, through cudarc: contexts, memory, kernels, streams, captures, and its controls. The
//! tests in `cuda` show with a backend that copies race unless they wait (`order.rs`), and that a lost device wakes its waiters
//! and gives errors (`failure.rs`).
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

mod support;

use cudarc::driver::{CudaContext, result, sys};
use std::ffi::{CStr, c_void};
use std::ptr::null_mut;
use support::calls::*;
use support::fake::{Counts, Fake, Kernels, inside_as, is_inside, pattern, run, test_of};
use sys::CUresult as E;

const REFUSED: Option<E> = Some(E::CUDA_ERROR_INVALID_VALUE);

/// Runs a test with the fake driver and the kernels of the stand-in.
fn inside<F: FnOnce(&Fake)>(env: &[(&str, &str)], body: F) {
    inside_as(test_of::<F>(), Kernels::StandIn, env, body);
}

/// Shared memory that is registered as a whole.
fn registered(bytes: usize) -> *mut c_void {
    let memory = shared(bytes);
    assert_eq!(register(memory, bytes), None);
    memory
}

#[test]
fn contexts_are_of_a_thread() {
    inside(&[("FAKE_CUDA_DEVICES", "2")], |fake| {
        let context = context();
        assert_eq!(context.compute_capability().unwrap(), (9, 0));
        let other = CudaContext::new(1).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                assert_eq!(why(try_device(64)), Some(E::CUDA_ERROR_INVALID_CONTEXT));
                context.bind_to_thread().unwrap();
                let here = stream();
                let memory = device(64);
                assert_eq!(fake.fill(here as u64, memory, 64, 1, 0), 0);
                // A stream belongs to its context.
                other.bind_to_thread().unwrap();
                assert_eq!(finish(here), Some(E::CUDA_ERROR_INVALID_HANDLE));
            });
        });
    });
}

#[test]
fn registrations_do_not_overlap_and_copies_do_not_cross_them() {
    inside(&[("FAKE_CUDA_LOCKED", "98304:800")], |fake| {
        let _context = context();
        let side = stream();
        let memory = device(3 * BYTES);
        let arena = shared(4 * BYTES);
        let at = |offset: usize| arena.wrapping_byte_add(offset);
        // Memory that is not registered at all is pageable, and the copy has ended when the call returns.
        assert_eq!(fake.fill(side as u64, memory, BYTES, 3, LATE_US), 0);
        assert_eq!(to_host(arena, memory, BYTES, side), None);
        assert_eq!(bytes_at(arena, BYTES), pattern(3, BYTES));
        assert_eq!(register(arena, BYTES), None);
        assert_eq!(register(at(4096), BYTES), Some(E::CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED));
        assert_eq!(register(at(BYTES), BYTES), None);
        assert_eq!(to_host(at(BYTES), memory, BYTES, side).or(finish(side)), None);
        // Copies from one registration into the next, and from the last one into memory that is not registered.
        assert_eq!(to_host(at(BYTES - 1), memory, 2, side), REFUSED);
        assert_eq!(to_host(at(2 * BYTES - 1), memory, 2, side), REFUSED);
        assert_eq!(to_device(memory, at(BYTES - 1), 2, side), REFUSED);
        assert_eq!(to_device(memory, at(2 * BYTES - 1), 2, side), REFUSED);
        // A copy beyond the end of an allocation.
        assert_eq!(to_device(memory + 2 * BYTES as u64 + 1, arena, BYTES, side), REFUSED);
        // Registrations of memory that is not mapped, with an unknown flag, and of more than may be locked.
        let hole = shared(4096);
        // SAFETY: the mapping is not used.
        unsafe { rustix::mm::munmap(hole, 4096) }.unwrap();
        assert_eq!(register(hole, 4096), REFUSED);
        // SAFETY: refused.
        let flags = unsafe { sys::cuMemHostRegister_v2(at(2 * BYTES), BYTES, 64) };
        assert_eq!(why(flags.result()), REFUSED);
        assert_eq!(register(shared(98_304), 98_304), Some(E::CUDA_ERROR_NOT_PERMITTED));
        // A copy that runs after its memory has been unregistered.
        assert_eq!(fake.fill(side as u64, memory, BYTES, 3, FAR_LATER_US), 0);
        assert_eq!(to_host(arena, memory, BYTES, side), None);
        assert_eq!(unregister(arena), None);
        assert_eq!(unregister(arena), Some(E::CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED));
        assert_eq!(finish(side), Some(E::CUDA_ERROR_ILLEGAL_ADDRESS));
        // The error stays.
        assert_eq!(why(result::mem_get_info()), Some(E::CUDA_ERROR_ILLEGAL_ADDRESS));
    });
}

#[test]
fn device_memory_ends() {
    inside(&[("FAKE_CUDA_MEMORY", "100000")], |_| {
        let _context = context();
        let memory = device(60_000);
        assert_eq!(why(try_device(60_000)), Some(E::CUDA_ERROR_OUT_OF_MEMORY));
        assert_eq!(result::mem_get_info().unwrap(), (40_000, 100_000));
        assert_eq!(free(memory), None);
        assert_eq!(free(memory), REFUSED);
        assert_eq!(why(try_device(60_000)), None);
    });
}

const PTX: &CStr = c".version 8.7
.target sm_80
.visible .entry standin_copy( .param .u64 to ) { ret; }
.visible .entry standin_fail(
) { ret; }
.visible .entry not_in_the_shim() { ret; }
";

/// Loads a module of this PTX.
fn load(text: &CStr) -> Result<sys::CUmodule, E> {
    let mut module = null_mut();
    // SAFETY: a text with a zero at its end; the call writes the handle.
    let result =
        unsafe { sys::cuModuleLoadDataEx(&raw mut module, text.as_ptr().cast(), 0, null_mut(), null_mut()) };
    why(result.result()).map_or(Ok(module), Err)
}

/// Launches a kernel of the stand-in.
fn launch(name: &CStr, to: u64, from: u64, bytes: usize, on: sys::CUstream) -> Option<E> {
    let module = load(PTX).unwrap();
    // SAFETY: the parameters are the kernel's, which checks its addresses.
    unsafe {
        let function = result::module::get_function(module, name.to_owned());
        let result = function.and_then(|function| {
            let (mut to, mut from, mut bytes) = (to, from, bytes);
            let mut parameters =
                [(&raw mut to).cast::<c_void>(), (&raw mut from).cast(), (&raw mut bytes).cast()];
            result::launch_kernel(function, (4, 1, 1), (64, 1, 1), 0, on, &mut parameters)
        });
        why(result.and_then(|()| result::stream::synchronize(on)).and(result::module::unload(module)))
    }
}

#[test]
fn kernels_run_with_copies_of_their_parameters() {
    inside(&[], |fake| {
        let _context = context();
        let side = stream();
        let memory = device(BYTES);
        let arena = registered(BYTES);
        for (text, error) in [
            (c".version 9.0\n.target sm_80\n", E::CUDA_ERROR_UNSUPPORTED_PTX_VERSION),
            (c".version 8.7\n.target sm_100a\n", E::CUDA_ERROR_NO_BINARY_FOR_GPU),
            (c"something else", E::CUDA_ERROR_INVALID_PTX),
        ] {
            assert_eq!(load(text), Err(error));
        }
        assert_eq!(fake.fill(side as u64, memory, BYTES, 5, LATE_US), 0);
        assert_eq!(launch(c"standin_copy", arena as u64, memory, BYTES, side), None);
        assert_eq!(bytes_at(arena, BYTES), pattern(5, BYTES));
        for name in [c"standin", c"not_in_the_shim"] {
            assert_eq!(launch(name, arena as u64, memory, BYTES, side), Some(E::CUDA_ERROR_NOT_FOUND));
        }
        assert_eq!(launch(c"standin_fail", 0, 0, 0, side), Some(E::CUDA_ERROR_LAUNCH_FAILED));
    });
}

#[test]
fn kernels_need_the_alias_where_host_pointers_are_not_the_devices() {
    inside(&[("FAKE_CUDA_HOST_POINTER", "0")], |fake| {
        let context = context();
        let can = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM;
        assert_eq!(context.attribute(can).unwrap(), 0);
        let side = stream();
        let memory = device(BYTES);
        let arena = registered(BYTES);
        let mut alias = 0;
        let inner = arena.wrapping_byte_add(100);
        // SAFETY: the address is written.
        let found = unsafe { sys::cuMemHostGetDevicePointer_v2(&raw mut alias, inner, 0) };
        assert_eq!(why(found.result()), None);
        assert_ne!(alias, inner as u64);
        assert_eq!(fake.fill(side as u64, memory, BYTES, 5, 0), 0);
        assert_eq!(launch(c"standin_copy", alias, memory, 1000, side), None);
        assert_eq!(bytes_at(inner, 1000), pattern(5, 1000));
        // Copies by the driver take the host's own address.
        assert_eq!(to_host(arena, memory, BYTES, side).or(finish(side)), None);
        let raw = launch(c"standin_copy", inner as u64, memory, 1000, side);
        assert_eq!(raw, Some(E::CUDA_ERROR_ILLEGAL_ADDRESS));
    });
}

#[test]
fn kernels_do_not_reach_what_is_not_registered() {
    inside(&[], |_| {
        let _context = context();
        let side = stream();
        let memory = device(BYTES);
        let raw = launch(c"standin_copy", memory, shared(BYTES) as u64, BYTES, side);
        assert_eq!(raw, Some(E::CUDA_ERROR_ILLEGAL_ADDRESS));
    });
}

#[test]
fn calls_are_counted_and_can_fail() {
    inside(&[], |fake| {
        fake.fail("cuEventCreate", 999, 3);
        let before = fake.counts();
        assert_eq!(before, Counts::default());
        let context = context();
        let create = || result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT);
        let events = [create().unwrap(), create().unwrap()];
        assert_eq!(why(create()), Some(E::CUDA_ERROR_UNKNOWN));
        assert_eq!(why(create()), Some(E::CUDA_ERROR_UNKNOWN));
        fake.reset();
        let third = create().unwrap();
        assert_eq!(fake.calls("cuEventCreate"), 5);
        // A call may be named with its suffix or without.
        fake.fail("cuMemAlloc_v2", 2, 2);
        let memory = device(64);
        assert_eq!(why(try_device(64)), Some(E::CUDA_ERROR_OUT_OF_MEMORY));
        let side = stream();
        let counts = Counts { contexts: 1, streams: 1, events: 3, allocations: 1, ..before };
        assert_eq!(fake.counts(), counts);
        for event in events.into_iter().chain([third]) {
            assert_eq!(destroy_event(event), None);
        }
        assert_eq!(destroy(side), None);
        assert_eq!(free(memory), None);
        drop(context);
        assert_eq!(fake.counts(), before);
    });
}

#[test]
fn what_is_left_is_reported_at_the_end() {
    if is_inside() {
        let _context = context();
        stream();
        return;
    }
    let errors = run(Kernels::StandIn, "what_is_left_is_reported_at_the_end", &[("FAKE_CUDA_REPORT", "1")]);
    assert!(errors.contains("fake_cuda: left 1 streams"), "{errors}");
    assert!(!errors.contains("contexts"), "{errors}");
}

#[test]
fn the_legacy_stream_waits_for_blocking_streams_alone() {
    inside(&[], |fake| {
        let _context = context();
        let memory = device(BYTES);
        let found = shared(BYTES);
        for (seed, one, sees) in [(7, blocking_stream(), true), (8, stream(), false)] {
            assert_eq!(fake.fill(one as u64, memory, BYTES, seed, FAR_LATER_US), 0);
            // The call copies to pageable memory, so it returns when the copy has ended.
            assert_eq!(to_host(found, memory, BYTES, null_mut()), None);
            assert_eq!(bytes_at(found, BYTES) == pattern(seed, BYTES), sees, "seed {seed}");
            assert_eq!(finish(one), None);
        }
    });
}

#[test]
fn events_stand_for_the_record_that_was_the_latest() {
    inside(&[], |fake| {
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
        assert_eq!(finish_event(after), None);
        assert_eq!(query(event), Some(E::CUDA_ERROR_NOT_READY));
        assert_eq!(finish_event(event), None);
        assert_eq!(query(event), None);
        assert_eq!(destroy_event(event), None);
        assert_eq!(query(event), Some(E::CUDA_ERROR_INVALID_HANDLE));
    });
}

#[test]
fn pageable_memory_is_read_at_the_call() {
    inside(&[], |fake| {
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
            let found = read_device(memory, BYTES);
            assert_eq!(found, vec![u8::from(pinned); BYTES], "pinned: {pinned}");
        }
    });
}

#[test]
fn an_unsafe_call_breaks_a_capture() {
    inside(&[], |fake| {
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
        let before = relax();
        assert_eq!(query(captured), Some(E::CUDA_ERROR_CAPTURED_EVENT));
        exchange(before);
        assert_eq!(end(torch), None);
        assert_eq!(read_device(memory, 64), vec![0; 64]);
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
        relax();
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
