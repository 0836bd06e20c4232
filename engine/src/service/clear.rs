//! Clearing, a piece per turn: a million chunks take longer than anybody's lookup may wait.

use super::Service;
use crate::stats::Stat;
use kvring_shm_abi::message::{Ident, Status};

/// Chunks looked at in one turn.
const CHUNKS_PER_TURN: u32 = 256;

/// A clear that is under way.
pub(super) struct Clearing {
    entry: usize,
    operation: u16,
    ident: Ident,
    namespace: Option<u32>,
    /// The chunk to go on with.
    from: u32,
    dropped: u64,
}

impl Service {
    /// Begins a clear; false when one is under way already.
    pub(super) fn begin_clear(
        &mut self,
        entry: usize,
        operation: u16,
        ident: Ident,
        namespace: Option<u32>,
    ) -> bool {
        let free = self.clearing.is_none();
        if free {
            self.stat(Stat::Clears, 1);
            self.clearing = Some(Clearing { entry, operation, ident, namespace, from: 0, dropped: 0 });
        }
        free
    }

    /// The next piece. True while there was something to do.
    pub(super) fn go_on_clearing(&mut self) -> bool {
        let Some(mut clearing) = self.clearing.take() else { return false };
        let visible = |service: &Service| service.cache.stats().chunks_visible;
        let before = visible(self);
        let next = self.cache.clear_step(clearing.namespace, clearing.from, CHUNKS_PER_TURN);
        clearing.dropped += before.saturating_sub(visible(self));
        match next {
            Some(from) => self.clearing = Some(Clearing { from, ..clearing }),
            None => {
                let Clearing { entry, operation, ident, dropped, .. } = clearing;
                // A client that has left meanwhile, and whoever has its entry now, is not answered.
                if self.connections[entry].as_ref().is_some_and(|connection| connection.ident == ident) {
                    self.complete(entry, operation, ident, Status::Ok, [dropped, 0, 0, 0]);
                    if let Some(connection) = &mut self.connections[entry] {
                        connection.announce();
                    }
                }
            }
        }
        true
    }
}
