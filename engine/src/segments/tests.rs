//! Tests with real segments in `/dev/shm`. Deaths of whole processes are in [`super::deaths`].

use super::found::Found;
use super::*;
use kvring_shm_abi::chunk::ChunkWord;
use kvring_shm_abi::directory::CHUNK_IDS;
use kvring_shm_abi::futex::Deadline;
use kvring_shm_abi::life::Life;
use kvring_shm_abi::segment::SegmentError;
use kvring_shm_abi::superblock::Mismatch;
use kvring_shm_abi::sync::AtomicU32;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;

/// A name for one test alone. `/dev/shm` is cleaned of it before and after the test.
pub(super) struct Name(pub(super) EngineName);

impl Name {
    pub(super) fn new(tag: &str) -> Name {
        let name = EngineName::new(&format!("t-seg-{tag}-{}", std::process::id())).unwrap();
        remove(&name, true, WAIT).unwrap();
        Name(name)
    }

    pub(super) fn setup(&self) -> Setup<'_> {
        Setup {
            name: &self.0,
            geometry: Geometry::new(4 << 20, 1 << 20).unwrap(),
            any_geometry: false,
            beat_interval_us: 10_000,
            policy: "lru",
            wait: WAIT,
            cold: None,
            stop: StopHandle::default(),
        }
    }

    pub(super) fn start(&self) -> Result<Segments, SetupError> {
        Segments::open(&self.setup())
    }

    pub(super) fn path(&self, segment: &str) -> PathBuf {
        segment::path(segment)
    }

    pub(super) fn inodes(&self) -> [u64; 3] {
        [self.0.engine_segment(), self.0.lobby(), self.0.arena()]
            .map(|segment| std::fs::metadata(self.path(&segment)).unwrap().ino())
    }

    /// The names of the files under this engine name.
    pub(super) fn files(&self) -> Vec<String> {
        let files = std::fs::read_dir(segment::SHM_DIR).unwrap();
        files
            .map(|file| file.unwrap().file_name().into_string().unwrap())
            .filter(|file| file.starts_with(&self.0.prefix()))
            .collect()
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        let _ = remove(&self.0, true, Duration::from_millis(10));
    }
}

/// In effect, no limit.
pub(super) const WAIT: Duration = Duration::from_secs(24 * 3600);
const SHORT: Duration = Duration::from_millis(60);

/// Maps the engine's segment as a client does.
pub(super) fn client_view(name: &EngineName) -> (EngineSegment, Identity) {
    let file = SegmentFile::open(&name.engine_segment(), Access::ReadOnly).unwrap();
    let mapping = Arc::new(file.map(file.len().unwrap(), Access::ReadOnly).unwrap());
    let identity = mapping.at::<Superblock>(0).unwrap().read(Kind::Engine, mapping.len() as u64).unwrap();
    (EngineSegment::new(mapping, &identity.geometry, identity.arena_id).unwrap(), identity)
}

pub(super) fn arena_identity(name: &EngineName) -> (Mapping, Identity) {
    let file = SegmentFile::open(&name.arena(), Access::ReadWrite).unwrap();
    let mapping = file.map(file.len().unwrap(), Access::ReadWrite).unwrap();
    let identity = arena_superblock(&mapping).unwrap().read(Kind::Arena, mapping.len() as u64).unwrap();
    (mapping, identity)
}

