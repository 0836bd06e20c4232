//! Process-shared futexes with deadlines.
//!
//! The crate `atomic-wait` cannot be used between processes (it sets `FUTEX_PRIVATE_FLAG` and has no timeout), so this is a
//! thin layer over `rustix`. Every wait has a deadline. A wait that returns proves nothing: the caller looks again.

#[cfg(not(loom))]
pub use real::*;

#[cfg(loom)]
pub use model::*;

/// A point on `CLOCK_MONOTONIC`, in nanoseconds since boot: the same clock in every process of the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(pub u64);

impl Deadline {
    /// A deadline that is never reached.
    pub const NEVER: Deadline = Deadline(u64::MAX);

    /// `duration` from now.
    #[must_use]
    pub fn after(duration: core::time::Duration) -> Deadline {
        Deadline::after_ns(monotonic_ns(), duration)
    }

    /// `duration` after a time on the monotonic clock, in nanoseconds.
    #[must_use]
    pub fn after_ns(start_ns: u64, duration: core::time::Duration) -> Deadline {
        Deadline(start_ns.saturating_add(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)))
    }

    /// Has it passed?
    #[must_use]
    pub fn passed(self) -> bool {
        self != Deadline::NEVER && monotonic_ns() >= self.0
    }

    /// Time left, zero when it has passed.
    #[must_use]
    pub fn left(self) -> core::time::Duration {
        core::time::Duration::from_nanos(self.0.saturating_sub(monotonic_ns()))
    }
}

/// Why a wait returned. Neither proves anything about the words: the caller looks again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    /// Woken, interrupted, or a word had another value already.
    LookAgain,
    /// The deadline passed.
    TimedOut,
}

#[cfg(not(loom))]
mod real {
    use super::{Deadline, Woken};
    use crate::failpoint::{self, Ability};
    use crate::sync::{AtomicU32, Ordering};
    use core::time::Duration;
    use rustix::io::Errno;
    use rustix::thread::ClockId;
    use rustix::thread::futex::{self, Flags, Wait, WaitFlags, WaitPtr, WaitvFlags};
    use rustix::time::Timespec;
    use std::sync::OnceLock;

    /// Nanoseconds of `CLOCK_MONOTONIC`.
    #[must_use]
    pub fn monotonic_ns() -> u64 {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        // CLOCK_MONOTONIC counts from boot: neither field is ever negative.
        now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
    }

    fn timespec(deadline: Deadline) -> Option<Timespec> {
        (deadline != Deadline::NEVER).then(|| Timespec {
            tv_sec: i64::try_from(deadline.0 / 1_000_000_000).unwrap_or(i64::MAX),
            tv_nsec: (deadline.0 % 1_000_000_000) as _,
        })
    }

    /// The largest number of words that one wait can name (the kernel's `FUTEX_WAITV_MAX`).
    pub const WAIT_ANY_MAX: usize = 128;

    /// Sleeps while every word holds its expected value, until one of them is woken or `deadline` passes.
    /// At most [`WAIT_ANY_MAX`] words; more are not looked at, which only costs promptness, never correctness.
    ///
    /// Where the kernel cannot wait for several words, this is [`wait_any_sliced`] with slices of [`SLICE`].
    pub fn wait_any(words: &[(&AtomicU32, u32)], deadline: Deadline) -> Woken {
        wait_any_sliced(words, deadline, SLICE)
    }

    /// As [`wait_any`]; `slice` counts only where the kernel cannot wait for several words (no `futex_waitv`: Linux
    /// before 5.16, gVisor, a seccomp filter). There it sleeps on the *first* word alone, so the caller puts the word first
    /// that it must notice at once, and compares the others after each slice. So it notices a change of another word up to a
    /// slice late, and does not notice at all that another word was woken without a change.
    pub fn wait_any_sliced(words: &[(&AtomicU32, u32)], deadline: Deadline, slice: Duration) -> Woken {
        let result = match words {
            [(word, expected)] => wait_one(word, *expected, deadline),
            _ if !can_wait_for_many() => return wait_in_slices(words, deadline, slice),
            // Most sleeps have few words, and preparing room for many takes longer than all the rest before the sleep.
            few if few.len() <= 8 => wait_some::<8>(few, deadline),
            many => wait_some::<WAIT_ANY_MAX>(many, deadline),
        };
        match result {
            Err(Errno::TIMEDOUT) => Woken::TimedOut,
            // This process has got a seccomp filter since the probe. It sleeps all the same, or its caller would spin.
            Err(Errno::NOSYS | Errno::PERM) => wait_in_slices(words, deadline, slice),
            _ => Woken::LookAgain,
        }
    }

