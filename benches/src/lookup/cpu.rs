//! The engine's CPU time for a lookup, with several clients.
//!
//! The engine does not look anything up: it hears what was found and is held, and when it is released. An engine that waits
//! also burns CPU: it spins. So here it does not: no spin budget, one CPU for it and the clients, and a scheduling class that
//! never preempts. Several clients do a batch of lookups each, end the sessions, and wait for a round trip; then the engine
//! runs, hears all of it, and parks. Its CPU time through that is work, plus one parking per batch.

use super::fill::{self, Chains};
use super::{ASKED, filled_engine};
use crate::child::{Engine, Placement};
use crate::clock::process_cpu_ns;
use crate::cores::{self, Pair};
use anyhow::ensure;
use kvring_adapter::{Client, Key, PollingSchedulerAdapter, Role, SchedulerOptions};
use kvring_engine::config::EngineConfig;
use kvring_rig::random::Random;
use std::sync::Arc;
use std::sync::Barrier;

/// Clients at once.
pub(super) const CLIENTS: usize = 4;
/// Lookups that one of them has in flight.
pub(super) const IN_FLIGHT: usize = 32;
/// Batches of each.
const BATCHES: usize = 100;

/// Engine CPU time per lookup, in nanoseconds.
pub(super) struct EngineCpu {
    /// By chunks asked for (as [`ASKED`]): all present, none.
    pub(super) per_lookup: Vec<[f64; 2]>,
}

pub(super) fn measure(chains: &Chains, pair: &Pair) -> anyhow::Result<EngineCpu> {
    let config = EngineConfig { spin_us: 0, ..EngineConfig::default() };
    let placement = Placement { cpus: vec![pair.theirs], batch: true, ..Placement::default() };
    let engine = filled_engine(chains, config, &placement)?;
    let mut per_lookup = Vec::new();
    cores::on(&[pair.theirs], || {
        for asked in ASKED {
            let mut both = [0.0; 2];
            for (cost, present) in both.iter_mut().zip([true, false]) {
                *cost = batches(&engine, chains, asked, present)?;
            }
            per_lookup.push(both);
        }
        Ok(())
    })?;
    engine.stop()?;
    Ok(EngineCpu { per_lookup })
}

/// Several clients at once; the engine's CPU time per lookup of them all.
fn together(
    engine: &Engine,
    lookups: usize,
    work: impl Fn(usize, &Arc<Client>, &Barrier) -> anyhow::Result<()> + Sync,
) -> anyhow::Result<f64> {
    let barrier = Barrier::new(CLIENTS + 1);
    let clients: Vec<Arc<Client>> =
        (0..CLIENTS).map(|_| engine.client(Role::Scheduler, None)).collect::<anyhow::Result<_>>()?;
    let work = &work;
    let spent = std::thread::scope(|scope| {
        let threads: Vec<_> = clients
            .iter()
            .enumerate()
            .map(|(index, client)| {
                let barrier = &barrier;
                scope.spawn(move || work(index, client, barrier))
            })
            .collect();
        barrier.wait();
        let before = process_cpu_ns(engine.pid());
        for thread in threads {
            thread.join().map_err(|_| anyhow::anyhow!("a client's thread panicked"))??;
        }
        Ok::<_, anyhow::Error>(process_cpu_ns(engine.pid())?.saturating_sub(before?))
    })?;
    Ok(spent as f64 / (CLIENTS * lookups) as f64)
}

fn keys_of(chains: &Chains, random: &mut Random, asked: usize, present: bool) -> Vec<Key> {
    if present {
        chains.keys(random.below(chains.whole())).take(asked).collect()
    } else {
        let chain = u64::from(u32::MAX) + random.bits() % (1 << 40);
        (0..asked as u64).map(|at| fill::key(chain, at)).collect()
    }
}

fn batches(engine: &Engine, chains: &Chains, asked: usize, present: bool) -> anyhow::Result<f64> {
    // Longer lookups, fewer batches.
    let batches = if asked > 16 { BATCHES / 4 } else { BATCHES };
    together(engine, batches * IN_FLIGHT, |index, client, barrier| {
        let mut adapter = PollingSchedulerAdapter::new(client, SchedulerOptions::new(fill::FINGERPRINT));
        let mut random = Random::new(index as u64, 0);
        let names: Vec<String> = (0..IN_FLIGHT).map(|n| format!("cmpl-{n:016x}")).collect();
        barrier.wait();
        for _ in 0..batches {
            let keys: Vec<_> = (0..IN_FLIGHT).map(|_| keys_of(chains, &mut random, asked, present)).collect();
            for (name, keys) in names.iter().zip(&keys) {
                let found = adapter.lookup(name, 1, keys)?.chunks as usize;
                let expected = if present { asked } else { 0 };
                ensure!(found == expected, "expected {expected} chunks found, got {found}");
            }
            for name in &names {
                adapter.end_session(name);
            }
            // The engine does all of it meanwhile.
            client.noop()?;
        }
        Ok(())
    })
}
