//! The longest turn of the service loop under the worst that clients may do: 64 ranks, requests of as many keys as one
//! may name, rings that are always full. And how long the engine's beat stands still meanwhile.

use crate::child::{Engine, Placement, unique_name};
use crate::clock::Clock;
use crate::lookup::fill;
use anyhow::{Context, ensure};
use core::hint::black_box;
use kvring_adapter::{EngineView, Role};
use kvring_engine::RECORDS_PER_TURN;
use kvring_engine::byte_size::ByteSize;
use kvring_engine::config::EngineConfig;
use kvring_engine::stats::Stat;
use kvring_shm_abi::channel::Channel;
use kvring_shm_abi::engine_segment::{AttachStatus, RANKS_MAX};
use kvring_shm_abi::futex::monotonic_ns;
use kvring_shm_abi::life::RobustList;
use kvring_shm_abi::lobby::{CLIENTS_MAX, EntryContent, Lobby};
use kvring_shm_abi::lookup::Marked;
use kvring_shm_abi::message::{
    Completion, DTYPE_BYTES, HOLD_MAX, Ident, KEY_WORDS, KEYS_MAX, Key, MODEL_NAME_BYTES, Record, Records,
    Registration, Request, ReserveAnswer, ReserveOutcome, Round, ShardAnswer, SlotRecord, Status,
};
use kvring_shm_abi::park;
use kvring_shm_abi::payload::Payload;
use kvring_shm_abi::ring::{Consumer, Producer};
use kvring_shm_abi::segment::{self, EngineName};
use kvring_shm_abi::superblock::random_u64;
use std::time::{Duration, Instant};

/// Chunks that are there: of the smallest shards, they fill the arena.
const CHUNKS: usize = 1024;
/// Those of them that are held; the others are evicted to make room for stores.
const HELD: usize = CHUNKS / 2;
const SHARD_BYTES: u64 = 4096;
const ARENA: u64 = CHUNKS as u64 * RANKS_MAX as u64 * SHARD_BYTES;
/// Requests that are always under way of each kind.
const UNDER_WAY: usize = 120;
/// How long one window floods the engine.
const FLOOD: Duration = Duration::from_millis(500);
/// Longer than an answer can take.
const PATIENCE: Duration = Duration::from_secs(30);
/// Bytes of memory that the plain pass reads and writes lines of, at random.
const PLAIN_BYTES: usize = 64 << 20;

/// Where a client's arguments and answers lie, in words.
const ARGUMENTS: u32 = 0;
const ANSWERS: u32 = (KEYS_MAX * SlotRecord::WORDS) as u32;
const PAYLOAD_WORDS: u32 = ANSWERS + (KEYS_MAX * RANKS_MAX * ShardAnswer::WORDS) as u32;

/// The times of one window, in nanoseconds.
pub(crate) struct Worst {
    /// The longest turn, by the engine's own account: in CPU time, and by the clock. The clock also counts the time in which the
    /// service thread, or its virtual CPU, had no core.
    pub(crate) turn: f64,
    pub(crate) by_the_clock: f64,
    /// The longest time for which the beat did not move, seen from outside.
    pub(crate) standstill: f64,
    /// A plain pass over as many cache lines as a turn may touch.
    pub(crate) plain: f64,
}

