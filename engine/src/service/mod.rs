//! The service loop: one thread that owns everything.
//!
//! A turn looks at every attached client's submission ring, answers what it finds, and goes on. With nothing to do it
//! spins for a while (adapting to how often that pays), then sleeps on its doorbell and on the life words of its
//! clients at once. About every millisecond, and every `beat_interval` while idle, it *ticks*: the beat, the lobby,
//! the dead, the background allocator, the statistics, a step of its own invariants.
//!
//! No client can hold it up for long: it never waits for one, detaches one that breaks the protocol, and **no turn does more
//! than a bounded amount of work**, counted in records of the cache's tables that it touches. A request of many keys, or the
//! death of a client that held much, may take longer and is done in pieces: a client has a [`SLICE`] at a time; a turn ends
//! after [`TURN`], and the next one begins with the next client. Work done, not turns alone, decides when the loop looks at the
//! clock.

mod attach;
mod clear;
mod connection;
mod declare;
mod dispatch;
mod done;
mod entry;
mod gauges;
mod hold;
mod linger;
mod listen;
mod parting;
mod placing;
mod register;
mod registry;
mod slot_table;
mod store;

use crate::allocator::Allocator;
use crate::cache::Cache;
use crate::recovery::Inherited;
use crate::segments::Segments;
use crate::stats::Stat;
use crate::stop::StopHandle;
use clear::Clearing;
use connection::Connection;
use dispatch::Scratch;
use entry::Entry;
use kvring_shm_abi::engine_segment::EngineSegment;
use kvring_shm_abi::failpoint::{self, Place};
use kvring_shm_abi::futex::{self, Deadline, monotonic_ns};
use kvring_shm_abi::lobby::CLIENTS_MAX;
use kvring_shm_abi::park;
use kvring_shm_abi::process::ProcessIdentity;
use kvring_shm_abi::sync::{Ordering, spin_loop};
use listen::Listening;
pub(crate) use placing::Placing;
pub(crate) use registry::Registry;
pub(crate) use slot_table::SharedSlots;
use std::time::Duration;

/// Requests taken from one ring per turn: a client that floods its ring delays the others by this many at most.
const BATCH: u32 = 32;
/// Records that are touched for one client before the next one has its turn.
const SLICE: u64 = 4096;
/// Records that a job in the background (a parting, a clear, …) touches in one turn. A request that arrives meanwhile waits for
/// that long.
const BACKGROUND: u64 = 256;
/// Records after which a turn ends, also where some clients have not been served: the next turn begins with those.
const TURN: u64 = 4096;
/// The most records that one turn touches: a piece in the background, one less than [`TURN`] for the clients, and then the
/// whole slice of one more client. A piece may exceed its share by the records that a single chunk takes.
pub const RECORDS_PER_TURN: u64 = BACKGROUND + TURN + SLICE;
/// Turns, or records, between two looks at the clock.
const CLOCK_EVERY: u32 = 32;
const CLOCK_RECORDS: u64 = 2048;
/// After so long without a look at the clock the loop reads its CPU time as well, which is a system call.
const LONG_NS: u64 = 100_000;
/// Slabs taken over from the allocator in one tick.
const SLABS_PER_TICK: usize = 64;
/// The shortest time between two ticks: the beat moves at most at 1 kHz.
const TICK_NS: u64 = 1_000_000;
/// The time between two looks at the file locks of clients whose kernel marks no life word. The death of such a client is
/// noticed that much later at most; a look costs half a microsecond for each of them.
const LOCKS_NS: u64 = 50_000_000;
/// The time between two looks at whether our names in `/dev/shm` still lead to our segments.
const NAMES_NS: u64 = 1_000_000_000;
/// Steps of the self-check in one idle tick.
const CHECK_STEPS: u32 = 64;

/// A sleep on fewer life words than this fills a small array; with more clients it fills one for [`CLIENTS_MAX`], which takes
/// a moment longer.
const SLEEP_FEW: usize = 8;

/// The times that the loop keeps.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    /// The beat moves at least this often.
    pub(crate) beat_interval_ns: u64,
    /// The longest spin before a sleep; 0 on one CPU.
    pub(crate) spin_ns: u64,
    /// How long the engine waits for clients of an earlier engine before it evicts anything.
    pub(crate) reattach_grace_ns: u64,
}

/// The parts that a service is made of.
pub(crate) struct Parts {
    pub(crate) segments: Segments,
    pub(crate) cache: Cache<SharedSlots>,
    pub(crate) registry: Registry,
    pub(crate) allocator: Allocator,
    pub(crate) inherited: Inherited,
    pub(crate) placing: Placing,
    pub(crate) pace: Pace,
    pub(crate) stop: StopHandle,
}

