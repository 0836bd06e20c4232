//! Tests that look at their own process (threads, mappings, descriptors), change it (uid, mounts, control group) or fork:
//! each runs in a process of its own, which is this test binary again.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

const INSIDE: &str = "KVRING_TEST_ISOLATED";

/// Runs `body` in a process of its own: this binary again, with only the test `name` (its full path).
pub fn isolated(name: &str, body: impl FnOnce()) {
    isolated_by(name, &[], body);
}

/// The same behind a command that ends in `exec "$@"`, such as one that mounts a small `/dev/shm` first.
pub fn isolated_by(name: &str, prefix: &[&str], body: impl FnOnce()) {
    if std::env::var_os(INSIDE).is_some() {
        return body();
    }
    let exe = std::env::current_exe().expect("this test's own path");
    let mut words = prefix.iter().map(Into::into).collect::<Vec<std::ffi::OsString>>();
    words.push(exe.into());
    let output = Command::new(&words[0])
        .args(&words[1..])
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(INSIDE, "1")
        .output()
        .expect("a process for the test");
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name}, in its own process: {}\n{text}\n{errors}", output.status);
    // A misspelt name runs nothing, and succeeds.
    assert!(text.contains("1 passed"), "{name} ran no test:\n{text}");
}

/// A control group of this test's own (version 1 or 2), with a limit.
pub struct ControlGroup {
    dir: PathBuf,
    usage: &'static str,
}

impl ControlGroup {
    const VERSIONS: [(&'static str, &'static str, &'static str); 2] = [
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
    ];

    fn dirs() -> impl Iterator<Item = (PathBuf, &'static str, &'static str)> {
        // The same for the test's own process and the one that it runs in.
        let own = |inside: bool| if inside { nix::unistd::getppid() } else { nix::unistd::getpid() };
        let own = format!("kvring-test-{}", own(std::env::var_os(INSIDE).is_some()));
        ControlGroup::VERSIONS
            .map(|(root, limit, usage)| (Path::new(root).join(&own), limit, usage))
            .into_iter()
    }

    /// Runs `body` as the only process of a new group with this limit. Where no group can be made, it says so and runs
    /// nothing.
    pub fn limited(name: &str, bytes: u64, body: impl FnOnce(&ControlGroup)) {
        if !is_root(name) {
            return;
        }
        if std::env::var_os(INSIDE).is_some() {
            let made = ControlGroup::dirs().find(|(dir, limit, _)| dir.join(limit).exists());
            let (dir, _, usage) = made.expect("the group that this process was started in");
            return body(&ControlGroup { dir, usage });
        }
        let limited = |(dir, limit, _): &(PathBuf, &str, &str)| {
            std::fs::create_dir(dir).is_ok() && std::fs::write(dir.join(limit), bytes.to_string()).is_ok()
        };
        let remove = || ControlGroup::dirs().for_each(|(dir, ..)| drop(std::fs::remove_dir(dir)));
        let Some((dir, ..)) = ControlGroup::dirs().find(limited) else {
            remove();
            eprintln!("SKIPPED {name}: no control group can be made here");
            return;
        };
        let enter = format!("echo $$ > {}/cgroup.procs && exec \"$@\"", dir.display());
        let ran = std::panic::catch_unwind(|| isolated_by(name, &["sh", "-c", &enter, "sh"], || ()));
        remove();
        if let Err(panic) = ran {
            std::panic::resume_unwind(panic);
        }
    }

    /// How many bytes of it are used.
    pub fn used(&self) -> u64 {
        let text = std::fs::read_to_string(self.dir.join(self.usage)).expect("the group's usage");
        text.trim().parse().expect("a number")
    }
}

/// Does this user have the privileges of root? Where not, says that the test is skipped.
pub fn is_root(test: &str) -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED {test}: needs root");
    }
    root
}

/// What a process holds that an attachment could leave behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Thread names, with their number.
    pub threads: Vec<String>,
    /// Mapped segments of the engine, one line each: the file, without its addresses.
    pub mappings: Vec<String>,
    /// Open descriptors.
    pub descriptors: usize,
}

impl Footprint {
    /// Of this process, as far as the engine of this name is concerned.
    pub fn now(engine: &str) -> Footprint {
        let prefix = format!("/kvring.{engine}.");
        let maps = std::fs::read_to_string("/proc/self/maps").expect("/proc/self/maps");
        let mut mappings: Vec<String> = maps
            .lines()
            .filter(|line| line.contains(&prefix))
            .filter_map(|line| line.split_once('/').map(|(_, file)| file.to_owned()))
            .collect();
        mappings.sort();
        let mut threads: Vec<String> = std::fs::read_dir("/proc/self/task")
            .expect("/proc/self/task")
            .flatten()
            // A thread may end between the listing and the reading.
            .filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok())
            .map(|name| name.trim().to_owned())
            .collect();
        threads.sort();
        let descriptors = std::fs::read_dir("/proc/self/fd").expect("/proc/self/fd").count();
        Footprint { threads, mappings, descriptors }
    }

    /// How many mappings there are of segments whose names hold `part`.
    pub fn mapped(&self, part: &str) -> usize {
        self.mappings.iter().filter(|file| file.contains(part)).count()
    }
}

/// Names in `/dev/shm` that belong to the engine of this name.
pub fn segments(engine: &str) -> BTreeSet<String> {
    let prefix = format!("kvring.{engine}.");
    std::fs::read_dir("/dev/shm")
        .expect("/dev/shm")
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with(&prefix))
        .collect()
}
