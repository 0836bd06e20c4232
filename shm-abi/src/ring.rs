//! Single-producer single-consumer rings of 64-byte cells, each with a sequence number inside.
//!
//! A message and the sequence that publishes it share one cache line, and only the producer writes a line: the consumer never
//! writes anything back. Which cells a producer may reuse follows from the protocol above the ring: every submission gets
//! exactly one completion, and at most [`DEPTH`] operations are in flight, so
//!
//! * submission `p` may be pushed when fewer than `DEPTH` operations are in flight: of the `DEPTH` submissions before
//!   it at least one has completed, so the consumer has passed the cell of `p − DEPTH`;
//! * completion `c` may be pushed because the client submitted at most `drained + DEPTH` operations.
//!
//! So there is no "full", and the engine never waits for a client. A client that breaks the rule only overwrites its
//! own completions. These rings do *not* allow more than one producer or consumer, do not block (see [`crate::park`]), and
//! have no cells of variable length (see [`crate::payload`]).

use crate::abi;
use crate::mapping::{Shared, View};
use crate::sync::{AtomicU32, AtomicU64, Ordering};

abi! {
    /// Cells in a ring, and so the most operations in flight on one channel. A power of two. (In loom's models two: enough
    /// for several laps, and the models stay small.)
    pub const DEPTH: usize = if cfg!(loom) { 2 } else { 256 };

    /// 64-bit words of a cell's body. (In loom's models one: enough to see a torn message, and the models stay small.)
    pub const WORDS: usize = if cfg!(loom) { 1 } else { 7 };

    /// One cell: a cache line of its own.
    #[repr(C, align(64))]
    pub struct Cell {
        /// `position + 1` of the message that it holds.
        sequence: AtomicU32,
        head: AtomicU32,
        words: [AtomicU64; WORDS],
    }
}

const _: () = assert!(DEPTH.is_power_of_two());

/// What one cell carries: a head and [`WORDS`] words. [`crate::message`] says what they mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Body {
    /// Operation id; opcode or status.
    pub head: u32,
    /// Arguments or results.
    pub words: [u64; WORDS],
}

// SAFETY: atomics only; the alignment leaves no padding (asserted below).
unsafe impl Shared for Cell {}

#[cfg(not(loom))]
const _: () = {
    assert!(core::mem::size_of::<Cell>() == 64);
    assert!(core::mem::align_of::<Cell>() == 64);
    assert!(core::mem::offset_of!(Cell, head) == 4);
    assert!(core::mem::offset_of!(Cell, words) == 8);
};

impl Cell {
    /// A cell in private memory, in the state in which [`initialise`] leaves cell `index`: for models and unit tests.
    #[must_use]
    pub fn new(index: u32) -> Cell {
        Cell {
            sequence: AtomicU32::new(previous_lap(index)),
            head: AtomicU32::new(0),
            words: core::array::from_fn(|_| AtomicU64::new(0)),
        }
    }
}

/// The sequence in cell `position % DEPTH` before `position` is published there: that of one lap earlier.
fn previous_lap(position: u32) -> u32 {
    position.wrapping_add(1).wrapping_sub(DEPTH as u32)
}

/// Prepares the cells of a fresh ring, before anybody else can see it.
pub fn initialise(cells: &[Cell]) {
    for (cell, index) in cells.iter().zip(0u32..) {
        cell.sequence.store(previous_lap(index), Ordering::Relaxed);
    }
}

/// The writing end. It is `Send`, and pushing takes `&mut`, so there is one writer at a time.
pub struct Producer {
    cells: View<Cell>,
    /// Position of the next push; only its low bits choose the cell.
    next: u32,
    /// The ordering that publishes a push: Release, except in the models' negative control.
    #[cfg(loom)]
    order: Ordering,
}

/// The reading end. It is `Send`, and popping takes `&mut`, so there is one reader at a time.
pub struct Consumer {
    cells: View<Cell>,
    /// Position of the next pop.
    next: u32,
}

/// A cell held neither the expected sequence number nor that of one lap earlier: the producer is broken or hostile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("ring jumped: expected sequence {expected} or {previous} in cell {index}, found {found}")]
pub struct RingJump {
    /// The cell.
    pub index: usize,
    /// The sequence that a new message would carry.
    pub expected: u32,
    /// The sequence that the cell holds as long as there is no new message.
    pub previous: u32,
    /// The sequence that it held.
    pub found: u32,
}

impl Producer {
    /// The writing end of a ring that [`initialise`] has prepared and nobody has written to yet.
    ///
    /// # Panics
    /// When the view does not have [`DEPTH`] cells. No peer can cause that: the number is a constant of the layout.
    #[must_use]
    pub fn new(cells: View<Cell>) -> Producer {
        assert_eq!(cells.len(), DEPTH, "a ring has {DEPTH} cells");
        Producer {
            cells,
            next: 0,
            #[cfg(loom)]
            order: Ordering::Release,
        }
    }

    /// A producer whose publication is unordered: the negative control of the models. Never use it.
    #[cfg(loom)]
    pub fn broken(cells: View<Cell>) -> Producer {
        Producer { order: Ordering::Relaxed, ..Producer::new(cells) }
    }

