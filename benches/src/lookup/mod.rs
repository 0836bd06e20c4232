//! `kvring bench lookup`: the lookup, for which vLLM's scheduler waits, in the caller's own process. What it found is held when
//! it returns.
//!
//! A new session each time, then the lookup (this is timed), then the session's end and one round trip, so that the engine
//! has heard all of it. Rates and the engine's CPU time are measured without that pause.

pub(crate) mod busy;
mod cpu;
pub(crate) mod fill;
mod limit;
mod print;

use crate::child::{Child, DEFAULT_SPIN, Engine, Placement};
use crate::clock::Clock;
use crate::cores::{self, Pair};
use crate::report::How;
use crate::rtt::round_trips;
use crate::stats::{Samples, Windows};
use anyhow::{Context, ensure};
use busy::BusyJob;
use fill::{CHAIN, Chains};
use kvring_adapter::{CallError, Client, Key, PollingSchedulerAdapter, Role, SchedulerOptions};
use kvring_engine::byte_size::ByteSize;
use kvring_engine::config::EngineConfig;
use kvring_engine::stats::Stat;
use kvring_rig::random::Random;
use kvring_shm_abi::futex::monotonic_ns;
use limit::Limit;
use std::fmt::Write;
use std::sync::Arc;

/// The arguments of `kvring bench lookup`.
#[derive(clap::Args, Clone, Debug)]
pub struct LookupArgs {
    /// Index sizes to measure, in chunks. The arena takes 4 KiB for each.
    #[arg(long, value_delimiter = ',', default_value = "10000,100000,1000000",
        value_parser = clap::value_parser!(u32).range(CHAIN as i64..))]
    pub index: Vec<u32>,
    /// Store the chunks of a chain apart from each other, as they lie after many evictions; without this they lie one behind the
    /// other, as they do when they are stored.
    #[arg(long)]
    pub scattered: bool,
}

/// Chunks asked for.
const ASKED: [usize; 4] = [1, 16, 128, CHAIN];
/// Lookups of a window.
const PER_WINDOW: u32 = 500;
/// Round trips of a window.
const ROUND_TRIPS: u32 = 5_000;
/// Room for the busy client, beside the index.
const BUSY_BYTES: u64 = 512 << 20;

/// One kind of lookup in one index, window by window.
struct Case {
    asked: usize,
    present: bool,
    loaded: bool,
    p50: Windows,
    p99: Windows,
    pooled: Samples,
    per_s: Windows,
    /// As many plain loads, at the median.
    limit: Windows,
}

impl Case {
    fn new(asked: usize, present: bool, loaded: bool) -> Case {
        let pooled = Samples::with_capacity(0);
        Case {
            asked,
            present,
            loaded,
            p50: Windows::default(),
            p99: Windows::default(),
            pooled,
            per_s: Windows::default(),
            limit: Windows::default(),
        }
    }

    fn add(&mut self, clock: &Clock, mut samples: Samples, per_s: f64) {
        let mut at = |share| samples.percentile(share).map_or(f64::NAN, |ticks| clock.between_ns(ticks));
        self.p50.push(at(0.5));
        self.p99.push(at(0.99));
        self.pooled.extend(&samples);
        self.per_s.push(per_s);
    }
}

/// All measurements of one index size.
struct Measured {
    index: u32,
    /// The round trip, quiet and loaded: chunks 0.
    rtt: [Case; 2],
    cases: Vec<Case>,
    cpu: cpu::EngineCpu,
}

pub(crate) fn run(how: How, args: &LookupArgs) -> anyhow::Result<()> {
    let pair = Pair::choose()?;
    let about = pair.describe();
    let clock = Clock::new();
    let bar = how.bar(args.index.len() * (how.windows + 2));
    let mut measured = Vec::new();
    for index in &args.index {
        bar.set_message(format!("{index} chunks: filling"));
        let chains = Chains::new(*index);
        let chains = if args.scattered { chains.scattered() } else { chains };
        let engine = filled_engine(
            &chains,
            EngineConfig::default(),
            &Placement { service_cpu: pair.two().then_some(pair.theirs), ..Placement::default() },
        )?;
        bar.inc(1);
        let (rtt, cases) = cores::on(&[pair.ours], || measure(&engine, &chains, *index, how, &clock, &bar))?;
        engine.stop()?;
        bar.set_message(format!("{index} chunks: the engine's CPU time"));
        let cpu = cpu::measure(&chains, &pair)?;
        bar.inc(1);
        measured.push(Measured { index: *index, rtt, cases, cpu });
    }
    bar.finish_and_clear();
    print::print(how, args.scattered, measured, &clock, about)
}

