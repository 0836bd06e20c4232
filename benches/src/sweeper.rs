//! Nothing of a benchmark's engines stays in shared memory, however the benchmark ends.
//!
//! Engines are killed here, on purpose or with their parent, and a killed engine leaves its segments. So a small
//! process waits for our end (the end of its standard input says so, also after a SIGKILL), removes whatever bears
//! our engines' names, and ends as well.

use crate::child::{self, Child, Job};
use kvring_engine::segments;
use kvring_shm_abi::segment::{self, EngineName, SHM_DIR};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::time::Duration;

/// Whose engines.
#[derive(Serialize, Deserialize)]
pub(crate) struct SweeperJob {
    /// What their names begin with.
    prefix: String,
}

/// How long the removal of one engine's segments waits for what is left of its process.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two looks: an engine that was being started when its parent died may be at it still.
const PAUSE: Duration = Duration::from_millis(50);
/// Looks at most: one that finds nothing twice ends the work.
const LOOKS: u32 = 100;

/// The running process. When this is dropped the work is done.
pub(crate) struct Sweeper(Child);

impl Sweeper {
    /// Starts it. Before the first engine is.
    pub(crate) fn start() -> anyhow::Result<Sweeper> {
        Ok(Sweeper(Child::spawn(&Job::Sweeper(SweeperJob { prefix: child::name_prefix() }))?))
    }
}

impl Drop for Sweeper {
    fn drop(&mut self) {
        if let Err(error) = self.0.finish() {
            eprintln!("cleaning up {SHM_DIR}: {error:#}");
        }
    }
}

/// The child's side.
pub(crate) fn be(job: SweeperJob) -> anyhow::Result<()> {
    child::commands().for_each(drop);
    let mut clean = 0;
    for _ in 0..LOOKS {
        let found = find(std::fs::read_dir(SHM_DIR)?.flatten().map(|entry| entry.file_name()), &job.prefix);
        clean = if found.engines.is_empty() && found.others.is_empty() { clean + 1 } else { 0 };
        if clean == 2 {
            return Ok(());
        }
        for name in &found.others {
            segment::unlink(name);
        }
        for name in &found.engines {
            // By force: what still lives under this name has lost its parent.
            segments::remove(&EngineName::new(name)?, true, PATIENCE)?;
        }
        std::thread::sleep(PAUSE);
    }
    anyhow::bail!("segments of {} come back again and again", job.prefix)
}

/// What there is of a benchmark's.
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
