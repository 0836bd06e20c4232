//! The engine's configuration. The defaults are here and nowhere else; a TOML file overrides them, and flags
//! override the file.

use crate::byte_size::ByteSize;
use crate::policy::PolicyKind;
use crate::preflight::Room;
use crate::process;
use kvring_shm_abi::directory::CHUNK_IDS;
use kvring_shm_abi::segment::{BadName, EngineName};
use kvring_shm_abi::superblock::{ARENA_BYTES_MAX, BadGeometry, Geometry, SLAB_BYTES_MIN};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The largest slab size that is chosen without being asked for. Smaller slabs leave less unused in a namespace
/// with few chunks.
const DEFAULT_SLAB_MAX: u64 = 64 << 20;
/// How many slabs an arena has by default, as far as their size stays within its limits.
const DEFAULT_SLABS: u64 = 64;
/// The most leases, and the most pins, that one client may have: the cache counts all pins of a chunk in 24 bits.
const HELD_MOST: u32 = (1 << 18) - 1;
/// A default arena that is smaller than this causes a warning.
const SMALL_ARENA: u64 = 1 << 30;

/// All settings of an engine. [`EngineConfig::default`] is the one source of defaults.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EngineConfig {
    /// The engine's name: one engine per name and node.
    pub name: String,
    /// Bytes of the arena; `None`: half of what `/dev/shm`, the control group and the machine have left.
    pub arena: Option<ByteSize>,
    /// Bytes of a slab, a power of two from 1 MiB to 1 GiB; `None`: 1/64 of the arena, from 1 MiB to 64 MiB.
    pub slab: Option<ByteSize>,
    /// Which chunks are evicted first when room is needed: `lru` or `arc`.
    pub policy: PolicyKind,
    /// The longest time between two beats while nothing happens, in milliseconds.
    pub beat_interval_ms: u32,
    /// How long the service loop spins before it sleeps, in microseconds; see [`EngineConfig::spin`].
    pub spin_us: u32,
    /// The largest part of the arena that one client may be charged with at once: for what it is writing, and for
    /// what it was the first to lease.
    pub client_share: f64,
    /// The most leases of one client at one time.
    pub max_leases: u32,
    /// The most pins of one client at one time; a chunk counts once for each lease on it.
    pub max_pins: u32,
    /// The most chunks at one time; `None`: one for each 64 KiB of the arena, and at least 65536.
    pub max_chunks: Option<u32>,
    /// How long a start waits for another start of the same name, or for a predecessor whose process is still
    /// exiting, in milliseconds.
    pub start_wait_ms: u32,
    /// How long after a restart the engine evicts nothing while clients of the earlier engine have not come back
    /// yet, in milliseconds.
    pub reattach_grace_ms: u32,
    /// Take over what an earlier engine of this name left, whatever the size of its arena; `arena` and `slab` are
    /// then for a start that finds nothing. A start for which neither is given does so anyway.
    pub any_arena: bool,
    /// Keep nothing of what an earlier engine of this name left.
    pub cold: bool,
    /// Leave everything to the next engine of this name even at a clean end.
    pub keep: bool,
    /// Whether the process may dump core. A dump delays the notice of its death by seconds.
    pub core_dumps: bool,
    /// The log level or filter: `off`, `error`, `warn`, `info`, `debug`, `trace`; see `kvring --help`.
    pub log_level: String,
}

impl Default for EngineConfig {
    fn default() -> Self {
        EngineConfig {
            name: "default".to_owned(),
            arena: None,
            slab: None,
            policy: PolicyKind::default(),
            beat_interval_ms: 25,
            spin_us: 50,
            client_share: 0.5,
            max_leases: 1 << 14,
            max_pins: HELD_MOST,
            max_chunks: None,
            start_wait_ms: 5000,
            reattach_grace_ms: 5000,
            any_arena: false,
            cold: false,
            keep: false,
            core_dumps: false,
            log_level: "info".to_owned(),
        }
    }
}

