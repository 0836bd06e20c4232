//! Message formats: what the slots and the payload area carry.
//!
//! A request is a ring [`Body`]: `head = operation slot | opcode << 16`, word 0 the sender's [`Ident`], words 1–6 the
//! arguments. Its completion echoes operation slot and ident: `head = operation slot | status << 16`, words 1–4 the
//! results. Longer arguments and answers are records in the payload area, named by word offset and count.
//!
//! This module only packs and unpacks. It checks that opcodes, statuses and roles exist; whether an offset, an index
//! or a count makes sense is checked by who uses it.

use crate::ring::Body;
use bytemuck::{Pod, Zeroable};

/// A chunk's 128-bit name, opaque here: it covers the chunk's whole prefix.
pub type Key = [u64; 2];

/// Words of one key.
pub const KEY_WORDS: usize = 2;

/// The most keys that one request may name: 8192 chunks are two million tokens at 256 a chunk.
pub const KEYS_MAX: usize = 8192;

/// Which attachment sent a message: a message of another life or another attachment is stale and ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Ident {
    /// The engine's incarnation that the client attached to.
    pub incarnation: u32,
    /// The low half of the attachment's nonce.
    pub nonce: u32,
}

impl Ident {
    fn pack(self) -> u64 {
        join(self.incarnation, self.nonce)
    }

    fn unpack(word: u64) -> Ident {
        let (incarnation, nonce) = split(word);
        Ident { incarnation, nonce }
    }
}

/// One store of a chunk by all ranks. Rounds of one source (one scheduler attachment) are ordered by their number;
/// rounds of different sources are not comparable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Round {
    /// Who counts: random per scheduler.
    pub source: u32,
    /// The count.
    pub number: u32,
}

impl Round {
    /// As one word.
    #[must_use]
    pub fn pack(self) -> u64 {
        join(self.number, self.source)
    }

    /// From one word.
    #[must_use]
    pub fn unpack(word: u64) -> Round {
        let (number, source) = split(word);
        Round { source, number }
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

/// Any namespace, for [`Request::Clear`].
pub const ANY_NAMESPACE: u32 = u32::MAX;

/// What a client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Nothing: measures the round trip.
    Noop,
    /// Leave: the engine frees everything of this client, then answers.
    Detach,
    /// Worker: a [`Registration`] in the payload area. Answers the namespace id.
    Register {
        /// First word of the registration.
        record: u32,
    },
    /// Worker: this client no longer uses the namespace. What it cached stays.
    Unregister {
        /// The namespace.
        namespace: u32,
    },
    /// Scheduler: the longest visible prefix of `keys`, pinned for (session, admission). Answers
    /// [`ShardAnswer`]s, chunk-major, rank-minor, and the number of chunks.
    Lookup {
        /// The request's session, an id of the client's.
        session: u64,
        /// Which life of the request.
        admission: u32,
        /// The namespace.
        namespace: u32,
        /// [`Key`]s, in chain order.
        keys: Records,
        /// Where the answer goes: room for `count` [`ShardAnswer`]s.
        answer: Records,
    },
    /// Scheduler: drop the lease of (session, admission) beyond its first `keep` chunks. Unknown is fine.
    Release {
        /// The session.
        session: u64,
        /// The admission.
        admission: u32,
        /// Chunks that stay pinned.
        keep: u32,
    },
    /// Scheduler: drop every lease of the session. Unknown is fine.
    EndSession {
        /// The session.
        session: u64,
    },
    /// Worker: slots for its rank's shards of `keys`. Answers a [`ReserveAnswer`] for each.
    Reserve {
        /// Which store.
        round: Round,
        /// The namespace.
        namespace: u32,
        /// The worker's rank.
        rank: u32,
        /// [`Key`]s, in chain order.
        keys: Records,
        /// Where the answer goes: room for as many [`ReserveAnswer`]s.
        answer: u32,
        /// Word offset of the key just before the first one in its chain, if there is one.
        parent: Option<u32>,
    },
    /// Worker: the bytes of these [`SlotRecord`]s are complete. Answers a [`SlotOutcome`] word for each.
    Commit {
        /// [`SlotRecord`]s.
        slots: Records,
        /// Where the answer goes: one word for each.
        answer: u32,
    },
    /// Worker: these [`SlotRecord`]s will not be written; their rounds fail. Answers as `Commit`.
    Abort {
        /// [`SlotRecord`]s.
        slots: Records,
        /// Where the answer goes: one word for each.
        answer: u32,
    },
    /// Drop everything that is not leased, in one namespace or in all ([`ANY_NAMESPACE`]).
    Clear {
        /// The namespace.
        namespace: u32,
    },
}

/// No parent key.
const NO_PARENT: u32 = u32::MAX;

#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Opcode {
    Noop = 1,
    Detach = 2,
    Register = 3,
    Unregister = 4,
    Lookup = 5,
    Release = 6,
    EndSession = 7,
    Reserve = 8,
    Commit = 9,
    Abort = 10,
    Clear = 11,
}

