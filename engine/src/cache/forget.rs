//! Namespaces that nobody uses any more.

use super::chunk::Life;
use super::{Cache, NamespaceId, SlotTable};

impl<T: SlotTable> Cache<T> {
    /// Forgets a namespace that holds nothing, so that its id can be given to another. False where it still has a
    /// chunk, visible or forming; true also for one that is not registered. O(chunks): for a full table of namespaces.
    pub fn forget(&mut self, namespace: NamespaceId) -> bool {
        self.change();
        let holds = |id: u32| {
            let chunk = self.chunks.get(id);
            chunk.life() != Life::Free && u32::from(chunk.namespace) == namespace
        };
        match self.namespace(namespace) {
            None => return true,
            Some(registered) if !registered.policy.is_empty() => return false,
            Some(_) if (0..self.chunks.fresh).any(holds) => return false,
            Some(_) => {}
        }
        self.slabs.forget(namespace);
        self.namespaces[namespace as usize] = None;
        true
    }
}
