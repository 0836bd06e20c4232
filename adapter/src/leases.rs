//! What this scheduler holds: the chunks that its lookups have found and that nobody may evict until they are released.
//!
//! A lookup reads the engine's tables by itself, and enters here what it has found ([`Leases::hold`]). All of the protocol of
//! [`kvring_shm_abi::lookup`] that is the scheduler's happens there, under one lock: the hold is entered, the engine is told by
//! a message that nobody waits for, and then the chunks are looked at once more. So whatever a caller has been answered is
//! either known to the engine that may evict it, or in the list of what it is to be told.
//!
//! What the engine has not been told is told as soon as there is room: by the next call here, or by the keeper. While the
//! keeper declares everything to a new engine, that list has all leases that are still to be declared.

use crate::at::At;
use crate::link::{Link, Pending, Undo};
use kvring_shm_abi::chunk::ChunkWord;
use kvring_shm_abi::engine_segment::ClientShare;
use kvring_shm_abi::failpoint::{self, Rule};
use kvring_shm_abi::lookup::{self, Marked};
use kvring_shm_abi::message::{HOLD_MAX, Request};
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// (session, admission)
pub(crate) type Name = (u64, u32);

/// What a lookup has found.
pub(crate) struct Found<'a> {
    pub(crate) name: Name,
    pub(crate) namespace: u32,
    /// Bytes of the slots of one chunk.
    pub(crate) chunk_bytes: u64,
    pub(crate) words: &'a [ChunkWord],
}

/// What of it is held now.
pub(crate) struct Kept {
    pub(crate) words: Arc<[ChunkWord]>,
    /// There was more, but the client holds as much as it may.
    pub(crate) is_cut: bool,
    /// The nonce of the attachment by which the engine has been told, or is to be.
    pub(crate) told: u64,
}

/// A piece of a lease that is to be declared to a new engine.
pub(crate) struct Piece {
    /// The releases that are due before it. What is released later may be what the piece declares, so it is sent after that.
    pub(crate) owed: Vec<Request>,
    pub(crate) name: Name,
    pub(crate) namespace: u32,
    /// How many chunks of the lease come before these.
    pub(crate) first: usize,
    pub(crate) words: Vec<ChunkWord>,
    /// The lease ends with them.
    pub(crate) is_last: bool,
}

/// One lease: the first `keep` of `words`.
struct Lease {
    namespace: u32,
    chunk_bytes: u64,
    words: Arc<[ChunkWord]>,
    keep: usize,
    /// How many of them, from the first one on, the engine has been told.
    told: usize,
}

/// Counts what is held, each chunk once, so that it stays within what one client may hold. The engine charges a chunk to one
/// client only, so its own count is never above this one.
#[derive(Default)]
struct Counts {
    /// The leases on each chunk, by the chunk's id.
    leases_of: Vec<u32>,
    bytes: u64,
    pins: u64,
}

struct State {
    at: At,
    held: HashMap<Name, Lease>,
    /// The leases of which the engine has not been told everything, in the order in which it is to be told.
    untold: VecDeque<Name>,
    /// The engine has been told that it has not been told everything.
    is_unpublished: bool,
    /// The nonce of the last attachment by which leases were declared, and the releases that are due there.
    declared_to: u64,
    owed: Vec<Request>,
    counts: Counts,
}

/// See the module's documentation.
#[derive(Default)]
pub(crate) struct Leases {
    state: Mutex<State>,
}

impl Default for State {
    fn default() -> Self {
        State {
            at: At::Nowhere,
            held: HashMap::new(),
            untold: VecDeque::new(),
            is_unpublished: false,
            declared_to: 0,
            owed: Vec::new(),
            counts: Counts::default(),
        }
    }
}

impl Leases {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds as much of what a lookup has found in the tables of `link`'s engine as is there and may be held. If the name has a
    /// lease already, that is given up first.
    pub(crate) fn hold(&self, link: &Link, found: Found<'_>) -> Kept {
        let Found { name, namespace, chunk_bytes, words } = found;
        let mut state = self.state();
        let mut kept = Kept { words: Arc::default(), is_cut: false, told: link.nonce };
        // Which engine knows what is held, and what its marks mean: an engine that lives may have decided already about what
        // it has marked. The tables that were read may also be those of an arena that the keeper has let go of meanwhile.
        let (told, marked) = match &state.at {
            At::Attached(at) if at.arena_id == link.arena_id => match at.reading() {
                Some(reading) => (&**at, reading.marked),
                None => return kept,
            },
            At::Declaring if link.reading().is_some() => (link, Marked::There),
            At::Attached(_) | At::Declaring | At::Nowhere => return kept,
        };
        kept.told = told.nonce;
        let told = told.incarnation;
        state.release(name, 0);
        let terms = link.engine.terms();
        let most = state.room(&terms.share(), link.engine.chunks.len(), words, chunk_bytes);
        kept.is_cut = most < words.len();
        if most == 0 {
            return kept;
        }
        let words: Arc<[ChunkWord]> = words[..most].into();
        state.enter(name, Lease { namespace, chunk_bytes, words: words.clone(), keep: most, told: 0 });
        state.tell();
        if !failpoint::broken(Rule::FenceAfterAHold) {
            lookup::fence();
        }
        let is_evicted_without = terms.is_evicted_without(told);
        let still = if is_evicted_without { 0 } else { link.engine.chunks.still(&words, marked) };
        if still < most {
            state.release(name, still);
        }
        kept.words = if still < most { words[..still].into() } else { words };
        kept
    }

