//! Which process wakes which at an engine's death and restart, if no sleeper ever looks again by itself.
//!
//! The kernel wakes one sleeper of a marked word. Callers sleep on a ticket of their own and on the engine's life word;
//! the keeper on the life word and on the incarnation. A new engine takes over the very word that they sleep on, perhaps
//! with the same TID, and perhaps before any of them has looked at it: then the word is as it was, and only the incarnation
//! tells of the death. In the code every sleep is bounded, by 50 ms and 10 s: this model leaves that safety net out.

use super::{Kind, Model, Step};

/// The keeper, and two callers.
const SLEEPERS: usize = 3;
const KEEPER: usize = 0;

/// The engine's life word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Life {
    /// The engine that the sleepers know lives.
    Old,
    /// Marked.
    Dead,
    /// Its successor has taken it over.
    New,
}

/// How far a sleeper is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Sleeper {
    /// A caller announces itself next; the keeper reads the life word that it will sleep on.
    Begins,
    /// A caller looks next whether its engine lives; so does the keeper, which keeps the value that it has read.
    Looks(u8),
    /// A caller next reads the value that it will sleep on.
    Reads,
    /// It calls the kernel next, with that value.
    Calls(u8),
    /// It sleeps.
    Sleeps,
    /// It was woken, or never slept. If it finds a mark it wakes the others.
    Woken,
    /// The keeper knows that its engine is gone, and wakes the callers next.
    Tells,
    /// It knows that its engine is gone.
    Knows,
}

/// How far a new engine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Engine {
    /// There is no new engine.
    None,
    /// It has stored an odd incarnation.
    Odd,
    /// It has woken the sleepers on the incarnation.
    Woke,
    /// It has taken over the life word.
    Lives,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct State {
    life: Life,
    restarted: bool,
    engine: Engine,
    sleepers: [Sleeper; SLEEPERS],
    /// The ticket of each caller has changed since it announced itself.
    roused: [bool; SLEEPERS],
    deaths: u8,
}

/// A rule that is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Break {
    /// A sleeper that a mark wakes does not wake the others.
    PassesNothingOn,
    /// A new engine wakes no sleeper.
    EngineWakesNobody,
    /// The keeper wakes no caller.
    KeeperTellsNobody,
}

/// The protocol, within bounds.
#[derive(Clone, Copy, Debug)]
pub struct Wakeups {
    /// A successor's word has the value that its predecessor's had.
    pub equal_tids: bool,
    /// The rule that is broken, if any.
    pub broken: Option<Break>,
}

impl Wakeups {
    fn raw(&self, life: Life) -> u8 {
        match life {
            Life::Old => 1,
            Life::Dead => 2,
            Life::New if self.equal_tids => 1,
            Life::New => 3,
        }
    }

    fn wakes_up(state: &mut State, sleeper: usize) {
        if state.sleepers[sleeper] == Sleeper::Sleeps {
            state.sleepers[sleeper] = Sleeper::Woken;
        }
    }

    /// The kernel marks the word and wakes one of its sleepers; if there are several, any.
    fn mark(state: &State, out: &mut Vec<Step<State>>) {
        let mut next = *state;
        next.deaths -= 1;
        (next.engine, next.life) = (Engine::None, Life::Dead);
        let asleep = (0..SLEEPERS).filter(|at| state.sleepers[*at] == Sleeper::Sleeps);
        let before = out.len();
        for sleeper in asleep {
            let mut next = next;
            next.sleepers[sleeper] = Sleeper::Woken;
            out.push(Step {
                who: "kernel",
                what: "marks the life word, wakes one",
                kind: Kind::Environment,
                next,
            });
        }
        if out.len() == before {
            out.push(Step { who: "kernel", what: "marks the life word", kind: Kind::Environment, next });
        }
    }