#[test]
fn a_start_makes_everything_and_a_clean_end_leaves_nothing() {
    let name = Name::new("clean");
    let segments = name.start().unwrap();
    assert_eq!(*segments.start(), Start::First);
    let (engine, identity) = client_view(&name.0);
    assert_eq!(engine.epoch().incarnation(), 1, "odd until the loop serves");
    assert!(engine.life_words.iter().all(|word| matches!(word.life(), Life::Alive { .. })));
    assert_eq!(engine.info().pid.load(Ordering::Relaxed), std::process::id());
    let (_, arena) = arena_identity(&name.0);
    let lobby = segments.lobby.superblock().unwrap().read(Kind::Lobby, LOBBY_BYTES as u64).unwrap();
    assert_eq!([identity.arena_id, arena.arena_id, lobby.arena_id], [segments.arena_id(); 3]);
    assert!(crate::stats::Snapshot::read(&engine.stats).is_ok());
    let mut memory = segments.table_memory();
    let mut headers = |first, count| memory.ensure_headers(first, count);
    assert!(headers(255, 2) && headers(0, 0) && headers(0, 1024));
    assert!(!headers(1000, 25), "there are 1024");
    // A client that looks for a chunk whose record has no memory takes none.
    let file = SegmentFile::open(&name.0.engine_segment(), Access::ReadOnly).unwrap();
    let before = file.allocated_bytes().unwrap();
    assert_eq!([0, 1 << 15, CHUNK_IDS - 1].map(|id| engine.chunks.find(ChunkWord::new(id, 0))), [None; 3]);
    assert_eq!(file.allocated_bytes().unwrap(), before);
    let removed = segments.retire_and_unlink().unwrap();
    assert_eq!((removed.segments, name.files()), (3, vec![]));
    assert!(engine.superblock().is_retired());
    assert!(engine.life_words.iter().all(|word| word.life() == Life::Dead));
}

#[test]
fn a_second_engine_is_refused_while_the_first_lives() {
    let name = Name::new("second");
    let first = name.start().unwrap();
    let before = name.inodes();
    // A start does not wait for a living engine: that would take a day.
    let error = name.start().err().unwrap();
    assert!(
        matches!(&error, SetupError::AlreadyRunning { pid, .. } if *pid == std::process::id()),
        "{error}"
    );
    assert!(matches!(remove(&name.0, false, SHORT), Err(SetupError::AlreadyRunning { .. })));
    assert_eq!(name.inodes(), before);
    assert!(!first.is_retired());
}

#[test]
fn a_start_after_a_death_takes_over_what_there_is() {
    let name = Name::new("warm");
    let first = name.start().unwrap();
    let (view, identity) = client_view(&name.0);
    let (inodes, lobby) = (name.inodes(), first.lobby.clone());
    let serving = first.engine.epoch().begin_serving();
    first.engine.namespaces[3].set_rank(5, 6, 7);
    drop(first);
    assert_eq!(view.life_words[7].life(), Life::Dead);
    let sleeper = std::thread::spawn({
        let (view, _) = client_view(&name.0);
        move || {
            let word = view.epoch().incarnation_word();
            futex::wait_any(&[(word, serving)], Deadline::after(WAIT))
        }
    });
    std::thread::sleep(Duration::from_millis(50));
    let second = name.start().unwrap();
    assert_eq!(sleeper.join().unwrap(), futex::Woken::LookAgain, "the sleeper was not woken");
    assert_eq!(*second.start(), Start::Warm);
    assert_eq!((name.inodes(), second.arena_id()), (inodes, identity.arena_id));
    assert_eq!(view.epoch().incarnation(), serving + 1, "odd until the loop serves");
    assert!(view.life_words.iter().all(|word| matches!(word.life(), Life::Alive { .. })));
    assert_eq!(view.namespaces[3].rank_layout(5), Some((6, 7)));
    assert!(!view.superblock().is_retired() && !lobby.superblock().unwrap().is_retired());
    // If a cold start was asked for, or two recoveries have failed, the start is cold all the same.
    assert_eq!(view.info().recoveries.load(Ordering::Relaxed), 1);
    drop(second);
    drop(name.start().unwrap());
    let fourth = name.start().unwrap();
    assert_eq!(*fourth.start(), Start::Cold(ColdStart::Failed(2)));
    assert!(name.inodes().iter().all(|inode| !inodes.contains(inode)));
    let view = fourth.engine.clone();
    drop(fourth);
    view.info().unhealthy.store(1, Ordering::Relaxed);
    assert_eq!(*name.start().unwrap().start(), Start::Cold(ColdStart::Unhealthy));
}

#[test]
fn without_a_size_asked_for_a_predecessors_geometry_will_do() {
    let name = Name::new("any");
    let geometry = name.start().unwrap().geometry();
    let other = Geometry::new(8 << 20, 2 << 20).unwrap();
    let any = Segments::open(&Setup { geometry: other, any_geometry: true, ..name.setup() }).unwrap();
    assert_eq!((any.start(), any.geometry()), (&Start::Warm, geometry));
}

