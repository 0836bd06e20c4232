//! The leases that the engine holds for this scheduler, kept here so that the keeper can declare them to a new engine,
//! and so that each is released exactly once.
//!
//! A lease is entered when its lookup's answer is taken, and leaves when it is released. Once the keeper has taken
//! stock for the next engine, an answer of the engine before is not accepted, because no engine holds a lease for it.
//! If a lease is released while the keeper declares leases to a new engine, the release is sent there afterwards.

use crate::at::At;
use crate::link::Link;
use kvring_shm_abi::chunk::ChunkWord;
use kvring_shm_abi::message::Request;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// (session, admission)
type Name = (u64, u32);

/// One lease.
#[derive(Clone)]
pub(crate) struct Lease {
    pub(crate) session: u64,
    pub(crate) admission: u32,
    pub(crate) namespace: u32,
    /// What the lookup found.
    pub(crate) found: Arc<[ChunkWord]>,
    /// How many of its chunks are still wanted.
    pub(crate) keep: u32,
}

/// A lookup for which an engine may hold a lease.
#[derive(Clone, Copy)]
pub(crate) struct Asking {
    pub(crate) admission: u32,
    /// The nonce of the attachment through which it was sent.
    pub(crate) nonce: u64,
    /// How many of its chunks are still wanted.
    pub(crate) keep: u32,
}

struct State {
    at: At,
    held: HashMap<Name, Lease>,
    /// Releases that are due once everything has been declared.
    owed: Vec<Request>,
}

/// See the module's documentation.
pub(crate) struct Leases {
    state: Mutex<State>,
}

impl Default for Leases {
    fn default() -> Self {
        Leases { state: Mutex::new(State { at: At::Nowhere, held: HashMap::new(), owed: Vec::new() }) }
    }
}

impl Leases {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters the lease of an answer that came through `link`. False: that is not the current attachment any more, and
    /// no engine holds the lease.
    pub(crate) fn accept(&self, link: &Arc<Link>, lease: Lease) -> bool {
        let mut state = self.state();
        let is_current = state.at.is(link);
        if is_current {
            state.held.insert((lease.session, lease.admission), lease);
        }
        is_current
    }

    /// Gives a lease up beyond its first `keep` chunks. `asked` is the nonce of the attachment through which its lookup
    /// was sent: if that is the current one, the engine may hold a lease whose answer nobody has taken.
    pub(crate) fn release(&self, session: u64, admission: u32, keep: u32, asked: u64) {
        let mut state = self.state();
        let known = match state.held.get_mut(&(session, admission)) {
            Some(lease) if keep > 0 => {
                lease.keep = lease.keep.min(keep);
                true
            }
            Some(_) => state.held.remove(&(session, admission)).is_some(),
            None => false,
        };
        state.send(known, |nonce| nonce == asked, Request::Release { session, admission, keep });
    }

    /// Gives up all leases of a session.
    pub(crate) fn end_session(&self, session: u64, admissions: &[Asking]) {
        let mut state = self.state();
        let mut known = false;
        for asking in admissions {
            known |= state.held.remove(&(session, asking.admission)).is_some();
        }
        let asked = |nonce| admissions.iter().any(|asking| asking.nonce == nonce);
        state.send(known, asked, Request::EndSession { session });
    }

    /// Keeper: takes stock for a new engine and returns the leases to declare. Releases stay due: an earlier attempt
    /// may have declared these leases to the same engine, and to any other engine the release does nothing.
    pub(crate) fn begin_declaring(&self) -> Vec<Lease> {
        let mut state = self.state();
        let before = core::mem::replace(&mut state.at, At::Declaring);
        let held = state.held.values().cloned().collect();
        drop(state);
        // Dropped outside the lock, because this may unmap a channel.
        drop(before);
        held
    }

    /// Keeper: moves the leases to a new attachment, and sends it the releases that are due.
    pub(crate) fn attached(&self, link: &Arc<Link>) {
        let mut state = self.state();
        state.at = At::Attached(link.clone());
        let owed = core::mem::take(&mut state.owed);
        drop(state);
        // Sent outside the lock: these are system calls, and a scheduler may be waiting to release something.
        for request in owed {
            link.post(request);
        }
    }

    /// Keeper: no engine holds any of these leases any more.
    pub(crate) fn forget(&self) {
        let mut state = self.state();
        state.at = At::Nowhere;
        state.held.clear();
        state.owed.clear();
    }
}

impl State {
    /// Sends a release now, or leaves it to be sent after declaring. `known`: the lease was entered here. `asked`: may
    /// the attachment with this nonce hold a lease whose answer has not been taken?
    fn send(&mut self, known: bool, asked: impl Fn(u64) -> bool, request: Request) {
        match &self.at {
            At::Attached(link) if known || asked(link.nonce) => link.post(request),
            // The keeper may have declared the lease already.
            At::Declaring if known => self.owed.push(request),
            At::Attached(_) | At::Declaring | At::Nowhere => {}
        }
    }
}
