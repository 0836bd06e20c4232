//! A small explicit-state model checker, and models of the protocols whose races no single test can bring about.
//!
//! [`check`] visits every state that a [`Model`] can reach, breadth first, so that the counterexample it returns is a
//! shortest one. Three kinds of claims are checked:
//!
//! * **always**: [`Model::violation`] of no state;
//! * **at rest**: where no [`Kind::Progress`] step is left, [`Model::at_rest`] finds nothing wrong. Leaks and deadlocks
//!   show here;
//! * **rest is reachable**: from every state a state at rest can be reached by progress alone, without deaths, timeouts or
//!   new work (AG EF rest).
//!
//! States are small `Copy` values, each stored once. Steps are not stored, but found again when a trace is printed.

pub mod restart;
pub mod rounds;
pub mod wakeups;

use std::fmt::{self, Display, Write};
use std::hash::{Hash, Hasher};

/// Whether a step is certain to be taken while all processes run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A process does what it has to do.
    Progress,
    /// A death, a timeout, an eviction, new work: it may never happen, so nothing may depend on it.
    Environment,
}

/// One step out of a state.
#[derive(Clone, Copy, Debug)]
pub struct Step<S> {
    /// Who does it.
    pub who: &'static str,
    /// What is done.
    pub what: &'static str,
    /// Whether rest depends on it.
    pub kind: Kind,
    /// The state after it.
    pub next: S,
}

/// A protocol: its states, what can happen in each, and what must hold.
pub trait Model {
    /// Everything that the future depends on, and no more.
    type State: Copy + Eq + Hash;

    /// Where it begins.
    fn initial(&self) -> Self::State;

    /// Adds every step that is possible in `state`.
    fn steps(&self, state: &Self::State, out: &mut Vec<Step<Self::State>>);

    /// What is wrong with this state.
    fn violation(&self, state: &Self::State) -> Option<&'static str>;

    /// What is wrong with this state if no progress is possible.
    fn at_rest(&self, state: &Self::State) -> Option<&'static str>;

    /// One line for people.
    fn describe(&self, state: &Self::State) -> String;
}

/// What was visited, where nothing was wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Explored {
    /// Distinct states.
    pub states: usize,
    /// Steps between them.
    pub steps: usize,
    /// How many of the states are at rest.
    pub at_rest: usize,
    /// Steps to the farthest state.
    pub depth: usize,
}

/// A shortest way to a state that must not be.
#[derive(Clone, Debug)]
pub struct Counterexample {
    /// What is wrong with the last state.
    pub what: &'static str,
    /// The steps, each with the state after it.
    pub trace: Vec<String>,
    /// States visited before it was found.
    pub states: usize,
}

impl Display for Counterexample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} (found after {} states; {} steps):", self.what, self.states, self.trace.len() - 1)?;
        for (number, line) in self.trace.iter().enumerate() {
            writeln!(f, "{number:>4}  {line}")?;
        }
        Ok(())
    }
}

/// States that can be found again by their content, each with a number in the order of discovery.
struct Seen<S> {
    states: Vec<S>,
    /// The number of the state that this one was first reached from; its own for the first.
    parents: Vec<u32>,
    /// Open addressing: the number of a state + 1, or 0. Its length is a power of two.
    table: Vec<u32>,
}

impl<S: Copy + Eq + Hash> Seen<S> {
    fn new() -> Seen<S> {
        Seen { states: Vec::new(), parents: Vec::new(), table: vec![0; 1 << 12] }
    }

    /// The number of a state, and whether it is new.
    fn insert(&mut self, state: S, parent: u32) -> (u32, bool) {
        if (self.states.len() + 1) * 2 > self.table.len() {
            self.grow();
        }
        let mask = self.table.len() - 1;
        let mut at = hash_of(&state) as usize & mask;
        while self.table[at] != 0 {
            let number = self.table[at] - 1;
            if self.states[number as usize] == state {
                return (number, false);
            }
            at = (at + 1) & mask;
        }
        let number = self.states.len() as u32;
        self.table[at] = number + 1;
        self.states.push(state);
        self.parents.push(parent);
        (number, true)
    }

    fn grow(&mut self) {
        let mask = self.table.len() * 4 - 1;
        let mut table = vec![0; mask + 1];
        for (number, state) in self.states.iter().enumerate() {
            let mut at = hash_of(state) as usize & mask;
            while table[at] != 0 {
                at = (at + 1) & mask;
            }
            table[at] = number as u32 + 1;
        }
        self.table = table;
    }
}

/// Multiply and rotate: states are a few dozen small integers, and nobody attacks this table.
#[derive(Default)]
struct QuickHasher(u64);

impl QuickHasher {
    fn mix(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(5) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

impl Hasher for QuickHasher {
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.mix(u64::from_le_bytes(word));
        }
    }
    fn write_u8(&mut self, value: u8) {
        self.mix(u64::from(value));
    }
    fn write_usize(&mut self, value: usize) {
        self.mix(value as u64);
    }
    fn write_isize(&mut self, value: isize) {
        self.mix(value as u64);
    }
    fn finish(&self) -> u64 {
        // The table takes the low bits; multiplication has stirred the high ones.
        self.0 ^ (self.0 >> 32)
    }
}

fn hash_of<S: Hash>(state: &S) -> u64 {
    let mut hasher = QuickHasher::default();
    state.hash(&mut hasher);
    hasher.finish()
}

