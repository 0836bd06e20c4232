//! Rounds: two ranks store one chunk in two rounds, and a rank may fail the load with which a round began.
//!
//! The other rank then computes garbage in this round, and does not know it. The failing rank aborts, and the chunk is computed
//! again in the next round. Shards combine only within a round, so garbage is never visible, however commits, aborts, deaths
//! and restarts interleave. Attaching and declaring are one step here; [`super::restart`] has their parts.

use super::{Kind, Model, Step};

/// Ranks, and rounds.
const BOTH: usize = 2;

/// The slot of one rank in one round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cell {
    /// No slot.
    Free,
    /// The rank writes it, and its round can still become visible.
    Writing,
    /// The rank writes it, and its round has failed: the commit comes too late.
    Orphan,
    /// Committed. False: it is garbage.
    Committed(bool),
}

/// How far the store of one rank in one round is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Store {
    /// The scheduler has not issued the round.
    Later,
    /// It wants a slot.
    Issued,
    /// It has been given one, and the answer lies in the ring.
    Answered,
    /// It writes.
    Copying,
    /// It owes a commit, or (false) an abort.
    Owing(bool),
    /// The engine has done that, and has not answered yet. True: it was committed.
    Done(bool),
    /// Over. True: its commit was acknowledged.
    Over(bool),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct State {
    cells: [[Cell; BOTH]; BOTH],
    stores: [[Store; BOTH]; BOTH],
    /// The rank that fails its load, in each round.
    fails: [Option<u8>; BOTH],
    /// The round that lookups find.
    visible: Option<u8>,
    serving: bool,
    attached: [bool; BOTH],
    alive: [bool; BOTH],
    engine_deaths: u8,
    client_deaths: u8,
}

/// A rule that is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Break {
    /// Shards combine whatever their round, and a rank that has a shard is not asked for another.
    RoundsIgnored,
    /// A rank that fails its load commits like the others.
    FailureIsCommitted,
}

/// Which incomplete chunks a recovery keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keeps {
    /// All. They are evicted like any chunk, or replaced by a newer round.
    All,
    /// Those of which a living rank writes a shard at that moment. A rank that has not asked for its slot yet then completes
    /// a round whose other half is gone.
    BeingWritten,
    None,
}

/// The protocol, within bounds.
#[derive(Clone, Copy, Debug)]
pub struct Rounds {
    /// Which incomplete chunks a recovery keeps.
    pub keeps: Keeps,
    pub engine_deaths: u8,
    pub client_deaths: u8,
    /// The rule that is broken, if any.
    pub broken: Option<Break>,
}

/// A rank's name in traces.
fn rank_name(rank: usize) -> &'static str {
    ["rank 0", "rank 1"][rank]
}

/// A store's name in traces.
fn name_of(round: usize, rank: usize) -> &'static str {
    [["rank 0, round 1", "rank 1, round 1"], ["rank 0, round 2", "rank 1, round 2"]][round][rank]
}

fn is_committed(cell: Cell) -> bool {
    matches!(cell, Cell::Committed(_))
}

/// The round cannot become visible any more: its shards are freed, and slots that are being written become orphans.
fn drop_round(state: &mut State, round: usize) {
    for cell in &mut state.cells[round] {
        *cell = match *cell {
            Cell::Committed(_) | Cell::Free => Cell::Free,
            Cell::Writing | Cell::Orphan => Cell::Orphan,
        };
    }
}

/// The rank does not write there any more: the slot is free, and its round has failed.
fn free_of(state: &mut State, round: usize, rank: usize) {
    if state.cells[round][rank] == Cell::Writing {
        drop_round(state, round);
    }
    if state.cells[round][rank] == Cell::Orphan {
        state.cells[round][rank] = Cell::Free;
    }
}

impl Rounds {
    fn breaks(&self, rule: Break) -> bool {
        self.broken == Some(rule)
    }

    /// Makes the chunk visible if it is complete, and drops the other round then.
    fn complete(&self, state: &mut State, round: usize) {
        let of_rank = |rank: usize| {
            is_committed(state.cells[round][rank])
                || self.breaks(Break::RoundsIgnored) && is_committed(state.cells[1 - round][rank])
        };
        if state.visible.is_none() && of_rank(0) && of_rank(1) {
            state.visible = Some(round as u8);
            if !self.breaks(Break::RoundsIgnored) {
                drop_round(state, 1 - round);
            }
        }
    }

