//! The clients that live through a scenario, and the record of what was acknowledged to them.
//!
//! Two ranks of one namespace, whose chunks need both; two workers of another namespace, of which one has a copy running all the
//! time; a scheduler with a lease for each namespace. All of them are in this process, so that a copy can be held.

use super::checks::Checks;
use super::scene::{LARGE_SHARD, PAIR, SHARD, SOLO, scheduler_spec, worker_spec};
use crate::held::HeldBackend;
use crate::kv::chain;
use crate::proto::{Found, all_loaded};
use crate::scheduler::SchedulerSide;
use crate::worker::WorkerSide;
use kvring_adapter::{Client, JobId, Key, Round};
use kvring_gpu_kernels::CpuBackend;
use std::sync::Arc;
use std::time::Duration;

/// Whose chunks these are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// The pair's.
    Pair,
    /// Those of the worker beside the one with the running copy.
    Other,
    /// Those of the worker with the running copy.
    Solo,
    /// Those of the pair that comes late.
    Late,
}

/// Chunks that were stored together.
pub struct Group {
    whose: Whose,
    keys: Vec<Key>,
    version: u64,
    /// Stores that have not been reported: of which worker, and which job.
    open: Vec<(usize, JobId)>,
    /// How many shards the reports so far have called dropped.
    dropped: u32,
    /// All ranks have reported all of it as stored or as there already, and it has not been cleared since.
    pub acknowledged: bool,
    /// What was found of it and is leased for the whole scenario.
    lease: Option<Found>,
}

/// The clients.
pub struct Cast {
    pair: [WorkerSide; 2],
    solo: [WorkerSide; 1],
    other: [WorkerSide; 1],
    late: Vec<WorkerSide>,
    /// Of the pair's namespace.
    pub scheduler: SchedulerSide,
    /// Of the other namespace.
    pub planner: SchedulerSide,
    late_planner: Option<SchedulerSide>,
    /// Holds the solo worker's copies.
    pub backend: Arc<HeldBackend>,
    pub groups: Vec<Group>,
    engine: String,
    rounds: u32,
    asked: u32,
}

/// The namespace of the pair that comes late.
const LATE: u64 = 5;

impl Cast {
    /// Everybody is attached; a copy of the solo worker's is running; both schedulers hold a lease.
    pub fn new(engine: &str) -> Cast {
        let backend = HeldBackend::new();
        let start = |namespace, world, rank| {
            let spec = worker_spec(engine, namespace, world, rank, SHARD);
            WorkerSide::copying_with(&spec, Arc::new(CpuBackend::new(1))).expect("a worker")
        };
        let solo = WorkerSide::copying_with(&worker_spec(engine, SOLO, 1, 0, SHARD), backend.clone());
        let mut cast = Cast {
            pair: [start(PAIR, 2, 0), start(PAIR, 2, 1)],
            solo: [solo.expect("a worker")],
            other: [start(SOLO, 1, 0)],
            late: Vec::new(),
            scheduler: SchedulerSide::start(&scheduler_spec(engine, PAIR)),
            planner: SchedulerSide::start(&scheduler_spec(engine, SOLO)),
            late_planner: None,
            backend,
            groups: Vec::new(),
            engine: engine.to_owned(),
            rounds: 0,
            asked: 0,
        };
        let mut checks = Checks::new();
        cast.is_ready(&mut checks, || false);
        for (whose, chunks) in [(Whose::Pair, 5), (Whose::Other, 4)] {
            let group = cast.store(whose, chunks);
            cast.settle(&mut checks, || false);
            assert!(cast.groups[group].acknowledged, "{:?}", checks.finish());
            let keys = cast.groups[group].keys.clone();
            let scheduler = if whose == Whose::Pair { &mut cast.scheduler } else { &mut cast.planner };
            let found = scheduler.lookup("held", 0, &keys);
            assert_eq!(found.chunks, chunks as u32);
            cast.groups[group].lease = Some(found);
        }
        cast.backend.hold();
        cast.store(Whose::Solo, 4);
        cast.backend.holds(1);
        assert!(checks.is_clean(), "{:?}", checks.finish());
        cast
    }

    fn workers(&mut self, whose: Whose) -> &mut [WorkerSide] {
        match whose {
            Whose::Pair => &mut self.pair,
            Whose::Other => &mut self.other,
            Whose::Solo => &mut self.solo,
            Whose::Late => &mut self.late,
        }
    }

    fn scheduler_of(&mut self, whose: Whose) -> &mut SchedulerSide {
        match whose {
            Whose::Pair => &mut self.scheduler,
            Whose::Other | Whose::Solo => &mut self.planner,
            Whose::Late => self.late_planner.as_mut().expect("a scheduler that came with its pair"),
        }
    }

