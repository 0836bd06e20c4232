//! How much memory this process's control groups leave it (versions 2 and 1).
//!
//! The limit of every group counts, from the process's own up to the root that is visible. Page cache does not
//! count as used: a container that has just read its model's weights is "full" of it, but the kernel drops it when
//! memory is needed.

use std::path::{Path, PathBuf};

/// The group that leaves the least memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CgroupRoom {
    /// The group's directory.
    pub path: PathBuf,
    /// Its limit, in bytes.
    pub limit: u64,
    /// The memory that it leaves, in bytes.
    pub free: u64,
}

/// Version 1 expresses "no limit" by the largest multiple of a page. No machine has as much memory as this.
const NO_LIMIT: u64 = 1 << 60;

/// The files of one version of the interface.
struct Files {
    limit: &'static str,
    usage: &'static str,
    cache: &'static [&'static str],
}

const V2: Files = Files {
    limit: "memory.max",
    usage: "memory.current",
    cache: &["active_file", "inactive_file", "slab_reclaimable"],
};
const V1: Files = Files {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    cache: &["total_active_file", "total_inactive_file"],
};

/// The memory that the control groups leave; `None` if there is no limit, or nothing can be read.
#[must_use]
pub fn room() -> Option<CgroupRoom> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    room_in(&groups, &mounts, Path::new("/"))
}

/// As `room`, from the texts of the two files. `root` is the directory that has the mount points: `/`, or a test's.
fn room_in(groups: &str, mounts: &str, root: &Path) -> Option<CgroupRoom> {
    let v2 = group_path(groups, "").and_then(|group| directory(group, mounts, "cgroup2", ""));
    let v1 = group_path(groups, "memory").and_then(|group| directory(group, mounts, "cgroup", "memory"));
    let tightest = |place: Option<(PathBuf, PathBuf)>, files: &Files| {
        let (mount, below) = place?;
        let top = root.join(mount.strip_prefix("/").unwrap_or(&mount));
        walk(&top, &below, files)
    };
    [tightest(v2, &V2), tightest(v1, &V1)].into_iter().flatten().min_by_key(|room| room.free)
}

/// The process's group in the hierarchy of this controller (`""`: version 2), from `/proc/self/cgroup`.
fn group_path<'a>(groups: &'a str, controller: &str) -> Option<&'a str> {
    groups.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':');
        let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
        let ours = controllers == controller
            || (!controller.is_empty() && controllers.split(',').any(|c| c == controller));
        ours.then_some(path)
    })
}

/// Where the hierarchy is mounted, and the group's path below that. A container without a cgroup namespace sees its
/// path from the host's root, but only its own part of that is mounted.
fn directory(group: &str, mounts: &str, kind: &str, option: &str) -> Option<(PathBuf, PathBuf)> {
    mounts.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let mut before = before.split(' ').skip(3);
        let (mount_root, mount_point) = (unescape(before.next()?), unescape(before.next()?));
        let mut after = after.split(' ');
        let (found, options) = (after.next()?, after.nth(1).unwrap_or(""));
        if found != kind || !(option.is_empty() || options.split(',').any(|o| o == option)) {
            return None;
        }
        let below = Path::new(group).strip_prefix(&mount_root).unwrap_or(Path::new(""));
        Some((PathBuf::from(mount_point), below.to_owned()))
    })
}

/// The kernel writes a space in a path as `\040`.
fn unescape(text: &str) -> String {
    text.replace("\\040", " ")
}

/// The tightest group from `top/below` up to `top`.
fn walk(top: &Path, below: &Path, files: &Files) -> Option<CgroupRoom> {
    below.ancestors().filter_map(|part| group_room(&top.join(part), files)).min_by_key(|room| room.free)
}

fn group_room(path: &Path, files: &Files) -> Option<CgroupRoom> {
    let number = |file| std::fs::read_to_string(path.join(file)).ok()?.trim().parse::<u64>().ok();
    // "max" is no number; it means no limit.
    let limit = number(files.limit).filter(|limit| *limit < NO_LIMIT)?;
    let usage = number(files.usage)?;
    let stat = std::fs::read_to_string(path.join("memory.stat")).unwrap_or_default();
    let cache: u64 = stat
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter(|(key, _)| files.cache.contains(key))
        .filter_map(|(_, value)| value.trim().parse::<u64>().ok())
        .sum();
    let free = limit.saturating_sub(usage.saturating_sub(cache));
    Some(CgroupRoom { path: path.to_owned(), limit, free })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, group: &str, files: &[(&str, &str)]) {
        let dir = root.join(group);
        std::fs::create_dir_all(&dir).unwrap();
        for (name, text) in files {
            std::fs::write(dir.join(name), text).unwrap();
        }
    }

    const V2_MOUNT: &str = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";

    #[test]
    fn version_2_the_tightest_ancestor_counts_and_cache_is_free() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let pod = "sys/fs/cgroup/pod";
        write(root, pod, &[("memory.max", "1000000\n"), ("memory.current", "900000\n")]);
        std::fs::write(
            root.join(pod).join("memory.stat"),
            "anon 100\nactive_file 300000\ninactive_file 100000\nshmem 7\n",
        )
        .unwrap();
        write(root, "sys/fs/cgroup/pod/box", &[("memory.max", "max\n"), ("memory.current", "5\n")]);
        let found = room_in("0::/pod/box\n", V2_MOUNT, root).unwrap();
        assert_eq!(found, CgroupRoom { path: root.join(pod), limit: 1_000_000, free: 500_000 });
        write(root, "sys/fs/cgroup/pod/box", &[("memory.max", "400\n"), ("memory.current", "500\n")]);
        assert_eq!(room_in("0::/pod/box\n", V2_MOUNT, root).unwrap().free, 0, "over its limit already");
    }

    #[test]
    fn version_1_and_a_mount_of_the_containers_own_part() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let mounts = "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n";
        write(
            root,
            "sys/fs/cgroup/memory",
            &[("memory.limit_in_bytes", "4096000\n"), ("memory.usage_in_bytes", "96000\n")],
        );
        let groups = "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n";
        assert_eq!(room_in(groups, mounts, root).unwrap().free, 4_000_000);
        write(root, "sys/fs/cgroup/memory", &[("memory.limit_in_bytes", "9223372036854771712\n")]);
        assert_eq!(room_in(groups, mounts, root), None);
    }

    #[test]
    fn nothing_to_read_is_no_limit() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(room_in("0::/\n", V2_MOUNT, dir.path()), None);
        assert_eq!(room_in("", "", dir.path()), None);
        // Whatever this machine has, there is no panic.
        let _ = room();
    }
}