/// A claimed life word, and its value at the last look around the lobby.
struct Watched {
    entry: usize,
    raw: u32,
}

/// Everything the service thread owns.
pub(crate) struct Service {
    segments: Segments,
    cache: Cache<SharedSlots>,
    registry: Registry,
    entries: Vec<Entry>,
    /// A bit for each attached entry: a turn looks at their rings.
    active: u64,
    /// A bit for each of those whose client is a scheduler.
    schedulers: u64,
    /// This process, to be compared with the processes that clients name as theirs.
    own: ProcessIdentity,
    awaited: Awaited,
    /// The life words that were claimed at the last look around the lobby: a change of one ends a sleep.
    watched: Vec<Watched>,
    /// The lobby's count of claims at that look.
    claims: u32,
    /// The entry at which the next look begins.
    look_from: usize,
    allocator: Allocator,
    listening: Option<Listening>,
    clearing: Option<Clearing>,
    placing: Placing,
    /// A bit for each entry that is parting, and the entry at which the next one is looked for.
    parting: u64,
    part_from: u32,
    /// The job in the background that was done last, as an index into the kinds of jobs.
    job: usize,
    /// The entry that the next turn begins with.
    first: u32,
    scratch: Scratch,
    stop: StopHandle,
    beat_interval_ns: u64,
    spin: SpinBudget,
    next_tick_ns: u64,
    next_locks_ns: u64,
    /// The longest time between two looks at the clock without a sleep between them.
    longest_ns: u64,
    /// The most CPU time between two looks at it.
    longest_cpu_ns: u64,
    next_names_ns: u64,
    /// A self-check failed: nothing is served any more.
    unhealthy: bool,
}

/// Clients of an earlier engine that live and have not come back yet.
struct Awaited {
    /// Bit per entry.
    entries: u64,
    /// The end of the grace: until then nothing is evicted while a client is awaited. Set when serving begins.
    until_ns: u64,
    grace_ns: u64,
}

/// How long the loop spins before it sleeps: the maximum after a short sleep that work has ended, half as long after each other
/// sleep, but at least a sixteenth of the maximum.
///
/// A longer spin would have saved a sleep that soon ends with work, and on both sides: a client that has slept takes
/// some 20 µs to ask again, and if its request always finds the engine asleep, the two put each other to sleep for ever.
struct SpinBudget {
    max_ns: u64,
    now_ns: u64,
}

impl SpinBudget {
    fn new(max_ns: u64) -> SpinBudget {
        SpinBudget { max_ns, now_ns: max_ns }
    }

    /// A sleep ended after `slept_ns`, with work or without.
    fn slept(&mut self, slept_ns: u64, with_work: bool) {
        self.now_ns = if with_work && slept_ns <= 4 * self.max_ns {
            self.max_ns
        } else {
            (self.now_ns / 2).max(self.max_ns / 16)
        };
    }
}

/// The CPU time that the calling thread has had: while the thread, or its virtual CPU, has no core, it stands still.
fn thread_cpu_ns() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec.unsigned_abs() * 1_000_000_000 + time.tv_nsec.unsigned_abs()
}

impl Service {
    pub(crate) fn new(parts: Parts) -> Service {
        let Parts { segments, cache, registry, allocator, inherited, placing, pace, stop } = parts;
        stop.wakes(segments.lobby.clone());
        let awaited =
            Awaited { entries: inherited.living, until_ns: u64::MAX, grace_ns: pace.reattach_grace_ns };
        let outdated = |nonce: Option<u64>| nonce.map_or(Entry::Free, |nonce| Entry::Outdated { nonce });
        let entries = inherited.nonces.into_iter().map(outdated).collect();
        Service {
            cache,
            registry,
            entries,
            active: 0,
            schedulers: 0,
            own: ProcessIdentity::own(),
            awaited,
            watched: Vec::with_capacity(CLIENTS_MAX),
            claims: 0,
            look_from: 0,
            allocator,
            listening: None,
            clearing: None,
            placing,
            parting: 0,
            part_from: 0,
            job: 0,
            first: 0,
            scratch: Scratch::new(),
            stop,
            beat_interval_ns: pace.beat_interval_ns,
            spin: SpinBudget::new(pace.spin_ns),
            next_tick_ns: 0,
            next_locks_ns: 0,
            longest_ns: 0,
            longest_cpu_ns: 0,
            next_names_ns: 0,
            unhealthy: false,
            segments,
        }
    }

    /// Another handle on the engine's segment.
    pub(crate) fn segment(&self) -> EngineSegment {
        self.segments.engine.clone()
    }

    fn stat(&self, stat: Stat, by: u64) {
        stat.of(&self.segments.engine.stats).add(by);
    }

