//! Lanes: a stream and a staging buffer in device memory. Transfers of one direction take turns on them.
//!
//! What a lane is given runs in order, so its staging buffer is free again when the next window comes to it, and nobody
//! waits for anything: two driver calls for a window. While one lane's DMA runs, another one's kernel does.

use super::device::Context;
use super::error::{GpuError, PATIENCE, insist};
use super::objects::{DeviceBuffer, Event, Events, Recorded, Stream};
use cudarc::driver::sys::CUstream;
use std::sync::Arc;
use std::time::Duration;

/// Lanes of a direction: one copies, one gathers or scatters, one is being given work.
pub(super) const LANES: usize = 3;
/// The smallest staging buffer worth having: where not even this is to be had, there is none.
const STAGING_MIN: u32 = 256 << 10;

struct Lane {
    stream: Stream,
    staging: Option<DeviceBuffer>,
    /// The batch that is being submitted has used it.
    used: bool,
}

/// The lanes of one direction, for who submits a batch.
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

    /// Makes the staging buffers at least so long; where memory is short, as long as can be had. They never get shorter:
    /// caches that were prepared before have windows of that length. What is in flight is waited for before old ones go.
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

    /// The next lane, ordered after `fence` the first time that a batch gets it. The caller has entered the context.
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

    /// Events that come when all is done that the batch has put on its lanes. Ends the batch, also where it fails.
    pub(super) fn end_batch(&mut self, events: &Arc<Events>) -> Result<Vec<Recorded>, GpuError> {
        let mut recorded = Vec::with_capacity(self.lanes.len());
        for lane in self.lanes.iter_mut().filter(|lane| lane.used) {
            recorded.push(events.record(lane.stream.raw())?);
        }
        self.lanes.iter_mut().for_each(|lane| lane.used = false);
        Ok(recorded)
    }

    /// Waits for all that is on them: what failed half-way must not go on behind our back.
    pub(super) fn synchronize(&mut self, patience: Duration) -> Result<(), GpuError> {
        // In any case: the next batch has a fence of its own to wait for.
        self.lanes.iter_mut().for_each(|lane| lane.used = false);
        insist(patience, || {
            let _entered = self.context.enter()?;
            // Each, whatever the others say.
            let ended: Vec<_> = self.lanes.iter().map(|lane| lane.stream.synchronize()).collect();
            ended.into_iter().collect()
        })
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        // Before their buffers are freed.
        let _ = self.synchronize(PATIENCE);
    }
}
