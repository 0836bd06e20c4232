//! Does the arena fit? Asked before anything is allocated, so that "no" comes with the numbers and the option that
//! helps, instead of a full `/dev/shm` or the out-of-memory killer half-way.

use crate::byte_size::ByteSize;
use crate::cgroup::{self, CgroupRoom};
use crate::segments::sweep;
use kvring_shm_abi::engine_segment::Places;
use kvring_shm_abi::lobby::LOBBY_BYTES;
use kvring_shm_abi::segment::{EngineName, SHM_DIR};
use kvring_shm_abi::slot::SLOT_HEADER_BYTES;
use kvring_shm_abi::superblock::Geometry;
use std::path::PathBuf;

/// What docker gives a container that asks for nothing.
const DOCKER_DEFAULT: u64 = 64 << 20;

/// For the estimate of the slot table, which is allocated as slabs get their class: shards are rarely smaller.
const USUAL_SHARD_MIN: u64 = 64 << 10;

/// What is left for a new engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Room {
    /// Bytes of `/dev/shm` in all.
    pub shm_total: u64,
    /// Bytes of `/dev/shm` that are free.
    pub shm_free: u64,
    /// Bytes that the machine can give without swapping (`MemAvailable`); `None` where it does not say.
    pub memory: Option<u64>,
    /// What the control groups leave; `None`: no limit.
    pub cgroup: Option<CgroupRoom>,
    /// Bytes of segments that a start under this name would remove first: they count as free everywhere.
    pub stale: u64,
}

/// What sets the limit.
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

/// An arena that cannot fit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "expected room for {} ({} of arena, the rest tables), {limit} has {} left; {help}",
    needed.human(), arena.human(), available.human()
)]
pub struct NoRoom {
    /// Arena and tables.
    pub needed: ByteSize,
    /// The arena alone.
    pub arena: ByteSize,
    /// What is left.
    pub available: ByteSize,
    /// Of what.
    pub limit: Limit,
    /// What to do.
    pub help: String,
}

/// Bytes that an engine of this geometry will allocate: the arena, and an estimate of its tables.
#[must_use]
pub fn needed(geometry: &Geometry) -> u64 {
    let slot_table = geometry.arena_bytes / USUAL_SHARD_MIN * SLOT_HEADER_BYTES as u64;
    geometry.arena_bytes + slot_table + fixed(geometry)
}

/// The part of it that does not grow with the arena, or hardly.
fn fixed(geometry: &Geometry) -> u64 {
    Places::of(geometry).slots_at + LOBBY_BYTES as u64 + crate::segments::ARENA_TRAILER
}

/// Refuses an arena that cannot fit.
///
/// # Errors
/// [`NoRoom`], with the tightest limit.
pub fn check(geometry: &Geometry, room: &Room) -> Result<(), NoRoom> {
    let needed = needed(geometry);
    let (limit, available) = room.tightest();
    if needed <= available {
        return Ok(());
    }
    Err(NoRoom {
        needed: ByteSize(needed),
        arena: ByteSize(geometry.arena_bytes),
        available: ByteSize(available),
        help: room.help(&limit, Some(geometry)),
        limit,
    })
}

impl Room {
    /// What is left now for an engine of this name, counting what an earlier one of the same name left behind.
    #[must_use]
    pub fn for_engine(name: &EngineName) -> Room {
        Room { stale: sweep::bytes_held(name), ..Room::now() }
    }

    /// What is left now.
    #[must_use]
    pub fn now() -> Room {
        let shm = nix::sys::statvfs::statvfs(SHM_DIR).ok();
        let shm = shm
            .map_or((0, 0), |s| (s.blocks() * s.fragment_size(), s.blocks_available() * s.fragment_size()));
        // A tmpfs without a size limit (size=0) says 0 blocks in all: then only memory limits it.
        let (shm_total, shm_free) = if shm.0 == 0 { (u64::MAX, u64::MAX) } else { shm };
        let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        Room { shm_total, shm_free, memory: mem_available(&meminfo), cgroup: cgroup::room(), stale: 0 }
    }

    /// The limit that leaves least, and how much that is, in bytes.
    #[must_use]
    pub fn tightest(&self) -> (Limit, u64) {
        let mut tightest = (Limit::Shm, self.shm_free);
        if let Some(free) = self.memory.filter(|free| *free < tightest.1) {
            tightest = (Limit::Memory, free);
        }
        if let Some(group) = self.cgroup.as_ref().filter(|group| group.free < tightest.1) {
            tightest = (Limit::Cgroup(group.path.clone()), group.free);
        }
        (tightest.0, tightest.1.saturating_add(self.stale))
    }

    /// What to do about a limit; for a geometry that did not fit it names sizes that would.
    #[must_use]
    pub fn help(&self, limit: &Limit, wanted: Option<&Geometry>) -> String {
        let enlarge = match limit {
            Limit::Shm => {
                let size = wanted.map_or_else(
                    || "SIZE".to_owned(),
                    |geometry| {
                        // What is in use stays in use.
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
        // A smaller arena has smaller tables: the room is divided as the wanted arena would divide it.
        let fixed = fixed(geometry);
        let left = u128::from(self.tightest().1.saturating_sub(fixed));
        let fits = left * u128::from(geometry.arena_bytes) / u128::from(needed(geometry) - fixed).max(1);
        let fits = ((fits >> 20) << 20) as u64;
        if fits == 0 {
            return enlarge;
        }
        format!("{enlarge}; or use at most --arena {}", ByteSize(fits))
    }
}

fn mem_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn room() -> Room {
        Room { shm_total: 10 * GIB, shm_free: 10 * GIB, memory: Some(20 * GIB), cgroup: None, stale: 0 }
    }

    fn geometry(arena: u64) -> Geometry {
        Geometry::new(arena, 1 << 20).unwrap()
    }

    #[test]
    fn the_tightest_limit_counts() {
        assert_eq!(check(&geometry(9 * GIB), &room()), Ok(()));
        let tight_memory = Room { memory: Some(GIB), ..room() };
        assert_eq!(check(&geometry(2 * GIB), &tight_memory).unwrap_err().limit, Limit::Memory);
        let group = CgroupRoom { path: "/cg".into(), limit: GIB, free: GIB / 2 };
        let limited = Room { cgroup: Some(group), ..room() };
        let error = check(&geometry(2 * GIB), &limited).unwrap_err();
        assert!(error.to_string().contains("the control group /cg has 512MiB left"), "{error}");
        assert!(error.to_string().contains("--memory"), "{error}");
    }

    #[test]
    fn dockers_default_says_what_helps() {
        let docker = Room { shm_total: 64 << 20, shm_free: 60 << 20, ..room() };
        let error = check(&geometry(8 * GIB), &docker).unwrap_err().to_string();
        for part in ["8GiB of arena", "/dev/shm has 60MiB left", "docker's default", "--shm-size=82"] {
            assert!(error.contains(part), "{part}: {error}");
        }
        // What is advised fits.
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
        assert_eq!(mem_available("MemFree: 3 kB\nMemAvailable:   21 kB\n"), Some(21 * 1024));
        assert_eq!(mem_available("MemFree: 3 kB\n"), None);
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
