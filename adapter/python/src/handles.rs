//! Handles of chunks as bytes, which the scheduler's process sends to the workers' processes in vLLM's metadata: one for all
//! ranks.

use core::fmt;
use kvring_adapter::{ChunkHandle, ChunkWord};

/// "kvring chunks", and the version of this format.
const MAGIC: [u8; 8] = *b"kvrch\x00\x00\x01";
/// Words of the header: magic, count, and the arena's id.
const HEADER: usize = 4;

/// Bytes that are not packed handles.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum NotHandles {
    /// They are shorter than the header.
    Short { got: usize },
    /// They do not begin with our magic, or are of another version.
    Magic { got: [u8; 8] },
    /// Their length does not fit the count in the header.
    Length { count: u64, got: usize },
}

impl fmt::Display for NotHandles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NotHandles::Short { got } => {
                write!(f, "handles: expected at least {} bytes, got {got}", HEADER * 8)
            }
            NotHandles::Magic { got } => write!(
                f,
                "handles: expected what Hit.handles of this release gives (it begins with {}), got {}",
                MAGIC.escape_ascii(),
                got.escape_ascii()
            ),
            NotHandles::Length { count, got } => write!(
                f,
                "handles: expected {} bytes and 8 for each of {count} chunks, got {got} bytes in all",
                HEADER * 8
            ),
        }
    }
}

/// Bytes of `count` packed handles.
pub(crate) fn packed_bytes(count: usize) -> usize {
    (HEADER + count) * 8
}

/// Packs handles of chunks in this arena into `to`, which has [`packed_bytes`] bytes for their count.
pub(crate) fn pack(arena_id: [u64; 2], handles: impl ExactSizeIterator<Item = ChunkHandle>, to: &mut [u8]) {
    let mut words = to.chunks_exact_mut(8);
    let mut put = |word: u64| {
        if let Some(place) = words.next() {
            place.copy_from_slice(&word.to_le_bytes());
        }
    };
    [u64::from_le_bytes(MAGIC), handles.len() as u64, arena_id[0], arena_id[1]]
        .into_iter()
        .for_each(&mut put);
    handles.for_each(|handle| put(handle.word.bits()));
}

/// Unpacks handles. The load checks whether they lead to a chunk.
pub(crate) fn unpack(bytes: &[u8]) -> Result<Vec<ChunkHandle>, NotHandles> {
    let got = bytes.len();
    let (words, rest) = bytes.as_chunks::<8>();
    let [magic, count, low, high, chunks @ ..] = words else { return Err(NotHandles::Short { got }) };
    if *magic != MAGIC {
        return Err(NotHandles::Magic { got: *magic });
    }
    let [count, low, high] = [*count, *low, *high].map(u64::from_le_bytes);
    if chunks.len() as u64 != count || !rest.is_empty() {
        return Err(NotHandles::Length { count, got });
    }
    let word = |chunk: &[u8; 8]| ChunkWord::from_bits(u64::from_le_bytes(*chunk));
    Ok(chunks.iter().map(|chunk| ChunkHandle { arena_id: [low, high], word: word(chunk) }).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn packed(arena_id: [u64; 2], handles: &[ChunkHandle]) -> Vec<u8> {
        let mut bytes = vec![0; packed_bytes(handles.len())];
        pack(arena_id, handles.iter().copied(), &mut bytes);
        bytes
    }

    proptest! {
        #[test]
        fn what_is_packed_is_unpacked_and_nothing_else_is(
            arena_id in any::<[u64; 2]>(),
            words in prop::collection::vec(any::<u64>(), 0..20),
            cut in any::<prop::sample::Index>(),
            flip in any::<(prop::sample::Index, u8)>(),
            junk in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let handle = |bits: u64| ChunkHandle { arena_id, word: ChunkWord::from_bits(bits) };
            let handles: Vec<_> = words.into_iter().map(handle).collect();
            let bytes = packed(arena_id, &handles);
            prop_assert_eq!(unpack(&bytes), Ok(handles));
            prop_assert!(unpack(&bytes[..cut.index(bytes.len())]).is_err());
            let longer: Vec<u8> = bytes.iter().copied().chain([0]).collect();
            prop_assert!(unpack(&longer).is_err());
            let (at, by) = flip;
            let at = at.index(bytes.len());
            let mut other = bytes.clone();
            other[at] ^= by;
            let unpacked = unpack(&other);
            prop_assert!(by == 0 || at >= 16 || unpacked.is_err());
            prop_assert!(unpack(&junk).is_err());
        }
    }

    #[test]
    fn errors_say_what_was_expected() {
        assert_eq!(unpack(b"").unwrap_err().to_string(), "handles: expected at least 32 bytes, got 0");
        let mut bytes = packed([1, 2], &[]);
        bytes[7] = 2;
        assert!(unpack(&bytes).unwrap_err().to_string().contains(r"kvrch\x00\x00\x02"));
        bytes[7] = 1;
        bytes[8] = 3;
        assert_eq!(unpack(&bytes), Err(NotHandles::Length { count: 3, got: 32 }));
    }
}
