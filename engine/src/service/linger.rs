//! A client for which devices write is not over with the mark on its life word.
//!
//! The kernel marks the word when the thread that owns it ends. Its process may go on (`threads_linger` and
//! `waits_for_process` in `tests/src/model/restart`), and while a process is being taken apart, or if nothing but that thread
//! has ended, a device may still write into slots that were given to it. So what such an entry was writing stays WRITING, and
//! the entry its, until the *process* is gone for good; everything else of it is freed at the mark, as ever.
//!
//! *Gone for good* is a fact of the kernel's: a pidfd is readable, and a zombie has no thread left, after the last thread
//! has given up the address space and the descriptors and the last of these files has been closed. The pidfd is opened
//! first, then the process's time of start is read: if that is the client's, so was the process that the pidfd is of. So it
//! need not be opened while the client lives, and the next engine does the same. Where that time cannot be read the process
//! may be another's that has got its id by now: then the end of that one is waited for, and nothing is freed too early.
//!
//! *In another PID namespace*, where the id means nothing, the client's process holds a file lock through a mapping that
//! has no descriptor. Linux drops the files of a process in this order (seen on 6.18, true since 4.3: final closes are
//! queued, and run last in, first out, when the thread that drops them has left both the address space and the descriptor
//! table): first those of descriptors, from the highest number to the lowest, then what only mappings held. A lock through a
//! descriptor would say nothing of the devices with lower numbers; this one ends after all of them if the last thread to
//! leave the address space is the last to leave the descriptors too. It is another thread that does if that one stands still
//! between the two, or a reader of `/proc` that holds the address space for a moment; hence a grace on top.

use super::Service;
use super::entry::{Entry, Then};
use crate::cache::Leaving;
use kvring_shm_abi::failpoint::{self, Rule};
use kvring_shm_abi::futex::monotonic_ns;
use kvring_shm_abi::lobby::DmaOwner;
use kvring_shm_abi::process::{ProcessIdentity, ProcessStat};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::os::fd::{AsFd, OwnedFd};

/// How long after the end of its lock a process of another PID namespace may take to close the last of its devices: a GPU's
/// context can take seconds.
const LOCK_GRACE_NS: u64 = 10_000_000_000;

/// How often it is looked for: a look is a system call, and a busy engine looks around every millisecond.
const LOOK_NS: u64 = 10_000_000;

/// An owner that is marked dead, and whose process is waited for.
pub(super) struct Lingering {
    since_ns: u64,
    next_look_ns: u64,
    until: Until,
}

/// Its end.
enum Until {
    /// This says so, and nothing else: `/proc` may hide a process that lives.
    Pidfd(OwnedFd),
    /// There is no pidfd to be had: it is looked for.
    Gone(ProcessIdentity),
    /// The lock that it holds has been free for [`LOCK_GRACE_NS`]; since when.
    Unlocked(Option<u64>),
    /// Nothing would say so: not before this entry is written over, or there is another arena.
    Never,
}

impl Until {
    fn of(owner: &DmaOwner, own: &ProcessIdentity) -> Until {
        if !own.knows(&owner.process) {
            return if owner.locked { Until::Unlocked(None) } else { Until::Never };
        }
        let pid = i32::try_from(owner.process.pid).ok().and_then(Pid::from_raw);
        // Before the time of start is read: so that is the time of the process that the pidfd is of.
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

/// Has the process ended with all its threads, or somebody else its id? What cannot be read says nothing.
fn is_gone(process: &ProcessIdentity) -> bool {
    match ProcessStat::of(process.pid) {
        Ok(Some(stat)) => stat.started != process.started || stat.has_ended(),
        Ok(None) => true,
        Err(_) => false,
    }
}

impl Service {
    /// The owner of this entry is marked dead: it is reclaimed, or where a device may still write for it, all of it but
    /// that.
    pub(super) fn bury(&mut self, entry: usize) {
        // Who writes nothing leaves nothing that a device could be writing into.
        let writes = self.cache.writes(entry as u8);
        let owner = self.segments.lobby.entries[entry].dma().filter(|_| writes);
        let Some(owner) = owner.filter(|_| !failpoint::broken(Rule::WaitsForTheProcess)) else {
            return self.reclaim(entry);
        };
        let since_ns = monotonic_ns();
        let mut until = Until::of(&owner, &self.own);
        if until.is_over(since_ns, || self.segments.holds_dma_lock(entry)) {
            return self.reclaim(entry);
        }
        self.hang_up(entry, "client died; its leases are freed");
        tracing::warn!(
            entry,
            pid = owner.process.pid,
            told_by = until.as_str(),
            "devices may still write for a dead client: what it was writing is kept until its process is gone"
        );
        let lingering = Lingering { since_ns, next_look_ns: 0, until };
        self.begin_parting(entry, Leaving::Lingers, Then::Wait(lingering));
    }

    /// With each look around the lobby.
    pub(super) fn look_at_lingering(&mut self, entry: usize) {
        let Entry::Lingering(lingering) = &mut self.entries[entry] else { return };
        let now = monotonic_ns();
        if now < lingering.next_look_ns {
            return;
        }
        lingering.next_look_ns = now + LOOK_NS;
        let segments = &self.segments;
        if lingering.until.is_over(now, || segments.holds_dma_lock(entry)) {
            let ms = now.saturating_sub(lingering.since_ns) / 1_000_000;
            tracing::info!(entry, ms, "the process of a dead client is gone; what it was writing is freed");
            self.reclaim(entry);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    /// A process, and what a client in it would have said of it.
    fn process() -> (Child, DmaOwner) {
        let child = Command::new("sleep").arg("120").spawn().unwrap();
        let started = ProcessStat::of(child.id()).unwrap().unwrap().started;
        let process = ProcessIdentity { pid: child.id(), started, ..ProcessIdentity::own() };
        (child, DmaOwner { process, locked: false })
    }

    /// From here on this thread sees a `/proc` that shows it none of the processes which it may not trace.
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
        // Who is of the group 0 sees everything all the same.
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
            // Where there is no pidfd to be had, either.
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
        // A zombie: all that it had is closed.
        let began = std::time::Instant::now();
        while !until.is_over(0, || false) {
            assert!(began.elapsed().as_secs() < 60);
            std::thread::yield_now();
        }
        child.wait().unwrap();
        assert!(Until::of(&owner, &own).is_over(0, || false), "an id that nobody has");
    }
}
