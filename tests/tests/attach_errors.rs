//! Engines that a client cannot attach to: each is a typed error with the values in its message, leaves nothing behind, and
//! ends by itself once its reason is gone. Clients that were attached before do not notice.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_adapter::{Client, ClientOptions, ConfigError, Health, Role};
use kvring_shm_abi::layout::LAYOUT_HASH;
use kvring_shm_abi::lobby::CLIENTS_MAX;
use kvring_shm_abi::superblock::ABI_VERSION;
use kvring_tests::attempts::{Others, fails_cleanly, mends_itself};
use kvring_tests::engine::claimed_entries;
use kvring_tests::isolate::{Footprint, is_root};
use kvring_tests::{
    Bystander, ClientSpec, EngineProcess, LIMIT, Peer, SchedulerSpec, becomes, chain, client, eventually,
    isolated, segments, unique_name,
};
use nix::sys::signal::Signal;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::time::Duration;

/// Offsets in a superblock, which is 256 bytes at the start of a segment (of the arena: at its end).
const MAGIC_AT: u64 = 0;
const ABI_VERSION_AT: u64 = 8;
const LAYOUT_HASH_AT: u64 = 16;
const ARENA_ID_AT: u64 = 32;
const ARENA_BYTES_AT: u64 = 64;
const SLAB_BYTES_AT: u64 = 72;

/// Changes eight bytes of a segment, and gives back what was there.
fn patch(engine: &EngineProcess, segment: &str, at: u64, value: u64) -> u64 {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(engine.file(segment)).unwrap();
    let mut before = [0; 8];
    file.read_exact_at(&mut before, at).unwrap();
    file.write_all_at(&value.to_le_bytes(), at).unwrap();
    u64::from_le_bytes(before)
}

#[test]
fn names_and_options_that_cannot_be_are_errors_at_construction() {
    let with = |change: fn(&mut ClientOptions)| {
        let mut options = ClientOptions::default();
        change(&mut options);
        Client::new(Role::Worker, options).err().map(|error| error.to_string()).unwrap_or_default()
    };
    assert!(with(|o| o.engine = "a/b".into()).contains("\"a/b\""));
    assert!(with(|o| o.engine = String::new()).contains("1 to 64 characters"));
    assert!(with(|o| o.payload_bytes = 17).contains("got 17"));
    assert!(with(|o| o.operation_timeout = Duration::ZERO).contains("operation_timeout"));
    let name = ClientOptions { engine: "x".repeat(65), ..ClientOptions::default() };
    assert!(matches!(Client::new(Role::Scheduler, name), Err(ConfigError::Name(_))));
}

#[test]
fn a_missing_engine_is_a_state_that_says_how_to_start_one() {
    isolated("a_missing_engine_is_a_state_that_says_how_to_start_one", || {
        let name = unique_name("missing");
        let before = Footprint::now(&name);
        for role in [Role::Scheduler, Role::Worker] {
            let alone = client(role, &ClientSpec::new(&name));
            becomes("health", Health::Absent, || alone.health());
            let error = alone.diagnose().unwrap().to_string();
            assert!(error.contains(&format!("kvring serve --name {name}")), "{error}");
            assert!(alone.clear().unwrap_err().to_string().contains("absent"));
            drop(alone);
            becomes("what is left", before.clone(), || Footprint::now(&name));
        }
        assert!(segments(&name).is_empty());
    });
}