/// A message that means nothing: its sender is broken or hostile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// No such operation.
    #[error("expected an opcode of 1..=11, found {0}")]
    Opcode(u8),
    /// No such status.
    #[error("expected a status of 0..={max}, found {0}", max = Status::LAST as u16)]
    Status(u16),
}

fn join(low: u32, high: u32) -> u64 {
    u64::from(low) | (u64::from(high) << 32)
}

fn split(word: u64) -> (u32, u32) {
    (word as u32, (word >> 32) as u32)
}

fn records(word: u64) -> Records {
    let (offset, count) = split(word);
    Records { offset, count }
}

impl Records {
    fn pack(self) -> u64 {
        join(self.offset, self.count)
    }
}

impl Request {
    /// Packs the request of operation slot `operation`.
    #[must_use]
    #[inline]
    pub fn encode(&self, operation: u16, ident: Ident) -> Body {
        let mut words = [0u64; 7];
        words[0] = ident.pack();
        let opcode = match *self {
            Request::Noop => Opcode::Noop,
            Request::Detach => Opcode::Detach,
            Request::Register { record } => {
                words[1] = u64::from(record);
                Opcode::Register
            }
            Request::Unregister { namespace } => {
                words[1] = u64::from(namespace);
                Opcode::Unregister
            }
            Request::Lookup { session, admission, namespace, keys, answer } => {
                words[1] = session;
                words[2] = join(admission, namespace);
                words[3] = keys.pack();
                words[4] = answer.pack();
                Opcode::Lookup
            }
            Request::Release { session, admission, keep } => {
                words[1] = session;
                words[2] = join(admission, keep);
                Opcode::Release
            }
            Request::EndSession { session } => {
                words[1] = session;
                Opcode::EndSession
            }
            Request::Reserve { round, namespace, rank, keys, answer, parent } => {
                words[1] = round.pack();
                words[2] = join(namespace, rank);
                words[3] = keys.pack();
                words[4] = join(answer, parent.unwrap_or(NO_PARENT));
                Opcode::Reserve
            }
            Request::Commit { slots, answer } => {
                words[1] = slots.pack();
                words[2] = u64::from(answer);
                Opcode::Commit
            }
            Request::Abort { slots, answer } => {
                words[1] = slots.pack();
                words[2] = u64::from(answer);
                Opcode::Abort
            }
            Request::Clear { namespace } => {
                words[1] = u64::from(namespace);
                Opcode::Clear
            }
        };
        Body { head: u32::from(operation) | ((opcode as u32) << 16), words }
    }

    /// Unpacks a request: its operation slot, its sender, what is asked.
    #[inline]
    pub fn decode(body: &Body) -> Result<(u16, Ident, Request), Malformed> {
        let operation = body.head as u16;
        let words = &body.words;
        let low = |index: usize| words[index] as u32;
        let opcode = (body.head >> 16) as u8;
        let request = match opcode {
            o if o == Opcode::Noop as u8 => Request::Noop,
            o if o == Opcode::Detach as u8 => Request::Detach,
            o if o == Opcode::Register as u8 => Request::Register { record: low(1) },
            o if o == Opcode::Unregister as u8 => Request::Unregister { namespace: low(1) },
            o if o == Opcode::Lookup as u8 => {
                let (admission, namespace) = split(words[2]);
                Request::Lookup {
                    session: words[1],
                    admission,
                    namespace,
                    keys: records(words[3]),
                    answer: records(words[4]),
                }
            }
            o if o == Opcode::Release as u8 => {
                let (admission, keep) = split(words[2]);
                Request::Release { session: words[1], admission, keep }
            }
            o if o == Opcode::EndSession as u8 => Request::EndSession { session: words[1] },
            o if o == Opcode::Reserve as u8 => {
                let (namespace, rank) = split(words[2]);
                let (answer, parent) = split(words[4]);
                Request::Reserve {
                    round: Round::unpack(words[1]),
                    namespace,
                    rank,
                    keys: records(words[3]),
                    answer,
                    parent: (parent != NO_PARENT).then_some(parent),
                }
            }
            o if o == Opcode::Commit as u8 => Request::Commit { slots: records(words[1]), answer: low(2) },
            o if o == Opcode::Abort as u8 => Request::Abort { slots: records(words[1]), answer: low(2) },
            o if o == Opcode::Clear as u8 => Request::Clear { namespace: low(1) },
            other => return Err(Malformed::Opcode(other)),
        };
        Ok((operation, Ident::unpack(words[0]), request))
    }
}

