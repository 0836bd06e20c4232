//! A client for which devices write may not have ended when its life word is marked.
//!
//! The kernel marks the word when the thread that owns it ends. That thread's process may go on (`threads_linger` and
//! `waits_for_process` in `tests/src/model/restart`). While the process is being taken apart, or if no other thread of it has
//! ended, a device may still write into slots that the client was granted. So the slots that such a client was writing stay
//! WRITING, and it keeps its entry, until its *process* is gone for good. Everything else is freed at the mark, as for any
//! client.
//!
//! The kernel says when a process is *gone for good*: its pidfd becomes readable, and its zombie has no thread left, only after
//! the last thread has given up the address space and the descriptors and the last of these files has been closed. The engine
//! opens the pidfd first and then reads the process's time of start: if that is the client's, the pidfd is of the client's
//! process. So the pidfd need not be opened while the client lives, and the next engine finds out in the same way. Where the
//! time cannot be read, another process may have the id by now: then the engine waits for the end of that one, and frees
//! nothing too early.
//!
//! *In another PID namespace*, where the id means nothing, the client's process holds a file lock through a mapping that
//! has no descriptor. Linux drops the files of a process in this order (seen on 6.18, true since 4.3: final closes are
//! queued, and run last in, first out, when the thread that drops them has left both the address space and the descriptor
//! table): first the files of descriptors, from the highest number to the lowest, then those that only mappings held. A lock
//! through a descriptor would say nothing of devices with lower numbers. This one ends after all devices' files if the last
//! thread to leave the address space is also the last to leave the descriptors. That is not so if this thread is delayed
//! between the two, or if a reader of `/proc` holds the address space for a moment; hence a grace on top.

use kvring_shm_abi::futex::monotonic_ns;
use kvring_shm_abi::lobby::DmaOwner;
use kvring_shm_abi::process::{ProcessIdentity, ProcessStat};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::os::fd::{AsFd, OwnedFd};

/// How long after the end of its lock a process of another PID namespace may take to close the last of its devices: a GPU's
/// context can take seconds.
const LOCK_GRACE_NS: u64 = 10_000_000_000;

/// The time between two looks at a client that lingers: a look is a system call, and a busy engine looks around the lobby every
/// millisecond.
const LOOK_NS: u64 = 10_000_000;

/// A client that is marked dead, and the end of its process, which is waited for.
pub(super) struct Lingering {
    since_ns: u64,
    next_look_ns: u64,
    until: Until,
}

/// How the engine learns that the client's process has ended.
enum Until {
    /// By its pidfd, and by nothing else: `/proc` may hide a process that lives.
    Pidfd(OwnedFd),
    /// By looking for the process, where there is no pidfd to be had.
    Gone(ProcessIdentity),
    /// By its file lock, once that has been free for [`LOCK_GRACE_NS`]. Holds the time since which it is free.
    Unlocked(Option<u64>),
    /// Not at all: its slots stay as they are until this entry is written over, or there is another arena.
    Never,
}

impl Until {
    fn of(owner: &DmaOwner, own: &ProcessIdentity) -> Until {
        if !own.knows(&owner.process) {
            return if owner.locked { Until::Unlocked(None) } else { Until::Never };
        }
        let pid = i32::try_from(owner.process.pid).ok().and_then(Pid::from_raw);
        // Opened before the time of start is read, so that a time which matches proves whose pidfd this is.
        let pidfd = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        let is_anothers = matches!(
            ProcessStat::of(owner.process.pid),
            Ok(Some(stat)) if stat.started != owner.process.started
        );
        match pidfd {
            Some(pidfd) if !is_anothers => Until::Pidfd(pidfd),
            _ => Until::Gone(owner.process),
        }
    }

    fn is_over(&mut self, now: u64, is_locked: impl FnOnce() -> bool) -> bool {
        match self {
            Until::Pidfd(pidfd) => {
                let mut asked = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
                matches!(poll(&mut asked, PollTimeout::ZERO), Ok(1))
                    && asked[0].revents().is_some_and(|events| events.contains(PollFlags::POLLIN))
            }
            Until::Gone(process) => is_gone(process),
            Until::Unlocked(free_since) => {
                *free_since = if is_locked() { None } else { free_since.or(Some(now)) };
                free_since.is_some_and(|since| now.saturating_sub(since) >= LOCK_GRACE_NS)
            }
            Until::Never => false,
        }
    }

    /// For the log.
    fn as_str(&self) -> &'static str {
        match self {
            Until::Pidfd(_) => "its pidfd",
            Until::Gone(_) => "/proc",
            Until::Unlocked(_) => "a file lock, in another PID namespace",
            Until::Never => "nothing: neither its PID namespace is known nor has it a file lock",
        }
    }
}

/// Has the process ended with all its threads, or does another one have its id? Where neither can be read it counts as living.
fn is_gone(process: &ProcessIdentity) -> bool {
    match ProcessStat::of(process.pid) {
        Ok(Some(stat)) => stat.started != process.started || stat.has_ended(),
        Ok(None) => true,
        Err(_) => false,
    }
}

