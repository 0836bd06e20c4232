//! The service thread allocates nothing from the heap for an operation. The allocator of this test counts the calls of one
//! thread, the engine runs on that thread, and clients in other processes send every kind of request.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_engine::byte_size::ByteSize;
use kvring_engine::config::EngineConfig;
use kvring_engine::{Engine, StopHandle};
use kvring_shm_abi::lobby::Role;
use kvring_shm_abi::message::{Request, Status};
use kvring_shm_abi::sync::{AtomicU64, Ordering};
use kvring_tests::engine::view_of;
use kvring_tests::{
    Peer, RawClient, SchedulerSpec, Shape, Sweep, WorkerSpec, all_loaded, chain, eventually, round, stat_of,
    unique_name,
};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::mpsc;

thread_local! {
    /// Set on the service thread. Const and without a destructor: it does not allocate itself.
    static COUNTED: Cell<bool> = const { Cell::new(false) };
}

/// Allocations, reallocations and frees of the service thread.
static COUNT: AtomicU64 = AtomicU64::new(0);

struct Counting;

fn count() {
    if COUNTED.with(Cell::get) {
        COUNT.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: the system's allocator, and a number beside it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count();
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as the caller promises.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Everything that attached clients do: stores that evict, hits, misses, holes, leases and their ends, aborts, repeats,
/// clears, and requests that are refused.
struct Mix {
    worker: Peer,
    scheduler: Peer,
    raw_worker: RawClient,
    raw_scheduler: RawClient,
    namespace: u32,
}

impl Mix {
    fn start(engine: &str) -> Mix {
        let mut raw_worker = RawClient::attach(engine, Role::Worker);
        let namespace = raw_worker.register(1, 1, 0, Shape::SMALL.shard_bytes());
        Mix {
            worker: Peer::worker(&WorkerSpec::new(engine)),
            scheduler: Peer::scheduler(&SchedulerSpec::new(engine)),
            raw_worker,
            raw_scheduler: RawClient::attach(engine, Role::Scheduler),
            namespace,
        }
    }

    fn turn(&mut self, number: u32) {
        let keys = chain(u64::from(number), 24);
        let request = format!("r{number}");
        assert_eq!(self.worker.store(round(number), &keys, 0).dropped, 0);
        assert_eq!(self.worker.store(round(number), &keys, 0).skipped, 24);
        let found = self.scheduler.lookup(&request, 0, &keys);
        assert_eq!(found.chunks, 24);
        assert_eq!(self.worker.load(&found.handles, 0), all_loaded(24));
        assert_eq!(self.scheduler.lookup(&request, 1, &chain(u64::from(number) + 1_000_000, 8)).chunks, 0);
        self.scheduler.release(&request, 0, 5);
        self.scheduler.lookup(&request, 2, &keys);
        self.scheduler.end_session(&request);

        let worker = &mut self.raw_worker;
        let aborted =
            worker.reserve(self.namespace, 0, round(number), &chain(u64::from(number) + 2_000_000, 40));
        worker.finish(&aborted[..20], false);
        worker.finish(&aborted[20..], true);
        worker.finish(&aborted, true);
        let scheduler = &mut self.raw_scheduler;
        for admission in 0..20 {
            let hold = scheduler.hold_found(u64::from(number), admission, self.namespace, &keys);
            scheduler.call(hold);
        }
        scheduler.call(Request::EndSession { session: u64::from(number) });
        let unknown = scheduler.hold_found(1, 1, 60, &keys);
        assert_eq!(scheduler.call(unknown).status, Status::UnknownNamespace);
        scheduler.call(Request::Noop);
        if number.is_multiple_of(16) {
            scheduler.call(Request::Clear { namespace: self.namespace });
        }
    }
}

#[test]
fn the_service_thread_allocates_nothing_for_an_operation() {
    let name = unique_name("alloc");
    let _sweep = Sweep(name.clone());
    let mebi = |count: u64| Some(ByteSize(count << 20));
    let (serving, served) = mpsc::channel();
    for policy in ["lru", "arc"] {
        let config = EngineConfig {
            name: name.clone(),
            arena: mebi(8),
            slab: mebi(1),
            policy: policy.parse().unwrap(),
            ..EngineConfig::default()
        };
        let serving = serving.clone();
        let service = std::thread::spawn(move || {
            let stop = StopHandle::default();
            let engine = Engine::create(&config, &stop).unwrap();
            engine.run(|| {
                serving.send(stop).unwrap();
                COUNTED.with(|counted| counted.set(true));
            });
        });
        let stop = served.recv().unwrap();
        let mut mix = Mix::start(&name);
        // Warm: every table has been used, the arena has been full several times.
        for number in 0..40 {
            mix.turn(number);
        }
        let view = view_of(&name);
        let requests = || stat_of(&view, "requests");
        let (before, asked) = (COUNT.load(Ordering::Relaxed), requests());
        for number in 40..140 {
            mix.turn(number);
        }
        eventually("the engine has counted", || requests() >= asked + 100 * 25);
        // Ticks, parks and self-checks in between count as well.
        let beat = view.segment.epoch().beat();
        eventually("the engine idles", || view.segment.epoch().beat().wrapping_sub(beat) > 20);
        let allocated = COUNT.load(Ordering::Relaxed) - before;
        assert_eq!(
            allocated,
            0,
            "{policy}: heap calls of the service thread in {} requests",
            requests() - asked
        );
        assert!(stat_of(&view, "evictions") > 1000);
        // The control: an attachment allocates, and is counted.
        drop(Peer::scheduler(&SchedulerSpec::new(&name)));
        eventually("something is counted", || COUNT.load(Ordering::Relaxed) > before);
        drop(mix);
        stop.stop();
        service.join().unwrap();
    }
}
