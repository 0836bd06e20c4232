//! Checks whether the arena fits, before anything is swept or allocated: so "no" comes with the numbers and with
//! the option that helps, instead of a full `/dev/shm` or the out-of-memory killer half-way. The room is checked
//! again before each piece that is allocated later, because others take memory meanwhile.

use crate::byte_size::ByteSize;
use crate::cgroup::{self, CgroupRoom};
use crate::segments::files;
use kvring_shm_abi::channel::CHANNEL_BYTES_USUAL;
use kvring_shm_abi::chunk::ChunkRecord;
use kvring_shm_abi::engine_segment::Places;
use kvring_shm_abi::lobby::LOBBY_BYTES;
use kvring_shm_abi::segment::{EngineName, SHM_DIR};
use kvring_shm_abi::slot::SLOT_HEADER_BYTES;
use kvring_shm_abi::superblock::{ARENA_TRAILER, Geometry};
use std::path::PathBuf;

/// The size of `/dev/shm` in a docker container for which nothing else was asked.
const DOCKER_DEFAULT: u64 = 64 << 20;

/// For the estimate of what slot headers and chunk records take, which get their memory as they are needed: shards are
/// rarely smaller than this.
const USUAL_SHARD_MIN: u64 = 64 << 10;
const SHARD_TABLE_BYTES: u64 = (SLOT_HEADER_BYTES + size_of::<ChunkRecord>()) as u64;

/// An engine's room includes the channels of this many clients, because they are made in `/dev/shm` as well, after
/// the arena: the smallest vLLM (a scheduler and a worker), one client that comes back, and `kvring clear`.
const CLIENTS: u64 = 4;
const CHANNEL: u64 = CHANNEL_BYTES_USUAL as u64;

/// One part in this many of the machine's memory, and of a control group's, is kept free for others, within these
/// limits. If an engine allocated up to the brim, the kernel would kill the next process that asks for memory.
const KEPT_PARTS: u64 = 32;
const KEPT_MIN: u64 = 32 << 20;
const KEPT_MAX: u64 = 1 << 30;

/// How many bytes of `total` are kept for others.
fn kept(total: u64) -> u64 {
    (total / KEPT_PARTS).clamp(KEPT_MIN, KEPT_MAX)
}

/// The machine's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// All of it, in bytes (`MemTotal`).
    pub total: u64,
    /// The bytes that it can give without swapping (`MemAvailable`).
    pub available: u64,
}

/// The room that is left for a new engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Room {
    /// The size of `/dev/shm` in bytes.
    pub shm_total: u64,
    /// Bytes of `/dev/shm` that are free.
    pub shm_free: u64,
    /// The machine's memory; `None` if the machine does not tell.
    pub memory: Option<Memory>,
    /// The room that the control groups leave; `None`: there is no limit.
    pub cgroup: Option<CgroupRoom>,
    /// Bytes of segments that a start under this name would remove first. They count as free everywhere.
    pub stale: u64,
}

/// What sets a limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Limit {
    /// The size of `/dev/shm`.
    Shm,
    /// The machine's memory.
    Memory,
    /// A control group's limit.
    Cgroup(PathBuf),
}

impl core::fmt::Display for Limit {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Limit::Shm => f.write_str(SHM_DIR),
            Limit::Memory => f.write_str("the machine's memory"),
            Limit::Cgroup(path) => write!(f, "the control group {}", path.display()),
        }
    }
}

/// The limit that leaves the least room.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tightest {
    /// The limit.
    pub limit: Limit,
    /// The bytes that it leaves.
    pub free: u64,
    /// How many of these bytes are kept for others.
    pub kept: u64,
}

impl Tightest {
    /// The bytes that an engine may take.
    #[must_use]
    pub fn usable(&self) -> u64 {
        self.free.saturating_sub(self.kept)
    }
}