    /// Is the lease of this name, as long as that, one that is known to an engine or declared to the next?
    pub(crate) fn holds(&self, name: Name, keep: usize) -> bool {
        keep == 0 || self.state().held.get(&name).is_some_and(|lease| lease.keep >= keep)
    }

    /// Gives a lease up beyond its first `keep` chunks.
    pub(crate) fn release(&self, name: Name, keep: usize) {
        let mut state = self.state();
        state.release(name, keep);
        state.tell();
    }

    /// Gives up these leases, which are all that a session has.
    pub(crate) fn end_session(&self, session: u64, admissions: &[u32]) {
        let mut state = self.state();
        let mut is_told = false;
        for admission in admissions {
            is_told |= state.cut((session, *admission), 0) > 0;
        }
        if is_told {
            state.send(Request::EndSession { session });
        }
        state.tell();
    }

    /// Keeper: tells the engine what it has not been told, as far as there is room. False: something is left, and the keeper
    /// has to come back.
    pub(crate) fn tell(&self) -> bool {
        let mut state = self.state();
        state.tell();
        !state.is_unpublished
    }

    /// Keeper: takes stock for the attachment with this nonce, if there is one yet, by which everything is to be declared. What an
    /// earlier attempt has declared by the same attachment stays declared, and its releases stay due: to declare it again would
    /// unpin it for a moment.
    ///
    /// If an earlier attempt has sent its `DeclareEnd` by this attachment, the engine may hear that at any time, and then evicts
    /// what it has not been told. So the leases stay where they are, and what is held from now on is told as usual.
    pub(crate) fn begin_declaring(&self, nonce: Option<u64>) {
        let mut state = self.state();
        if matches!(&state.at, At::Attached(at) if Some(at.nonce) == nonce) {
            state.tell();
            return;
        }
        let before = core::mem::replace(&mut state.at, At::Declaring);
        let State { held, untold, owed, declared_to, .. } = &mut *state;
        let is_another = nonce.is_some_and(|nonce| core::mem::replace(declared_to, nonce) != nonce);
        if is_another {
            owed.clear();
        }
        untold.clear();
        for (name, lease) in held {
            lease.told = if is_another { 0 } else { lease.told };
            if lease.told < lease.keep {
                untold.push_back(*name);
            }
        }
        drop(state);
        // Dropped outside the lock, because this may unmap a channel.
        drop(before);
    }

    /// Keeper: the next piece that is to be declared. From here on the engine may have it, so its release is due.
    pub(crate) fn next_to_declare(&self) -> Option<Piece> {
        let mut state = self.state();
        if !matches!(state.at, At::Declaring) {
            return None;
        }
        let State { held, untold, owed, .. } = &mut *state;
        loop {
            let name = *untold.front()?;
            if let Some(lease) = held.get_mut(&name).filter(|lease| lease.told < lease.keep) {
                let (first, words) = (lease.told, lease.untold().to_vec());
                lease.told += words.len();
                let is_last = lease.told == lease.keep;
                let (owed, namespace) = (core::mem::take(owed), lease.namespace);
                return Some(Piece { owed, name, namespace, first, words, is_last });
            }
            untold.pop_front();
        }
    }

    /// Keeper: this piece could not be sent after all.
    pub(crate) fn not_declared(&self, piece: &Piece) {
        // It may have been cut meanwhile. Another lease may have the name by now: of that, nothing has been told.
        if let Some(lease) = self.state().held.get_mut(&piece.name) {
            lease.told = lease.told.min(piece.first);
        }
    }

    /// Keeper: the engine does not have all chunks of this piece, so it takes none of those behind it either.
    pub(crate) fn declared_in_part(&self, piece: &Piece) {
        if let Some(lease) = self.state().held.get_mut(&piece.name)
            // Another lease may have the name by now.
            && lease.told == piece.first + piece.words.len()
        {
            lease.told = lease.keep;
        }
    }

    /// Keeper: if everything has been declared, says so by `DeclareEnd` and moves the leases to this attachment, in one step:
    /// what is held from now on is told to this engine, after that. If an earlier attempt has moved them already, it only says so
    /// once more. `None`: something is still to be declared.
    pub(crate) fn end_declaring(&self, link: &Arc<Link>) -> Option<Result<Pending, crate::error::CallError>> {
        let mut state = self.state();
        let State { at, held, untold, .. } = &*state;
        let is_moved = matches!(at, At::Attached(at) if at.nonce == link.nonce);
        if !is_moved && untold.iter().any(|name| held.get(name).is_some_and(|lease| lease.told < lease.keep))
        {
            return None;
        }
        let sent = link.submit(0, |_| Undo::Nothing, |_, _| Request::DeclareEnd);
        if sent.is_ok() && !is_moved {
            state.attach(link);
        }
        Some(sent)
    }

