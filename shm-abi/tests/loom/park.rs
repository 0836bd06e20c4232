//! Sleepers lose no wake-up. The model's futex has no time, so a lost wake-up is a deadlock.

use crate::harness::{LOST_WAKE_UP, fails, holds};
use crate::ring::cells;
use kvring_shm_abi::futex::{self, Deadline};
use kvring_shm_abi::park::{self, Ticket};
use kvring_shm_abi::ring::{Body, Consumer, Producer};
use kvring_shm_abi::sync::AtomicU32;
use loom::sync::Mutex;
use loom::thread;
use std::sync::Arc;

const MESSAGES: usize = 2;

/// The steps of the protocol: the right ones, or one of them left out.
#[derive(Clone, Copy)]
struct Steps {
    announce: fn(&AtomicU32) -> Ticket,
    /// Look once more between announcing and sleeping.
    look_again: bool,
    notify: fn(&AtomicU32) -> bool,
}

const RIGHT: Steps = Steps { announce: park::announce, look_again: true, notify: park::notify };

/// One client rings the engine, which sleeps, and takes its announcement back.
fn one_sleeper(steps: Steps) {
    let parked = Arc::new(AtomicU32::new(0));
    let ring = cells();
    let mut consumer = Consumer::new(ring.clone());
    let doorbell = parked.clone();
    let waker = thread::spawn(move || {
        let mut producer = Producer::new(ring);
        for n in 0..MESSAGES {
            producer.push(&Body { head: n as u32, ..Body::default() });
            (steps.notify)(&doorbell);
        }
    });
    let mut taken = 0;
    while taken < MESSAGES {
        if let Some(body) = consumer.pop().unwrap() {
            assert_eq!(body.head as usize, taken);
            taken += 1;
            continue;
        }
        let ticket = (steps.announce)(&parked);
        if !steps.look_again || !consumer.has_news() {
            futex::wait_any(&[ticket.word(&parked)], Deadline::NEVER);
        }
        park::retract(&parked, ticket);
    }
    waker.join().unwrap();
}

#[test]
fn no_wake_up_is_lost() {
    holds("park", Some(5), || one_sleeper(RIGHT));
}

#[test]
fn control_announce_without_fence_is_caught() {
    fails("park, announce without fence", LOST_WAKE_UP, None, || {
        one_sleeper(Steps { announce: park::announce_broken, ..RIGHT });
    });
}

#[test]
fn control_notify_without_fence_is_caught() {
    fails("park, notify without fence", LOST_WAKE_UP, None, || {
        one_sleeper(Steps { notify: park::notify_fenced, ..RIGHT });
    });
}

#[test]
fn control_no_second_look_is_caught() {
    fails("park, no second look", LOST_WAKE_UP, None, || {
        one_sleeper(Steps { look_again: false, ..RIGHT });
    });
}

/// Two threads of one client sleep on one word. The thread that holds the lock drains completions for both.
struct Client {
    parked: AtomicU32,
    inner: Mutex<Inner>,
}

struct Inner {
    completions: Consumer,
    done: [bool; 2],
}

/// How the two waiting threads and the engine behave.
#[derive(Clone, Copy)]
struct Habits {
    /// A thread that has drained the other's completion wakes the other.
    kick: bool,
    /// A thread takes its announcement back after a sleep, as a lone sleeper may.
    retract: bool,
    /// The threads sleep on a word that is either 0 or 1, instead of one that changes with each wake.
    two_states: bool,
    /// The engine looks for sleepers after it has published; otherwise it ends before it has looked.
    engine_notifies: bool,
}

const TWO: Habits = Habits { kick: true, retract: false, two_states: false, engine_notifies: true };

/// A wrong protocol: a word of two states.
mod two_states {
    use kvring_shm_abi::futex::{self, Deadline};
    use kvring_shm_abi::sync::{AtomicU32, Ordering, fence};