impl core::fmt::Display for Tightest {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let Tightest { limit, free, kept } = self;
        write!(f, "{limit} has {} left", ByteSize(*free).human())?;
        if *kept > 0 {
            write!(f, " (of which {} are kept for others)", ByteSize(*kept).human())?;
        }
        Ok(())
    }
}

/// Something that does not fit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected room for {} ({what}), {left}; {help}", needed.human())]
pub struct NoRoom {
    /// The bytes that are needed.
    pub needed: ByteSize,
    /// What they are needed for.
    pub what: String,
    /// The room that there is.
    pub left: Tightest,
    /// What the user can do.
    pub help: String,
}

/// How many bytes an engine of this geometry and its clients will allocate: the arena, an estimate of the tables,
/// and channels.
#[must_use]
pub fn needed(geometry: &Geometry) -> u64 {
    let sparse_tables = geometry.arena_bytes / USUAL_SHARD_MIN * SHARD_TABLE_BYTES;
    geometry.arena_bytes + sparse_tables + fixed(geometry)
}

/// The part of these bytes that hardly grows with the arena.
fn fixed(geometry: &Geometry) -> u64 {
    tables(geometry) + CLIENTS * CHANNEL
}

/// How many bytes a start allocates before the first slab.
fn tables(geometry: &Geometry) -> u64 {
    Places::of(geometry).records_at + LOBBY_BYTES as u64 + ARENA_TRAILER
}

/// Refuses an arena that cannot fit.
///
/// # Errors
/// [`NoRoom`], with the tightest limit.
pub fn check(geometry: &Geometry, room: &Room) -> Result<(), NoRoom> {
    let arena = ByteSize(geometry.arena_bytes).human();
    let what = || format!("{arena} of arena, the rest tables and the channels of clients");
    room.spares(needed(geometry), what, |left| room.help(&left.limit, Some(geometry)))
}

/// Checks that there is room for what a start allocates before it serves. Called after a sweep, where [`check`] has
/// already said yes.
///
/// # Errors
/// [`NoRoom`], with the tightest limit.
pub fn check_first(geometry: &Geometry, room: &Room) -> Result<(), NoRoom> {
    let what = || "tables and the first slab".to_owned();
    room.spares(tables(geometry) + geometry.slab_bytes, what, |left| room.help(&left.limit, None))
}

/// Checks that `bytes` more of an arena may be allocated now, so that there is still room for one more client's
/// channel.
///
/// # Errors
/// [`NoRoom`], with the tightest limit.
pub fn check_piece(bytes: u64, room: &Room) -> Result<(), NoRoom> {
    let what = || "more of the arena, and one more client's channel".to_owned();
    room.spares(bytes + CHANNEL, what, |left| room.help(&left.limit, None))
}

impl Room {
    /// The room that there is now for an engine of this name, including what an earlier one of that name left
    /// behind.
    #[must_use]
    pub fn for_engine(name: &EngineName) -> Room {
        Room { stale: files::bytes_held(name), ..Room::now() }
    }

    /// The room that there is now.
    #[must_use]
    pub fn now() -> Room {
        let shm = nix::sys::statvfs::statvfs(SHM_DIR).ok();
        let shm = shm
            .map_or((0, 0), |s| (s.blocks() * s.fragment_size(), s.blocks_available() * s.fragment_size()));
        // A tmpfs without a size limit (size=0) reports 0 blocks in all: then only memory limits it.
        let (shm_total, shm_free) = if shm.0 == 0 { (u64::MAX, u64::MAX) } else { shm };
        let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        Room { shm_total, shm_free, memory: memory(&meminfo), cgroup: cgroup::room(), stale: 0 }
    }

