//! Messages that no correct client sends: the engine answers them with a status, ignores them, or detaches their sender.
//! Meanwhile the verified traffic of another client goes on.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_shm_abi::channel::SUBMISSIONS_AT;
use kvring_shm_abi::chunk::ChunkWord;
use kvring_shm_abi::lobby::Role;
use kvring_shm_abi::message::{
    ANY_NAMESPACE, HOLD_MAX, Ident, KEYS_MAX, Records, Request, SlotOutcome, SlotRecord, Status,
};
use kvring_shm_abi::namespace::namespace_index;
use kvring_shm_abi::ring::{Body, DEPTH};
use kvring_tests::raw::{PAYLOAD_WORDS, registration};
use kvring_tests::{EngineProcess, RawClient, SchedulerSide, SchedulerSpec, Shape, all_loaded, chain, round};
use std::os::unix::fs::FileExt;

fn records(offset: u32, count: u32) -> Records {
    Records { offset, count }
}

#[test]
fn more_keys_than_the_limit_is_an_error_with_the_limit() {
    let (engine, bystander) = EngineProcess::with_bystander("keys");
    let mut worker = RawClient::attach(&engine.name, Role::Worker);
    let namespace = worker.register(1, 1, 0, 65536);
    for count in [KEYS_MAX as u32 + 1, u32::MAX] {
        let many = records(0, count);
        for request in [
            Request::Reserve { round: round(1), namespace, rank: 0, keys: many, answer: 0, parent: None },
            Request::Commit { slots: many, answer: 0 },
            Request::Abort { slots: many, answer: 0 },
            Request::DeclareSlots { slots: many, answer: 0 },
        ] {
            let completion = worker.call(request);
            assert_eq!((completion.status, completion.results[0]), (Status::TooMany, 8192), "{request:?}");
        }
    }
    let mut scheduler = RawClient::attach(&engine.name, Role::Scheduler);
    for count in [HOLD_MAX as u32 + 1, u32::MAX] {
        let chunks = records(0, count);
        let completion =
            scheduler.call(Request::Hold { session: 1, admission: 0, namespace, first: 0, chunks });
        assert_eq!((completion.status, completion.results[0]), (Status::TooMany, 1024), "{count} chunks");
    }
    // None of it was a breach.
    assert_eq!(worker.call(Request::Noop).status, Status::Ok);
    assert_eq!(engine.stat("breaches"), 0);
    engine.settles_beside(bystander, (worker, scheduler));
}

#[test]
fn unknown_namespaces_and_other_roles_are_refused() {
    let (engine, bystander) = EngineProcess::with_bystander("roles");
    // A scheduler whose workers have not come yet.
    let early = SchedulerSpec { namespace: 77, ..SchedulerSpec::new(&engine.name) };
    let mut early = SchedulerSide::started(&early);
    assert_eq!(early.lookup("r", 0, &chain(1, 4)).chunks, 0);
    assert_eq!((early.tally().refused, early.tally().answered), (1, 0));
    assert_eq!(early.api().reset_cache(), Ok(0));
    drop(early);

    let mut worker = RawClient::attach(&engine.name, Role::Worker);
    let mut scheduler = RawClient::attach(&engine.name, Role::Scheduler);
    let keys = chain(1, 2);
    // The bystander's namespace exists, at this index, but this worker has not registered it.
    let known = engine.namespace(99);
    let (at, before, after) = (namespace_index(known), known - (1 << 8), known + (1 << 8));
    for unknown in [at.into(), before, after, 1, 5, 63, 64, 255, u32::MAX] {
        let reserve = worker.reserve_request(unknown, 0, round(1), &keys);
        assert_eq!(worker.call(reserve).status, Status::UnknownNamespace, "{unknown}");
        assert_eq!(worker.call(Request::Unregister { namespace: unknown }).status, Status::UnknownNamespace);
        let hold = scheduler.hold_request(1, 0, unknown, 0, &[ChunkWord::new(0, 0)]);
        assert_eq!(scheduler.call(hold).status, Status::UnknownNamespace, "{unknown}");
        if unknown != ANY_NAMESPACE {
            let clear = Request::Clear { namespace: unknown };
            assert_eq!(scheduler.call(clear).status, Status::UnknownNamespace, "{unknown}");
        }
    }
    let reserve = worker.reserve_request(known, 0, round(1), &keys);
    assert_eq!(worker.call(reserve).status, Status::UnknownNamespace);
    // Its own, but another rank of it: nobody's, and somebody's.
    let namespace = worker.register(1, 2, 1, 65536);
    let reserve = worker.reserve_request(namespace, 0, round(1), &keys);
    assert_eq!(worker.call(reserve).status, Status::UnknownNamespace);
    let mut other = RawClient::attach(&engine.name, Role::Worker);
    other.register(1, 2, 0, 65536);
    let reserve = worker.reserve_request(namespace, 0, round(1), &keys);
    assert_eq!(worker.call(reserve).status, Status::UnknownNamespace);
    drop(other);

    // Requests of the other role.
    let hold = worker.hold_request(1, 0, namespace, 0, &[ChunkWord::new(0, 0)]);
    assert_eq!(worker.call(hold).status, Status::WrongRole);
    let slots = records(0, 1);
    for request in [
        scheduler.reserve_request(namespace, 1, round(1), &keys),
        Request::Commit { slots, answer: 100 },
        Request::Abort { slots, answer: 100 },
        Request::DeclareSlots { slots, answer: 100 },
        Request::Register { record: 0 },
        Request::Invalidate { slot: 0, generation: 0, key: keys[0] },
    ] {
        assert_eq!(scheduler.call(request).status, Status::WrongRole, "{request:?}");
    }
    assert_eq!(engine.stat("breaches"), 0);
    engine.settles_beside(bystander, (worker, scheduler));
}

