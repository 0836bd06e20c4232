//! Attach, claim, death, restart, declare, reclaim, and lookups and evictions beside all of that: the protocol by which clients and
//! engines outlive each other.
//!
//! It models the protocol, not the code: each step is one access to shared memory that others can see, or an event that
//! happens to a process. Whatever one thread does between two such accesses is one step with the first of them.
//!
//! * `S1` a client writes only into its own slots, and no two clients write into one;
//! * `S2` a committed slot has its key's bytes, and a load gives its key's bytes;
//! * `S3` an acknowledged shard is there until it is evicted. What a client holds by a lookup that has been answered is there
//!   until it is released; and an engine that has heard of it knows it. The exceptions: the arena was replaced, or an engine has
//!   waited in vain for the client to come back (ghost: `late`), until it has asked again whether its answer still holds;
//! * `S4` an entry has one living owner. At rest nothing of dead clients is left, no slot or lease without a holder, no mark, and
//!   nothing that is unpublished;
//! * `S5` every living client can always become attached, once;
//! * `S6` no client takes an engine of another incarnation for its own.
//!
//! A lookup reads the engine's tables by itself, whatever the engine is doing. Its steps are: the first look; the hold is entered,
//! and it is decided which engine knows of it and what marks mean; it is published, or said to be unpublished, if its engine
//! lives; the second look. From the entering to the second look the thread has the lock of the list of leases, so its keeper can
//! neither take stock nor end a declaration, and nothing else waits for it. Then the load: record and slot; the copy; the slot
//! again; the release. An eviction is: the mark; the look at `unpublished` and at all rings, as often as it takes; the end of the
//! record; the slot. Between any two steps everybody else may go on, die, or be restarted. That is also how a client is stopped.
//!
//! What is not modelled: rings (a message is a state of its sender; `shm-abi` has loom models of them), memory orders (ditto, and
//! the order of the loads within one look), several ranks (see [`super::rounds`]), devices that write after their process's
//! death. A client holds one chunk at a time, and looks up again when the engine has heard of the release. The scheduler that holds
//! and the worker that loads are one client. A scheduler is believed for as long as it says that something is unpublished. Clears,
//! which go the same way as evictions; damaged chunks; clients that are thrown out; shares.

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
