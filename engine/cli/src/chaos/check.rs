//! What is left once everything has come to rest, and nothing should be.

use super::conduct::Conductor;
use super::work::Turn;
use super::{QUIET, Sabotage};
use crate::clear;
use anyhow::{Context, bail};
use kvring_adapter::{Client, PollingSchedulerAdapter, SchedulerApi, SchedulerOptions};
use kvring_engine::stats::{Snapshot, Stat};
use kvring_rig::shm;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long the engine may take to answer the coordinator itself.
const ANSWER_MAX: Duration = Duration::from_secs(20);
/// Segments that an engine has.
const OWN_SEGMENTS: usize = 3;

impl Conductor<'_> {
    /// After all sessions have ended, and a second of quiet: leases, slots that are written, channels; and after a
    /// clear every slot. The clients are still attached: a leak of theirs must not be cured by their leaving.
    pub(super) fn check_leaks(&mut self, phase: u32) -> anyhow::Result<()> {
        let operator = clear::attach(&self.engine.name, "chaos coordinator", ANSWER_MAX)?;
        let lease = match self.sabotage {
            Some(Sabotage::Leak) => Some(self.hold_lease(&operator, phase)?),
            _ => None,
        };
        self.rest(QUIET)?;
        let stats = self.fresh_stats()?;
        let leases = stats.get(Stat::Leases) + stats.get(Stat::Pins);
        let writing = stats.get(Stat::SlotsWriting) + stats.get(Stat::SlotsOrphaned);
        // Allowed, as a dropped store is: a rank died, or had no room. They go when room is needed, or with a newer round.
        self.counts.forming_left += stats.get(Stat::ChunksForming);
        let files = shm::files(&self.engine.name);
        let channels = files.len().saturating_sub(OWN_SEGMENTS);
        operator.clear().context("clearing the cache at the end of a phase")?;
        let cleared = self.fresh_stats()?;
        let kept = cleared.get(Stat::SlotsCommitted) + cleared.get(Stat::ChunksForming);
        self.counts.leaked_leases += leases;
        self.counts.leaked_slots += writing + kept;
        self.counts.leaked_segments += channels as u64;
        for (count, what) in [
            (leases, "leases and pins are held after all sessions have ended".to_owned()),
            (writing, "slots are being written, or orphaned, after all jobs have ended".to_owned()),
            (kept, "slots and forming chunks are left after a clear".to_owned()),
            (channels as u64, format!("segments beyond the engine's own: {files:?}")),
        ] {
            if count > 0 {
                self.find(format!("phase {phase}: {count} {what}"));
            }
        }
        drop(lease);
        operator.shutdown();
        Ok(())
    }

    /// The statistics, not from before this call: gauges are published with the beat.
    fn fresh_stats(&mut self) -> anyhow::Result<Snapshot> {
        let (beat, began) = (self.engine.beat(), Instant::now());
        while self.engine.beat().wrapping_sub(beat) < 3 {
            self.turn()?;
            if began.elapsed() > ANSWER_MAX {
                bail!("the engine does not beat: waited {} s for its statistics", began.elapsed().as_secs());
            }
        }
        self.engine.stats()
    }

    /// Negative control: a lease that nobody gives back.
    fn hold_lease(&self, client: &Arc<Client>, phase: u32) -> anyhow::Result<PollingSchedulerAdapter> {
        let mut options = SchedulerOptions::new(super::message::FINGERPRINT);
        options.lookup_timeout = ANSWER_MAX;
        let mut adapter = PollingSchedulerAdapter::new(client, options);
        for (number, turn) in Turn::all(phase, 1 << 20).enumerate() {
            let hit = adapter.lookup(&format!("sabotage {number}"), 0, &turn.keys(self.seed))?;
            if hit.chunks > 0 {
                return Ok(adapter);
            }
        }
        bail!("the sabotage needs a chunk that is there: {:?}", adapter.lookup_stats())
    }
}
