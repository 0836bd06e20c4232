//! Finds out which of two features this kernel, or the sandbox around this process, has: *robust lists*, by which others learn
//! of a death at once, and `futex_waitv`, by which one sleep waits for several words. gVisor, seccomp filters
//! and kernels before Linux 5.16 lack one or both; then something slower stands in (`claims`, `futex`), and `status` says
//! so.
//!
//! Each is probed once in a process, when somebody first asks for it, by using it: the kernel's name and version do not count.
//! Only tests can switch a probe off.

use crate::failpoint::{self, Ability};
use crate::futex::{self, Deadline};
use crate::life::{Life, LifeWord, RobustList};
use crate::mapping::{Mapping, View};
use crate::means::{DeathNotice, Means, Waiting};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// How long the probe waits for the mark on a word after its thread has ended. Linux has marked the word before the thread can
/// be joined, so this time passes only where the kernel does not mark words.
const MARKED_WITHIN: Duration = Duration::from_millis(100);

/// The two ways that this process uses.
#[must_use]
pub fn means() -> Means {
    Means {
        death_notice: if has_robust_lists() { DeathNotice::RobustFutex } else { DeathNotice::FileLock },
        waiting: if futex::can_wait_for_many() { Waiting::Waitv } else { Waiting::Slices },
    }
}

/// Does the kernel mark the words of a thread that ends?
#[must_use]
pub fn has_robust_lists() -> bool {
    static ROBUST: OnceLock<bool> = OnceLock::new();
    *ROBUST.get_or_init(|| !failpoint::without(Ability::RobustLists) && probe_robust())
}

/// Lets a thread end while it holds a word, and looks whether the word has been marked. So a kernel that takes the list but
/// never walks it does not pass.
fn probe_robust() -> bool {
    let Ok(words) = View::<LifeWord>::new(&Arc::new(Mapping::private(4096)), 0, 1) else { return false };
    let theirs = words.clone();
    let claim = move || {
        let Ok(mut list) = RobustList::register(theirs) else { return false };
        let claimed = list.claim(0).is_ok();
        // The thread dies without dropping the list, so that it stays registered. Its memory and the word's are never freed.
        core::mem::forget(list);
        claimed
    };
    let thread = std::thread::Builder::new().name("kvring-probe".into()).stack_size(64 << 10).spawn(claim);
    // If no thread can be started, nothing is known. `Claims::register`, a moment later, uses a file lock if there are none.
    let Ok(thread) = thread else { return true };
    if !matches!(thread.join(), Ok(true)) {
        return false;
    }
    let deadline = Deadline::after(MARKED_WITHIN);
    loop {
        let raw = words[0].raw();
        if LifeWord::interpret(raw) == Life::Dead {
            return true;
        }
        if deadline.passed() {
            return false;
        }
        futex::wait_any(&[(words[0].futex(), raw)], deadline);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_under_these_tests_needs_no_stand_in() {
        assert!(probe_robust() && futex::probe_waitv());
    }

    /// From here on both system calls fail with `errno` in this thread and those that it starts. With 0 they seem to succeed,
    /// and do nothing.
    fn filter(errno: u32) -> nix::Result<()> {
        let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
        let is = |number: libc::c_long, jt: u8, jf: u8| libc::sock_filter {
            code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
            jt,
            jf,
            k: number as u32,
        };
        let mut program = [
            // The call's number is the first field of the data that a filter gets.
            statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
            is(libc::SYS_set_robust_list, 1, 0),
            is(libc::SYS_futex_waitv, 0, 1),
            statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | errno),
            statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
        ];
        let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
        nix::sys::prctl::set_no_new_privs()?;
        // SAFETY: a program that outlives the call; the kernel copies and checks it.
        let done =
            unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
        nix::errno::Errno::result(done).map(|_| ())
    }

    #[test]
    fn what_a_sandbox_refuses_or_only_pretends_is_not_there() {
        for errno in [libc::ENOSYS, libc::EPERM, 0] {
            // A filter belongs to its thread, and ends with it.
            let probed = std::thread::spawn(move || {
                filter(errno as u32).map(|()| (probe_robust(), futex::probe_waitv()))
            });
            match probed.join().unwrap() {
                Ok(found) => assert_eq!(found, (false, false), "errno {errno}"),
                Err(refused) => eprintln!("SKIPPED: no seccomp filters here: {refused}"),
            }
        }
    }
}
