//! Keys and answers in the payload area are complete when the message that names them arrives.

use crate::harness::{fails, holds};
use crate::ring::{cells, next};
use kvring_shm_abi::mapping::View;
use kvring_shm_abi::payload::{Payload, Word};
use kvring_shm_abi::ring::{Body, Cell, Consumer, Producer};
use loom::thread;

const WORDS: usize = 2;
const OPERATIONS: u32 = 2;

/// The protocol, and ways to break it, one at a time.
#[derive(Clone, Copy)]
struct Habits {
    producer: fn(View<Cell>) -> Producer,
    /// The engine pushes the completion before it has written the answer.
    push_first: bool,
    /// The client gives an operation's region to the next operation before it has drained the first one's completion.
    reuse_early: bool,
}

const RIGHT: Habits = Habits { producer: Producer::new, push_first: false, reuse_early: false };

fn keys(n: u32) -> [u64; WORDS] {
    [10 + u64::from(n); WORDS]
}

fn answer(keys: [u64; WORDS]) -> [u64; WORDS] {
    keys.map(|key| key + 100)
}

/// The client's regions have the keys first and room for the answer behind them, as the adapter's do.
fn serve(payload: &Payload, mut submissions: Consumer, mut completions: Producer, push_first: bool) {
    for _ in 0..OPERATIONS {
        let operation = next(&mut submissions);
        let at = operation.words[0] as u32;
        let mut asked = [0; WORDS];
        payload.read(at, &mut asked).unwrap();
        assert_eq!(asked, keys(operation.head), "wrong keys");
        if push_first {
            completions.push(&operation);
        }
        payload.write(at + WORDS as u32, &answer(asked)).unwrap();
        if !push_first {
            completions.push(&operation);
        }
    }
}

fn operations(habits: Habits) {
    let payload = Payload::new(View::from_vec((0..2 * WORDS).map(|_| Word::new()).collect()));
    let (submissions, completions) = (cells(), cells());
    let (popping, pushing) = (Consumer::new(submissions.clone()), (habits.producer)(completions.clone()));
    let area = payload.clone();
    let engine = thread::spawn(move || serve(&area, popping, pushing, habits.push_first));
    let mut producer = (habits.producer)(submissions);
    let mut consumer = Consumer::new(completions);
    // There is one region, so each operation needs the one before it to be done with it.
    let submit = |producer: &mut Producer, n: u32| {
        payload.write(0, &keys(n)).unwrap();
        producer.push(&Body { head: n, words: [0] });
    };
    let drain = |consumer: &mut Consumer, n: u32| {
        assert_eq!(next(consumer).head, n);
        let mut got = [0; WORDS];
        payload.read(WORDS as u32, &mut got).unwrap();
        assert_eq!(got, answer(keys(n)), "wrong answer");
    };
    if habits.reuse_early {
        (0..OPERATIONS).for_each(|n| submit(&mut producer, n));
        (0..OPERATIONS).for_each(|n| drain(&mut consumer, n));
    } else {
        for n in 0..OPERATIONS {
            submit(&mut producer, n);
            drain(&mut consumer, n);
        }
    }
    engine.join().unwrap();
}

#[test]
fn a_completion_brings_its_whole_answer() {
    holds("completion", None, || operations(RIGHT));
}

#[test]
fn control_pushed_before_written_is_caught() {
    fails("completion, pushed first", "wrong answer", Some(3), || {
        operations(Habits { push_first: true, ..RIGHT });
    });
}

#[test]
fn control_publication_without_release_is_caught() {
    fails("completion, relaxed publication", "wrong", Some(3), || {
        operations(Habits { producer: Producer::broken, ..RIGHT });
    });
}

#[test]
fn control_region_reused_before_its_completion_was_drained_is_caught() {
    fails("completion, region reused early", "wrong", Some(3), || {
        operations(Habits { reuse_early: true, ..RIGHT });
    });
}
