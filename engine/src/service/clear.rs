//! Clearing, a piece per turn: a million chunks take longer than anybody's lookup may wait.

use super::Service;
use crate::stats::Stat;
use kvring_shm_abi::message::{Ident, Status};

/// The request that waits for the end of a clear.
struct Asker {
    entry: usize,
    operation: u16,
    ident: Ident,
}

/// A clear that is under way.
pub(super) struct Clearing {
    /// `None` where a namespace that nobody uses is cleared in order to be forgotten.
    asker: Option<Asker>,
    namespace: Option<u32>,
    /// The chunk to go on with.
    from: u32,
    dropped: u64,
}

impl Service {
    /// Begins a clear; false when one is under way already, or while clients of the earlier engine are awaited, which have not
    /// declared their leases yet.
    pub(super) fn begin_clear(
        &mut self,
        entry: usize,
        operation: u16,
        ident: Ident,
        namespace: Option<u32>,
    ) -> bool {
        let free = self.clearing.is_none() && !self.is_awaiting();
        if free {
            self.stat(Stat::Clears, 1);
            let asker = Some(Asker { entry, operation, ident });
            self.clearing = Some(Clearing { asker, namespace, from: 0, dropped: 0 });
        }
        free
    }

    /// Begins to clear a namespace that nobody uses, so that it can be forgotten; not while another clear is under way.
    pub(super) fn begin_retiring(&mut self, namespace: u32) {
        if self.clearing.is_none() {
            self.clearing = Some(Clearing { asker: None, namespace: Some(namespace), from: 0, dropped: 0 });
        }
    }

    /// Does the next piece, and answers the request after the last one.
    pub(super) fn go_on_clearing(&mut self) {
        let Some(mut clearing) = self.clearing.take() else { return };
        let visible = |service: &Service| service.cache.stats().chunks_visible;
        let before = visible(self);
        let next = self.cache.clear_step(clearing.namespace, clearing.from);
        clearing.dropped += before.saturating_sub(visible(self));
        match next {
            Some(from) => self.clearing = Some(Clearing { from, ..clearing }),
            None => {
                let Clearing { asker, dropped, namespace, .. } = clearing;
                let Some(Asker { entry, operation, ident }) = asker else {
                    return self.retire(namespace, dropped);
                };
                // If the asking client has left meanwhile, no answer is sent, also not to a client that has its entry by now.
                if self.entries[entry].connection().is_some_and(|connection| connection.ident == ident) {
                    self.complete(entry, operation, Status::Ok, [dropped, 0, 0, 0]);
                    if let Some(connection) = self.entries[entry].connection_mut() {
                        connection.announce();
                    }
                }
            }
        }
    }
}
