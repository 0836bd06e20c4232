//! Clients that do wrong before their first message: with entries, channels, and claims that come back. And what the engine
//! cleans up after clients that it has thrown out, or that die half-way.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_adapter::Round;
use kvring_shm_abi::channel::{PAYLOAD_AT, PAYLOAD_WORDS_MAX, SUBMISSIONS_AT};
use kvring_shm_abi::engine_segment::AttachStatus;
use kvring_shm_abi::failpoint::Rule;
use kvring_shm_abi::lobby::{EntryContent, Role};
use kvring_shm_abi::message::{ANY_NAMESPACE, Request, SlotOutcome, Status};
use kvring_shm_abi::sync::Ordering;
use kvring_tests::engine::shard_of;
use kvring_tests::raw::PAYLOAD_WORDS;
use kvring_tests::{
    BREAK, Bystander, Claimed, EngineProcess, Peer, RawClient, SchedulerSpec, Shape, WorkerSpec, all_loaded,
    all_stored, becomes, chain, round,
};
use std::os::unix::fs::FileExt;

#[test]
fn entries_that_make_no_sense_are_refused() {
    let (engine, bystander) = EngineProcess::with_bystander("entry");
    let refused = |expected: AttachStatus, change: &dyn Fn(&mut EntryContent)| {
        let status = Claimed::new(&engine.name, Role::Worker).publish(change).err();
        assert_eq!(status, Some(expected));
        // The claim is dropped here, which gives the entry up for the next one.
    };
    for role in [0, 3, 77, u32::MAX] {
        refused(AttachStatus::BadRole, &|entry| entry.role = role);
    }
    for incarnation in [0, 1, 3, 4, u32::MAX] {
        refused(AttachStatus::Stale, &|entry| entry.incarnation = incarnation);
    }
    for words in [0, 1, 1023, PAYLOAD_WORDS + 1, PAYLOAD_WORDS_MAX, PAYLOAD_WORDS_MAX + 1, u32::MAX] {
        refused(AttachStatus::BadChannel, &|entry| entry.payload_words = words);
    }
    // A channel that does not exist.
    refused(AttachStatus::BadChannel, &|entry| entry.nonce ^= 1);
    // A payload area smaller than the file, and a strange name, concern the client alone.
    let odd = Claimed::new(&engine.name, Role::Worker).publish(|entry| {
        entry.payload_words = 1024;
        entry.name = "\u{1b}[31m\u{fffd} %s {} \n".to_owned();
        entry.pid = u32::MAX;
    });
    let mut odd = odd.unwrap();
    assert_eq!(odd.call(Request::Noop).status, Status::Ok);
    drop(odd);
    // A nonce of 0, which no client draws: at worst it is not answered.
    let mut mute = Claimed::new(&engine.name, Role::Worker).publish_only(|entry| entry.nonce = 0);
    bystander.goes_on();
    mute.give_up();
    engine.settles_beside(bystander, mute);
}

#[test]
fn channels_that_make_no_sense_are_refused() {
    let (engine, bystander) = EngineProcess::with_bystander("channel");
    type Damage = fn(&Claimed);
    let damages: [(&str, Damage); 9] = [
        ("no magic", |claim| claim.file().write_all_at(&[0; 8], 0).unwrap()),
        ("another ABI", |claim| claim.file().write_all_at(&[9], 8).unwrap()),
        ("another kind", |claim| claim.file().write_all_at(&[1], 12).unwrap()),
        ("another layout", |claim| claim.file().write_all_at(&[1, 2, 3], 16).unwrap()),
        ("a bad geometry", |claim| claim.file().write_all_at(&[7; 16], 64).unwrap()),
        ("noise in the header", |claim| claim.file().write_all_at(&[0x5a; 256], 256).unwrap()),
        ("nothing at all", |claim| claim.file().set_len(0).unwrap()),
        ("half of it", |claim| claim.file().set_len(PAYLOAD_AT as u64 / 2).unwrap()),
        ("a word too little", |claim| {
            let length = claim.file().metadata().unwrap().len();
            claim.file().set_len(length - 8).unwrap();
        }),
    ];
    for (what, damage) in damages {
        let claim = Claimed::new(&engine.name, Role::Worker);
        damage(&claim);
        assert_eq!(claim.publish(|_| {}).err(), Some(AttachStatus::BadChannel), "{what}");
        bystander.goes_on();
    }
    let claim = Claimed::new(&engine.name, Role::Worker);
    claim.unlink_channel();
    assert_eq!(claim.publish(|_| {}).err(), Some(AttachStatus::BadChannel), "no file");
    // A sparse file is refused: later, when the file system is full, its pages could not be had. Nor does the engine allocate
    // them.
    let claim = Claimed::new(&engine.name, Role::Worker);
    let length = claim.file().metadata().unwrap().len();
    let header = read(claim.file(), SUBMISSIONS_AT);
    claim.file().set_len(0).unwrap();
    claim.file().set_len(length).unwrap();
    claim.file().write_all_at(&header, 0).unwrap();
    assert_eq!(claim.publish(|_| {}).err(), Some(AttachStatus::BadChannel), "holes");
    engine.settles_beside(bystander, ());
}

