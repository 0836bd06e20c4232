//! Where everything lies in a channel.

use crate::abi;
use crate::lookup::Unpublished;
use crate::mapping::{Pad, Shared};
use crate::ring::{Cell, DEPTH};
use crate::superblock::SUPERBLOCK_BYTES;
use crate::sync::{AtomicU32, AtomicU64};

abi! {
    pub(super) const HEADER_AT: usize = SUPERBLOCK_BYTES;

    /// Offset of the submission ring.
    pub const SUBMISSIONS_AT: usize = 1024;

    /// Offset of the completion ring.
    pub const COMPLETIONS_AT: usize = SUBMISSIONS_AT + DEPTH * size_of::<Cell>();

    /// Offset of the payload area.
    pub const PAYLOAD_AT: usize = (COMPLETIONS_AT + DEPTH * size_of::<Cell>()).next_multiple_of(4096);

    /// The smallest payload area, in words.
    pub const PAYLOAD_WORDS_MIN: u32 = 1 << 10;

    /// The largest payload area, in words (64 MiB).
    pub const PAYLOAD_WORDS_MAX: u32 = 8 << 20;

    #[repr(C, align(128))]
    pub(super) struct Header {
        pub(super) parked: AtomicU32,
        _pad0: Pad<60>,
        /// Schedulers.
        pub(super) unpublished: Unpublished,
        _pad2: Pad<60>,
        pub(super) nonce: AtomicU64,
        pub(super) payload_words: AtomicU32,
        pub(super) entry: AtomicU32,
        _pad1: Pad<112>,
    }
}

/// The usual payload area, in bytes.
pub const PAYLOAD_BYTES_USUAL: usize = 4 << 20;
/// Bytes of a channel with the usual payload area.
pub const CHANNEL_BYTES_USUAL: usize = PAYLOAD_AT + PAYLOAD_BYTES_USUAL;

// SAFETY: atomics and padding.
unsafe impl Shared for Header {}
const _: () = assert!(HEADER_AT + size_of::<Header>() <= SUBMISSIONS_AT);