    /// Every client.
    pub fn clients(&self) -> Vec<Arc<Client>> {
        let workers = self.pair.iter().chain(&self.solo).chain(&self.other).chain(&self.late);
        let schedulers = [&self.scheduler, &self.planner].into_iter().chain(&self.late_planner);
        workers.map(|w| w.client().clone()).chain(schedulers.map(|s| s.client().clone())).collect()
    }

    /// Waits until everybody is attached and registered, or `over` says that there is nothing to wait for.
    pub fn is_ready(&self, checks: &mut Checks, mut over: impl FnMut() -> bool) {
        for client in self.clients() {
            let mut is_over = false;
            checks.becomes("a client that is ready", true, || {
                is_over = is_over || over();
                is_over || client.wait_ready(Duration::from_millis(5)).is_ok()
            });
        }
    }

    /// The round of the latest store.
    pub fn latest_round(&self) -> Round {
        Round { source: 1, number: self.rounds }
    }

    /// The next round's number: stores of this cast are of source 1.
    pub fn next_round(&mut self) -> Round {
        self.rounds += 1;
        Round { source: 1, number: self.rounds }
    }

    /// Submits the store of `chunks` new chunks by all workers whose they are.
    pub fn store(&mut self, whose: Whose, chunks: usize) -> usize {
        self.store_by(whose, chunks, 0..2)
    }

    /// The same by some ranks alone.
    pub fn store_by(&mut self, whose: Whose, chunks: usize, ranks: core::ops::Range<usize>) -> usize {
        let number = self.groups.len();
        let (keys, version) = (chain(1000 + number as u64, chunks), 10 + number as u64);
        let (open, lease) = (Vec::new(), None);
        self.groups.push(Group { whose, keys, version, open, dropped: 0, acknowledged: false, lease });
        self.submit(number, ranks);
        number
    }

    /// The groups that have not been acknowledged.
    pub fn unfinished(&self, whose: Whose) -> Vec<usize> {
        let groups = self.groups.iter().enumerate();
        groups.filter(|(_, g)| g.whose == whose && !g.acknowledged).map(|(number, _)| number).collect()
    }

    /// Does the solo worker's copy still run?
    pub fn is_copying(&self) -> bool {
        self.groups.iter().any(|group| group.whose == Whose::Solo && !group.open.is_empty())
    }

    /// A group's keys, and the version of their content.
    pub fn content(&self, group: usize) -> (Vec<Key>, u64) {
        (self.groups[group].keys.clone(), self.groups[group].version)
    }

    /// Another round of a group, by some ranks alone.
    pub fn submit(&mut self, number: usize, ranks: core::ops::Range<usize>) {
        let round = self.next_round();
        let Group { whose, version, .. } = self.groups[number];
        let keys = self.groups[number].keys.clone();
        let mut open = Vec::new();
        for (rank, worker) in self.workers(whose).iter_mut().enumerate() {
            if ranks.contains(&rank) {
                let job = worker.submit_store(round, &keys, version).expect("a good job");
                open.push((rank, job));
            }
        }
        self.groups[number].dropped = 0;
        self.groups[number].open = open;
    }

    /// Waits until all stores have been reported but the running copy's, which is as long as it is held; or until `over`.
    pub fn settle(&mut self, checks: &mut Checks, over: impl FnMut() -> bool) {
        self.settle_all(checks, false, over);
    }

    /// Lets the running copy go, and waits until all stores have been reported.
    pub fn finish_copies(&mut self, checks: &mut Checks) {
        self.backend.let_go();
        self.settle_all(checks, true, || false);
    }

    fn settle_all(&mut self, checks: &mut Checks, solo: bool, mut over: impl FnMut() -> bool) {
        for number in 0..self.groups.len() {
            let whose = self.groups[number].whose;
            if whose == Whose::Solo && !solo {
                continue;
            }
            let mut is_over = false;
            checks.becomes("stores that are not reported", 0, || {
                is_over = is_over || over();
                if is_over { 0 } else { self.poll(number) }
            });
        }
    }

    /// Takes the reports of a group's stores; how many are missing.
    fn poll(&mut self, number: usize) -> usize {
        let mut open = core::mem::take(&mut self.groups[number].open);
        let had = open.len();
        let mut dropped = 0;
        let workers = self.workers(self.groups[number].whose);
        open.retain(|(rank, job)| match workers[*rank].report_of(*job) {
            Some(stored) => {
                dropped += stored.dropped;
                false
            }
            None => true,
        });
        let group = &mut self.groups[number];
        group.dropped += dropped;
        group.open = open;
        if had > 0 && group.open.is_empty() && group.dropped == 0 {
            group.acknowledged = true;
        }
        group.open.len()
    }

