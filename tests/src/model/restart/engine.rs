//! The engine: its start, its recovery, and the work of its only thread.

use super::bounds::{Break, SLOTS};
use super::state::{
    Answer, Busy, Engine, Entry, Grant, Keeper, Mover, NONE, Phase, Process, Record, Slot, State, Use, Word,
};
use super::{Restart, Steps};

pub(super) const ENGINE: &str = "engine";

/// Steps of a reclaim: leases and attachment; each slot; channel and entry; the word.
const RECLAIM_SLOTS: u8 = 1;
const RECLAIM_ENTRY: u8 = RECLAIM_SLOTS + SLOTS as u8;
const RECLAIM_WORD: u8 = RECLAIM_ENTRY + 1;
const RECLAIMED: u8 = RECLAIM_WORD + 1;

impl Restart {
    /// What the engine can do next.
    pub(super) fn engine_steps(&self, steps: &mut Steps) {
        let state = steps.from;
        match state.engine.phase {
            Phase::Down if self.bounds.coarse => {
                steps.progress(ENGINE, "a new one takes all its words", |state| {
                    state.incarnation = self.next_incarnation(state);
                    (state.owner_alive, state.words_alive, state.words_by) = (true, true, state.incarnation);
                    state.engine.phase = Phase::Scan(0);
                })
            }
            Phase::Down => steps.progress(ENGINE, "a new one takes the owner word", |state| {
                state.owner_alive = true;
                state.engine.phase = Phase::Owner;
            }),
            Phase::Ended if self.breaks(Break::OwnerMarkedFirst) => {
                steps.progress("kernel", "marks the engine's owner word", |state| {
                    state.owner_alive = false;
                    state.marking = if state.words_alive { state.words_by } else { 0 };
                    state.engine.phase = Phase::Down;
                });
            }
            Phase::Ended => steps.progress("kernel", "marks the engine's words", mark),
            Phase::Owner | Phase::Half => {
                let first = state.engine.phase == Phase::Owner;
                let next = if first { Phase::Half } else { Phase::Scan(0) };
                if first == self.breaks(Break::WordsBeforeOdd) {
                    let by = if first { self.next_incarnation(state) } else { state.incarnation };
                    steps.progress(ENGINE, "takes over the clients' life words", |state| {
                        state.words_alive = true;
                        state.words_by = by;
                        state.engine.phase = next;
                    });
                } else {
                    let incarnation = self.next_incarnation(state);
                    steps.progress(ENGINE, "stores the incarnation of a recovery", |state| {
                        state.incarnation = incarnation;
                        state.engine.phase = next;
                    });
                }
            }
            Phase::Scan(from) => self.scan(steps, from),
            Phase::Serving => self.serve(steps),
        }
    }

    fn next_incarnation(&self, state: &State) -> u8 {
        if self.breaks(Break::PlusOne) { state.incarnation + 1 } else { (state.incarnation + 1) | 1 }
    }

    /// Recovery: the next slot that is WRITING, or whose chunk has to be shown, or the end.
    fn scan(&self, steps: &mut Steps, from: u8) {
        let state = steps.from;
        for slot in from as usize..self.bounds.slots {
            if self.must_be_shown(state, slot) {
                steps.progress(ENGINE, "recovery: shows a chunk again", |state| {
                    state.slots[slot].record = Record::Visible;
                    state.engine.phase = Phase::Scan(slot as u8 + 1);
                });
                return;
            }
            let Use::Writing(owner) = state.slots[slot].used else { continue };
            let lives = matches!(state.words[owner as usize], Word::Alive(_));
            let lingers = self.bounds.waits_for_process && self.lingers(state, owner as usize);
            let keeps = (lives && !self.breaks(Break::RecoveryFreesLiving)) || lingers;
            let what =
                if keeps { "recovery: a WRITING slot stays" } else { "recovery: frees a WRITING slot" };
            steps.progress(ENGINE, what, |state| {
                if !keeps {
                    self.free(state, slot);
                }
                state.engine.phase = Phase::Scan(slot as u8 + 1);
            });
            return;
        }
        steps.progress(ENGINE, "recovery is complete", |state| self.await_clients(state));
    }

