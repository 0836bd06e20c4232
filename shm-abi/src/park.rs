//! Sleep without losing a wake-up, and without a system call when nobody sleeps.
//!
//! One `parked` word: odd while somebody may sleep, one higher after each wake. The sleeper announces itself, *then*
//! looks for work once more, then sleeps; the waker publishes its work, *then* looks for a sleeper. A SeqCst fence on
//! both sides makes it impossible that both miss each other (store buffering, the classic Dekker pattern). Without
//! either fence the loom model deadlocks: `tests/loom/park.rs` holds these negative controls.
//!
//! A sleep is for the value that its own announcement left, its [`Ticket`]: several threads may sleep on one word, and
//! one that announces itself after a wake must not make the word look unwoken to one that has not yet gone to sleep.
//!
//! A hostile peer can write anything into the word. The worst it gets is a late wake-up: every sleep has a deadline.

use crate::abi;
use crate::futex;
use crate::sync::{AtomicU32, Ordering, fence};

abi! {
    /// The bit that says that somebody may sleep.
    const PARKED: u32 = 1;
}

/// What the word held when a sleeper had announced itself: what it sleeps on.
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

/// The sleeper found work after all, or has woken up. Only for the one sleeper of a word that has no other: taken
/// back by one of two, it would be taken from the other as well.
pub fn retract(parked: &AtomicU32, ticket: Ticket) {
    parked.store(ticket.0.wrapping_add(1), Ordering::Relaxed);
}

impl Ticket {
    /// What to sleep on, until notified: the word and its value, for [`futex::wait_any`], with whatever else ends this
    /// sleep. Every return of that means: look again.
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
    // The word changes before the wake: a sleeper that is only now entering the kernel finds it changed. When another
    // waker was faster it has changed already; the wake is made all the same, for that waker may die before its own.
    let _ = parked.compare_exchange(value, value.wrapping_add(1), Ordering::Relaxed, Ordering::Relaxed);
    futex::wake_all(parked);
    true
}
