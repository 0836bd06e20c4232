//! The findings of a run: for people, for programs, and those that are failures.

use super::oracle::Oracle;
use crate::instances::{self, Run, Sums, Tally};
use crate::report::{align_right, new_table};
use serde::Serialize;

/// The numbers that the coordinator counts itself.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Counts {
    pub(super) worker_kills: u64,
    pub(super) scheduler_kills: u64,
    /// By SIGSTOP, each followed by SIGCONT.
    pub(super) stops: u64,
    /// Lives of the engine with the arena of the life before.
    pub(super) warm_restarts: u64,
    /// With a new one, the first included.
    pub(super) cold_restarts: u64,
    /// Of those, the ones that nobody had asked for.
    pub(super) unasked_cold_restarts: u64,
    pub(super) clears: u64,
    pub(super) hangs: u64,
    /// Processes that ended though nobody had killed them.
    pub(super) crashes: u64,
    pub(super) leaked_leases: u64,
    pub(super) leaked_slots: u64,
    pub(super) leaked_segments: u64,
    /// Chunks of which not all ranks had committed theirs when everything was quiet.
    pub(super) forming_left: u64,
}

/// What `--json` prints.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Report {
    seed: u64,
    seconds: u64,
    phases: u64,
    /// By SIGKILL.
    kills: u64,
    #[serde(flatten)]
    counts: Counts,
    #[serde(flatten)]
    run: instances::Counts,
    #[serde(flatten)]
    engine: Sums,
    preemptions: u64,
    /// Calls into the adapter.
    operations: u64,
    requests: u64,
    lookups_answered: u64,
    lookups_degraded: u64,
    /// Lookups while no engine was serving, and those of them that found something.
    lookups_while_dead: u64,
    hits_while_dead: u64,
    lookups_refused: u64,
    /// Shards.
    shards_stored: u64,
    shards_skipped: u64,
    shards_dropped: u64,
    shards_loaded: u64,
    loads_failed: u64,
    /// Chunks that all ranks had committed where nothing is evicted.
    chunks_acknowledged: u64,
    /// Times that a lookup had to find one of them.
    chunks_judged: u64,
    /// How late the machine itself was, at worst.
    largest_gap_ms: f64,
    wrong_bytes: u64,
    lost_committed: u64,
    deadline_misses: u64,
    #[serde(skip)]
    found: Vec<String>,
}

impl Report {
    /// Of a run that has ended.
    pub(super) fn new(
        (seed, seconds, phases): (u64, u64, u64),
        counts: Counts,
        run: &Run,
        oracle: &Oracle,
        found: &[String],
    ) -> Report {
        let Run { counts: of_run, fleet, engine, .. } = run;
        let tally: &Tally = &fleet.tally;
        Report {
            seed,
            seconds,
            phases,
            kills: of_run.engine_kills + counts.worker_kills + counts.scheduler_kills,
            counts,
            run: *of_run,
            engine: engine.sums,
            preemptions: tally.preemptions,
            operations: tally.operations,
            requests: tally.requests,
            lookups_answered: tally.lookups.answered,
            lookups_degraded: tally.lookups.degraded,
            lookups_while_dead: tally.lookups.not_serving,
            hits_while_dead: tally.hits_while_dead,
            lookups_refused: tally.lookups.refused,
            shards_stored: tally.stored,
            shards_skipped: tally.skipped,
            shards_dropped: tally.dropped,
            shards_loaded: tally.loaded,
            loads_failed: tally.failed,
            chunks_acknowledged: oracle.acknowledged,
            chunks_judged: oracle.judged,
            largest_gap_ms: tally.gap_us as f64 / 1e3,
            wrong_bytes: tally.wrong_bytes,
            lost_committed: oracle.lost,
            deadline_misses: tally.deadline_misses,
            found: found.iter().chain(&oracle.told).chain(&tally.missed).cloned().collect(),
        }
    }

    /// Files that are left after everything has ended and was removed.
    pub(super) fn count_left(&mut self, files: u64) {
        self.counts.leaked_segments += files;
    }

    /// The numbers that must be 0: each with its name and its meaning.
    fn zeros(&self) -> [(u64, &'static str, &'static str); 11] {
        [
            (self.wrong_bytes, "wrong bytes", "loaded, and not what was stored"),
            (self.lost_committed, "lost chunks", "acknowledged by all ranks, not evicted, not found"),
            (self.counts.leaked_slots, "leaked slots", "taken when nobody used anything"),
            (self.counts.leaked_leases, "leaked leases", "leases and pins, after the end of all sessions"),
            (self.counts.leaked_segments, "leaked segments", "files in /dev/shm that nobody owns"),
            (self.counts.hangs, "hangs", "not returned 30 s after the deadline"),
            (self.deadline_misses, "deadline misses", "late by more than the machine itself"),
            (self.counts.crashes, "crashes", "ended, and nobody had killed it"),
            (self.engine.breaches, "breaches", "clients detached for a breach of protocol"),
            (self.engine.check_failures, "failed self-checks", "of the engine"),
            (self.engine.roomy_evictions, "evictions with room", "in phases whose arena holds everything"),
        ]
    }

    /// The failures, in words; none if all is well.
    pub(super) fn failures(&self) -> Vec<String> {
        let failed = self.zeros().into_iter().filter(|(count, ..)| *count > 0);
        failed.map(|(count, what, why)| format!("{count} {what}: {why}")).collect()
    }

    /// The first findings, in words.
    pub(super) fn found(&self) -> &[String] {
        &self.found
    }

    /// For people.
    pub(super) fn table(&self) -> String {
        let mut table = new_table();
        let mut row = |name: &str, value: u64, note: String| {
            table.add_row([name.to_owned(), value.to_string(), note]);
        };
        let (engine, workers, schedulers) =
            (self.run.engine_kills, self.counts.worker_kills, self.counts.scheduler_kills);
        row("kills", self.kills, format!("{engine} engines, {workers} workers, {schedulers} schedulers"));
        let caught = self.run.caught_writing;
        row(
            "stops",
            self.counts.stops,
            format!("stood still and went on; {caught} stops or engine kills hit a store"),
        );
        let unasked = self.counts.unasked_cold_restarts;
        row(
            "restarts",
            self.run.restarts,
            format!(
                "the engine: {} warm, {} cold ({unasked} unasked)",
                self.counts.warm_restarts, self.counts.cold_restarts
            ),
        );
        row("clears", self.counts.clears, format!("and {} preemptions", self.preemptions));
        row("operations", self.operations, format!("{} requests", self.requests));
        let (degraded, refused) = (self.lookups_degraded, self.lookups_refused);
        row("lookups answered", self.lookups_answered, format!("{degraded} degraded, {refused} refused"));
        row(
            "lookups without an engine",
            self.lookups_while_dead,
            format!("{} of them found something", self.hits_while_dead),
        );
        row(
            "shards stored",
            self.shards_stored,
            format!("{} skipped, {} dropped", self.shards_skipped, self.shards_dropped),
        );
        row("shards loaded", self.shards_loaded, format!("{} could not be", self.loads_failed));
        row(
            "chunks promised",
            self.chunks_acknowledged,
            format!("and looked for {} times", self.chunks_judged),
        );
        row("evictions", self.engine.evictions, "in phases with a small arena".to_owned());
        self.zeros().into_iter().for_each(|(count, what, why)| row(what, count, why.to_owned()));
        align_right(&mut table, [1]);
        format!(
            "seed {}, {} s in {} phases; the machine itself was up to {:.0} ms late\n{table}\n",
            self.seed, self.seconds, self.phases, self.largest_gap_ms
        )
    }
}
