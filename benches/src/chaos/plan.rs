//! The plan of a run: phases, each with an arena of its own, and the strikes in each of them.
//!
//! The seed alone determines the plan. The machine decides when exactly a strike comes, and what a process is doing then.

use crate::instances::{Setup, Who};
use kvring_engine::policy::PolicyKind;
use kvring_rig::random::Random;
use std::time::Duration;

/// Instances: a scheduler and its workers.
pub(crate) const INSTANCES: u32 = 2;
/// Ranks of each instance, a worker each.
pub(super) const RANKS: u32 = 2;

/// The longest phase.
const PHASE_MAX_S: u64 = 20;
const MIB: u64 = 1 << 20;

/// A stretch of chaos with one arena, which begins with a cold start that was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Phase {
    /// Its number; the keys of different phases differ.
    pub(super) number: u32,
    /// Does the arena hold everything that is ever stored in the phase? Then nothing may be lost.
    pub(super) roomy: bool,
    /// The arena.
    pub(super) arena_bytes: u64,
    /// The engine's policy.
    pub(super) policy: PolicyKind,
    /// The part of the arena that one client may hold, in percent.
    pub(super) client_share: u64,
    /// How long it lasts.
    pub(super) duration: Duration,
}

impl Phase {
    /// How its engine is started.
    pub(super) fn setup(&self) -> Setup {
        let Phase { arena_bytes, policy, client_share, roomy, .. } = *self;
        Setup { arena_bytes, policy, client_share: Some(client_share), roomy }
    }
}

/// The phases of a run.
pub(super) fn phases(seed: u64, seconds: u64) -> Vec<Phase> {
    let mut random = Random::new(seed, u64::from_le_bytes(*b"phases\0\0"));
    // At least two where there is time for two things to happen: one with room, one without.
    let count = seconds.div_ceil(PHASE_MAX_S).max(2.min(seconds / 3)).max(1);
    let duration = Duration::from_millis(seconds * 1000 / count);
    let phase = |number| {
        // The first two are one of each kind; then two of three have room.
        let roomy = number == 0 || (number > 1 && random.percent(66));
        let arena = if roomy { [224, 256, 288, 320] } else { [8, 12, 16, 32] }[random.of(0..4) as usize];
        let policy = if random.percent(50) { PolicyKind::Lru } else { PolicyKind::Arc };
        let client_share = if roomy { 100 } else { [25, 50, 100][random.of(0..3) as usize] };
        Phase { number, roomy, arena_bytes: arena * MIB, policy, client_share, duration }
    };
    (0..count as u32).map(phase).collect()
}

/// A strike: what is done, and to whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// `kill -9` of the engine.
    KillEngine {
        /// Dead for so long.
        pause: Duration,
        /// Killed again this soon after its restart.
        again: Option<Duration>,
    },
    /// The engine stands still.
    StopEngine(Duration),
    /// `kill -9` of a client.
    Kill(Who, Duration),
    /// A client stands still.
    Stop(Who, Duration),
    /// A client ends politely, and is started again.
    End(Who),
    /// The cache is cleared, through this instance's scheduler.
    Clear(u32),
}

impl Action {
    /// Whose store it may wait for, if any store at all: the engine's every worker, or one worker.
    pub(super) fn prey(self) -> Option<Option<Who>> {
        match self {
            Action::KillEngine { .. } | Action::StopEngine(_) => Some(None),
            Action::Kill(who @ Who::Worker { .. }, _) | Action::Stop(who @ Who::Worker { .. }, _) => {
                Some(Some(who))
            }
            _ => None,
        }
    }
}

/// An action, and when it strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Strike {
    /// How long after the last one.
    pub(super) wait: Duration,
    /// The action.
    pub(super) action: Action,
    /// It waits for a store that it may interrupt, and strikes this long after slots were given for it.
    pub(super) aim: Option<Duration>,
}

/// The endless plan of one phase.
#[derive(Debug)]
pub(super) struct Plan {
    random: Random,
}

impl Plan {
    /// The plan of this phase.
    pub(super) fn new(seed: u64, phase: &Phase) -> Plan {
        Plan { random: Random::new(seed, u64::from(phase.number) << 32 | 0xac7) }
    }

    /// The next strike.
    pub(super) fn next(&mut self) -> Strike {
        let random = &mut self.random;
        let wait = random.ms(120..800);
        let pause = if random.percent(30) { Duration::ZERO } else { random.ms(0..300) };
        let who = random.pick(&Who::all(INSTANCES, RANKS));
        let action = match random.of(0..100) {
            0..28 => {
                let again = random.percent(25).then(|| random.ms(0..12));
                Action::KillEngine { pause, again }
            }
            28..38 => {
                let longest = if random.percent(25) { 3000 } else { 500 };
                Action::StopEngine(random.ms(100..longest))
            }
            38..66 => Action::Kill(who, pause),
            66..92 => Action::Stop(who, random.ms(100..1500)),
            92..97 => Action::End(who),
            _ => Action::Clear(random.of(0..INSTANCES.into()) as u32),
        };
        let aim = Duration::from_micros(random.of(0..400));
        Strike { wait, action, aim: random.percent(60).then_some(aim) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seed_fixes_the_plan() {
        let of = |seed| {
            let mut plan = Plan::new(seed, &phases(seed, 60)[0]);
            (0..50).map(|_| plan.next()).collect::<Vec<_>>()
        };
        assert_eq!(of(3), of(3));
        assert_ne!(of(3), of(4));
        assert_eq!(phases(5, 120), phases(5, 120));
    }

    #[test]
    fn a_run_lasts_as_long_as_it_was_asked_to_and_has_both_kinds_of_phases() {
        for seconds in [1, 3, 6, 8, 60, 61, 600] {
            let phases = phases(9, seconds);
            let sum: Duration = phases.iter().map(|phase| phase.duration).sum();
            assert!(sum.as_secs_f64() > seconds as f64 - 0.1 && sum.as_secs_f64() <= seconds as f64);
            assert!(phases[0].roomy);
            assert!(seconds < 6 || phases.iter().any(|phase| !phase.roomy));
        }
    }

    #[test]
    fn a_minute_has_more_than_twenty_kills() {
        for seed in 0..20 {
            let mut plan = Plan::new(seed, &phases(seed, 60)[0]);
            let (mut time, mut kills) = (Duration::ZERO, 0);
            while time < Duration::from_secs(60) {
                let Strike { wait, action, .. } = plan.next();
                time += wait;
                kills += u32::from(matches!(action, Action::KillEngine { .. } | Action::Kill(..)));
            }
            assert!(kills > 40, "seed {seed}: {kills}");
        }
    }
}
