//! Lookups without the engine: a scheduler that holds what it has found races with an engine that wants its room.
//!
//! The models run the code of `shm_abi`, the rings among it, with these exceptions: the word `evicting` of `ReaderTerms` is a
//! stand-in ([`Evicting`]), because the engine's segment does not exist in models; so is the count of answers ([`Room`]); and
//! what a client's threads share under its lock ([`Ledger`], [`Links`]), and the engine's decision, are sketches of what other
//! crates do. All threads of a model are spawned ones: what loom's own thread does is not tried in all orders.

use crate::harness::{fails, holds};
use crate::ring::cells;
use kvring_shm_abi::chunk::{ChunkIdentity, ChunkRecord, LINES_MAX};
use kvring_shm_abi::lookup::{self, Marked, Unpublished};
use kvring_shm_abi::ring::{Body, Consumer, DEPTH, Producer};
use kvring_shm_abi::sync::{AtomicU32, Ordering};
use loom::thread;
use std::collections::BTreeSet;
use std::fmt::Debug;
use std::sync::{Arc, Mutex};

const NAMESPACE: u32 = 1;
const WANTED: ChunkIdentity = ChunkIdentity { key: [1, 1], namespace: NAMESPACE };
const OTHER: ChunkIdentity = ChunkIdentity { key: [2, 1], namespace: NAMESPACE };
const PLACE: [u32; LINES_MAX] = [11, 0, 0, 0];

/// What a model says when the engine has ended a chunk that a scheduler has kept in its answer.
const EVICTED: &str = "evicted though it is held";

/// The record of a visible chunk, in generation 0.
fn visible(identity: ChunkIdentity) -> Arc<ChunkRecord> {
    let record = Arc::new(ChunkRecord::new());
    record.fill(identity, PLACE);
    record.show();
    record
}

/// The fences of a model, in their one order. Loom tries another order of two steps only if they access the same thing, and a fence
/// accesses nothing: without the counter it would not try each order of two fences.
struct Fences(AtomicU32);

impl Fences {
    fn new() -> Arc<Fences> {
        Arc::new(Fences(AtomicU32::new(0)))
    }

    /// The protocol's own fence. Returns how many fences came before it: loom runs nothing between the two.
    fn fence(&self) -> u32 {
        self.fence_if(true)
    }

    /// The same, or the place alone where the protocol should have one.
    fn fence_if(&self, fences: bool) -> u32 {
        // Relaxed, and before the fence: it orders nothing that the fence does not order.
        let before = self.0.fetch_add(1, Ordering::Relaxed);
        if fences {
            lookup::fence();
        }
        before
    }
}

/// The first look at a chunk, as a reader takes it whose engine lives.
fn find(record: &ChunkRecord) -> Option<u64> {
    record.find(NAMESPACE, WANTED.key, Marked::Missing)
}

fn still(record: &ChunkRecord, generation: u64) -> bool {
    record.still(generation, Marked::Missing)
}

/// More preemptions than an execution of two threads has. Loom without any bound is no substitute: it goes back to fewer places,
/// and some of the outcomes that are expected below never come.
const ALL: Option<usize> = Some(50);

/// For models of three threads.
const SOME: Option<usize> = Some(3);

/// Two threads, to their ends.
fn race<A: 'static, B: 'static>(
    one: impl FnOnce() -> A + Send + 'static,
    other: impl FnOnce() -> B + Send + 'static,
) -> (A, B) {
    let (one, other) = (thread::spawn(one), thread::spawn(other));
    (one.join().unwrap(), other.join().unwrap())
}

/// Explores `model`, which must hold, and must come to all of these outcomes: otherwise it would hold for want of a race.
fn holds_with<T: Ord + Copy + Debug + Send + 'static>(
    name: &str,
    preemptions: Option<usize>,
    expected: &[T],
    model: impl Fn() -> T + Send + Sync + 'static,
) {
    let seen = Arc::new(Mutex::new(BTreeSet::new()));
    let all = seen.clone();
    holds(name, preemptions, move || {
        let outcome = model();
        all.lock().unwrap().insert(outcome);
    });
    let seen: Vec<T> = seen.lock().unwrap().iter().copied().collect();
    assert_eq!(seen, expected, "{name}: the outcomes");
}

