//! Tests of what others may do under our names: files that are not ours, modes that are changed, names that are
//! removed. Also tests that a start refuses before it destroys.

use super::tests::{Name, WAIT, arena_identity, client_view};
use super::*;
use kvring_shm_abi::segment::SegmentError;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

/// Files and directories under our names that are not ours. Everybody can make a directory there; root can also
/// give a file away.
struct Strangers(Vec<PathBuf>);

impl Strangers {
    fn at(name: &Name, segments: &[&str]) -> Strangers {
        let root = nix::unistd::geteuid().is_root();
        if !root {
            eprintln!("only root can give files away: tried with directories alone");
        }
        let mut made = Vec::new();
        for segment in segments {
            let path = name.path(segment);
            std::fs::create_dir(&path).unwrap();
            made.push(path);
            if root && segment.contains("client") {
                let path = name.path(&format!("{segment}.given-away"));
                std::fs::write(&path, "theirs").unwrap();
                std::os::unix::fs::chown(&path, Some(4711), None).unwrap();
                made.push(path);
            }
        }
        Strangers(made)
    }

    fn are_untouched(&self) -> bool {
        self.0.iter().all(|path| path.exists())
    }
}

impl Drop for Strangers {
    fn drop(&mut self) {
        for path in &self.0 {
            // The path is one of the two kinds.
            let _ = std::fs::remove_dir(path).or_else(|_| std::fs::remove_file(path));
        }
    }
}

#[test]
fn strangers_among_the_channels_are_left_and_keep_nobody_from_starting_ending_or_removing() {
    let name = Name::new("strangers");
    let channel = format!("/{}client.0.x", name.0.prefix());
    let strangers = Strangers::at(&name, &[&channel]);
    name.start().unwrap().retire_and_unlink().unwrap();
    assert_eq!(name.files().len(), strangers.0.len(), "{:?}", name.files());
    // First a cold start sweeps a dead engine's segments, then a removal those of another one.
    drop(name.start().unwrap());
    let bytes = files::bytes_held(&name.0);
    let cold = Segments::open(&Setup { cold: Some(ColdStart::Asked), ..name.setup() }).unwrap();
    assert_eq!(*cold.start(), Start::Cold(ColdStart::Asked));
    files::unlink_channels_of(&name.0, 0);
    drop(cold);
    let removed = remove(&name.0, false, WAIT).unwrap();
    assert_eq!((removed.segments, removed.bytes), (3, bytes), "the strangers' bytes do not count");
    assert!(strangers.are_untouched());
    assert_eq!(name.files().len(), strangers.0.len(), "{:?}", name.files());
}

#[test]
fn a_start_is_refused_before_anything_is_swept() {
    let name = Name::new("refused");
    drop(name.start().unwrap());
    let (view, identity) = client_view(&name.0);
    let before = name.inodes();
    let untouched = |what: &str, setup: &Setup<'_>| {
        let error = Segments::open(setup).err().unwrap_or_else(|| panic!("{what}: started"));
        assert_eq!(name.inodes(), before, "{what}");
        assert!(!view.superblock().is_retired(), "{what}");
        error
    };
    let huge = Geometry::new(1 << 42, 1 << 30).unwrap();
    let error = untouched("no room", &Setup { geometry: huge, ..name.setup() });
    assert!(matches!(error, SetupError::NoRoom(_)), "{error}");
    let error = untouched("no room", &Setup { geometry: huge, cold: Some(ColdStart::Asked), ..name.setup() });
    assert!(matches!(error, SetupError::NoRoom(_)), "{error}");
    let stop = StopHandle::default();
    stop.stop();
    let error = untouched("asked to stop", &Setup { stop, cold: Some(ColdStart::Asked), ..name.setup() });
    assert!(matches!(error, SetupError::Stopped), "{error}");
    // A dropped claim has changed nothing either.
    drop(Claim::new(&Setup { cold: Some(ColdStart::Asked), ..name.setup() }).unwrap());
    assert_eq!(name.inodes(), before);
    if nix::unistd::geteuid().is_root() {
        for segment in [name.0.lobby(), name.0.arena()] {
            let give_to = |user| std::os::unix::fs::chown(name.path(&segment), Some(user), None).unwrap();
            give_to(4711);
            let error = untouched(&segment, &Setup { cold: Some(ColdStart::Asked), ..name.setup() });
            assert!(
                matches!(&error, SetupError::Segment(SegmentError::WrongOwner { found: 4711, .. })),
                "{error}"
            );
            give_to(0);
        }
    } else {
        eprintln!("SKIPPED the part with another user's lobby: only root can give files away");
    }
    let warm = name.start().unwrap();
    assert_eq!((warm.start(), warm.arena_id()), (&Start::Warm, identity.arena_id));
}