    pub(super) fn free(&self, state: &mut State, slot: usize) {
        state.free(slot);
        if self.breaks(Break::RecyclesGenerations) {
            state.slots[slot].generation -= 1;
        }
    }

    fn serve(&self, steps: &mut Steps) {
        let state = steps.from;
        match state.engine.busy {
            Busy::Idle => self.look_around(steps),
            Busy::Reclaim(entry, at) => {
                steps.progress(ENGINE, reclaim_name(at), |state| self.reclaim(state, entry as usize, at));
            }
            Busy::DeclareEnd(entry, from) => {
                steps.progress(ENGINE, "goes on with declare_end", |state| {
                    self.declare_end(state, entry, from)
                });
            }
            Busy::Free(slot) => {
                steps.progress(ENGINE, "frees the slot of what it evicts", |state| self.evicted(state, slot));
            }
            Busy::Acknowledge(client) => {
                steps.progress(ENGINE, "answers the commit or abort", |state| {
                    acknowledge(state, client as usize)
                });
            }
        }
    }

    fn look_around(&self, steps: &mut Steps) {
        let state = steps.from;
        for entry in 0..self.bounds.entries {
            let gone = !self.bounds.waits_for_process || !self.lingers(state, entry);
            match state.words[entry] {
                Word::Dead if gone => {
                    let first = if self.breaks(Break::ResetsBeforeReclaim) { RECLAIM_WORD } else { 0 };
                    steps.progress(ENGINE, reclaim_name(first), |state| self.reclaim(state, entry, first));
                }
                Word::Alive(_) => self.judge(steps, entry),
                Word::Unclaimed | Word::Dead => {}
            }
        }
        for client in 0..self.bounds.clients {
            let (who, entry) = (&state.clients[client], state.clients[client].entry as usize);
            if !who.owns() || !state.is_current(client) {
                continue;
            }
            match who.mover {
                Mover::Reserving(key, channel) if state.engine.connected[entry] == channel => {
                    steps.progress(ENGINE, "answers the reservation", |state| {
                        self.reserve(state, client, key, channel);
                    });
                }
                Mover::Sent(grant, commits, channel) if state.engine.connected[entry] == channel => {
                    let what = if commits { "commits" } else { "aborts" };
                    steps.progress(ENGINE, what, |state| {
                        self.settle(state, client, grant, commits);
                        if self.bounds.coarse {
                            acknowledge(state, client);
                        }
                    });
                }
                _ => {}
            }
            if state.engine.connected[entry] == who.nonce {
                self.hear(steps, client, entry);
            }
            if state.engine.connected[entry] == who.accepts {
                self.hear_leases(steps, client, entry);
            }
        }
        if state.engine.awaited != 0 {
            steps.progress(ENGINE, "the grace time is over", |state| self.grace_is_over(state));
        }
        self.evict_steps(steps);
    }

    /// Does a thread of the entry's dead owner still run?
    fn lingers(&self, state: &State, entry: usize) -> bool {
        state.clients.iter().any(|client| {
            client.process != Process::Alive
                && client.entry as usize == entry
                && matches!(client.mover, Mover::Copying(_))
        })
    }

    /// Judges an entry that was published: attached, or stale.
    fn judge(&self, steps: &mut Steps, entry: usize) {
        let state = steps.from;
        let Entry { ready, nonce, incarnation } = state.entries[entry];
        let judged = state.engine.judged[entry];
        let is_new = if self.breaks(Break::JudgesOnce) { judged == NONE } else { judged != nonce };
        if !ready || !is_new {
            return;
        }
        let is_mine = incarnation == state.incarnation || self.breaks(Break::JudgesAnyIncarnation);
        let attached = is_mine && state.files[entry] == nonce;
        let what = if attached { "judges an entry: attached" } else { "judges an entry: stale" };
        steps.progress(ENGINE, what, |state| {
            state.engine.judged[entry] = nonce;
            state.engine.connected[entry] = if attached { nonce } else { NONE };
            // Nothing has been declared through this attachment yet.
            for slot in 0..SLOTS {
                if state.slots[slot].used == Use::Writing(entry as u8) {
                    state.engine.adopted &= !(1 << slot);
                }
            }
            state.answers[entry] = Answer { nonce, attached, by: state.incarnation };
        });
    }

