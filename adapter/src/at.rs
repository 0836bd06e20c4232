//! Which engine knows what this client holds. The keeper sets it; the ledger and the leases each keep one and go by it.

use crate::link::Link;
use std::sync::Arc;

/// Which engine knows of the slots in the ledger, or of the leases.
pub(crate) enum At {
    /// No engine knows of any of them.
    Nowhere,
    /// The keeper is declaring them to a new engine.
    Declaring,
    /// The engine of this link, through which commits, aborts and releases go. It may be dead.
    Attached(Arc<Link>),
}

impl At {
    /// Is it the engine of this link?
    pub(crate) fn is(&self, link: &Arc<Link>) -> bool {
        matches!(self, At::Attached(at) if Arc::ptr_eq(at, link))
    }
}
