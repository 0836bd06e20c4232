//! The first 256 bytes of every segment: they say what it is, and that it is complete.
//!
//! The magic is written last, so a segment without it is incomplete: its creator is still at work, or has died. Where something
//! does not match, a client gets an error that says what, and an engine starts cold; neither goes on with a guess.

use crate::abi;
use crate::directory::CHUNK_IDS;
use crate::mapping::{Pad, Shared};
use crate::sync::{AtomicU32, AtomicU64, Ordering};

abi! {
    /// Raised when something in shared memory gets another *meaning* in the same form. A change of form changes
    /// [`LAYOUT_HASH`](crate::layout::LAYOUT_HASH).
    pub const ABI_VERSION: u32 = 6;

    /// "kvring\0\x01", little-endian.
    pub const MAGIC: u64 = u64::from_le_bytes(*b"kvring\0\x01");

    /// Bytes of a superblock.
    pub const SUPERBLOCK_BYTES: usize = 256;

    /// The kind of a segment.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Kind: u32 {
        /// `kvring.<name>.engine`
        Engine = 1,
        /// `kvring.<name>.lobby`
        Lobby = 2,
        /// `kvring.<name>.client.<n>.<nonce>`
        Client = 3,
        /// `kvring.<name>.arena`; its superblock is at its *end*, so that slots start at offset 0.
        Arena = 4,
    }

    /// The smallest slab.
    pub const SLAB_BYTES_MIN: u64 = 1 << 20;
    /// The largest slab. No shard crosses a multiple of it either, because a GPU registers the arena in parts of this size.
    pub const SLAB_BYTES_MAX: u64 = 1 << 30;
    /// The largest arena: slot ids and 4 KiB page numbers are 32 bits wide.
    pub const ARENA_BYTES_MAX: u64 = 1 << 44;
    /// The smallest shard, and the unit of shard sizes.
    pub const SHARD_UNIT: u64 = crate::message::PAGE_BYTES;

    /// Bytes behind the arena: one page, at whose beginning its superblock is.
    pub const ARENA_TRAILER: u64 = 4096;

    /// The block itself.
    #[repr(C, align(256))]
    pub struct Superblock {
        magic: AtomicU64,
        abi_version: AtomicU32,
        kind: AtomicU32,
        layout_hash: AtomicU64,
        segment_bytes: AtomicU64,
        arena_id: [AtomicU64; 2],
        boot_id: [AtomicU64; 2],
        arena_bytes: AtomicU64,
        slab_bytes: AtomicU64,
        retired: AtomicU32,
        max_chunks: AtomicU32,
        _pad: Pad<168>,
    }
}

/// The sizes of the arena and of the tables that belong to it. All offsets follow from them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of the arena: a multiple of `slab_bytes`.
    pub arena_bytes: u64,
    /// Bytes of a slab: a power of two from 1 MiB to 1 GiB.
    pub slab_bytes: u64,
    /// The most chunks at one time: 1 to [`CHUNK_IDS`].
    pub max_chunks: u32,
}

/// A geometry that no arena can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "expected an arena of 1 slab to 16 TiB, a multiple of its slab size, which is a power of two from 1 MiB to 1 GiB, for 1 to \
     {CHUNK_IDS} chunks; got an arena of {arena_bytes} bytes with slabs of {slab_bytes}, for {max_chunks} chunks"
)]
pub struct BadGeometry {
    /// The arena's bytes.
    pub arena_bytes: u64,
    /// The slab's bytes.
    pub slab_bytes: u64,
    /// The most chunks.
    pub max_chunks: u32,
}

impl Geometry {
    /// Checks an arena's sizes. It gets room for one chunk in each 64 KiB, and for at least 65 536.
    pub fn new(arena_bytes: u64, slab_bytes: u64) -> Result<Geometry, BadGeometry> {
        let usual = (arena_bytes / CHUNK_BYTES_USUAL).clamp(CHUNKS_USUAL_MIN, CHUNK_IDS.into());
        Geometry { arena_bytes, slab_bytes, max_chunks: usual as u32 }.check()
    }

    /// The same arena for another number of chunks.
    pub fn with_max_chunks(self, max_chunks: u32) -> Result<Geometry, BadGeometry> {
        Geometry { max_chunks, ..self }.check()
    }

    fn check(self) -> Result<Geometry, BadGeometry> {
        let Geometry { arena_bytes, slab_bytes, max_chunks } = self;
        let good = slab_bytes.is_power_of_two()
            && (SLAB_BYTES_MIN..=SLAB_BYTES_MAX).contains(&slab_bytes)
            && (slab_bytes..=ARENA_BYTES_MAX).contains(&arena_bytes)
            && arena_bytes.is_multiple_of(slab_bytes)
            && (1..=CHUNK_IDS).contains(&max_chunks);
        if good { Ok(self) } else { Err(BadGeometry { arena_bytes, slab_bytes, max_chunks }) }
    }

