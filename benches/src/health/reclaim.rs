//! How soon nothing is left of a killed client: its leases, its half-written slots, its entry.

use super::bare::Bare;
use super::holder::{HolderJob, LEASES, WRITING};
use super::life::{self, Life};
use super::{Times, notice};
use crate::child::Child;
use crate::lookup::fill::{self, CHAIN, Chains, SHARD_BYTES};
use anyhow::{Context, ensure};
use indicatif::ProgressBar;
use kvring_adapter::EngineView;
use kvring_engine::stats::Stat;
use kvring_shm_abi::futex::{Deadline, monotonic_ns};
use nix::sys::signal::Signal;
use std::time::Duration;

/// Chunks that there are to lease.
const CHUNKS: u32 = LEASES as u32 * CHAIN as u32;
/// Room for all leased chunks, and as much again for the slots that are written: a client may hold half of an arena.
const ARENA: u64 = 4 * (LEASES * CHAIN as u64 + WRITING) * SHARD_BYTES as u64;
/// Leases and slots that the engine has not reclaimed by then, it never will.
const PATIENCE: Duration = Duration::from_secs(5);
/// The clients of one holder: a scheduler and a worker.
const CLIENTS: usize = 2;

/// The times that were measured.
#[derive(Default)]
pub(super) struct Reclaims {
    /// Until the engine had given the last entry free again, with all that the client had held.
    pub(super) ours: Times,
    /// Until a bare sleeper had noticed a bare process's death.
    pub(super) limit: Times,
}

/// Kills `kills` clients, one after the other.
pub(super) fn measure(kills: usize, bar: &ProgressBar) -> anyhow::Result<Reclaims> {
    bar.set_message("killing clients that hold leases and write slots");
    let mut reclaims = Reclaims::default();
    let bare = Bare::new(None)?;
    let life = Life::start(ARENA, None, None)?;
    let engine = life.engine()?;
    engine.wait_allocated()?;
    fill::fill(engine, &Chains::new(CHUNKS)).context("storing what is leased")?;
    let lobby = EngineView::open(life.name())?.open_lobby(life.name())?;
    let held = |leases, writing| {
        Ok(engine.stat(Stat::Leases)? == leases && engine.stat(Stat::SlotsWriting)? == writing)
    };
    for _ in 0..kills {
        let mut holder = Child::spawn(&HolderJob { engine: engine.name.clone() })?;
        holder.read::<()>()?;
        life::until(1, || held(LEASES, WRITING)).context("a client that takes leases and slots")?;
        let entries: Vec<usize> = notice::entries_of(&lobby, holder.pid()).collect();
        ensure!(entries.len() == CLIENTS, "expected {CLIENTS} entries of one process, found {entries:?}");

        let killed = monotonic_ns();
        holder.signal(Signal::SIGKILL)?;
        let deadline = Deadline::after(PATIENCE);
        while entries.iter().any(|entry| lobby.life_words[*entry].raw() != 0) {
            ensure!(!deadline.passed(), "a client's death was not made good within {PATIENCE:?}");
            // The client needs a CPU to die on, and the engine one to clean up on.
            std::thread::yield_now();
        }
        reclaims.ours.push(monotonic_ns().saturating_sub(killed));
        holder.reap();
        // The statistics follow with the next tick: a leak would stay.
        life::until(1, || held(0, 0)).context("leases and slots of a client whose entry is free")?;
        reclaims.limit.push(bare.death(None)?);
        bar.inc(1);
    }
    life.stop()?;
    Ok(reclaims)
}