/// An engine whose index holds these chains, in chunks of 4 KiB.
pub(crate) fn filled_engine(
    chains: &Chains,
    config: EngineConfig,
    placement: &Placement,
) -> anyhow::Result<Engine> {
    let chunks = chains.chunks();
    let index_bytes = chunks * fill::SHARD_BYTES as u64;
    // Eviction keeps a part of the slots free: with a tenth more than the index it has nothing to do.
    let arena = index_bytes + index_bytes / 10 + BUSY_BYTES;
    // And so does the table of chunks, which is for larger ones.
    let max_chunks = Some((arena / fill::SHARD_BYTES as u64) as u32);
    let config = EngineConfig { arena: Some(ByteSize(arena)), max_chunks, ..config };
    let engine = Engine::spawn(config, placement)?;
    // Stores that outrun the allocation would evict the first chunks.
    engine.wait_allocated()?;
    fill::fill(&engine, chains).context("filling the index")?;
    let evicted = engine.stat(Stat::Evictions)?;
    ensure!(evicted == 0, "expected an index that keeps all of {chunks} chunks, but {evicted} were evicted");
    Ok(engine)
}

/// A scheduler of the benchmark's namespace.
fn scheduler(client: &Arc<Client>) -> PollingSchedulerAdapter {
    PollingSchedulerAdapter::new(client, SchedulerOptions::new(fill::FINGERPRINT))
}

fn measure(
    engine: &Engine,
    chains: &Chains,
    index: u32,
    how: How,
    clock: &Clock,
    bar: &indicatif::ProgressBar,
) -> anyhow::Result<([Case; 2], Vec<Case>)> {
    let mut looker = Looker::new(engine, chains)?;
    let mut limit = Limit::new(chains);
    looker.check_all()?;
    let mut busy = Child::spawn(&BusyJob { engine: engine.name.clone() })?;
    busy.read::<()>()?;
    let mut rtt = [false, true].map(|loaded| Case::new(0, false, loaded));
    let mut cases: Vec<Case> = [false, true]
        .into_iter()
        .flat_map(|loaded| {
            ASKED
                .iter()
                .flat_map(move |asked| [true, false].map(|present| Case::new(*asked, present, loaded)))
        })
        .collect();
    looker.window(CHAIN, true, PER_WINDOW, clock)?;
    for window in 0..how.windows {
        bar.set_message(format!("{index} chunks: window {}", window + 1));
        for loaded in [false, true] {
            if loaded {
                busy.ask::<()>(&())?;
            }
            let round_trips = round_trips(&looker.client, ROUND_TRIPS, 0.0, clock)?;
            rtt[usize::from(loaded)].add(clock, round_trips, f64::NAN);
            for case in cases.iter_mut().filter(|case| case.loaded == loaded) {
                let mut plain = limit.window(case.asked, case.present, clock);
                case.limit.push(plain.percentile(0.5).map_or(f64::NAN, |ticks| clock.between_ns(ticks)));
                let samples = looker.window(case.asked, case.present, PER_WINDOW, clock)?;
                let per_s = looker.rate(case.asked, case.present, PER_WINDOW)?;
                case.add(clock, samples, per_s);
            }
            if loaded {
                let stored: u64 = busy.ask(&())?;
                ensure!(stored > 0, "the busy client stored nothing: the loaded windows were not loaded");
            }
        }
        bar.inc(1);
    }
    looker.finish()?;
    busy.finish()?;
    Ok((rtt, cases))
}

/// A scheduler that looks up chains.
struct Looker<'a> {
    client: Arc<Client>,
    adapter: PollingSchedulerAdapter,
    chains: &'a Chains,
    keys: Vec<Key>,
    name: String,
    random: Random,
    sessions: u64,
}

