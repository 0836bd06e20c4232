//! The link with an engine that the test plays: what happens to operations that nobody waits for any more.

use super::*;
use crate::health::Health;
use kvring_shm_abi::engine_segment::Places;
use kvring_shm_abi::life::RobustList;
use kvring_shm_abi::lobby::LOBBY_BYTES;
use kvring_shm_abi::mapping::Mapping;
use kvring_shm_abi::message::{Completion, ReserveAnswer, ReserveOutcome, ShardAnswer, Status};
use kvring_shm_abi::park;
use kvring_shm_abi::ring::DEPTH;
use kvring_shm_abi::segment::{self, EngineName};
use kvring_shm_abi::superblock::Geometry;

const ENTRY: usize = 3;
const NONCE: u64 = 0xfeed;

/// The engine's side of one channel, and the engine's life word.
pub(crate) struct FakeEngine {
    requests: Consumer,
    completions: Producer,
    payload: Payload,
    incarnation: u32,
    life: RobustList,
}

pub(crate) fn pair(tag: &str) -> (Arc<Link>, FakeEngine) {
    let geometry = Geometry::new(1 << 20, 1 << 20).unwrap();
    let mapping = Arc::new(Mapping::private(Places::of(&geometry).bytes as usize));
    let engine = EngineSegment::new(mapping, &geometry, [1, 2]).unwrap();
    engine.epoch().begin_recovery();
    let incarnation = engine.epoch().begin_serving();
    let mut life = RobustList::register(engine.life_words.clone()).unwrap();
    life.claim(ENTRY).unwrap();
    engine.attach[ENTRY].answer(NONCE, AttachStatus::Attached);
    let name = EngineName::new(&format!("t-link-{tag}-{}", std::process::id())).unwrap();
    let channel = Channel::create(&name, ENTRY, NONCE, 1 << 12, [1, 2], geometry).unwrap();
    let theirs = Channel::open(&name, ENTRY, NONCE, 1 << 12).unwrap();
    segment::unlink(&name.client(ENTRY, NONCE));
    let fake = FakeEngine {
        requests: Consumer::new(theirs.submissions.clone()),
        completions: Producer::new(theirs.completions.clone()),
        payload: theirs.payload.clone(),
        incarnation,
        life,
    };
    let link = Link::new(LinkParts {
        channel,
        lobby: Lobby::new(Arc::new(Mapping::private(LOBBY_BYTES))).unwrap(),
        engine,
        lock: None,
        entry: ENTRY,
        arena_id: [1, 2],
        incarnation,
        nonce: NONCE,
        stall_after: Duration::from_secs(2),
        spin: Duration::ZERO,
    });
    (Arc::new(link.unwrap()), fake)
}

impl FakeEngine {
    pub(crate) fn next(&mut self) -> Option<(u16, Request)> {
        let body = self.requests.pop().unwrap()?;
        let (operation, ident, request) = Request::decode(&body).unwrap();
        assert_eq!(ident, Ident { incarnation: self.incarnation, nonce: NONCE as u32 });
        Some((operation, request))
    }

    pub(crate) fn complete(&mut self, operation: u16, status: Status, results: [u64; 4]) {
        let ident = Ident { incarnation: self.incarnation, nonce: NONCE as u32 };
        self.completions.push(&Completion { operation, ident, status, results }.encode());
    }
}

fn noop(link: &Arc<Link>) -> Pending {
    link.submit(0, |_| Undo::Nothing, |_, _| Request::Noop).unwrap()
}

/// A reservation of two chunks, whose slots are aborted if nobody takes the answer.
fn reservation(link: &Arc<Link>) -> Pending {
    let undo = |region: Region| Undo::AbortSlots {
        keys: Records { offset: region.offset, count: 2 },
        answer: region.offset + 4,
    };
    let reservation = link.submit(16, undo, |payload, region| {
        payload.write(region.offset, &[10, 11, 20, 21]).unwrap();
        Request::Noop
    });
    reservation.unwrap()
}

/// Says that this link holds a chunk for a session, behind none.
fn hold(link: &Arc<Link>, session: u64) -> bool {
    link.publish_hold(session, 9, 3, 0, &[ChunkWord::from_bits(session + 100)])
}

fn soon() -> Duration {
    Duration::from_millis(1)
}

