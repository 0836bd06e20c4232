//! What the engine is told, and when.

use super::*;
use crate::link::tests::{FakeEngine, pair};
use kvring_shm_abi::chunk::ChunkIdentity;
use kvring_shm_abi::message::Status;

const NAMESPACE: u32 = 256;
const CHUNK_BYTES: u64 = 4096;

/// An engine that the test plays, with eight visible chunks, of which one client may hold `bytes`.
fn engine(tag: &str, bytes: u64) -> (Arc<Link>, FakeEngine, Vec<ChunkWord>) {
    let (link, engine) = pair(tag);
    let chunks = &link.engine.chunks;
    chunks.set_ready(8, 0);
    for id in 0..8 {
        let identity = ChunkIdentity { key: [u64::from(id), 7], namespace: NAMESPACE };
        assert!(chunks.show(id, identity, &[id], &[], |_| None));
    }
    link.engine.terms().set_share(ClientShare { bytes, pins: 100, leases: 10 });
    let words = (0..8).map(|id| chunks.word(id).unwrap()).collect();
    (link, engine, words)
}

fn hold(leases: &Leases, link: &Link, name: Name, words: &[ChunkWord]) -> (usize, bool) {
    let found = Found { name, namespace: NAMESPACE, chunk_bytes: CHUNK_BYTES, words };
    let kept = leases.hold(link, found);
    (kept.words.len(), kept.is_cut)
}

/// What the engine has been sent since the last call.
fn sent(engine: &mut FakeEngine) -> Vec<Request> {
    core::iter::from_fn(|| engine.next()).map(|(_, request)| request).collect()
}

#[test]
fn what_was_declared_by_an_attachment_is_not_declared_by_it_again_and_its_release_is_due() {
    let (link, mut engine, words) = engine("ledger-declares", u64::MAX);
    let leases = Leases::default();
    leases.begin_declaring(Some(link.nonce));
    assert_eq!(hold(&leases, &link, (1, 0), &words[..4]), (4, false));
    assert_eq!(hold(&leases, &link, (2, 0), &words[4..]), (4, false));
    assert_eq!(sent(&mut engine), [], "nothing is sent past the declaration");
    let piece = leases.next_to_declare().unwrap();
    assert_eq!((piece.name, piece.first, piece.words.len()), ((1, 0), 0, 4));
    // The attempt fails. Meanwhile one that is declared, and one that is not, are released.
    leases.begin_declaring(Some(link.nonce));
    leases.release((1, 0), 0);
    leases.release((2, 0), 0);
    assert!(leases.next_to_declare().is_none());
    hold(&leases, &link, (4, 0), &words);
    assert_eq!(
        leases.next_to_declare().unwrap().owed,
        [Request::Release { session: 1, admission: 0, keep: 0 }]
    );
    leases.release((4, 0), 0);
    // By another attachment everything is declared anew.
    assert_eq!(hold(&leases, &link, (3, 0), &words), (8, false));
    assert_eq!(leases.next_to_declare().unwrap().name, (3, 0));
    leases.begin_declaring(Some(link.nonce));
    assert!(leases.next_to_declare().is_none());
    leases.begin_declaring(Some(link.nonce + 1));
    assert_eq!(leases.next_to_declare().unwrap().name, (3, 0));
}

#[test]
fn the_release_of_what_is_being_declared_is_sent_behind_it() {
    let (link, mut engine, words) = engine("ledger-owed", u64::MAX);
    let leases = Leases::default();
    leases.begin_declaring(Some(link.nonce));
    hold(&leases, &link, (1, 0), &words);
    let piece = leases.next_to_declare().unwrap();
    // Before the keeper has sent the piece.
    leases.release((1, 0), 0);
    assert_eq!((piece.name, piece.owed.len()), ((1, 0), 0));
    // A lease of the same name of which nothing stays, so the engine never hears of it.
    link.engine.terms().set_evicting(link.incarnation + 2);
    assert_eq!(hold(&leases, &link, (1, 0), &words), (0, false));
    assert!(leases.next_to_declare().is_none());
    leases.end_declaring(&link).unwrap().unwrap();
    let release = Request::Release { session: 1, admission: 0, keep: 0 };
    assert_eq!(sent(&mut engine), [Request::DeclareEnd, release]);
}