/// A lobby or an arena that cannot be taken over is swept, unless it is not ours: then it is left alone.
#[test]
fn satellites_that_do_not_belong_make_a_cold_start() {
    let name = Name::new("satellites");
    let path = |segment: String| name.path(&segment);
    type Damage<'a> = (&'a str, &'a dyn Fn());
    let damages: [Damage<'_>; 6] = [
        ("no lobby", &|| std::fs::remove_file(path(name.0.lobby())).unwrap()),
        ("no arena", &|| std::fs::remove_file(path(name.0.arena())).unwrap()),
        ("half an arena", &|| {
            let file = std::fs::OpenOptions::new().write(true).open(path(name.0.arena())).unwrap();
            file.set_len(1 << 20).unwrap();
        }),
        ("an arena of zeros", &|| {
            let file = std::fs::OpenOptions::new().write(true).open(path(name.0.arena())).unwrap();
            let bytes = file.metadata().unwrap().len();
            file.set_len(0).unwrap();
            file.set_len(bytes).unwrap();
        }),
        ("another start's lobby", &|| {
            use std::os::unix::fs::FileExt;
            let file = std::fs::OpenOptions::new().write(true).open(path(name.0.lobby())).unwrap();
            // The arena id lies at offset 32 of every superblock.
            file.write_all_at(&[9; 8], 32).unwrap();
        }),
        ("memory taken from the arena", &|| {
            let (view, _) = client_view(&name.0);
            assert_eq!(view.info().slabs_allocated.load(Ordering::Relaxed), 4);
            std::process::Command::new("fallocate")
                .args(["--punch-hole", "--offset", "1MiB", "--length", "1MiB"])
                .arg(path(name.0.arena()))
                .status()
                .unwrap();
        }),
    ];
    for (what, damage) in damages {
        let first = name.start().unwrap();
        first.arena().allocate(0, 4 << 20).unwrap();
        first.engine.info().slabs_allocated.store(4, Ordering::Relaxed);
        drop(first);
        damage();
        let second = name.start().unwrap();
        assert!(
            matches!(second.start(), Start::Cold(ColdStart::Satellite(_))),
            "{what}: {:?}",
            second.start()
        );
        assert_eq!(name.files().len(), 3, "{what}");
        second.retire_and_unlink().unwrap();
    }
}

#[test]
fn a_cold_start_after_a_death_has_new_inodes_and_retires_and_wakes_the_old() {
    let name = Name::new("restart");
    let first = name.start().unwrap();
    let (old, old_identity) = client_view(&name.0);
    let (old_arena, _) = arena_identity(&name.0);
    let (old_lobby, old_inodes) = (first.lobby.clone(), name.inodes());
    let channel = name.0.client(3, 0xabc);
    drop(SegmentFile::create(&channel, 4096).unwrap());
    // This leaves what the kernel leaves after a death: marked words, a free lock, all segments.
    drop(first);
    assert_eq!(old.life_words[OWNER_WORD].life(), Life::Dead);
    // This sleeps on a word that a death does not change: only the successor's sweep can wake it.
    let sleeper = std::thread::spawn({
        let (view, _) = client_view(&name.0);
        move || sleep_on(view.epoch().incarnation_word(), &view)
    });
    std::thread::sleep(Duration::from_millis(50));
    let second = Segments::open(&Setup { cold: Some(ColdStart::Asked), ..name.setup() }).unwrap();
    assert!(sleeper.join().unwrap(), "the sleeper was not woken");
    assert_eq!(*second.start(), Start::Cold(ColdStart::Asked));
    assert!(name.inodes().iter().all(|inode| !old_inodes.contains(inode)));
    assert_ne!(second.arena_id(), old_identity.arena_id);
    assert!(old.superblock().is_retired());
    assert!(old_lobby.superblock().unwrap().is_retired());
    assert!(arena_superblock(&old_arena).unwrap().is_retired());
    assert_eq!(old.epoch().incarnation(), 1, "nothing was zeroed in place");
    assert!(!second.is_retired());
    assert_eq!(name.files().len(), 3, "the stale channel is gone");
}

