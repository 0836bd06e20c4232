//! Compares what lies in shared memory with its description in `abi.txt`: reviewers see every change of it there.
#![allow(clippy::unwrap_used, reason = "a test")]

use kvring_shm_abi::chunk::ChunkWord;
use kvring_shm_abi::layout::describe_abi;
use kvring_shm_abi::message::{Completion, Ident, Records, Request, Round, ShardAnswer, Status};
use kvring_shm_abi::ring::Body;
use kvring_shm_abi::slot::{SlotState, SlotWord};
use std::fmt::Write;

/// Some messages and words, packed: the description does not say how they are.
fn examples() -> String {
    let ident = Ident { incarnation: 0xA1, nonce: 0xB2 };
    let keys = Records { offset: 0x10, count: 0x11 };
    let (session, admission, namespace, rank) = (0x5E55, 0xAD, 0x0A, 0x0B);
    let round = Round { source: 0x50, number: 0x51 };
    let mut text = "\n# examples\n".to_owned();
    let mut line = |of: &str, Body { head, words }: Body| {
        writeln!(text, "{of}: {head:x} {words:x?}").unwrap();
    };
    for request in [
        Request::Noop,
        Request::Hold { session, admission, namespace, first: 0x12, chunks: keys },
        Request::Release { session, admission, keep: 7 },
        Request::Reserve { round, namespace, rank, keys, answer: 0x12, parent: None },
        Request::Reserve { round, namespace, rank, keys, answer: 0x12, parent: Some(0x14) },
        Request::Commit { slots: keys, answer: 0x12 },
        Request::Invalidate { slot: 0x51, generation: 0x6E, key: [0x4E, 0x5E] },
    ] {
        line(&format!("{request:?}"), request.encode(9, ident));
    }
    let completion = Completion { operation: 9, ident, status: Status::TooMany, results: [1, 2, 3, 4] };
    line("a completion", completion.encode());
    let word = SlotWord { state: SlotState::Committed, owner: 0x3F, generation: 0x6E };
    writeln!(text, "{word:?}: {:x}", word.pack()).unwrap();
    writeln!(text, "{round:?}: {:x}", round.pack()).unwrap();
    writeln!(text, "a shard's answer: {:x?}", ShardAnswer::new(0x51, 0x3000, 0x6E).words()).unwrap();
    writeln!(text, "a chunk: {:x}", ChunkWord::new(0x51, 0x6E).bits()).unwrap();
    text
}

#[test]
fn the_abi_is_what_is_written_down() {
    let now = describe_abi() + &examples();
    if now != include_str!("abi.txt") {
        let new = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("abi.txt");
        std::fs::write(&new, &now).unwrap();
        panic!(
            "the ABI has changed: compare {} with tests/abi.txt, and if that is meant, replace it. Where only examples have \
             changed, raise ABI_VERSION: the hash does not see it",
            new.display()
        );
    }
}

/// A type with a layout of its own could be in shared memory, so it must be defined in `abi!`.
#[test]
fn nothing_with_a_layout_is_defined_beside_the_description() {
    // Files with types that only the kernel, libc or this process looks at.
    let private = ["life.rs", "sync.rs", "mapping.rs", "futex.rs", "abi.rs", "layout.rs"];
    let mut files = vec![std::path::PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/src"))];
    let mut seen = 0;
    while let Some(path) = files.pop() {
        if path.is_dir() {
            files.extend(std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
            continue;
        }
        let name = path.file_name().unwrap().to_str().unwrap();
        let mut inside = false;
        for (number, line) in std::fs::read_to_string(&path).unwrap().lines().enumerate() {
            inside = (inside || line == "abi! {") && line != "}";
            if line.trim_start().starts_with("#[repr(") && !private.contains(&name) {
                assert!(inside, "{}:{}: {line} outside of abi!", path.display(), number + 1);
                seen += 1;
            }
        }
    }
    assert!(seen > 10, "{seen} types with a layout");
}
