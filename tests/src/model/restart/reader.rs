//! A client's thread that looks up and loads: it reads the engine's tables by itself, whatever the engine is doing, holds what it
//! has found, and tells the engine so. Then it loads that, as a worker does, and releases it.

use super::bounds::Break;
use super::state::{At, Bytes, Client, Handle, Keeper, Process, Reader, Record, State, Use};
use super::{Restart, Steps, name_of};

/// Is the engine of this incarnation alive, as this client sees it?
fn lives(state: &State, client: usize, incarnation: u8) -> bool {
    state.is_current(client) && state.words_alive && state.incarnation == incarnation
}

/// Does an engine read the channel through which this client tells what it holds?
fn is_read(state: &State, client: usize) -> bool {
    let who = &state.clients[client];
    state.is_current(client) && state.engine.connected[who.entry as usize] == who.accepts
}

/// Puts a `Hold` into the ring. Nobody reads that of an engine that has died.
fn say(state: &mut State, client: usize, handle: Handle) {
    let is_read = is_read(state, client);
    let who = &mut state.clients[client];
    who.told = true;
    who.said = is_read.then_some(handle);
}

/// Gives a hold up: the engine is owed the release of what it has been told.
fn release(who: &mut Client, handle: Handle) {
    who.reader = if who.told { Reader::Releasing(handle.slot) } else { Reader::Idle };
}

impl Restart {
    /// What is in a client's list of leases, as its keeper finds it.
    pub(super) fn listed(&self, who: &Client) -> Option<Handle> {
        if self.breaks(Break::EntersLate) { who.answered() } else { who.hold() }
    }

    /// May the client's keeper take the lock of the list of leases?
    pub(super) fn unlocked(&self, who: &Client) -> bool {
        !who.is_locked() || self.breaks(Break::EntersLate)
    }

    /// What a client's reading thread can do next.
    pub(super) fn reader_steps(&self, steps: &mut Steps, client: usize) {
        let state = steps.from;
        let who = state.clients[client];
        if who.process != Process::Alive {
            return;
        }
        let name = name_of(client);
        let set = |reader| move |state: &mut State| state.clients[client].reader = reader;
        match who.reader {
            Reader::Idle => self.look_up(steps, client),
            Reader::Releasing(_) => {}
            Reader::Found(handle, there) => match self.enter(state, client, handle, there) {
                Some(entered) => steps.progress(name, "enters the hold", |state| {
                    (state.clients[client].reader, state.clients[client].told) = (entered, false);
                }),
                None => steps.progress(name, "may not hold anything", set(Reader::Idle)),
            },
            Reader::Entered(handle, engine, there) => {
                let published = Reader::Published(handle, engine, there);
                let says_late = self.breaks(Break::SaysAfterTheLook);
                if who.at != At::Attached || !lives(state, client, who.knows) || says_late {
                    steps.progress(name, "has no engine to tell of its hold", set(published));
                    return;
                }
                steps.progress(name, "publishes its hold", |state| {
                    say(state, client, handle);
                    state.clients[client].reader = published;
                });
                if state.left.full_rings > 0 {
                    steps.may(name, "has no room to publish its hold: says so", |state| {
                        state.left.full_rings -= 1;
                        state.clients[client].unpublished = is_read(state, client);
                        state.clients[client].reader = published;
                    });
                }
            }
            Reader::Published(handle, engine, there) => {
                steps.progress(name, "looks again: answered, or cut", |state| {
                    self.look_again(state, client, handle, engine, there);
                });
            }
            Reader::Holding(handle) => {
                let slot = state.slots[handle.slot as usize];
                // The record, its slot, the record again.
                let fits = slot.has(handle) || self.breaks(Break::NoGenerationCheck);
                if state.is_current(client) && fits && slot.used == Use::Committed && slot.key == handle.key {
                    let found = Reader::Validated(handle, slot.generation);
                    steps.progress(name, "finds record and slot valid", set(found));
                } else {
                    steps.progress(name, "refuses to load", |state| {
                        release(&mut state.clients[client], handle);
                    });
                }
            }
            Reader::Validated(handle, generation) => {
                let bytes = state.slots[handle.slot as usize].bytes;
                steps.progress(name, "copies out", set(Reader::Copied(handle, generation, bytes)));
            }
            Reader::Copied(handle, generation, bytes) => {
                steps.progress(name, "looks at the slot again: loaded or refused", |state| {
                    let slot = state.slots[handle.slot as usize];
                    // The slot's word alone: state and generation.
                    let fits = slot.generation == generation || self.breaks(Break::NoGenerationCheck);
                    let loaded = state.is_current(client) && slot.used == Use::Committed && fits;
                    if loaded && bytes != Bytes::Of(handle.key) {
                        state.failed = Some("S2: a load returned what is not its key's");
                    }
                    self.release(state, client, handle);
                });
            }
        }
        self.ask(steps, client);
        // By its keeper, or by its next lookup.
        let stays = self.breaks(Break::StaysUnpublished);
        let untold = who.hold().is_some() && !who.told;
        let tells = who.keeper == Keeper::Ready && who.at == At::Attached && !who.is_locked();
        if tells && untold && lives(state, client, who.knows) {
            steps.progress(name, "tells what was untold", |state| {
                if let Some(handle) = who.hold() {
                    say(state, client, handle);
                }
                state.clients[client].unpublished &= stays;
            });
        }
        if who.keeper == Keeper::Ready && who.unpublished && !untold && !stays {
            steps.progress(name, "has nothing unpublished any more: says so", |state| {
                state.clients[client].unpublished = false;
            });
        }
    }

