//! What a client asks for.

use super::{Ident, Key, Malformed, Records, Round, join, split};
use crate::ring::Body;

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
    /// Worker, after a restart: it still holds these [`SlotRecord`]s that its entry was writing. Answers a
    /// [`SlotOutcome`] for each.
    DeclareSlots {
        /// [`SlotRecord`]s.
        slots: Records,
        /// Where the answer goes: one word for each.
        answer: u32,
    },
    /// Scheduler, after a restart: it still holds this lease. Answers how many of its chunks, from the first one on, are
    /// still there and pinned again.
    DeclareLease {
        /// The session.
        session: u64,
        /// The admission.
        admission: u32,
        /// The namespace.
        namespace: u32,
        /// [`LeaseRecord`]s, in chain order.
        chunks: Records,
    },
    /// After a restart: everything has been declared. What this entry was writing under earlier attachments, and did not
    /// declare, is free.
    DeclareEnd,
    /// Worker: the bytes of this shard, one of its rank's, are not those that were stored. From now on lookups do not find
    /// its chunk, and the next store of it replaces it. Answers a [`SlotOutcome`](super::SlotOutcome).
    Invalidate {
        /// The slot.
        slot: u32,
        /// Its generation.
        generation: u64,
        /// The chunk's key.
        key: Key,
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
    DeclareSlots = 12,
    DeclareLease = 13,
    DeclareEnd = 14,
    Invalidate = 15,
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
            Request::DeclareSlots { slots, answer } => {
                words[1] = slots.pack();
                words[2] = u64::from(answer);
                Opcode::DeclareSlots
            }
            Request::DeclareLease { session, admission, namespace, chunks } => {
                words[1] = session;
                words[2] = join(admission, namespace);
                words[3] = chunks.pack();
                Opcode::DeclareLease
            }
            Request::DeclareEnd => Opcode::DeclareEnd,
            Request::Invalidate { slot, generation, key } => {
                words[1] = u64::from(slot);
                words[2] = generation;
                words[3..5].copy_from_slice(&key);
                Opcode::Invalidate
            }
        };
        Body { head: u32::from(operation) | ((opcode as u32) << 16), words }
    }

    /// Unpacks a request: its operation slot, its sender, what is asked.
    #[inline(always)]
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
                    keys: Records::unpack(words[3]),
                    answer: Records::unpack(words[4]),
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
                    keys: Records::unpack(words[3]),
                    answer,
                    parent: (parent != NO_PARENT).then_some(parent),
                }
            }
            o if o == Opcode::Commit as u8 => {
                Request::Commit { slots: Records::unpack(words[1]), answer: low(2) }
            }
            o if o == Opcode::Abort as u8 => {
                Request::Abort { slots: Records::unpack(words[1]), answer: low(2) }
            }
            o if o == Opcode::Clear as u8 => Request::Clear { namespace: low(1) },
            o if o == Opcode::DeclareSlots as u8 => {
                Request::DeclareSlots { slots: Records::unpack(words[1]), answer: low(2) }
            }
            o if o == Opcode::DeclareLease as u8 => {
                let (admission, namespace) = split(words[2]);
                Request::DeclareLease {
                    session: words[1],
                    admission,
                    namespace,
                    chunks: Records::unpack(words[3]),
                }
            }
            o if o == Opcode::DeclareEnd as u8 => Request::DeclareEnd,
            o if o == Opcode::Invalidate as u8 => {
                Request::Invalidate { slot: low(1), generation: words[2], key: [words[3], words[4]] }
            }
            other => return Err(Malformed::Opcode(other)),
        };
        Ok((operation, Ident::unpack(words[0]), request))
    }
}
