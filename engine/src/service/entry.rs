//! What the engine knows of each entry of the lobby: one state at a time.
//!
//! ```text
//!         judged                left, or broke the protocol
//! Free ────────────▶ Attached ─────────────────────────────▶ Parting ──▶ Over
//!   │ └─▶ Outdated ─▶ (judged anew)                             ▲          │
//!   └──▶ Over (refused)           dead, from any state ─────────┘◀─────────┘
//!
//! A parting of the dead leads to Free, or to Lingering and by another parting to Free.
//! ```

use super::Service;
use super::connection::Connection;
use super::linger::Lingering;
use crate::cache::Parting;
use kvring_shm_abi::engine_segment::AttachStatus;
use kvring_shm_abi::lobby::Role;

/// An entry's state.
#[allow(
    clippy::large_enum_variant,
    reason = "a table of 64, which is as large as its largest clients in any case"
)]
pub(super) enum Entry {
    /// Nobody has claimed it, or its claim has not been judged yet.
    Free,
    /// Its claim was meant for an earlier engine, under this nonce: its owner will publish another one.
    Outdated { nonce: u64 },
    /// A client is attached.
    Attached(Connection),
    /// Its claim was judged, and nobody is attached: the client was refused or thrown out, or has left. An entry is judged once
    /// for each life of its life word, so that the slots which such a client may still write are not forgotten.
    Over,
    /// What its client had is being taken back.
    Parting(Going),
    /// Its client is marked dead, and the end of the client's process is waited for.
    Lingering(Lingering),
}

/// What follows a parting.
pub(super) enum Then {
    /// The client is told.
    Answer { nonce: u64, status: AttachStatus },
    /// The entry is free.
    Free,
    /// The client lingers: the end of its process is waited for.
    Wait(Lingering),
}

/// A parting, and what follows.
pub(super) struct Going {
    pub(super) parting: Parting,
    pub(super) then: Then,
}

impl Entry {
    #[inline]
    pub(super) fn connection(&self) -> Option<&Connection> {
        if let Entry::Attached(connection) = self { Some(connection) } else { None }
    }

    #[inline]
    pub(super) fn connection_mut(&mut self) -> Option<&mut Connection> {
        if let Entry::Attached(connection) = self { Some(connection) } else { None }
    }

    /// Does its client linger, now or after its parting?
    pub(super) fn lingers(&self) -> bool {
        match self {
            Entry::Parting(going) => matches!(going.then, Then::Wait(_)),
            Entry::Lingering(_) => true,
            _ => false,
        }
    }
}

impl Service {
    /// Sets the entry's state, and returns the one before.
    pub(super) fn becomes(&mut self, entry: usize, state: Entry) -> Entry {
        let bit = 1 << entry;
        let set = |bits: &mut u64, is_set| *bits = if is_set { *bits | bit } else { *bits & !bit };
        set(&mut self.active, matches!(state, Entry::Attached(_)));
        let is_scheduler = state.connection().is_some_and(|connection| connection.role == Role::Scheduler);
        set(&mut self.schedulers, is_scheduler);
        set(&mut self.parting, matches!(state, Entry::Parting(_)));
        let before = core::mem::replace(&mut self.entries[entry], state);
        // Whoever is gone need not be heard.
        self.heard_some();
        before
    }
}
