//! A client's keeper: it claims, attaches, notices deaths, declares, and gives up.

use super::bounds::Break;
use super::state::{Client, Entry, Keeper, Mover, NONE, Process, State, Word};
use super::{Restart, Steps, name_of};

/// Does this client see its engine, alive and of the incarnation that it knows?
pub(super) fn sees_its_engine(state: &State, client: usize) -> bool {
    state.is_current(client) && state.words_alive && state.incarnation == state.clients[client].incarnation
}

fn serves(state: &State) -> bool {
    state.owner_alive && state.incarnation != 0 && state.incarnation.is_multiple_of(2)
}

impl Restart {
    /// What a client's keeper can do next.
    pub(super) fn keeper_steps(&self, steps: &mut Steps, client: usize) {
        let state = steps.from;
        let who = state.clients[client];
        if who.process != Process::Alive {
            return;
        }
        let name = name_of(client);
        let entry = who.entry as usize;
        if who.owns() && who.keeper != Keeper::Leaving && !state.is_current(client) {
            steps.progress(name, "finds another arena: closes its writer gate", |state| {
                state.clients[client].keeper = Keeper::Leaving;
            });
            return;
        }
        if who.owns() && who.keeper != Keeper::Leaving && state.left.leaves > 0 {
            steps.may(name, "leaves: closes its writer gate", |state| {
                state.left.leaves -= 1;
                state.clients[client].keeper = Keeper::Leaving;
            });
        }
        match who.keeper {
            Keeper::Away => self.claim(steps, client),
            Keeper::Pending => steps.progress(name, "tries to claim the word", |state| {
                if state.is_current(client) && state.words[entry] == Word::Unclaimed {
                    state.words[entry] = Word::Alive(client as u8);
                    state.clients[client].keeper = Keeper::Claimed;
                } else {
                    state.clients[client].forget();
                }
            }),
            Keeper::Claimed => steps.progress(name, "links the word", |state| {
                state.clients[client].keeper = Keeper::Owner;
            }),
            Keeper::Owner if serves(state) => {
                steps.progress(name, "makes a channel, begins to publish", |state| {
                    publish(state, client);
                    if self.bounds.coarse {
                        published(state, client);
                    }
                });
            }
            Keeper::Owner => {}
            Keeper::Publishing => steps.progress(name, "has published its entry", |state| {
                published(state, client);
            }),
            Keeper::Waiting => self.wait(steps, client),
            Keeper::Attached => {
                if self.unlocked(&who) {
                    steps.progress(name, "takes stock", |state| self.read_ledger(state, client));
                }
            }
            Keeper::DeclareSlots | Keeper::DeclareLeases | Keeper::DeclareEnd => {
                if state.left.timeouts > 0 {
                    steps.may(name, "is tired of waiting, and declares everything again", |state| {
                        state.left.timeouts -= 1;
                        let who = &mut state.clients[client];
                        who.keeper = Keeper::Attached;
                        // What it could not send has not been declared.
                        let unsent = who.piece.take();
                        who.told &= unsent.is_none() || who.hold() != unsent;
                    });
                }
                notice(steps, client);
                let declares = who.keeper == Keeper::DeclareLeases && self.unlocked(&who);
                if declares && !self.declare_lease(steps, client) && who.said.is_none() {
                    steps.progress(name, "has declared everything: says so", |state| {
                        self.end_declaring(state, client);
                    });
                }
            }
            Keeper::Ready => {
                if self.bounds.health {
                    self.look(steps, client);
                }
                notice(steps, client);
            }
            Keeper::Leaving => {
                let copies = matches!(who.mover, Mover::Copying(_));
                if (!copies || self.breaks(Break::LeavesWhileCopying)) && self.unlocked(&who) {
                    steps.progress(name, "gives its entry up", |state| {
                        if state.is_current(client) {
                            state.words[entry] = Word::Dead;
                        }
                        state.clients[client].forget();
                        if copies {
                            // Its copy goes on.
                            state.clients[client].entry = who.entry;
                            state.clients[client].mover = who.mover;
                        }
                    });
                }
            }
        }
    }

    fn claim(&self, steps: &mut Steps, client: usize) {
        let state = steps.from;
        if !serves(state) {
            return;
        }
        // The first one. It does not matter which.
        let unclaimed = state.words[..self.bounds.entries].iter().position(|word| *word == Word::Unclaimed);
        let locked = |entry: usize| {
            self.bounds.claim_lock
                && state.clients.iter().any(|other| {
                    other.process != Process::Gone
                        && other.entry as usize == entry
                        && matches!(other.keeper, Keeper::Pending | Keeper::Claimed)
                })
        };
        if let Some(entry) = unclaimed
            && !locked(entry)
        {
            steps.progress(name_of(client), "finds an unclaimed word; sets list_op_pending", |state| {
                let who = &mut state.clients[client];
                (who.keeper, who.arena, who.entry) = (Keeper::Pending, state.arena, entry as u8);
            });
        }
    }