/// The settings in a file or on the command line: for each field of [`EngineConfig`], a value or nothing.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "the fields of `EngineConfig`, where they are documented")]
pub struct Overrides {
    pub name: Option<String>,
    pub arena: Option<ByteSize>,
    pub slab: Option<ByteSize>,
    pub policy: Option<PolicyKind>,
    pub beat_interval_ms: Option<u32>,
    pub spin_us: Option<u32>,
    pub client_share: Option<f64>,
    pub max_leases: Option<u32>,
    pub max_pins: Option<u32>,
    pub max_chunks: Option<u32>,
    pub start_wait_ms: Option<u32>,
    pub reattach_grace_ms: Option<u32>,
    pub any_arena: Option<bool>,
    pub cold: Option<bool>,
    pub keep: Option<bool>,
    pub core_dumps: Option<bool>,
    pub log_level: Option<String>,
}

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("configuration {path}: {error}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// The file has a syntax error, an unknown key, or a value of a wrong type.
    #[error("configuration {path}: {error}")]
    Toml {
        /// The file.
        path: PathBuf,
        /// Where and why; it names the key.
        error: Box<toml::de::Error>,
    },
    /// The engine's name is not allowed.
    #[error(transparent)]
    Name(#[from] BadName),
    /// A value outside its limits.
    #[error("{key}: expected {expected}, got {got}")]
    Value {
        /// The key.
        key: &'static str,
        /// Its limits.
        expected: &'static str,
        /// The value that was given.
        got: String,
    },
    /// The arena is smaller than one slab.
    #[error(
        "arena: expected at least one slab of {slab}, got {arena}; use a larger --arena{}",
        if *.by_default { " (and see that /dev/shm has room: docker run --shm-size)" } else { "" }
    )]
    ArenaTooSmall {
        /// The arena's size.
        arena: ByteSize,
        /// The slab's size.
        slab: ByteSize,
        /// Whether the size was not given, but derived from what is free.
        by_default: bool,
    },
    /// The arena and the slab do not go together.
    #[error(transparent)]
    Geometry(#[from] BadGeometry),
}

