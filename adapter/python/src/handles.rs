//! Shard handles as bytes, which the scheduler's process sends to a worker's process in vLLM's metadata.

use core::fmt;
use kvring_adapter::ShardHandle;

/// "kvring shards", and the version of this format.
const MAGIC: [u8; 8] = *b"kvrsh\x00\x00\x01";
/// Bytes of the header: magic and count.
const HEADER: usize = 16;
/// Bytes of a record: seven numbers of 64 bits.
const RECORD: usize = 56;

/// Bytes that are not packed handles.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum NotHandles {
    /// They are shorter than the header.
    Short { got: usize },
    /// They do not begin with our magic, or are of another version.
    Magic { got: [u8; 8] },
    /// Their length does not fit the count in the header.
    Length { count: u64, got: usize },
    /// The record at this index has a value that cannot be.
    Record { at: usize },
}

impl fmt::Display for NotHandles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NotHandles::Short { got } => write!(f, "shards: expected at least {HEADER} bytes, got {got}"),
            NotHandles::Magic { got } => write!(
                f,
                "shards: expected what Hit.shards of this release gives (it begins with {}), got {}",
                MAGIC.escape_ascii(),
                got.escape_ascii()
            ),
            NotHandles::Length { count, got } => write!(
                f,
                "shards: expected {HEADER} bytes and {RECORD} for each of {count} shards, got {got} bytes in all"
            ),
            NotHandles::Record { at } => {
                write!(f, "shards: expected a slot number as shard {at}, got more than 32 bits")
            }
        }
    }
}

/// Bytes of `count` packed handles.
pub(crate) fn packed_bytes(count: usize) -> usize {
    HEADER + count * RECORD
}

/// Packs handles into `to`, which has [`packed_bytes`] bytes for their count.
pub(crate) fn pack(handles: impl ExactSizeIterator<Item = ShardHandle>, to: &mut [u8]) {
    let mut words = to.chunks_exact_mut(8);
    let mut put = |word: [u8; 8]| {
        if let Some(place) = words.next() {
            place.copy_from_slice(&word);
        }
    };
    put(MAGIC);
    put((handles.len() as u64).to_le_bytes());
    for handle in handles {
        let ShardHandle { arena_id: [a, b], slot, generation, offset, key: [c, d] } = handle;
        for word in [a, b, u64::from(slot), generation, offset, c, d] {
            put(word.to_le_bytes());
        }
    }
}

/// Unpacks handles. The load checks whether they lead to the shards that they name.
pub(crate) fn unpack(bytes: &[u8]) -> Result<Vec<ShardHandle>, NotHandles> {
    let got = bytes.len();
    let (words, rest) = bytes.as_chunks::<8>();
    let [magic, count, records @ ..] = words else { return Err(NotHandles::Short { got }) };
    if *magic != MAGIC {
        return Err(NotHandles::Magic { got: *magic });
    }
    let count = u64::from_le_bytes(*count);
    let (records, odd) = records.as_chunks::<{ RECORD / 8 }>();
    if records.len() as u64 != count || !odd.is_empty() || !rest.is_empty() {
        return Err(NotHandles::Length { count, got });
    }
    let handle = |(at, record): (usize, &[[u8; 8]; RECORD / 8])| {
        let [a, b, slot, generation, offset, c, d] = record.map(u64::from_le_bytes);
        let slot = u32::try_from(slot).map_err(|_| NotHandles::Record { at })?;
        Ok(ShardHandle { arena_id: [a, b], slot, generation, offset, key: [c, d] })
    };
    records.iter().enumerate().map(handle).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn packed(handles: &[ShardHandle]) -> Vec<u8> {
        let mut bytes = vec![0; packed_bytes(handles.len())];
        pack(handles.iter().copied(), &mut bytes);
        bytes
    }

    fn handles() -> impl Strategy<Value = Vec<ShardHandle>> {
        let handle = (any::<[u64; 2]>(), any::<u32>(), any::<u64>(), any::<u64>(), any::<[u64; 2]>())
            .prop_map(|(arena_id, slot, generation, offset, key)| ShardHandle {
                arena_id,
                slot,
                generation,
                offset,
                key,
            });
        prop::collection::vec(handle, 0..20)
    }

    proptest! {
        #[test]
        fn what_is_packed_is_unpacked_and_nothing_else_is(
            handles in handles(),
            cut in any::<prop::sample::Index>(),
            flip in any::<(prop::sample::Index, u8)>(),
            junk in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let bytes = packed(&handles);
            prop_assert_eq!(unpack(&bytes), Ok(handles));
            prop_assert!(unpack(&bytes[..cut.index(bytes.len())]).is_err());
            let longer: Vec<u8> = bytes.iter().copied().chain([0]).collect();
            prop_assert!(unpack(&longer).is_err());
            let (at, by) = flip;
            let at = at.index(bytes.len());
            let mut other = bytes.clone();
            other[at] ^= by;
            let unpacked = unpack(&other);
            prop_assert!(by == 0 || at >= HEADER || unpacked.is_err());
            prop_assert!(unpack(&junk).is_err());
        }
    }

    #[test]
    fn errors_say_what_was_expected() {
        assert_eq!(unpack(b"").unwrap_err().to_string(), "shards: expected at least 16 bytes, got 0");
        let mut bytes = packed(&[]);
        bytes[7] = 2;
        assert!(unpack(&bytes).unwrap_err().to_string().contains(r"kvrsh\x00\x00\x02"));
        bytes[7] = 1;
        bytes[8] = 3;
        assert_eq!(unpack(&bytes), Err(NotHandles::Length { count: 3, got: 16 }));
    }
}
