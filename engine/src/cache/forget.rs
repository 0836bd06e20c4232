//! Forgetting namespaces that nobody uses any more.

use super::{Cache, NamespaceId, SlotTable};
use kvring_shm_abi::namespace::namespace_index;

impl<T: SlotTable> Cache<T> {
    /// Forgets a namespace that has no chunks, so that its index, and the shard sizes that only it has, can be given
    /// to another one. False: it still has chunks. True also for a namespace that is not registered.
    pub fn forget(&mut self, namespace: NamespaceId) -> bool {
        self.change();
        if self.namespace(namespace).is_none() {
            return true;
        }
        let index = namespace_index(namespace);
        if self.chunks.of(index) > 0 {
            return false;
        }
        self.policy.forget(usize::from(index));
        self.slabs.forget(index);
        self.namespaces[usize::from(index)] = None;
        true
    }
}
