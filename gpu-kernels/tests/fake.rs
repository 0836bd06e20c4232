//! The fake CUDA driver's own tests, through cudarc: each rule that other tests rely on.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

mod support;

use cudarc::driver::{CudaContext, DriverError, result, sys};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use std::ffi::{CStr, c_int, c_void};
use std::ptr::null_mut;
use std::sync::Arc;
use support::fake::{Counts, Fake, Kernels, inside_with, is_inside, pattern, run};
use sys::CUresult as E;

/// Long against the fake's random delays.
const LATE_US: u32 = 3000;
const BYTES: usize = 8192;
const NON_BLOCKING: u32 = 1;
const DEVICEMAP: u32 = 2;

const PTX: &CStr = c".version 8.7
.target sm_80
.visible .entry standin_copy( .param .u64 to ) { ret; }
.visible .entry standin_fail(
) { ret; }
.visible .entry not_in_the_shim() { ret; }
";

fn inside(name: &str, env: &[(&str, &str)], body: impl FnOnce(&Fake)) {
    inside_with(Kernels::StandIn, name, env, || body(&Fake::get()));
}

/// A raw call's error.
fn error(result: E) -> Option<E> {
    (result != E::CUDA_SUCCESS).then_some(result)
}

/// A call of cudarc's `result`.
fn why<T: std::fmt::Debug>(result: Result<T, DriverError>) -> Option<E> {
    result.err().map(|error| error.0)
}

fn context() -> Arc<CudaContext> {
    let context = CudaContext::new(0).unwrap();
    // SAFETY: before any stream or slice of cudarc's.
    unsafe { context.disable_event_tracking() };
    context
}

fn stream() -> sys::CUstream {
    result::stream::create(result::stream::StreamKind::NonBlocking).unwrap()
}

fn event() -> sys::CUevent {
    result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).unwrap()
}

fn device(bytes: usize) -> u64 {
    // SAFETY: an allocation; the tests write before they read.
    unsafe { result::malloc_sync(bytes) }.unwrap()
}

/// Shared memory of a whole number of pages, as the arena is. It stays.
fn shared(bytes: usize) -> *mut c_void {
    // SAFETY: a new mapping.
    unsafe { mmap_anonymous(null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED) }
        .unwrap()
}

fn register(address: *mut c_void, bytes: usize) -> Option<E> {
    // SAFETY: the fake looks at the addresses itself; what it registers stays mapped.
    error(unsafe { sys::cuMemHostRegister_v2(address, bytes, DEVICEMAP) })
}

fn to_host(to: *mut c_void, from: u64, bytes: usize, stream: sys::CUstream) -> Option<E> {
    // SAFETY: the fake checks registered ranges, and the tests give no others that are not writable.
    error(unsafe { sys::cuMemcpyDtoHAsync_v2(to, from, bytes, stream) })
}

fn to_device(to: u64, from: *const c_void, bytes: usize, stream: sys::CUstream) -> Option<E> {
    // SAFETY: as in `to_host`.
    error(unsafe { sys::cuMemcpyHtoDAsync_v2(to, from, bytes, stream) })
}

fn record(event: sys::CUevent, stream: sys::CUstream) -> Option<E> {
    // SAFETY: the fake knows its handles.
    why(unsafe { result::event::record(event, stream) })
}

fn wait_for(stream: sys::CUstream, event: sys::CUevent) -> Option<E> {
    // SAFETY: the fake knows its handles.
    why(unsafe { result::stream::wait_event(stream, event, sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT) })
}

fn query(event: sys::CUevent) -> Option<E> {
    // SAFETY: the fake knows its handles.
    why(unsafe { result::event::query(event) })
}

fn finish(stream: sys::CUstream) -> Option<E> {
    // SAFETY: the fake knows its handles.
    why(unsafe { result::stream::synchronize(stream) })
}