/// Visits every reachable state. The error is the shortest way to a state that is wrong, or that is at rest and wrong, or
/// else to one from which rest cannot be reached.
pub fn check<M: Model>(model: &M, states_max: usize) -> Result<Explored, Counterexample> {
    let mut seen = Seen::new();
    let first = model.initial();
    seen.insert(first, 0);
    if let Some(what) = model.violation(&first) {
        return Err(tell(model, &seen, 0, what));
    }
    // The steps of progress, each as (to, from).
    let mut progress: Vec<(u32, u32)> = Vec::new();
    let mut resting: Vec<u32> = Vec::new();
    let (mut steps, mut depth, mut level_end) = (0, 0, 1);
    let mut out = Vec::new();
    let mut at = 0;
    while at < seen.states.len() {
        if at == level_end {
            (depth, level_end) = (depth + 1, seen.states.len());
        }
        out.clear();
        model.steps(&seen.states[at], &mut out);
        let mut rests = true;
        for step in &out {
            let (number, new) = seen.insert(step.next, at as u32);
            if step.kind == Kind::Progress {
                rests = false;
                progress.push((number, at as u32));
            }
            if new && let Some(what) = model.violation(&step.next) {
                return Err(tell(model, &seen, number, what));
            }
        }
        steps += out.len();
        if rests {
            resting.push(at as u32);
            if let Some(what) = model.at_rest(&seen.states[at]) {
                return Err(tell(model, &seen, at as u32, what));
            }
        }
        assert!(seen.states.len() <= states_max, "more than {states_max} states at depth {depth}");
        at += 1;
    }
    let at_rest = resting.len();
    if let Some(lost) = first_that_never_rests(seen.states.len(), progress, resting) {
        return Err(tell(model, &seen, lost, "S5: from here nobody ever comes to rest, whatever they do"));
    }
    Ok(Explored { states: seen.states.len(), steps, at_rest, depth })
}

/// The first state from which no progress leads to one of `resting`. `edges` are (to, from).
fn first_that_never_rests(states: usize, mut edges: Vec<(u32, u32)>, mut resting: Vec<u32>) -> Option<u32> {
    edges.sort_unstable();
    let mut begins = vec![0u32; states + 1];
    for (to, _) in &edges {
        begins[*to as usize + 1] += 1;
    }
    for state in 0..states {
        begins[state + 1] += begins[state];
    }
    let mut reaches = vec![false; states];
    for state in &resting {
        reaches[*state as usize] = true;
    }
    while let Some(state) = resting.pop() {
        let (begin, end) = (begins[state as usize] as usize, begins[state as usize + 1] as usize);
        for (_, from) in &edges[begin..end] {
            if !reaches[*from as usize] {
                reaches[*from as usize] = true;
                resting.push(*from);
            }
        }
    }
    reaches.iter().position(|reaches| !reaches).map(|state| state as u32)
}

/// The steps that first led to a state.
fn tell<M: Model>(model: &M, seen: &Seen<M::State>, last: u32, what: &'static str) -> Counterexample {
    let mut path = vec![last];
    while path[path.len() - 1] != 0 {
        path.push(seen.parents[path[path.len() - 1] as usize]);
    }
    path.reverse();
    let mut trace = vec![format!("{:62} {}", "in the beginning", model.describe(&seen.states[0]))];
    let mut out = Vec::new();
    for pair in path.windows(2) {
        let (from, to) = (seen.states[pair[0] as usize], seen.states[pair[1] as usize]);
        out.clear();
        model.steps(&from, &mut out);
        let mut line = String::new();
        if let Some(step) = out.iter().find(|step| step.next == to) {
            let _ = write!(line, "{}: {}", step.who, step.what);
        }
        trace.push(format!("{line:62} {}", model.describe(&to)));
    }
    Counterexample { what, trace, states: seen.states.len() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts to `top` by 2 or by 3, and may go back to `trap`, where it stays.
    struct Counter {
        top: u8,
        bad: u8,
        trap: Option<u8>,
    }

    impl Model for Counter {
        type State = u8;
        fn initial(&self) -> u8 {
            0
        }
        fn steps(&self, state: &u8, out: &mut Vec<Step<u8>>) {
            let step = |what, next| Step { who: "it", what, kind: Kind::Progress, next };
            if self.trap == Some(*state) {
                out.push(step("turns in circles", *state));
                return;
            }
            for (what, by) in [("adds 2", 2), ("adds 3", 3)] {
                if state + by <= self.top {
                    out.push(step(what, state + by));
                }
            }
        }
        fn violation(&self, state: &u8) -> Option<&'static str> {
            (*state == self.bad).then_some("bad")
        }
        fn at_rest(&self, state: &u8) -> Option<&'static str> {
            (*state + 1 < self.top).then_some("early")
        }
        fn describe(&self, state: &u8) -> String {
            state.to_string()
        }
    }

    #[test]
    fn everything_is_visited_and_the_shortest_way_is_told() {
        let explored = check(&Counter { top: 10, bad: 99, trap: None }, 100).unwrap();
        assert_eq!((explored.states, explored.at_rest), (10, 2));
        let found = check(&Counter { top: 10, bad: 9, trap: None }, 100).unwrap_err();
        assert_eq!((found.what, found.trace.len()), ("bad", 4), "{found}");
        let found = check(&Counter { top: 10, bad: 99, trap: Some(4) }, 100).unwrap_err();
        assert!(found.what.starts_with("S5") && found.trace.len() == 3, "{found}");
    }
}