    /// A scheduler asks whether an earlier answer still holds, although an engine has waited in vain for this client. It does if its
    /// words are there when the client has declared everything to that engine or a later one; then what is held stays, as before.
    fn ask(&self, steps: &mut Steps, client: usize) {
        let state = steps.from;
        let who = state.clients[client];
        let Some(handle) = who.answered().filter(|_| who.late > 0 && state.is_current(client)) else {
            return;
        };
        if who.reads >= who.late || self.breaks(Break::TrustsWhatIsNotDeclared) {
            steps.may(name_of(client), "asks whether its answer still holds", |state| {
                if state.slots[handle.slot as usize].has(handle) {
                    state.clients[client].late = 0;
                } else {
                    self.release(state, client, handle);
                }
            });
        }
    }

    /// The first look. What the engine is doing does not matter.
    fn look_up(&self, steps: &mut Steps, client: usize) {
        let state = steps.from;
        let who = state.clients[client];
        if who.loads == 0 || who.reads == 0 || who.keeper == Keeper::Leaving || !state.is_current(client) {
            return;
        }
        let there = !lives(state, client, who.reads);
        for slot in 0..self.bounds.slots {
            let found = state.slots[slot];
            if found.record == Record::Visible || found.record == Record::Evicting && there {
                steps.may(name_of(client), "looks up: finds a chunk", |state| {
                    let handle = Handle { slot: slot as u8, generation: found.life, key: found.key };
                    state.clients[client].loads -= 1;
                    state.clients[client].reader =
                        Reader::Found(handle, there && self.breaks(Break::JudgesMarksOnce));
                });
            }
        }
    }

    /// Which engine knows, or will know, of a hold that is entered now, and what its marks mean. `None`: nothing may be held.
    fn enter(&self, state: &State, client: usize, handle: Handle, there: bool) -> Option<Reader> {
        let who = &state.clients[client];
        let answer = state.answers[who.entry as usize];
        match who.at {
            At::Nowhere => None,
            _ if !state.is_current(client) => None,
            At::Declaring => Some(Reader::Published(handle, who.reads, true)),
            At::Attached => {
                let lives = lives(state, client, who.knows);
                let is_heard = answer.nonce == who.accepts && answer.attached;
                (!lives || is_heard).then_some(Reader::Entered(handle, who.knows, !lives || there))
            }
        }
    }

    /// The second look: at `evicting`, and at the record's word.
    fn look_again(&self, state: &mut State, client: usize, handle: Handle, engine: u8, there: bool) {
        let slot = state.slots[handle.slot as usize];
        let is_visible = slot.record == Record::Visible || there;
        let is_still = state.is_current(client) && slot.has(handle) && is_visible;
        let without = state.evicting > engine && !self.breaks(Break::IgnoresEvicting);
        if is_still && !without || self.breaks(Break::NoSecondLook) {
            state.clients[client].reader = Reader::Holding(handle);
        } else {
            self.release(state, client, handle);
        }
    }

    fn release(&self, state: &mut State, client: usize, handle: Handle) {
        let who = &mut state.clients[client];
        release(who, handle);
        if self.breaks(Break::ForgetsOwedReleases) && who.at == At::Declaring {
            who.reader = Reader::Idle;
        }
    }

    /// The keeper takes stock of the leases, for the attachment that it has now.
    pub(super) fn take_stock(&self, state: &mut State, client: usize) {
        let is_listed = self.listed(&state.clients[client]).is_some();
        let who = &mut state.clients[client];
        let is_another = who.accepts != who.nonce;
        who.accepts = who.nonce;
        // Once `DeclareEnd` has been sent, the engine may hear it at any time: what is held since is told by this attachment.
        if who.at == At::Attached && !is_another && !self.breaks(Break::DeclaresAfterTheEnd) {
            return;
        }
        who.at = At::Declaring;
        if is_another || self.breaks(Break::ForgetsAtASecondAttempt) {
            who.told &= !is_listed;
            (who.piece, who.unpublished) = (None, false);
            if matches!(who.reader, Reader::Releasing(_)) {
                who.reader = Reader::Idle;
            }
        }
    }

    /// The keeper declares the hold that is in the list: it takes it, and then sends it. False: there is nothing to declare.
    pub(super) fn declare_lease(&self, steps: &mut Steps, client: usize) -> bool {
        let (who, name) = (steps.from.clients[client], name_of(client));
        if let Some(handle) = who.piece {
            steps.progress(name, "declares what it has taken", |state| {
                let is_read = is_read(state, client);
                let who = &mut state.clients[client];
                (who.piece, who.said) = (None, is_read.then_some(handle));
                // The release is in front of it.
                let is_released = matches!(who.reader, Reader::Releasing(_));
                if is_released && self.breaks(Break::SendsReleasesFirst) {
                    who.reader = Reader::Idle;
                }
            });
            return true;
        }
        let omits = self.breaks(Break::OmitsLeases) || self.breaks(Break::EarlyDeclareEnd);
        let hold = self.listed(&who).filter(|_| !who.told && who.at == At::Declaring && !omits);
        if let Some(handle) = hold {
            steps.progress(name, "takes what it holds, to declare it", |state| {
                (state.clients[client].told, state.clients[client].piece) = (true, Some(handle));
            });
        }
        hold.is_some()
    }

    /// The keeper says that everything is declared, and moves the leases to the new attachment, in one step.
    pub(super) fn end_declaring(&self, state: &mut State, client: usize) {
        let is_read = is_read(state, client);
        let who = &mut state.clients[client];
        who.ends = is_read;
        who.keeper = Keeper::DeclareEnd;
        who.told |= self.breaks(Break::OmitsLeases);
        if who.at != At::Attached {
            (who.at, who.knows, who.unpublished) = (At::Attached, who.incarnation, false);
        }
    }
}
