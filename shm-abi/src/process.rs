//! Identifies a client's process, so that an engine can tell when that process, and not another one with the same id, is gone
//! for good.
//!
//! A process id has a meaning in one PID namespace, and only until another process gets it; together with the time at which its
//! process was started it identifies that process. `/proc` tells this time in its reader's time namespace. So two processes can
//! identify a third one to each other only if both of their namespaces are the same, and if `/proc` shows each its own PID
//! namespace.

use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};
use std::os::unix::fs::MetadataExt;

/// One process, as another one in the same namespaces can find it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessIdentity {
    /// Its process id, in its PID namespace.
    pub pid: u32,
    /// The inode of its PID namespace; 0 if this or the time namespace is unknown.
    pub pid_namespace: u64,
    /// The inode of its time namespace; 0 on a kernel that has none, or if it is unknown.
    pub time_namespace: u64,
    /// When it was started, in clock ticks (field 22 of `/proc/self/stat`); 0 if that is unknown.
    pub started: u64,
}

/// What `/proc/<pid>/stat` says of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessStat {
    /// The state of its first thread: `R`, `S`, `Z` …
    pub state: char,
    /// Threads that have not ended.
    pub threads: u64,
    /// As [`ProcessIdentity::started`].
    pub started: u64,
}

impl ProcessIdentity {
    /// The identity of this process.
    #[must_use]
    pub fn own() -> ProcessIdentity {
        let pid = std::process::id();
        let inode = |file| std::fs::metadata(file).map(|found| found.ino());
        // Only a kernel without time namespaces has no such file. A file that cannot be read may belong to any namespace.
        let time_namespace = match inode("/proc/self/ns/time") {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Some(0),
            found => found.ok(),
        };
        // A `/proc` of another PID namespace shows another id.
        let is_ours = std::fs::read_link("/proc/self")
            .is_ok_and(|link| link.to_str().and_then(|text| text.parse().ok()) == Some(pid));
        ProcessIdentity {
            pid,
            pid_namespace: match (is_ours, time_namespace) {
                (true, Some(_)) => inode("/proc/self/ns/pid").unwrap_or(0),
                _ => 0,
            },
            time_namespace: time_namespace.unwrap_or(0),
            started: ProcessStat::of(pid).ok().flatten().map_or(0, |stat| stat.started),
        }
    }

    /// Do the other's process id and time of start mean the same process here as there?
    #[must_use]
    pub fn knows(&self, other: &ProcessIdentity) -> bool {
        let is_known = |who: &ProcessIdentity| who.pid_namespace != 0 && who.started != 0;
        is_known(self)
            && is_known(other)
            && (self.pid_namespace, self.time_namespace) == (other.pid_namespace, other.time_namespace)
    }
}

impl ProcessStat {
    /// That of the process with this id; `None` if there is no such process. A process that `/proc` does not show may still
    /// live, because `/proc` also hides processes from those who may not trace them (`hidepid=2`). So there is none only if no
    /// signal can be sent to it either.
    ///
    /// # Errors
    /// It cannot be read. That says nothing about the process.
    pub fn of(pid: u32) -> std::io::Result<Option<ProcessStat>> {
        match std::fs::read(format!("/proc/{pid}/stat")) {
            Ok(text) => parse(&String::from_utf8_lossy(&text))
                .map(Some)
                .ok_or_else(|| std::io::Error::other("/proc/<pid>/stat is not as expected")),
            Err(_) if !exists(pid) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Has its last thread ended? A first thread that ends before the others is a zombie until they have, too.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        matches!(self.state, 'Z' | 'X') && self.threads <= 1
    }
}

/// Is there a process with this id, perhaps one that has ended and has not been waited for? If the kernel gives no clear answer,
/// there is. A number that cannot be an id is nobody's.
fn exists(pid: u32) -> bool {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    pid.is_some_and(|pid| test_kill_process(pid) != Err(Errno::SRCH))
}

/// The name in the second field may hold anything, so the fields are counted from its last parenthesis on.
fn parse(text: &str) -> Option<ProcessStat> {
    let mut fields = text.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    // The next one is field 4; fields 20 and 22 are wanted.
    let threads = fields.nth(16)?.parse().ok()?;
    let started = fields.nth(1)?.parse().ok()?;
    Some(ProcessStat { state, threads, started })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_finds_itself_and_its_children() {
        let own = ProcessIdentity::own();
        assert_eq!(own.pid, std::process::id());
        assert!(own.knows(&own), "{own:?}");
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let stat = ProcessStat::of(child.id()).unwrap().unwrap();
        assert!(stat.started >= own.started && !stat.has_ended(), "{stat:?} after {own:?}");
        child.kill().unwrap();
        // It is a zombie until it is waited for.
        while !ProcessStat::of(child.id()).unwrap().unwrap().has_ended() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        child.wait().unwrap();
        assert_eq!(ProcessStat::of(child.id()).unwrap(), None);
    }

    #[test]
    fn what_is_unknown_or_elsewhere_is_not_known() {
        let own = ProcessIdentity { pid: 7, pid_namespace: 1, time_namespace: 2, started: 3 };
        for other in [
            ProcessIdentity { pid_namespace: 0, ..own },
            ProcessIdentity { pid_namespace: 9, ..own },
            ProcessIdentity { time_namespace: 0, ..own },
            ProcessIdentity { started: 0, ..own },
        ] {
            assert!(!own.knows(&other) && !other.knows(&own), "{other:?}");
        }
        assert!(own.knows(&ProcessIdentity { pid: 8, started: 5, ..own }));
    }

    #[test]
    fn a_name_may_hold_anything() {
        let fields: Vec<String> = (4..=30).map(|field| field.to_string()).collect();
        let text = format!("17 (a) b) Z 1 (c) S {}\n", fields.join(" "));
        assert_eq!(parse(&text), Some(ProcessStat { state: 'S', threads: 20, started: 22 }));
        assert_eq!(parse("17 (a) S 1 2 3"), None);
        assert_eq!(parse(""), None);
    }
}
