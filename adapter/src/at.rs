//! To which engine this client stands while it holds something: the keeper says it, the ledger and the leases go by it.

use crate::link::Link;
use std::sync::Arc;

/// Which engine knows of what is held (in the ledger, among the leases).
pub(crate) enum At {
    /// None knows of any of it.
    Nowhere,
    /// The keeper names it to a new one.
    Declaring,
    /// The one behind this link, through which everything goes. It may be dead.
    Attached(Arc<Link>),
}

impl At {
    /// Is it the engine behind this link?
    pub(crate) fn is(&self, link: &Arc<Link>) -> bool {
        matches!(self, At::Attached(at) if Arc::ptr_eq(at, link))
    }
}