    /// How late [`wait_any`] notices a change of any word but the first where the kernel cannot wait for several. Its callers
    /// wait for answers, seldom for so long; each wake-up costs 25 to 60 µs of a core.
    pub const SLICE: Duration = Duration::from_millis(10);

    /// Sleeps on the first word alone, slice by slice, until it is woken, another has changed, or the deadline passes.
    fn wait_in_slices(words: &[(&AtomicU32, u32)], deadline: Deadline, slice: Duration) -> Woken {
        let Some(((word, expected), others)) = words.split_first() else { return Woken::LookAgain };
        // With a slice of 0 this loop would not sleep.
        let slice = slice.max(Duration::from_millis(1));
        loop {
            // Acquire, because the kernel's own comparison, which this stands in for, is a full barrier.
            if others.iter().any(|(word, expected)| word.load(Ordering::Acquire) != *expected) {
                return Woken::LookAgain;
            }
            match wait_one(word, *expected, Deadline(deadline.0.min(Deadline::after(slice).0))) {
                Err(Errno::TIMEDOUT) if deadline.passed() => return Woken::TimedOut,
                Err(Errno::TIMEDOUT) => {}
                _ => return Woken::LookAgain,
            }
        }
    }

    /// Can one sleep wait for several words?
    #[inline]
    #[must_use]
    pub fn can_wait_for_many() -> bool {
        static WAITV: OnceLock<bool> = OnceLock::new();
        *WAITV.get_or_init(|| !failpoint::without(Ability::WaitForMany) && probe_waitv())
    }

    /// Asks the kernel to wait for two words of which one has another value already.
    pub(crate) fn probe_waitv() -> bool {
        let (one, two) = (AtomicU32::new(1), AtomicU32::new(2));
        let result = wait_some::<2>(&[(&one, 1), (&two, 1)], Deadline::after(Duration::from_millis(1)));
        matches!(result, Err(Errno::AGAIN))
    }

    #[inline(never)]
    fn wait_some<const N: usize>(words: &[(&AtomicU32, u32)], deadline: Deadline) -> rustix::io::Result<()> {
        let count = words.len().min(N);
        let mut waits = [Wait::new(); N];
        for (wait, (word, expected)) in waits.iter_mut().zip(words) {
            wait.val = u64::from(*expected);
            wait.uaddr = WaitPtr::new(word.raw().as_ptr().cast());
            // Without PRIVATE: the word is shared between processes.
            wait.flags = WaitFlags::SIZE_U32;
        }
        let until = timespec(deadline);
        futex::waitv(&waits[..count], WaitvFlags::empty(), until.as_ref(), ClockId::Monotonic).map(|_| ())
    }

    fn wait_one(word: &AtomicU32, expected: u32, deadline: Deadline) -> rustix::io::Result<()> {
        // `wait` takes a relative time; the bit-set form is absolute on CLOCK_MONOTONIC.
        let until = timespec(deadline);
        futex::wait_bitset(word.raw(), Flags::empty(), expected, until.as_ref(), core::num::NonZeroU32::MAX)
    }

    /// Wakes up to `count` sleepers on `word`, in any process. Returns how many were woken.
    pub fn wake(word: &AtomicU32, count: u32) -> usize {
        // A wake on a mapped word cannot fail in a way that the caller could do anything about.
        futex::wake(word.raw(), Flags::empty(), count.min(i32::MAX as u32)).unwrap_or(0)
    }