    /// Serves until it is told to stop. Returns the segments, for the end.
    pub(crate) fn run(mut self, ready: impl FnOnce()) -> Segments {
        // The engine is ready with its first slab: ticks take over the others as the allocator finishes them.
        self.take_slabs();
        self.segments.engine.terms().set_share(self.cache.share());
        self.await_clients();
        self.publish_gauges();
        // The recovery has succeeded, if there was one.
        self.segments.engine.info().recoveries.store(0, Ordering::Relaxed);
        failpoint::here(Place::ServingEven);
        self.segments.engine.epoch().begin_serving();
        failpoint::here(Place::ServingBegun);
        futex::wake_all(self.segments.engine.epoch().incarnation_word());
        ready();
        // A loop that does not spin shares one CPU with its clients: each idle turn keeps them from running, so it looks at
        // the clock after each.
        let clock_every = if self.spin.max_ns == 0 { 1 } else { CLOCK_EVERY };
        let mut last_work = monotonic_ns();
        let mut worked = false;
        let (mut turns, mut looked) = (0u32, 0u64);
        let (mut before, mut cpu_before) = (last_work, None);
        while !self.stop.is_requested() {
            if self.turn() {
                worked = true;
            } else {
                spin_loop();
            }
            turns = turns.wrapping_add(1);
            if !turns.is_multiple_of(clock_every) && self.cache.work() - looked < CLOCK_RECORDS {
                continue;
            }
            looked = self.cache.work();
            let now = monotonic_ns();
            let took = now.saturating_sub(before);
            let cpu_now = (took >= LONG_NS).then(thread_cpu_ns);
            if let (Some(before), Some(now)) = (cpu_before, cpu_now) {
                self.longest_cpu_ns = self.longest_cpu_ns.max(now - before);
            }
            self.longest_ns = self.longest_ns.max(took);
            (before, cpu_before) = (now, cpu_now);
            if now >= self.next_tick_ns {
                self.tick(now, worked);
            }
            if core::mem::take(&mut worked) {
                last_work = now;
            }
            if now.saturating_sub(last_work) >= self.spin.now_ns {
                self.park(now);
                last_work = monotonic_ns();
                (before, cpu_before) = (last_work, None);
                self.spin.slept(last_work.saturating_sub(now), self.rings_have_news());
            }
        }
        self.farewell();
        self.allocator.stop();
        self.segments
    }

    /// Does a piece in the background and serves each client once, until [`TURN`] records are spent. True when there was
    /// something to do.
    #[inline]
    fn turn(&mut self) -> bool {
        let mut worked = self.go_on_in_the_background();
        let began = self.cache.work();
        let mut left = self.active.rotate_right(self.first);
        while left != 0 {
            let entry = (left.trailing_zeros() + self.first) % CLIENTS_MAX as u32;
            left &= left - 1;
            worked |= self.serve(entry as usize);
            if self.cache.work() - began >= TURN {
                self.first = (entry + 1) % CLIENTS_MAX as u32;
                break;
            }
        }
        worked
    }

    /// Does a piece of one job in the background (a parting, marked chunks that are dropped, slabs being emptied, restored chunks
    /// that get their places in the eviction order, a clear), each kind in turn. True when there was one.
    #[inline]
    fn go_on_in_the_background(&mut self) -> bool {
        let has_work = self.has_background_work();
        if has_work {
            self.cache.allow(BACKGROUND);
            let is_well = !self.unhealthy;
            let due = [
                self.parting != 0,
                is_well && self.cache.is_dropping(),
                is_well && self.cache.is_emptying(),
                is_well && self.is_placing(),
                is_well && self.is_clearing(),
            ];
            let next = (self.job + 1..).map(|job| job % due.len()).find(|job| due[*job]);
            self.job = next.unwrap_or_default();
            match self.job {
                0 => self.go_on_parting(),
                1 => self.cache.go_on_dropping(),
                2 => {
                    let (entries, schedulers) = (&self.entries, self.schedulers);
                    self.cache.go_on_emptying(&mut || Service::heard(entries, schedulers));
                    self.listen();
                }
                3 => self.go_on_placing(),
                _ => self.go_on_clearing(),
            }
        }
        has_work
    }

    #[inline]
    fn is_clearing(&self) -> bool {
        self.clearing.as_ref().is_some_and(|clearing| !clearing.is_put_off)
    }

    #[inline]
    fn has_background_work(&self) -> bool {
        let drops = || self.cache.is_dropping() || self.is_clearing() || self.cache.is_emptying();
        self.parting != 0 || !self.unhealthy && (drops() || self.is_placing())
    }

