//! How a phase and the run end: everybody goes on, everything is looked at once more, and nobody does anything.

use super::Chaos;
use crate::chaos::plan::Phase;
use crate::chaos::work::Turn;
use crate::chaos::{FINGERPRINT, QUIET, Sabotage};
use crate::instances::{Conductor, Fleet, WAIT_MAX, Who, hold_lease};
use kvring_engine::stats::Stat;
use std::time::Instant;

impl Chaos<'_> {
    /// Everybody goes on and is there.
    pub(in crate::chaos) fn let_all_go_on(&mut self) -> anyhow::Result<()> {
        self.run.engine.calm();
        self.run.fleet.calm();
        self.await_all("everybody to go on", Fleet::all_ready)?;
        if self.sabotage == Some(Sabotage::Corrupt) {
            self.run.engine.corrupt()?;
        }
        Ok(())
    }

    /// Negative controls that strike at the end of a roomy phase.
    pub(in crate::chaos) fn sabotage(&mut self, phase: &Phase) -> anyhow::Result<()> {
        match self.sabotage.filter(|_| phase.roomy) {
            Some(Sabotage::Hang) => self.run.fleet.stop(Who::Worker { instance: 0, rank: 0 }, None),
            Some(Sabotage::Lose) => {
                // Something has to be there to be lost.
                let began = Instant::now();
                self.run.engine.calm();
                self.run.fleet.calm();
                while self.oracle.promised() == 0 && began.elapsed() < WAIT_MAX {
                    self.turn()?;
                }
                self.run.engine.kill_and_remove()?;
            }
            // At the end.
            Some(Sabotage::Corrupt | Sabotage::Leak | Sabotage::Careless) | None => {}
        }
        Ok(())
    }

    /// Looks for leaks after a second of quiet.
    pub(in crate::chaos) fn look_for_leaks(&mut self, phase: u32) -> anyhow::Result<()> {
        let (seed, leak) = (self.seed, self.sabotage == Some(Sabotage::Leak));
        let until = Instant::now() + QUIET;
        while Instant::now() < until {
            self.turn()?;
        }
        let prompts = Turn::all(phase, 1 << 20).map(|turn| turn.keys(seed));
        let left = self.check_leaks("chaos coordinator", |client| {
            leak.then(|| hold_lease(client, FINGERPRINT, prompts)).transpose()
        })?;
        // Allowed, as a dropped store is: a rank died, or had no room. They go when room is needed, or with a newer round.
        self.counts.forming_left += left.stats.get(Stat::ChunksForming);
        self.counts.leaked_leases += left.leases;
        self.counts.leaked_slots += left.writing + left.kept;
        self.counts.leaked_segments += left.segments;
        for (count, what) in [
            (left.leases, "leases and pins are held after all sessions have ended".to_owned()),
            (left.writing, "slots are being written, or orphaned, after all jobs have ended".to_owned()),
            (left.kept, "slots and forming chunks are left after a clear".to_owned()),
            (left.segments, format!("segments beyond the engine's own: {:?}", left.files)),
        ] {
            if count > 0 {
                self.find(format!("phase {phase}: {count} {what}"));
            }
        }
        Ok(())
    }
}