#[test]
fn nobody_commits_aborts_or_releases_what_is_somebody_elses() {
    let (engine, bystander) = EngineProcess::with_bystander("others");
    let shard_bytes = Shape::SMALL.shard_bytes();
    let mut victim = RawClient::attach(&engine.name, Role::Worker);
    let mut thief = RawClient::attach(&engine.name, Role::Worker);
    let namespace = victim.register(1, 1, 0, shard_bytes);
    assert_eq!(thief.register(1, 1, 0, shard_bytes), namespace);
    let keys = chain(1, 4);
    let slots = victim.reserve(namespace, 0, round(1), &keys);
    assert_eq!(slots.len(), 4);
    // While they are being written.
    for commit in [true, false] {
        assert_eq!(thief.finish(&slots, commit), vec![SlotOutcome::NotYours; 4], "commit: {commit}");
    }
    // Nor does a declaration adopt them, or the end of one free them.
    assert_eq!(thief.declare(&slots), vec![SlotOutcome::Gone; 4]);
    assert_eq!(thief.call(Request::DeclareEnd).results[0], 0);
    // The victim itself, with a record of which one part is wrong.
    let good = slots[0];
    for (bad, expected) in [
        (SlotRecord { key: [1, 1], ..good }, SlotOutcome::NotYours),
        (SlotRecord { slot: u64::MAX, ..good }, SlotOutcome::NotYours),
        (SlotRecord { slot: u64::from(u32::MAX), ..good }, SlotOutcome::NotYours),
        (SlotRecord { slot: 4096, ..good }, SlotOutcome::NotYours),
        (SlotRecord { slot: good.slot | 1 << 32, ..good }, SlotOutcome::NotYours),
        (SlotRecord { generation: good.generation + 1, ..good }, SlotOutcome::Gone),
        (SlotRecord { generation: u64::MAX, ..good }, SlotOutcome::Gone),
    ] {
        for commit in [true, false] {
            assert_eq!(victim.finish(&[bad], commit), [expected], "{bad:?}, commit: {commit}");
        }
    }
    assert_eq!(engine.stat("shards_aborted"), 0);
    assert_eq!(victim.finish(&slots, true), vec![SlotOutcome::Done; 4], "it lost nothing");
    // A committed shard cannot be aborted. A second commit of it is fine and changes nothing.
    assert_eq!(thief.finish(&slots, false), vec![SlotOutcome::Gone; 4]);
    assert_eq!(victim.finish(&slots, false), vec![SlotOutcome::Gone; 4]);
    assert_eq!(victim.finish(&slots, true), vec![SlotOutcome::Done; 4]);

    // Sessions are numbers of the client that uses them, so a thief can only name its own.
    let mut owner = RawClient::attach(&engine.name, Role::Scheduler);
    let mut prying = RawClient::attach(&engine.name, Role::Scheduler);
    let hold = owner.hold_found(7, 3, namespace, &keys);
    assert_eq!(owner.call(hold).results[0], 4);
    for client in [&mut prying, &mut thief] {
        for session in 0..20 {
            for request in [
                Request::Release { session, admission: 3, keep: 0 },
                Request::Release { session, admission: u32::MAX, keep: u32::MAX },
                Request::EndSession { session },
            ] {
                assert_eq!(client.call(request).status, Status::Ok, "unknown is fine");
            }
        }
    }
    let cleared = owner.call(Request::Clear { namespace });
    assert_eq!(cleared.results[0], 0, "all four are still pinned");
    assert_eq!(owner.call(Request::EndSession { session: 7 }).status, Status::Ok);
    assert_eq!(owner.call(Request::Clear { namespace }).results[0], 4);
    engine.settles_beside(bystander, (victim, thief, owner, prying));
}

