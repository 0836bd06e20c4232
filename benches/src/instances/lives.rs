//! Which life of the engine it is, seen from a client's process but not through its client.

use super::message::Life;
use kvring_adapter::EngineView;
use kvring_shm_abi::epoch::Epoch;
use kvring_shm_abi::segment::EngineName;

/// Looks at the engine's own segment.
pub(super) struct Lives {
    name: EngineName,
    view: Option<EngineView>,
}

impl Lives {
    /// Of the engine of this name.
    pub(super) fn new(name: EngineName) -> Lives {
        Lives { name, view: None }
    }

    /// The latest life that has served. Two equal answers: there was no other in between.
    pub(super) fn now(&mut self) -> Option<Life> {
        if !self.view.as_ref().is_some_and(EngineView::owner_lives)
            && let Ok(view) = EngineView::open(&self.name)
        {
            // Also that of a dead one: a chunk that was committed in a life counts, however soon that life has ended.
            self.view = Some(view);
        }
        self.view.as_ref().and_then(life_of)
    }
}

/// The life that a segment tells of; none while it recovers.
pub(super) fn life_of(view: &EngineView) -> Option<Life> {
    let incarnation = view.segment.epoch().incarnation();
    Epoch::serves(incarnation).then_some(Life { arena_id: view.identity.arena_id, incarnation })
}