    /// A pair with another shard size in a namespace of its own. Its registration may not be through yet.
    pub fn late_pair_comes(&mut self) {
        for rank in 0..2 {
            let spec = worker_spec(&self.engine, LATE, 2, rank, LARGE_SHARD);
            let worker = WorkerSide::copying_with(&spec, Arc::new(CpuBackend::new(1)));
            self.late.push(worker.expect("a registration that is not refused"));
        }
        self.late_planner = Some(SchedulerSide::start(&scheduler_spec(&self.engine, LATE)));
    }

    /// Clears the cache: chunks that are not leased may be gone, whatever was acknowledged before.
    pub fn clear(&mut self) {
        for group in self.groups.iter_mut().filter(|group| group.lease.is_none()) {
            group.acknowledged = false;
        }
        // The engine may die of it, so an error is fine.
        let _ = self.scheduler.client().clear();
    }

    /// The arena is a new one: no chunk of the earlier one is found any more.
    pub fn lost_everything(&mut self) {
        for group in &mut self.groups {
            (group.acknowledged, group.lease) = (false, None);
        }
        for scheduler in [&mut self.scheduler, &mut self.planner] {
            scheduler.api().end_session("held");
        }
    }

    /// Loads all that is leased, with or without an engine: all bytes are right.
    pub fn loads_what_is_leased(&mut self, checks: &mut Checks, when: &str) {
        for number in 0..self.groups.len() {
            if let Some(found) = self.groups[number].lease.clone() {
                let (whose, version) = (self.groups[number].whose, self.groups[number].version);
                let expected = all_loaded(found.chunks as usize);
                for (rank, worker) in self.workers(whose).iter_mut().enumerate() {
                    let loaded = checks.within(Duration::ZERO, format_args!("a load {when}"), || {
                        worker.load(&found.handles, version)
                    });
                    checks.same(format_args!("a leased group, {when}, rank {rank}"), expected, loaded);
                }
            }
        }
    }

    /// Looks up and loads a group: all that was acknowledged is there, and the bytes of all that is there are right.
    fn find(&mut self, checks: &mut Checks, number: usize, when: &str) {
        self.asked += 1;
        let request = format!("find-{}", self.asked);
        let Group { whose, version, acknowledged, .. } = self.groups[number];
        let keys = self.groups[number].keys.clone();
        let found = self.scheduler_of(whose).lookup(&request, 0, &keys);
        if acknowledged {
            let what = format!("chunks found of group {number} ({whose:?}), acknowledged, {when}");
            checks.same(what, keys.len() as u32, found.chunks);
        }
        // The backend of the worker with the running copy would hold its loads, too.
        let readers = if whose == Whose::Solo { Whose::Other } else { whose };
        for (rank, worker) in self.workers(readers).iter_mut().enumerate() {
            let loaded = worker.load(&found.handles, version);
            let expected = all_loaded(found.chunks as usize);
            checks.same(
                format_args!("loads of group {number} ({whose:?}) rank {rank}, {when}"),
                expected,
                loaded,
            );
        }
        self.scheduler_of(whose).api().end_session(&request);
    }

    /// Everything that was acknowledged is there, and everything that is there is right.
    pub fn finds_everything(&mut self, checks: &mut Checks, when: &str) {
        for number in 0..self.groups.len() {
            self.find(checks, number, when);
        }
    }

    /// Stores again, in another round, what was dropped. Now all of it is stored.
    pub fn stores_again_what_was_dropped(&mut self, checks: &mut Checks) {
        for number in 0..self.groups.len() {
            if self.groups[number].acknowledged {
                continue;
            }
            if self.workers(self.groups[number].whose).is_empty() {
                continue;
            }
            self.submit(number, 0..2);
            self.settle_all(checks, true, || false);
            checks.same(
                format_args!("group {number}, stored again: dropped"),
                0,
                self.groups[number].dropped,
            );
            self.groups[number].acknowledged = true;
        }
    }

    /// Gives all leases back.
    pub fn ends_its_sessions(&mut self) {
        for scheduler in [&mut self.scheduler, &mut self.planner] {
            scheduler.api().end_session("held");
        }
    }

    /// How many of the schedulers' leases there are.
    pub fn leases(&self) -> usize {
        self.groups.iter().filter(|group| group.lease.is_some()).count()
    }
}

impl Drop for Cast {
    fn drop(&mut self) {
        // A worker ends after its copies, and a test that fails must not hang in one.
        self.backend.let_go();
    }
}
