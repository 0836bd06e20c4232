//! Message formats: what a ring's cells and the payload area carry.
//!
//! A request is a ring [`Body`](crate::ring::Body): `head = operation id | opcode << 16`, word 0 the sender's [`Ident`], words
//! 1–6 the arguments. Its completion repeats id and ident: `head = operation id | status << 16`, words 1–4 the
//! results. Longer arguments and answers are records in the payload area, named by word offset and count.
//!
//! This module only packs and unpacks. It checks that opcodes and statuses exist. Whether an offset, an index or a count makes
//! sense, its user checks.

pub(crate) mod completion;
pub(crate) mod record;
pub(crate) mod request;
pub(crate) mod words;

use crate::abi;

pub use completion::{Completion, Disagreement, Status};
pub use record::{
    DTYPE_BYTES, MODEL_NAME_BYTES, PAGE_BYTES, Record, Registration, ReserveAnswer, ReserveOutcome,
    ShardAnswer, SlotOutcome, SlotRecord,
};
pub use request::{ANY_NAMESPACE, Request};

/// A chunk's 128-bit name, opaque here: it covers the chunk's whole prefix.
pub type Key = [u64; 2];

abi! {
    /// Words of one key.
    pub const KEY_WORDS: usize = 2;

    /// The most keys that one request may name: 8192 chunks are two million tokens at 256 a chunk.
    pub const KEYS_MAX: usize = 8192;

    /// The most chunks that one `Hold` may name. A scheduler that holds more sends several.
    pub const HOLD_MAX: usize = 1024;
}

/// The attachment that sent a message. A message of another incarnation or another attachment is stale, and ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Ident {
    /// The engine's incarnation that the client attached to.
    pub incarnation: u32,
    /// The low half of the attachment's nonce.
    pub nonce: u32,
}

/// One store of a chunk by all its ranks. Rounds of one source (one scheduler) are ordered by their number; rounds of different
/// sources have no order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Round {
    /// The scheduler that counts: a random number of its own.
    pub source: u32,
    /// Its count.
    pub number: u32,
}

impl Round {
    /// As one word.
    #[must_use]
    pub fn pack(self) -> u64 {
        words::word_of(self)
    }

    /// From one word.
    #[must_use]
    pub fn unpack(word: u64) -> Round {
        words::from_word(word)
    }
}

/// Records in the payload area: `count` of them from word `offset`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Records {
    /// First word.
    pub offset: u32,
    /// How many records.
    pub count: u32,
}

/// A message that cannot be unpacked: its sender is broken or hostile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// No such operation.
    #[error("expected an opcode of 1..={max}, found {0}", max = request::LAST)]
    Opcode(u8),
    /// No such status.
    #[error("expected a known status, found {0}")]
    Status(u16),
}

fn join(low: u32, high: u32) -> u64 {
    u64::from(low) | (u64::from(high) << 32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::Body;
    use proptest::prelude::*;

    fn request() -> impl Strategy<Value = Request> {
        let records = || (any::<u32>(), any::<u32>()).prop_map(|(offset, count)| Records { offset, count });
        prop_oneof![
            Just(Request::Noop),
            Just(Request::Detach),
            any::<u32>().prop_map(|record| Request::Register { record }),
            any::<u32>().prop_map(|namespace| Request::Unregister { namespace }),
            (any::<u64>(), any::<u32>(), any::<u32>(), any::<u32>(), records()).prop_map(
                |(session, admission, namespace, first, chunks)| Request::Hold {
                    session,
                    admission,
                    namespace,
                    first,
                    chunks
                }
            ),
            (any::<u64>(), any::<u32>(), any::<u32>())
                .prop_map(|(session, admission, keep)| Request::Release { session, admission, keep }),
            any::<u64>().prop_map(|session| Request::EndSession { session }),
            (
                any::<u64>(),
                any::<u32>(),
                any::<u32>(),
                records(),
                any::<u32>(),
                prop::option::of(0..u32::MAX)
            )
                .prop_map(|(round, namespace, rank, keys, answer, parent)| Request::Reserve {
                    round: Round::unpack(round),
                    namespace,
                    rank,
                    keys,
                    answer,
                    parent
                }),
            (records(), any::<u32>()).prop_map(|(slots, answer)| Request::Commit { slots, answer }),
            (records(), any::<u32>()).prop_map(|(slots, answer)| Request::Abort { slots, answer }),
            any::<u32>().prop_map(|namespace| Request::Clear { namespace }),
            (records(), any::<u32>()).prop_map(|(slots, answer)| Request::DeclareSlots { slots, answer }),
            Just(Request::DeclareEnd),
            (any::<u32>(), any::<u64>(), any::<[u64; 2]>())
                .prop_map(|(slot, generation, key)| Request::Invalidate { slot, generation, key }),
        ]
    }

    proptest! {
        #[test]
        fn requests_survive_the_ring(request in request(), operation in any::<u16>(), inc in any::<u32>(), nonce in any::<u32>()) {
            let ident = Ident { incarnation: inc, nonce };
            prop_assert_eq!(Request::decode(&request.encode(operation, ident)), Ok((operation, ident, request)));
        }

        #[test]
        fn no_body_is_undecodable_by_panic(head in any::<u32>(), words in any::<[u64; 7]>()) {
            let _ = Request::decode(&Body { head, words });
            let _ = Completion::decode(&Body { head, words });
        }

        #[test]
        fn completions_survive_the_ring(operation in any::<u16>(), status in 0u16..10, results in any::<[u64; 4]>()) {
            let completion = Completion {
                operation,
                ident: Ident { incarnation: 2, nonce: 3 },
                status: Status::from_number(status.into()).unwrap(),
                results,
            };
            prop_assert_eq!(completion.status as u16, status);
            prop_assert_eq!(Completion::decode(&completion.encode()), Ok(completion));
        }
    }

    #[test]
    fn unknown_numbers_are_errors() {
        let body = Body { head: 99 << 16, words: [0; 7] };
        assert_eq!(Request::decode(&body), Err(Malformed::Opcode(99)));
        assert_eq!(Completion::decode(&body), Err(Malformed::Status(99)));
    }

    #[test]
    fn shard_answers_reach_the_end_of_the_largest_arena() {
        let last = u64::from(u32::MAX) * PAGE_BYTES;
        let answer = ShardAnswer::new(u32::MAX, last, 1 << 53);
        assert_eq!((answer.slot(), answer.offset(), answer.generation), (u32::MAX, last, 1 << 53));
    }
}