fn caught<T>(name: &str, reason: &str, model: impl Fn() -> T + Send + Sync + 'static) {
    fails(name, reason, SOME, move || {
        model();
    });
}

/// How a scheduler looks at a record that goes from one chunk to another, and which one it wants.
#[derive(Clone, Copy)]
struct Looks {
    /// The generation in which the record has the wanted chunk, 0 or 1.
    wanted_in: u64,
    fences: bool,
    fill: fn(&ChunkRecord, ChunkIdentity, [u32; LINES_MAX]),
}

const LOOKS: Looks = Looks { wanted_in: 1, fences: true, fill: ChunkRecord::fill };

/// The two looks against the record's next life: the key and the namespace belong to the generation that they accept.
fn found_in_one_life(how: Looks) -> Option<u64> {
    let (before, after) = if how.wanted_in == 0 { (WANTED, OTHER) } else { (OTHER, WANTED) };
    let (record, fences) = (visible(before), Fences::new());
    let engines = record.clone();
    let engine = move || {
        engines.end();
        (how.fill)(&engines, after, PLACE);
        engines.show();
    };
    let scheduler = move || {
        let generation = find(&record)?;
        fences.fence_if(how.fences);
        still(&record, generation).then_some(generation)
    };
    let (found, ()) = race(scheduler, engine);
    assert!(found.is_none_or(|generation| generation == how.wanted_in), "the key of another life");
    found
}

#[test]
fn what_is_found_is_of_one_life() {
    for wanted_in in [0, 1] {
        holds_with("hold, one life", ALL, &[None, Some(wanted_in)], move || {
            found_in_one_life(Looks { wanted_in, ..LOOKS })
        });
    }
}

#[test]
fn control_found_without_fence_is_caught() {
    caught("hold, one life, no fence in the scheduler", "the key of another life", || {
        found_in_one_life(Looks { fences: false, ..LOOKS })
    });
}

#[test]
fn control_filled_without_fence_is_caught() {
    caught("hold, one life, no fence where the record is filled", "the key of another life", || {
        found_in_one_life(Looks { fill: ChunkRecord::fill_broken, ..LOOKS })
    });
}

/// The protocol between one message of a scheduler and one batch of an engine, and ways to break it, one at a time.
#[derive(Clone, Copy)]
struct Habits {
    /// How many chunks there are. The scheduler wants all of them.
    chunks: usize,
    scheduler_fences: bool,
    engine_fences: bool,
    /// How many of the chunks, from the first one on, the engine marks only after it has looked at the ring.
    marked_late: usize,
    /// What is held is visible again: an eviction. Otherwise it stays hidden until it is released: `clear`.
    spares: bool,
}

const EVICTION: Habits =
    Habits { chunks: 1, scheduler_fences: true, engine_fences: true, marked_late: 0, spares: true };
const CLEAR: Habits = Habits { chunks: 2, spares: false, ..EVICTION };

/// How many chunks, from the first one on, the scheduler has kept, and how many the engine has not ended.
fn hold_against_a_batch(how: Habits) -> (usize, usize) {
    let records: Vec<_> = (0..how.chunks).map(|_| visible(WANTED)).collect();
    let (fences, ring) = (Fences::new(), cells());
    let (mut producer, mut consumer) = (Producer::new(ring.clone()), Consumer::new(ring));
    let (engines, engines_fences) = (records.clone(), fences.clone());
    let scheduler = move || {
        let found: Vec<u64> = records.iter().map_while(|record| find(record)).collect();
        if found.is_empty() {
            return 0;
        }
        // The Hold. Its chunks would lie in the payload area, which this Release publishes too.
        producer.push(&Body { head: found.len() as u32, ..Body::default() });
        fences.fence_if(how.scheduler_fences);
        records.iter().zip(found).take_while(|(record, generation)| still(record, *generation)).count()
    };
    let engine = move || {
        let (late, early) = engines.split_at(how.marked_late);
        early.iter().for_each(|record| record.mark());
        engines_fences.fence_if(how.engine_fences);
        let held = consumer.pop().unwrap().map_or(0, |hold| hold.head as usize);
        late.iter().for_each(|record| record.mark());
        let (held_ones, others) = engines.split_at(held);
        if how.spares {
            held_ones.iter().for_each(|record| record.show());
        }
        others.iter().for_each(|record| record.end());
        held
    };
    let (kept, stayed) = race(scheduler, engine);
    assert!(kept <= stayed, "{EVICTED}: {kept} kept, {stayed} not ended");
    (kept, stayed)
}

