//! How an operation ended.

use super::{Ident, Malformed};
use crate::ring::Body;

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
    pub(super) const LAST: Status = Status::TooMany;

    pub(super) fn from_u16(value: u16) -> Option<Status> {
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

    /// For messages.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Disagreement::World => "the number of ranks",
            Disagreement::ChunkTokens => "the tokens of a chunk",
            Disagreement::Layout => "the digest of its layout",
            Disagreement::ShardBytes => "the bytes of a chunk on this rank",
        }
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
    #[inline(always)]
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