/// Sleeps on `word`. True: it was woken, did not time out, and the segment was retired by then.
fn sleep_on(word: &AtomicU32, view: &EngineSegment) -> bool {
    let deadline = Deadline::after(WAIT);
    let value = word.load(Ordering::Acquire);
    while !view.superblock().is_retired() {
        if futex::wait_any(&[(word, value)], deadline) == futex::Woken::TimedOut {
            return false;
        }
    }
    true
}

#[test]
fn a_half_created_segment_is_swept_unless_its_creator_is_still_at_it() {
    let name = Name::new("half");
    for bytes in [0, 100, 4096, 1 << 20] {
        let half = SegmentFile::create(&name.0.engine_segment(), bytes).unwrap();
        drop(SegmentFile::create(&name.0.arena(), 8192).unwrap());
        drop(SegmentFile::create(&name.0.lobby(), 17).unwrap());
        let lock = half.try_lock().unwrap();
        let error = Segments::open(&Setup { wait: SHORT, ..name.setup() }).err().unwrap();
        assert!(matches!(&error, SetupError::Starting { waited_ms, .. } if *waited_ms >= 60), "{error}");
        assert!(half.is_current(), "a locked one stays");
        drop(lock);
        let segments = name.start().unwrap();
        assert_eq!(*segments.start(), Start::Cold(ColdStart::HalfCreated));
        assert!(!half.is_current());
        segments.retire_and_unlink().unwrap();
    }
}

#[test]
fn other_geometries_and_other_builds_start_cold() {
    let name = Name::new("other");
    let old = name.start().unwrap().geometry();
    let larger = Setup { geometry: Geometry::new(8 << 20, 2 << 20).unwrap(), ..name.setup() };
    let segments = Segments::open(&larger).unwrap();
    assert_eq!(*segments.start(), Start::Cold(ColdStart::OtherGeometry { found: old }));
    // The ABI version lies at offset 8 of every superblock: here is another one.
    let view = segments.engine.clone();
    drop(segments);
    write_byte(&name, 8, 99);
    let segments = name.start().unwrap();
    assert_eq!(*segments.start(), Start::Cold(ColdStart::OtherBuild(Mismatch::AbiVersion(99))));
    assert!(view.superblock().is_retired(), "what all builds share is marked in theirs as well");
    // A start leaves an engine of another build alone while that holds its lock.
    write_byte(&name, 8, 98);
    let refused = Segments::open(&Setup { wait: SHORT, ..name.setup() }).err().unwrap();
    assert!(matches!(refused, SetupError::OtherBuild { .. }), "{refused}");
    assert!(segments.engine_file.is_current());
}

fn write_byte(name: &Name, at: u64, value: u8) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::OpenOptions::new().write(true).open(name.path(&name.0.engine_segment())).unwrap();
    file.write_all_at(&[value], at).unwrap();
}

#[test]
fn segments_from_before_a_reboot_are_dead_whatever_their_words_say() {
    if boot_id() == [0, 0] {
        return;
    }
    let name = Name::new("boot");
    let living = name.start().unwrap();
    let (_, identity) = client_view(&name.0);
    let found = || Found::look(&living.engine_file).unwrap();
    assert!(found().living().is_some());
    living.engine.superblock().write(&Identity { boot_id: [0, 0], ..identity });
    assert!(found().living().is_some(), "an unreadable boot id is unknown, not another");
    living.engine.superblock().write(&Identity { boot_id: [1, 2], ..identity });
    assert_eq!(found().living(), None);
}

#[test]
fn a_segment_that_others_may_read_is_refused_and_can_be_removed() {
    let name = Name::new("mode");
    drop(name.start().unwrap());
    for segment in [name.0.engine_segment(), name.0.arena()] {
        let mode =
            |bits| std::fs::set_permissions(name.path(&segment), std::fs::Permissions::from_mode(bits));
        mode(0o644).unwrap();
        let error = name.start().err().unwrap();
        assert!(
            matches!(&error, SetupError::Segment(SegmentError::WrongMode { found: 0o644, .. })),
            "{segment}: {error}"
        );
        mode(0o600).unwrap();
    }
    // Nothing has been destroyed: the segments are taken over as if nothing had been tried.
    let warm = name.start().unwrap();
    assert_eq!((warm.start(), warm.engine.info().recoveries.load(Ordering::Relaxed)), (&Start::Warm, 1));
    drop(warm);
    std::fs::set_permissions(name.path(&name.0.lobby()), std::fs::Permissions::from_mode(0o666)).unwrap();
    let removed = remove(&name.0, false, WAIT).unwrap();
    assert_eq!((removed.segments, name.files()), (3, vec![]));
    assert!(removed.bytes >= LOBBY_BYTES as u64);
}

