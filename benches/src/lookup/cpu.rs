//! The engine's CPU time for a lookup, with several clients.
//!
//! An engine that waits also burns CPU: it spins. So here it does not: no spin budget, one CPU for it and the clients,
//! and a scheduling class that never preempts. Several clients put a batch of lookups into their rings each and go to
//! sleep; then the engine runs, answers all of them, and parks. Its CPU time through that is work, plus one parking per
//! batch; the ends of the sessions are in it too.

use super::fill::{self, CHAIN, Chains};
use super::{ASKED, filled_engine, scheduler};
use crate::child::{Engine, Placement};
use crate::clock::process_cpu_ns;
use crate::cores::{self, Pair};
use anyhow::ensure;
use kvring_adapter::{Client, Key, Lookup, Role, SchedulerAdapter, SchedulerApi, SchedulerOptions};
use kvring_engine::config::EngineConfig;
use kvring_rig::random::Random;
use std::sync::Arc;
use std::sync::Barrier;
use std::time::Duration;

/// Clients at once.
pub(super) const CLIENTS: usize = 4;
/// Lookups that one of them has in flight.
pub(super) const IN_FLIGHT: usize = 32;
/// Batches of each.
const BATCHES: usize = 100;
/// Lookups of each client that waits for every answer.
const POLLED: usize = 5_000;
/// How long a client sleeps between two looks.
const NAP: Duration = Duration::from_micros(50);

/// Engine CPU time per lookup, in nanoseconds.
pub(super) struct EngineCpu {
    /// By chunks asked for (as [`ASKED`]): all present, none.
    pub(super) per_lookup: Vec<[f64; 2]>,
    /// One chunk, clients that wait for each answer, an engine that spins as it does by default: waiting included.
    pub(super) polled: f64,
}

pub(super) fn measure(index: u32, pair: &Pair) -> anyhow::Result<EngineCpu> {
    let config = EngineConfig { spin_us: 0, ..EngineConfig::default() };
    let placement = Placement { cpus: vec![pair.theirs], batch: true, ..Placement::default() };
    let (engine, chains) = filled_engine(index, config, &placement)?;
    let mut per_lookup = Vec::new();
    cores::on(&[pair.theirs], || {
        for asked in ASKED {
            let mut both = [0.0; 2];
            for (cost, present) in both.iter_mut().zip([true, false]) {
                *cost = batches(&engine, &chains, asked, present)?;
            }
            per_lookup.push(both);
        }
        Ok(())
    })?;
    engine.stop()?;
    let (engine, chains) = filled_engine(CHAIN as u32, EngineConfig::default(), &Placement::default())?;
    let polled = polled(&engine, &chains)?;
    engine.stop()?;
    Ok(EngineCpu { per_lookup, polled })
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
        let mut adapter = SchedulerAdapter::new(client, SchedulerOptions::new(fill::FINGERPRINT));
        let mut random = Random::new(index as u64, 0);
        let names: Vec<String> = (0..IN_FLIGHT).map(|n| format!("cmpl-{n:016x}")).collect();
        barrier.wait();
        for _ in 0..batches {
            let keys: Vec<_> = (0..IN_FLIGHT).map(|_| keys_of(chains, &mut random, asked, present)).collect();
            for (name, keys) in names.iter().zip(&keys) {
                adapter.submit_lookup(name, 1, keys)?;
            }
            for name in &names {
                let found = loop {
                    match adapter.check_lookup(name) {
                        Lookup::Hit(hit) => break hit.chunks as usize,
                        Lookup::Pending => std::thread::sleep(NAP),
                    }
                };
                let expected = if present { asked } else { 0 };
                ensure!(found == expected, "expected {expected} chunks found, got {found}");
            }
            for name in &names {
                adapter.end_session(name);
            }
        }
        Ok(())
    })
}

fn polled(engine: &Engine, chains: &Chains) -> anyhow::Result<f64> {
    together(engine, POLLED, |index, client, barrier| {
        let mut adapter = scheduler(client);
        let mut random = Random::new(index as u64, 0);
        barrier.wait();
        for _ in 0..POLLED {
            adapter.lookup("cmpl", 1, &keys_of(chains, &mut random, 1, true))?;
            adapter.end_session("cmpl");
        }
        Ok(())
    })
}