fn read(file: &std::fs::File, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// A client may die at any point between its claim and its first message: its entry must become free.
#[test]
fn claims_that_are_never_completed_are_reclaimed() {
    let (engine, bystander) = EngineProcess::with_bystander("claim");
    for _ in 0..100 {
        drop(Claimed::new(&engine.name, Role::Scheduler));
    }
    // Published and given up at once, while the channel still has its name.
    for _ in 0..100 {
        let mut client = Claimed::new(&engine.name, Role::Scheduler).publish_only(|_| {});
        client.give_up();
    }
    engine.settles_beside(bystander, ());
}

/// A client that was thrown out may still be writing, so the engine gives its slots to no other until it is gone.
#[test]
fn slots_of_a_client_that_was_thrown_out_wait_for_its_end() {
    let (engine, bystander) = EngineProcess::with_bystander("quarantine");
    let mut raw = RawClient::attach(&engine.name, Role::Worker);
    let namespace = raw.register(1, 1, 0, Shape::SMALL.shard_bytes());
    let keys = chain(1, 8);
    let slots = raw.reserve(namespace, 0, round(1), &keys);
    assert_eq!(slots.len(), 8);
    raw.send_body(&kvring_shm_abi::ring::Body { head: 0xff << 16, words: [0; 7] });
    raw.is_thrown_out("nonsense");
    bystander.goes_on();
    engine.stat_becomes("slots_orphaned", 8);
    // Meanwhile others fill the whole arena, but for those slots.
    let mut worker = Peer::worker(&WorkerSpec::new(&engine.name));
    let mut scheduler = Peer::scheduler(&SchedulerSpec::new(&engine.name));
    for number in 2..14 {
        let keys = worker.stores(round(number), chain(u64::from(number), 32), 1);
        let found = scheduler.lookup("r", number, &keys);
        for handle in &found.handles {
            let (slot, _) =
                shard_of(&engine.view(), handle.chunk().word, 1, 0).expect("a chunk that is leased");
            assert!(
                slots.iter().all(|quarantined| quarantined.slot != u64::from(slot)),
                "a slot in quarantine was given away"
            );
        }
        assert_eq!(worker.load(&found.handles, 1), all_loaded(32));
        scheduler.release("r", number, 0);
    }
    assert_eq!(engine.stat("slots_orphaned"), 8);
    assert_eq!(scheduler.lookup("theirs", 0, &keys).chunks, 0);
    raw.give_up();
    engine.stat_becomes("slots_orphaned", 0);
    engine.settles_beside(bystander, (raw, worker, scheduler));
}

/// The engine judges an entry once for each time that its life word is claimed. A client that was thrown out, or left, and
/// claims its entry again without giving it up, must not make the engine forget which slots it may still be writing.
#[test]
fn an_entry_that_attaches_again_and_again_leaves_nothing() {
    let (engine, bystander) = EngineProcess::with_bystander("again");
    for number in 0..40 {
        let mut raw = RawClient::attach(&engine.name, Role::Worker);
        for again in 0..3 {
            let namespace = raw.register(1, 1, 0, Shape::SMALL.shard_bytes());
            let keys = chain(u64::from(number * 3 + again) + 10, 4);
            let slots = raw.reserve(namespace, 0, round(number), &keys);
            assert_eq!(slots.len(), 4);
            if number.is_multiple_of(2) {
                assert_eq!(raw.call(Request::Detach).status, Status::Ok);
                becomes("the attachment", AttachStatus::Left, || raw.status());
            } else {
                raw.send_body(&kvring_shm_abi::ring::Body { head: 0xff << 16, words: [0; 7] });
                raw.is_thrown_out("nonsense");
            }
            if raw.claim_again(|| bystander.goes_on()) != AttachStatus::Attached {
                break;
            }
            // The slots that it reserved before are not its own any more.
            assert!(!raw.finish(&slots, true).contains(&SlotOutcome::Done));
        }
    }
    engine.stat_becomes("slots_writing", 0);
    // Others can still attach and store.
    let mut worker = Peer::worker(&WorkerSpec::new(&engine.name));
    assert_eq!(worker.store(round(1), &chain(1, 16), 1), all_stored(16));
    engine.settles_beside(bystander, worker);
}

/// After a `kill -9` at any time, the leases, reservations, channel and entry are free again.
#[test]
fn clients_that_are_killed_leave_nothing() {
    let (engine, bystander) = EngineProcess::with_bystander("killed");
    let mut worker = Peer::worker(&WorkerSpec::new(&engine.name));
    let keys = worker.stores(round(1), chain(1, 32), 1);
    for number in 0..10 {
        let mut scheduler = Peer::scheduler(&SchedulerSpec::new(&engine.name));
        for request in ["a", "b", "c"] {
            assert_eq!(scheduler.lookup(request, number, &keys).chunks, 32);
        }
        scheduler.kill();
        let mut another = Peer::worker(&WorkerSpec::new(&engine.name));
        let stored = another.store(round(number + 2), &chain(u64::from(number) + 2, 8), 1);
        assert_eq!(stored, all_stored(8));
        another.kill();
    }
    worker.kill();
    engine.stat_becomes("leases", 0);
    engine.stat_becomes("clients", 2);
    assert!(engine.stat("deaths") >= 21);
    // What they stored stays.
    let mut scheduler = Peer::scheduler(&SchedulerSpec::new(&engine.name));
    let mut worker = Peer::worker(&WorkerSpec::new(&engine.name));
    let found = scheduler.lookup("after", 0, &keys);
    assert_eq!(worker.load(&found.handles, 1), all_loaded(32));
    engine.settles_beside(bystander, (scheduler, worker));
}

#[test]
fn a_client_that_wipes_its_own_life_word_is_reclaimed_and_its_entry_serves_the_next() {
    let engine = EngineProcess::start("wiped", 8);
    let bystander = Bystander::start(&engine.name);
    let mut raw = RawClient::attach(&engine.name, Role::Worker);
    let namespace = raw.register(1, 1, 0, 4096);
    assert_eq!(raw.reserve(namespace, 0, Round { source: 9, number: 1 }, &chain(9, 3)).len(), 3);
    engine.stat_becomes("slots_writing", 3);
    raw.lobby.life_words[raw.entry].futex().store(0, Ordering::Release);
    // The kernel does not mark a word of 0, and yet nothing of the client stays.
    engine.stat_becomes("slots_writing", 0);
    // The client is told, in case another one wiped the word. It would attach again.
    becomes("its status", AttachStatus::Left, || raw.status());
    let next = RawClient::attach(&engine.name, Role::Worker);
    assert_eq!(next.entry, raw.entry, "the entry is free again");
    engine.settles_beside(bystander, (next, raw));
}

/// The engine looks at eight claims and deaths at a time, and reclaims one client at a time. Entries that are dead again and
/// again (here because the engine does not reset their words) keep no other client from attaching, clearing and leaving.
#[test]
fn who_dies_all_the_time_keeps_the_engine_from_nobody() {
    let engine = EngineProcess::start_in(&[(BREAK, Rule::ResetTheWord.name())], "dying", 16);
    for word in &engine.lobby().life_words[..12] {
        word.futex().store(libc::FUTEX_OWNER_DIED, Ordering::Release);
    }
    let mut client = RawClient::attach(&engine.name, Role::Worker);
    assert!(client.entry >= 12, "{}", client.entry);
    assert_eq!(client.call(Request::Clear { namespace: ANY_NAMESPACE }).status, Status::Ok);
    let namespace = client.register(1, 1, 0, Shape::SMALL.shard_bytes());
    assert_eq!(client.reserve(namespace, 0, round(1), &chain(1, 8)).len(), 8);
    engine.stat_becomes("slots_writing", 8);
    client.give_up();
    engine.stat_becomes("slots_writing", 0);
}

/// Nor do entries that are claimed again and again (here because the engine judges outdated claims each time).
#[test]
fn who_claims_all_the_time_keeps_the_engine_from_nobody() {
    let engine = EngineProcess::start_in(&[(BREAK, Rule::OutdatedClaims.name())], "claiming", 16);
    let lobby = engine.lobby();
    for entry in 0..12 {
        lobby.life_words[entry].futex().store(1, Ordering::Release);
        lobby.entries[entry].publish(&EntryContent {
            role: Role::Worker as u32,
            nonce: 1 + entry as u64,
            incarnation: 0,
            pid: 1,
            payload_words: PAYLOAD_WORDS,
            name: "claims".to_owned(),
        });
    }
    let client = RawClient::attach(&engine.name, Role::Scheduler);
    assert!(client.entry >= 12, "{}", client.entry);
}