#[test]
fn an_answer_reaches_its_waiter_whatever_the_order() {
    let (link, mut engine) = pair("order");
    let (first, second) = (noop(&link), noop(&link));
    let (a, _) = engine.next().unwrap();
    let (b, _) = engine.next().unwrap();
    engine.complete(b, Status::Ok, [2, 0, 0, 0]);
    engine.complete(a, Status::Ok, [1, 0, 0, 0]);
    assert_eq!(first.wait(Duration::MAX).unwrap().completion.results[0], 1);
    assert_eq!(second.wait(Duration::MAX).unwrap().completion.results[0], 2);
    assert!(link.is_idle());
}

#[test]
fn a_timed_out_reservation_keeps_its_region_and_is_aborted_slot_by_slot() {
    let (link, mut engine) = pair("late");
    let free = |link: &Link| link.lock().operations.all_regions_free();
    assert!(matches!(reservation(&link).wait(soon()), Err(CallError::TimedOut { .. })));
    let (late, _) = engine.next().unwrap();
    assert!(!free(&link), "the engine may still write its answer there");
    // Another operation must not get the same id or region.
    assert!(hold(&link, 6));
    let (operation, request) = engine.next().unwrap();
    assert_ne!(operation, late);
    let Request::Hold { chunks, .. } = request else { panic!("{request:?}") };
    assert!(chunks.offset >= 16, "{chunks:?}");
    // The reservation's region is the first one: it starts at word 0.
    engine.payload.write(4, &ReserveAnswer::skip(ReserveOutcome::Present).words()).unwrap();
    engine.payload.write(7, &ReserveAnswer::write(ShardAnswer::new(42, 8192, 3)).words()).unwrap();
    engine.complete(late, Status::Ok, [1, 0, 0, 0]);
    engine.complete(operation, Status::Ok, [1, 0, 0, 0]);
    link.tend();
    let (abort, request) = engine.next().unwrap();
    let Request::Abort { slots, .. } = request else { panic!("{request:?}") };
    assert_eq!(slots.count, 1);
    let mut words = [0u64; SlotRecord::WORDS];
    engine.payload.read(slots.offset, &mut words).unwrap();
    assert_eq!(
        bytemuck::cast::<_, SlotRecord>(words),
        SlotRecord { slot: 42, generation: 3, key: [20, 21], checksum: 0 }
    );
    engine.complete(abort, Status::Ok, [0; 4]);
    link.tend();
    assert!(free(&link) && link.is_idle());
}

#[test]
fn an_answer_that_nobody_took_is_undone_too() {
    let (link, mut engine) = pair("untaken");
    let pending = reservation(&link);
    let (operation, _) = engine.next().unwrap();
    engine.payload.write(4, &ReserveAnswer::write(ShardAnswer::new(42, 8192, 3)).words()).unwrap();
    engine.payload.write(7, &ReserveAnswer::skip(ReserveOutcome::Present).words()).unwrap();
    engine.complete(operation, Status::Ok, [1, 0, 0, 0]);
    link.tend();
    assert!(engine.next().is_none(), "somebody may still take it");
    drop(pending);
    assert!(matches!(engine.next(), Some((_, Request::Abort { .. }))));
}

#[test]
fn a_hold_says_what_is_held_and_nobody_waits_for_its_answer() {
    let (link, mut engine) = pair("hold");
    let words = [7, 8, 9].map(ChunkWord::from_bits);
    assert!(link.publish_hold(5, 9, 3, 2, &words));
    let (operation, request) = engine.next().unwrap();
    let Request::Hold { session, admission, namespace, first, chunks } = request else {
        panic!("{request:?}")
    };
    assert_eq!((session, admission, namespace, first, chunks.count), (5, 9, 3, 2, 3));
    let mut said = [0u64; 3];
    engine.payload.read(chunks.offset, &mut said).unwrap();
    assert_eq!(said, [7, 8, 9]);
    engine.complete(operation, Status::Ok, [3, 0, 0, 0]);
    link.tend();
    assert!(link.is_idle());
}