#[test]
fn nobody_invalidates_what_it_does_not_read() {
    let (engine, bystander) = EngineProcess::with_bystander("invalidate");
    let shard_bytes = Shape::SMALL.shard_bytes();
    let mut ranks = [(); 2].map(|()| RawClient::attach(&engine.name, Role::Worker));
    let mut namespace = 0;
    let keys = chain(1, 2);
    let mut slots = Vec::new();
    for (rank, client) in (0..).zip(&mut ranks) {
        namespace = client.register(5, 2, rank, shard_bytes);
    }
    for (rank, client) in (0..).zip(&mut ranks) {
        slots.push(client.reserve(namespace, rank, round(1), &keys));
    }
    // A chunk that is still forming cannot be invalidated.
    assert_eq!(ranks[0].invalidate(slots[0][0]), SlotOutcome::Gone);
    for (client, slots) in ranks.iter_mut().zip(&slots) {
        assert_eq!(client.finish(slots, true), vec![SlotOutcome::Done; 2]);
    }
    let good = slots[0][0];
    let mut stranger = RawClient::attach(&engine.name, Role::Worker);
    assert_eq!(stranger.invalidate(good), SlotOutcome::NotYours, "of no namespace");
    stranger.register(6, 2, 0, shard_bytes);
    assert_eq!(stranger.invalidate(good), SlotOutcome::NotYours, "of another namespace");
    assert_eq!(ranks[1].invalidate(good), SlotOutcome::NotYours, "another rank's");
    for (bad, expected) in [
        (SlotRecord { key: keys[1], ..good }, SlotOutcome::NotYours),
        (SlotRecord { slot: u64::from(u32::MAX), ..good }, SlotOutcome::NotYours),
        (SlotRecord { slot: 4096, ..good }, SlotOutcome::NotYours),
        (SlotRecord { generation: good.generation + 1, ..good }, SlotOutcome::Gone),
        (SlotRecord { generation: u64::MAX, ..good }, SlotOutcome::Gone),
    ] {
        assert_eq!(ranks[0].invalidate(bad), expected, "{bad:?}");
    }
    assert_eq!(engine.stat("chunks_invalidated"), 0);
    // Its own shard, which a scheduler has leased: invalidated once.
    let mut scheduler = RawClient::attach(&engine.name, Role::Scheduler);
    let hold = scheduler.hold_found(1, 0, namespace, &keys);
    assert_eq!(scheduler.call(hold).results[0], 2);
    assert_eq!(ranks[0].invalidate(good), SlotOutcome::Done);
    assert_eq!(ranks[0].invalidate(good), SlotOutcome::Gone);
    assert_eq!(ranks[1].invalidate(slots[1][0]), SlotOutcome::Gone);
    assert_eq!((engine.stat("chunks_invalidated"), engine.stat("chunks_hidden")), (1, 1));
    // What was invalidated is held by nobody else from now on. Saying it again, for the chunk that is left, replaces the lease.
    assert!(scheduler.search(namespace, &keys).is_empty());
    let hold = scheduler.hold_found(1, 0, namespace, &keys[1..]);
    assert_eq!(scheduler.call(hold).results[0], 1);
    engine.stat_becomes("chunks_hidden", 0);
    assert_eq!(engine.stat("breaches"), 0);
    engine.settles_beside(bystander, (ranks, stranger, scheduler));
}

