//! What a run found: for people, for programs, and what of it is a failure.

use super::conduct::Conductor;
use crate::console::{align_right, new_table};
use serde::Serialize;

/// What the coordinator counts itself.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    pub(super) engine_kills: u64,
    pub(super) worker_kills: u64,
    pub(super) scheduler_kills: u64,
    pub(super) stops: u64,
    pub(super) restarts: u64,
    pub(super) warm_restarts: u64,
    pub(super) cold_restarts: u64,
    pub(super) unasked_cold_restarts: u64,
    pub(super) clears: u64,
    pub(super) hangs: u64,
    pub(super) crashes: u64,
    pub(super) leaked_leases: u64,
    pub(super) leaked_slots: u64,
    pub(super) leaked_segments: u64,
    pub(super) forming_left: u64,
    pub(super) caught_writing: u64,
}

impl Counts {
    /// All of them.
    pub(super) fn kills(&self) -> u64 {
        self.engine_kills + self.worker_kills + self.scheduler_kills
    }
}

/// What `--json` prints.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Report {
    seed: u64,
    seconds: u64,
    phases: u64,
    /// By SIGKILL.
    kills: u64,
    engine_kills: u64,
    worker_kills: u64,
    scheduler_kills: u64,
    /// By SIGSTOP, each followed by SIGCONT.
    stops: u64,
    /// Lives that began after an end.
    restarts: u64,
    /// Lives of the engine with the arena of the life before.
    warm_restarts: u64,
    /// With a new one, the first included.
    cold_restarts: u64,
    /// Of those, the ones that nobody had asked for.
    unasked_cold_restarts: u64,
    clears: u64,
    /// Workers that stood still, and engines that died, while slots were being written.
    caught_writing: u64,
    preemptions: u64,
    /// Calls into the adapter.
    operations: u64,
    requests: u64,
    lookups_answered: u64,
    lookups_degraded: u64,
    lookups_timed_out: u64,
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
    evictions: u64,
    /// Chunks of which not all ranks had committed theirs when everything was quiet.
    forming_left: u64,
    /// How late the machine itself was, at worst.
    largest_gap_ms: f64,
    wrong_bytes: u64,
    lost_committed: u64,
    leaked_slots: u64,
    leaked_leases: u64,
    leaked_segments: u64,
    hangs: u64,
    deadline_misses: u64,
    /// Processes that ended though nobody had killed them.
    crashes: u64,
    /// Clients that the engine detached for a breach of protocol.
    breaches: u64,
    /// Self-checks of the engine that failed.
    check_failures: u64,
    /// Chunks evicted where there was room for all.
    roomy_evictions: u64,
    #[serde(skip)]
    found: Vec<String>,
}

impl Report {
    /// Of a run that has ended.
    pub(super) fn new(run: &Conductor<'_>, seconds: u64, phases: u64) -> Report {
        let (counts, tally, sums, oracle) = (run.counts, &run.fleet.tally, run.engine.sums, &run.oracle);
        let lookups = tally.lookups;
        Report {
            seed: run.seed,
            seconds,
            phases,
            kills: counts.kills(),
            engine_kills: counts.engine_kills,
            worker_kills: counts.worker_kills,
            scheduler_kills: counts.scheduler_kills,
            stops: counts.stops,
            restarts: counts.restarts,
            warm_restarts: counts.warm_restarts,
            cold_restarts: counts.cold_restarts,
            unasked_cold_restarts: counts.unasked_cold_restarts,
            clears: counts.clears,
            caught_writing: counts.caught_writing,
            preemptions: tally.preemptions,
            operations: tally.operations,
            requests: tally.requests,
            lookups_answered: lookups.answered,
            lookups_degraded: lookups.degraded,
            lookups_timed_out: lookups.timed_out,
            lookups_refused: lookups.refused,
            shards_stored: tally.stored,
            shards_skipped: tally.skipped,
            shards_dropped: tally.dropped,
            shards_loaded: tally.loaded,
            loads_failed: tally.failed,
            chunks_acknowledged: oracle.acknowledged,
            chunks_judged: oracle.judged,
            evictions: sums.evictions,
            forming_left: counts.forming_left,
            largest_gap_ms: tally.gap_us as f64 / 1e3,
            wrong_bytes: tally.wrong_bytes,
            lost_committed: oracle.lost,
            leaked_slots: counts.leaked_slots,
            leaked_leases: counts.leaked_leases,
            leaked_segments: counts.leaked_segments,
            hangs: counts.hangs,
            deadline_misses: tally.deadline_misses,
            crashes: counts.crashes,
            breaches: sums.breaches,
            check_failures: sums.check_failures,
            roomy_evictions: sums.roomy_evictions,
            found: run.found.iter().chain(&oracle.told).chain(&tally.missed).cloned().collect(),
        }
    }

    /// Files that are left after everything has ended and was removed.
    pub(super) fn count_left(&mut self, files: u64) {
        self.leaked_segments += files;
    }

    /// What must be 0: the number, its name, and what it means.
    fn zeros(&self) -> [(u64, &'static str, &'static str); 11] {
        [
            (self.wrong_bytes, "wrong bytes", "loaded, and not what was stored"),
            (self.lost_committed, "lost chunks", "acknowledged by all ranks, not evicted, not found"),
            (self.leaked_slots, "leaked slots", "taken when nobody used anything"),
            (self.leaked_leases, "leaked leases", "leases and pins, after the end of all sessions"),
            (self.leaked_segments, "leaked segments", "files in /dev/shm that nobody owns"),
            (self.hangs, "hangs", "not returned 30 s after the deadline"),
            (self.deadline_misses, "deadline misses", "late by more than the machine itself"),
            (self.crashes, "crashes", "ended, and nobody had killed it"),
            (self.breaches, "breaches", "clients detached for a breach of protocol"),
            (self.check_failures, "failed self-checks", "of the engine"),
            (self.roomy_evictions, "evictions with room", "in phases whose arena holds everything"),
        ]
    }

    /// What must not be, in words; nothing if all is well.
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
        let (engine, workers, schedulers) = (self.engine_kills, self.worker_kills, self.scheduler_kills);
        row("kills", self.kills, format!("{engine} engines, {workers} workers, {schedulers} schedulers"));
        let caught = self.caught_writing;
        row(
            "stops",
            self.stops,
            format!("stood still and went on; {caught} stops or engine kills hit a store"),
        );
        let unasked = self.unasked_cold_restarts;
        row(
            "restarts",
            self.restarts,
            format!(
                "the engine: {} warm, {} cold ({unasked} unasked)",
                self.warm_restarts, self.cold_restarts
            ),
        );
        row("clears", self.clears, format!("and {} preemptions", self.preemptions));
        row("operations", self.operations, format!("{} requests", self.requests));
        let (degraded, late, refused) = (self.lookups_degraded, self.lookups_timed_out, self.lookups_refused);
        row(
            "lookups answered",
            self.lookups_answered,
            format!("{degraded} degraded, {late} timed out, {refused} refused"),
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
        row("evictions", self.evictions, "in phases with a small arena".to_owned());
        self.zeros().into_iter().for_each(|(count, what, why)| row(what, count, why.to_owned()));
        align_right(&mut table, &[1]);
        format!(
            "seed {}, {} s in {} phases; the machine itself was up to {:.0} ms late\n{table}\n",
            self.seed, self.seconds, self.phases, self.largest_gap_ms
        )
    }
}
