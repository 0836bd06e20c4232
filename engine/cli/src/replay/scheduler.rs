//! One simulated vLLM scheduler: looks each request up, tells its workers what to load and what to store, and gives
//! the lookup's pins back when all ranks have loaded.

use super::message::{
    FromScheduler, FromWorker, Plan, REPLY_MAX, RequestReport, STEP_MAX, Step, ToScheduler, ToWorker,
};
use super::worker::ATTACH_MAX;
use crate::children::kvring;
use anyhow::{Context, bail};
use kvring_adapter::{
    Client, ClientOptions, Hit, Key, PollingSchedulerAdapter, Role, SchedulerApi, SchedulerOptions,
};
use kvring_rig::blocks::BlockPool;
use kvring_rig::child::{Peer, Stderr, die_with_parent};
use kvring_rig::content::key_of;
use kvring_rig::pages::Shape;
use kvring_rig::pipe::{Abort, Pipe};
use kvring_rig::wire::Shard;
use kvring_shm_abi::superblock::random_u64;
use std::sync::Arc;
use std::time::Instant;

/// The scheduler's process: serves requests until the coordinator closes the pipe.
pub(crate) fn be_scheduler() -> anyhow::Result<()> {
    die_with_parent()?;
    let mut pipe = Pipe::to_parent()?;
    let Some(ToScheduler::Start(plan)) = pipe.receive(None)? else { bail!("expected `start` first") };
    let mut scheduler = Scheduler::start(plan)?;
    tell(&mut pipe, &FromScheduler::Ready)?;
    while let Some(message) = pipe.receive(None)? {
        let answer = match message {
            ToScheduler::Start(_) => bail!("expected `start` once"),
            ToScheduler::Request { index, blocks } => {
                let report = scheduler.serve(index, &blocks).with_context(|| format!("request {index}"))?;
                FromScheduler::Done(report)
            }
            ToScheduler::Quiesce => {
                scheduler.quiesce()?;
                FromScheduler::Quiet(scheduler.adapter.lookup_stats().into())
            }
        };
        tell(&mut pipe, &answer)?;
    }
    scheduler.finish()
}

fn tell(pipe: &mut Pipe, message: &FromScheduler) -> anyhow::Result<()> {
    pipe.send(message, Instant::now() + STEP_MAX).context("telling the coordinator")
}

struct Scheduler {
    adapter: PollingSchedulerAdapter,
    client: Arc<Client>,
    /// One per rank.
    workers: Vec<Peer>,
    shape: Shape,
    pool: BlockPool,
    /// Names the rounds of this scheduler.
    source: u32,
    rounds: u32,
}

impl Scheduler {
    fn start(plan: Plan) -> anyhow::Result<Scheduler> {
        let Plan { instance, ranks, shape, .. } = plan;
        let start = |rank| {
            let name = format!("instance {instance} rank {rank}");
            Peer::start(name, kvring("replay-worker")?, Stderr::Inherited, Abort::default())
        };
        let mut workers = (0..ranks).map(start).collect::<anyhow::Result<Vec<Peer>>>()?;
        for (rank, worker) in (0..).zip(&mut workers) {
            worker.send(&ToWorker::Start(plan.clone(), rank))?;
        }
        for worker in &mut workers {
            match worker.receive(ATTACH_MAX * 2)? {
                FromWorker::Ready => {}
                other => bail!("{}: expected `ready`, got {other:?}", worker.name()),
            }
        }
        let options = ClientOptions {
            engine: plan.engine,
            client: format!("replay {instance} scheduler"),
            attach_timeout: ATTACH_MAX,
            ..ClientOptions::default()
        };
        let client = Client::new(Role::Scheduler, options)?;
        if let Err(health) = client.wait_ready(ATTACH_MAX) {
            bail!("the engine is {health} after {} s", ATTACH_MAX.as_secs());
        }
        let adapter = PollingSchedulerAdapter::new(&client, SchedulerOptions::new(plan.fingerprint));
        let source = random_u64().context("a random number for round ids")? as u32;
        Ok(Scheduler {
            adapter,
            client,
            workers,
            shape,
            pool: BlockPool::new(shape.blocks),
            source,
            rounds: 0,
        })
    }