#[test]
fn messages_of_another_life_are_ignored() {
    let engine = EngineProcess::start("stale", 16);
    let mut raw = RawClient::attach(&engine.name, Role::Scheduler);
    let ours = raw.ident;
    for stale in [
        Ident { incarnation: ours.incarnation + 2, ..ours },
        Ident { incarnation: 0, ..ours },
        Ident { nonce: ours.nonce ^ 1, ..ours },
    ] {
        let before = engine.stat("stale_requests");
        raw.send_body(&Request::Noop.encode(9, stale));
        engine.stat_becomes("stale_requests", before + 1);
    }
    assert_eq!(raw.call(Request::Noop).status, Status::Ok, "and none of them was answered");
    assert_eq!(engine.stat("breaches"), 0);
}

/// Each of these ends the sender's attachment, and nothing else.
#[test]
fn nonsense_ends_the_attachment_of_its_sender_alone() {
    let (engine, bystander) = EngineProcess::with_bystander("breach");
    let end = PAYLOAD_WORDS;
    let mut breaches = 0;
    let namespace = RawClient::attach(&engine.name, Role::Worker).register(1, 1, 0, 65536);
    let mut thrown_out = |what: &str, role: Role, act: &mut dyn FnMut(&mut RawClient)| {
        let mut raw = RawClient::attach(&engine.name, role);
        if role == Role::Worker {
            assert_eq!(raw.register(1, 1, 0, 65536), namespace);
        }
        act(&mut raw);
        raw.is_thrown_out(what);
        breaches += 1;
        engine.stat_becomes("breaches", breaches);
        // The engine does not hear it any more.
        let requests = engine.stat("requests");
        raw.send(Request::Clear { namespace: ANY_NAMESPACE });
        bystander.goes_on();
        assert!(
            engine.stat("requests") >= requests && raw.poll().is_none_or(|c| c.status != Status::Ok),
            "{what}"
        );
    };
    let is_unknown = |opcode: &u32| Request::decode(&Body { head: opcode << 16, words: [0; 7] }).is_err();
    let behind_the_last = (1..).find(is_unknown).unwrap();
    for opcode in [0, behind_the_last, 77, 255] {
        thrown_out("opcode", Role::Scheduler, &mut |raw| {
            let mut body = Request::Noop.encode(1, raw.ident);
            body.head = 1 | opcode << 16;
            raw.send_body(&body);
        });
    }
    // Records outside of the payload area.
    let (round, session, admission, rank, parent) = (round(1), 1, 0, 0, None);
    let mut outside = Vec::new();
    for (offset, count) in [(end, 1), (end - 1, 1), (u32::MAX, 1), (end - 5, 4), (end / 2, KEYS_MAX as u32)] {
        let (keys, slots, chunks) = (records(offset, count), records(offset, count), records(offset, count));
        outside.extend([
            ("slots of a commit", Role::Worker, Request::Commit { slots, answer: 0 }),
            ("slots that are declared", Role::Worker, Request::DeclareSlots { slots, answer: 0 }),
            ("slots of an abort", Role::Worker, Request::Abort { slots, answer: 0 }),
        ]);
        // Half of the area is enough for 8192 keys, but not for as many slots.
        if offset != end / 2 {
            let reserve = Request::Reserve { round, namespace, rank, keys, answer: 0, parent };
            let hold = Request::Hold { session, admission, namespace, first: 0, chunks };
            outside.push(("keys of a reservation", Role::Worker, reserve));
            // A chunk takes one word only.
            if u64::from(offset) + u64::from(count) > u64::from(end) {
                outside.push(("chunks of a hold", Role::Scheduler, hold));
            }
        }
    }
    for answer in [end, u32::MAX, end - 1] {
        let (keys, slots, at) = (records(0, 2), records(0, 2), Some(answer.min(u32::MAX - 1)));
        let reserve = Request::Reserve { round, namespace, rank, keys, answer, parent };
        let behind = Request::Reserve { round, namespace, rank, keys, answer: 64, parent: at };
        outside.extend([
            ("the answer of a reservation", Role::Worker, reserve),
            ("the parent of a reservation", Role::Worker, behind),
            ("the answer of a commit", Role::Worker, Request::Commit { slots, answer }),
            ("the answer of a declaration", Role::Worker, Request::DeclareSlots { slots, answer }),
            ("a registration", Role::Worker, Request::Register { record: answer }),
        ]);
    }
    for (what, role, request) in outside {
        thrown_out(what, role, &mut |raw| {
            raw.send(request);
        });
    }
    for (world, rank, bytes, tokens) in [
        (0, 0, 65536, 64),
        (65, 0, 65536, 64),
        (2, 2, 65536, 64),
        (2, u32::MAX, 65536, 64),
        (1, 0, 0, 64),
        (1, 0, 65536, 0),
    ] {
        thrown_out("what a registration says", Role::Worker, &mut |raw| {
            let mut record = registration(3, world, rank, bytes);
            record.chunk_tokens = tokens;
            raw.payload.write(0, bytemuck::cast_slice(&[record])).unwrap();
            raw.send(Request::Register { record: 0 });
        });
    }
    // A ring that jumps: forward, to another lap, to zero, back.
    for (sequence, noops) in
        [(2u32, 0usize), (1 + DEPTH as u32, 0), (0, 0), (77, 0), (u32::MAX, 0), (1, 1), (9, 3)]
    {
        thrown_out("a ring that jumps", Role::Scheduler, &mut |raw| {
            for _ in 0..noops {
                assert_eq!(raw.call(Request::Noop).status, Status::Ok);
            }
            raw.file.write_all_at(&sequence.to_le_bytes(), (SUBMISSIONS_AT + noops * 64) as u64).unwrap();
            raw.ring();
        });
    }
    engine.settles_beside(bystander, ());
    assert_eq!(engine.stat("namespaces"), 2, "nonsense registers nothing");
}