#[test]
fn a_name_that_leads_to_no_file_is_refused_and_nothing_is_made_or_swept() {
    let name = Name::new("no-file");
    for segment in [name.0.lobby(), name.0.arena()] {
        let strangers = Strangers::at(&name, &[&segment]);
        let error = name.start().err().unwrap();
        assert!(matches!(&error, SetupError::NoFile { name } if *name == segment), "{error}");
        assert_eq!(name.files().len(), 1, "{:?}", name.files());
        assert!(strangers.are_untouched());
    }
}

#[test]
fn a_clean_end_leaves_nothing_whatever_modes_its_files_have_by_then() {
    let name = Name::new("modes");
    for segment in [name.0.engine_segment(), name.0.lobby(), name.0.arena()] {
        let segments = name.start().unwrap();
        std::fs::set_permissions(name.path(&segment), std::fs::Permissions::from_mode(0o640)).unwrap();
        assert_eq!(segments.lost_name(), None, "{segment}");
        let (view, lobby) = (segments.engine.clone(), segments.lobby.clone());
        let (arena, _) = arena_identity_whatever_its_mode(&name);
        assert_eq!(segments.retire_and_unlink().unwrap().segments, 3, "{segment}");
        assert_eq!(name.files(), Vec::<String>::new(), "{segment}");
        let retired = [view.superblock(), lobby.superblock().unwrap(), arena_superblock(&arena).unwrap()];
        assert!(retired.iter().all(|block| block.is_retired()), "{segment}");
    }
}

/// Maps the arena as a client that did so before its mode was changed.
fn arena_identity_whatever_its_mode(name: &Name) -> (Mapping, Identity) {
    let path = name.path(&name.0.arena());
    let before = std::fs::metadata(&path).unwrap().permissions();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    let found = arena_identity(&name.0);
    std::fs::set_permissions(&path, before).unwrap();
    found
}

#[test]
fn an_engine_that_has_lost_a_name_sees_it_and_takes_away_what_is_its_own_alone() {
    let name = Name::new("lost");
    for lost in [name.0.engine_segment(), name.0.lobby(), name.0.arena()] {
        let segments = name.start().unwrap();
        let (arena, _) = arena_identity(&name.0);
        assert_eq!(segments.lost_name(), None);
        std::fs::remove_file(name.path(&lost)).unwrap();
        assert_eq!(segments.lost_name(), Some(lost.as_str()));
        segments.retire_and_unlink().unwrap();
        assert_eq!(name.files(), Vec::<String>::new(), "{lost}");
        assert!(arena_superblock(&arena).unwrap().is_retired(), "its clients let go of it");
    }
    // Now a successor starts before the first engine ends.
    let first = name.start().unwrap();
    let (arena, _) = arena_identity(&name.0);
    std::fs::remove_file(name.path(&name.0.engine_segment())).unwrap();
    let (second, inodes) = std::thread::scope(|scope| {
        scope
            .spawn(|| name.start().map(|second| (second.start().clone(), name.inodes())))
            .join()
            .unwrap()
            .unwrap()
    });
    assert_eq!(second, Start::First);
    first.retire_and_unlink().unwrap();
    assert_eq!(name.inodes(), inodes, "the names are the successor's");
    assert!(arena_superblock(&arena).unwrap().is_retired());
}