    /// One request, from its lookup to the end of its session.
    fn serve(&mut self, index: u32, blocks: &[u64]) -> anyhow::Result<RequestReport> {
        let request = format!("request-{index}");
        let keys: Vec<Key> = blocks.iter().map(|id| key_of(*id)).collect();
        let began = Instant::now();
        let hit = self.adapter.lookup(&request, 0, &keys)?;
        let lookup_ns = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let hit_chunks = hit.chunks;
        let ranks = self.workers.len() as u32;
        if hit_chunks > 0 && hit.world != ranks {
            bail!("expected a hit of {ranks} ranks, got {}", hit.world);
        }
        // One clone, so that the adapter can be used while the workers load.
        let hit = hit.clone();
        let paged = self.pool.take(keys.len(), self.shape.blocks_per_chunk)?;
        self.rounds += 1;
        for rank in 0..ranks {
            let step = step(&request, rank, &hit, &keys, &paged, (self.source, self.rounds));
            self.workers[rank as usize].send(&ToWorker::Step(step))?;
        }
        let mut loads = Vec::with_capacity(self.workers.len());
        for worker in &mut self.workers {
            match worker.receive(REPLY_MAX)? {
                FromWorker::Loaded(loaded) => loads.push(loaded),
                other => bail!("{}: expected `loaded`, got {other:?}", worker.name()),
            }
        }
        // All ranks have reported: nobody needs the pins any more.
        self.adapter.free_lookup_locks(&request, 0, 0);
        let mut reports = Vec::with_capacity(self.workers.len());
        for (worker, loaded) in self.workers.iter_mut().zip(loads) {
            match worker.receive(REPLY_MAX)? {
                FromWorker::Stored(stored) => reports.push((loaded, stored)),
                other => bail!("{}: expected `stored`, got {other:?}", worker.name()),
            }
        }
        self.adapter.end_session(&request);
        self.pool.give(paged);
        Ok(RequestReport { hit_chunks, lookup_ns, ranks: reports })
    }

    /// Nothing is under way, here and in the workers, and the engine has heard of everything.
    fn quiesce(&mut self) -> anyhow::Result<()> {
        for worker in &mut self.workers {
            worker.send(&ToWorker::Quiesce)?;
        }
        for worker in &mut self.workers {
            match worker.receive(REPLY_MAX)? {
                FromWorker::Quiet => {}
                other => bail!("{}: expected `quiet`, got {other:?}", worker.name()),
            }
        }
        let open = self.adapter.open_sessions();
        if open > 0 {
            bail!("{open} sessions are open after their end");
        }
        // The ring is served in order: the ends of all sessions came before this.
        self.client.noop().context("the engine does not answer at the end of the replay")
    }

    fn finish(mut self) -> anyhow::Result<()> {
        for worker in &mut self.workers {
            worker.close();
        }
        for worker in self.workers {
            worker.finish()?;
        }
        self.adapter.shutdown();
        Ok(())
    }
}

/// What one rank does for a request.
fn step(request: &str, rank: u32, hit: &Hit, keys: &[Key], paged: &[Vec<u32>], round: (u32, u32)) -> Step {
    let hit_chunks = hit.chunks as usize;
    let (load_blocks, store_blocks) = paged.split_at(hit_chunks);
    let shards = hit.shards_of(rank).map(Shard::from);
    let missing = keys[hit_chunks..].iter().copied();
    Step {
        request: request.to_owned(),
        arena_id: hit.arena_id,
        load: shards.zip(load_blocks.iter().cloned()).collect(),
        store: missing.zip(store_blocks.iter().cloned()).collect(),
        round,
        parent: hit_chunks.checked_sub(1).map(|last| keys[last]),
    }
}