#[test]
fn what_is_held_is_not_evicted() {
    holds_with("hold, eviction", ALL, &[(0, 0), (0, 1), (1, 1)], || hold_against_a_batch(EVICTION));
}

#[test]
fn control_no_fence_in_the_scheduler_is_caught() {
    caught("hold, eviction, no fence in the scheduler", EVICTED, || {
        hold_against_a_batch(Habits { scheduler_fences: false, ..EVICTION })
    });
}

#[test]
fn control_no_fence_in_the_engine_is_caught() {
    caught("hold, eviction, no fence in the engine", EVICTED, || {
        hold_against_a_batch(Habits { engine_fences: false, ..EVICTION })
    });
}

#[test]
fn control_ring_read_before_the_mark_is_caught() {
    caught("hold, eviction, ring read before the mark", EVICTED, || {
        hold_against_a_batch(Habits { marked_late: 1, ..EVICTION })
    });
}

/// The same two halves. The second chunk is never kept without the first, and one pair of fences does for both.
#[test]
fn what_is_held_is_not_cleared() {
    // The scheduler finds none, one or both; what it keeps of them depends on the marks that it sees.
    let expected = [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)];
    holds_with("hold, clear", ALL, &expected, || hold_against_a_batch(CLEAR));
}

#[test]
fn control_no_fence_in_the_scheduler_against_clear_is_caught() {
    caught("hold, clear, no fence in the scheduler", EVICTED, || {
        hold_against_a_batch(Habits { scheduler_fences: false, ..CLEAR })
    });
}

#[test]
fn control_no_fence_in_the_engine_that_clears_is_caught() {
    caught("hold, clear, no fence in the engine", EVICTED, || {
        hold_against_a_batch(Habits { engine_fences: false, ..CLEAR })
    });
}

#[test]
fn control_ring_read_between_two_marks_is_caught() {
    caught("hold, clear, ring read between two marks", EVICTED, || {
        hold_against_a_batch(Habits { marked_late: 1, ..CLEAR })
    });
}

/// A scheduler whose ring has no room at first, and ways to break that protocol, one at a time.
#[derive(Clone, Copy)]
struct Words {
    /// The scheduler sets `unpublished` between its fence and its second look.
    sets_late: bool,
    /// The scheduler clears `unpublished` before it publishes.
    clears_first: bool,
    /// The engine reads `unpublished` before its fence.
    reads_early: bool,
    /// The engine looks at the ring before it reads `unpublished`.
    ring_first: bool,
}

const WORDS: Words = Words { sets_late: false, clears_first: false, reads_early: false, ring_first: false };

/// Whether the scheduler has kept the chunk, and whether the engine has not ended it.
fn unpublished_against_a_batch(how: Words) -> (bool, bool) {
    let record = visible(WANTED);
    let (unpublished, fences) = (Arc::new(Unpublished::new()), Fences::new());
    let ring = cells();
    let (mut producer, mut consumer) = (Producer::new(ring.clone()), Consumer::new(ring));
    let (engines, word, engines_fences) = (record.clone(), unpublished.clone(), fences.clone());
    let scheduler = move || {
        let Some(generation) = find(&record) else { return false };
        if !how.sets_late {
            unpublished.set();
        }
        fences.fence();
        if how.sets_late {
            unpublished.set();
        }
        let kept = still(&record, generation);
        // Later there is room. Whatever it has kept, the Hold is published: a Release behind it would cut it.
        if how.clears_first {
            unpublished.clear();
        }
        producer.push(&Body::default());
        if !how.clears_first {
            unpublished.clear();
        }
        kept
    };
    let engine = move || {
        engines.mark();
        let early = how.reads_early.then(|| word.is_set());
        engines_fences.fence();
        let stays = if how.ring_first {
            consumer.pop().unwrap().is_some() || word.is_set()
        } else {
            early.unwrap_or_else(|| word.is_set()) || consumer.pop().unwrap().is_some()
        };
        if stays {
            engines.show();
        } else {
            engines.end();
        }
        stays
    };
    let (kept, stayed) = race(scheduler, engine);
    assert!(!kept || stayed, "{EVICTED}");
    (kept, stayed)
}

