//! The findings of a replay: for people, for programs, and those that are failures.

use super::drive::{Driven, Replay};
use super::plan::Resolved;
use super::{Args, Speed};
use crate::instances::{Leaks, Manner, Who};
use crate::report::{align_right, new_table};
use crate::simulate::SimResult;
use crate::trace::Trace;
use kvring_engine::byte_size::ByteSize;
use kvring_engine::policy::PolicyKind;
use kvring_engine::stats::Stat;
use serde::Serialize;

/// The output of `--json`. Rates and times are as their names say; GB are 10⁹ bytes.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Report {
    requests: u64,
    /// Of all prompts.
    tokens: u64,
    /// The share of prompt blocks that lookups found: each block counts as `chunk_tokens` tokens, a partial one too.
    hit_rate: f64,
    /// The hit rate by `kvring simulate`, for the same trace, capacity and policy.
    simulated_hit_rate: f64,
    /// The same where a partial block counts for the tokens in it.
    token_hit_rate: f64,
    simulated_token_hit_rate: f64,
    /// Lookups in the time that was spent in lookups: one scheduler could do so many.
    lookups_per_s: f64,
    lookup_p50_us: f64,
    lookup_p99_us: f64,
    lookup_p999_us: f64,
    /// Lookups that answered 0 because there were no tables to be read, or not all workers had registered.
    lookups_degraded: u64,
    lookups_refused: u64,
    stored_gb: f64,
    loaded_gb: f64,
    /// Bytes by the time that workers spent copying: the rate of one worker.
    store_gbs: f64,
    load_gbs: f64,
    /// Chunks that went to make room.
    evictions: u64,
    /// Shards that were not stored.
    dropped_stores: u64,
    /// Shards that could not be loaded, and were computed again.
    failed_loads: u64,
    /// Loaded bytes that differ from those that were stored; without `verify` it is always 0.
    wrong_bytes: u64,
    leaked_slots: u64,
    leaked_leases: u64,
    seconds: f64,
    requests_per_s: f64,
    /// Chunks that the arena has room for.
    capacity_chunks: u64,
    config: Config,
    /// Whose bytes were wrong, and how many.
    #[serde(skip)]
    wrong: Vec<(Who, u64)>,
    #[serde(skip)]
    breaches: u64,
    #[serde(skip)]
    check_failures: u64,
}

/// The options of the replay.
#[derive(Clone, Debug, Serialize)]
struct Config {
    trace: String,
    instances: u32,
    ranks: u32,
    arena_bytes: u64,
    bytes_per_token: u32,
    chunk_tokens: u32,
    chunk_bytes: u64,
    policy: PolicyKind,
    speed: Speed,
    verify: bool,
}

fn per(amount: f64, time: f64) -> f64 {
    if time > 0.0 { amount / time } else { 0.0 }
}

impl Report {
    pub(super) fn new(
        args: &Args,
        resolved: &Resolved,
        trace: &Trace,
        replay: &mut Replay<'_>,
        leaks: &Leaks,
        simulated: &SimResult,
    ) -> Report {
        let Driven { seconds, hit_chunks, hit_tokens, ref mut lookup_ns, lookups_ns } = replay.driven;
        let mut lookup_us = |share| lookup_ns.percentile(share).map_or(0.0, |ns| ns as f64 / 1e3);
        let tally = &replay.run.fleet.tally;
        let prompt_blocks: usize = trace.requests.iter().map(|request| request.blocks.len()).sum();
        Report {
            requests: trace.requests.len() as u64,
            tokens: trace.input_tokens(),
            hit_rate: per(hit_chunks as f64, prompt_blocks as f64),
            simulated_hit_rate: simulated.hit_rate(),
            token_hit_rate: per(hit_tokens as f64, trace.input_tokens() as f64),
            simulated_token_hit_rate: simulated.token_hit_rate(),
            lookups_per_s: per(trace.requests.len() as f64, lookups_ns as f64 / 1e9),
            lookup_p50_us: lookup_us(0.5),
            lookup_p99_us: lookup_us(0.99),
            lookup_p999_us: lookup_us(0.999),
            lookups_degraded: tally.lookups.degraded,
            lookups_refused: tally.lookups.refused,
            stored_gb: tally.stored_bytes as f64 / 1e9,
            loaded_gb: tally.loaded_bytes as f64 / 1e9,
            store_gbs: per(tally.stored_bytes as f64, tally.store_ns as f64),
            load_gbs: per(tally.loaded_bytes as f64, tally.load_ns as f64),
            evictions: leaks.stats.get(Stat::Evictions),
            dropped_stores: tally.dropped,
            failed_loads: tally.failed,
            wrong_bytes: tally.wrong_bytes,
            leaked_slots: leaks.writing + leaks.kept,
            leaked_leases: leaks.leases,
            seconds,
            requests_per_s: per(trace.requests.len() as f64, seconds),
            capacity_chunks: simulated.capacity_chunks as u64,
            config: Config {
                trace: trace.name.clone(),
                instances: resolved.instances,
                ranks: resolved.ranks,
                arena_bytes: resolved.setup.arena_bytes,
                bytes_per_token: args.bytes_per_token,
                chunk_tokens: trace.block_tokens,
                chunk_bytes: resolved.chunk_bytes(),
                policy: resolved.setup.policy,
                speed: args.speed,
                verify: matches!(resolved.manner, Manner::Calm { verify: true, .. }),
            },
            wrong: replay.run.fleet.wrong(),
            breaches: leaks.stats.get(Stat::Breaches),
            check_failures: leaks.stats.get(Stat::CheckFailures),
        }
    }