/// How an operation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Status {
    /// Done; the results are valid.
    Ok = 0,
    /// The client's share of leased and reserved bytes, or a table, is full for now.
    Busy = 1,
    /// No such namespace, or this client did not register it.
    UnknownNamespace = 2,
    /// The arena has no room for what was asked, even after eviction.
    OutOfSpace = 3,
    /// Not for this role.
    WrongRole = 4,
    /// A registration disagrees with an earlier rank's: result 1 is a [`Disagreement`], 2 what was expected, 3 what
    /// came.
    Disagreement = 5,
    /// The namespace table is full.
    TooManyNamespaces = 6,
    /// The shard is larger than the arena can ever hold: result 1 is the largest possible, in bytes.
    ShardTooLarge = 7,
    /// More keys or records than a request may name: result 1 is the limit.
    TooMany = 8,
}

impl Status {
    const LAST: Status = Status::TooMany;

    fn from_u16(value: u16) -> Option<Status> {
        use Status::{
            Busy, Disagreement, Ok, OutOfSpace, ShardTooLarge, TooMany, TooManyNamespaces, UnknownNamespace,
            WrongRole,
        };
        [
            Ok,
            Busy,
            UnknownNamespace,
            OutOfSpace,
            WrongRole,
            Disagreement,
            TooManyNamespaces,
            ShardTooLarge,
            TooMany,
        ]
        .get(usize::from(value))
        .copied()
    }
}

/// What two ranks of one namespace did not agree on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Disagreement {
    /// The number of ranks.
    World = 1,
    /// Tokens per chunk.
    ChunkTokens = 2,
    /// This rank's layout, compared with what it registered before.
    Layout = 3,
    /// This rank's bytes per shard, compared with what it registered before.
    ShardBytes = 4,
}

impl Disagreement {
    /// From the completion's result word.
    #[must_use]
    pub fn from_word(word: u64) -> Option<Disagreement> {
        [Self::World, Self::ChunkTokens, Self::Layout, Self::ShardBytes]
            .into_iter()
            .find(|kind| *kind as u64 == word)
    }
}

/// The end of an operation, as the engine tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The client's operation slot.
    pub operation: u16,
    /// Whose operation it was.
    pub ident: Ident,
    /// How it ended.
    pub status: Status,
    /// Results, by operation.
    pub results: [u64; 4],
}

impl Completion {
    /// Packs.
    #[must_use]
    #[inline]
    pub fn encode(&self) -> Body {
        let mut words = [0u64; 7];
        words[0] = self.ident.pack();
        words[1..5].copy_from_slice(&self.results);
        Body { head: u32::from(self.operation) | (u32::from(self.status as u16) << 16), words }
    }

    /// Unpacks.
    #[inline]
    pub fn decode(body: &Body) -> Result<Completion, Malformed> {
        let status = (body.head >> 16) as u16;
        let mut results = [0; 4];
        results.copy_from_slice(&body.words[1..5]);
        Ok(Completion {
            operation: body.head as u16,
            ident: Ident::unpack(body.words[0]),
            status: Status::from_u16(status).ok_or(Malformed::Status(status))?,
            results,
        })
    }
}

/// Plain records of the payload area, each a whole number of words.
pub trait Record: Pod {
    /// Words of one record.
    const WORDS: usize = size_of::<Self>() / 8;
}

/// Where one shard of a looked-up chunk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct ShardAnswer {
    /// The slot, and in the high half its place in the arena in pages of 4 KiB.
    slot_and_page: u64,
    /// The slot's generation.
    pub generation: u64,
}

/// Bytes of an arena page: shards start on one.
pub const PAGE_BYTES: u64 = 4096;

impl ShardAnswer {
    /// `offset` is a multiple of [`PAGE_BYTES`] below 16 TiB: the arena's limit.
    #[must_use]
    #[inline]
    pub fn new(slot: u32, offset: u64, generation: u64) -> ShardAnswer {
        debug_assert!(offset.is_multiple_of(PAGE_BYTES) && offset / PAGE_BYTES <= u64::from(u32::MAX));
        ShardAnswer { slot_and_page: join(slot, (offset / PAGE_BYTES) as u32), generation }
    }

    /// The slot.
    #[must_use]
    pub fn slot(&self) -> u32 {
        self.slot_and_page as u32
    }

    /// First byte in the arena.
    #[must_use]
    pub fn offset(&self) -> u64 {
        (self.slot_and_page >> 32) * PAGE_BYTES
    }

    /// As words of the payload area.
    #[must_use]
    #[inline]
    pub fn words(&self) -> [u64; 2] {
        [self.slot_and_page, self.generation]
    }
}

impl Record for ShardAnswer {}