#[test]
fn what_is_held_but_unpublished_is_not_evicted() {
    let expected = [(false, false), (false, true), (true, true)];
    holds_with("hold, unpublished", ALL, &expected, || unpublished_against_a_batch(WORDS));
}

#[test]
fn control_unpublished_set_after_the_fence_is_caught() {
    caught("hold, unpublished set after the fence", EVICTED, || {
        unpublished_against_a_batch(Words { sets_late: true, ..WORDS })
    });
}

#[test]
fn control_unpublished_cleared_before_the_push_is_caught() {
    caught("hold, unpublished cleared before the push", EVICTED, || {
        unpublished_against_a_batch(Words { clears_first: true, ..WORDS })
    });
}

#[test]
fn control_unpublished_read_before_the_fence_is_caught() {
    caught("hold, unpublished read before the fence", EVICTED, || {
        unpublished_against_a_batch(Words { reads_early: true, ..WORDS })
    });
}

/// The engine sees an empty ring; the scheduler publishes and clears the word; the engine sees the word cleared.
#[test]
fn control_ring_looked_at_before_unpublished_is_caught() {
    caught("hold, ring looked at before unpublished", EVICTED, || {
        unpublished_against_a_batch(Words { ring_first: true, ..WORDS })
    });
}

/// How many messages the engine has taken from a ring: a stand-in for the completions that give the scheduler room again, with
/// the orderings of `Producer::push` and `Consumer::pop`.
struct Room(AtomicU32);

impl Room {
    fn give(&self, taken: u32) {
        // SYNC POINT: Release; pairs with the Acquire in `taken`.
        self.0.store(taken, Ordering::Release);
    }

    fn taken(&self) -> u32 {
        // SYNC POINT: Acquire; pairs with the Release in `give`: whoever knows of the room may use the cell again.
        self.0.load(Ordering::Acquire)
    }
}

/// What stands for a Hold in a ring that has other messages too.
const HOLD: u32 = 7;

/// A ring that is full when the scheduler comes. The engine need not see it empty: it may end its look when it has taken as many
/// messages as the ring is deep. It counts from where it has read `unpublished`, and not from its fence: it may take messages
/// in between, as it does here, and in the room of those comes what was unpublished at the fence. That lies behind [`DEPTH`]
/// other messages then.
fn full_ring_against_a_batch(counts_from_the_fence: bool) -> (bool, bool) {
    let record = visible(WANTED);
    let unpublished = Arc::new(Unpublished::new());
    let (room, fences) = (Arc::new(Room(AtomicU32::new(0))), Fences::new());
    let ring = cells();
    let (mut producer, mut consumer) = (Producer::new(ring.clone()), Consumer::new(ring));
    (0..DEPTH).for_each(|_| producer.push(&Body::default()));
    let (engines, word) = (record.clone(), unpublished.clone());
    let (engines_room, engines_fences) = (room.clone(), fences.clone());
    let scheduler = move || {
        let Some(generation) = find(&record) else { return false };
        unpublished.set();
        fences.fence();
        let kept = still(&record, generation);
        if room.taken() > 0 {
            producer.push(&Body { head: HOLD, ..Body::default() });
            unpublished.clear();
        }
        kept
    };
    let engine = move || {
        let mut taken = 0;
        let mut take = |most: usize| {
            for _ in 0..most {
                let Some(message) = consumer.pop().unwrap() else { return false };
                if message.head == HOLD {
                    return true;
                }
                taken += 1;
                engines_room.give(taken);
            }
            false
        };
        engines.mark();
        engines_fences.fence();
        // In the course of its work, before it comes to this scheduler's turn in the pass.
        let mut stays = take(1);
        let most = if counts_from_the_fence { DEPTH - 1 } else { DEPTH };
        stays |= word.is_set() || take(most);
        if stays {
            engines.show();
        } else {
            engines.end();
        }
        stays
    };
    let (kept, stayed) = race(scheduler, engine);
    assert!(!kept || stayed, "{EVICTED}");
    (kept, stayed)
}