fn bytes_at(address: *const c_void, bytes: usize) -> Vec<u8> {
    // SAFETY: memory of the tests' or the fake's, which no stream writes any more.
    unsafe { std::slice::from_raw_parts(address.cast(), bytes) }.to_vec()
}

fn exchange(mode: sys::CUstreamCaptureMode) -> sys::CUstreamCaptureMode {
    let mut mode = mode;
    // SAFETY: the mode is read and written.
    assert_eq!(error(unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut mode) }), None);
    mode
}

fn begin(stream: sys::CUstream) {
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
    // SAFETY: the fake knows its handles.
    unsafe { result::stream::begin_capture(stream, mode) }.unwrap();
}

fn end(stream: sys::CUstream) -> Option<E> {
    // SAFETY: the fake knows its handles.
    match unsafe { result::stream::end_capture(stream) } {
        // SAFETY: as above; the graph is not used any more.
        Ok(graph) => why(unsafe { result::graph::destroy(graph) }),
        Err(error) => Some(error.0),
    }
}

#[test]
fn a_machine_may_have_no_device_or_only_a_stub() {
    inside("a_machine_may_have_no_device_or_only_a_stub", &[("FAKE_CUDA_DEVICES", "0")], |_| {
        // SAFETY: loads the library, which is the fake.
        assert!(unsafe { sys::is_culib_present() });
        assert_eq!(why(result::init()), Some(E::CUDA_ERROR_NO_DEVICE));
        assert_eq!(why(result::device::get_count()), Some(E::CUDA_ERROR_NOT_INITIALIZED));
    });
}

#[test]
fn a_stub_says_so() {
    inside("a_stub_says_so", &[("FAKE_CUDA_STUB", "1")], |_| {
        let error = result::init().unwrap_err();
        assert_eq!(error.0, E::CUDA_ERROR_STUB_LIBRARY);
        assert!(format!("{error:?}").contains("CUDA_ERROR_STUB_LIBRARY"), "{error:?}");
    });
}

#[test]
fn contexts_are_of_a_thread() {
    inside("contexts_are_of_a_thread", &[("FAKE_CUDA_DEVICES", "2")], |fake| {
        let context = context();
        assert_eq!(context.compute_capability().unwrap(), (9, 0));
        let other = CudaContext::new(1).unwrap();
        // SAFETY: an allocation that is not used.
        let alloc = || unsafe { result::malloc_sync(64) };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                assert_eq!(why(alloc()), Some(E::CUDA_ERROR_INVALID_CONTEXT));
                context.bind_to_thread().unwrap();
                let here = stream();
                let memory = alloc().unwrap();
                assert_eq!(fake.fill(here as u64, memory, 64, 1, 0), 0);
                // A stream belongs to its context.
                other.bind_to_thread().unwrap();
                assert_eq!(finish(here), Some(E::CUDA_ERROR_INVALID_HANDLE));
            });
        });
        std::thread::scope(|scope| {
            scope.spawn(|| {
                fake.ignore("cuCtxSetCurrent");
                context.bind_to_thread().unwrap();
                assert_eq!(why(alloc()), Some(E::CUDA_ERROR_INVALID_CONTEXT));
                fake.reset();
                context.bind_to_thread().unwrap();
                assert_eq!(why(alloc()), None);
            });
        });
    });
}

