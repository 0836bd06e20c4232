//! Sleep without losing a wake-up, and without a system call when nobody sleeps.
//!
//! One `parked` word: odd while somebody may sleep, one higher after each wake. The sleeper announces itself, *then*
//! looks for work once more, then sleeps; the waker publishes its work, *then* looks for a sleeper. A SeqCst fence on
//! both sides makes it impossible that both miss each other (store buffering, the classic Dekker pattern). Without
//! either fence the loom model deadlocks: `tests/loom/park.rs` holds these negative controls.
//!
//! A sleeper sleeps only while the word holds the value that it had after the sleeper's own announcement, its [`Ticket`].
//! Several threads may sleep on one word: if one announces itself just after a wake, another that was woken before it had gone
//! to sleep still finds the word changed, and does not sleep.
//!
//! A hostile peer can write anything into the word. It can only make a wake-up late, because every sleep has a deadline.

use crate::abi;
use crate::futex;
use crate::sync::{AtomicU32, Ordering, fence};

abi! {
    /// The bit that is set while somebody may sleep.
    const PARKED: u32 = 1;
}

/// The value that the word had after a sleeper announced itself: the sleeper sleeps while the word holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket(u32);

/// The sleeper says that it is about to sleep. It must look for work after this call and before it sleeps on
/// [`Ticket::word`].
#[must_use]
pub fn announce(parked: &AtomicU32) -> Ticket {
    let ticket = Ticket(parked.fetch_or(PARKED, Ordering::Relaxed) | PARKED);
    // SYNC POINT: pairs with the fence in `notify`. Either this thread's next look sees what the waker published
    // before its fence, or the waker sees PARKED.
    fence(Ordering::SeqCst);
    ticket
}

/// [`announce`] without its fence: the negative control of the models. Never use it.
#[cfg(loom)]
pub fn announce_broken(parked: &AtomicU32) -> Ticket {
    Ticket(parked.fetch_or(PARKED, Ordering::Relaxed) | PARKED)
}

/// Takes the announcement back: the sleeper has found work after all, or has woken up. Only for a word with one sleeper:
/// one of two sleepers would take back the other's announcement as well.
pub fn retract(parked: &AtomicU32, ticket: Ticket) {
    parked.store(ticket.0.wrapping_add(1), Ordering::Relaxed);
}

impl Ticket {
    /// The word and the value to sleep on, for [`futex::wait_any`], beside other words that are to end the sleep. Whenever
    /// `wait_any` returns, the sleeper looks again.
    #[must_use]
    #[inline]
    pub fn word(self, parked: &AtomicU32) -> (&AtomicU32, u32) {
        (parked, self.0)
    }
}

/// The waker looks for a sleeper, after it published its work. Returns true when it made a system call.
pub fn notify(parked: &AtomicU32) -> bool {
    // SYNC POINT: pairs with the fence in `announce`.
    fence(Ordering::SeqCst);
    notify_fenced(parked)
}

/// [`notify`] for a waker that has already made a SeqCst fence since it published (one fence serves several words).
pub fn notify_fenced(parked: &AtomicU32) -> bool {
    let value = parked.load(Ordering::Relaxed);
    if value & PARKED == 0 {
        return false;
    }
    // The word changes before the wake, so that a sleeper that is only now entering the kernel finds it changed. If another
    // waker was faster, the word has changed already; this thread wakes all the same, for the other may die before it does.
    let _ = parked.compare_exchange(value, value.wrapping_add(1), Ordering::Relaxed, Ordering::Relaxed);
    futex::wake_all(parked);
    true
}