#[test]
fn a_ring_has_passed_when_its_depth_was_taken_since_unpublished_was_read() {
    let expected = [(false, false), (false, true), (true, true)];
    holds_with("hold, full ring", ALL, &expected, || full_ring_against_a_batch(false));
}

#[test]
fn control_messages_counted_since_the_fence_are_caught() {
    caught("hold, full ring, counted since the fence", EVICTED, || full_ring_against_a_batch(true));
}

/// Two threads of one scheduler, and ways to break what they do, one at a time.
#[derive(Clone, Copy)]
struct Threads {
    /// The thread that has found the chunk sets `unpublished` before it has the lock under which it enters the hold.
    sets_before_it_enters: bool,
    /// The thread that publishes clears `unpublished` after it has let go of the lock.
    clears_without_lock: bool,
}

const THREADS: Threads = Threads { sets_before_it_enters: false, clears_without_lock: false };

/// What the ledger's lock guards: the ring, and the holds that have been entered and not published.
struct Ledger {
    producer: Producer,
    entered: u32,
}

/// One thread finds a chunk and has no room for its Hold, another thread publishes what there is: whether the first has kept the
/// chunk, and whether the engine has not ended it.
fn published_by_another_thread(how: Threads) -> (bool, bool) {
    let record = visible(WANTED);
    let (unpublished, fences) = (Arc::new(Unpublished::new()), Fences::new());
    let ring = cells();
    let mut consumer = Consumer::new(ring.clone());
    let ledger = Arc::new(loom::sync::Mutex::new(Ledger { producer: Producer::new(ring), entered: 0 }));
    let (engines, engines_word, engines_fences) = (record.clone(), unpublished.clone(), fences.clone());
    let engine = thread::spawn(move || {
        engines.mark();
        engines_fences.fence();
        let stays = engines_word.is_set() || consumer.pop().unwrap().is_some();
        if stays {
            engines.show();
        } else {
            engines.end();
        }
        stays
    });
    let (word, entered) = (unpublished.clone(), ledger.clone());
    let publisher = thread::spawn(move || {
        let mut ledger = ledger.lock().unwrap();
        if std::mem::take(&mut ledger.entered) > 0 {
            ledger.producer.push(&Body::default());
        }
        if how.clears_without_lock {
            drop(ledger);
            unpublished.clear();
        } else {
            unpublished.clear();
        }
    });
    let finder = thread::spawn(move || {
        let Some(generation) = find(&record) else { return false };
        if how.sets_before_it_enters {
            word.set();
        }
        let mut ledger = entered.lock().unwrap();
        ledger.entered += 1;
        if !how.sets_before_it_enters {
            word.set();
        }
        drop(ledger);
        fences.fence();
        still(&record, generation)
    });
    publisher.join().unwrap();
    let (kept, stayed) = (finder.join().unwrap(), engine.join().unwrap());
    assert!(!kept || stayed, "{EVICTED}");
    (kept, stayed)
}

#[test]
fn what_another_thread_publishes_is_not_evicted() {
    let expected = [(false, false), (false, true), (true, true)];
    holds_with("hold, two threads", SOME, &expected, || published_by_another_thread(THREADS));
}

/// The other thread finds nothing to publish, and clears what is set for a hold that is entered only now.
#[test]
fn control_unpublished_set_before_the_hold_is_entered_is_caught() {
    caught("hold, two threads, unpublished set without the lock", EVICTED, || {
        published_by_another_thread(Threads { sets_before_it_enters: true, ..THREADS })
    });
}

