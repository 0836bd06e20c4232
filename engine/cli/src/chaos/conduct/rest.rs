//! How a phase and the run end: everybody goes on, everything is looked at once more, and nobody does anything.

use super::Conductor;
use crate::chaos::fleet::Fleet;
use crate::chaos::message::ToScheduler;
use crate::chaos::plan::{INSTANCES, Phase, RANKS, Who};
use crate::chaos::{Sabotage, WAIT_MAX};
use anyhow::bail;
use std::time::{Duration, Instant};

impl Conductor<'_> {
    /// Turns until it is so, and an engine serves. Nothing that is waited for here takes long, unless somebody hangs; and
    /// whoever hangs is killed and started again.
    pub(in crate::chaos) fn await_all(
        &mut self,
        what: &str,
        done: impl Fn(&Fleet) -> bool,
    ) -> anyhow::Result<()> {
        let began = Instant::now();
        loop {
            self.turn()?;
            if self.engine.has_settled() && done(&self.fleet) {
                return Ok(());
            }
            if began.elapsed() > WAIT_MAX {
                bail!("waited {} s in vain for {what}", began.elapsed().as_secs());
            }
        }
    }

    /// Everybody goes on and is there; no new requests, everything is looked at once more, all sessions end.
    pub(in crate::chaos) fn come_to_rest(&mut self) -> anyhow::Result<()> {
        self.engine.calm();
        self.fleet.calm();
        self.await_all("everybody to go on", Fleet::all_ready)?;
        if self.sabotage == Some(Sabotage::Corrupt) {
            self.engine.corrupt()?;
        }
        self.finishing = true;
        (0..INSTANCES).for_each(|instance| self.fleet.tell_scheduler(instance, &ToScheduler::Finish));
        let scheduler = |who| matches!(who, Who::Scheduler { .. });
        self.await_all("the schedulers to finish", |fleet| fleet.all_quiet(scheduler))?;
        self.draining = true;
        for instance in 0..INSTANCES {
            (0..RANKS).for_each(|rank| self.drain(instance, rank));
        }
        self.await_all("the workers to finish", |fleet| fleet.all_quiet(|_| true))
    }

    /// Negative controls that strike at the end of a roomy phase.
    pub(in crate::chaos) fn sabotage(&mut self, phase: &Phase) -> anyhow::Result<()> {
        match self.sabotage.filter(|_| phase.roomy) {
            Some(Sabotage::Hang) => self.fleet.stop(Who::Worker { instance: 0, rank: 0 }, None),
            Some(Sabotage::Lose) => {
                // Something has to be there to be lost.
                let began = Instant::now();
                self.engine.calm();
                self.fleet.calm();
                while self.oracle.promised() == 0 && began.elapsed() < WAIT_MAX {
                    self.turn()?;
                }
                self.engine.kill_and_remove()?;
            }
            // At the end.
            Some(Sabotage::Corrupt | Sabotage::Leak | Sabotage::Careless) | None => {}
        }
        Ok(())
    }

    /// Turns for a while.
    pub(in crate::chaos) fn rest(&mut self, pause: Duration) -> anyhow::Result<()> {
        let until = Instant::now() + pause;
        while Instant::now() < until {
            self.turn()?;
        }
        Ok(())
    }

    /// Everybody ends, politely.
    pub(in crate::chaos) fn end_all(&mut self) -> anyhow::Result<()> {
        Who::all().into_iter().for_each(|who| self.fleet.end(who, false));
        self.await_all("everybody to end", Fleet::all_ended)?;
        if !self.engine.end()? {
            self.counts.hangs += 1;
            self.find("the engine does not end".to_owned());
        }
        Ok(())
    }
}
