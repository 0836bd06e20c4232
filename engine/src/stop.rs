//! Asking an engine to stop, while it starts and while it serves.

use kvring_shm_abi::lobby::Lobby;
use kvring_shm_abi::park;
use kvring_shm_abi::sync::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Asks an engine to stop, from any thread. It exists before the engine does, so it also ends a start that waits.
#[derive(Clone)]
pub struct StopHandle(Arc<Shared>);

struct Shared {
    requested: AtomicBool,
    /// Its doorbell wakes the service loop; there is none before the engine has a lobby. A request is made under the
    /// lock: so it comes either before [`StopHandle::wakes`], and is seen by the loop's first look, or rings.
    lobby: Mutex<Option<Lobby>>,
}

impl Default for StopHandle {
    /// A handle for one engine that is about to start.
    fn default() -> StopHandle {
        StopHandle(Arc::new(Shared { requested: AtomicBool::new(false), lobby: Mutex::new(None) }))
    }
}

impl StopHandle {
    /// Ends the engine: its start, with `SetupError::Stopped` and as a start that fails, or its loop, with the current turn.
    pub fn stop(&self) {
        let lobby = self.0.lobby.lock().unwrap_or_else(PoisonError::into_inner);
        // SYNC POINT: Release; pairs with the Acquire in `is_requested`.
        self.0.requested.store(true, Ordering::Release);
        if let Some(lobby) = &*lobby {
            park::notify(lobby.doorbell());
        }
    }

    /// Whether the engine is to end.
    #[inline]
    pub(crate) fn is_requested(&self) -> bool {
        // SYNC POINT: Acquire; pairs with the Release in `stop`.
        self.0.requested.load(Ordering::Acquire)
    }

    /// From now on a request rings this lobby's doorbell.
    pub(crate) fn wakes(&self, lobby: Lobby) {
        *self.0.lobby.lock().unwrap_or_else(PoisonError::into_inner) = Some(lobby);
    }
}
