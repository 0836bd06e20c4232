//! Sleep without losing a wake-up, and without a system call when nobody sleeps.
//!
//! One `parked` word. The sleeper announces itself, *then* looks for work once more, then sleeps; the waker
//! publishes its work, *then* looks for a sleeper. A SeqCst fence on both sides makes it impossible that both
//! miss each other (store buffering, the classic Dekker pattern). Without either fence the loom model deadlocks:
//! `tests/loom.rs` holds that negative control.
//!
//! A hostile peer can write anything into the word. The worst it gets is a late wake-up: every sleep has a deadline.

use crate::futex::{self, Deadline, Woken};
use crate::sync::{AtomicU32, Ordering, fence};

const AWAKE: u32 = 0;
const PARKED: u32 = 1;

/// The sleeper says that it is about to sleep. It must look for work after this call and before [`sleep`].
pub fn announce(parked: &AtomicU32) {
    parked.store(PARKED, Ordering::Relaxed);
    // SYNC POINT: pairs with the fence in `notify`. Either this thread's next look sees what the waker published
    // before its fence, or the waker sees PARKED.
    fence(Ordering::SeqCst);
}

/// [`announce`] without its fence: the negative control of the models. Never use it.
#[cfg(loom)]
pub fn announce_broken(parked: &AtomicU32) {
    parked.store(PARKED, Ordering::Relaxed);
}

/// The sleeper found work after all, or has woken up.
pub fn retract(parked: &AtomicU32) {
    parked.store(AWAKE, Ordering::Relaxed);
}

/// Sleeps until notified, until one of `others` changes from the value given and is woken, or until `deadline`.
/// Every return means: look again.
pub fn sleep(parked: &AtomicU32, others: &[(&AtomicU32, u32)], deadline: Deadline) -> Woken {
    match others {
        [] => futex::wait_any(&[(parked, PARKED)], deadline),
        [a] => futex::wait_any(&[(parked, PARKED), *a], deadline),
        [a, b] => futex::wait_any(&[(parked, PARKED), *a, *b], deadline),
        more => {
            let mut words = [(parked, PARKED); MAX_WORDS];
            let count = more.len().min(MAX_WORDS - 1);
            words[1..=count].copy_from_slice(&more[..count]);
            futex::wait_any(&words[..=count], deadline)
        }
    }
}

/// How many words one sleep can watch, its own included.
pub const MAX_WORDS: usize = 128;

/// The waker looks for a sleeper, after it published its work. Returns true when it made a system call.
pub fn notify(parked: &AtomicU32) -> bool {
    // SYNC POINT: pairs with the fence in `announce`.
    fence(Ordering::SeqCst);
    notify_fenced(parked)
}

/// [`notify`] for a waker that has already made a SeqCst fence since it published (one fence serves several words).
pub fn notify_fenced(parked: &AtomicU32) -> bool {
    if parked.load(Ordering::Relaxed) == AWAKE {
        return false;
    }
    // The word changes before the wake: a sleeper that is only now entering the kernel finds it changed.
    parked.store(AWAKE, Ordering::Relaxed);
    futex::wake_all(parked);
    true
}
