//! The cache's limits, which are fixed when it is made.

use super::error::ConfigError;
use super::{Key, OWNERS, PAGE_BYTES};
use crate::policy::{MAX_CHUNKS, PolicyKind};

/// Limits and choices. Address space for all of it is taken at once; memory is used as the tables fill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheConfig {
    /// Bytes of a slab: a power of two from 1 MiB to 1 GiB.
    pub slab_bytes: u64,
    /// Slabs in the arena, including those that are not usable yet.
    pub slab_count: u32,
    /// The most chunks at one time, forming ones included; never more than there are slot ids.
    pub chunks_max: u32,
    /// The most leases of one client at one time.
    pub leases_max: u32,
    /// The most pins in all leases of one client together.
    pub pins_max: u32,
    /// The most keys in one reservation.
    pub keys_max: u32,
    /// The most bytes that one client may be charged, in whole slots: for what it is writing, and for what it
    /// pinned first.
    pub client_bytes_max: u64,
    /// Mixed into every hash. It must be random, because clients choose the keys.
    pub seed: Key,
    /// The order in which chunks are evicted, in each namespace.
    pub policy: PolicyKind,
}

impl CacheConfig {
    /// Default limits for an arena of this geometry: enough for one node.
    #[must_use]
    pub fn new(slab_bytes: u64, slab_count: u32) -> Self {
        Self {
            slab_bytes,
            slab_count,
            chunks_max: 1 << 24,
            leases_max: 1 << 14,
            pins_max: super::pins::PINS_MAX / OWNERS as u32,
            keys_max: 1 << 15,
            client_bytes_max: u64::MAX,
            seed: [0x243f_6a88_85a3_08d3, 0x1319_8a2e_0370_7344],
            policy: PolicyKind::default(),
        }
    }

    /// Checks that all limits are in range; returns the number of slot ids.
    pub(crate) fn check(&self) -> Result<u32, ConfigError> {
        let bytes = self.slab_bytes;
        if !bytes.is_power_of_two() || !(1 << 20..=1 << 30).contains(&bytes) {
            return Err(ConfigError::SlabBytes { bytes });
        }
        // The product is at most 2³² × 2¹⁸, so it cannot overflow. One id is reserved for "none", and links are id
        // + 1.
        let slots = u64::from(self.slab_count) * (bytes / PAGE_BYTES);
        let most = u64::from(u32::MAX) - 1;
        if slots == 0 || slots > most {
            return Err(ConfigError::Slots { slab_count: self.slab_count, slab_bytes: bytes, slots, most });
        }
        let limits = [
            ("max_chunks", self.chunks_max, MAX_CHUNKS as u64 / 2),
            ("max_leases", self.leases_max, 1 << 18),
            ("max_pins", self.pins_max, u64::from(super::pins::PINS_MAX) / OWNERS as u64),
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
