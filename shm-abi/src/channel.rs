//! `kvring.<name>.client.<n>.<nonce>`: one client's submission ring, completion ring and payload area.
//!
//! A client creates it for one attachment, and unlinks its name as soon as both sides have mapped it; if the client dies before
//! that, the engine does. The rings are prepared before the superblock's magic is written, so an engine that can open a channel
//! can read it.

pub(crate) mod places;

pub use places::{
    CHANNEL_BYTES_USUAL, COMPLETIONS_AT, PAYLOAD_AT, PAYLOAD_BYTES_USUAL, PAYLOAD_WORDS_MAX,
    PAYLOAD_WORDS_MIN, SUBMISSIONS_AT,
};

use crate::lookup::Unpublished;
use crate::mapping::{Mapping, One, OutOfBounds, View};
use crate::payload::{Payload, Word};
use crate::ring::{self, Cell, DEPTH};
use crate::segment::{self, Access, EngineName, SegmentError, SegmentFile};
use crate::superblock::{Geometry, Identity, Kind, Mismatch, Superblock, boot_id};
use crate::sync::{AtomicU32, Ordering};
use places::{HEADER_AT, Header};
use std::sync::Arc;

/// Why a channel could not be made or opened.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// Its segment could not be created, opened or mapped.
    #[error(transparent)]
    Segment(#[from] SegmentError),
    /// Its superblock is not that of a client's channel of this build.
    #[error(transparent)]
    Mismatch(#[from] Mismatch),
    /// Its segment is too short.
    #[error(transparent)]
    Bounds(#[from] OutOfBounds),
    /// Its header differs from the client's entry in the lobby.
    #[error("channel {name}: expected {what} {expected}, found {found}")]
    Header {
        /// The channel.
        name: String,
        /// The field.
        what: &'static str,
        /// Expected.
        expected: u64,
        /// Found.
        found: u64,
    },
    /// Its client has not allocated all of it.
    #[error(
        "channel {name}: expected {expected} bytes to have memory, found {found}; its client is to allocate it"
    )]
    Sparse {
        /// The channel.
        name: String,
        /// Its length in bytes.
        expected: u64,
        /// Bytes that have memory.
        found: u64,
    },
    /// A payload area that is too small or too large.
    #[error("expected a payload area of {PAYLOAD_WORDS_MIN} to {PAYLOAD_WORDS_MAX} words, got {0}")]
    PayloadSize(u32),
}

/// A mapped channel, for either side.
pub struct Channel {
    header: One<Header>,
    /// Client to engine.
    pub submissions: View<Cell>,
    /// Engine to client.
    pub completions: View<Cell>,
    /// Long arguments and answers.
    pub payload: Payload,
}

fn bytes(payload_words: u32) -> Result<usize, ChannelError> {
    if !(PAYLOAD_WORDS_MIN..=PAYLOAD_WORDS_MAX).contains(&payload_words) {
        return Err(ChannelError::PayloadSize(payload_words));
    }
    Ok(PAYLOAD_AT + payload_words as usize * 8)
}

impl Channel {
    /// Client: creates a channel, which is complete before anybody can open it.
    pub fn create(
        name: &EngineName,
        entry: usize,
        nonce: u64,
        payload_words: u32,
        arena_id: [u64; 2],
        geometry: Geometry,
    ) -> Result<Channel, ChannelError> {
        let bytes = bytes(payload_words)?;
        let file = name.client(entry, nonce);
        let mapping = Arc::new(segment::create_shared(&file, bytes)?);
        let channel = Channel::views(&mapping, payload_words).inspect_err(|_| segment::unlink(&file))?;
        ring::initialise(&channel.submissions);
        ring::initialise(&channel.completions);
        let header = &*channel.header;
        header.nonce.store(nonce, Ordering::Relaxed);
        header.payload_words.store(payload_words, Ordering::Relaxed);
        header.entry.store(entry as u32, Ordering::Relaxed);
        let segment_bytes = bytes as u64;
        mapping.at::<Superblock>(0)?.write(&Identity {
            kind: Kind::Client,
            segment_bytes,
            arena_id,
            boot_id: boot_id(),
            geometry,
        });
        Ok(channel)
    }

