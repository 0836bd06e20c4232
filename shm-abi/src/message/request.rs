//! What a client asks for.

use super::words::{Argument, NO_PARENT, Words};
use super::{Ident, Key, Malformed, Records, Round};
use crate::abi::{Item, Message};
use crate::ring::Body;

/// Any namespace, for [`Request::Clear`].
pub const ANY_NAMESPACE: u32 = u32::MAX;

macro_rules! requests {
    ($(
        $(#[$doc:meta])*
        $name:ident = $opcode:literal $({ $($(#[$of:meta])* $argument:ident: $type:ty,)+ })?,
    )+) => {
        /// What a client asks for.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Request {
            $($(#[$doc])* $name $({ $($(#[$of])* $argument: $type,)+ })?,)+
        }

        const MESSAGES: &[Message] = &[$(Message {
            name: stringify!($name),
            opcode: $opcode,
            arguments: &[$($((stringify!($argument), stringify!($type)),)+)?],
        }),+];
        pub(crate) const ABI: &[Item] = &[
            Item::Number("ANY_NAMESPACE", ANY_NAMESPACE as u64),
            Item::Number("NO_PARENT", NO_PARENT as u64),
            Item::Messages(MESSAGES),
        ];

        impl Request {
            /// Packs the request of operation slot `operation`.
            #[must_use]
            #[inline]
            pub fn encode(&self, operation: u16, ident: Ident) -> Body {
                let mut words = Words::default();
                ident.put(&mut words);
                let opcode: u8 = match *self {
                    $(Request::$name $({ $($argument),+ })? => {
                        $($($argument.put(&mut words);)+)?
                        $opcode
                    })+
                };
                words.body(operation, opcode.into())
            }

            /// Unpacks a request: its operation slot, its sender, what is asked.
            #[inline(always)]
            pub fn decode(body: &Body) -> Result<(u16, Ident, Request), Malformed> {
                let (operation, opcode, mut words) = Words::of(body);
                let ident = Ident::take(&mut words);
                let request = match opcode as u8 {
                    $($opcode => Request::$name $({ $($argument: <$type as Argument>::take(&mut words)),+ })?,)+
                    _ => return Err(Malformed::Opcode(opcode as u8)),
                };
                Ok((operation, ident, request))
            }
        }
    };
}

requests! {
    /// Nothing: measures the round trip.
    Noop = 1,
    /// Leave: the engine frees everything of this client, then answers.
    Detach = 2,
    /// Worker: a [`Registration`] in the payload area. Answers the namespace id.
    Register = 3 {
        /// First word of the registration.
        record: u32,
    },
    /// Worker: this client no longer uses the namespace. What it cached stays.
    Unregister = 4 {
        /// The namespace.
        namespace: u32,
    },
    /// Scheduler: the longest visible prefix of `keys`, pinned for (session, admission). Answers
    /// [`ShardAnswer`]s, chunk-major, rank-minor, and the number of chunks.
    Lookup = 5 {
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
    Release = 6 {
        /// The session.
        session: u64,
        /// The admission.
        admission: u32,
        /// Chunks that stay pinned.
        keep: u32,
    },
    /// Scheduler: drop every lease of the session. Unknown is fine.
    EndSession = 7 {
        /// The session.
        session: u64,
    },
    /// Worker: slots for its rank's shards of `keys`. Answers a [`ReserveAnswer`] for each.
    Reserve = 8 {
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
    Commit = 9 {
        /// [`SlotRecord`]s.
        slots: Records,
        /// Where the answer goes: one word for each.
        answer: u32,
    },
    /// Worker: these [`SlotRecord`]s will not be written; their rounds fail. Answers as `Commit`.
    Abort = 10 {
        /// [`SlotRecord`]s.
        slots: Records,
        /// Where the answer goes: one word for each.
        answer: u32,
    },
    /// Drop everything that is not leased, in one namespace or in all ([`ANY_NAMESPACE`]).
    Clear = 11 {
        /// The namespace.
        namespace: u32,
    },
    /// Worker, after a restart: it still holds these [`SlotRecord`]s that its entry was writing. Answers a
    /// [`SlotOutcome`] for each.
    DeclareSlots = 12 {
        /// [`SlotRecord`]s.
        slots: Records,
        /// Where the answer goes: one word for each.
        answer: u32,
    },
    /// Scheduler, after a restart: it still holds this lease. Answers how many of its chunks, from the first one on, are
    /// still there and pinned again.
    DeclareLease = 13 {
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
    DeclareEnd = 14,
    /// Worker: the bytes of this shard, one of its rank's, are not those that were stored. From now on lookups do not find
    /// its chunk, and the next store of it replaces it. Answers a [`SlotOutcome`](super::SlotOutcome).
    Invalidate = 15 {
        /// The slot.
        slot: u32,
        /// Its generation.
        generation: u64,
        /// The chunk's key.
        key: Key,
    },
}

/// The last opcode.
pub(super) const LAST: u8 = MESSAGES[MESSAGES.len() - 1].opcode;
