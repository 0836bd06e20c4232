//! How an operation ended.

use super::words::{Argument, Words};
use super::{Ident, Malformed};
use crate::abi;
use crate::ring::Body;

abi! {
    /// Words of results in a completion.
    const RESULTS: usize = 4;

    /// How an operation ended.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Status: u16 {
        /// Done; the results are valid.
        Ok = 0,
        /// For now the client's share of leased and reserved bytes is used up, or a table is full.
        Busy = 1,
        /// No such namespace, or this client did not register it.
        UnknownNamespace = 2,
        /// The arena has no room for what was asked, even after eviction.
        OutOfSpace = 3,
        /// Clients of this role may not ask for this.
        WrongRole = 4,
        /// A registration disagrees with an earlier one: result 1 is a [`Disagreement`], result 2 the number that was
        /// expected, result 3 the number that came.
        Disagreement = 5,
        /// The namespace table is full.
        TooManyNamespaces = 6,
        /// The shard is larger than the arena can ever hold: result 1 is the largest possible, in bytes.
        ShardTooLarge = 7,
        /// More keys or records than a request may name: result 1 is the limit.
        TooMany = 8,
        /// The table of shard sizes is full: result 1 is how many there may be.
        TooManySizes = 9,
    }

    /// What two ranks of one namespace did not agree on.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Disagreement: u64 {
        /// The number of ranks.
        World = 1,
        /// Tokens per chunk.
        ChunkTokens = 2,
        /// This rank's layout, compared with what it registered before.
        Layout = 3,
        /// This rank's bytes per shard, compared with what it registered before.
        ShardBytes = 4,
    }
}

impl Disagreement {
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

/// The engine's answer to an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The operation's id.
    pub operation: u16,
    /// The attachment whose operation it was.
    pub ident: Ident,
    /// How it ended.
    pub status: Status,
    /// Results; each kind of request says what they are.
    pub results: [u64; RESULTS],
}

impl Completion {
    /// Packs.
    #[must_use]
    #[inline(always)]
    pub fn encode(&self) -> Body {
        let mut words = Words::default();
        self.ident.put(&mut words);
        self.results.put(&mut words);
        words.body(self.operation, self.status as u16)
    }

    /// Unpacks.
    #[inline]
    pub fn decode(body: &Body) -> Result<Completion, Malformed> {
        let (operation, status, mut words) = Words::of(body);
        Ok(Completion {
            operation,
            ident: Argument::take(&mut words),
            status: Status::from_number(status.into()).ok_or(Malformed::Status(status))?,
            results: Argument::take(&mut words),
        })
    }
}
