//! A batch in flight on the GPU.

use super::arena::Arena;
use super::device::Context;
use super::error::GpuError;
use super::objects::{Event, Recorded};
use super::sums::Sums;
use crate::backend::{CopyDone, CopyError, Transfer};
use crate::batch::CopyBatch;
use crate::checksum;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a waiting thread polls before it sleeps: small copies end sooner than a sleeper wakes.
const SPIN: Duration = Duration::from_micros(30);

/// A [`Transfer`] by a GPU.
pub(super) struct GpuTransfer {
    pub(super) context: Arc<Context>,
    /// The events of the lanes that have not been seen to end.
    pub(super) events: Vec<Recorded>,
    pub(super) sums: Option<Sums>,
    pub(super) failed: Option<CopyError>,
    /// Since when the driver has not said whether the transfer has ended.
    pub(super) unsure: Option<Instant>,
    /// For how long the driver is asked again.
    pub(super) patience: Duration,
    /// Held until the transfer has ended, so that the cache's tables stay, and the arenas stay registered.
    pub(super) batch: CopyBatch,
    pub(super) _arenas: Vec<Arc<Arena>>,
}

impl GpuTransfer {
    /// Looks at the events.
    fn look(&mut self) {
        let context = self.context.clone();
        let entered = match context.enter() {
            Ok(entered) => entered,
            Err(error) => return self.doubt(error),
        };
        let mut failed = None;
        self.events.retain(|event| match event.event().map(Event::has_come) {
            None | Some(Ok(true)) => false,
            Some(Ok(false)) => true,
            Some(Err(error)) => {
                failed = Some(error);
                true
            }
        });
        drop(entered);
        match failed {
            Some(error) => self.doubt(error),
            None => self.unsure = None,
        }
    }

    /// Called when an event could not be looked at. That does not mean that its work has ended, so it is looked at again for a
    /// while.
    fn doubt(&mut self, error: GpuError) {
        let since = *self.unsure.get_or_insert_with(Instant::now);
        if error.is_final() || since.elapsed() > self.patience {
            self.events.clear();
            if error.is_final() {
                self.failed.get_or_insert(error.into());
            } else {
                // Kernels may still write the sums, so their memory is not given to another batch.
                core::mem::forget(self.sums.take());
                self.failed = Some(CopyError::Unended(error));
            }
        }
    }

    fn finish(&mut self) {
        let until = Instant::now() + SPIN;
        while !self.poll() {
            if Instant::now() < until {
                core::hint::spin_loop();
                continue;
            }
            let context = self.context.clone();
            let synchronized = context.enter().and_then(|_entered| {
                self.events.iter().filter_map(Recorded::event).try_for_each(Event::synchronize)
            });
            match synchronized {
                Ok(()) => self.events.clear(),
                Err(error) => {
                    self.doubt(error);
                    std::thread::sleep(Duration::from_millis(u64::from(!self.events.is_empty())));
                }
            }
        }
    }
}

impl Transfer for GpuTransfer {
    fn poll(&mut self) -> bool {
        if !self.events.is_empty() {
            self.look();
        }
        self.events.is_empty()
    }

    fn wait(mut self: Box<Self>) -> Result<CopyDone, CopyError> {
        self.finish();
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        let totals = self.sums.as_ref().map(Sums::totals).unwrap_or_default();
        let bytes = self.batch.paged.shard_bytes();
        Ok(CopyDone { checksums: totals.into_iter().map(|sum| checksum::finish(sum, bytes)).collect() })
    }
}

impl Drop for GpuTransfer {
    fn drop(&mut self) {
        self.finish();
    }
}