    /// The limit that leaves an engine the least room.
    #[must_use]
    pub fn tightest(&self) -> Tightest {
        let left = |limit, free: u64, kept| Tightest { limit, free: free.saturating_add(self.stale), kept };
        let memory = self.memory.map(|memory| left(Limit::Memory, memory.available, kept(memory.total)));
        let group = self.cgroup.as_ref();
        let group = group.map(|group| left(Limit::Cgroup(group.path.clone()), group.free, kept(group.limit)));
        let shm = left(Limit::Shm, self.shm_free, 0);
        [memory, group]
            .into_iter()
            .flatten()
            .fold(shm, |tightest, other| if other.usable() < tightest.usable() { other } else { tightest })
    }

    /// Checks that there is room for `needed` bytes beside what is kept for others.
    fn spares(
        &self,
        needed: u64,
        what: impl FnOnce() -> String,
        help: impl FnOnce(&Tightest) -> String,
    ) -> Result<(), NoRoom> {
        let left = self.tightest();
        if needed <= left.usable() {
            return Ok(());
        }
        Err(NoRoom { needed: ByteSize(needed), what: what(), help: help(&left), left })
    }

    /// What a user can do about a limit. For a geometry that did not fit, it names sizes that would.
    #[must_use]
    pub fn help(&self, limit: &Limit, wanted: Option<&Geometry>) -> String {
        let enlarge = match limit {
            Limit::Shm => {
                let size = wanted.map_or_else(
                    || "SIZE".to_owned(),
                    |geometry| {
                        // The memory that is in use stays in use.
                        let used = self.shm_total - self.shm_free.min(self.shm_total);
                        format!("{}m", (needed(geometry) + used).div_ceil(1 << 20))
                    },
                );
                let docker =
                    if self.shm_total == DOCKER_DEFAULT { " (64MiB is docker's default)" } else { "" };
                format!(
                    "enlarge {SHM_DIR}{docker}: docker run --shm-size={size} (or --ipc=host), kubernetes: an \
                     emptyDir of medium Memory on {SHM_DIR}, else mount -o remount,size={size} {SHM_DIR}"
                )
            }
            Limit::Memory => "free memory".to_owned(),
            Limit::Cgroup(_) => {
                "raise the limit (docker run --memory, kubernetes: resources.limits.memory)".to_owned()
            }
        };
        let Some(geometry) = wanted else { return enlarge };
        // A smaller arena has smaller tables, so the room is divided in the same proportion as for the wanted
        // arena.
        let fixed = fixed(geometry);
        let left = u128::from(self.tightest().usable().saturating_sub(fixed));
        let fits = left * u128::from(geometry.arena_bytes) / u128::from(needed(geometry) - fixed).max(1);
        let fits = ((fits >> 20) << 20) as u64;
        if fits == 0 {
            return enlarge;
        }
        format!("{enlarge}; or use at most --arena {}", ByteSize(fits))
    }
}