    /// Publishes one message. The caller keeps the number of operations in flight at or below [`DEPTH`].
    #[inline(always)]
    pub fn push(&mut self, body: &Body) {
        let cell = &self.cells[self.next as usize % DEPTH];
        cell.head.store(body.head, Ordering::Relaxed);
        for (word, value) in cell.words.iter().zip(body.words) {
            word.store(value, Ordering::Relaxed);
        }
        // SYNC POINT: Release; pairs with the Acquire in `Consumer::pop`. It also publishes what this thread has written to
        // the payload area before.
        cell.sequence.store(self.next.wrapping_add(1), self.order());
        self.next = self.next.wrapping_add(1);
    }

    #[cfg(not(loom))]
    #[inline(always)]
    fn order(&self) -> Ordering {
        Ordering::Release
    }

    #[cfg(loom)]
    fn order(&self) -> Ordering {
        self.order
    }
}

impl Consumer {
    /// The reading end of a ring that nobody has read from yet.
    ///
    /// # Panics
    /// When the view does not have [`DEPTH`] cells. No peer can cause that: the number is a constant of the layout.
    #[must_use]
    pub fn new(cells: View<Cell>) -> Consumer {
        assert_eq!(cells.len(), DEPTH, "a ring has {DEPTH} cells");
        Consumer { cells, next: 0 }
    }

    /// Takes the next message, copied out once; `None` when there is none yet.
    #[inline(always)]
    pub fn pop(&mut self) -> Result<Option<Body>, RingJump> {
        let index = self.next as usize % DEPTH;
        let cell = &self.cells[index];
        // SYNC POINT: Acquire; pairs with the Release in `Producer::push`.
        let found = cell.sequence.load(Ordering::Acquire);
        let expected = self.next.wrapping_add(1);
        if found != expected {
            return self.nothing_or_jump(index, expected, found);
        }
        let mut body = Body { head: cell.head.load(Ordering::Relaxed), words: [0; WORDS] };
        for (value, word) in body.words.iter_mut().zip(&cell.words) {
            *value = word.load(Ordering::Relaxed);
        }
        self.next = expected;
        Ok(Some(body))
    }

    /// Is there a message, or a jump to report? It costs one load.
    #[inline]
    #[must_use]
    pub fn has_news(&self) -> bool {
        let cell = &self.cells[self.next as usize % DEPTH];
        cell.sequence.load(Ordering::Acquire) != previous_lap(self.next)
    }

    #[inline]
    fn nothing_or_jump(&self, index: usize, expected: u32, found: u32) -> Result<Option<Body>, RingJump> {
        let previous = previous_lap(self.next);
        if found == previous { Ok(None) } else { Err(RingJump { index, expected, previous, found }) }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn pair() -> (Producer, Consumer, View<Cell>) {
        let cells = View::from_vec((0..DEPTH as u32).map(Cell::new).collect::<Vec<_>>());
        (Producer::new(cells.clone()), Consumer::new(cells.clone()), cells)
    }

    fn body(n: u64) -> Body {
        Body { head: n as u32, words: [n; WORDS] }
    }

    #[test]
    fn empty_then_in_order_over_many_laps() {
        let (mut producer, mut consumer, _) = pair();
        assert_eq!(consumer.pop(), Ok(None));
        for lap in 0..5 {
            for n in 0..DEPTH as u64 {
                producer.push(&body(lap * 1000 + n));
            }
            for n in 0..DEPTH as u64 {
                assert!(consumer.has_news());
                assert_eq!(consumer.pop(), Ok(Some(body(lap * 1000 + n))));
            }
            assert!(!consumer.has_news());
            assert_eq!(consumer.pop(), Ok(None));
        }
    }

    #[test]
    fn positions_wrap_around_u32() {
        let (mut producer, mut consumer, cells) = pair();
        let start = u32::MAX - 3;
        for k in 0..DEPTH as u32 {
            let position = start.wrapping_add(k);
            cells[position as usize % DEPTH].sequence.store(previous_lap(position), Ordering::Relaxed);
        }
        (producer.next, consumer.next) = (start, start);
        for n in 0..10 {
            assert_eq!(consumer.pop(), Ok(None));
            producer.push(&body(n));
            assert_eq!(consumer.pop(), Ok(Some(body(n))));
        }
    }

    #[test]
    fn a_jump_is_reported_and_does_not_move_the_consumer() {
        let (_, mut consumer, cells) = pair();
        cells[0].sequence.store(77, Ordering::Relaxed);
        let jump = RingJump { index: 0, expected: 1, previous: previous_lap(0), found: 77 };
        assert!(consumer.has_news());
        assert_eq!(consumer.pop(), Err(jump));
        assert_eq!(consumer.pop(), Err(jump));
    }

    #[test]
    fn zeroed_memory_is_not_a_message() {
        // A ring that nobody initialised must not look like one with a message in it.
        let cells = View::from_vec((0..DEPTH as u32).map(Cell::new).collect::<Vec<_>>());
        cells[0].sequence.store(0, Ordering::Relaxed);
        assert!(Consumer::new(cells).pop().is_err());
    }
}