#[test]
fn somebody_elses_segments_are_refused_and_left_as_they_are() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: only root can give files away");
        return;
    }
    let name = Name::new("owner");
    drop(name.start().unwrap());
    let before = name.inodes();
    for segment in [name.0.engine_segment(), name.0.lobby(), name.0.arena()] {
        let give_to = |user| std::os::unix::fs::chown(name.path(&segment), Some(user), None).unwrap();
        give_to(4711);
        let error = name.start().err().unwrap();
        assert!(
            matches!(&error, SetupError::Segment(SegmentError::WrongOwner { found: 4711, .. })),
            "{segment}: {error}"
        );
        give_to(0);
    }
    assert_eq!((name.start().unwrap().start(), name.inodes()), (&Start::Warm, before));
}

#[test]
fn an_arena_that_does_not_fit_is_refused_with_numbers_and_leaves_nothing() {
    let name = Name::new("large");
    let bytes = (segment::available_bytes() >> 20 << 20) + (64 << 20);
    let setup = Setup { geometry: Geometry::new(bytes, 1 << 20).unwrap(), ..name.setup() };
    let error = Segments::open(&setup).err().unwrap();
    assert!(matches!(&error, SetupError::NoRoom(no) if no.needed.0 > no.left.usable()), "{error}");
    let text = error.to_string();
    assert!(text.contains("--arena") && text.contains("GiB"), "{text}");
    assert_eq!(name.files(), Vec::<String>::new());
}

#[test]
fn force_takes_a_living_engines_segments_and_that_one_does_not_touch_its_successors() {
    let name = Name::new("force");
    let first = name.start().unwrap();
    let removed = remove(&name.0, true, SHORT).unwrap();
    assert_eq!((removed.forced_pid, removed.segments), (Some(std::process::id()), 3));
    assert!(first.is_retired(), "the engine sees it");
    assert!(matches!(first.engine.life_words[OWNER_WORD].life(), Life::Alive { .. }));
    let inodes = std::thread::scope(|scope| {
        scope
            .spawn(|| {
                let second = name.start().unwrap();
                assert_eq!(*second.start(), Start::First);
                name.inodes()
            })
            .join()
            .unwrap()
    });
    assert_eq!(first.retire_and_unlink().unwrap(), Removed::default());
    assert_eq!(name.inodes(), inodes, "the names are the successor's");
}

#[test]
fn remove_sweeps_leftovers_without_an_engine() {
    let name = Name::new("left");
    assert_eq!(remove(&name.0, false, WAIT).unwrap(), Removed::default());
    drop(SegmentFile::create(&name.0.lobby(), 4096).unwrap());
    drop(SegmentFile::create(&name.0.client(1, 2), 4096).unwrap());
    assert_eq!(remove(&name.0, false, WAIT).unwrap().segments, 2);
    assert_eq!(name.files(), Vec::<String>::new());
    drop(SegmentFile::create(&name.0.arena(), 4096).unwrap());
    assert_eq!(*name.start().unwrap().start(), Start::First, "a start sweeps them as well");
}

#[test]
fn of_many_starts_at_once_one_wins() {
    let name = Name::new("race");
    for round in 0..20 {
        let barrier = std::sync::Barrier::new(4);
        let over = std::sync::Barrier::new(4);
        let winners: usize = std::thread::scope(|scope| {
            let starts: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        barrier.wait();
                        let result = name.start();
                        // The start that wins lives until all others have been refused.
                        over.wait();
                        match result {
                            Ok(segments) => {
                                assert!(segments.engine_file.is_current());
                                1
                            }
                            Err(SetupError::AlreadyRunning { .. }) => 0,
                            Err(error) => panic!("{error}"),
                        }
                    })
                })
                .collect();
            starts.into_iter().map(|start| start.join().unwrap()).sum()
        });
        assert_eq!(winners, 1, "round {round}");
        assert_eq!(name.files().len(), 3);
    }
}