#[test]
fn control_unpublished_cleared_without_the_lock_is_caught() {
    caught("hold, two threads, unpublished cleared without the lock", EVICTED, || {
        published_by_another_thread(Threads { clears_without_lock: true, ..THREADS })
    });
}

/// The word `evicting` of `ReaderTerms`, with the orderings of its `set_evicting` and `is_evicted_without`.
struct Evicting(AtomicU32);

impl Evicting {
    fn set(&self, incarnation: u32) {
        self.0.store(incarnation, Ordering::Relaxed);
    }

    fn is_evicted_without(&self, incarnation: u32) -> bool {
        (self.0.load(Ordering::Relaxed).wrapping_sub(incarnation) as i32) > 0
    }
}

/// The incarnation of the dead engine that the reader is attached to, and of its successor, which does not read its ring.
const DEAD: u32 = 2;
const NEXT: u32 = 4;

/// When the successor stores `evicting`.
#[derive(Clone, Copy, PartialEq)]
enum Store {
    /// Before a fence, which comes before the first mark. This is right.
    BeforeTheFence,
    /// Before the first mark, without a fence between the two.
    BeforeTheMark,
    /// After the first mark, and before the fence that comes after the marks.
    AfterTheMark,
    /// After the fence that comes after the marks.
    AfterTheMarksFence,
}

/// How the reader comes to its answer.
#[derive(Clone, Copy)]
struct Reader {
    marked: Marked,
    fences: bool,
    /// It reads `evicting` before its fence.
    reads_early: bool,
}

/// The reader's engine is dead, so a chunk that is marked is there for it.
const READER: Reader = Reader { marked: Marked::There, fences: true, reads_early: false };

/// What has come of a reader that has found a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Answer {
    /// Its fence is later than the engine's first one after the store of `evicting`, or after the mark if that came first.
    later: bool,
    /// Its first look has seen the engine's mark.
    saw_mark: bool,
    /// It has kept the chunk.
    kept: bool,
}

/// A reader that has no ring at an engine that begins to evict.
///
/// That engine does not look at the reader, so it may end any chunk that the reader keeps: what such a reader holds is lost when
/// the grace is over, whether it has found it long ago or just now. So nothing can be said of the chunk itself. What is asserted
/// is where "now" ends. A reader answers 0
///
/// * if its fence is later than the engine's first fence after the store of `evicting`. So does any that begins after that fence.
/// * if its first look has seen a mark of this engine. It would take that for one of the dead engine's, which evicts nothing.
///
/// The first needs one fence after the store, before or after the first mark. The second needs it before the first mark: the mark
/// is relaxed, and only a fence before it makes a reader that has seen the mark see `evicting` too.
///
/// A mark that is seen by the *second* look alone is not of that kind: the chunk was visible when the reader found it, the
/// reader's fence was the earlier one, and it might as well have had its answer before there was a mark.
fn reader_without_a_ring(store: Store, how: Reader) -> Option<Answer> {
    let (record, fences) = (visible(WANTED), Fences::new());
    let evicting = Arc::new(Evicting(AtomicU32::new(DEAD)));
    let (engines, engines_fences, terms) = (record.clone(), fences.clone(), evicting.clone());
    let engine = move || {
        if matches!(store, Store::BeforeTheFence | Store::BeforeTheMark) {
            evicting.set(NEXT);
        }
        let before_the_mark = (store == Store::BeforeTheFence).then(|| engines_fences.fence());
        engines.mark();
        if store == Store::AfterTheMark {
            evicting.set(NEXT);
        }
        let after_the_mark = engines_fences.fence();
        if store == Store::AfterTheMarksFence {
            evicting.set(NEXT);
        }
        engines.end();
        before_the_mark.unwrap_or(after_the_mark)
    };
    let reader = move || {
        let (generation, saw_mark) = match record.find(NAMESPACE, WANTED.key, Marked::Missing) {
            Some(generation) => (generation, false),
            // It is marked, or is not there at all.
            None => (record.find(NAMESPACE, WANTED.key, how.marked)?, true),
        };
        let early = how.reads_early.then(|| terms.is_evicted_without(DEAD));
        let fence = fences.fence_if(how.fences);
        let kept =
            record.still(generation, how.marked) && !early.unwrap_or_else(|| terms.is_evicted_without(DEAD));
        Some((fence, saw_mark, kept))
    };
    let (found, engines_fence) = race(reader, engine);
    let (fence, saw_mark, kept) = found?;
    let later = fence > engines_fence;
    assert!(!kept || !later, "kept after the engine's fence");
    assert!(!kept || !saw_mark, "kept though it saw the mark");
    Some(Answer { later, saw_mark, kept })
}

