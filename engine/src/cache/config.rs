//! The cache's limits, all of them fixed when it is made.

use super::error::ConfigError;
use super::{Key, PAGE_BYTES};
use crate::policy::{MAX_CHUNKS, PolicyKind};

/// Limits and choices. Memory is taken for all of it at once, and touched as it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheConfig {
    /// Bytes of a slab: a power of two from 1 MiB to 1 GiB.
    pub slab_bytes: u64,
    /// Slabs in the arena, usable or not yet.
    pub slab_count: u32,
    /// Chunks at once, forming ones included; never more than there are slot ids.
    pub chunks_max: u32,
    /// Leases at once.
    pub leases_max: u32,
    /// Chunks in all leases together.
    pub pins_max: u32,
    /// Keys in one lookup or reservation.
    pub keys_max: u32,
    /// Bytes that one client may be charged with, in whole slots: what it writes, and what it was the first to lease.
    pub client_bytes_max: u64,
    /// Mixed into every hash; random, because keys come from clients.
    pub seed: Key,
    /// The order in which chunks are evicted, in each namespace.
    pub policy: PolicyKind,
}

impl CacheConfig {
    /// Limits for an arena of this geometry, with room for what one node does.
    #[must_use]
    pub fn new(slab_bytes: u64, slab_count: u32) -> Self {
        Self {
            slab_bytes,
            slab_count,
            chunks_max: 1 << 24,
            leases_max: 1 << 14,
            pins_max: 1 << 22,
            keys_max: 1 << 15,
            client_bytes_max: u64::MAX,
            seed: [0x243f_6a88_85a3_08d3, 0x1319_8a2e_0370_7344],
            policy: PolicyKind::default(),
        }
    }

    /// Whether all of it is in range; answers how many slot ids there are.
    pub(crate) fn check(&self) -> Result<u32, ConfigError> {
        let bytes = self.slab_bytes;
        if !bytes.is_power_of_two() || !(1 << 20..=1 << 30).contains(&bytes) {
            return Err(ConfigError::SlabBytes { bytes });
        }
        // At most 2³² × 2¹⁸: no overflow. One id is kept for "none", and links are id + 1.
        let slots = u64::from(self.slab_count) * (bytes / PAGE_BYTES);
        let most = u64::from(u32::MAX) - 1;
        if slots == 0 || slots > most {
            return Err(ConfigError::Slots { slab_count: self.slab_count, slab_bytes: bytes, slots, most });
        }
        // A lookup pins what it found before it ends the lease that it stands for.
        let pins_most = u64::from(super::pins::PINS_MAX.saturating_sub(self.keys_max));
        let limits = [
            ("max_chunks", self.chunks_max, MAX_CHUNKS as u64 / 2),
            ("max_leases", self.leases_max, 1 << 24),
            ("max_pins", self.pins_max, pins_most),
            ("keys_max", self.keys_max, 1 << 24),
        ];
        for (name, value, most) in limits {
            if value == 0 || u64::from(value) > most {
                return Err(ConfigError::Limit { name, value: u64::from(value), most });
            }
        }
        Ok(slots as u32)
    }
}