#[test]
fn a_hold_has_no_room_in_a_full_ring_and_none_in_front_of_what_waits() {
    let (link, mut engine) = pair("holdfull");
    for session in 0..DEPTH as u64 {
        assert!(hold(&link, session), "{session}");
    }
    assert!(!hold(&link, 1000), "the ring is full");
    link.post_quietly(Request::EndSession { session: 77 });
    let (operation, _) = engine.next().unwrap();
    engine.complete(operation, Status::Ok, [1, 0, 0, 0]);
    // What was decided earlier goes first, and takes the place.
    assert!(!hold(&link, 1001));
    let last = core::iter::from_fn(|| engine.next()).last().unwrap().1;
    assert_eq!(last, Request::EndSession { session: 77 });
    // Nor is there any while another thread is at the ring.
    let (link, mut engine) = pair("holdlock");
    let inner = link.lock();
    assert!(!hold(&link, 1));
    drop(inner);
    assert!(hold(&link, 1));
    assert!(engine.next().is_some());
}

#[test]
fn a_hold_has_no_room_in_a_full_payload() {
    let (link, mut engine) = pair("holdwords");
    let words = vec![ChunkWord::from_bits(1); 1024];
    let held = (0..).take_while(|session| link.publish_hold(*session, 0, 3, 0, &words)).count();
    assert!((1..DEPTH / 2).contains(&held), "{held} holds");
    let (operation, _) = engine.next().unwrap();
    engine.complete(operation, Status::Ok, [1, 0, 0, 0]);
    assert!(link.publish_hold(1000, 0, 3, 0, &words), "what the engine has read makes room");
}

/// An engine that sleeps is woken when its ring is half full, and not before: nobody waits for what is said quietly.
#[test]
fn what_is_said_quietly_rings_when_the_ring_is_half_full() {
    let (link, _engine) = pair("quiet");
    let doorbell = link.lobby.doorbell();
    let _ticket = park::announce(doorbell);
    let sleeps = || doorbell.load(Ordering::Relaxed) & 1 == 1;
    for said in 1..=DEPTH as u64 / 2 {
        assert!(sleeps(), "woken after {} messages", said - 1);
        if said.is_multiple_of(2) {
            assert!(hold(&link, said));
        } else {
            link.post_quietly(Request::Release { session: said, admission: 9, keep: 0 });
        }
    }
    assert!(!sleeps());
    // What is urgent rings at once.
    let (link, _engine) = pair("urgent");
    let doorbell = link.lobby.doorbell();
    let _ticket = park::announce(doorbell);
    link.post(Request::EndSession { session: 1 });
    assert_eq!(doorbell.load(Ordering::Relaxed) & 1, 0);
}

/// Whose tables may be read, as far as a link can tell.
#[test]
fn tables_are_read_whatever_the_engine_does_unless_it_is_gone_or_does_not_listen() {
    let there = |is_serving| Some(Reading { marked: Marked::There, is_serving });
    let missing = |is_serving| Some(Reading { marked: Marked::Missing, is_serving });
    let (link, mut engine) = pair("reads");
    assert_eq!(link.reading(), missing(true));
    assert!(matches!(noop(&link).wait(soon()), Err(CallError::TimedOut { .. })));
    assert_eq!(link.reading(), missing(false), "it stalls, and may go on and evict");
    // Thrown out by an engine that lives, and then by one that has died.
    link.engine.attach[ENTRY].answer(NONCE, AttachStatus::Breach);
    assert_eq!(link.reading(), None);
    engine.life.release(ENTRY);
    assert_eq!(link.reading(), there(false));
    // One that recovers.
    let (link, _engine) = pair("recovers");
    link.engine.epoch().begin_recovery();
    assert_eq!(link.reading(), there(false));
    link.engine.epoch().begin_serving();
    assert_eq!(link.reading(), there(false), "to this one nothing has been declared");
    // One that was removed, and one that has found itself broken.
    let (link, _engine) = pair("retired");
    link.engine.superblock().retire();
    assert_eq!(link.reading(), None);
    let (link, _engine) = pair("unwell");
    link.engine.info().unhealthy.store(1, Ordering::Relaxed);
    assert_eq!(link.reading(), None);
}