    /// Takes the messages of a connected client's keeper.
    fn hear(&self, steps: &mut Steps, client: usize, entry: usize) {
        let who = steps.from.clients[client];
        if who.keeper == Keeper::DeclareSlots {
            steps.progress(ENGINE, "hears which slots are being written", |state| {
                if let Some(grant) = who.wrote {
                    adopt(state, entry, grant, false);
                }
                if self.bounds.liar && client == 1 {
                    for slot in 0..SLOTS {
                        let Slot { generation, key, .. } = state.slots[slot];
                        let all = self.breaks(Break::AdoptsOthers);
                        adopt(state, entry, Grant { slot: slot as u8, generation, key }, all);
                    }
                }
                state.clients[client].keeper = Keeper::DeclareLeases;
                if self.bounds.coarse && who.hold().is_none() && who.said.is_none() {
                    self.end_declaring(state, client);
                }
            });
        }
        if who.ends {
            steps.progress(ENGINE, "hears declare_end", |state| {
                state.clients[client].ends = false;
                self.declare_end(state, entry as u8, 0);
            });
        }
    }

    /// Frees the next slot of the entry that was not declared. After the last one the client goes on.
    fn declare_end(&self, state: &mut State, entry: u8, from: u8) {
        for slot in from as usize..self.bounds.slots {
            let named =
                state.engine.adopted & (1 << slot) != 0 && !self.breaks(Break::DeclareEndFreesAdopted);
            if state.slots[slot].used == Use::Writing(entry)
                && !named
                && !self.breaks(Break::NeverFreesUndeclared)
            {
                self.free(state, slot);
                state.engine.busy = Busy::DeclareEnd(entry, slot as u8 + 1);
                return;
            }
        }
        state.engine.busy = Busy::Idle;
        self.no_longer_awaited(state, entry);
        let nonce = state.engine.connected[entry as usize];
        for client in &mut state.clients {
            let asked = client.process == Process::Alive && client.keeper == Keeper::DeclareEnd;
            // It may have asked once more meanwhile.
            if asked && client.nonce == nonce && !client.ends {
                client.keeper = Keeper::Ready;
                client.wrote = None;
                client.reads = client.incarnation;
            }
        }
    }

    /// Grants a slot for a key, unless the key is visible already or there is no room.
    fn reserve(&self, state: &mut State, client: usize, key: u8, channel: u8) {
        let entry = state.clients[client].entry;
        let visible = state.slots.iter().any(|slot| slot.used == Use::Committed && slot.key == key);
        let free = state.slots[..self.bounds.slots].iter().position(|slot| slot.used == Use::Free);
        state.clients[client].mover = Mover::Idle;
        if let (false, Some(slot)) = (visible, free) {
            let to = &mut state.slots[slot];
            *to = Slot { used: Use::Writing(entry), key, ..*to };
            let grant = Grant { slot: slot as u8, generation: to.generation, key };
            state.clients[client].mover = Mover::Answered(grant, channel);
            state.engine.adopted |= 1 << slot;
        }
    }

    /// A commit or an abort: done, done already, or gone.
    fn settle(&self, state: &mut State, client: usize, grant: Grant, commits: bool) {
        state.engine.busy = Busy::Acknowledge(client as u8);
        let (entry, slot) = (state.clients[client].entry, grant.slot as usize);
        if state.slots[slot].used != Use::Writing(entry) || !state.is(grant) {
            return;
        }
        let visible = state.slots.iter().any(|other| other.used == Use::Committed && other.key == grant.key);
        if commits && !visible {
            state.slots[slot].used = Use::Committed;
            state.engine.adopted &= !(1 << slot);
        } else {
            self.free(state, slot);
        }
    }

