//! The engine's side of reads: it hears what schedulers hold, and evicts in two halves.

use super::bounds::{Break, ENTRIES};
use super::engine::ENGINE;
use super::state::{Batch, Busy, Handle, Keeper, Phase, Process, Reader, Record, State, Use, Word};
use super::{Restart, Steps};

impl Restart {
    /// Takes the messages about leases of a client whose channel is read.
    pub(super) fn hear_leases(&self, steps: &mut Steps, client: usize, entry: usize) {
        let who = steps.from.clients[client];
        if let Some(handle) = who.said {
            steps.progress(ENGINE, "hears what is held", |state| self.hold(state, client, entry, handle));
        }
        let is_settled = who.keeper == Keeper::Ready || who.keeper == Keeper::DeclareEnd;
        if let Reader::Releasing(slot) = who.reader
            && is_settled
            && who.said.is_none()
        {
            steps.progress(ENGINE, "ends a lease", |state| {
                state.engine.leases[entry] &= !(1 << slot);
                state.clients[client].reader = Reader::Idle;
            });
        }
    }

    /// An eviction, which may begin whenever nothing forbids it, and goes on for certain.
    pub(super) fn evict_steps(&self, steps: &mut Steps) {
        let state = steps.from;
        match state.engine.batch {
            Batch::None => {
                let grace = state.engine.awaited != 0 && !self.breaks(Break::EvictsInGrace);
                for slot in 0..self.bounds.slots {
                    let is_there = state.slots[slot].record == Record::Visible;
                    if is_there && !is_held(state, slot) && !grace && state.left.evictions > 0 {
                        self.begin_to_evict(steps, slot);
                    }
                }
            }
            Batch::Marked(slot) if self.holds_unpublished(state) => {
                steps.progress(ENGINE, "finds that something is unpublished: spares the chunk", |state| {
                    state.slots[slot as usize].record = Record::Visible;
                    state.engine.batch = Batch::None;
                });
            }
            // The rings are heard first: see `hear_leases`.
            Batch::Marked(_) if self.rings_have_news(state) => {}
            Batch::Marked(slot) => steps.progress(ENGINE, "has heard all rings", |state| {
                state.engine.batch = Batch::Heard(slot);
                if self.breaks(Break::AnnouncesAfterTheMark) {
                    state.evicting = state.incarnation;
                }
                if self.bounds.coarse {
                    self.end_record(state, slot);
                }
            }),
            Batch::Heard(slot) => steps.progress(ENGINE, "drops a chunk: its record ends", |state| {
                self.end_record(state, slot);
            }),
            Batch::Listened(slot) => steps.progress(ENGINE, "marks the record, which ends", |state| {
                state.engine.batch = Batch::None;
                if !is_held(state, slot as usize) {
                    self.end_record(state, slot);
                }
            }),
        }
    }

    fn begin_to_evict(&self, steps: &mut Steps, slot: usize) {
        if !self.breaks(Break::RingsBeforeTheMark) {
            steps.may(ENGINE, "marks a record", |state| {
                state.left.evictions -= 1;
                state.slots[slot].record = Record::Evicting;
                state.engine.batch = Batch::Marked(slot as u8);
            });
        } else if !self.holds_unpublished(steps.from) && !self.rings_have_news(steps.from) {
            steps.may(ENGINE, "has heard all rings", |state| {
                state.left.evictions -= 1;
                state.engine.batch = Batch::Listened(slot as u8);
            });
        }
    }

    /// The record leaves its generation; after that the slot is freed.
    fn end_record(&self, state: &mut State, slot: u8) {
        state.slots[slot as usize].acknowledged = false;
        if self.breaks(Break::FreesTheSlotFirst) {
            self.free(state, slot as usize);
        } else {
            state.slots[slot as usize].end();
        }
        (state.engine.batch, state.engine.busy) = (Batch::None, Busy::Free(slot));
        if self.bounds.coarse {
            self.evicted(state, slot);
        }
    }

