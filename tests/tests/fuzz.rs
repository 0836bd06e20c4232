//! Nonsense by the thousand, from a seed: random slots, damaged and well-formed requests with senseless arguments, noise in
//! payload areas, channel files and lobby entries. The engine lives, a bystander's verified traffic goes on, and nothing is
//! left.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_shm_abi::chunk::ChunkWord;
use kvring_shm_abi::engine_segment::AttachStatus;
use kvring_shm_abi::lobby::{ENTRIES_AT, Role};
use kvring_shm_abi::message::{Request, SlotOutcome, SlotRecord};
use kvring_tests::engine::shard_of;
use kvring_tests::fuzz::Nonsense;
use kvring_tests::raw::{PAYLOAD_WORDS, registration};
use kvring_tests::{Bystander, Claimed, EngineProcess, RawClient, eventually, soak, stat_of};
use std::os::unix::fs::FileExt;

/// Behind the lobby's superblock.
const DOORBELL_AT: u64 = 256;

/// Nothing happened to the bystander but the clears of other clients.
fn unharmed(mut engine: EngineProcess, bystander: Bystander) {
    let traffic = bystander.finish();
    assert_eq!((traffic.wrong, traffic.failed), (0, 0), "{traffic:?}");
    assert_eq!(engine.ended(), None);
    engine.settles(0);
}

/// Writes noise where the engine looks for arguments; some of it are keys and slots that exist.
fn scribble(raw: &RawClient, random: &mut Nonsense) {
    let words: Vec<u64> = (0..random.below(2000))
        .map(|_| match random.below(4) {
            0 => random.bits(),
            1 => random.below(5000),
            2 => 0xf0ff,
            _ => random.below(64),
        })
        .collect();
    let at = random.below(u64::from(PAYLOAD_WORDS) - words.len() as u64) as u32;
    raw.payload.write(at, &words).unwrap();
}

#[test]
fn messages() {
    let (engine, bystander) = EngineProcess::with_bystander("messages");
    let mut random = Nonsense::new(1);
    let mut sent = 0u64;
    let mut breaches = 0;
    while sent < 30_000 * soak() {
        let role = if random.one_in(2) { Role::Worker } else { Role::Scheduler };
        let mut raw = RawClient::attach(&engine.name, role);
        let mut namespace = engine.namespace(99);
        if role == Role::Worker {
            namespace = raw.register(1 + random.below(3), 1, 0, 8192);
        }
        for _ in 0..2000 {
            // Its answers are read, or they would overrun each other.
            while raw.poll().is_some() {}
            if raw.status() != AttachStatus::Attached {
                breaches += 1;
                break;
            }
            if random.one_in(20) {
                scribble(&raw, &mut random);
            }
            let request = random.request(namespace);
            let body = match random.below(400) {
                0 => random.body(),
                1..=3 => {
                    let body = request.encode(1, raw.ident);
                    random.damage(body)
                }
                _ => request.encode(random.bits() as u16, raw.ident),
            };
            raw.submissions.push(&body);
            sent += 1;
            if random.one_in(8) {
                raw.ring();
                // Waits for the engine, so that it looks at most messages before a breach ends the attachment.
                let requests = engine_requests(&raw);
                eventually("the engine takes them, or has had enough", || {
                    engine_requests(&raw) != requests
                        || raw.status() != AttachStatus::Attached
                        || raw.poll().is_some()
                });
            }
            if random.one_in(200) {
                break;
            }
        }
    }
    assert!(breaches > 20, "{breaches} breaches in {sent} messages");
    unharmed(engine, bystander);
}

fn engine_requests(raw: &RawClient) -> u64 {
    stat_of(&raw.view, "requests")
}