    fn wait(&self, steps: &mut Steps, client: usize) {
        let state = steps.from;
        let who = state.clients[client];
        let (name, entry) = (name_of(client), who.entry as usize);
        let answer = state.answers[entry];
        let again = |state: &mut State| {
            state.files[entry] = NONE;
            state.clients[client].keeper = Keeper::Owner;
        };
        if answer.nonce == who.nonce {
            if answer.attached {
                steps.progress(name, "is attached", |state| {
                    if answer.by != who.incarnation {
                        state.failed = Some("S6: attached by an engine of another incarnation than it meant");
                    }
                    state.files[entry] = NONE;
                    state.clients[client].keeper = Keeper::Attached;
                });
            } else {
                steps.progress(name, "is told that it was stale", again);
            }
        }
        if !sees_its_engine(state, client) {
            steps.progress(name, "notices death or restart while it waits", again);
        }
        if state.left.timeouts > 0 {
            steps.may(name, "is tired of waiting", |state| {
                state.left.timeouts -= 1;
                again(state);
            });
        }
    }

    /// From here on nothing enters the ledger through an older channel.
    fn read_ledger(&self, state: &mut State, client: usize) {
        self.take_stock(state, client);
        let who = &mut state.clients[client];
        who.wrote = who.ledger();
        if self.breaks(Break::OmitsRunningCopy) && matches!(who.mover, Mover::Copying(_)) {
            who.wrote = None;
        }
        who.keeper = Keeper::DeclareSlots;
    }

    /// Two loads that say "healthy": the life word, then the incarnation.
    fn look(&self, steps: &mut Steps, client: usize) {
        let state = steps.from;
        let who = state.clients[client];
        let name = name_of(client);
        let meant = state.incarnation == who.incarnation;
        let (first, second) = if self.breaks(Break::IncarnationFirst) {
            (meant, state.words_alive)
        } else {
            (state.words_alive, meant)
        };
        if who.look == 0 && first {
            steps.may(name, "looks: first load is as it should be", |state| {
                // Remembers whose life it was. In the wrong order only the second load sees that.
                state.clients[client].look = state.words_by + 1;
            });
        }
        if who.look != 0 && second {
            let by = if self.breaks(Break::IncarnationFirst) { state.words_by + 1 } else { who.look };
            steps.may(name, "looks: second load is as it should be: healthy", |state| {
                if by != who.incarnation {
                    state.failed = Some("S6: healthy, and what lives is another engine");
                }
                state.clients[client].look = 0;
            });
        }
    }
}

fn notice(steps: &mut Steps, client: usize) {
    if !sees_its_engine(steps.from, client) {
        steps.progress(name_of(client), "notices death or restart", |state| {
            let who = &mut state.clients[client];
            (who.keeper, who.look) = (Keeper::Owner, 0);
            (who.wrote, who.piece) = (None, None);
        });
    }
}

fn publish(state: &mut State, client: usize) {
    let nonce = fresh_nonce(state);
    let who = &mut state.clients[client];
    (who.nonce, who.incarnation, who.keeper) = (nonce, state.incarnation, Keeper::Publishing);
    let entry = who.entry as usize;
    state.entries[entry].ready = false;
    if state.files[entry] != NONE {
        state.failed = Some("S4: an entry has been claimed, and still has another's channel");
    }
    state.files[entry] = nonce;
}

fn published(state: &mut State, client: usize) {
    let Client { nonce, incarnation, entry, .. } = state.clients[client];
    state.entries[entry as usize] = Entry { ready: true, nonce, incarnation };
    state.clients[client].keeper = Keeper::Waiting;
}

/// A nonce that nothing refers to, which is as good as one that was never used.
fn fresh_nonce(state: &State) -> u8 {
    let mut used = 0u32;
    for client in &state.clients {
        used |= 1 << client.nonce | 1 << client.accepts;
        match client.mover {
            Mover::Reserving(_, channel) | Mover::Answered(_, channel) => used |= 1 << channel,
            Mover::Sent(_, _, channel) | Mover::Acknowledged(_, _, channel) => used |= 1 << channel,
            Mover::Idle | Mover::Granted(_) | Mover::Copying(_) | Mover::Owing(..) => {}
        }
    }
    for entry in 0..state.entries.len() {
        used |= 1 << state.entries[entry].nonce | 1 << state.answers[entry].nonce;
        used |= 1 << state.files[entry];
        used |= 1 << state.engine.connected[entry] | 1 << state.engine.judged[entry];
    }
    (NONE + 1..32).find(|nonce| used & (1 << nonce) == 0).unwrap()
}
