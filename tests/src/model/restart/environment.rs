//! Events that happen to the processes: deaths, the kernel's marks, cold starts, new work.

use super::bounds::{Break, ENTRIES, SLOTS};
use super::state::{Answer, Engine, Entry, Keeper, Mover, NONE, Phase, Process, Reader, Slot, State, Word};
use super::{Restart, Steps, engine, evict, name_of};

impl Restart {
    /// What can happen.
    pub(super) fn environment_steps(&self, steps: &mut Steps) {
        let state = steps.from;
        let phase = state.engine.phase;
        if state.left.engine_deaths > 0 && !matches!(phase, Phase::Down | Phase::Ended) {
            steps.may("engine", "DIES", |state| {
                state.left.engine_deaths -= 1;
                state.engine = Engine::ended();
                evict::forget_rings(state);
                if self.bounds.coarse {
                    engine::mark(state);
                }
            });
        }
        let writes = state.clients.iter().any(|client| client.mover != Mover::Idle);
        let waits = writes && self.breaks(Break::ZeroesWhenNobodyWrites);
        if state.left.cold_starts > 0 && phase == Phase::Down && state.incarnation != 0 && !waits {
            steps.may("engine", "STARTS COLD", |state| self.cold_start(state));
        }
        if state.marking != 0 {
            steps.progress("kernel", "marks the dead engine's other words", |state| {
                if state.words_by == state.marking || self.bounds.equal_tids {
                    state.words_alive = false;
                }
                state.marking = 0;
            });
        }
        for client in 0..self.bounds.clients {
            match state.clients[client].process {
                Process::Alive if state.left.client_deaths > 0 => {
                    steps.may(name_of(client), "DIES", |state| {
                        state.left.client_deaths -= 1;
                        self.die(state, client);
                    });
                }
                Process::Ended => {
                    steps.progress("kernel", "marks the client's word", |state| self.mark(state, client));
                }
                Process::Alive | Process::Gone => {}
            }
        }
    }

    /// New segments under the same name; or, where that rule is broken, the old ones zeroed.
    fn cold_start(&self, state: &mut State) {
        state.left.cold_starts -= 1;
        state.slots = [Slot::FRESH; SLOTS];
        state.owner_alive = true;
        if self.breaks(Break::ZeroesInPlace) || self.breaks(Break::ZeroesWhenNobodyWrites) {
            state.engine.phase = Phase::Owner;
            return;
        }
        state.arena += 1;
        state.incarnation = 1;
        (state.words_alive, state.words_by, state.evicting) = (true, 1, 0);
        state.words = [Word::Unclaimed; ENTRIES];
        state.entries = [Entry::EMPTY; ENTRIES];
        state.answers = [Answer::EMPTY; ENTRIES];
        state.files = [NONE; ENTRIES];
        state.engine.phase = Phase::Scan(0);
    }

    /// All threads end. Messages that they have sent stay in the ring.
    fn die(&self, state: &mut State, client: usize) {
        let who = &mut state.clients[client];
        who.process = Process::Ended;
        who.reader = Reader::Idle;
        let lingers = self.bounds.threads_linger && matches!(who.mover, Mover::Copying(_));
        if !lingers && !matches!(who.mover, Mover::Reserving(..) | Mover::Sent(..)) {
            who.mover = Mover::Idle;
        }
    }

    /// The kernel walks the keeper's list, and looks at `list_op_pending`.
    fn mark(&self, state: &mut State, client: usize) {
        let who = state.clients[client];
        let entry = who.entry as usize;
        let named = match who.keeper {
            Keeper::Away => false,
            Keeper::Pending | Keeper::Claimed => !self.breaks(Break::NoPending),
            _ => true,
        };
        let by_me = match state.words[entry] {
            Word::Alive(owner) => owner as usize == client || self.bounds.equal_tids,
            Word::Unclaimed | Word::Dead => false,
        };
        if named && by_me && state.is_current(client) {
            state.words[entry] = Word::Dead;
        }
        state.clients[client].process = Process::Gone;
        if !who.owns() || !state.is_current(client) {
            state.clients[client].forget();
        }
    }
}