impl Lingering {
    /// Begins to wait for the end of the process that this owner has named; `None`: it has ended already. `is_locked` says
    /// whether somebody holds its file lock, or that this cannot be told.
    pub(super) fn begin(
        owner: &DmaOwner,
        own: &ProcessIdentity,
        is_locked: impl FnOnce() -> bool,
    ) -> Option<Lingering> {
        let since_ns = monotonic_ns();
        let mut until = Until::of(owner, own);
        if until.is_over(since_ns, is_locked) {
            return None;
        }
        Some(Lingering { since_ns, next_look_ns: 0, until })
    }

    /// What tells of the end, for the log.
    pub(super) fn told_by(&self) -> &'static str {
        self.until.as_str()
    }

    /// How many milliseconds the process was waited for, if it has ended. Between two looks the answer is no.
    pub(super) fn ended_after(&mut self, is_locked: impl FnOnce() -> bool) -> Option<u64> {
        let now = monotonic_ns();
        if now < self.next_look_ns {
            return None;
        }
        self.next_look_ns = now + LOOK_NS;
        self.until.is_over(now, is_locked).then(|| now.saturating_sub(self.since_ns) / 1_000_000)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    /// A process, and what a client in it would have declared.
    fn process() -> (Child, DmaOwner) {
        let child = Command::new("sleep").arg("120").spawn().unwrap();
        let started = ProcessStat::of(child.id()).unwrap().unwrap().started;
        let process = ProcessIdentity { pid: child.id(), started, ..ProcessIdentity::own() };
        (child, DmaOwner { process, locked: false })
    }

    /// Gives this thread a `/proc` that hides the processes which the thread may not trace.
    fn hide_processes() -> nix::Result<()> {
        use nix::errno::Errno;
        let mount = |from: &std::ffi::CStr, to: &std::ffi::CStr, flags, data: &std::ffi::CStr| {
            // SAFETY: strings that outlive the call; a namespace of this thread's own.
            Errno::result(unsafe {
                nix::libc::mount(from.as_ptr(), to.as_ptr(), c"proc".as_ptr(), flags, data.as_ptr().cast())
            })
        };
        // SAFETY: concerns this thread alone, which ends with its test.
        Errno::result(unsafe { nix::libc::unshare(nix::libc::CLONE_NEWNS) })?;
        mount(c"none", c"/", nix::libc::MS_REC | nix::libc::MS_PRIVATE, c"")?;
        mount(c"proc", c"/proc", 0, c"hidepid=2")?;
        // A member of group 0 would see everything all the same.
        // SAFETY: as above: the system calls, other than libc's functions, are for the calling thread.
        unsafe {
            Errno::result(nix::libc::syscall(nix::libc::SYS_setgroups, 0, std::ptr::null::<u32>()))?;
            Errno::result(nix::libc::syscall(nix::libc::SYS_setresgid, 65534, 65534, 65534))?;
            Errno::result(nix::libc::syscall(nix::libc::SYS_setresuid, 65534, 65534, 65534))?;
        }
        Ok(())
    }

    #[test]
    fn a_process_that_is_hidden_has_not_ended() {
        let (mut child, owner) = process();
        let own = ProcessIdentity::own();
        let (ask, asked) = std::sync::mpsc::channel::<()>();
        let (answer, answers) = std::sync::mpsc::channel();
        let engine = std::thread::spawn(move || {
            if let Err(refused) = hide_processes() {
                eprintln!("SKIPPED: no /proc of our own here: {refused}");
                return;
            }
            let path = format!("/proc/{}/stat", owner.process.pid);
            assert_eq!(std::fs::read(path).unwrap_err().raw_os_error(), Some(nix::libc::ENOENT));
            // Neither with a pidfd nor without one is it taken for ended.
            let mut all = [Until::of(&owner, &own), Until::Gone(owner.process)];
            assert!(matches!(all[0], Until::Pidfd(_)));
            while asked.recv().is_ok() {
                let over = all.each_mut().map(|until| until.is_over(0, || false));
                answer.send(over).unwrap();
            }
        });
        if ask.send(()).is_ok() && answers.recv().map(|over| assert_eq!(over, [false; 2], "it lives")).is_ok()
        {
            child.kill().unwrap();
            child.wait().unwrap();
            ask.send(()).unwrap();
            assert_eq!(answers.recv(), Ok([true; 2]));
        } else {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        drop(ask);
        engine.join().unwrap();
    }

    #[test]
    fn an_id_that_somebody_else_has_by_now_is_not_waited_for() {
        let (mut child, owner) = process();
        let own = ProcessIdentity::own();
        let earlier = ProcessIdentity { started: owner.process.started - 1, ..owner.process };
        assert!(Until::of(&DmaOwner { process: earlier, ..owner }, &own).is_over(0, || false));
        let mut until = Until::of(&owner, &own);
        assert!(matches!(until, Until::Pidfd(_)) && !until.is_over(0, || false));
        child.kill().unwrap();
        // It becomes a zombie, when all its files are closed.
        let began = std::time::Instant::now();
        while !until.is_over(0, || false) {
            assert!(began.elapsed().as_secs() < 60);
            std::thread::yield_now();
        }
        child.wait().unwrap();
        assert!(Until::of(&owner, &own).is_over(0, || false), "an id that nobody has");
    }
}