    fn reserve(&self, state: &mut State, round: usize, rank: usize) {
        let has_one = is_committed(state.cells[0][rank]) || is_committed(state.cells[1][rank]);
        let newer =
            round == 0 && state.cells[1].iter().any(|cell| !matches!(cell, Cell::Free | Cell::Orphan));
        if state.visible.is_some() || newer || self.breaks(Break::RoundsIgnored) && has_one {
            state.stores[round][rank] = Store::Over(false);
            return;
        }
        if round == 1 && !self.breaks(Break::RoundsIgnored) {
            drop_round(state, 0);
        }
        state.cells[round][rank] = Cell::Writing;
        state.stores[round][rank] = Store::Answered;
    }

    /// A rank declares the slots that it writes, and the engine frees the others that are WRITING for it.
    fn declare(state: &mut State, rank: usize) {
        state.attached[rank] = true;
        for round in 0..BOTH {
            let store = &mut state.stores[round][rank];
            let holds = matches!(store, Store::Copying | Store::Owing(_));
            if *store == Store::Answered {
                // The grant of a dead engine that was not taken is refused.
                *store = Store::Over(false);
            }
            if !holds {
                free_of(state, round, rank);
            }
        }
    }

    fn settle(&self, state: &mut State, round: usize, rank: usize, commits: bool) {
        let was = state.cells[round][rank];
        state.stores[round][rank] = Store::Done(commits && (was == Cell::Writing || is_committed(was)));
        match was {
            Cell::Writing if commits => {
                state.cells[round][rank] = Cell::Committed(state.fails[round].is_none());
                self.complete(state, round);
            }
            Cell::Writing => {
                drop_round(state, round);
                state.cells[round][rank] = Cell::Free;
            }
            Cell::Orphan => state.cells[round][rank] = Cell::Free,
            Cell::Free | Cell::Committed(_) => {}
        }
    }

    /// A new engine reads the slot table, and knows nothing else.
    fn recover(&self, state: &mut State) {
        state.serving = true;
        for round in 0..BOTH {
            for rank in 0..BOTH {
                let cell = &mut state.cells[round][rank];
                if matches!(cell, Cell::Writing | Cell::Orphan) {
                    // Only the last engine knew that it was an orphan.
                    *cell = if state.alive[rank] { Cell::Writing } else { Cell::Free };
                }
            }
        }
        // The newer round first.
        for round in [1, 0] {
            self.complete(state, round);
        }
        for round in 0..BOTH {
            let writes = state.cells[round].contains(&Cell::Writing);
            let keeps = match self.keeps {
                Keeps::All => true,
                Keeps::BeingWritten => writes,
                Keeps::None => false,
            };
            if state.visible == Some(round as u8) || self.breaks(Break::RoundsIgnored) {
                continue;
            }
            if state.visible.is_some() {
                drop_round(state, round);
            } else if !keeps {
                for cell in &mut state.cells[round] {
                    *cell = if is_committed(*cell) { Cell::Free } else { *cell };
                }
            }
        }
        let forming = |round: usize| state.cells[round].iter().any(|cell| *cell != Cell::Free);
        if state.visible.is_none() && forming(0) && forming(1) && !self.breaks(Break::RoundsIgnored) {
            drop_round(state, 0);
        }
    }
}

impl Model for Rounds {
    type State = State;

    fn initial(&self) -> State {
        State {
            cells: [[Cell::Free; BOTH]; BOTH],
            stores: [[Store::Later; BOTH]; BOTH],
            fails: [None; BOTH],
            visible: None,
            serving: true,
            attached: [true; BOTH],
            alive: [true; BOTH],
            engine_deaths: self.engine_deaths,
            client_deaths: self.client_deaths,
        }
    }