    pub(super) fn announce(parked: &AtomicU32) {
        parked.store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    pub(super) fn sleep(parked: &AtomicU32) {
        futex::wait_any(&[(parked, 1)], Deadline::NEVER);
    }

    pub(super) fn notify(parked: &AtomicU32) {
        fence(Ordering::SeqCst);
        if parked.load(Ordering::Relaxed) == 1 {
            parked.store(0, Ordering::Relaxed);
            futex::wake_all(parked);
        }
    }
}

impl Habits {
    fn notify(self, parked: &AtomicU32) {
        if self.two_states {
            two_states::notify(parked);
        } else {
            park::notify(parked);
        }
    }
}

impl Client {
    /// Drains all completions, and kicks if one of them was the other thread's. Is `mine` done?
    fn poll(&self, mine: usize, habits: Habits) -> bool {
        let mut inner = self.inner.lock().unwrap();
        let mut others = false;
        while let Some(body) = inner.completions.pop().unwrap() {
            inner.done[body.head as usize] = true;
            others |= body.head as usize != mine;
        }
        let done = inner.done[mine];
        drop(inner);
        if others && habits.kick {
            habits.notify(&self.parked);
        }
        done
    }

    fn wait(&self, mine: usize, habits: Habits) {
        while !self.poll(mine, habits) {
            if habits.two_states {
                two_states::announce(&self.parked);
                if !self.has_news(mine) {
                    two_states::sleep(&self.parked);
                }
                continue;
            }
            let ticket = park::announce(&self.parked);
            if !self.has_news(mine) {
                futex::wait_any(&[ticket.word(&self.parked)], Deadline::NEVER);
            }
            if habits.retract {
                park::retract(&self.parked, ticket);
            }
        }
    }

    fn has_news(&self, mine: usize) -> bool {
        let inner = self.inner.lock().unwrap();
        inner.completions.has_news() || inner.done[mine]
    }

    /// Waits without sleeping.
    fn spin(&self, mine: usize, habits: Habits) {
        while !self.poll(mine, habits) {
            thread::yield_now();
        }
    }
}

fn two_waiters(habits: Habits) {
    let ring = cells();
    let inner = Inner { completions: Consumer::new(ring.clone()), done: [false; 2] };
    let client = Arc::new(Client { parked: AtomicU32::new(0), inner: Mutex::new(inner) });
    let sleeper = client.clone();
    let sleeper = thread::spawn(move || sleeper.wait(1, habits));
    let engine = client.clone();
    let engine = thread::spawn(move || {
        let mut producer = Producer::new(ring);
        for n in 0..2 {
            producer.push(&Body { head: n, ..Body::default() });
            if habits.engine_notifies {
                habits.notify(&engine.parked);
            }
        }
    });
    if habits.engine_notifies {
        client.wait(0, habits);
    } else {
        client.spin(0, habits);
    }
    engine.join().unwrap();
    if !habits.engine_notifies {
        // The engine has ended, and this thread looks (and kicks) one last time.
        client.poll(0, habits);
    }
    sleeper.join().unwrap();
}

#[test]
fn two_sleepers_on_one_word_are_both_woken() {
    holds("park, two sleepers", Some(3), || {
        two_waiters(TWO);
    });
}

/// Every notify wakes all sleepers, and comes after its own publication: while the engine lives, the kick only saves time.
#[test]
fn two_sleepers_need_no_kick_from_each_other_while_the_engine_notifies() {
    holds("park, two sleepers, no kick", Some(3), || {
        two_waiters(Habits { kick: false, ..TWO });
    });
}

#[test]
fn a_kick_replaces_the_notify_of_an_engine_that_stopped_in_between() {
    holds("park, kick", Some(3), || {
        two_waiters(Habits { engine_notifies: false, ..TWO });
    });
}

#[test]
fn control_no_kick_is_caught() {
    fails("park, no kick", LOST_WAKE_UP, Some(2), || {
        two_waiters(Habits { kick: false, engine_notifies: false, ..TWO });
    });
}

#[test]
fn control_one_of_two_sleepers_takes_the_flag_back_is_caught() {
    fails("park, flag taken back", LOST_WAKE_UP, Some(3), || {
        two_waiters(Habits { retract: true, ..TWO });
    });
}

/// Thread 0 has announced itself and looked, and is not asleep yet; the engine wakes it; thread 1 announces itself. Now the word
/// is as thread 0 left it, so thread 0 goes to sleep.
#[test]
fn control_a_word_of_two_states_is_caught() {
    fails("park, two states", LOST_WAKE_UP, Some(2), || two_waiters(Habits { two_states: true, ..TWO }));
}