#[test]
fn another_abi_or_layout_is_refused_and_those_who_are_attached_go_on() {
    isolated("another_abi_or_layout_is_refused_and_those_who_are_attached_go_on", || {
        let engine = EngineProcess::start("abi", 64);
        let others = Others { lobby: engine.lobby(), count: 2 };
        let fails = |role, parts: &[&str]| fails_cleanly(&engine, &others, role, parts);
        let bystander = Bystander::start(&engine.name);
        let arena_bytes = 64u64 << 20;
        let abi = format!("expected ABI version {ABI_VERSION}, found 77");
        let layout = format!("expected layout {LAYOUT_HASH:#018x}, found 0x0000000000001234");
        let geometry = "got an arena of 67108864 bytes with slabs of 3145728";
        // ABI version and kind share a word: the upper half stays.
        let kind = |segment| match segment {
            "engine" => 1u64 << 32,
            "lobby" => 2 << 32,
            _ => 4 << 32,
        };
        for (segment, base) in [("engine", 0), ("lobby", 0), ("arena", arena_bytes)] {
            // Only workers open the arena.
            let role = if segment == "arena" { Role::Worker } else { Role::Scheduler };
            let file = format!("kvring.{}.{segment}", engine.name);
            let cases: [(u64, u64, &[&str]); 6] = [
                (ABI_VERSION_AT, kind(segment) | 77, &["incompatible", &file, &abi]),
                (LAYOUT_HASH_AT, 0x1234, &["incompatible", &file, &layout]),
                (ABI_VERSION_AT, 9 << 32 | u64::from(ABI_VERSION), &["incompatible", &file, "found 9"]),
                (SLAB_BYTES_AT, 3 << 20, &["incompatible", &file, geometry]),
                // A segment that is half made, or another start's: both pass by themselves, so they are no error.
                (MAGIC_AT, 0, &["attaching"]),
                (ARENA_ID_AT, 5, &["attaching"]),
            ];
            for (at, value, parts) in cases {
                if segment == "engine" && at == ARENA_ID_AT {
                    continue;
                }
                let right = patch(&engine, segment, base + at, value);
                fails(role, parts);
                mends_itself(&engine, role, || {
                    patch(&engine, segment, base + at, right);
                });
                bystander.goes_on();
            }
        }
        // Another geometry: the arena is shorter than the engine's segment says, or the other segments differ.
        let right = patch(&engine, "engine", ARENA_BYTES_AT, 128 << 20);
        fails(Role::Worker, &["expected", "found"]);
        patch(&engine, "engine", ARENA_BYTES_AT, right);
        engine.settles_beside(bystander, ());
    });
}

#[test]
fn a_segment_of_the_wrong_mode_or_owner_is_refused() {
    isolated("a_segment_of_the_wrong_mode_or_owner_is_refused", || {
        let engine = EngineProcess::start("mode", 16);
        let others = Others { lobby: engine.lobby(), count: 2 };
        let fails = |role, parts: &[&str]| fails_cleanly(&engine, &others, role, parts);
        let bystander = Bystander::start(&engine.name);
        for segment in ["engine", "lobby", "arena"] {
            let path = engine.file(segment);
            let file = format!("kvring.{}.{segment}", engine.name);
            let mode = |bits| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(bits)).unwrap();
            mode(0o666);
            fails(Role::Worker, &["refused", &file, "expected mode 0600, found 0666"]);
            mends_itself(&engine, Role::Worker, || mode(0o600));
            if is_root("a segment of the wrong owner") {
                let own = |uid| std::os::unix::fs::chown(&path, Some(uid), None).unwrap();
                own(12345);
                fails(Role::Worker, &["refused", &file, "uid 0", "found one of uid 12345"]);
                mends_itself(&engine, Role::Worker, || own(0));
            }
            bystander.goes_on();
        }
        engine.settles_beside(bystander, ());
    });
}

#[test]
fn a_segment_that_is_gone_or_too_short_is_refused() {
    isolated("a_segment_that_is_gone_or_too_short_is_refused", || {
        let engine = EngineProcess::start("gone", 16);
        let others = Others { lobby: engine.lobby(), count: 0 };
        let fails = |role, parts: &[&str]| fails_cleanly(&engine, &others, role, parts);
        for segment in ["engine", "lobby", "arena"] {
            let path = engine.file(segment);
            let mode = |bits| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(bits)).unwrap();
            // Stopped, because an engine that sees that its name is gone ends.
            engine.stop();
            // Gone: as if half of the segments had been removed by hand.
            let aside = path.with_extension("aside");
            std::fs::rename(&path, &aside).unwrap();
            let said = if segment == "engine" { "absent" } else { "no shared memory segment" };
            fails(Role::Worker, &[said]);
            // Too short for what it should hold.
            std::fs::write(&path, [0u8; 100]).unwrap();
            mode(0o600);
            let said: &[&str] = if segment == "engine" { &["attaching"] } else { &["found 100"] };
            fails(Role::Worker, said);
            mends_itself(&engine, Role::Worker, || {
                std::fs::rename(&aside, &path).unwrap();
                engine.send(Signal::SIGCONT);
            });
            engine.resume();
            engine.settles(0);
        }
    });
}

