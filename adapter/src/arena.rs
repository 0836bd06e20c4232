//! The arena, mapped by a worker.

use kvring_gpu_kernels::ArenaMapping;
use kvring_shm_abi::engine_segment::EngineSegment;
use kvring_shm_abi::mapping::Mapping;
use kvring_shm_abi::segment;
use kvring_shm_abi::sync::Ordering;
use std::path::Path;
use std::sync::Arc;

/// A worker's mapping of the arena.
#[derive(Clone)]
pub(crate) struct Arena {
    mapping: Arc<Mapping>,
    bytes: u64,
}

impl Arena {
    /// The arena is the first `bytes` bytes of `mapping`, which has at least as many.
    pub(crate) fn new(mapping: Arc<Mapping>, bytes: u64) -> Arena {
        debug_assert!(bytes <= mapping.len() as u64);
        Arena { mapping, bytes }
    }

    /// The address of `length` bytes at `offset`, if they are in the arena.
    pub(crate) fn address(&self, offset: u64, length: u64) -> Option<*mut u8> {
        let end = offset.checked_add(length)?;
        // SAFETY: `offset` ≤ `end` ≤ `bytes`, and the mapping has at least `bytes` bytes.
        (end <= self.bytes).then(|| unsafe { self.mapping.base().as_ptr().add(offset as usize) })
    }

    /// Are both the same mapping?
    pub(crate) fn is(&self, other: &Arena) -> bool {
        Arc::ptr_eq(&self.mapping, &other.mapping)
    }

    /// What a copy backend needs to know of the arena. It reads from `engine` how much of the arena has memory.
    pub(crate) fn mapping(&self, engine: EngineSegment, slab_bytes: u64, name: &str) -> ArenaMapping {
        let allocated = move || {
            // SYNC POINT: Relaxed, because no data is read by it: it only says which pages have memory.
            u64::from(engine.info().slabs_allocated.load(Ordering::Relaxed)) * slab_bytes
        };
        let path = |name: segment::EngineName| Path::new(segment::SHM_DIR).join(&name.arena()[1..]);
        let lock = segment::EngineName::new(name).ok().map(path);
        ArenaMapping {
            base: self.mapping.base().as_ptr(),
            bytes: self.bytes as usize,
            allocated: Arc::new(allocated),
            lock,
            keep: self.mapping.clone(),
        }
    }
}