pub(crate) fn worst(clock: &Clock) -> anyhow::Result<Worst> {
    let arena = Some(ByteSize(ARENA));
    let config = EngineConfig { name: unique_name(), arena, ..EngineConfig::default() };
    let name = EngineName::new(&config.name)?;
    let engine = Engine::spawn_as(config, &Placement::default())?;
    engine.wait_allocated()?;
    let mut worker = Flooder::attach(&name, Role::Worker)?;
    let keys: Vec<Key> = (0..CHUNKS as u64).map(|at| fill::key(0, at)).collect();
    let namespace = worker.fill(&keys)?;
    let mut scheduler = Flooder::attach(&name, Role::Scheduler)?;
    let segment = worker.view.segment.clone();
    let mut found = Vec::new();
    segment.chunks.search(namespace, keys[..HELD].iter().copied(), HELD, Marked::Missing, &mut found);
    ensure!(found.len() == HELD, "expected {HELD} chunks, found {}", found.len());
    let held: Vec<u64> = found.iter().cycle().take(HOLD_MAX).map(|word| word.bits()).collect();
    scheduler.payload.write(ARGUMENTS, &held)?;

    let epoch = segment.epoch();
    let (mut beat, mut moved, mut standstill) = (epoch.beat(), monotonic_ns(), 0);
    let (until, mut session) = (Instant::now() + FLOOD, 0u64);
    worker.reserve(namespace)?;
    while Instant::now() < until {
        while scheduler.under_way < 2 * UNDER_WAY {
            session += 1;
            scheduler.send(hold(session, namespace));
            scheduler.send(Request::EndSession { session });
        }
        while scheduler.poll()?.is_some() {}
        // It gives the granted slots back, and asks for more.
        if worker.poll()?.is_some() {
            match worker.granted()? {
                Some(abort) => worker.send(abort),
                None => worker.reserve(namespace)?,
            }
        }
        let now = monotonic_ns();
        standstill = standstill.max(now - moved);
        if epoch.beat() != beat {
            (beat, moved) = (epoch.beat(), now);
        }
    }
    let turn = engine.stat(Stat::LongestTurnCpuNs)?;
    let by_the_clock = engine.stat(Stat::LongestTurnNs)?;
    ensure!(turn > 0, "no turn was long enough to be measured");
    ensure!(engine.stat(Stat::Evictions)? > 0, "nothing was evicted");
    drop((worker, scheduler));
    engine.stop()?;
    Ok(Worst {
        turn: turn as f64,
        by_the_clock: by_the_clock as f64,
        standstill: standstill as f64,
        plain: plain_pass(clock),
    })
}

fn hold(session: u64, namespace: u32) -> Request {
    let chunks = Records { offset: ARGUMENTS, count: HOLD_MAX as u32 };
    Request::Hold { session, admission: 0, namespace, first: 0, chunks }
}

/// A pass over as many lines as a turn may touch, each read and written, in an order that no prefetcher knows.
fn plain_pass(clock: &Clock) -> f64 {
    let mut lines = vec![[1u64; 8]; PLAIN_BYTES / 64];
    let order: Vec<usize> =
        (0..RECORDS_PER_TURN).map(|at| fill::key(1, at)[0] as usize % lines.len()).collect();
    let before = clock.ticks();
    for at in &order {
        lines[*at][0] += 1;
    }
    let spent = clock.ns(clock.ticks() - before);
    black_box(&lines);
    spent
}

/// A client that sends whatever it likes and waits for nothing.
struct Flooder {
    view: EngineView,
    lobby: Lobby,
    list: RobustList,
    entry: usize,
    ident: Ident,
    submissions: Producer,
    completions: Consumer,
    payload: Payload,
    under_way: usize,
    operation: u16,
    /// Keys of the reservation that is under way, and how many there have been.
    keys: Vec<Key>,
    reservations: u64,
}

impl Flooder {
    fn attach(name: &EngineName, role: Role) -> anyhow::Result<Flooder> {
        let view = EngineView::open(name)?;
        let lobby = view.open_lobby(name)?;
        let mut list = RobustList::register(lobby.life_words.clone())?;
        let entry = (0..CLIENTS_MAX).find(|entry| list.claim(*entry).is_ok()).context("a free entry")?;
        let nonce = random_u64()?;
        let identity = view.identity;
        let channel =
            Channel::create(name, entry, nonce, PAYLOAD_WORDS, identity.arena_id, identity.geometry)?;
        let incarnation = view.segment.epoch().incarnation();
        let content = EntryContent {
            role: role as u32,
            nonce,
            incarnation,
            pid: std::process::id(),
            payload_words: PAYLOAD_WORDS,
            name: "flood".to_owned(),
        };
        lobby.claim(entry, &content);
        let until = Instant::now() + PATIENCE;
        while view.segment.attach[entry].read(nonce) != AttachStatus::Attached {
            ensure!(Instant::now() < until, "the engine does not attach a client");
            std::thread::yield_now();
        }
        segment::unlink(&name.client(entry, nonce));
        Ok(Flooder {
            view,
            lobby,
            list,
            entry,
            ident: Ident { incarnation, nonce: nonce as u32 },
            submissions: Producer::new(channel.submissions.clone()),
            completions: Consumer::new(channel.completions.clone()),
            payload: channel.payload.clone(),
            under_way: 0,
            operation: 0,
            keys: Vec::new(),
            reservations: 0,
        })
    }