    /// One step of a reclaim.
    fn reclaim(&self, state: &mut State, entry: usize, at: u8) {
        let early = self.breaks(Break::ResetsBeforeReclaim);
        match at {
            0 => {
                state.engine.leases[entry] = 0;
                state.engine.connected[entry] = NONE;
                for client in 0..state.clients.len() {
                    let who = &state.clients[client];
                    let was_his = who.owns() && who.entry as usize == entry && state.is_current(client);
                    if was_his && who.process == Process::Gone && !matches!(who.mover, Mover::Copying(_)) {
                        state.clients[client].forget();
                    }
                }
            }
            RECLAIM_ENTRY => {
                state.files[entry] = NONE;
                state.entries[entry] = Entry::EMPTY;
                state.engine.judged[entry] = NONE;
                self.no_longer_awaited(state, entry as u8);
            }
            RECLAIM_WORD => {
                if state.words[entry] == Word::Dead {
                    state.words[entry] = Word::Unclaimed;
                }
            }
            slot => self.free(state, usize::from(slot - RECLAIM_SLOTS)),
        }
        let mut next = match at {
            RECLAIM_WORD if early => 0,
            RECLAIM_WORD => RECLAIMED,
            RECLAIM_ENTRY if early => RECLAIMED,
            at => at + 1,
        };
        while (RECLAIM_SLOTS..RECLAIM_ENTRY).contains(&next)
            && state.slots[usize::from(next - RECLAIM_SLOTS)].used != Use::Writing(entry as u8)
        {
            next += 1;
        }
        state.engine.busy = if next == RECLAIMED { Busy::Idle } else { Busy::Reclaim(entry as u8, next) };
    }
}

fn reclaim_name(at: u8) -> &'static str {
    match at {
        0 => "reclaims: leases, attachment",
        RECLAIM_ENTRY => "reclaims: channel, entry",
        RECLAIM_WORD => "sets a dead life word to 0",
        _ => "reclaims: frees a WRITING slot",
    }
}

/// The kernel has walked the engine's list.
pub(super) fn mark(state: &mut State) {
    (state.owner_alive, state.words_alive) = (false, false);
    state.engine.phase = Phase::Down;
}

/// The chunk is shown, and the commit or abort is answered.
fn acknowledge(state: &mut State, client: usize) {
    state.engine.busy = Busy::Idle;
    // Only the chunk that has been committed just now is not shown yet.
    for slot in &mut state.slots {
        if slot.used == Use::Committed && slot.record == Record::Free {
            slot.record = Record::Visible;
        }
    }
    if let Mover::Sent(grant, committed, channel) = state.clients[client].mover {
        let slot = &mut state.slots[grant.slot as usize];
        slot.acknowledged |= committed && slot.used == Use::Committed && slot.generation == grant.generation;
        state.clients[client].mover = Mover::Acknowledged(grant, committed, channel);
    }
}

/// The client of the entry declares that it writes this slot.
fn adopt(state: &mut State, entry: usize, grant: Grant, others_too: bool) {
    let slot = state.slots[grant.slot as usize];
    let writes = slot.used == Use::Writing(entry as u8);
    if writes && state.is(grant) {
        state.engine.adopted |= 1 << grant.slot;
    } else if others_too && matches!(slot.used, Use::Writing(_)) {
        state.engine.adopted |= 1 << grant.slot;
        state.slots[grant.slot as usize].used = Use::Writing(entry as u8);
    }
}

impl Engine {
    /// A process that has ended. Only what it wrote into shared memory is left.
    pub(super) fn ended() -> Engine {
        Engine { phase: Phase::Ended, ..Engine::FRESH }
    }
}