    fn steps(&self, state: &State, out: &mut Vec<Step<State>>) {
        let mut add = |kind, who, what, change: &dyn Fn(&mut State)| {
            let mut next = *state;
            change(&mut next);
            out.push(Step { who, what, kind, next });
        };
        for round in 0..BOTH {
            let begun = state.stores[round].iter().any(|store| *store != Store::Later);
            if begun || (round == 1 && state.stores[0].contains(&Store::Later)) {
                continue;
            }
            for (what, fails) in [
                ("issues a round", None),
                ("issues a round: rank 0 fails to load", Some(0)),
                ("issues a round: rank 1 fails to load", Some(1)),
            ] {
                add(Kind::Environment, "scheduler", what, &|state| {
                    state.fails[round] = fails;
                    for rank in 0..BOTH {
                        let store = if state.alive[rank] { Store::Issued } else { Store::Over(false) };
                        state.stores[round][rank] = store;
                    }
                });
            }
        }
        for rank in 0..BOTH {
            let hears = state.serving && state.attached[rank];
            for round in 0..BOTH {
                let name = name_of(round, rank);
                match state.stores[round][rank] {
                    _ if !state.alive[rank] => {}
                    Store::Issued if hears => {
                        add(Kind::Progress, name, "asks for a slot", &|state| {
                            self.reserve(state, round, rank)
                        });
                    }
                    Store::Issued if state.serving => {
                        add(Kind::Progress, name, "is degraded: drops it", &|state| {
                            state.stores[round][rank] = Store::Over(false);
                        })
                    }
                    Store::Answered => add(Kind::Progress, name, "takes its grant", &|state| {
                        let fails =
                            state.fails[round] == Some(rank as u8) && !self.breaks(Break::FailureIsCommitted);
                        state.stores[round][rank] = if fails { Store::Owing(false) } else { Store::Copying };
                    }),
                    Store::Copying => add(Kind::Progress, name, "has copied", &|state| {
                        state.stores[round][rank] = Store::Owing(true);
                    }),
                    Store::Owing(commits) if hears => {
                        let what = if commits { "commits" } else { "aborts" };
                        add(Kind::Progress, name, what, &|state| self.settle(state, round, rank, commits));
                    }
                    Store::Done(kept) if hears => add(Kind::Progress, name, "is answered", &|state| {
                        state.stores[round][rank] = Store::Over(kept);
                    }),
                    _ => {}
                }
            }
            if state.serving && state.alive[rank] && !state.attached[rank] {
                add(Kind::Progress, rank_name(rank), "attaches again, declares what it writes", &|state| {
                    Rounds::declare(state, rank);
                });
            }
            if state.alive[rank] && state.client_deaths > 0 {
                add(Kind::Environment, rank_name(rank), "DIES", &|state| {
                    state.client_deaths -= 1;
                    (state.alive[rank], state.attached[rank]) = (false, true);
                });
            }
            let left =
                (0..BOTH).find(|round| matches!(state.cells[*round][rank], Cell::Writing | Cell::Orphan));
            if state.serving
                && !state.alive[rank]
                && let Some(round) = left
            {
                add(Kind::Progress, "engine", "frees a dead rank's slot", &|state| {
                    free_of(state, round, rank);
                });
            }
        }
        if state.serving && state.engine_deaths > 0 {
            add(Kind::Environment, "engine", "DIES", &|state| {
                state.engine_deaths -= 1;
                (state.serving, state.attached, state.visible) = (false, [false; BOTH], None);
                for round in 0..BOTH {
                    for rank in 0..BOTH {
                        // The engine did it without an answer, so the rank sends it again.
                        if matches!(state.stores[round][rank], Store::Done(_)) {
                            state.stores[round][rank] = Store::Owing(state.fails[round] != Some(rank as u8));
                        }
                    }
                }
            });
        }
        if !state.serving {
            add(Kind::Progress, "engine", "recovers", &|state| self.recover(state));
        }
    }

    fn violation(&self, state: &State) -> Option<&'static str> {
        let round = state.visible? as usize;
        for rank in 0..BOTH {
            let cell = match state.cells[round][rank] {
                Cell::Free if self.breaks(Break::RoundsIgnored) => state.cells[1 - round][rank],
                cell => cell,
            };
            match cell {
                Cell::Committed(true) => {}
                Cell::Committed(false) => return Some("S2: visible, and garbage"),
                _ => return Some("S2: visible, and not complete"),
            }
        }
        None
    }

    fn at_rest(&self, state: &State) -> Option<&'static str> {
        if state.cells.as_flattened().iter().any(|cell| matches!(cell, Cell::Writing | Cell::Orphan)) {
            return Some("S4: at rest, and a slot is WRITING for nobody");
        }
        let newest = if state.stores[1][0] == Store::Later { 0 } else { 1 };
        if state.visible.is_none() && state.stores[newest] == [Store::Over(true); BOTH] {
            return Some("S3: every shard of a round was acknowledged, and the chunk is not there");
        }
        for round in 0..BOTH {
            let some = state.cells[round].iter().any(|cell| is_committed(*cell));
            let other = state.visible.is_some_and(|visible| usize::from(visible) != round);
            if some && other && !self.breaks(Break::RoundsIgnored) {
                return Some("S4: at rest, and a shard belongs to a chunk that has another");
            }
        }
        None
    }

    fn describe(&self, state: &State) -> String {
        format!(
            "visible {:?} | round 1 {:?} {:?} | round 2 {:?} {:?} | {}",
            state.visible.map(|round| round + 1),
            state.cells[0],
            state.stores[0],
            state.cells[1],
            state.stores[1],
            if state.serving { "serving" } else { "down" }
        )
    }
}