#[test]
fn another_users_engine_is_refused() {
    if !is_root("another user's engine") {
        return;
    }
    let (engine, bystander) = EngineProcess::with_bystander("user");
    let mut stranger = Peer::spawn();
    stranger.become_user(65534);
    stranger.add_scheduler(&SchedulerSpec::new(&engine.name));
    eventually("the stranger is refused", || stranger.health().starts_with("refused"));
    let said = stranger.health();
    assert!(said.contains(&format!("kvring.{}.engine", engine.name)), "{said}");
    assert!(said.contains("(uid 65534), found one of uid 0; run this as that user"), "{said}");
    assert_eq!(stranger.lookup("r", 0, &chain(1, 3)).chunks, 0, "it runs without");
    engine.settles_beside(bystander, stranger);
}

#[test]
fn the_client_after_the_last_entry_is_refused_until_one_is_free() {
    isolated("the_client_after_the_last_entry_is_refused_until_one_is_free", || {
        let engine = EngineProcess::start("crowd", 16);
        let others = Others { lobby: engine.lobby(), count: CLIENTS_MAX };
        let fails = |role, parts: &[&str]| fails_cleanly(&engine, &others, role, parts);
        let bystander = Bystander::start(&engine.name);
        let spec = ClientSpec::new(&engine.name);
        let mut crowd: Vec<_> = (2..CLIENTS_MAX).map(|_| client(Role::Scheduler, &spec)).collect();
        for one in &crowd {
            one.wait_ready(LIMIT).unwrap();
        }
        engine.stat_becomes("clients", CLIENTS_MAX as u64);
        let last = crowd.pop().unwrap();
        last.noop().unwrap();
        crowd.push(last);
        fails(Role::Scheduler, &["refused", "client table is full", "all 64 entries"]);
        let late = client(Role::Scheduler, &spec);
        eventually("the late one is refused", || late.health().to_string().contains("all 64 entries"));
        bystander.goes_on();
        // When one leaves, the late one attaches by itself.
        drop(crowd.pop());
        late.wait_ready(LIMIT).unwrap();
        late.noop().unwrap();
        engine.settles_beside(bystander, (crowd, late));
    });
}

/// Keepers claim an entry and make a channel, and a stopped engine does not answer: they give both back each time.
#[test]
fn an_attachment_that_is_never_answered_leaves_nothing_behind() {
    isolated("an_attachment_that_is_never_answered_leaves_nothing_behind", || {
        let engine = EngineProcess::start("mute", 16);
        let lobby = engine.lobby();
        let before = Footprint::now(&engine.name);
        engine.stop();
        let spec = ClientSpec { attach_ms: 30, ..ClientSpec::new(&engine.name) };
        let newcomers: Vec<_> = (0..3).map(|_| client(Role::Worker, &spec)).collect();
        for newcomer in &newcomers {
            becomes("health", Health::Stalled, || newcomer.health());
        }
        // One of them gives up, and the others attach when the engine goes on.
        newcomers[0].shutdown();
        engine.resume();
        newcomers[1].wait_ready(LIMIT).unwrap();
        newcomers[2].wait_ready(LIMIT).unwrap();
        engine.stat_becomes("clients", 2);
        becomes("claimed entries", 2, || claimed_entries(&lobby));
        drop(newcomers);
        becomes("what is left", before, || Footprint::now(&engine.name));
        engine.settles(0);
    });
}
