//! Clearing, a piece per turn: a million chunks take longer than anybody's lookup may wait.

use super::Service;
use crate::cache::Heard;
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
    /// How many chunks clears had dropped before this one.
    before: u64,
    /// A scheduler holds something that it cannot say now: the clear goes on with the next tick.
    pub(super) is_put_off: bool,
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
            self.clearing = Some(self.clearing_of(asker, namespace));
        }
        free
    }

    /// Begins to clear a namespace that nobody uses, so that it can be forgotten; not while another clear is under way.
    pub(super) fn begin_retiring(&mut self, namespace: u32) {
        if self.clearing.is_none() {
            self.clearing = Some(self.clearing_of(None, Some(namespace)));
        }
    }

    fn clearing_of(&self, asker: Option<Asker>, namespace: Option<u32>) -> Clearing {
        Clearing { asker, namespace, from: 0, before: self.cache.stats().cleared, is_put_off: false }
    }

    /// Does the next piece, and answers the request after the last one.
    pub(super) fn go_on_clearing(&mut self) {
        let Some(clearing) = self.clearing.take() else { return };
        let (entries, schedulers) = (&self.entries, self.schedulers);
        let mut is_put_off = false;
        let mut ears = || {
            let heard = Service::heard(entries, schedulers);
            is_put_off |= heard == Heard::Never;
            heard
        };
        let next = self.cache.clear_step(clearing.namespace, clearing.from, &mut ears);
        self.listen();
        match next {
            Some(from) => self.clearing = Some(Clearing { from, is_put_off, ..clearing }),
            None => {
                let Clearing { asker, before, namespace, .. } = clearing;
                let dropped = self.cache.stats().cleared - before;
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