/// What a reader that has not seen the mark may come to.
const UNMARKED: [Option<Answer>; 4] = [
    None,
    Some(Answer { later: false, saw_mark: false, kept: false }),
    Some(Answer { later: false, saw_mark: false, kept: true }),
    Some(Answer { later: true, saw_mark: false, kept: false }),
];

#[test]
fn a_reader_without_a_ring_answers_nothing_once_an_engine_evicts() {
    let marked = Some(Answer { later: true, saw_mark: true, kept: false });
    let expected = [&UNMARKED[..], &[marked]].concat();
    holds_with("hold, no ring", ALL, &expected, || reader_without_a_ring(Store::BeforeTheFence, READER));
}

/// The same for a reader that takes no marked chunk at all. For it `evicting` matters as long as the chunk has no mark.
#[test]
fn a_reader_that_has_not_seen_its_engine_die_answers_nothing_either() {
    holds_with("hold, no ring, nothing that is marked", ALL, &UNMARKED, || {
        reader_without_a_ring(Store::BeforeTheFence, Reader { marked: Marked::Missing, ..READER })
    });
}

const LATE: &str = "kept after the engine's fence";
const MARK_SEEN: &str = "kept though it saw the mark";

#[test]
fn control_evicting_stored_after_the_marks_is_caught() {
    caught("hold, no ring, evicting stored after the marks' fence", LATE, || {
        reader_without_a_ring(Store::AfterTheMarksFence, READER)
    });
}

#[test]
fn control_evicting_stored_after_the_first_mark_is_caught() {
    caught("hold, no ring, evicting stored after the first mark", MARK_SEEN, || {
        reader_without_a_ring(Store::AfterTheMark, READER)
    });
}

#[test]
fn control_no_fence_between_evicting_and_the_first_mark_is_caught() {
    caught("hold, no ring, no fence before the first mark", MARK_SEEN, || {
        reader_without_a_ring(Store::BeforeTheMark, READER)
    });
}

#[test]
fn control_no_fence_in_a_reader_without_a_ring_is_caught() {
    caught("hold, no ring, no fence in the reader", LATE, || {
        reader_without_a_ring(Store::BeforeTheFence, Reader { fences: false, ..READER })
    });
}

#[test]
fn control_evicting_read_before_the_fence_is_caught() {
    caught("hold, no ring, evicting read before the fence", LATE, || {
        reader_without_a_ring(Store::BeforeTheFence, Reader { reads_early: true, ..READER })
    });
}

/// A scheduler that goes from the dead engine to its successor while one of its threads looks something up, and ways to break
/// that, one at a time.
#[derive(Clone, Copy)]
struct Switch {
    /// The second look takes marks as the first one did, although the scheduler has switched in between.
    keeps_its_view: bool,
    /// The hold is left to the keeper, because it was to be declared when the lookup began.
    keeps_its_link: bool,
    /// The keeper declares what there is, lets go of the lock, and only then ends the declaration and switches.
    in_two_steps: bool,
}

const SWITCH: Switch = Switch { keeps_its_view: false, keeps_its_link: false, in_two_steps: false };

/// What stands for a DeclareEnd.
const DECLARE_END: u32 = 8;

/// What the lock guards when a scheduler switches: its ring at the successor, the holds that are to be declared there, and the
/// engine that it is attached to.
struct Links {
    producer: Producer,
    undeclared: u32,
    attached: u32,
}

