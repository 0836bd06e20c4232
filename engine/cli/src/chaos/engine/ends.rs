//! Ends of the engine that were asked for, and what remains.

use super::{Engine, START_MAX};
use crate::chaos::plan::Phase;
use anyhow::anyhow;
use kvring_engine::config::EngineConfig;
use kvring_engine::segments;
use kvring_rig::shm;
use nix::sys::signal::Signal;

impl Engine {
    /// The next phase: a cold start that was asked for, in one of three ways.
    pub(in crate::chaos) fn begin_phase(&mut self, phase: &Phase, way: u64) -> anyhow::Result<()> {
        let same_geometry = self.phase.arena_bytes == phase.arena_bytes;
        match way % 3 {
            0 => self.end().map(drop)?,
            // Another geometry is a cold start by itself.
            1 if !same_geometry => self.process = None,
            _ => {
                self.process = None;
                self.remove()?;
            }
        }
        self.end_of_life();
        self.phase = phase.clone();
        self.start()
    }

    /// Takes its segments away.
    pub(in crate::chaos) fn remove(&self) -> anyhow::Result<()> {
        segments::remove(&self.name, true, EngineConfig::default().start_wait())?;
        Ok(())
    }

    /// Negative control: its segments go between its death and its next life.
    pub(in crate::chaos) fn kill_and_remove(&mut self) -> anyhow::Result<()> {
        self.process = None;
        self.end_of_life();
        self.remove()?;
        self.start()
    }

    /// Negative control: flips bits behind everybody's back.
    pub(in crate::chaos) fn corrupt(&self) -> anyhow::Result<()> {
        shm::corrupt(&self.name, self.phase.arena_bytes)
    }

    /// Ends it as a user would. False: it did not end in time.
    pub(in crate::chaos) fn end(&mut self) -> anyhow::Result<bool> {
        let Some(mut process) = self.process.take() else { return Ok(true) };
        process.signal(Signal::SIGTERM);
        let ended = process.wait(START_MAX + self.hang_limit);
        if ended.is_some_and(|status| !status.success()) {
            return Err(process.explain(anyhow!("it was told to end")));
        }
        self.end_of_life();
        Ok(ended.is_some())
    }

    /// Everything has ended: whatever is left is removed, by us and then by the guard. What was left even so.
    pub(in crate::chaos) fn finish(&mut self) -> anyhow::Result<u64> {
        self.process = None;
        self.remove()?;
        let left = shm::files(&self.name).len() as u64;
        if let Some(guard) = self.guard.take() {
            guard.finish()?;
        }
        Ok(left)
    }
}
