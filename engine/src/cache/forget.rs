//! Forgetting namespaces that nobody uses any more.

use super::{Cache, NamespaceId, SlotTable};

impl<T: SlotTable> Cache<T> {
    /// Forgets a namespace that has no chunks, so that its id, and the shard sizes that only it has, can be given
    /// to another one. False: it still has chunks. True also for a namespace that is not registered.
    pub fn forget(&mut self, namespace: NamespaceId) -> bool {
        self.change();
        if self.namespace(namespace).is_none() {
            return true;
        }
        if self.chunks.of(namespace) > 0 {
            return false;
        }
        self.policy.forget(namespace as usize);
        self.slabs.forget(namespace);
        self.namespaces[namespace as usize] = None;
        true
    }
}