    /// Slabs in the arena.
    #[must_use]
    pub const fn slab_count(&self) -> usize {
        (self.arena_bytes / self.slab_bytes) as usize
    }

    /// Slot ids that a slab has: as many as shards of the smallest size fit.
    #[must_use]
    pub const fn slots_per_slab(&self) -> usize {
        (self.slab_bytes / SHARD_UNIT) as usize
    }

    /// Slot ids in all.
    #[must_use]
    pub const fn slot_count(&self) -> usize {
        self.slab_count() * self.slots_per_slab()
    }
}

/// Chunks are rarely smaller than this, so a geometry has room for one chunk in so many bytes of the arena, and for at least
/// `CHUNKS_USUAL_MIN`: the tables for fewer would not be worth saving.
const CHUNK_BYTES_USUAL: u64 = 64 << 10;
const CHUNKS_USUAL_MIN: u64 = 1 << 16;

/// The content of a superblock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The kind of segment.
    pub kind: Kind,
    /// Bytes of the segment.
    pub segment_bytes: u64,
    /// Random; the same in all segments of one cold start, different after the next.
    pub arena_id: [u64; 2],
    /// The kernel's boot id, or zeros where it cannot be read: unknown, not a mismatch.
    pub boot_id: [u64; 2],
    /// The arena's geometry.
    pub geometry: Geometry,
}

// SAFETY: atomics and padding.
unsafe impl Shared for Superblock {}

const _: () = {
    use core::mem::offset_of;
    assert!(size_of::<Superblock>() == SUPERBLOCK_BYTES);
    assert!(offset_of!(Superblock, magic) == 0);
    assert!(offset_of!(Superblock, abi_version) == 8);
    assert!(offset_of!(Superblock, retired) == 80);
};

/// Why a segment is not the one that was expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// It has no magic: it is incomplete, or not kvring's at all.
    #[error("the segment is not complete (no magic): its creator is still at it, or died half-way")]
    Incomplete,
    /// Another version of kvring.
    #[error(
        "expected ABI version {ABI_VERSION}, found {0}: the engine and this library come from different releases"
    )]
    AbiVersion(u32),
    /// The same version number, but other layouts: a build that was changed by hand.
    #[error(
        "expected layout {expected:#018x}, found {found:#018x}: the engine and this library come from different builds"
    )]
    Layout {
        /// Ours.
        expected: u64,
        /// Theirs.
        found: u64,
    },
    /// Another kind of segment.
    #[error("expected a segment of kind {}, found {found}", *.expected as u32)]
    Kind {
        /// Expected.
        expected: Kind,
        /// Found.
        found: u32,
    },
    /// It says that it is longer than it is.
    #[error("expected a segment of {expected} bytes, found {found}")]
    Size {
        /// The length that follows from its geometry, or that it says it has.
        expected: u64,
        /// The length that it says it has, or has.
        found: u64,
    },
    /// No arena can have its geometry.
    #[error(transparent)]
    Geometry(#[from] BadGeometry),
}

impl Superblock {
    /// Writes everything, the magic last. Others call [`Superblock::write`], which knows the layout hash.
    pub(crate) fn write_with(&self, identity: &Identity, layout_hash: u64) {
        self.abi_version.store(ABI_VERSION, Ordering::Relaxed);
        self.kind.store(identity.kind as u32, Ordering::Relaxed);
        self.layout_hash.store(layout_hash, Ordering::Relaxed);
        self.segment_bytes.store(identity.segment_bytes, Ordering::Relaxed);
        for (to, from) in self.arena_id.iter().zip(identity.arena_id) {
            to.store(from, Ordering::Relaxed);
        }
        for (to, from) in self.boot_id.iter().zip(identity.boot_id) {
            to.store(from, Ordering::Relaxed);
        }
        self.arena_bytes.store(identity.geometry.arena_bytes, Ordering::Relaxed);
        self.slab_bytes.store(identity.geometry.slab_bytes, Ordering::Relaxed);
        self.max_chunks.store(identity.geometry.max_chunks, Ordering::Relaxed);
        self.retired.store(0, Ordering::Relaxed);
        // SYNC POINT: Release; pairs with the Acquire in `read`. A process that sees it sees everything that the creator has
        // prepared.
        self.magic.store(MAGIC, Ordering::Release);
    }