    /// Wakes every sleeper on `word`.
    pub fn wake_all(word: &AtomicU32) -> usize {
        wake(word, u32::MAX)
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn without_waitv_a_wait_still_sleeps_ends_and_is_woken() {
            let (own, other) = (AtomicU32::new(1), AtomicU32::new(2));
            let words = [(&own, 1), (&other, 2)];
            let (began, cpu) = (monotonic_ns(), thread_cpu_ns());
            let slice = Duration::from_millis(1);
            let deadline = Deadline::after(Duration::from_millis(100));
            assert_eq!(wait_in_slices(&words, deadline, slice), Woken::TimedOut);
            assert!(monotonic_ns() - began >= 100_000_000, "the deadline holds");
            // A loop without a sleep would have used all of it.
            let used = thread_cpu_ns() - cpu;
            assert!(used < 50_000_000, "{used} ns of CPU time for 100 ms of sleep");
            own.store(3, Ordering::Relaxed);
            assert_eq!(wait_in_slices(&words, Deadline::NEVER, slice), Woken::LookAgain);
            own.store(1, Ordering::Relaxed);
            other.store(3, Ordering::Relaxed);
            assert_eq!(wait_in_slices(&words, Deadline::NEVER, slice), Woken::LookAgain, "at once");
        }

        /// The first word's wake-up ends a slice; a change of another word is found after it.
        #[test]
        fn without_waitv_the_first_word_wakes_at_once_and_the_others_after_a_slice() {
            for first in [true, false] {
                let (own, other) = (AtomicU32::new(1), AtomicU32::new(2));
                // If the first word's wake did not end a slice, the test would take an hour.
                let slice = if first { Duration::from_secs(3600) } else { Duration::from_millis(5) };
                std::thread::scope(|scope| {
                    let sleeper = scope.spawn(|| {
                        wait_in_slices(&[(&own, 1), (&other, 2)], Deadline::NEVER, slice);
                    });
                    std::thread::sleep(Duration::from_millis(20));
                    let word = if first { &own } else { &other };
                    word.store(7, Ordering::Release);
                    wake_all(word);
                    sleeper.join().unwrap();
                });
            }
        }

        fn thread_cpu_ns() -> u64 {
            let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
            now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
        }
    }
}

/// The kernel's futex as loom sees it: the word is compared under the queue's lock, after a full barrier.
#[cfg(loom)]
#[allow(clippy::unwrap_used, reason = "a model's lock is never poisoned: its first panic ends it")]
mod model {
    use super::{Deadline, Woken};
    use crate::sync::{AtomicU32, Ordering, fence};
    use loom::sync::{Condvar, Mutex};

    loom::lazy_static! {
        // One queue for all words: a wake reaches every sleeper, which looks again.
        static ref QUEUE: (Mutex<()>, Condvar) = (Mutex::new(()), Condvar::new());
    }

    /// Time does not pass in the model: a wait ends by a wake alone, so a lost wake-up is a deadlock.
    pub fn monotonic_ns() -> u64 {
        0
    }

    /// See the real one.
    pub fn wait_any(words: &[(&AtomicU32, u32)], _deadline: Deadline) -> Woken {
        let guard = QUEUE.0.lock().unwrap();
        fence(Ordering::SeqCst);
        if words.iter().all(|(word, expected)| word.load(Ordering::SeqCst) == *expected) {
            drop(QUEUE.1.wait(guard).unwrap());
        }
        Woken::LookAgain
    }

    /// See the real one.
    pub fn wait_any_sliced(
        words: &[(&AtomicU32, u32)],
        deadline: Deadline,
        _slice: core::time::Duration,
    ) -> Woken {
        wait_any(words, deadline)
    }

    /// See the real one.
    pub fn wake(_word: &AtomicU32, _count: u32) -> usize {
        let guard = QUEUE.0.lock().unwrap();
        fence(Ordering::SeqCst);
        QUEUE.1.notify_all();
        drop(guard);
        1
    }

    /// See the real one.
    pub fn wake_all(word: &AtomicU32) -> usize {
        wake(word, u32::MAX)
    }
}