#[test]
fn no_more_than_the_rings_depth_is_in_flight_and_what_gives_back_waits() {
    let (link, mut engine) = pair("full");
    let mut pending: Vec<Pending> = (0..DEPTH).map(|_| noop(&link)).collect();
    let refused = link.submit(0, |_| Undo::Nothing, |_, _| Request::Noop);
    assert!(matches!(refused, Err(CallError::Busy)));
    link.post(Request::EndSession { session: 77 });
    let mut seen = Vec::new();
    while let Some((operation, request)) = engine.next() {
        assert_eq!(request, Request::Noop, "the ring must not be overrun");
        seen.push(operation);
    }
    assert_eq!(seen.len(), DEPTH);
    engine.complete(seen[0], Status::Ok, [0; 4]);
    drop(pending.remove(0).wait(Duration::MAX).unwrap());
    link.tend();
    assert_eq!(engine.next().map(|(_, r)| r), Some(Request::EndSession { session: 77 }));
}

#[test]
fn messages_of_another_life_are_ignored_and_doubled_ones_break_the_link() {
    let (link, mut engine) = pair("stale");
    let pending = noop(&link);
    let (operation, _) = engine.next().unwrap();
    let stale = Ident { incarnation: engine.incarnation + 2, nonce: NONCE as u32 };
    let body = Completion { operation, ident: stale, status: Status::Ok, results: [0; 4] }.encode();
    engine.completions.push(&body);
    let pending = pending.try_take().err().unwrap();
    engine.complete(operation, Status::Ok, [0; 4]);
    drop(pending.try_take().ok().unwrap());
    assert!(!link.is_broken());
    engine.complete(operation, Status::Ok, [0; 4]);
    link.tend();
    assert!(link.is_broken());
    assert!(!link.is_healthy());
}

#[test]
fn the_engines_death_ends_a_wait_at_once() {
    let (link, mut engine) = pair("death");
    let pending = noop(&link);
    engine.life.release(ENTRY);
    assert_eq!(pending.wait(Duration::MAX).err(), Some(CallError::Dead));
    assert_eq!(link.health(), Health::Dead);
}

#[test]
fn a_restart_ends_a_wait_at_once() {
    let (link, _engine) = pair("restart");
    let pending = noop(&link);
    link.engine.epoch().begin_recovery();
    assert_eq!(pending.wait(Duration::MAX).err(), Some(CallError::Restarted));
    assert_eq!(link.health(), Health::Recovering);
}

#[test]
fn a_restart_reaches_a_sleeper_through_the_keeper() {
    let (link, _engine) = pair("rouse");
    let pending = noop(&link);
    let sleeper = std::thread::spawn(move || pending.wait(Duration::MAX).err());
    // Wait until it sleeps: then its flag is up.
    while link.channel.client_parked().load(Ordering::Relaxed) & 1 == 0 {
        std::thread::yield_now();
    }
    link.engine.epoch().begin_recovery();
    link.rouse();
    assert_eq!(sleeper.join().unwrap(), Some(CallError::Restarted));
}

#[test]
fn a_missed_deadline_under_an_unmoved_beat_degrades_until_it_moves() {
    let (link, _engine) = pair("suspect");
    assert!(link.is_healthy());
    assert!(matches!(noop(&link).wait(soon()), Err(CallError::TimedOut { .. })));
    assert_eq!(link.health(), Health::Stalled);
    link.engine.epoch().bump_beat();
    assert_eq!(link.health(), Health::Healthy);
}

#[test]
fn a_thread_that_drains_anothers_completion_wakes_it() {
    let (link, mut engine) = pair("kick");
    let theirs = noop(&link);
    let mine = noop(&link);
    let (a, _) = engine.next().unwrap();
    let (b, _) = engine.next().unwrap();
    let sleeper = std::thread::spawn(move || theirs.wait(Duration::MAX).unwrap().completion.results[0]);
    // Wait until it sleeps: then its flag is up.
    while link.channel.client_parked().load(Ordering::Relaxed) & 1 == 0 {
        std::thread::yield_now();
    }
    engine.complete(a, Status::Ok, [1, 0, 0, 0]);
    engine.complete(b, Status::Ok, [2, 0, 0, 0]);
    // This test's engine wakes nobody: this thread must drain both, and wake the sleeper.
    assert_eq!(mine.wait(Duration::MAX).unwrap().completion.results[0], 2);
    // The sleeper was not woken by its own time limit: the drain above took the flag down.
    assert_eq!(link.channel.client_parked().load(Ordering::Relaxed) & 1, 0);
    assert_eq!(sleeper.join().unwrap(), 1);
}