    /// Reads and checks everything, once; `mapped` is how many bytes of the segment are mapped. Others call
    /// [`Superblock::read`], which knows the layout hash.
    pub(crate) fn read_with(&self, kind: Kind, mapped: u64, layout_hash: u64) -> Result<Identity, Mismatch> {
        // SYNC POINT: Acquire; pairs with the Release in `write`.
        if self.magic.load(Ordering::Acquire) != MAGIC {
            return Err(Mismatch::Incomplete);
        }
        let abi = self.abi_version.load(Ordering::Relaxed);
        if abi != ABI_VERSION {
            return Err(Mismatch::AbiVersion(abi));
        }
        let layout = self.layout_hash.load(Ordering::Relaxed);
        if layout != layout_hash {
            return Err(Mismatch::Layout { expected: layout_hash, found: layout });
        }
        let found = self.kind.load(Ordering::Relaxed);
        if found != kind as u32 {
            return Err(Mismatch::Kind { expected: kind, found });
        }
        let segment_bytes = self.segment_bytes.load(Ordering::Relaxed);
        if segment_bytes > mapped {
            return Err(Mismatch::Size { expected: segment_bytes, found: mapped });
        }
        let words =
            |from: &[AtomicU64; 2]| [from[0].load(Ordering::Relaxed), from[1].load(Ordering::Relaxed)];
        Ok(Identity {
            kind,
            segment_bytes,
            arena_id: words(&self.arena_id),
            boot_id: words(&self.boot_id),
            geometry: Geometry {
                arena_bytes: self.arena_bytes.load(Ordering::Relaxed),
                slab_bytes: self.slab_bytes.load(Ordering::Relaxed),
                max_chunks: self.max_chunks.load(Ordering::Relaxed),
            }
            .check()?,
        })
    }

    /// Says that the segment has been replaced or removed: a process that still maps it must look for the name again.
    pub fn retire(&self) {
        // SYNC POINT: Release; pairs with the Acquire in `is_retired`.
        self.retired.store(1, Ordering::Release);
    }

    /// Has it been replaced or removed?
    #[must_use]
    pub fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Acquire) != 0
    }
}

/// The kernel's boot id; zeros where it cannot be read.
#[must_use]
pub fn boot_id() -> [u64; 2] {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    match u128::from_str_radix(&digits, 16) {
        Ok(id) => [id as u64, (id >> 64) as u64],
        Err(_) => [0, 0],
    }
}

/// A random number that no other call gets, in any process: for arena ids, nonces and seeds.
///
/// # Errors
/// Where the system has no source of randomness.
pub fn random_u64() -> std::io::Result<u64> {
    getrandom::u64().map_err(|e| std::io::Error::other(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapping::Mapping;

    fn identity() -> Identity {
        Identity {
            kind: Kind::Engine,
            segment_bytes: 4096,
            arena_id: [1, 2],
            boot_id: boot_id(),
            geometry: Geometry::new(64 << 20, 2 << 20).unwrap(),
        }
    }

    #[test]
    fn reads_back_and_refuses_what_differs() {
        let memory = Mapping::private(4096);
        let block = memory.at::<Superblock>(0).unwrap();
        assert_eq!(block.read(Kind::Engine, 4096), Err(Mismatch::Incomplete));
        block.write(&identity());
        assert_eq!(block.read(Kind::Engine, 4096), Ok(identity()));
        assert_eq!(
            block.read(Kind::Lobby, 4096),
            Err(Mismatch::Kind { expected: Kind::Lobby, found: Kind::Engine as u32 })
        );
        assert_eq!(block.read(Kind::Engine, 100), Err(Mismatch::Size { expected: 4096, found: 100 }));
        block.slab_bytes.store(3 << 20, Ordering::Relaxed);
        assert!(matches!(block.read(Kind::Engine, 4096), Err(Mismatch::Geometry(_))));
        block.write(&identity());
        block.layout_hash.store(1, Ordering::Relaxed);
        assert!(matches!(block.read(Kind::Engine, 4096), Err(Mismatch::Layout { found: 1, .. })));
        block.abi_version.store(77, Ordering::Relaxed);
        assert_eq!(block.read(Kind::Engine, 4096), Err(Mismatch::AbiVersion(77)));
        assert!(!block.is_retired());
        block.retire();
        assert!(block.is_retired());
    }

    #[test]
    fn geometries() {
        assert!(Geometry::new(1 << 20, 1 << 20).is_ok());
        for (arena, slab) in
            [(0, 1 << 20), (1 << 20, 3), (1 << 20, 2 << 20), (3 << 20, 2 << 20), (1 << 45, 1 << 30)]
        {
            assert!(Geometry::new(arena, slab).is_err(), "{arena} {slab}");
        }
        let geometry = Geometry::new(8 << 20, 2 << 20).unwrap();
        assert_eq!((geometry.slab_count(), geometry.slots_per_slab(), geometry.slot_count()), (4, 512, 2048));
        let chunks = |max| geometry.with_max_chunks(max).map(|geometry| geometry.max_chunks);
        assert_eq!((geometry.max_chunks, chunks(1), chunks(CHUNK_IDS)), (1 << 16, Ok(1), Ok(CHUNK_IDS)));
        assert!(chunks(0).is_err() && chunks(CHUNK_IDS + 1).is_err());
        assert_eq!(Geometry::new(1 << 40, 1 << 30).unwrap().max_chunks, CHUNK_IDS, "of 2⁴⁰ bytes in 64 KiB");
        // The last slot id of the largest arena still fits into 32 bits.
        assert_eq!(Geometry::new(ARENA_BYTES_MAX, 1 << 30).unwrap().slot_count() as u64, 1 << 32);
    }
}
