//! A request, from its lookup through loads and stores to the end of its session, or to an end before that.

use super::{Done, Scheduler};
use crate::chaos::Turn;
use crate::instances::message::{FromScheduler, Job, Outcome, ToWorker};
use crate::instances::requests::{Request, State};
use kvring_adapter::{Hit, Key};
use kvring_rig::wire::Handle;
use kvring_shm_abi::futex::monotonic_ns;
use std::time::{Duration, Instant};

/// Requests under way at once.
pub(super) const AT_ONCE: usize = 4;

impl Scheduler {
    pub(super) fn work(&mut self) -> anyhow::Result<()> {
        if Instant::now() < self.next_at || self.requests.len() >= AT_ONCE + 8 {
            return Ok(());
        }
        let busy = self.requests.iter().filter(|r| r.is_busy()).count();
        if busy >= AT_ONCE {
            return Ok(());
        }
        self.next_at = Instant::now() + self.random.ms(0..6);
        let turn = Turn::random(&mut self.random, self.phase, self.made);
        self.made += 1;
        self.watch.tally().requests += 1;
        let job = self.next_job();
        let keys = turn.keys(self.seed);
        let (found, _) = self.look_up(job, 0, &keys, Some(turn))?;
        let mut request = Request::new(job, Some(turn), keys, found);
        match self.random.of(0..100) {
            // Only looked up.
            0..8 => self.end_session(job),
            // Its client goes away, and that is noticed only after a while.
            8..16 => {
                request.state = State::Abandoned(Instant::now() + self.random.ms(50..3000));
                self.requests.push(request);
            }
            // Preempted before it had begun: it comes back with the next admission, its first lease given back or not.
            choice @ 16..26 => {
                if choice < 21 {
                    let (adapter, name) = (&mut self.adapter, job.name());
                    let release = || adapter.free_lookup_locks(&name, 0, 0);
                    self.watch.call("free_lookup_locks", Duration::ZERO, release);
                }
                let (found, _) = self.look_up(job, 1, &request.keys, Some(turn))?;
                request.hit = found;
                self.begin(request, 1)?;
            }
            _ => self.begin(request, 0)?,
        }
        Ok(())
    }

    /// One of the coordinator's requests begins.
    pub(super) fn serve_request(&mut self, number: u32, keys: Vec<Key>) -> anyhow::Result<()> {
        let job = Job { life: self.start.life, number };
        let began = Instant::now();
        let (hit, _) = self.look_up(job, 0, &keys, None)?;
        let mut request = Request::new(job, None, keys, hit);
        request.lookup_ns = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.begin(request, 0)
    }

    /// All of a request has ended.
    fn done(&mut self, request: &Request) -> anyhow::Result<()> {
        let Request { job, hit, lookup_ns, turn, .. } = *request;
        self.end_session(job);
        if turn.is_some() {
            return Ok(());
        }
        self.say(FromScheduler::Done(Done { number: job.number, hit_chunks: hit as u32, lookup_ns }))
    }

    pub(super) fn next_job(&mut self) -> Job {
        self.number += 1;
        Job { life: self.start.life, number: self.number }
    }

    /// Chunks found, and whether the engine said so.
    pub(super) fn look_up(
        &mut self,
        job: Job,
        admission: u32,
        keys: &[Key],
        turn: Option<Turn>,
    ) -> anyhow::Result<(usize, bool)> {
        let (adapter, name) = (&mut self.adapter, job.name());
        let answered = adapter.lookup_stats().answered;
        let began_ns = monotonic_ns();
        let not_serving = adapter.lookup_stats().not_serving;
        let found = self.watch.call("lookup", Duration::ZERO, || {
            adapter.lookup(&name, admission, keys).map(|hit| hit.chunks)
        })?;
        let is_dead = adapter.lookup_stats().not_serving > not_serving;
        self.watch.tally().hits_while_dead += u64::from(is_dead && found > 0);
        let answered = adapter.lookup_stats().answered > answered;
        if let Some(turn) = turn.filter(|_| answered) {
            self.say(FromScheduler::Looked { turn, began_ns, found })?;
        }
        Ok((found as usize, answered))
    }