#[test]
fn streams_race_unless_they_wait() {
    inside("streams_race_unless_they_wait", &[], |fake| {
        let _context = context();
        let (torch, side, ready) = (stream(), stream(), event());
        let memory = device(BYTES);
        let pinned = shared(BYTES);
        assert_eq!(register(pinned, BYTES), None);
        // How many of the copies saw what torch's stream wrote before them.
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
        assert_eq!(seen(true, 0..30), 30);
        let racing = seen(false, 30..60);
        assert!(racing < 10, "{racing} of 30 copies that did not wait came late by themselves");
        fake.ignore("cuStreamWaitEvent");
        let ignored = seen(true, 60..90);
        assert!(ignored < 10, "{ignored} of 30 copies waited, though that was ignored");
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
            let kept = (0..20)
                .filter(|&seed| {
                    assert_eq!(fake.fill(torch as u64, memory, BYTES, seed, 0), 0);
                    assert_eq!(finish(torch), None);
                    let mut found = vec![0; BYTES];
                    let into = found.as_mut_ptr();
                    // SAFETY: `found` stays until the stream is through.
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
                if wait { kept == 20 } else { kept < 8 },
                "{kept} of 20 reads undisturbed (wait: {wait})"
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
            assert_eq!(fake.fill(one as u64, memory, BYTES, 7 + flags, LATE_US), 0);
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
        // Recorded again, far later: whoever waits already does not wait for that.
        assert_eq!(fake.fill(torch as u64, memory, 64, 1, 100_000), 0);
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
fn registrations_do_not_overlap_and_copies_do_not_cross_them() {
    let env = [("FAKE_CUDA_LOCKED", "98304:800")];
    inside("registrations_do_not_overlap_and_copies_do_not_cross_them", &env, |fake| {
        let _context = context();
        let side = stream();
        let memory = device(3 * BYTES);
        let arena = shared(4 * BYTES);
        let at = |offset: usize| arena.wrapping_byte_add(offset);
        // Not registered at all: pageable, and done when the call returns.
        assert_eq!(fake.fill(side as u64, memory, BYTES, 3, LATE_US), 0);
        assert_eq!(to_host(arena, memory, BYTES, side), None);
        assert_eq!(bytes_at(arena, BYTES), pattern(3, BYTES));
        assert_eq!(register(arena, BYTES), None);
        assert_eq!(register(at(4096), BYTES), Some(E::CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED));
        assert_eq!(register(at(BYTES), BYTES), None);
        assert_eq!(to_host(at(BYTES), memory, BYTES, side).or(finish(side)), None);
        // From one into the next, and from the last into what is not registered.
        let crosses = Some(E::CUDA_ERROR_INVALID_VALUE);
        assert_eq!(to_host(at(BYTES - 1), memory, 2, side), crosses);
        assert_eq!(to_host(at(2 * BYTES - 1), memory, 2, side), crosses);
        assert_eq!(to_device(memory, at(BYTES - 1), 2, side), crosses);
        assert_eq!(to_device(memory, at(2 * BYTES - 1), 2, side), crosses);
        // Beyond an allocation.
        assert_eq!(to_device(memory + 2 * BYTES as u64 + 1, arena, BYTES, side), crosses);
        // Not mapped; a flag that there is not; more than may be locked.
        let hole = shared(4096);
        // SAFETY: the mapping is not used.
        unsafe { rustix::mm::munmap(hole, 4096) }.unwrap();
        assert_eq!(register(hole, 4096), Some(E::CUDA_ERROR_INVALID_VALUE));
        // SAFETY: refused.
        let flags = error(unsafe { sys::cuMemHostRegister_v2(at(2 * BYTES), BYTES, 64) });
        assert_eq!(flags, Some(E::CUDA_ERROR_INVALID_VALUE));
        assert_eq!(register(shared(98_304), 98_304), Some(E::CUDA_ERROR_NOT_PERMITTED));
        // A copy that comes after its registration has gone.
        assert_eq!(fake.fill(side as u64, memory, BYTES, 3, LATE_US), 0);
        assert_eq!(to_host(arena, memory, BYTES, side), None);
        // SAFETY: the memory stays mapped.
        let unregister = || error(unsafe { sys::cuMemHostUnregister(arena) });
        assert_eq!(unregister(), None);
        assert_eq!(unregister(), Some(E::CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED));
        assert_eq!(finish(side), Some(E::CUDA_ERROR_ILLEGAL_ADDRESS));
        // It stays.
        assert_eq!(why(result::mem_get_info()), Some(E::CUDA_ERROR_ILLEGAL_ADDRESS));
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
            assert_eq!(fake.fill(side as u64, memory, BYTES, 3, LATE_US), 0);
            assert_eq!(to_device(memory, source, BYTES, side), None);
            // SAFETY: the mapping's own bytes; what a copy reads of them is what is tested.
            unsafe { source.cast::<u8>().write_bytes(1, BYTES) };
            assert_eq!(finish(side), None);
            let found = bytes_at(memory as *const c_void, BYTES);
            assert_eq!(found, vec![u8::from(pinned); BYTES], "pinned: {pinned}");
        }
    });
}

#[test]
fn device_memory_ends() {
    inside("device_memory_ends", &[("FAKE_CUDA_MEMORY", "100000")], |_| {
        let _context = context();
        let memory = device(60_000);
        // SAFETY: allocations that are not used.
        let alloc = |bytes| unsafe { result::malloc_sync(bytes) };
        assert_eq!(why(alloc(60_000)), Some(E::CUDA_ERROR_OUT_OF_MEMORY));
        assert_eq!(result::mem_get_info().unwrap(), (40_000, 100_000));
        let attribute = |attribute, address| {
            let mut value: c_int = -1;
            // SAFETY: these attributes are of four bytes.
            let result = unsafe { sys::cuPointerGetAttribute((&raw mut value).cast(), attribute, address) };
            (value, error(result))
        };
        use sys::CUpointer_attribute as P;
        assert_eq!(attribute(P::CU_POINTER_ATTRIBUTE_MEMORY_TYPE, memory + 5), (2, None));
        assert_eq!(attribute(P::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, memory), (0, None));
        let nothing = attribute(P::CU_POINTER_ATTRIBUTE_MEMORY_TYPE, (&raw const memory) as u64);
        assert_eq!(nothing, (-1, Some(E::CUDA_ERROR_INVALID_VALUE)));
        // SAFETY: not used any more.
        let free = |address| unsafe { result::free_sync(address) };
        assert_eq!(why(free(memory)), None);
        assert_eq!(why(free(memory)), Some(E::CUDA_ERROR_INVALID_VALUE));
        assert_eq!(why(alloc(60_000)), None);
    });
}

type Batch = unsafe extern "C" fn(
    *const u64,
    *const u64,
    *const usize,
    usize,
    *const [u32; 6],
    *const usize,
    usize,
    *mut usize,
    sys::CUstream,
) -> E;

/// The batch copy, if the driver has it.
fn batch_copy() -> Option<Batch> {
    let mut found = null_mut();
    let mut status = sys::CUdriverProcAddressQueryResult::CU_GET_PROC_ADDRESS_SUCCESS;
    // SAFETY: both are written.
    let result = unsafe {
        sys::cuGetProcAddress_v2(c"cuMemcpyBatchAsync".as_ptr(), &raw mut found, 12080, 0, &raw mut status)
    };
    assert_eq!(error(result), None);
    assert_eq!(found.is_null(), status != sys::CUdriverProcAddressQueryResult::CU_GET_PROC_ADDRESS_SUCCESS);
    // SAFETY: that version's signature.
    (!found.is_null()).then(|| unsafe { std::mem::transmute::<*mut c_void, Batch>(found) })
}

#[test]
fn batches_copy_and_say_what_failed() {
    inside("batches_copy_and_say_what_failed", &[], |fake| {
        let _context = context();
        let side = stream();
        let batch = batch_copy().expect("a driver of 12.8");
        let memory = device(2 * BYTES);
        let arena = shared(4 * BYTES);
        assert_eq!(register(arena, BYTES).or(register(arena.wrapping_byte_add(BYTES), BYTES)), None);
        assert_eq!(fake.fill(side as u64, memory, 2 * BYTES, 3, LATE_US), 0);
        let host = arena as u64;
        let copy = |to: &[u64], from: &[u64], sizes: &[usize], on| {
            let mut failed = 0;
            let attributes = [1, 0, 0, 0, 0, 0];
            // SAFETY: as many as the count says; the fake looks at the addresses.
            let result = unsafe {
                batch(
                    to.as_ptr(),
                    from.as_ptr(),
                    sizes.as_ptr(),
                    sizes.len(),
                    &raw const attributes,
                    &0,
                    1,
                    &raw mut failed,
                    on,
                )
            };
            (error(result), failed)
        };
        let half = BYTES as u64 / 2;
        let to = [host, host + 3 * half];
        let from = [memory + half, memory];
        assert_eq!(copy(&to, &from, &[100, 200], side), (None, usize::MAX));
        assert_eq!(finish(side), None);
        let all = pattern(3, 2 * BYTES);
        assert_eq!(bytes_at(arena, 100), all[BYTES / 2..][..100]);
        assert_eq!(bytes_at(arena.wrapping_byte_add(3 * BYTES / 2), 200), all[..200]);
        // The second crosses two registrations.
        let refused = Some(E::CUDA_ERROR_INVALID_VALUE);
        assert_eq!(copy(&[host, host + half], &from, &[100, BYTES], side), (refused, 1));
        assert_eq!(copy(&to, &from, &[100, 200], null_mut()), (refused, usize::MAX));
    });
}

#[test]
fn older_drivers_have_no_batches() {
    inside("older_drivers_have_no_batches", &[("FAKE_CUDA_VERSION", "12040")], |_| {
        let _context = context();
        let mut version = 0;
        // SAFETY: written.
        assert_eq!(error(unsafe { sys::cuDriverGetVersion(&raw mut version) }), None);
        assert_eq!(version, 12040);
        assert!(batch_copy().is_none());
    });
}

/// Launches a kernel of the stand-in's.
fn launch(name: &CStr, to: u64, from: u64, bytes: usize, on: sys::CUstream) -> Option<E> {
    // SAFETY: PTX ends in a zero; the parameters are the kernel's, which checks its addresses.
    unsafe {
        let module = result::module::load_data(PTX.as_ptr().cast()).unwrap();
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
    inside("kernels_run_with_copies_of_their_parameters", &[], |fake| {
        let _context = context();
        let side = stream();
        let memory = device(BYTES);
        let arena = shared(BYTES);
        assert_eq!(register(arena, BYTES), None);
        let load = |text: &CStr| {
            // SAFETY: a text with a zero at its end.
            unsafe { result::module::load_data(text.as_ptr().cast()) }
        };
        let newer = c".version 9.0\n.target sm_80\n";
        assert_eq!(why(load(newer)), Some(E::CUDA_ERROR_UNSUPPORTED_PTX_VERSION));
        assert_eq!(why(load(c".version 8.7\n.target sm_100a\n")), Some(E::CUDA_ERROR_NO_BINARY_FOR_GPU));
        assert_eq!(why(load(c"something else")), Some(E::CUDA_ERROR_INVALID_PTX));
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
    let env = [("FAKE_CUDA_HOST_POINTER", "0")];
    inside("kernels_need_the_alias_where_host_pointers_are_not_the_devices", &env, |fake| {
        let context = context();
        let can = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM;
        assert_eq!(context.attribute(can).unwrap(), 0);
        let side = stream();
        let memory = device(BYTES);
        let arena = shared(BYTES);
        assert_eq!(register(arena, BYTES), None);
        let mut alias = 0;
        let inner = arena.wrapping_byte_add(100);
        // SAFETY: the address is written.
        assert_eq!(error(unsafe { sys::cuMemHostGetDevicePointer_v2(&raw mut alias, inner, 0) }), None);
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
    inside("kernels_do_not_reach_what_is_not_registered", &[], |_| {
        let _context = context();
        let side = stream();
        let memory = device(BYTES);
        let raw = launch(c"standin_copy", memory, shared(BYTES) as u64, BYTES, side);
        assert_eq!(raw, Some(E::CUDA_ERROR_ILLEGAL_ADDRESS));
    });
}

#[test]
fn an_unsafe_call_breaks_a_capture() {
    inside("an_unsafe_call_breaks_a_capture", &[], |fake| {
        let context = context();
        let (torch, side) = (stream(), stream());
        let (mine, captured) = (event(), event());
        let memory = device(BYTES);
        // Nothing unsafe: work is recorded, not run.
        begin(torch);
        assert_eq!(fake.fill(torch as u64, memory, 64, 1, 0), 0);
        assert_eq!(record(mine, side), None);
        assert_eq!(record(captured, torch), None);
        assert_eq!(wait_for(side, captured), Some(E::CUDA_ERROR_STREAM_CAPTURE_ISOLATION));
        assert_eq!(end(torch), None);
        assert_eq!(bytes_at(memory as *const c_void, 64), vec![0; 64]);
        // From any thread, unless it has said that it knows.
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
        // What is never allowed.
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
        // Free again.
        assert_eq!(fake.fill(side as u64, memory, 64, 1, 0), 0);
        assert_eq!(finish(side), None);
        assert_eq!(bytes_at(memory as *const c_void, 64), pattern(1, 64));
    });
}

#[test]
fn calls_are_counted_and_can_fail() {
    let env = [("FAKE_CUDA_FAIL", "cuEventCreate=999@3")];
    inside("calls_are_counted_and_can_fail", &env, |fake| {
        let before = fake.counts();
        assert_eq!(before, Counts::default());
        let context = context();
        let create = || result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT);
        let events = [create().unwrap(), create().unwrap()];
        assert_eq!(why(create()), Some(E::CUDA_ERROR_UNKNOWN));
        assert_eq!(why(create()), Some(E::CUDA_ERROR_UNKNOWN));
        fake.fail("cuEventCreate", 0, 0);
        let third = create().unwrap();
        assert_eq!(fake.calls("cuEventCreate"), 5);
        // With the suffix or without.
        fake.fail("cuMemAlloc_v2", 2, 2);
        let memory = device(64);
        // SAFETY: an allocation that is not used.
        assert_eq!(why(unsafe { result::malloc_sync(64) }), Some(E::CUDA_ERROR_OUT_OF_MEMORY));
        let side = stream();
        let counts = Counts { contexts: 1, streams: 1, events: 3, allocations: 1, ..before };
        assert_eq!(fake.counts(), counts);
        // SAFETY: the handles are not used any more.
        unsafe {
            for event in events.into_iter().chain([third]) {
                result::event::destroy(event).unwrap();
            }
            result::stream::destroy(side).unwrap();
            result::free_sync(memory).unwrap();
        }
        drop(context);
        assert_eq!(fake.counts(), before);
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
        assert_eq!(fake.fill(torch as u64, memory, BYTES, 1, 200_000), 0);
        assert_eq!(to_host(arena, memory, BYTES, torch).or(record(done, torch)), None);
        let gone = Some(E::CUDA_ERROR_DEVICE_UNAVAILABLE);
        std::thread::scope(|scope| {
            // Who waits is woken up.
            let waits = scope.spawn(|| {
                context.bind_to_thread().unwrap();
                why(result::ctx::synchronize())
            });
            std::thread::sleep(std::time::Duration::from_millis(20));
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

#[test]
fn what_is_left_is_reported_at_the_end() {
    const NAME: &str = "what_is_left_is_reported_at_the_end";
    if is_inside() {
        let _context = context();
        stream();
        return;
    }
    let (_, errors) = run(Kernels::StandIn, NAME, &[("FAKE_CUDA_REPORT", "1")]);
    assert!(errors.contains("fake_cuda: left 1 streams"), "{errors}");
    assert!(!errors.contains("contexts"), "{errors}");
}