impl EngineConfig {
    /// The defaults, overridden by the file.
    ///
    /// The file cannot be read, or has an unknown key or a value that is refused.
    pub fn from_toml(path: &Path) -> Result<EngineConfig, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| ConfigError::Read { path: path.to_owned(), error })?;
        let file: Overrides = toml::from_str(&text)
            .map_err(|error| ConfigError::Toml { path: path.to_owned(), error: Box::new(error) })?;
        EngineConfig::default().with(file)
    }

    /// This configuration, overridden by `overrides` and checked.
    ///
    /// # Errors
    /// A value outside its limits.
    pub fn with(self, overrides: Overrides) -> Result<EngineConfig, ConfigError> {
        // Both structures are taken apart by name, so a forgotten field does not compile.
        let Overrides {
            name,
            arena,
            slab,
            policy,
            beat_interval_ms,
            spin_us,
            client_share,
            max_leases,
            max_pins,
            max_chunks,
            start_wait_ms,
            reattach_grace_ms,
            any_arena,
            cold,
            keep,
            core_dumps,
            log_level,
        } = overrides;
        let merged = EngineConfig {
            name: name.unwrap_or(self.name),
            arena: arena.or(self.arena),
            slab: slab.or(self.slab),
            policy: policy.unwrap_or(self.policy),
            beat_interval_ms: beat_interval_ms.unwrap_or(self.beat_interval_ms),
            spin_us: spin_us.unwrap_or(self.spin_us),
            client_share: client_share.unwrap_or(self.client_share),
            max_leases: max_leases.unwrap_or(self.max_leases),
            max_pins: max_pins.unwrap_or(self.max_pins),
            max_chunks: max_chunks.or(self.max_chunks),
            start_wait_ms: start_wait_ms.unwrap_or(self.start_wait_ms),
            reattach_grace_ms: reattach_grace_ms.unwrap_or(self.reattach_grace_ms),
            any_arena: any_arena.unwrap_or(self.any_arena),
            cold: cold.unwrap_or(self.cold),
            keep: keep.unwrap_or(self.keep),
            core_dumps: core_dumps.unwrap_or(self.core_dumps),
            log_level: log_level.unwrap_or(self.log_level),
        };
        merged.check()?;
        Ok(merged)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let value = |key, expected, good: bool, got: String| {
            if good { Ok(()) } else { Err(ConfigError::Value { key, expected, got }) }
        };
        self.engine_name()?;
        let beat = (1..=1000).contains(&self.beat_interval_ms);
        value("beat_interval_ms", "1 to 1000", beat, self.beat_interval_ms.to_string())?;
        value("spin_us", "0 to 1000", self.spin_us <= 1000, self.spin_us.to_string())?;
        let share = self.client_share > 0.0 && self.client_share <= 1.0;
        value("client_share", "above 0, up to 1", share, self.client_share.to_string())?;
        value(
            "max_leases",
            "1 to 262143",
            (1..=HELD_MOST).contains(&self.max_leases),
            self.max_leases.to_string(),
        )?;
        value(
            "max_pins",
            "1 to 262143",
            (1..=HELD_MOST).contains(&self.max_pins),
            self.max_pins.to_string(),
        )?;
        let chunks = self.max_chunks.unwrap_or(1);
        value("max_chunks", "1 to 16777216", (1..=CHUNK_IDS).contains(&chunks), chunks.to_string())?;
        value("start_wait_ms", "up to 60000", self.start_wait_ms <= 60_000, self.start_wait_ms.to_string())?;
        let grace = self.reattach_grace_ms;
        value("reattach_grace_ms", "up to 600000", grace <= 600_000, grace.to_string())
    }

    /// The checked name.
    ///
    /// The name is not allowed.
    pub fn engine_name(&self) -> Result<EngineName, BadName> {
        EngineName::new(&self.name)
    }

    /// The longest time between two beats.
    #[must_use]
    pub fn beat_interval(&self) -> Duration {
        Duration::from_millis(self.beat_interval_ms.into())
    }

    /// How long the service loop spins on this machine: not at all if there is one CPU.
    #[must_use]
    pub fn spin(&self) -> Duration {
        process::spin_time(Duration::from_micros(self.spin_us.into()))
    }

    /// The most that one client may be charged with at once, in bytes; never less than a slab.
    #[must_use]
    pub fn client_bytes_max(&self, geometry: &Geometry) -> u64 {
        // The share is rounded to the 53 bits of an f64, which does not matter here.
        ((geometry.arena_bytes as f64 * self.client_share) as u64).max(geometry.slab_bytes)
    }

    /// How long a start waits for another one.
    #[must_use]
    pub fn start_wait(&self) -> Duration {
        Duration::from_millis(self.start_wait_ms.into())
    }

    /// The geometry that follows from these settings: the arena is rounded down to whole slabs. `room` matters only
    /// if no arena size is given. Whether a given size fits is checked when the arena is made (see
    /// [`crate::segments`]).
    ///
    /// The arena is smaller than a slab, or the slab's size is not allowed.
    pub fn geometry(&self, room: &Room) -> Result<Geometry, ConfigError> {
        let by_default = self.arena.is_none();
        let arena = self.arena.map_or_else(|| default_arena(room), |given| given.0);
        let slab = self.slab.map_or_else(|| default_slab(arena), |given| given.0);
        if arena < slab {
            return Err(ConfigError::ArenaTooSmall {
                arena: ByteSize(arena),
                slab: ByteSize(slab),
                by_default,
            });
        }
        // A slab of 0 bytes is refused by `Geometry::new`, which comes next.
        let whole = arena.checked_div(slab).map_or(arena, |slabs| slabs * slab);
        let mut geometry = Geometry::new(whole, slab)?;
        if let Some(chunks) = self.max_chunks {
            geometry = geometry.with_max_chunks(chunks)?;
        }
        if by_default && whole < SMALL_ARENA {
            let left = room.tightest();
            tracing::warn!(
                arena = %ByteSize(whole), "the default arena is small, half of what is left: {left}; {}",
                room.help(&left.limit, None)
            );
        }
        Ok(geometry)
    }
}

/// Half of the room that is left: engines share a node with vLLM's own processes.
fn default_arena(room: &Room) -> u64 {
    (room.tightest().usable() / 2).min(ARENA_BYTES_MAX)
}

