//! A client's mover, which stores.

use super::bounds::Break;
use super::client::sees_its_engine;
use super::state::{Bytes, Keeper, Mover, Process, State};
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
}

/// Writes bytes into a slot of the arena that the client maps. No process looks at an older arena any more.
fn write(state: &mut State, client: usize, slot: u8, bytes: Bytes) {
    if state.is_current(client) {
        state.slots[slot as usize].bytes = bytes;
    }
}
