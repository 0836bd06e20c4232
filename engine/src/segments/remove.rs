//! `kvring remove`.

use super::SetupError;
use super::files::all;
use super::found::Found;
use super::sweep::{Removed, mend_mode};
use super::takeover::acquire;
use crate::stop::StopHandle;
use kvring_shm_abi::segment::{Access, EngineName, SegmentFile};
use std::time::Duration;

/// `kvring remove`: removes all segments of an engine. Those of a living engine only with `force`: it keeps its
/// inodes, sees that they are retired, and ends, and its clients lose it as if it had died.
///
/// Without `force`: the engine lives or is starting. The engine's segment is another user's. A segment of ours
/// cannot be removed.
pub fn remove(name: &EngineName, force: bool, wait: Duration) -> Result<Removed, SetupError> {
    let names = all(name);
    if names.is_empty() {
        return Ok(Removed::default());
    }
    mend_mode(&name.engine_segment());
    let refused = match acquire(name, wait, &StopHandle::default()) {
        Ok(taken) => {
            let removed = taken.found.as_ref().unwrap_or(&Found::Incomplete).sweep(name)?;
            // If only the other segments were left, `acquire` has just made the engine's file, for its lock: it
            // does not count.
            let made = u64::from(taken.found.is_none());
            return Ok(Removed { segments: removed.segments.saturating_sub(made), ..removed });
        }
        Err(error) => error,
    };
    let (forced_pid, state) = match &refused {
        SetupError::AlreadyRunning { pid, .. } => (Some(*pid), "runs"),
        SetupError::Starting { .. } => (None, "is being started or removed"),
        SetupError::Exiting { .. } => (None, "is dead, and its process still exiting"),
        SetupError::OtherBuild { .. } => (None, "is another build's"),
        _ => return Err(refused),
    };
    if !force {
        return Err(refused);
    }
    tracing::warn!(name = %name, "this engine {state}; its segments are removed by force, as asked");
    // This goes without the lock, which its holder does not give up. A start that is under way notices at its end.
    let file = SegmentFile::open(&name.engine_segment(), Access::ReadWrite)?;
    let removed = Found::look(&file)?.sweep(name)?;
    Ok(Removed { forced_pid, ..removed })
}
