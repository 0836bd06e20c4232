//! Carries out what the plan says: at once, or in the middle of a store.

use super::Chaos;
use crate::chaos::plan::{Action, Phase, Plan, Strike};
use crate::instances::{Conductor, ToScheduler, Who};
use std::time::{Duration, Instant};

/// How long an action waits for a store that it may interrupt.
const AMBUSH_MAX: Duration = Duration::from_millis(300);
/// How long such a store may take until it has its slots.
const RESERVE_MAX: Duration = Duration::from_millis(5);

impl Chaos<'_> {
    /// Strikes as planned, for as long as the phase lasts.
    pub(in crate::chaos) fn run_phase(&mut self, phase: &Phase) -> anyhow::Result<()> {
        let mut plan = Plan::new(self.seed, phase);
        let ends = Instant::now() + phase.duration;
        let mut strike = plan.next();
        let mut due = Instant::now() + strike.wait;
        while Instant::now() < ends {
            self.turn()?;
            self.end_ambush(AMBUSH_MAX)?;
            if Instant::now() >= due && self.ambush.is_none() {
                self.prepare(strike)?;
                strike = plan.next();
                due = Instant::now() + strike.wait;
            }
        }
        self.end_ambush(Duration::ZERO)
    }

    /// Strikes, or lies in wait for a store.
    fn prepare(&mut self, strike: Strike) -> anyhow::Result<()> {
        let Strike { action, aim, .. } = strike;
        match (aim, action.prey()) {
            (Some(aim), Some(prey)) => {
                // If the worker that is meant is not there, another one is struck in its stead.
                let prey = prey.and_then(|who| self.run.fleet.target(who));
                self.ambush = Some((action, prey, aim, Instant::now()));
                Ok(())
            }
            _ => self.strike(action),
        }
    }

    /// Strikes without a store, if none has come for so long.
    fn end_ambush(&mut self, after: Duration) -> anyhow::Result<()> {
        match self.ambush.take_if(|(.., since)| since.elapsed() >= after) {
            Some((action, ..)) => self.strike(action),
            None => Ok(()),
        }
    }

    /// This worker has just been told to store something.
    pub(super) fn store_begins(&mut self, worker: Who) -> anyhow::Result<()> {
        match self.ambush.take_if(|(_, prey, ..)| prey.is_none_or(|prey| prey == worker)) {
            Some((action, _, aim, _)) => {
                let (before, began) = (self.run.engine.reserved(), Instant::now());
                while self.run.engine.reserved() == before && began.elapsed() < RESERVE_MAX {}
                std::thread::sleep(aim);
                self.strike(action)
            }
            None => Ok(()),
        }
    }

    fn strike(&mut self, action: Action) -> anyhow::Result<()> {
        tracing::info!(?action, "chaos");
        match action {
            Action::KillEngine { pause, again } => {
                if self.run.engine.may_be_killed() {
                    self.run.counts.caught_writing += u64::from(self.run.engine.writing() > 0);
                    self.run.engine.kill(pause, again)?;
                    self.run.counts.engine_kills += 1;
                    self.run.counts.restarts += u64::from(pause.is_zero());
                    self.disturbed();
                }
            }
            Action::StopEngine(pause) => {
                self.counts.stops += u64::from(self.run.engine.stop(pause));
                self.disturbed();
            }
            Action::Kill(who, pause) => {
                if let Some(who) = self.run.fleet.target(who) {
                    self.run.fleet.kill(who, pause);
                    match who {
                        Who::Scheduler { .. } => self.counts.scheduler_kills += 1,
                        Who::Worker { .. } => self.counts.worker_kills += 1,
                    }
                    self.run.gone(who);
                    self.gone(who);
                }
            }
            Action::Stop(who, pause) => {
                if let Some(who) = self.run.fleet.target(who) {
                    self.run.fleet.stop(who, Some(pause));
                    self.counts.stops += 1;
                }
            }
            Action::End(who) => {
                if let Some(who) = self.run.fleet.target(who) {
                    self.run.fleet.end(who, true);
                    self.run.gone(who);
                    self.gone(who);
                }
            }
            Action::Clear(instance) => {
                let who = Who::Scheduler { instance };
                if self.clearing.is_none() && self.run.fleet.target(who) == Some(who) {
                    self.oracle.begin_clear();
                    self.clearing = Some((instance, None));
                    self.counts.clears += 1;
                    self.run.fleet.tell_scheduler(instance, &ToScheduler::Clear);
                }
            }
        }
        self.bar.set_message(format!("{} kills, {} stops", self.kills(), self.counts.stops));
        Ok(())
    }
}