impl<'a> Looker<'a> {
    fn new(engine: &Engine, chains: &'a Chains) -> anyhow::Result<Looker<'a>> {
        // The measuring thread is pinned, so the client would take the machine for one with a single CPU.
        let client = engine.client(Role::Scheduler, Some(DEFAULT_SPIN))?;
        Ok(Looker {
            adapter: scheduler(&client),
            client,
            chains,
            keys: Vec::with_capacity(CHAIN),
            name: String::new(),
            random: Random::new(7, 0),
            sessions: 0,
        })
    }

    /// The keys of the next lookup, of a chain chosen at random, and its request's name.
    fn next(&mut self, asked: usize, present: bool) -> anyhow::Result<()> {
        self.keys.clear();
        if present {
            let chain = self.random.below(self.chains.whole());
            self.keys.extend(self.chains.keys(chain).take(asked));
        } else {
            let chain = u64::from(u32::MAX) + self.random.bits() % (1 << 40);
            self.keys.extend((0..asked as u64).map(|at| fill::key(chain, at)));
        }
        self.sessions += 1;
        self.name.clear();
        Ok(write!(self.name, "cmpl-{:016x}", self.sessions)?)
    }

    fn window(&mut self, asked: usize, present: bool, count: u32, clock: &Clock) -> anyhow::Result<Samples> {
        let mut samples = Samples::with_capacity(count as usize);
        let expected = if present { asked } else { 0 };
        for _ in 0..count {
            self.next(asked, present)?;
            let before = clock.ticks();
            let found = self.adapter.lookup(&self.name, 1, &self.keys)?.chunks;
            samples.push(clock.ticks() - before);
            self.check(found, expected)?;
            self.adapter.end_session(&self.name);
            self.settle()?;
        }
        Ok(samples)
    }

    /// Waits until the engine has heard everything: a ring is first in, first out.
    fn settle(&self) -> anyhow::Result<()> {
        loop {
            match self.client.noop() {
                // Lookups without a pause are faster than an engine that hears what they hold: the ring is full.
                Err(CallError::Busy) => std::thread::yield_now(),
                other => return other.context("a round trip after a lookup"),
            }
        }
    }

    /// Lookups and ends of sessions per second, one after the other without a pause.
    fn rate(&mut self, asked: usize, present: bool, count: u32) -> anyhow::Result<f64> {
        let expected = if present { asked } else { 0 };
        let mut spent = 0;
        for _ in 0..count {
            self.next(asked, present)?;
            let before = monotonic_ns();
            let found = self.adapter.lookup(&self.name, 1, &self.keys)?.chunks;
            self.adapter.end_session(&self.name);
            spent += monotonic_ns() - before;
            self.check(found, expected)?;
        }
        self.settle()?;
        Ok(f64::from(count) / (spent as f64 / 1e9))
    }

    /// A wrong answer is not a slow one.
    fn check(&self, found: u32, expected: usize) -> anyhow::Result<()> {
        ensure!(
            found as usize == expected,
            "a lookup of {} chunks: expected {expected} found, got {found} ({:?})",
            self.keys.len(),
            self.adapter.lookup_stats()
        );
        Ok(())
    }

    /// Everything that was stored is there.
    fn check_all(&mut self) -> anyhow::Result<()> {
        for chain in 0..self.chains.count() {
            self.keys.clear();
            self.keys.extend(self.chains.keys(chain));
            let found = self.adapter.lookup("all", chain as u32, &self.keys)?.chunks;
            self.adapter.free_lookup_locks("all", chain as u32, 0);
            self.check(found, self.keys.len())?;
        }
        self.adapter.end_session("all");
        Ok(())
    }

    /// Nothing was answered out of trouble.
    fn finish(self) -> anyhow::Result<()> {
        let stats = self.adapter.lookup_stats();
        ensure!(
            stats.degraded + stats.cut + stats.refused == 0,
            "expected every lookup answered from the engine's tables, got {stats:?}"
        );
        self.client.shutdown();
        Ok(())
    }
}
