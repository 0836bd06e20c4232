//! Ends of the engine that were asked for, and the removal of its segments.

use super::{Engine, START_MAX, Setup};
use anyhow::anyhow;
use kvring_engine::config::EngineConfig;
use kvring_engine::segments;
use kvring_rig::shm;
use nix::sys::signal::Signal;

impl Engine {
    /// The next phase: a cold start that was asked for, in one of three ways.
    pub(crate) fn begin_phase(&mut self, setup: Setup, way: u64) -> anyhow::Result<()> {
        let same_geometry = self.setup.arena_bytes == setup.arena_bytes;
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
        self.setup = setup;
        self.start()
    }

    /// Takes its segments away.
    pub(crate) fn remove(&self) -> anyhow::Result<()> {
        segments::remove(&self.name, true, EngineConfig::default().start_wait())?;
        Ok(())
    }

    /// Negative control: its segments go between its death and its next life.
    pub(crate) fn kill_and_remove(&mut self) -> anyhow::Result<()> {
        self.process = None;
        self.end_of_life();
        self.remove()?;
        self.start()
    }

    /// Negative control: flips bits behind everybody's back.
    pub(crate) fn corrupt(&self) -> anyhow::Result<()> {
        shm::corrupt(&self.name, self.setup.arena_bytes)
    }

    /// Negative control: `kill -9`, as if nobody had done it.
    pub(crate) fn kill_secretly(&mut self) {
        if let Some(process) = &mut self.process {
            process.signal(Signal::SIGKILL);
        }
    }

    /// Ends it as a user would. False: it did not end in time.
    pub(crate) fn end(&mut self) -> anyhow::Result<bool> {
        let Some(mut process) = self.process.take() else { return Ok(true) };
        process.signal(Signal::SIGTERM);
        let ended = process.wait(START_MAX + self.hang_limit);
        if ended.is_some_and(|status| !status.success()) {
            return Err(process.explain(anyhow!("it was told to end")));
        }
        self.end_of_life();
        Ok(ended.is_some())
    }

    /// Removes what is left once everything has ended. Returns how many files are left even so.
    pub(crate) fn finish(&mut self) -> anyhow::Result<u64> {
        self.process = None;
        self.remove()?;
        Ok(shm::files(&self.name).len() as u64)
    }
}