    /// Loads the chunks that were found, or stores those that were not, or ends the request.
    pub(super) fn begin(&mut self, mut request: Request, admission: u32) -> anyhow::Result<()> {
        let job = request.job;
        if self.ranks.contains(&None) {
            self.end_session(job);
            return Ok(());
        }
        if request.hit == 0 {
            return self.store(request);
        }
        // A known admission: its answer again, and no work.
        let hit = self.adapter.lookup(&job.name(), admission, &request.keys)?.clone();
        let good = request.audit || self.start.is_calm();
        match self.random.of(0..100) {
            // Aborted with its load under way: the chunks may be evicted while they are loaded.
            0..10 if !good => {
                self.send_load(job, &hit, &request.keys)?;
                self.end_session(job);
                return Ok(());
            }
            // Loaded long after its session has ended: the load brings the right bytes, or fails.
            10..18 if !good => {
                self.end_session(job);
                request.state = State::Stale(Instant::now() + self.random.ms(0..1500));
                self.stale.insert(job, (hit, request.keys.clone()));
                self.requests.push(request);
                return Ok(());
            }
            _ => self.send_load(job, &hit, &request.keys)?,
        }
        request.begin(State::Loading, self.start.ranks);
        self.requests.push(request);
        Ok(())
    }

    pub(super) fn send_load(&mut self, job: Job, hit: &Hit, keys: &[Key]) -> anyhow::Result<()> {
        let chunks: Vec<Handle> = hit.handles().zip(keys).map(Handle::from).collect();
        self.tell_all(|_| ToWorker::Load { job, chunks: chunks.clone() })
    }

    fn store(&mut self, mut request: Request) -> anyhow::Result<()> {
        let job = request.job;
        let keys = request.keys[request.hit..].to_vec();
        if keys.is_empty() || request.audit || self.ranks.contains(&None) {
            return self.done(&request);
        }
        request.begin_store(monotonic_ns(), self.lives.now(), self.start.ranks);
        let round = (self.source, job.number);
        let parent = request.hit.checked_sub(1).map(|last| request.keys[last]);
        self.tell_all(|_| ToWorker::Store { job, round, parent, keys: keys.clone() })?;
        match self.random.of(0..100) {
            _ if self.start.is_calm() => {}
            // At once, or somewhat later.
            0..12 => self.tell_all(|_| ToWorker::Preempt(job))?,
            12..18 => request.preempt = Some(Instant::now() + self.random.ms(0..4)),
            _ => {}
        }
        for other in &mut self.requests {
            request.contest(other);
        }
        self.requests.push(request);
        Ok(())
    }

    pub(super) fn reply(&mut self, rank: u32, job: Job, outcome: Outcome) -> anyhow::Result<()> {
        // Of a request that was aborted, or of an earlier life of ours.
        let Some(at) = self.requests.iter().position(|request| request.job == job) else { return Ok(()) };
        if !self.requests[at].answered(rank, outcome) {
            return Ok(());
        }
        let request = self.requests.swap_remove(at);
        match request.state {
            State::Loading => {
                // All ranks have reported: nobody needs the pins any more. (An unknown admission is fine.)
                let (adapter, name) = (&mut self.adapter, job.name());
                let release = || (0..2).for_each(|admission| adapter.free_lookup_locks(&name, admission, 0));
                self.watch.call("free_lookup_locks", Duration::ZERO, release);
                self.store(request)
            }
            State::Storing => {
                if let Some(turn) = request.turn.filter(|_| request.acknowledged()) {
                    let Request { hit, store_ns, skipped, .. } = request;
                    let (from, began_ns, ended_ns) = (hit as u32, store_ns, monotonic_ns());
                    self.say(FromScheduler::Acknowledged { turn, from, began_ns, ended_ns, job, skipped })?;
                }
                self.done(&request)
            }
            State::Abandoned(_) | State::Stale(_) => Ok(()),
        }
    }
}