    /// The failures, in words; none if all is well.
    pub(super) fn failures(&self) -> Vec<String> {
        let mut failures = Vec::new();
        for (who, bytes) in &self.wrong {
            failures.push(format!("{who} loaded {bytes} wrong bytes"));
        }
        let mut none = |count: u64, what: &str| {
            if count > 0 {
                failures.push(format!("{count} {what}"));
            }
        };
        none(self.leaked_leases, "leases and pins are held after all sessions have ended");
        none(self.leaked_slots, "slots are taken after all sessions have ended and the cache was cleared");
        none(self.breaches, "clients were detached because they broke the protocol");
        none(self.check_failures, "self-checks of the engine failed");
        failures
    }

    /// For people.
    pub(super) fn table(&self) -> String {
        let Config { trace, instances, ranks, arena_bytes, chunk_bytes, policy, verify, .. } = &self.config;
        let mut table = new_table();
        let mut row = |name: &str, value: String, note: String| {
            table.add_row([name.to_owned(), value, note]);
        };
        let note = |text: &str| text.to_owned();
        row("requests", self.requests.to_string(), format!("{:.0} per second", self.requests_per_s));
        row(
            "prompt tokens",
            format!("{:.1} M", self.tokens as f64 / 1e6),
            format!("in {:.1} s", self.seconds),
        );
        let capacity = format!(
            "simulated with room for {} chunks: {:.3}",
            self.capacity_chunks, self.simulated_hit_rate
        );
        row("hit rate", format!("{:.3}", self.hit_rate), capacity);
        row("lookup p50", format!("{:.1} µs", self.lookup_p50_us), note("through another process, and back"));
        row("lookup p99", format!("{:.1} µs", self.lookup_p99_us), String::new());
        row("lookup p99.9", format!("{:.1} µs", self.lookup_p999_us), self.missed_lookups());
        row("lookups", format!("{:.0} /s", self.lookups_per_s), note("one scheduler, one at a time"));
        row(
            "stored",
            format!("{:.2} GB", self.stored_gb),
            format!("at {:.1} GB/s per worker", self.store_gbs),
        );
        row(
            "loaded",
            format!("{:.2} GB", self.loaded_gb),
            format!("at {:.1} GB/s per worker", self.load_gbs),
        );
        row("evictions", self.evictions.to_string(), note("chunks that went to make room"));
        row("dropped stores", self.dropped_stores.to_string(), note("shards; allowed"));
        row("failed loads", self.failed_loads.to_string(), note("shards, computed again; allowed"));
        let compared = if *verify { "every loaded byte was compared" } else { "not looked at: --no-verify" };
        row("wrong bytes", self.wrong_bytes.to_string(), note(compared));
        row("leaked slots", self.leaked_slots.to_string(), String::new());
        row("leaked leases", self.leaked_leases.to_string(), String::new());
        align_right(&mut table, [1]);
        format!(
            "{trace}\n{instances} instances of {ranks} ranks, arena {}, chunks of {}, policy {policy}\n{table}\n",
            ByteSize(*arena_bytes).human(),
            ByteSize(*chunk_bytes).human(),
        )
    }

    fn missed_lookups(&self) -> String {
        let missed = self.lookups_degraded + self.lookups_refused;
        if missed == 0 { String::new() } else { format!("{missed} lookups could not look") }
    }
}
