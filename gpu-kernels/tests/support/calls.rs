//! Calls of the driver for tests. They are safe because the fake checks handles and addresses itself; a real driver is given none
//! that it does not know (`tests/device.rs`).

use super::fake::is_real;
use cudarc::driver::{CudaContext, DriverError, result, sys};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::Arc;
use sys::CUresult as E;

/// A delay that is long against the fake's random delays.
pub(crate) const LATE_US: u32 = 20_000;
/// A delay for a race that has to be lost at the first try: the fake adds the time in which a thread of the test has no core.
pub(crate) const FAR_LATER_US: u32 = 200_000;
/// Bytes of most copies in the fake's own tests.
pub(crate) const BYTES: usize = 8192;
const DEVICEMAP: u32 = 2;
const WAIT_DEFAULT: sys::CUevent_wait_flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;

/// The error of a call, if there is one.
pub(crate) fn why<T>(result: Result<T, DriverError>) -> Option<E> {
    result.err().map(|error| error.0)
}

/// Defines calls that return their error, if there is one.
macro_rules! calls {
    ($($(#[$doc:meta])* fn $name:ident($($argument:ident: $type:ty),*) = $call:expr;)*) => {$(
        $(#[$doc])*
        pub(crate) fn $name($($argument: $type),*) -> Option<E> {
            // SAFETY: the fake checks handles and addresses itself. The memory of the tests stays mapped, and they access it only
            // when no stream does.
            why(unsafe { $call })
        }
    )*};
}

calls! {
    /// Frees device memory.
    fn free(address: u64) = result::free_sync(address);
    /// Registers host memory, mapped for the device.
    fn register(address: *mut c_void, bytes: usize) = sys::cuMemHostRegister_v2(address, bytes, DEVICEMAP).result();
    /// Undoes a registration.
    fn unregister(address: *mut c_void) = sys::cuMemHostUnregister(address).result();
    /// Puts a copy on a stream.
    fn to_host(to: *mut c_void, from: u64, bytes: usize, stream: sys::CUstream) =
        sys::cuMemcpyDtoHAsync_v2(to, from, bytes, stream).result();
    /// Puts a copy on a stream.
    fn to_device(to: u64, from: *const c_void, bytes: usize, stream: sys::CUstream) =
        sys::cuMemcpyHtoDAsync_v2(to, from, bytes, stream).result();
    /// Records an event.
    fn record(event: sys::CUevent, stream: sys::CUstream) = result::event::record(event, stream);
    /// Lets a stream wait for an event.
    fn wait_for(stream: sys::CUstream, event: sys::CUevent) = result::stream::wait_event(stream, event, WAIT_DEFAULT);
    /// Looks at an event: no error means that it has come.
    fn query(event: sys::CUevent) = result::event::query(event);
    /// Waits for an event.
    fn finish_event(event: sys::CUevent) = result::event::synchronize(event);
    /// Destroys an event.
    fn destroy_event(event: sys::CUevent) = result::event::destroy(event);
    /// Waits for a stream.
    fn finish(stream: sys::CUstream) = result::stream::synchronize(stream);
    /// Destroys a stream.
    fn destroy(stream: sys::CUstream) = result::stream::destroy(stream);
    /// Ends a capture. The fake's graphs hold nothing, and need not be destroyed.
    fn end(stream: sys::CUstream) = result::stream::end_capture(stream);
}

/// Makes the context of device 0 current.
pub(crate) fn context() -> Arc<CudaContext> {
    let context = CudaContext::new(0).unwrap();
    // SAFETY: cudarc has made no stream or slice yet.
    unsafe { context.disable_event_tracking() };
    context
}

/// A stream that does not wait for the default one.
pub(crate) fn stream() -> sys::CUstream {
    result::stream::create(result::stream::StreamKind::NonBlocking).unwrap()
}

/// A stream that waits for the default one, and for which the default one waits.
pub(crate) fn blocking_stream() -> sys::CUstream {
    result::stream::create(result::stream::StreamKind::Default).unwrap()
}

/// An event.
pub(crate) fn event() -> sys::CUevent {
    result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).unwrap()
}

/// Allocates device memory.
pub(crate) fn try_device(bytes: usize) -> Result<u64, DriverError> {
    // SAFETY: an allocation; the tests write before they read.
    unsafe { result::malloc_sync(bytes) }
}

/// Device memory.
pub(crate) fn device(bytes: usize) -> u64 {
    try_device(bytes).unwrap()
}

/// Shared memory of a whole number of pages, as the arena is. It stays mapped.
pub(crate) fn shared(bytes: usize) -> *mut c_void {
    // SAFETY: a new mapping.
    unsafe { mmap_anonymous(null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED) }
        .unwrap()
}

/// Reads memory of the test, or of the fake's device.
pub(crate) fn bytes_at(address: *const c_void, bytes: usize) -> Vec<u8> {
    // SAFETY: memory of the test or of the fake, which no stream writes any more.
    unsafe { std::slice::from_raw_parts(address.cast(), bytes) }.to_vec()
}

/// Reads device memory: the fake's directly, a real device's by a copy.
pub(crate) fn read_device(address: u64, bytes: usize) -> Vec<u8> {
    if !is_real() {
        return bytes_at(address as *const c_void, bytes);
    }
    let mut found = vec![0; bytes];
    // SAFETY: the test's own allocation, which no stream writes any more.
    unsafe { result::memcpy_dtoh_sync(&mut found, address) }.unwrap();
    found
}

/// Writes device memory: the fake's directly, a real device's by a copy.
pub(crate) fn write_device(address: u64, bytes: &[u8]) {
    if is_real() {
        // SAFETY: the test's own allocation, which no stream uses now.
        return unsafe { result::memcpy_htod_sync(address, bytes) }.unwrap();
    }
    // SAFETY: as above; the fake's device memory is memory of this process.
    unsafe { (address as *mut u8).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
}

/// Sets this thread's capture mode, and returns the one before.
pub(crate) fn exchange(mode: sys::CUstreamCaptureMode) -> sys::CUstreamCaptureMode {
    let mut mode = mode;
    // SAFETY: the mode is read and written.
    assert_eq!(why(unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut mode) }.result()), None);
    mode
}

/// Lets this thread make calls that a capture forbids, and returns the mode before.
pub(crate) fn relax() -> sys::CUstreamCaptureMode {
    exchange(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED)
}

/// Starts a capture.
pub(crate) fn begin(stream: sys::CUstream) {
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
    // SAFETY: the fake knows its handles.
    unsafe { result::stream::begin_capture(stream, mode) }.unwrap();
}
