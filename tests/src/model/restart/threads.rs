//! A client's other threads: the mover, which stores, and the one that loads.

use super::bounds::Break;
use super::client::sees_its_engine;
use super::state::{Bytes, Keeper, Loader, Mover, Process, State, Use};
use super::{Restart, Steps, name_of};

impl Restart {
    /// What a client's mover can do next.
    pub(super) fn mover_steps(&self, steps: &mut Steps, client: usize) {
        let state = steps.from;
        let who = state.clients[client];
        let name = name_of(client);
        let set = |mover| move |state: &mut State| state.clients[client].mover = mover;
        if who.process != Process::Alive {
            if matches!(who.mover, Mover::Copying(_)) {
                steps.progress(name, "its last thread ends", |state| {
                    state.clients[client].mover = Mover::Idle;
                });
            }
            return;
        }
        let early = matches!(who.keeper, Keeper::Attached | Keeper::DeclareSlots | Keeper::DeclareLeases);
        let is_ready = who.keeper == Keeper::Ready || early && self.breaks(Break::EarlyChannel);
        let gate_open = who.keeper != Keeper::Leaving;
        match who.mover {
            Mover::Idle => {
                for key in 1..=self.bounds.keys {
                    if is_ready && who.stores > 0 {
                        steps.may(name, "asks for a slot", |state| {
                            state.clients[client].stores -= 1;
                            state.clients[client].mover = Mover::Reserving(key, who.nonce);
                        });
                    }
                }
            }
            Mover::Reserving(_, channel) => {
                if who.nonce != channel || !sees_its_engine(state, client) {
                    steps.progress(name, "expects no answer any more", set(Mover::Idle));
                }
            }
            Mover::Answered(grant, channel) => {
                let fenced = channel != who.accepts && !self.breaks(Break::NoGrantFence);
                if fenced || !gate_open {
                    steps.progress(name, "refuses a grant", set(Mover::Idle));
                } else {
                    steps.progress(name, "takes a grant", set(Mover::Granted(grant)));
                }
            }
            Mover::Granted(grant) => {
                if gate_open {
                    steps.progress(name, "begins to copy", |state| {
                        write(state, client, grant.slot, Bytes::Torn);
                        state.clients[client].mover = Mover::Copying(grant);
                    });
                }
                steps.progress(name, "does not copy: owes an abort", set(Mover::Owing(grant, false)));
            }
            Mover::Copying(grant) => steps.progress(name, "has copied: owes a commit", |state| {
                write(state, client, grant.slot, Bytes::Of(grant.key));
                state.clients[client].mover = Mover::Owing(grant, true);
            }),
            Mover::Owing(grant, commits) => {
                if is_ready {
                    steps.progress(name, "sends what it owes", set(Mover::Sent(grant, commits, who.nonce)));
                }
            }
            Mover::Sent(grant, commits, channel) => {
                if is_ready && channel != who.nonce && !self.breaks(Break::ForgetsOwedCommits) {
                    steps.progress(name, "sends it again", set(Mover::Sent(grant, commits, who.nonce)));
                }
            }
            Mover::Acknowledged(grant, commits, channel) => {
                steps.progress(name, "drains the answer", set(Mover::Idle));
                if is_ready && channel != who.nonce {
                    steps.progress(name, "sends it again", set(Mover::Sent(grant, commits, who.nonce)));
                }
            }
        }
    }

    /// What a client's loading thread can do next.
    pub(super) fn loader_steps(&self, steps: &mut Steps, client: usize) {
        let state = steps.from;
        let who = state.clients[client];
        if who.process != Process::Alive {
            return;
        }
        let name = name_of(client);
        let checks = !self.breaks(Break::NoGenerationCheck);
        let set = |loader| move |state: &mut State| state.clients[client].loader = loader;
        match who.loader {
            Loader::Idle | Loader::Releasing(_) => {}
            Loader::Answered(_, channel) if channel != who.accepts && !self.breaks(Break::NoLeaseFence) => {
                steps.progress(name, "refuses a lease", set(Loader::Idle));
            }
            Loader::Answered(handle, _) => {
                steps.progress(name, "takes a handle", set(Loader::Holding(handle)));
            }
            Loader::Holding(handle) => {
                let slot = state.slots[handle.slot as usize];
                let fits = if checks { state.is(handle) } else { slot.key == handle.key };
                if state.is_current(client) && slot.used == Use::Committed && fits {
                    steps.progress(name, "finds the slot valid", set(Loader::Validated(handle)));
                } else {
                    steps.progress(name, "refuses to load", set(Loader::Releasing(handle.slot)));
                }
            }
            Loader::Validated(handle) => {
                let bytes = state.slots[handle.slot as usize].bytes;
                steps.progress(name, "copies out", set(Loader::Copied(handle, bytes)));
            }
            Loader::Copied(handle, bytes) => {
                steps.progress(name, "looks again: loaded or refused", |state| {
                    let slot = state.slots[handle.slot as usize];
                    // The slot's word alone: state and generation.
                    let fits = !checks || slot.generation == handle.generation;
                    let loaded = state.is_current(client) && slot.used == Use::Committed && fits;
                    if loaded && bytes != Bytes::Of(handle.key) {
                        state.failed = Some("S2: a load returned what is not its key's");
                    }
                    state.clients[client].loader = Loader::Releasing(handle.slot);
                })
            }
        }
    }

    /// A lookup, and its answer.
    pub(super) fn lookup_steps(&self, steps: &mut Steps, client: usize) {
        let state = steps.from;
        let who = state.clients[client];
        let entry = who.entry as usize;
        let asks = who.process == Process::Alive && who.keeper == Keeper::Ready && who.loads > 0;
        if !asks || who.loader != Loader::Idle || state.engine.connected[entry] != who.nonce {
            return;
        }
        for slot in 0..self.bounds.slots {
            let found = state.slots[slot];
            if found.used == Use::Committed {
                steps.may(name_of(client), "looks up, and the engine answers", |state| {
                    let handle = super::state::Grant {
                        slot: slot as u8,
                        generation: found.generation,
                        key: found.key,
                    };
                    state.clients[client].loads -= 1;
                    state.clients[client].loader = Loader::Answered(handle, who.nonce);
                    state.engine.leases[entry] |= 1 << slot;
                });
            }
        }
    }
}

/// Writes bytes into a slot of the arena that the client maps. No process looks at an older arena any more.
fn write(state: &mut State, client: usize, slot: u8, bytes: Bytes) {
    if state.is_current(client) {
        state.slots[slot as usize].bytes = bytes;
    }
}
