//! A store whose copies have ended, and whose commits wait for the next engine.

use super::report::{Dropped, StoreReport};
use crate::batch::{BatchId, Settled};
use crate::ledger::Ledger;
use std::time::Instant;

/// A store that has copied everything, and some of whose commits have no answer because their engine went away. The
/// mover goes on with other jobs meanwhile.
pub(super) struct Unsettled {
    pub(super) report: StoreReport,
    /// Each batch with its number of shards.
    pub(super) commits: Vec<(BatchId, u32)>,
    /// When the store is reported at the latest.
    pub(super) until: Instant,
}

impl Unsettled {
    /// The store's report, once the outcomes are known or it may not wait any longer. `None`: it still waits.
    pub(super) fn look(&mut self, ledger: &Ledger, may_wait: bool) -> Option<StoreReport> {
        let Unsettled { report, commits, until } = self;
        commits.retain(|(batch, count)| match ledger.take_settled(*batch) {
            Some(Settled { done, gone }) => {
                report.stored += done.min(*count);
                report.drop_shards(gone.max(count.saturating_sub(done)), Dropped::Gone);
                false
            }
            None => true,
        });
        if !commits.is_empty() && may_wait && Instant::now() < *until {
            return None;
        }
        for (batch, count) in commits.drain(..) {
            // An engine that comes back may still commit it, but this report cannot tell.
            ledger.leave(batch);
            report.drop_shards(count, Dropped::Unavailable);
        }
        Some(*report)
    }
}
