//! A request, from its lookup through loads and stores to the end of its session, or to an end before that.

use super::{PENDING, Scheduler, name_of};
use crate::chaos::LOOKUP;
use crate::chaos::message::{FromScheduler, Job, Outcome, ToWorker};
use crate::chaos::plan::RANKS;
use crate::chaos::requests::{Request, State};
use crate::chaos::work::Turn;
use anyhow::bail;
use kvring_adapter::{Hit, Lookup};
use kvring_rig::wire::Shard;
use kvring_shm_abi::futex::monotonic_ns;
use std::time::{Duration, Instant};

/// Requests under way at once.
pub(super) const AT_ONCE: usize = 4;
/// How long it is left alone meanwhile.
const ASK_AGAIN: Duration = Duration::from_micros(200);

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
        let (found, _) = self.look_up(job, 0, turn)?;
        let mut request = Request::new(job, turn, turn.keys(self.seed), found);
        match self.random.of(0..100) {
            // Somebody only looked.
            0..8 => self.end_session(job),
            // Somebody went away, and it takes a while until that is noticed.
            8..16 => {
                request.state = State::Abandoned(Instant::now() + self.random.ms(50..3000));
                self.requests.push(request);
            }
            // Preempted before it had begun: it comes back with the next admission, its first lease given back or not.
            choice @ 16..26 => {
                if choice < 21 {
                    let (adapter, name) = (&mut self.adapter, name_of(job));
                    let release = || adapter.free_lookup_locks(&name, 0, 0);
                    self.watch.call("free_lookup_locks", Duration::ZERO, release);
                }
                let (found, _) = self.look_up(job, 1, turn)?;
                request.hit = found;
                self.begin(request, 1)?;
            }
            _ => self.begin(request, 0)?,
        }
        Ok(())
    }

    pub(super) fn next_job(&mut self) -> Job {
        self.number += 1;
        Job { life: self.life, number: self.number }
    }

    /// Chunks found, and whether the engine said so.
    pub(super) fn look_up(&mut self, job: Job, admission: u32, turn: Turn) -> anyhow::Result<(usize, bool)> {
        let keys = turn.keys(self.seed);
        let (adapter, name) = (&mut self.adapter, name_of(job));
        let answered = adapter.lookup_stats().answered;
        let began_ns = monotonic_ns();
        let (deadline, pending) =
            if self.asynchronous { (Duration::ZERO, PENDING) } else { (LOOKUP, Duration::ZERO) };
        self.watch.call("submit_lookup", deadline, || adapter.submit_lookup(&name, admission, &keys))?;
        let (found, world) = self.watch.call("check_lookup", pending, || {
            loop {
                match adapter.check_lookup(&name) {
                    Lookup::Hit(hit) => return (hit.chunks, hit.world),
                    Lookup::Pending => std::thread::sleep(ASK_AGAIN),
                }
            }
        });
        if found > 0 && world != RANKS {
            bail!("expected a hit of {RANKS} ranks, got {world}");
        }
        let answered = adapter.lookup_stats().answered > answered;
        if answered {
            self.tell(&FromScheduler::Looked { turn, began_ns, found })?;
        }
        Ok((found as usize, answered))
    }

    /// Loads what was found, or stores what was not, or ends.
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
        self.adapter.submit_lookup(&name_of(job), admission, &request.keys)?;
        let Lookup::Hit(hit) = self.adapter.check_lookup(&name_of(job)) else {
            bail!("an answer was forgotten")
        };
        let hit = hit.clone();
        match self.random.of(0..100) {
            // Aborted with its load under way: what it loads may be evicted under its hands.
            0..10 if !request.audit => {
                self.send_load(job, &hit)?;
                self.end_session(job);
                return Ok(());
            }
            // Somebody loads long after nobody has a right to it any more: what it means, or an error.
            10..18 if !request.audit => {
                self.end_session(job);
                request.state = State::Stale(Instant::now() + self.random.ms(0..1500));
                self.stale.insert(job, hit);
                self.requests.push(request);
                return Ok(());
            }
            _ => self.send_load(job, &hit)?,
        }
        request.begin(State::Loading);
        self.requests.push(request);
        Ok(())
    }

    pub(super) fn send_load(&mut self, job: Job, hit: &Hit) -> anyhow::Result<()> {
        self.tell_all(|rank| ToWorker::Load {
            job,
            arena_id: hit.arena_id,
            shards: hit.shards_of(rank).map(Shard::from).collect(),
        })
    }

    fn store(&mut self, mut request: Request) -> anyhow::Result<()> {
        let job = request.job;
        let keys = request.keys[request.hit..].to_vec();
        if keys.is_empty() || request.audit || self.ranks.contains(&None) {
            self.end_session(job);
            return Ok(());
        }
        request.begin_store(monotonic_ns(), self.lives.now());
        let round = (self.source, job.number);
        let parent = request.hit.checked_sub(1).map(|last| request.keys[last]);
        self.tell_all(|_| ToWorker::Store { job, round, parent, keys: keys.clone() })?;
        match self.random.of(0..100) {
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
                let (adapter, name) = (&mut self.adapter, name_of(job));
                let release = || (0..2).for_each(|admission| adapter.free_lookup_locks(&name, admission, 0));
                self.watch.call("free_lookup_locks", Duration::ZERO, release);
                self.store(request)
            }
            State::Storing => {
                if request.acknowledged() {
                    let Request { turn, hit, store_ns, skipped, .. } = request;
                    let (from, began_ns, ended_ns) = (hit as u32, store_ns, monotonic_ns());
                    self.tell(&FromScheduler::Acknowledged { turn, from, began_ns, ended_ns, job, skipped })?;
                }
                self.end_session(job);
                Ok(())
            }
            State::Abandoned(_) | State::Stale(_) => Ok(()),
        }
    }
}
