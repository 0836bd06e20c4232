//! The requests of clients.

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
            /// Packs the request of the operation with the id `operation`.
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

            /// Unpacks a request: the operation's id, its sender, and what it asks for.
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
    /// Does nothing: measures the round trip.
    Noop = 1,
    /// Leaves: the engine frees everything of this client, then answers.
    Detach = 2,
    /// Worker: registers a namespace by a [`Registration`](super::Registration) in the payload area. Result 1 is the
    /// namespace's id.
    Register = 3 {
        /// First word of the registration.
        record: u32,
    },
    /// Worker: this client does not use the namespace any more. What it has stored stays.
    Unregister = 4 {
        /// The namespace.
        namespace: u32,
    },
    /// Scheduler: it holds these chunks for (session, admission), which it has found by itself, or has held before a restart.
    /// The engine pins them: `first` is the number of chunks of that lease in front of them. The lease is cut to that, and if
    /// it is shorter, the message is ignored. So a message may be repeated. Result 1 is how many of the chunks, from the first
    /// one on, are there and pinned now.
    Hold = 5 {
        /// The session: an id that the client has chosen.
        session: u64,
        /// The admission.
        admission: u32,
        /// The namespace.
        namespace: u32,
        /// How many chunks of the lease come before these.
        first: u32,
        /// [`ChunkWord`](crate::chunk::ChunkWord)s, in chain order, at most [`HOLD_MAX`](super::HOLD_MAX).
        chunks: Records,
    },
    /// Scheduler: cuts the lease of (session, admission) to its first `keep` chunks. An unknown one is no error.
    Release = 6 {
        /// The session.
        session: u64,
        /// The admission.
        admission: u32,
        /// Chunks that stay pinned.
        keep: u32,
    },
    /// Scheduler: drops every lease of the session. An unknown one is no error.
    EndSession = 7 {
        /// The session.
        session: u64,
    },
    /// Worker: asks for slots for its rank's shards of `keys`. Answers a [`ReserveAnswer`](super::ReserveAnswer) for each.
    Reserve = 8 {
        /// The round.
        round: Round,
        /// The namespace.
        namespace: u32,
        /// The worker's rank.
        rank: u32,
        /// [`Key`]s, in chain order.
        keys: Records,
        /// Where the answer goes: room for as many [`ReserveAnswer`](super::ReserveAnswer)s.
        answer: u32,
        /// Word offset of the key in front of the first one in its chain, if there is one.
        parent: Option<u32>,
    },
    /// Worker: the bytes in the slots of these [`SlotRecord`](super::SlotRecord)s are complete. Answers a
    /// [`SlotOutcome`](super::SlotOutcome), one word for each.
    Commit = 9 {
        /// [`SlotRecord`](super::SlotRecord)s.
        slots: Records,
        /// Where the answer goes: one word for each.
        answer: u32,
    },
    /// Worker: it will not complete the slots of these [`SlotRecord`](super::SlotRecord)s, so their rounds fail. Answers as
    /// `Commit` does.
    Abort = 10 {
        /// [`SlotRecord`](super::SlotRecord)s.
        slots: Records,
        /// Where the answer goes: one word for each.
        answer: u32,
    },
    /// Drops everything that is not leased, in one namespace or in all ([`ANY_NAMESPACE`]).
    Clear = 11 {
        /// The namespace.
        namespace: u32,
    },
    /// Worker, after a restart: it still writes into the slots of these [`SlotRecord`](super::SlotRecord)s, which an earlier
    /// engine granted to its entry. Answers a [`SlotOutcome`](super::SlotOutcome) for each.
    DeclareSlots = 12 {
        /// [`SlotRecord`](super::SlotRecord)s.
        slots: Records,
        /// Where the answer goes: one word for each.
        answer: u32,
    },
    /// After a restart: the client has declared everything. The engine frees the slots that this entry was writing under
    /// earlier attachments and has not declared.
    DeclareEnd = 13,
    /// Worker: the bytes of this shard, one of its own rank's, are not those that were stored. The engine hides the chunk, and
    /// the next store of it replaces it. Answers a [`SlotOutcome`](super::SlotOutcome).
    Invalidate = 14 {
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