    /// Keeper: moves the leases to the first attachment of a claim; there are none yet.
    pub(crate) fn attached(&self, link: &Arc<Link>) {
        self.state().attach(link);
    }

    /// Keeper: no engine holds any of these leases any more.
    pub(crate) fn forget(&self) {
        let before = core::mem::take(&mut *self.state());
        drop(before);
    }
}

impl Lease {
    /// The next chunks that the engine is to be told of, as many as a message may name.
    fn untold(&self) -> &[ChunkWord] {
        &self.words[self.told..self.keep.min(self.told + HOLD_MAX)]
    }
}

impl State {
    /// Enters a lease, of which the engine is to be told. The name has none. A release of an earlier one stays due: if the second
    /// look finds nothing of this lease, the engine never hears of it.
    fn enter(&mut self, name: Name, lease: Lease) {
        self.held.insert(name, lease);
        // An engine that does not read may leave the names of leases here that have been released since.
        if self.untold.len() > 2 * self.held.len() {
            let held = &self.held;
            self.untold.retain(|name| held.get(name).is_some_and(|lease| lease.told < lease.keep));
        }
        self.untold.push_back(name);
    }

    /// How many of these chunks may be held in one more lease; they are counted.
    fn room(&mut self, share: &ClientShare, ids: u32, words: &[ChunkWord], chunk_bytes: u64) -> usize {
        if self.held.len() >= share.leases as usize {
            return 0;
        }
        let Counts { leases_of, bytes, pins } = &mut self.counts;
        if leases_of.len() < ids as usize {
            // Zeroed memory, of which only what is used is touched. The arena is the first one, or another one.
            *leases_of = vec![0; ids as usize];
        }
        let mut most = 0;
        for word in words {
            let Some(leases) = leases_of.get_mut(word.chunk() as usize) else { break };
            let costs = if *leases == 0 { chunk_bytes } else { 0 };
            if *pins >= u64::from(share.pins) || bytes.saturating_add(costs) > share.bytes {
                break;
            }
            (*leases, *bytes, *pins) = (*leases + 1, *bytes + costs, *pins + 1);
            most += 1;
        }
        most
    }

    /// Cuts a lease to its first `keep` chunks. Returns how many of those beyond the engine has been told.
    fn cut(&mut self, name: Name, keep: usize) -> usize {
        let Some(lease) = self.held.get_mut(&name).filter(|lease| keep < lease.keep) else { return 0 };
        for word in &lease.words[keep..lease.keep] {
            let Some(leases) = self.counts.leases_of.get_mut(word.chunk() as usize) else { continue };
            *leases = leases.saturating_sub(1);
            self.counts.bytes -= if *leases == 0 { lease.chunk_bytes.min(self.counts.bytes) } else { 0 };
            self.counts.pins -= 1;
        }
        let told = lease.told.saturating_sub(keep);
        (lease.keep, lease.told) = (keep, lease.told.min(keep));
        if keep == 0 {
            self.held.remove(&name);
        }
        told
    }

    fn release(&mut self, (session, admission): Name, keep: usize) {
        if self.cut((session, admission), keep) > 0 {
            self.send(Request::Release { session, admission, keep: keep as u32 });
        }
    }

    /// Sends a release now, or leaves it to be sent with the next lease that is declared, or behind all of them.
    fn send(&mut self, request: Request) {
        match &self.at {
            At::Attached(link) => link.post_quietly(request),
            At::Declaring => self.owed.push(request),
            At::Nowhere => {}
        }
    }

    /// Tells the engine what it has not been told, as far as there is room for that.
    fn tell(&mut self) {
        let At::Attached(link) = &self.at else { return };
        if self.untold.is_empty() || link.alive().is_err() {
            // The keeper will declare everything to the next engine.
            return;
        }
        while let Some((session, admission)) = self.untold.front().copied() {
            let Some(lease) = self.held.get_mut(&(session, admission)) else {
                self.untold.pop_front();
                continue;
            };
            while lease.told < lease.keep {
                let words = lease.untold();
                if !link.publish_hold(session, admission, lease.namespace, lease.told as u32, words) {
                    // Before the fence: an engine that evicts sees this, or the lookup sees its mark.
                    link.unpublished().set();
                    // Once: the keeper, which also comes here, comes back by itself until nothing is left.
                    if !core::mem::replace(&mut self.is_unpublished, true) {
                        link.leave_to_keeper();
                    }
                    return;
                }
                lease.told += words.len();
            }
            self.untold.pop_front();
        }
        if core::mem::take(&mut self.is_unpublished) {
            link.unpublished().clear();
        }
    }

    fn attach(&mut self, link: &Arc<Link>) {
        self.at = At::Attached(link.clone());
        self.is_unpublished = false;
        for request in core::mem::take(&mut self.owed) {
            link.post_quietly(request);
        }
        self.tell();
    }
}

#[cfg(test)]
mod tests;
