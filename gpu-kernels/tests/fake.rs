//! The fake CUDA driver's own tests, through cudarc: contexts, memory, kernels, and what tests control.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

mod support;

use cudarc::driver::{CudaContext, result, sys};
use std::ffi::{CStr, c_int, c_void};
use std::ptr::null_mut;
use support::calls::*;
use support::fake::{Counts, Fake, Kernels, inside_with, is_inside, pattern, run};
use sys::CUresult as E;

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
fn registrations_do_not_overlap_and_copies_do_not_cross_them() {
    let env = [("FAKE_CUDA_LOCKED", "98304:800")];
    inside("registrations_do_not_overlap_and_copies_do_not_cross_them", &env, |fake| {
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
        let crosses = Some(E::CUDA_ERROR_INVALID_VALUE);
        assert_eq!(to_host(at(BYTES - 1), memory, 2, side), crosses);
        assert_eq!(to_host(at(2 * BYTES - 1), memory, 2, side), crosses);
        assert_eq!(to_device(memory, at(BYTES - 1), 2, side), crosses);
        assert_eq!(to_device(memory, at(2 * BYTES - 1), 2, side), crosses);
        // A copy beyond the end of an allocation.
        assert_eq!(to_device(memory + 2 * BYTES as u64 + 1, arena, BYTES, side), crosses);
        // Registrations of memory that is not mapped, with an unknown flag, and of more than may be locked.
        let hole = shared(4096);
        // SAFETY: the mapping is not used.
        unsafe { rustix::mm::munmap(hole, 4096) }.unwrap();
        assert_eq!(register(hole, 4096), Some(E::CUDA_ERROR_INVALID_VALUE));
        // SAFETY: refused.
        let flags = error(unsafe { sys::cuMemHostRegister_v2(at(2 * BYTES), BYTES, 64) });
        assert_eq!(flags, Some(E::CUDA_ERROR_INVALID_VALUE));
        assert_eq!(register(shared(98_304), 98_304), Some(E::CUDA_ERROR_NOT_PERMITTED));
        // A copy that runs after its memory has been unregistered.
        assert_eq!(fake.fill(side as u64, memory, BYTES, 3, FAR_LATER_US), 0);
        assert_eq!(to_host(arena, memory, BYTES, side), None);
        // SAFETY: the memory stays mapped.
        let unregister = || error(unsafe { sys::cuMemHostUnregister(arena) });
        assert_eq!(unregister(), None);
        assert_eq!(unregister(), Some(E::CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED));
        assert_eq!(finish(side), Some(E::CUDA_ERROR_ILLEGAL_ADDRESS));
        // The error stays.
        assert_eq!(why(result::mem_get_info()), Some(E::CUDA_ERROR_ILLEGAL_ADDRESS));
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
    // SAFETY: the call writes both.
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
            // SAFETY: the arrays are as long as the count says; the fake checks the addresses.
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

/// Launches a kernel of the stand-in.
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
        // A call may be named with its suffix or without.
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