    fn sleeper_step(&self, state: &mut State, at: usize) {
        let gone = state.life == Life::Dead || state.restarted;
        let keeper = at == KEEPER;
        state.sleepers[at] = match state.sleepers[at] {
            Sleeper::Begins if keeper => Sleeper::Looks(self.raw(state.life)),
            Sleeper::Begins => {
                state.roused[at] = false;
                Sleeper::Looks(0)
            }
            Sleeper::Looks(_) if gone && keeper => Sleeper::Tells,
            Sleeper::Looks(_) if gone => Sleeper::Knows,
            Sleeper::Looks(raw) if keeper => Sleeper::Calls(raw),
            Sleeper::Looks(_) => Sleeper::Reads,
            Sleeper::Reads if state.life == Life::Dead => Sleeper::Begins,
            Sleeper::Reads => Sleeper::Calls(self.raw(state.life)),
            Sleeper::Calls(raw) => {
                let other = if keeper { state.restarted } else { state.roused[at] };
                if raw == self.raw(state.life) && !other { Sleeper::Sleeps } else { Sleeper::Woken }
            }
            Sleeper::Woken => {
                if state.life == Life::Dead && self.broken != Some(Break::PassesNothingOn) {
                    (0..SLEEPERS).for_each(|other| Wakeups::wakes_up(state, other));
                }
                Sleeper::Begins
            }
            Sleeper::Tells => {
                if self.broken != Some(Break::KeeperTellsNobody) {
                    for other in (0..SLEEPERS).filter(|other| *other != KEEPER) {
                        state.roused[other] = true;
                        Wakeups::wakes_up(state, other);
                    }
                }
                Sleeper::Knows
            }
            same @ (Sleeper::Sleeps | Sleeper::Knows) => same,
        };
    }
}

impl Model for Wakeups {
    type State = State;

    fn initial(&self) -> State {
        State {
            life: Life::Old,
            restarted: false,
            engine: Engine::None,
            sleepers: [Sleeper::Begins; SLEEPERS],
            roused: [false; SLEEPERS],
            deaths: 2,
        }
    }

    fn steps(&self, state: &State, out: &mut Vec<Step<State>>) {
        for at in 0..SLEEPERS {
            if !matches!(state.sleepers[at], Sleeper::Sleeps | Sleeper::Knows) {
                let mut next = *state;
                self.sleeper_step(&mut next, at);
                let who = ["keeper", "caller 1", "caller 2"][at];
                out.push(Step { who, what: "goes on", kind: Kind::Progress, next });
            }
        }
        if state.deaths > 0 && (state.life == Life::Old || state.engine == Engine::Lives) {
            Wakeups::mark(state, out);
        }
        let mut next = *state;
        // It is not certain that a new engine comes, but one that has come goes on.
        let (what, kind) = match state.engine {
            Engine::None if state.life == Life::Dead => {
                (next.engine, next.restarted) = (Engine::Odd, true);
                ("a new one stores an odd incarnation", Kind::Environment)
            }
            Engine::Odd => {
                next.engine = Engine::Woke;
                if self.broken != Some(Break::EngineWakesNobody) {
                    Wakeups::wakes_up(&mut next, KEEPER);
                }
                ("wakes who sleeps on the incarnation", Kind::Progress)
            }
            Engine::Woke => {
                (next.engine, next.life) = (Engine::Lives, Life::New);
                ("takes over the life word", Kind::Progress)
            }
            Engine::None | Engine::Lives => return,
        };
        out.push(Step { who: "engine", what, kind, next });
    }

    fn violation(&self, _state: &State) -> Option<&'static str> {
        None
    }

    fn at_rest(&self, state: &State) -> Option<&'static str> {
        let all_know = state.sleepers.iter().all(|sleeper| *sleeper == Sleeper::Knows);
        (state.life != Life::Old && !all_know).then_some("S5: at rest, and somebody sleeps on a dead engine")
    }

    fn describe(&self, state: &State) -> String {
        format!("{:?} {:?} restarted {} {:?}", state.life, state.engine, state.restarted, state.sleepers)
    }
}
