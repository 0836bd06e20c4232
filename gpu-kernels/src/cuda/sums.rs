//! Pinned memory for checksums: kernels write partial sums there, and the host adds them up.

use super::device::Context;
use super::error::GpuError;
use super::objects::HostBuffer;
use std::sync::{Arc, Mutex, PoisonError};

/// The fewest partial sums of a buffer: enough for a usual batch.
const SUMS_MIN: usize = 8 << 10;

/// Buffers that are used again, because pinning memory takes long.
pub(super) struct SumBuffers {
    context: Arc<Context>,
    free: Mutex<Vec<HostBuffer>>,
}

impl SumBuffers {
    pub(super) fn new(context: &Arc<Context>) -> Arc<SumBuffers> {
        Arc::new(SumBuffers { context: context.clone(), free: Mutex::default() })
    }

    /// Room for a batch of so many shards, with at most so many partial sums.
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
    /// For each checksum kernel: its shard, the index of its first partial sum, and how many it writes.
    places: Vec<(usize, usize, usize)>,
}

impl Sums {
    /// Reserves room for so many partial sums of a shard, and returns its address on the device.
    ///
    /// # Errors
    /// There is no room, because `take` was asked for less.
    pub(super) fn place(&mut self, shard: usize, partials: u32) -> Result<u64, GpuError> {
        let (at, count) = (self.used, partials as usize);
        let buffer = self.buffer.as_ref().filter(|buffer| (at + count) * size_of::<u64>() <= buffer.bytes());
        let buffer = buffer.ok_or(GpuError::NoPlaceForChecksum)?;
        self.used += count;
        self.places.push((shard, at, count));
        Ok(buffer.alias() + (at * size_of::<u64>()) as u64)
    }

    /// The shards' sums. Their kernels have ended.
    pub(super) fn totals(&self) -> Vec<u64> {
        let mut totals = vec![0u64; self.shards];
        let Some(buffer) = &self.buffer else { return totals };
        let words = buffer.host().cast::<u64>();
        for (shard, at, count) in &self.places {
            for index in *at..at + count {
                // SAFETY: in the buffer (`place`), and written by a kernel that has ended; volatile, because the compiler
                // knows of no writer.
                let partial = unsafe { words.add(index).read_volatile() };
                totals[*shard] = totals[*shard].wrapping_add(partial);
            }
        }
        totals
    }
}

impl Drop for Sums {
    /// The caller has waited for the kernels that write there.
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            self.buffers.free.lock().unwrap_or_else(PoisonError::into_inner).push(buffer);
        }
    }
}
