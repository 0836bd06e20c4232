//! A lower tier (later a disk), for which a lookup may wait.
//!
//! A lookup that misses asks the tier. If the tier has more, the lookup is *pending*: it is answered when that has
//! been brought up. Its keys stay in the client's payload region, which belongs to the operation until its
//! completion is drained. So nothing is copied; the lookup is simply done again.

use kvring_shm_abi::message::{Key, Records};
use kvring_shm_abi::ring::DEPTH;

/// Something below the arena that may hold chunks. The service thread calls it: nothing here may block.
pub trait LowerTier: Send {
    /// Starts to bring up as many of `missing` (the next chunks of a chain, in order) as it holds, and returns a
    /// ticket. `None`: there is nothing to wait for.
    fn begin(&mut self, namespace: u32, missing: &[Key]) -> Option<u64>;

    /// Whether that has been done, or has failed. Called in every turn while anything is pending.
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

/// One lookup, as its message asks for it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AskedLookup {
    pub(crate) entry: usize,
    pub(crate) operation: u16,
    pub(crate) session: u64,
    pub(crate) admission: u32,
    pub(crate) namespace: u32,
    pub(crate) keys: Records,
    pub(crate) answer: u32,
}

/// Pending lookups, in order of arrival; as many as one client may have in flight.
pub(crate) struct PendingLookups {
    /// Each lookup, with the tier's ticket for it.
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

    /// False: there is no room, and the lookup is to be answered with what has been found.
    pub(crate) fn push(&mut self, lookup: AskedLookup, ticket: u64) -> bool {
        let room = self.waiting.len() < self.waiting.capacity();
        if room {
            self.waiting.push((lookup, ticket));
        }
        room
    }

    /// Takes a client's first lookup that need not wait any longer.
    pub(crate) fn take_ready(&mut self, entry: usize, tier: &mut dyn LowerTier) -> Option<AskedLookup> {
        let is_ready = |(lookup, ticket): &(AskedLookup, u64)| lookup.entry == entry && tier.is_done(*ticket);
        let at = self.waiting.iter().position(is_ready)?;
        Some(self.waiting.remove(at).0)
    }

    /// Takes one lookup of this session and, if one is given, of this admission.
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

    /// Forgets the lookups of a client that is gone.
    pub(crate) fn forget(&mut self, entry: usize) {
        self.waiting.retain(|(lookup, _)| lookup.entry != entry);
    }
}
