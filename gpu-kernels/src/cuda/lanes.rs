//! Lanes. Each is a stream and a staging buffer in device memory; the windows of one direction take turns on them.
//!
//! A lane's work runs in order, so its staging buffer is free again when the next window comes to it, without an event to wait
//! for: a window costs two driver calls. While one lane's DMA runs, another lane's kernel runs.

use super::device::Context;
use super::error::{GpuError, PATIENCE, insist};
use super::objects::{DeviceBuffer, Event, Events, Recorded, Stream};
use cudarc::driver::sys::CUstream;
use std::sync::Arc;
use std::time::Duration;

/// Lanes of a direction: one copies, one gathers or scatters, one is being given work.
pub(super) const LANES: usize = 3;
/// The smallest staging buffer that is worth having. If there is not even memory for that, there is none.
const STAGING_MIN: u32 = 256 << 10;

struct Lane {
    stream: Stream,
    staging: Option<DeviceBuffer>,
    /// The batch that is being submitted has used it.
    used: bool,
}

/// The lanes of one direction.
pub(super) struct Lanes {
    context: Arc<Context>,
    lanes: Vec<Lane>,
    next: usize,
}

/// A lane that a window may be put on.
pub(super) struct Turn {
    pub(super) stream: CUstream,
    /// Its staging buffer, or 0 where there is none.
    pub(super) staging: u64,
}

impl Lanes {
    pub(super) fn new(context: &Arc<Context>) -> Result<Lanes, GpuError> {
        let lane = |_| Ok(Lane { stream: Stream::new(context)?, staging: None, used: false });
        let lanes = (0..LANES).map(lane).collect::<Result<_, GpuError>>()?;
        Ok(Lanes { context: context.clone(), lanes, next: 0 })
    }

    /// Bytes of each staging buffer; 0 where there is none.
    pub(super) fn staging_bytes(&self) -> u32 {
        self.lanes
            .iter()
            .map(|lane| lane.staging.as_ref().map_or(0, |buffer| buffer.bytes() as u32))
            .min()
            .unwrap_or(0)
    }

    /// Makes the staging buffers at least `bytes` long, or as long as there is memory for. They never get shorter, because
    /// caches that were prepared before have windows of that length. Work in flight ends before old buffers are freed.
    pub(super) fn stage(&mut self, bytes: u32) -> Result<(), GpuError> {
        let had = self.staging_bytes();
        let mut wanted = bytes.max(STAGING_MIN);
        while wanted > had {
            let made: Result<Vec<_>, _> =
                self.lanes.iter().map(|_| DeviceBuffer::new(&self.context, wanted as usize)).collect();
            match made {
                Ok(buffers) => {
                    self.synchronize(PATIENCE)?;
                    for (lane, buffer) in self.lanes.iter_mut().zip(buffers) {
                        lane.staging = Some(buffer);
                    }
                    return Ok(());
                }
                Err(error) if error.is_out_of_memory() && wanted > STAGING_MIN => {
                    wanted = (wanted / 2).max(STAGING_MIN);
                }
                Err(error) if had == 0 || !error.is_out_of_memory() => return Err(error),
                Err(_) => return Ok(()),
            }
        }
        Ok(())
    }

    /// The next lane. When a batch gets it for the first time, it is ordered after `fence`. The caller has entered the context.
    pub(super) fn turn(&mut self, fence: Option<&Event>) -> Result<Turn, GpuError> {
        self.next = (self.next + 1) % self.lanes.len();
        let lane = &mut self.lanes[self.next];
        if !lane.used {
            if let Some(fence) = fence {
                lane.stream.wait_for(fence)?;
            }
            lane.used = true;
        }
        let staging = lane.staging.as_ref().map_or(0, DeviceBuffer::address);
        Ok(Turn { stream: lane.stream.raw(), staging })
    }

    /// Ends the batch. Returns events that come when everything has been done that the batch has put on its lanes. After an error
    /// the caller calls `synchronize`.
    pub(super) fn end_batch(&mut self, events: &Arc<Events>) -> Result<Vec<Recorded>, GpuError> {
        let mut recorded = Vec::with_capacity(self.lanes.len());
        for lane in self.lanes.iter_mut().filter(|lane| lane.used) {
            recorded.push(events.record(lane.stream.raw())?);
        }
        self.lanes.iter_mut().for_each(|lane| lane.used = false);
        Ok(recorded)
    }

    /// Waits for everything on the lanes: a batch that has failed half-way must not go on unseen.
    pub(super) fn synchronize(&mut self, patience: Duration) -> Result<(), GpuError> {
        // Even if this fails: the next batch has a fence of its own to wait for.
        self.lanes.iter_mut().for_each(|lane| lane.used = false);
        insist(patience, || {
            let _entered = self.context.enter()?;
            // Every lane is waited for, even if another one fails.
            let ended: Vec<_> = self.lanes.iter().map(|lane| lane.stream.synchronize()).collect();
            ended.into_iter().collect()
        })
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        // Their work ends before their buffers are freed.
        let _ = self.synchronize(PATIENCE);
    }
}
