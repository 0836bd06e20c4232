//! The keys of the tests' chunks, and KV caches in the memory of a GPU that the tests play.

use kvring_adapter::{Key, Memory};
use kvring_gpu_kernels::raw::Device;
use kvring_rig::content::key_of;
use kvring_rig::pages::{Owner, Pages, Shape};
use std::ptr::NonNull;

/// A cache of this shape in the memory of the fake CUDA driver's first device, if the tests run with that driver
/// (`KVRING_TEST_FAKE_GPU=1`, see `tests/run`). The host can access that memory too.
pub fn on_fake_gpu(shape: Shape) -> Option<Pages> {
    std::env::var_os("KVRING_TEST_FAKE_GPU")?;
    let device = Device::open(0).expect("the fake CUDA driver");
    let plane = |plane| -> (NonNull<u64>, Owner) {
        let memory = device.allocate(shape.plane_bytes(plane)).expect("the fake device's memory");
        (NonNull::new(memory.address() as *mut u64).expect("an address"), Box::new(memory))
    };
    let planes = (0..shape.planes).map(plane).collect();
    // SAFETY: each plane has just been allocated with its size, and nobody else knows of it.
    Some(unsafe { Pages::at(shape, Memory::Cuda(0), planes) }.expect("a shape that can be"))
}

/// `count` keys of a chain with this name.
pub fn chain(name: u64, count: usize) -> Vec<Key> {
    let [name, _] = key_of(name);
    (0..count as u64).map(|index| [name, index]).collect()
}