    /// Engine: opens and checks the channel that an entry names.
    pub fn open(
        name: &EngineName,
        entry: usize,
        nonce: u64,
        payload_words: u32,
    ) -> Result<Channel, ChannelError> {
        let bytes = bytes(payload_words)?;
        let file = name.client(entry, nonce);
        let mapping = Arc::new(segment::open_shared(&file, bytes)?);
        // The engine touches no page before it knows that all have memory: a client that only truncated its channel has left
        // holes, and touching one while /dev/shm is full is a SIGBUS. The engine does not fill them, because that memory would
        // count as its own, for every channel that a client makes and leaves.
        let held = SegmentFile::open(&file, Access::ReadWrite)?.allocated_bytes()?;
        if held < bytes as u64 {
            return Err(ChannelError::Sparse { name: file, expected: bytes as u64, found: held });
        }
        mapping.at::<Superblock>(0)?.read(Kind::Client, mapping.len() as u64)?;
        let channel = Channel::views(&mapping, payload_words)?;
        let header = &*channel.header;
        let mismatch =
            |what, expected, found| Err(ChannelError::Header { name: file.clone(), what, expected, found });
        let (found_nonce, found_entry) =
            (header.nonce.load(Ordering::Relaxed), header.entry.load(Ordering::Relaxed));
        if found_nonce != nonce {
            return mismatch("nonce", nonce, found_nonce);
        }
        if found_entry as usize != entry {
            return mismatch("entry", entry as u64, u64::from(found_entry));
        }
        Ok(channel)
    }

    fn views(mapping: &Arc<Mapping>, payload_words: u32) -> Result<Channel, OutOfBounds> {
        Ok(Channel {
            header: One::new(mapping, HEADER_AT)?,
            submissions: View::new(mapping, SUBMISSIONS_AT, DEPTH)?,
            completions: View::new(mapping, COMPLETIONS_AT, DEPTH)?,
            payload: Payload::new(View::<Word>::new(mapping, PAYLOAD_AT, payload_words as usize)?),
        })
    }

    /// The word that the client's threads sleep on while they wait for completions, see [`crate::park`].
    #[must_use]
    #[inline]
    pub fn client_parked(&self) -> &AtomicU32 {
        &self.header.parked
    }

    /// Whether the client, a scheduler, holds something that it could not publish.
    #[must_use]
    #[inline]
    pub fn unpublished(&self) -> &Unpublished {
        &self.header.unpublished
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::{Body, Consumer, Producer};

    #[test]
    fn created_opened_and_refused() {
        let name = EngineName::new(&format!("t-chan-{}", std::process::id())).unwrap();
        let geometry = Geometry::new(1 << 20, 1 << 20).unwrap();
        let ours = Channel::create(&name, 3, 77, PAYLOAD_WORDS_MIN, [1, 2], geometry).unwrap();
        let theirs = Channel::open(&name, 3, 77, PAYLOAD_WORDS_MIN).unwrap();
        let body = Body { head: 5, words: [6; 7] };
        Producer::new(ours.submissions.clone()).push(&body);
        assert_eq!(Consumer::new(theirs.submissions.clone()).pop(), Ok(Some(body)));
        assert!(matches!(
            Channel::open(&name, 3, 77, PAYLOAD_WORDS_MIN * 2),
            Err(ChannelError::Segment(SegmentError::TooShort { .. }))
        ));
        assert!(matches!(Channel::open(&name, 3, 77, 1), Err(ChannelError::PayloadSize(1))));
        assert!(matches!(
            Channel::open(&name, 4, 77, PAYLOAD_WORDS_MIN),
            Err(ChannelError::Segment(SegmentError::NotFound(_)))
        ));
        ours.header.nonce.store(78, Ordering::Relaxed);
        assert!(matches!(
            Channel::open(&name, 3, 77, PAYLOAD_WORDS_MIN),
            Err(ChannelError::Header { what: "nonce", expected: 77, found: 78, .. })
        ));
        segment::unlink(&name.client(3, 77));
    }
}
