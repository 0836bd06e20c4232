//! Listening to schedulers before chunks are dropped: see [`kvring_shm_abi::lookup`] for the protocol, and `cache/mark.rs` for
//! its other half.
//!
//! The cache asks whether everything that schedulers have said is heard ([`Service::heard`]). If not, the loop goes on serving
//! as always, and counts: a scheduler *has been heard* when its ring was seen empty, or when as many messages as a ring is deep
//! were taken from it, because it cannot have had more in it at the time of the fence. When all have been heard the cache
//! decides. So that takes as long as the engine takes to read what is there, and no client can make it longer.

use super::entry::Entry;
use super::{CLIENTS_MAX, Service};
use crate::cache::Heard;
use kvring_shm_abi::lookup;
use kvring_shm_abi::ring::DEPTH;

/// Whom the engine has to hear before it may drop what is marked.
pub(super) struct Listening {
    /// For which batch of marked chunks.
    batch: u64,
    /// A bit for each entry whose scheduler has not been heard.
    unheard: u64,
    /// How many messages of each have been taken since the fence.
    taken: [u16; CLIENTS_MAX],
}

/// The bits that are set.
fn each(mut bits: u64) -> impl Iterator<Item = usize> {
    core::iter::from_fn(move || {
        let bit = (bits != 0).then(|| bits.trailing_zeros() as usize)?;
        bits &= bits - 1;
        Some(bit)
    })
}

impl Service {
    /// Is everything heard that schedulers have said? To be asked after chunks were marked.
    pub(super) fn heard(entries: &[Entry], schedulers: u64) -> Heard {
        lookup::fence();
        let mut heard = Heard::All;
        for entry in each(schedulers) {
            let Some(connection) = entries[entry].connection() else { continue };
            // Before the look at the ring: a client says that it has published everything after it has.
            if connection.has_unpublished() {
                return Heard::Never;
            }
            if connection.has_news() {
                heard = Heard::NotYet;
            }
        }
        heard
    }

    /// Begins to listen if the cache waits for that, and the engine does not listen for these chunks yet. (It may still listen for
    /// others, all of which were spared meanwhile.)
    pub(super) fn listen(&mut self) {
        let Some(batch) = self.cache.awaits() else { return };
        if self.listening.as_ref().is_none_or(|listening| listening.batch != batch) {
            self.listening = Some(Listening { batch, unheard: self.schedulers, taken: [0; CLIENTS_MAX] });
            self.heard_some();
        }
    }

    /// This client was served, and so many of its messages were taken.
    #[inline]
    pub(super) fn heard_from(&mut self, entry: usize, messages: u32) {
        let Some(listening) = &mut self.listening else { return };
        let bit = 1 << entry;
        if listening.unheard & bit == 0 {
            return;
        }
        let taken = &mut listening.taken[entry];
        *taken = taken.saturating_add(messages as u16);
        let is_done = self.entries[entry].connection().is_none_or(|connection| {
            // The last message that was taken may not have been done yet; when there is one more, it has.
            let enough = DEPTH + usize::from(connection.doing.is_some());
            !connection.has_news() || usize::from(*taken) >= enough
        });
        if is_done {
            listening.unheard &= !bit;
            self.heard_some();
        }
    }

    /// Lets the cache decide when all schedulers that are still there have been heard.
    pub(super) fn heard_some(&mut self) {
        if let Some(listening) = &mut self.listening {
            listening.unheard &= self.schedulers;
            if listening.unheard == 0 {
                let batch = listening.batch;
                self.listening = None;
                self.cache.heard(batch);
            }
        }
    }

    /// A scheduler that cannot say what it holds keeps everybody's stores from making room. It is believed for the grace that a
    /// client has to come back after a restart; after that it has to say everything before it is believed again.
    pub(super) fn look_at_unpublished(&mut self, now: u64) {
        let grace = self.awaited.grace_ns;
        for entry in each(self.schedulers) {
            if let Some(connection) = self.entries[entry].connection_mut()
                && connection.doubts_unpublished(now, grace)
            {
                tracing::warn!(
                    entry,
                    name = connection.name,
                    "a scheduler has not said what it holds for too long; evicting goes on without it"
                );
            }
        }
    }
}
