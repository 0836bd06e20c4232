//! Nothing of our engines stays in shared memory, however we end.
//!
//! Engines are killed here, on purpose or with their parent, and a killed engine leaves its segments. So a small
//! process waits for our end (its pipe is closed then, also after a SIGKILL), removes whatever bears our engines' names,
//! and ends as well. All other children die with us by themselves, except an engine of chaos that stands still at that
//! moment: the signal that ends it in order waits until it goes on. The small process kills that one.

use crate::child::{Child, Job};
use kvring_engine::segments;
use kvring_rig::pipe::Pipe;
use kvring_shm_abi::segment::{self, EngineName, SHM_DIR};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::time::Duration;

/// How long the removal of one engine's segments waits for the end of its process.
const PATIENCE: Duration = Duration::from_secs(10);
/// The pause between two looks: an engine that was being started when its parent died may still be at it.
const PAUSE: Duration = Duration::from_millis(50);
/// How many looks in a row must find nothing.
const CLEAN: u32 = 8;
/// How many looks there are at most.
const LOOKS: u32 = 400;

/// The process that removes, after our end, the segments of engines whose names begin with this.
#[derive(Serialize, Deserialize)]
pub(crate) struct SweeperJob(String);

/// The running process. It has done its work when this has been dropped.
pub(crate) struct Sweeper(Option<Child>);

impl Sweeper {
    /// Starts it for engines whose names begin with this, before the first of them is started.
    pub(crate) fn start(prefix: &str) -> anyhow::Result<Sweeper> {
        Ok(Sweeper(Some(Child::spawn(&SweeperJob(prefix.to_owned()))?)))
    }

    /// Tells it which process the engine is now, so that it can kill one that stands still.
    pub(crate) fn engine_is(&mut self, pid: u32) -> anyhow::Result<()> {
        self.0.as_mut().map_or(Ok(()), |child| child.send(&pid))
    }
}

impl Drop for Sweeper {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.0.take().map(Child::finish) {
            eprintln!("cleaning up {SHM_DIR}: {error:#}");
        }
    }
}

impl Job for SweeperJob {
    const NAME: &'static str = "sweeper";
    const OUTLIVES_PARENT: bool = true;

    /// The process itself.
    fn be(self, mut pipe: Pipe) -> anyhow::Result<()> {
        let SweeperJob(prefix) = &self;
        let mut engine = None;
        // An error is an end like any other: whatever has happened, everything is removed.
        while let Ok(Some(pid)) = pipe.receive::<u32>(None) {
            engine = Some(pid);
        }
        if let Some(pid) = engine {
            kill_if_ours(pid, prefix);
        }
        let mut clean = 0;
        for _ in 0..LOOKS {
            let found = find(std::fs::read_dir(SHM_DIR)?.flatten().map(|entry| entry.file_name()), prefix);
            clean = if found.engines.is_empty() && found.others.is_empty() { clean + 1 } else { 0 };
            if clean == CLEAN {
                return Ok(());
            }
            for name in &found.others {
                segment::unlink(name);
            }
            for name in &found.engines {
                // By force: an engine that still lives under this name has lost its parent.
                segments::remove(&EngineName::new(name)?, true, PATIENCE)?;
            }
            std::thread::sleep(PAUSE);
        }
        anyhow::bail!("segments of {prefix} come back again and again")
    }
}

/// Kills the process if it still is one of these engines: by now the id may be somebody else's.
fn kill_if_ours(pid: u32, prefix: &str) {
    let said = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let is_ours = said.split(|byte| *byte == 0).any(|word| word == prefix.trim_end_matches('.').as_bytes());
    if let Some(pid) = i32::try_from(pid).ok().filter(|_| is_ours) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

/// Our engines and segments that there are.
#[derive(Debug, Default, PartialEq, Eq)]
struct Found {
    /// Engines, by name.
    engines: BTreeSet<String>,
    /// Segments that belong to no engine.
    others: BTreeSet<String>,
}

fn find(files: impl Iterator<Item = std::ffi::OsString>, prefix: &str) -> Found {
    let mut found = Found::default();
    for file in files {
        let Some(file) = file.to_str() else { continue };
        if let Some(rest) = file.strip_prefix("kvring.").filter(|rest| rest.starts_with(prefix)) {
            found.engines.extend(rest.split('.').next().map(str::to_owned));
        } else if file.strip_prefix("kvring-").is_some_and(|rest| rest.starts_with(prefix)) {
            found.others.insert(file.to_owned());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_bears_our_name_is_found() {
        let files = [
            "kvring.bench-7-0.engine",
            "kvring.bench-7-0.client.3.00ff",
            "kvring.bench-7-12.arena",
            "kvring-bench-7-2",
            "kvring.bench-77-0.engine",
            "kvring.default.engine",
            "sem.other",
        ];
        let found = find(files.iter().map(Into::into), "bench-7-");
        assert_eq!(found.engines, BTreeSet::from(["bench-7-0".to_owned(), "bench-7-12".to_owned()]));
        assert_eq!(found.others, BTreeSet::from(["kvring-bench-7-2".to_owned()]));
    }
}