#[test]
fn a_piece_that_could_not_be_sent_is_declared_later() {
    let (link, _engine, words) = engine("ledger-later", u64::MAX);
    let leases = Leases::default();
    leases.begin_declaring(Some(link.nonce));
    hold(&leases, &link, (1, 0), &words);
    let piece = leases.next_to_declare().unwrap();
    leases.not_declared(&piece);
    leases.begin_declaring(Some(link.nonce));
    let piece = leases.next_to_declare().unwrap();
    assert_eq!(piece.words, words);
    // The same, and meanwhile it is cut.
    leases.release((1, 0), 2);
    leases.not_declared(&piece);
    leases.begin_declaring(Some(link.nonce));
    assert_eq!(leases.next_to_declare().unwrap().words, words[..2]);
}

#[test]
fn once_it_is_said_that_everything_is_declared_nothing_is_held_that_is_not_told() {
    let (link, mut engine, words) = engine("ledger-after-the-end", u64::MAX);
    let leases = Leases::default();
    leases.begin_declaring(Some(link.nonce));
    leases.end_declaring(&link).unwrap().unwrap();
    assert_eq!(sent(&mut engine), [Request::DeclareEnd]);
    // No answer comes in time, so the keeper begins again. The engine may evict from now on.
    leases.begin_declaring(Some(link.nonce));
    assert_eq!(hold(&leases, &link, (1, 0), &words[..4]), (4, false));
    assert!(matches!(sent(&mut engine)[..], [Request::Hold { session: 1, first: 0, .. }]));
    // There is no room: the engine sees that, until it has been told.
    while link.submit(0, |_| Undo::Nothing, |_, _| Request::Noop).is_ok() {}
    assert_eq!(hold(&leases, &link, (2, 0), &words[4..]), (4, false));
    assert!(link.unpublished().is_set());
    assert!(leases.next_to_declare().is_none());
    leases.end_declaring(&link).unwrap().unwrap_err();
    while let Some((operation, _)) = engine.next() {
        engine.complete(operation, Status::Ok, [0; 4]);
    }
    link.tend();
    leases.begin_declaring(Some(link.nonce));
    assert!(!link.unpublished().is_set());
    assert!(leases.next_to_declare().is_none());
    leases.end_declaring(&link).unwrap().unwrap();
    assert!(matches!(sent(&mut engine)[..], [Request::Hold { session: 2, .. }, Request::DeclareEnd]));
}

#[test]
fn each_chunk_counts_once_and_no_longer_than_it_is_held() {
    let (link, mut engine, words) = engine("ledger-share", 4 * CHUNK_BYTES);
    let leases = Leases::default();
    leases.attached(&link);
    for session in 0..3 {
        assert_eq!(hold(&leases, &link, (session, 0), &words), (4, true), "session {session}");
    }
    assert_eq!(hold(&leases, &link, (9, 0), &words[4..]), (0, true));
    leases.release((0, 0), 2);
    assert_eq!(hold(&leases, &link, (9, 0), &words[4..]), (0, true), "others hold them");
    leases.end_session(1, &[0]);
    leases.end_session(2, &[0]);
    assert_eq!(hold(&leases, &link, (9, 0), &words[4..]), (2, true));
    // The same name again: what it had is given up first.
    assert_eq!(hold(&leases, &link, (9, 0), &words[6..]), (2, false));
    assert_eq!(hold(&leases, &link, (10, 0), &words[4..6]), (0, true));
    leases.end_session(9, &[0]);
    assert_eq!(hold(&leases, &link, (10, 0), &words[4..6]), (2, false));
    let is_hold = |request: &&Request| matches!(request, Request::Hold { .. });
    assert_eq!(sent(&mut engine).iter().filter(is_hold).count(), 6);
}

#[test]
fn a_chunk_that_is_marked_or_gone_by_the_second_look_cuts_the_answer() {
    let (link, mut engine, words) = engine("ledger-second", u64::MAX);
    let leases = Leases::default();
    leases.attached(&link);
    link.engine.chunks.mark(5);
    assert_eq!(hold(&leases, &link, (1, 0), &words), (5, false));
    assert!(matches!(sent(&mut engine)[..], [Request::Hold { .. }, Request::Release { keep: 5, .. }]));
    // An engine that evicts without this client: nothing that is found now is held.
    link.engine.terms().set_evicting(link.incarnation + 2);
    assert_eq!(hold(&leases, &link, (2, 0), &words[..5]), (0, false));
}