/// Arguments that change while they are read, rings that are never drained, floods: these harm at most their sender.
#[test]
fn what_only_hurts_its_sender_is_let_through() {
    let (engine, bystander) = EngineProcess::with_bystander("flood");
    let mut worker = engine.worker();
    let keys = worker.stores(round(1), chain(1, 16), 0);
    let namespace = engine.namespace(1);
    let mut raw = RawClient::attach(&engine.name, Role::Scheduler);
    let hold = raw.hold_found(1, 1, namespace, &keys);
    let held = raw.call(hold);
    assert_eq!((held.status, held.results[0]), (Status::Ok, 16));
    // Others of the same, whose chunks are overwritten while the engine may be reading them.
    for noise in 0..100u64 {
        raw.send(hold);
        raw.payload.write(noise as u32 % 16, &[noise << 20 | noise]).unwrap();
        raw.answer();
    }
    // So many again in one message that are the same chunk.
    let same = vec![raw.search(namespace, &keys)[0]; HOLD_MAX];
    let hold = raw.hold_request(1, 2, namespace, 0, &same);
    assert_eq!(raw.call(hold).results[0], HOLD_MAX as u64);
    // Far more in flight than the completion ring holds, and nothing drained.
    for _ in 0..20 * DEPTH {
        raw.submissions.push(&Request::Noop.encode(0, raw.ident));
    }
    raw.ring();
    bystander.goes_on();
    drop(raw);
    // Many sessions and admissions: refused beyond a limit, and all freed by one death.
    let mut raw = RawClient::attach(&engine.name, Role::Scheduler);
    let mut busy = 0;
    for number in 0..300u32 {
        let hold = raw.hold_found(u64::from(number % 3), number, namespace, &keys[..1]);
        busy += u32::from(raw.call(hold).results[0] == 0);
    }
    assert!(busy > 200, "sixteen admissions a session: {busy}");
    raw.give_up();
    engine.stat_becomes("leases", 0);
    let mut scheduler = engine.scheduler();
    let found = scheduler.lookup("r", 0, &keys);
    assert_eq!(worker.load(&found.handles, 0), all_loaded(16));
    engine.settles_beside(bystander, (raw, scheduler, worker));
}

#[test]
fn a_body_of_zeros_is_nonsense_too() {
    let engine = EngineProcess::start("zeros", 16);
    let mut raw = RawClient::attach(&engine.name, Role::Worker);
    raw.send_body(&Body::default());
    raw.is_thrown_out("zeros");
    engine.settles_without(raw);
}
