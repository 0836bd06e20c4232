//! Where kernels put checksums: pinned memory, which they write and the host adds up.

use super::device::Context;
use super::error::GpuError;
use super::objects::HostBuffer;
use std::sync::{Arc, Mutex, PoisonError};

/// Partial sums of one buffer at least: those of a usual batch.
const SUMS_MIN: usize = 8 << 10;

/// Buffers to be used again: pinning memory takes long.
pub(super) struct SumBuffers {
    context: Arc<Context>,
    free: Mutex<Vec<HostBuffer>>,
}

impl SumBuffers {
    pub(super) fn new(context: &Arc<Context>) -> Arc<SumBuffers> {
        Arc::new(SumBuffers { context: context.clone(), free: Mutex::default() })
    }

    /// Room for a batch of so many shards, with so many partial sums at most.
    pub(super) fn take(self: &Arc<SumBuffers>, shards: usize, partials: usize) -> Result<Sums, GpuError> {
        let bytes = partials.max(SUMS_MIN) * size_of::<u64>();
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = free.iter().position(|buffer| buffer.bytes() >= bytes);
        let buffer = fits.map(|index| free.swap_remove(index));
        drop(free);
        let buffer = buffer.map_or_else(|| HostBuffer::new(&self.context, bytes), Ok)?;
        Ok(Sums { buffer: Some(buffer), buffers: self.clone(), used: 0, shards, places: Vec::new() })
    }
}

/// The partial sums of one batch.
pub(super) struct Sums {
    buffer: Option<HostBuffer>,
    buffers: Arc<SumBuffers>,
    used: usize,
    shards: usize,
    /// Whose, from where on, how many.
    places: Vec<(usize, usize, usize)>,
}

impl Sums {
    /// The device's address for so many partial sums of a shard.
    ///
    /// # Errors
    /// There is no room: `take` was told of fewer.
    pub(super) fn place(&mut self, shard: usize, partials: u32) -> Result<u64, GpuError> {
        let (at, count) = (self.used, partials as usize);
        let buffer = self.buffer.as_ref().filter(|buffer| (at + count) * size_of::<u64>() <= buffer.bytes());
        let buffer = buffer.ok_or(GpuError::NoPlaceForChecksum)?;
        self.used += count;
        self.places.push((shard, at, count));
        Ok(buffer.alias() + (at * size_of::<u64>()) as u64)
    }

    /// The shards' sums. The events of their kernels have come.
    pub(super) fn totals(&self) -> Vec<u64> {
        let mut totals = vec![0u64; self.shards];
        let Some(buffer) = &self.buffer else { return totals };
        let words = buffer.host().cast::<u64>();
        for (shard, at, count) in &self.places {
            for index in *at..at + count {
                // SAFETY: in the buffer (`place`), written by a kernel that has ended; volatile, because the compiler
                // knows of no writer.
                let partial = unsafe { words.add(index).read_volatile() };
                totals[*shard] = totals[*shard].wrapping_add(partial);
            }
        }
        totals
    }
}

impl Drop for Sums {
    /// Whoever drops this has waited for the kernels that write there.
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            self.buffers.free.lock().unwrap_or_else(PoisonError::into_inner).push(buffer);
        }
    }
}