/// Well-formed requests of registered clients with arguments in range, in any order: only the cache itself can refuse them.
#[test]
fn good_messages_in_a_senseless_order() {
    let engine = EngineProcess::start("order", 8);
    let bystander = Bystander::start(&engine.name);
    let mut random = Nonsense::new(2);
    let mut invalidated = 0;
    for _ in 0..6 * soak() {
        let mut workers: Vec<RawClient> =
            (0..2).map(|_| RawClient::attach(&engine.name, Role::Worker)).collect();
        let mut scheduler = RawClient::attach(&engine.name, Role::Scheduler);
        let mut namespace = 0;
        for (rank, worker) in (0..).zip(&mut workers) {
            namespace = worker.register(7, 2, rank, 40_000);
        }
        // Chunks that were found; they may be gone by now.
        let mut known = vec![ChunkWord::new(0, 0)];
        let mut held = Vec::new();
        for _ in 0..1500 {
            let rank = random.below(2) as usize;
            let worker = &mut workers[rank];
            // So few different keys that both ranks often store the same ones, and chunks become visible.
            let keys: Vec<_> = (0..1 + random.below(40)).map(|_| [0xf0ff, random.below(12)]).collect();
            match random.below(10) {
                0..=2 => {
                    let (source, number) = (random.below(2) as u32, random.below(2) as u32);
                    let round = kvring_adapter::Round { source, number };
                    held.extend(worker.reserve(namespace, rank as u32, round, &keys));
                }
                3 | 4 if !held.is_empty() => {
                    let from = random.below(held.len() as u64) as usize;
                    let slots = held.split_off(from);
                    worker.finish(&slots, random.one_in(2));
                    held.extend(slots.into_iter().filter(|_| random.one_in(10)));
                }
                5..=7 => {
                    let (session, admission) = (random.below(5), random.below(3) as u32);
                    let found = scheduler.search(namespace, &keys);
                    let hold = scheduler.hold_request(session, admission, namespace, 0, &found);
                    if scheduler.call(hold).results[0] > 0 && random.one_in(2) {
                        // A rank says that its shard of the first chunk is damaged, or that the other rank's is.
                        let word = found[0];
                        known.push(word);
                        if let Some((slot, found)) = shard_of(&worker.view, word, 2, random.below(2) as u32) {
                            let (slot, generation) = (u64::from(slot), found.word.generation);
                            let damaged = SlotRecord { slot, generation, key: keys[0], checksum: 0 };
                            invalidated += u32::from(worker.invalidate(damaged) == SlotOutcome::Done);
                        }
                    }
                }
                8 if random.one_in(3) => {
                    // Declares as after a restart: some of what it holds, and leases that it may not have.
                    let from = random.below(held.len() as u64 + 1) as usize;
                    worker.declare(&held[from..]);
                    let (session, admission) = (random.below(5), random.below(3) as u32);
                    let nonsense = ChunkWord::from_bits(random.bits());
                    let words = [random.pick(&known), random.pick(&known), nonsense, random.pick(&known)];
                    let words = &words[..random.below(5) as usize];
                    let first = random.below(3) as u32;
                    let declared = scheduler.hold_request(session, admission, namespace, first, words);
                    scheduler.call(declared);
                    if random.one_in(3) {
                        worker.call(Request::DeclareEnd);
                    }
                }
                8 => {
                    let (session, admission) = (random.below(5), random.below(3) as u32);
                    scheduler.call(Request::Release { session, admission, keep: random.below(4) as u32 });
                }
                _ if random.one_in(30) => drop(scheduler.call(Request::Clear { namespace })),
                _ => drop(scheduler.call(Request::EndSession { session: random.below(5) })),
            }
        }
        // They end with leases and reservations open.
    }
    assert!(invalidated > 0);
    assert_eq!(engine.stat("breaches"), 0);
    unharmed(engine, bystander);
}

#[test]
fn claims_entries_and_channels() {
    let engine = EngineProcess::start("claims", 8);
    let bystander = Bystander::start(&engine.name);
    let lobby = std::fs::OpenOptions::new().write(true).open(engine.file("lobby")).unwrap();
    let mut random = Nonsense::new(3);
    let namespace = engine.namespace(99);
    let mut attached = 0;
    for _ in 0..1500 * soak() {
        let claim = Claimed::new(&engine.name, if random.one_in(2) { Role::Worker } else { Role::Scheduler });
        if random.one_in(2) {
            // Noise in its channel, most often in the header.
            let length = claim.file().metadata().unwrap().len();
            let end = if random.one_in(4) { length } else { 1024 };
            for _ in 0..1 + random.below(8) {
                let at = random.below(end - 8);
                claim.file().write_all_at(&random.bits().to_le_bytes(), at).unwrap();
            }
        }
        let damage = random.below(8);
        let mut client = claim.publish_only(|entry| match damage {
            0 => entry.role = random.edgy(),
            1 => entry.payload_words = random.edgy(),
            2 => entry.incarnation = random.edgy(),
            3 => entry.nonce = random.bits(),
            _ => {}
        });
        if damage == 4 {
            // Noise in its own entry, while the engine may be reading it.
            let at = ENTRIES_AT as u64 + client.entry as u64 * 128;
            for _ in 0..10 {
                lobby.write_all_at(&random.bits().to_le_bytes(), at + random.below(15) * 8).unwrap();
            }
            client.ring();
        }
        if random.one_in(16) {
            // Every client may write the doorbell: at worst somebody is late.
            lobby.write_all_at(&random.edgy().to_le_bytes(), DOORBELL_AT).unwrap();
        }
        if random.one_in(3) {
            for _ in 0..50 {
                if client.status() == AttachStatus::Attached {
                    attached += 1;
                    let body = random.request(namespace).encode(1, client.ident);
                    client.send_body(&body);
                    break;
                }
                std::thread::yield_now();
            }
        }
        if random.one_in(2) {
            client.give_up();
        }
    }
    assert!(attached > 0);
    unharmed(engine, bystander);
}

/// Thousands of registrations with one wrong field each.
#[test]
fn registrations() {
    let engine = EngineProcess::start("records", 8);
    let bystander = Bystander::start(&engine.name);
    let mut random = Nonsense::new(4);
    let mut raw = RawClient::attach(&engine.name, Role::Worker);
    for _ in 0..3000 * soak() {
        if raw.status() != AttachStatus::Attached {
            drop(raw);
            raw = RawClient::attach(&engine.name, Role::Worker);
        }
        let mut record = registration(random.below(200), 1 + random.below(3) as u32, 0, 4096);
        match random.below(8) {
            0 => record.world = random.edgy(),
            1 => record.rank = random.edgy(),
            2 => record.shard_bytes = random.bits(),
            3 => record.shard_bytes = u64::from(random.edgy()),
            4 => record.chunk_tokens = random.edgy(),
            5 => record.model = core::array::from_fn(|_| random.bits() as u8),
            6 => record.fingerprint = core::array::from_fn(|_| random.below(2)),
            _ => record.layout = random.below(2),
        }
        raw.payload.write(0, bytemuck::cast_slice(&[record])).unwrap();
        raw.send(Request::Register { record: 0 });
        eventually("an answer, or the end", || {
            raw.poll().is_some() || raw.status() != AttachStatus::Attached
        });
    }
    drop(raw);
    unharmed(engine, bystander);
}