    /// The slot of a chunk whose record has ended is freed.
    pub(super) fn evicted(&self, state: &mut State, slot: u8) {
        state.engine.busy = Busy::Idle;
        if self.breaks(Break::FreesTheSlotFirst) {
            state.slots[slot as usize].end();
        } else {
            self.free(state, slot as usize);
        }
    }

    /// Does a client that is listened to hold what it could not publish?
    fn holds_unpublished(&self, state: &State) -> bool {
        let ignores = self.breaks(Break::IgnoresUnpublished);
        self.any_heard(state, |client| state.clients[client].unpublished && !ignores)
    }

    /// Has a client that is listened to said what the engine has not heard?
    fn rings_have_news(&self, state: &State) -> bool {
        self.any_heard(state, |client| state.clients[client].said.is_some())
    }

    fn any_heard(&self, state: &State, is: impl Fn(usize) -> bool) -> bool {
        (0..self.bounds.clients).any(|client| {
            let who = &state.clients[client];
            let connected = state.engine.connected[who.entry as usize];
            who.owns() && state.is_current(client) && connected == who.accepts && is(client)
        })
    }

    /// A client is not awaited any more. After the last one evictions may begin.
    pub(super) fn no_longer_awaited(&self, state: &mut State, entry: u8) {
        let before = state.engine.awaited;
        state.engine.awaited &= !(1 << entry);
        if before != 0 && state.engine.awaited == 0 {
            self.evict_from_now_on(state);
        }
    }

    /// Recovery is complete: the clients that live are awaited.
    pub(super) fn await_clients(&self, state: &mut State) {
        state.incarnation += 1;
        state.engine.phase = Phase::Serving;
        for entry in 0..ENTRIES {
            if matches!(state.words[entry], Word::Alive(_)) {
                state.engine.awaited |= 1 << entry;
            }
        }
        if state.engine.awaited == 0 {
            self.evict_from_now_on(state);
        }
    }

    /// Nobody is waited for any more. Clients that have told this engine nothing are told so first.
    fn evict_from_now_on(&self, state: &mut State) {
        if !self.breaks(Break::AnnouncesAfterTheMark) {
            state.evicting = state.incarnation;
        }
    }

    /// The grace is over. From now on schedulers that have not come back find nothing, and what they hold may be evicted.
    pub(super) fn grace_is_over(&self, state: &mut State) {
        for client in 0..self.bounds.clients {
            let who = state.clients[client];
            let awaited =
                who.owns() && state.is_current(client) && state.engine.awaited & (1 << who.entry) != 0;
            if awaited && who.process == Process::Alive && who.answered().is_some() {
                state.clients[client].late = state.incarnation;
            }
        }
        state.engine.awaited = 0;
        self.evict_from_now_on(state);
    }

    /// The engine hears a `Hold`: it pins the chunk if that is there, and spares it if it is marked.
    fn hold(&self, state: &mut State, client: usize, entry: usize, handle: Handle) {
        state.clients[client].said = None;
        let slot = &mut state.slots[handle.slot as usize];
        if !slot.has(handle) {
            return;
        }
        state.engine.leases[entry] |= 1 << handle.slot;
        let is_marked =
            matches!(state.engine.batch, Batch::Marked(at) | Batch::Heard(at) if at == handle.slot);
        if is_marked && !self.breaks(Break::DropsWhatIsHeld) {
            slot.record = Record::Visible;
            state.engine.batch = Batch::None;
        }
    }

    /// Recovery: the records of chunks. True when one had to be shown again.
    pub(super) fn must_be_shown(&self, state: &State, slot: usize) -> bool {
        let at = &state.slots[slot];
        let keeps = at.record == Record::Evicting && self.breaks(Break::KeepsMarks);
        at.used == Use::Committed && at.record != Record::Visible && !keeps
    }
}

fn is_held(state: &State, slot: usize) -> bool {
    state.engine.leases.iter().any(|leases| leases & (1 << slot) != 0)
}

/// Its engine has died: nobody reads what lies in the rings.
pub(super) fn forget_rings(state: &mut State) {
    for who in &mut state.clients {
        (who.said, who.ends, who.unpublished) = (None, false, false);
    }
}