fn memory(meminfo: &str) -> Option<Memory> {
    let bytes = |key: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(key))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    };
    Some(Memory { total: bytes("MemTotal:")?, available: bytes("MemAvailable:")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn room() -> Room {
        let memory = Some(Memory { total: 24 * GIB, available: 20 * GIB });
        Room { shm_total: 10 * GIB, shm_free: 10 * GIB, memory, cgroup: None, stale: 0 }
    }

    fn geometry(arena: u64) -> Geometry {
        Geometry::new(arena, 1 << 20).unwrap()
    }

    #[test]
    fn the_tightest_limit_counts() {
        assert_eq!(check(&geometry(9 * GIB), &room()), Ok(()));
        let memory = Some(Memory { total: 24 * GIB, available: GIB });
        let tight_memory = Room { memory, ..room() };
        assert_eq!(check(&geometry(2 * GIB), &tight_memory).unwrap_err().left.limit, Limit::Memory);
        let group = CgroupRoom { path: "/cg".into(), limit: GIB, free: GIB / 2 };
        let limited = Room { cgroup: Some(group), ..room() };
        let error = check(&geometry(2 * GIB), &limited).unwrap_err();
        let said = "the control group /cg has 512MiB left (of which 32MiB are kept for others)";
        assert!(error.to_string().contains(said), "{error}");
        assert!(error.to_string().contains("--memory"), "{error}");
    }

    #[test]
    fn what_is_kept_for_others_is_in_the_budget_and_in_each_later_look() {
        let group = |free| CgroupRoom { path: "/cg".into(), limit: GIB, free };
        let limited = |free| Room { cgroup: Some(group(free)), ..room() };
        let arena = geometry(512 << 20);
        let exactly = needed(&arena) + (32 << 20);
        assert_eq!(check(&arena, &limited(exactly)), Ok(()));
        assert!(check(&arena, &limited(exactly - 1)).is_err());
        let piece = 4 << 20;
        assert_eq!(check_piece(piece, &limited((32 << 20) + CHANNEL + piece)), Ok(()));
        let error = check_piece(piece, &limited((32 << 20) + CHANNEL + piece - 1)).unwrap_err();
        assert!(error.to_string().contains("the control group /cg has 40"), "{error}");
        assert_eq!([kept(GIB), kept(100 << 20), kept(1 << 41)], [32 << 20, 32 << 20, GIB]);
    }

    #[test]
    fn the_channels_of_some_clients_are_in_the_budget_and_in_what_is_advised() {
        let shm = 64 << 20;
        let docker = Room { shm_total: shm, shm_free: shm, ..room() };
        let error = check(&geometry(63 << 20), &docker).unwrap_err();
        let advised: ByteSize = error.help.rsplit(' ').next().unwrap().parse().unwrap();
        assert_eq!(check(&geometry(advised.0), &docker), Ok(()));
        let left = shm - advised.0 - tables(&geometry(advised.0));
        assert!(left >= CLIENTS * CHANNEL, "{advised} leaves {left} bytes");
        assert!(advised.0 > 40 << 20, "{advised}");
    }

    #[test]
    fn dockers_default_says_what_helps() {
        let docker = Room { shm_total: 64 << 20, shm_free: 60 << 20, ..room() };
        let error = check(&geometry(8 * GIB), &docker).unwrap_err().to_string();
        for part in ["8GiB of arena", "/dev/shm has 60MiB left", "docker's default", "--shm-size=8"] {
            assert!(error.contains(part), "{part}: {error}");
        }
        // The size that is advised fits.
        let fits: ByteSize = error.rsplit(' ').next().unwrap().parse().unwrap();
        assert_eq!(check(&geometry(fits.0), &docker), Ok(()));
        assert!(!check(&geometry(20 * GIB), &room()).unwrap_err().to_string().contains("default"));
    }

    #[test]
    fn stale_segments_count_as_room_but_tables_are_needed_too() {
        assert!(check(&geometry(10 * GIB), &room()).is_err());
        assert_eq!(check(&geometry(10 * GIB), &Room { stale: GIB, ..room() }), Ok(()));
    }

    #[test]
    fn this_machine_can_be_measured() {
        let now = Room::now();
        assert!(now.shm_free > 0 && now.memory.is_some());
        let read = memory("MemTotal: 30 kB\nMemFree: 3 kB\nMemAvailable:   21 kB\n");
        assert_eq!(read, Some(Memory { total: 30 * 1024, available: 21 * 1024 }));
        assert_eq!(memory("MemTotal: 30 kB\nMemFree: 3 kB\n"), None);
    }

    #[test]
    fn the_arena_that_is_advised_fits_however_large_the_one_that_was_asked_for() {
        for asked in [21 * GIB, 1 << 40, 15 << 40] {
            let error = check(&geometry(asked), &room()).unwrap_err();
            let (_, advised) = error.help.split_once("--arena ").expect("a size that fits");
            let advised: ByteSize = advised.parse().unwrap();
            assert_eq!(check(&geometry(advised.0), &room()), Ok(()), "{advised}");
            assert!(advised.0 > 9 * GIB, "{advised} of 10 GiB, asked for {asked}");
        }
    }
}