fn default_slab(arena: u64) -> u64 {
    let wanted = (arena / DEFAULT_SLABS).clamp(SLAB_BYTES_MIN, DEFAULT_SLAB_MAX);
    // The largest power of two that is not above `wanted`, which is not 0 after the clamp.
    1 << wanted.ilog2()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn room(shm_free: u64) -> Room {
        Room { shm_total: shm_free, shm_free, memory: None, cgroup: None, stale: 0 }
    }

    fn with_file(text: &str) -> Result<EngineConfig, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kvring.toml");
        std::fs::write(&path, text).unwrap();
        EngineConfig::from_toml(&path)
    }

    #[test]
    fn flags_over_file_over_defaults() {
        let file = with_file("name = \"prod\"\narena = \"8GiB\"\nspin_us = 5\n").unwrap();
        let flags = Overrides { arena: Some(ByteSize(1 << 30)), ..Overrides::default() };
        let config = file.with(flags).unwrap();
        assert_eq!(config.arena, Some(ByteSize(1 << 30)), "the flag wins");
        assert_eq!((config.name.as_str(), config.spin_us), ("prod", 5), "the file wins over the default");
        assert_eq!(config.beat_interval_ms, EngineConfig::default().beat_interval_ms);
        assert_eq!(with_file("").unwrap(), EngineConfig::default());
        EngineConfig::default().check().unwrap();
    }

    #[test]
    fn an_unknown_key_is_named() {
        let error = with_file("arena = \"8GiB\"\nslabs = 3\n").unwrap_err().to_string();
        assert!(error.contains("unknown field `slabs`") && error.contains("kvring.toml"), "{error}");
    }

    #[test]
    fn values_outside_their_limits_name_their_key() {
        for (text, part) in [
            ("arena = \"8 apples\"", "8 apples"),
            ("arena = -5", "-5"),
            ("beat_interval_ms = 0", "beat_interval_ms: expected 1 to 1000, got 0"),
            ("client_share = 0.0", "client_share"),
            ("client_share = nan", "client_share"),
            ("policy = \"fifo\"", "fifo"),
            ("name = \"a/b\"", "a/b"),
            ("core_dumps = 1", "core_dumps"),
        ] {
            let error = with_file(text).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
        let missing = EngineConfig::from_toml(Path::new("/nonexistent/kvring.toml")).unwrap_err();
        assert!(matches!(missing, ConfigError::Read { .. }));
    }

    #[test]
    fn the_configuration_prints_as_toml_and_reads_back() {
        let config = EngineConfig { arena: Some(ByteSize(3 << 30)), ..EngineConfig::default() };
        assert_eq!(with_file(&toml::to_string(&config).unwrap()).unwrap(), config);
    }

    #[test]
    fn geometry_follows() {
        let geometry = |arena: u64, slab: Option<u64>| {
            EngineConfig { arena: Some(ByteSize(arena)), slab: slab.map(ByteSize), ..EngineConfig::default() }
                .geometry(&room(0))
        };
        for (arena, slab, whole) in [
            (1 << 20, 1 << 20, 1 << 20),
            ((5 << 20) + 17, 1 << 20, 5 << 20),
            (200 << 20, 2 << 20, 200 << 20),
            (8 << 30, 64 << 20, 8 << 30),
            (1 << 40, 64 << 20, 1 << 40),
        ] {
            assert_eq!(geometry(arena, None).unwrap(), Geometry::new(whole, slab).unwrap(), "{arena}");
        }
        assert_eq!(geometry(100 << 20, Some(32 << 20)).unwrap().arena_bytes, 96 << 20);
        assert!(matches!(
            geometry((1 << 20) - 1, None),
            Err(ConfigError::ArenaTooSmall { by_default: false, .. })
        ));
        assert!(matches!(geometry(8 << 20, Some(16 << 20)), Err(ConfigError::ArenaTooSmall { .. })));
        for slab in [0, 3 << 20, 1 << 10] {
            assert!(matches!(geometry(8 << 20, Some(slab)), Err(ConfigError::Geometry(_))), "{slab}");
        }
    }

    #[test]
    fn the_default_arena_is_half_of_what_is_left() {
        let config = EngineConfig::default();
        assert_eq!(config.geometry(&room(24 << 30)).unwrap().arena_bytes, 12 << 30);
        assert_eq!(config.geometry(&room(64 << 20)).unwrap().arena_bytes, 32 << 20);
        let error = config.geometry(&room(1 << 20)).unwrap_err();
        assert!(error.to_string().contains("--shm-size"), "{error}");
    }
}
