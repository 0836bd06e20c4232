//! A lower tier (a disk, later): what makes a lookup pending.
//!
//! A lookup that misses asks the tier; if the tier has more, the answer is given when it has been brought up. The
//! keys stay in the client's payload region, which belongs to the operation until its completion is drained, so
//! nothing is copied; the lookup is simply done again.

use kvring_shm_abi::message::{Key, Records};
use kvring_shm_abi::ring::DEPTH;

/// Something below the arena that may hold chunks. Called by the service thread: nothing here may block.
pub trait LowerTier: Send {
    /// Starts to bring up as many of `missing` (the next ones of a chain, in order) as it holds. `None`: nothing to wait for.
    fn begin(&mut self, namespace: u32, missing: &[Key]) -> Option<u64>;

    /// Is that done (or failed)? Asked every turn while anything is pending.
    fn is_done(&mut self, ticket: u64) -> bool;
}

/// No lower tier: a miss is a miss.
#[derive(Debug, Default)]
pub struct NoLowerTier;

impl LowerTier for NoLowerTier {
    fn begin(&mut self, _namespace: u32, _missing: &[Key]) -> Option<u64> {
        None
    }

    fn is_done(&mut self, _ticket: u64) -> bool {
        true
    }
}

/// One lookup, as its message said.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AskedLookup {
    pub(crate) entry: usize,
    pub(crate) operation: u16,
    pub(crate) session: u64,
    pub(crate) admission: u32,
    pub(crate) namespace: u32,
    pub(crate) keys: Records,
    pub(crate) answer: Records,
}

/// Lookups that wait, in order of arrival; as many as one client may have in flight.
pub(crate) struct PendingLookups {
    /// Each with what it waits for.
    waiting: Vec<(AskedLookup, u64)>,
}

impl PendingLookups {
    pub(crate) fn new() -> PendingLookups {
        PendingLookups { waiting: Vec::with_capacity(DEPTH) }
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// False when there is no room: then the lookup is answered with what there is.
    pub(crate) fn push(&mut self, lookup: AskedLookup, ticket: u64) -> bool {
        let room = self.waiting.len() < self.waiting.capacity();
        if room {
            self.waiting.push((lookup, ticket));
        }
        room
    }

    /// The first one of a client that need not wait any longer.
    pub(crate) fn take_ready(&mut self, entry: usize, tier: &mut dyn LowerTier) -> Option<AskedLookup> {
        let is_ready = |(lookup, ticket): &(AskedLookup, u64)| lookup.entry == entry && tier.is_done(*ticket);
        let at = self.waiting.iter().position(is_ready)?;
        Some(self.waiting.remove(at).0)
    }

    /// One of this session, and of this admission if one is named.
    pub(crate) fn take_session(
        &mut self,
        entry: usize,
        session: u64,
        admission: Option<u32>,
    ) -> Option<AskedLookup> {
        let at = self.waiting.iter().position(|(lookup, _)| {
            lookup.entry == entry
                && lookup.session == session
                && admission.is_none_or(|admission| lookup.admission == admission)
        })?;
        Some(self.waiting.remove(at).0)
    }

    /// The client is gone.
    pub(crate) fn forget(&mut self, entry: usize) {
        self.waiting.retain(|(lookup, _)| lookup.entry != entry);
    }
}