    /// Does everything that is due now and then rather than on request.
    fn tick(&mut self, now: u64, busy: bool) {
        self.next_tick_ns = now + TICK_NS;
        self.segments.engine.epoch().bump_beat();
        if now >= self.next_locks_ns {
            self.next_locks_ns = now + LOCKS_NS;
            self.segments.mark_dead_clients();
        }
        self.look_around();
        self.look_at_grace(now);
        self.look_at_unpublished(now);
        if let Some(clearing) = &mut self.clearing {
            clearing.is_put_off = false;
        }
        self.look_at_sorting();
        if self.segments.is_retired() {
            // Somebody removed our segments: new clients cannot find us, and a successor may run already.
            tracing::error!("the segments of this engine were removed (`kvring remove --force`?); stopping");
            self.stop.stop();
        }
        if now >= self.next_names_ns {
            self.next_names_ns = now + NAMES_NS;
            if let Some(segment) = self.segments.lost_name() {
                tracing::error!(
                    segment,
                    "this name in /dev/shm leads to this engine no more (rm?): no client finds it, and another one of its name \
                     may start; stopping"
                );
                self.stop.stop();
            }
        }
        self.take_slabs();
        if !busy && !self.unhealthy {
            self.check();
        }
        self.publish_gauges();
    }

    /// Takes over slabs that the allocator has finished.
    fn take_slabs(&mut self) {
        for _ in 0..SLABS_PER_TICK {
            let Some(slab) = self.allocator.take() else { break };
            // Published before anything lies in the slab: a successor takes over as many slabs as this says.
            self.segments.engine.info().slabs_allocated.store(slab + 1, Ordering::Relaxed);
            if let Err(error) = self.cache.add_slab(slab) {
                tracing::error!(%error, "a slab was handed over twice");
            }
        }
    }

    /// Does a step of the self-check. An engine in which it fails is unhealthy: it lives, but no longer serves.
    fn check(&mut self) {
        if let Err(broken) = self.cache.check_step(CHECK_STEPS) {
            tracing::error!(%broken, "an invariant of the cache is broken; serving stops");
            self.unhealthy = true;
            self.stat(Stat::CheckFailures, 1);
            self.segments.engine.info().unhealthy.store(1, Ordering::Relaxed);
            // The incarnation becomes odd: every client sees that with its next call, and goes on without this engine.
            self.segments.engine.epoch().begin_recovery();
            futex::wake_all(self.segments.engine.epoch().incarnation_word());
        }
    }

    /// Sleeps until somebody rings the doorbell, a client dies, or the beat is due.
    fn park(&mut self, now: u64) {
        let doorbell = self.segments.lobby.doorbell();
        let ticket = park::announce(doorbell);
        // From here on a client that publishes something also rings the doorbell. So one more look, then sleep.
        let work = self.lobby_has_news()
            || self.rings_have_news()
            || self.has_background_work()
            || self.allocator.has_news()
            || self.stop.is_requested();
        if !work {
            self.stat(Stat::Parks, 1);
            let deadline = Deadline(now + self.beat_interval_ns);
            if self.watched.len() < SLEEP_FEW {
                self.sleep::<SLEEP_FEW>(ticket, deadline);
            } else {
                self.sleep::<{ CLIENTS_MAX + 1 }>(ticket, deadline);
            }
        }
        park::retract(self.segments.lobby.doorbell(), ticket);
        if self.lobby_has_news() {
            self.look_around();
        }
    }

    /// Sleeps on the doorbell and the watched life words, of which there are fewer than `N`.
    fn sleep<const N: usize>(&self, ticket: park::Ticket, deadline: Deadline) {
        let lobby = &self.segments.lobby;
        let mut words = [ticket.word(lobby.doorbell()); N];
        for (place, watched) in words[1..].iter_mut().zip(&self.watched) {
            *place = (lobby.life_words[watched.entry].futex(), watched.raw);
        }
        // A kernel that can wait on one word only waits on the doorbell; the tick at the deadline looks at the others. So that
        // costs no wake-up more.
        futex::wait_any_sliced(&words[..=self.watched.len()], deadline, Duration::MAX);
    }

    fn rings_have_news(&self) -> bool {
        let mut left = self.active;
        while left != 0 {
            let entry = left.trailing_zeros() as usize;
            left &= left - 1;
            if self.entries[entry].connection().is_some_and(Connection::has_news) {
                return true;
            }
        }
        false
    }

    /// A clean end: the incarnation becomes odd, which tells every client, and those that sleep on it are woken.
    fn farewell(&mut self) {
        tracing::info!("stopping");
        let epoch = self.segments.engine.epoch();
        epoch.begin_recovery();
        futex::wake_all(epoch.incarnation_word());
    }
}
