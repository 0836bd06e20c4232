//! After a restart, clients of the earlier engine come back and declare what they still hold.
//!
//! A living client keeps its life word, and with it its entry. So the slots that were reserved for that entry are its own,
//! and it needs no other proof than to say so on that entry's channel. When it says that it has declared everything, the
//! slots that it was writing and did not declare are freed. Until all clients have said so, or [`Awaited::grace_ns`] has
//! passed, nothing is evicted, cleared or forgotten.

use super::Service;
use super::done::Done;
use crate::stats::Stat;
use kvring_shm_abi::failpoint::{self, Place};
use kvring_shm_abi::futex::monotonic_ns;
use kvring_shm_abi::message::Status;

impl Service {
    /// Begins the grace, when serving begins and clients are awaited.
    pub(super) fn await_clients(&mut self) {
        if self.awaited.entries != 0 {
            self.awaited.until_ns = monotonic_ns().saturating_add(self.awaited.grace_ns);
            self.cache.hold_evictions(true);
        } else {
            self.evict_from_now_on();
        }
    }

    /// Nobody is waited for any more: evicting and clearing may begin. Schedulers that have not come back are told first that
    /// what they find now is not held for them.
    fn evict_from_now_on(&mut self) {
        let engine = &self.segments.engine;
        // Even: this may be called just before serving begins.
        engine.terms().set_evicting(engine.epoch().incarnation().wrapping_add(1) & !1);
        self.cache.hold_evictions(false);
    }

    /// Are clients of the earlier engine awaited? Until they are back, or the grace is over, nothing is evicted, cleared or
    /// forgotten, because they may hold it.
    pub(super) fn is_awaiting(&self) -> bool {
        self.cache.evictions_held()
    }

    /// This client is no longer awaited: it has declared everything, or is gone.
    pub(super) fn no_longer_awaited(&mut self, entry: usize) {
        let before = self.awaited.entries;
        self.awaited.entries &= !(1 << entry);
        if before != 0 && self.awaited.entries == 0 {
            self.evict_from_now_on();
            tracing::info!("every client of the earlier engine has come back, or is gone");
        }
    }

    /// Ends the grace when its time has come: a client that does not come back (stopped, perhaps) no longer keeps the others'
    /// stores from evicting. The slots that it was writing stay its own; chunks that it has leased may be evicted, and its
    /// loads of them then fail their check.
    pub(super) fn look_at_grace(&mut self, now: u64) {
        if self.awaited.entries != 0 && now >= self.awaited.until_ns {
            self.awaited.until_ns = u64::MAX;
            self.evict_from_now_on();
            let missing = self.awaited.entries.count_ones();
            tracing::warn!(
                missing,
                "clients of the earlier engine have not come back; evicting and clearing go on without them"
            );
        }
    }

    /// The client has declared everything: frees, in pieces, the slots that it was writing and did not declare.
    pub(super) fn declare_end(&mut self, entry: usize, freed: &mut u32) -> Done {
        failpoint::here(Place::DeclareEnd);
        let before = *freed;
        let is_over = self.cache.declare_end(entry as u8, freed);
        self.stat(Stat::SlotsUndeclared, u64::from(*freed - before));
        if !is_over {
            return Done::More;
        }
        failpoint::here(Place::DeclareEnded);
        self.no_longer_awaited(entry);
        Done::Answer(Status::Ok, [u64::from(*freed), 0, 0, 0])
    }
}
