//! Attach, claim, death, restart, declare, reclaim: the protocol by which clients and engines outlive each other.
//!
//! It models the protocol, not the code: each step is one access to shared memory that others can see, or an event that
//! happens to a process. Whatever one thread does between two such accesses is one step with the first of them.
//!
//! * `S1` a client writes only into its own slots, and no two clients write into one;
//! * `S2` a committed slot has its key's bytes, and a load gives its key's bytes;
//! * `S3` an acknowledged shard is there until it is evicted;
//! * `S4` an entry has one living owner. At rest nothing of dead clients is left, and no slot or lease without a holder;
//! * `S5` every living client can always become attached, once;
//! * `S6` no client takes an engine of another incarnation for its own.
//!
//! What is not modelled: rings (a message is a state of its sender; `shm-abi` has loom models of them), memory orders
//! (ditto), several ranks (see [`super::rounds`]), devices that write after their process's death.

mod bounds;
mod client;
mod engine;
mod environment;
mod evict;
mod properties;
mod reader;
mod state;
mod threads;

pub use bounds::{Bounds, Break, CLIENTS, ENTRIES, SLOTS};
pub use state::{Left, State};

use super::{Kind, Model, Step};
use state::{Answer, At, Client, Engine, Entry, NONE, Reader, Slot, Word};

/// A client's name in traces.
fn name_of(client: usize) -> &'static str {
    ["client 0", "client 1"][client]
}

/// The protocol, within bounds.
#[derive(Clone, Copy, Debug)]
pub struct Restart {
    /// How much of everything there is.
    pub bounds: Bounds,
    /// The rule that is broken, if any.
    pub broken: Option<Break>,
}

/// Where steps are gathered.
struct Steps<'a> {
    from: &'a State,
    out: &'a mut Vec<Step<State>>,
}

impl Steps<'_> {
    fn add(&mut self, kind: Kind, who: &'static str, what: &'static str, change: impl FnOnce(&mut State)) {
        let mut next = *self.from;
        change(&mut next);
        next.tidy();
        self.out.push(Step { who, what, kind, next });
    }

    /// A step that somebody takes for certain.
    fn progress(&mut self, who: &'static str, what: &'static str, change: impl FnOnce(&mut State)) {
        self.add(Kind::Progress, who, what, change);
    }

    /// A step that may be taken.
    fn may(&mut self, who: &'static str, what: &'static str, change: impl FnOnce(&mut State)) {
        self.add(Kind::Environment, who, what, change);
    }
}

/// The state after a first start, with every client attached in the entry of its own number.
fn begin_attached(state: &mut State, clients: usize) {
    (state.incarnation, state.owner_alive, state.words_alive, state.words_by) = (2, true, true, 1);
    (state.engine.phase, state.evicting) = (state::Phase::Serving, 2);
    for at in 0..clients {
        let nonce = at as u8 + 1;
        state.words[at] = Word::Alive(at as u8);
        state.entries[at] = Entry { ready: true, nonce, incarnation: 2 };
        state.answers[at] = Answer { nonce, attached: true, by: 2 };
        (state.engine.connected[at], state.engine.judged[at]) = (nonce, nonce);
        let who = &mut state.clients[at];
        (who.keeper, who.entry, who.incarnation) = (state::Keeper::Ready, at as u8, 2);
        (who.nonce, who.accepts) = (nonce, nonce);
        (who.at, who.knows, who.reads) = (At::Attached, 2, 2);
    }
}

impl Restart {
    /// Is this the rule that is broken?
    fn breaks(&self, rule: Break) -> bool {
        self.broken == Some(rule)
    }
}

impl Model for Restart {
    type State = State;

    fn initial(&self) -> State {
        let Bounds { clients, stores, loads, left, .. } = self.bounds;
        let mut all = [Client::new(0, 0); CLIENTS];
        for client in 0..CLIENTS {
            all[client] = Client::new(stores[client], loads[client]);
            if client >= clients {
                all[client].process = state::Process::Gone;
            }
        }
        let mut state = State {
            arena: 0,
            incarnation: 0,
            owner_alive: false,
            words_alive: false,
            words_by: 0,
            marking: 0,
            evicting: 0,
            words: [Word::Unclaimed; ENTRIES],
            entries: [Entry::EMPTY; ENTRIES],
            answers: [Answer::EMPTY; ENTRIES],
            files: [NONE; ENTRIES],
            slots: [Slot::FRESH; SLOTS],
            engine: Engine::FRESH,
            clients: all,
            left,
            failed: None,
        };
        if self.bounds.stored {
            state.slots[0] = Slot {
                used: state::Use::Committed,
                key: 1,
                bytes: state::Bytes::Of(1),
                acknowledged: true,
                record: state::Record::Visible,
                ..Slot::FRESH
            };
        }
        if self.bounds.attached {
            begin_attached(&mut state, clients);
        }
        state
    }

    fn steps(&self, state: &State, out: &mut Vec<Step<State>>) {
        let mut steps = Steps { from: state, out };
        self.engine_steps(&mut steps);
        for client in 0..self.bounds.clients {
            self.keeper_steps(&mut steps, client);
            self.mover_steps(&mut steps, client);
            self.reader_steps(&mut steps, client);
        }
        self.environment_steps(&mut steps);
    }

    fn violation(&self, state: &State) -> Option<&'static str> {
        properties::violation(&self.bounds, state)
    }

    fn at_rest(&self, state: &State) -> Option<&'static str> {
        properties::at_rest(&self.bounds, state)
    }

    fn describe(&self, state: &State) -> String {
        let State { incarnation, words_alive, engine, .. } = state;
        let mut text = format!(
            "inc {incarnation} life {} {:?} {:?}",
            if *words_alive { "alive" } else { "dead" },
            engine.phase,
            engine.busy
        );
        for entry in 0..self.bounds.entries {
            text += &format!(" | e{entry} {:?}", state.words[entry]);
        }
        for slot in &state.slots[..self.bounds.slots] {
            let record = format!("{:?} l{}", slot.record, slot.life);
            text +=
                &format!(" | {record} {:?} g{} k{} {:?}", slot.used, slot.generation, slot.key, slot.bytes);
        }
        for client in &state.clients[..self.bounds.clients] {
            text += &format!(" | {:?} {:?} n{}", client.process, client.keeper, client.nonce);
            if client.mover != state::Mover::Idle {
                text += &format!(" {:?}", client.mover);
            }
            if client.reader != Reader::Idle {
                text += &format!(" {:?} {:?}", client.at, client.reader);
            }
            if let Some(handle) = client.said {
                text += &format!(" said {handle:?}");
            }
            if client.unpublished {
                text += " unpublished";
            }
        }
        text.replace("Grant { slot: ", "(s")
            .replace(", generation: ", " g")
            .replace(", key: ", " k")
            .replace(" }", ")")
    }
}