/// What became of one key of a reservation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum ReserveOutcome {
    /// Write the shard there, then commit.
    Write = 0,
    /// Visible already: nothing to do.
    Present = 1,
    /// This rank has a slot for this chunk and round already (a repeated request).
    Held = 2,
    /// A newer round of the same source has begun: this store is moot.
    Superseded = 3,
    /// No room: the store of this chunk is dropped.
    NoSpace = 4,
    /// The client's share is full: the store of this chunk is dropped.
    Busy = 5,
}

/// The answer for one key of a reservation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct ReserveAnswer {
    outcome: u64,
    /// Meaningful with [`ReserveOutcome::Write`].
    pub shard: ShardAnswer,
}

impl ReserveAnswer {
    /// Write there.
    #[must_use]
    pub fn write(shard: ShardAnswer) -> ReserveAnswer {
        ReserveAnswer { outcome: ReserveOutcome::Write as u64, shard }
    }

    /// Do not write, and why.
    #[must_use]
    pub fn skip(outcome: ReserveOutcome) -> ReserveAnswer {
        ReserveAnswer { outcome: outcome as u64, shard: ShardAnswer::new(0, 0, 0) }
    }

    /// The outcome; `None` for one that does not exist.
    #[must_use]
    pub fn outcome(&self) -> Option<ReserveOutcome> {
        use ReserveOutcome::{Busy, Held, NoSpace, Present, Superseded, Write};
        [Write, Present, Held, Superseded, NoSpace, Busy].into_iter().find(|o| *o as u64 == self.outcome)
    }

    /// As words of the payload area.
    #[must_use]
    pub fn words(&self) -> [u64; 3] {
        [self.outcome, self.shard.slot_and_page, self.shard.generation]
    }
}

impl Record for ReserveAnswer {}

/// One slot that its writer commits or aborts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct SlotRecord {
    /// The slot, zero-extended.
    pub slot: u64,
    /// Its generation.
    pub generation: u64,
    /// The key it was reserved for.
    pub key: Key,
    /// The shard's checksum, or 0 where checksums are off.
    pub checksum: u64,
}

impl Record for SlotRecord {}

/// What became of one slot of a commit or abort.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum SlotOutcome {
    /// Done, now or by an earlier message.
    Done = 0,
    /// The reservation no longer counts: its round failed or was replaced. Nothing to do.
    Gone = 1,
    /// The slot is not this client's.
    NotYours = 2,
}

impl SlotOutcome {
    /// From the answer's word.
    #[must_use]
    pub fn from_word(word: u64) -> Option<SlotOutcome> {
        [Self::Done, Self::Gone, Self::NotYours].into_iter().find(|o| *o as u64 == word)
    }
}

/// Bytes of a model's name in a registration; longer names are cut.
pub const MODEL_NAME_BYTES: usize = 64;
/// Bytes of a dtype's name.
pub const DTYPE_BYTES: usize = 16;

/// One rank's registration of a namespace: model + KV layout + parallel geometry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Registration {
    /// Names the namespace: a digest of everything that the keys do not cover.
    pub fingerprint: [u64; 4],
    /// A digest of this rank's page layout.
    pub layout: u64,
    /// Bytes of this rank's shard of one chunk.
    pub shard_bytes: u64,
    /// Number of ranks.
    pub world: u32,
    /// This rank.
    pub rank: u32,
    /// Tokens per chunk.
    pub chunk_tokens: u32,
    /// Reserved, 0.
    pub reserved: u32,
    /// For people: UTF-8, zero padded.
    pub model: [u8; MODEL_NAME_BYTES],
    /// For people.
    pub dtype: [u8; DTYPE_BYTES],
}

impl Record for Registration {}

#[cfg(not(loom))]
const _: () = {
    assert!(size_of::<ShardAnswer>() == 16);
    assert!(size_of::<ReserveAnswer>() == 24);
    assert!(size_of::<SlotRecord>() == 40);
    assert!(size_of::<Registration>() == 144);
    assert!(ShardAnswer::WORDS * 8 == size_of::<ShardAnswer>());
    assert!(Registration::WORDS * 8 == size_of::<Registration>());
};

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request() -> impl Strategy<Value = Request> {
        let records = || (any::<u32>(), any::<u32>()).prop_map(|(offset, count)| Records { offset, count });
        prop_oneof![
            Just(Request::Noop),
            Just(Request::Detach),
            any::<u32>().prop_map(|record| Request::Register { record }),
            any::<u32>().prop_map(|namespace| Request::Unregister { namespace }),
            (any::<u64>(), any::<u32>(), any::<u32>(), records(), records()).prop_map(
                |(session, admission, namespace, keys, answer)| Request::Lookup {
                    session,
                    admission,
                    namespace,
                    keys,
                    answer
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
        fn completions_survive_the_ring(operation in any::<u16>(), status in 0u16..9, results in any::<[u64; 4]>()) {
            let completion = Completion {
                operation,
                ident: Ident { incarnation: 2, nonce: 3 },
                status: Status::from_u16(status).unwrap(),
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