impl Links {
    fn declare(&mut self) {
        if std::mem::take(&mut self.undeclared) > 0 {
            self.producer.push(&Body { head: HOLD, ..Body::default() });
        }
    }

    fn switch(&mut self) {
        self.producer.push(&Body { head: DECLARE_END, ..Body::default() });
        self.attached = NEXT;
    }
}

/// A mark is the dead engine's as long as the scheduler is attached to that.
fn view(attached: u32) -> Marked {
    if attached == DEAD { Marked::There } else { Marked::Missing }
}

/// A lookup, the keeper and the successor, which does not evict before all have declared: whether the lookup has kept the chunk,
/// and whether the engine has not ended it. Here the grace is never over, so what is kept must stay.
fn found_during_a_switch(how: Switch) -> (bool, bool) {
    let (record, fences) = (visible(WANTED), Fences::new());
    let evicting = Arc::new(Evicting(AtomicU32::new(DEAD)));
    let ring = cells();
    let mut consumer = Consumer::new(ring.clone());
    let links = Links { producer: Producer::new(ring), undeclared: 0, attached: DEAD };
    let links = Arc::new(loom::sync::Mutex::new(links));
    let (engines, engines_fences, terms) = (record.clone(), fences.clone(), evicting.clone());
    let engine = thread::spawn(move || {
        let (mut is_held, mut is_declared) = (false, false);
        while let Some(message) = consumer.pop().unwrap() {
            is_held |= message.head == HOLD;
            is_declared |= message.head == DECLARE_END;
        }
        if !is_declared || is_held {
            return true;
        }
        evicting.set(NEXT);
        engines_fences.fence();
        engines.mark();
        engines_fences.fence();
        let stays = consumer.pop().unwrap().is_some();
        if stays {
            engines.show();
        } else {
            engines.end();
        }
        stays
    });
    let keepers = links.clone();
    let keeper = thread::spawn(move || {
        let mut links = keepers.lock().unwrap();
        links.declare();
        if how.in_two_steps {
            drop(links);
            links = keepers.lock().unwrap();
        }
        links.switch();
    });
    // It begins while the scheduler is attached to the dead engine, so a mark is none for it.
    let lookup = thread::spawn(move || {
        let Some(generation) = record.find(NAMESPACE, WANTED.key, view(DEAD)) else { return false };
        let mut links = links.lock().unwrap();
        let attached = links.attached;
        if attached == DEAD || how.keeps_its_link {
            links.undeclared += 1;
        } else {
            links.producer.push(&Body { head: HOLD, ..Body::default() });
        }
        drop(links);
        fences.fence();
        record.still(generation, view(if how.keeps_its_view { DEAD } else { attached }))
            && !terms.is_evicted_without(attached)
    });
    keeper.join().unwrap();
    let (kept, stayed) = (lookup.join().unwrap(), engine.join().unwrap());
    assert!(!kept || stayed, "{EVICTED}");
    (kept, stayed)
}

#[test]
fn what_is_found_during_a_switch_is_not_evicted() {
    let expected = [(false, false), (false, true), (true, true)];
    holds_with("hold, switch", SOME, &expected, || found_during_a_switch(SWITCH));
}

/// The mark is the successor's, which evicts.
#[test]
fn control_a_view_from_before_the_switch_is_caught() {
    caught("hold, switch, the second look as the first", EVICTED, || {
        found_during_a_switch(Switch { keeps_its_view: true, ..SWITCH })
    });
}

/// Nobody declares it any more.
#[test]
fn control_a_hold_left_to_a_keeper_that_has_ended_is_caught() {
    caught("hold, switch, left to the keeper", EVICTED, || {
        found_during_a_switch(Switch { keeps_its_link: true, ..SWITCH })
    });
}

#[test]
fn control_a_switch_in_two_steps_is_caught() {
    caught("hold, switch, in two steps", EVICTED, || {
        found_during_a_switch(Switch { in_two_steps: true, ..SWITCH })
    });
}