    fn send(&mut self, request: Request) {
        self.operation = (self.operation + 1) % 256;
        self.submissions.push(&request.encode(self.operation, self.ident));
        park::notify(self.lobby.doorbell());
        self.under_way += 1;
    }

    fn poll(&mut self) -> anyhow::Result<Option<Completion>> {
        let Some(body) = self.completions.pop()? else { return Ok(None) };
        self.under_way -= 1;
        let completion = Completion::decode(&body)?;
        ensure!(completion.status == Status::Ok, "refused: {completion:?}");
        Ok(Some(completion))
    }

    fn call(&mut self, request: Request) -> anyhow::Result<Completion> {
        self.send(request);
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(completion) = self.poll()? {
                return Ok(completion);
            }
            ensure!(Instant::now() < until, "the engine does not answer");
            std::thread::yield_now();
        }
    }

    /// Stores these chunks as each rank in turn; their namespace.
    fn fill(&mut self, keys: &[Key]) -> anyhow::Result<u32> {
        let mut namespace = 0;
        for rank in 0..RANKS_MAX as u32 {
            let registration = Registration {
                fingerprint: [7; 4],
                layout: 1,
                shard_bytes: SHARD_BYTES,
                world: RANKS_MAX as u32,
                rank,
                chunk_tokens: 256,
                reserved: 0,
                model: [b'm'; MODEL_NAME_BYTES],
                dtype: [0; DTYPE_BYTES],
            };
            self.payload.write(ARGUMENTS, bytemuck::cast_slice(&[registration]))?;
            namespace = u32::try_from(self.call(Request::Register { record: ARGUMENTS })?.results[0])?;
            keys.clone_into(&mut self.keys);
            let reserve = self.reservation(namespace, rank)?;
            let completion = self.call(reserve)?;
            ensure!(completion.results[0] as usize == keys.len(), "no room for a chunk");
            let slots = self.slots()?;
            self.call(Request::Commit { slots, answer: ANSWERS })?;
        }
        Ok(namespace)
    }

    fn reservation(&self, namespace: u32, rank: u32) -> anyhow::Result<Request> {
        self.payload.write(ARGUMENTS, bytemuck::cast_slice(&self.keys))?;
        let keys = Records { offset: ARGUMENTS, count: self.keys.len() as u32 };
        let round = Round { source: 1, number: 1 };
        Ok(Request::Reserve { round, namespace, rank, keys, answer: ANSWERS, parent: None })
    }

    /// Asks for as many slots as one may, as the last rank that it has registered.
    fn reserve(&mut self, namespace: u32) -> anyhow::Result<()> {
        self.reservations += 1;
        self.keys = (0..KEYS_MAX as u64).map(|at| fill::key(1 + self.reservations, at)).collect();
        let request = self.reservation(namespace, RANKS_MAX as u32 - 1)?;
        self.send(request);
        Ok(())
    }

    /// The slots that the last reservation was granted, as arguments.
    fn slots(&self) -> anyhow::Result<Records> {
        let mut answers = vec![<ReserveAnswer as bytemuck::Zeroable>::zeroed(); self.keys.len()];
        self.payload.read(ANSWERS, bytemuck::cast_slice_mut(&mut answers))?;
        let granted: Vec<SlotRecord> = self
            .keys
            .iter()
            .zip(answers)
            .filter(|(_, answer)| answer.outcome() == Some(ReserveOutcome::Write))
            .map(|(key, answer)| SlotRecord {
                slot: answer.shard.slot().into(),
                generation: answer.shard.generation,
                key: *key,
                checksum: 0,
            })
            .collect();
        self.payload.write(ARGUMENTS, bytemuck::cast_slice(&granted))?;
        Ok(Records { offset: ARGUMENTS, count: granted.len() as u32 })
    }

    /// The abort that follows a reservation's answer; `None` after an abort's.
    fn granted(&mut self) -> anyhow::Result<Option<Request>> {
        if self.keys.is_empty() {
            return Ok(None);
        }
        let slots = self.slots()?;
        self.keys.clear();
        Ok(Some(Request::Abort { slots, answer: ANSWERS }))
    }
}

impl Drop for Flooder {
    fn drop(&mut self) {
        self.list.release(self.entry);
    }
}

const _: () = assert!(KEY_WORDS <= SlotRecord::WORDS);
