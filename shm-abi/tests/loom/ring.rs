//! Two rings and the in-flight rule: every message arrives once, in order, in one piece.

use crate::harness::{fails, holds};
use kvring_shm_abi::mapping::View;
use kvring_shm_abi::ring::{Body, Cell, Consumer, DEPTH, Producer, WORDS};
use loom::thread;

/// Two and a half laps.
const OPERATIONS: usize = 2 * DEPTH + 1;

pub(crate) fn cells() -> View<Cell> {
    View::from_vec((0..DEPTH as u32).map(Cell::new).collect())
}

fn submission(n: usize) -> Body {
    Body { head: n as u32 + 1, words: [10 + n as u64; WORDS] }
}

fn completion(n: usize) -> Body {
    Body { head: n as u32 + 1, words: [100 + n as u64; WORDS] }
}

/// Pops the next message; waits while there is none.
pub(crate) fn next(consumer: &mut Consumer) -> Body {
    loop {
        match consumer.pop() {
            Ok(Some(body)) => return body,
            Ok(None) => thread::yield_now(),
            Err(jump) => panic!("{jump}"),
        }
    }
}

/// The server answers `burst` submissions at a time, the latest first: completions may come in any order.
fn serve(mut submissions: Consumer, mut completions: Producer, burst: usize) {
    let mut popped = 0;
    while popped < OPERATIONS {
        let until = OPERATIONS.min(popped + burst);
        for n in popped..until {
            assert_eq!(next(&mut submissions), submission(n), "torn or out of order: submission {n}");
        }
        for n in (popped..until).rev() {
            completions.push(&completion(n));
        }
        popped = until;
    }
}

fn client(mut submissions: Producer, mut completions: Consumer, in_flight_max: usize, burst: usize) {
    let (mut sent, mut drained) = (0, 0);
    while drained < OPERATIONS {
        while sent < OPERATIONS.min(drained + in_flight_max) {
            submissions.push(&submission(sent));
            sent += 1;
        }
        let group = drained / burst * burst;
        let answered = group + (OPERATIONS.min(group + burst) - 1 - drained);
        assert_eq!(
            next(&mut completions),
            completion(answered),
            "torn or out of order: completion {drained}"
        );
        drained += 1;
    }
    // No completion comes twice, or for a submission that was not made.
    assert_eq!(completions.pop(), Ok(None));
}

fn echo(producer: fn(View<Cell>) -> Producer, in_flight_max: usize, burst: usize) {
    let (submissions, completions) = (cells(), cells());
    let (popping, pushing) = (Consumer::new(submissions.clone()), producer(completions.clone()));
    let server = thread::spawn(move || serve(popping, pushing, burst));
    client(producer(submissions), Consumer::new(completions), in_flight_max, burst);
    server.join().unwrap();
}

#[test]
fn messages_arrive_once_in_order_and_untorn() {
    holds("ring", Some(4), || echo(Producer::new, DEPTH, 1));
}

#[test]
fn completions_out_of_order_never_overtake_a_cell() {
    holds("ring, answers in reverse", Some(4), || echo(Producer::new, DEPTH, DEPTH));
}

#[test]
fn control_publication_without_release_is_caught() {
    fails("ring, relaxed publication", "torn or out of order", Some(3), || echo(Producer::broken, DEPTH, 1));
}

#[test]
fn control_more_in_flight_than_cells_is_caught() {
    fails("ring, one too many in flight", "torn or out of order", Some(3), || {
        echo(Producer::new, DEPTH + 1, 1)
    });
}
