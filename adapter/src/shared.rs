//! The state that a client's callers and its keeper share.

use crate::attachment::Attachment;
use crate::counters::Counters;
use crate::dma::Dma;
use crate::error::RegisterError;
use crate::fork::ForkGuard;
use crate::health::Health;
use crate::leases::Leases;
use crate::ledger::Ledger;
use crate::options::Checked;
use kvring_shm_abi::futex::{Deadline, wait_any, wake_all};
use kvring_shm_abi::lobby::Role;
use kvring_shm_abi::message::Registration;
use kvring_shm_abi::sync::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// A registration that the keeper repeats after every restart.
pub(crate) struct Registered {
    pub(crate) record: Registration,
    pub(crate) outcome: Mutex<Option<Outcome>>,
}

/// An engine's answer to a registration.
#[derive(Clone)]
pub(crate) struct Outcome {
    /// The nonce of the attachment through which it was made.
    pub(crate) nonce: u64,
    pub(crate) arena_id: [u64; 2],
    /// The namespace's id.
    pub(crate) namespace: Result<u32, RegisterError>,
}

impl Registered {
    /// The health of the attachment with this nonce, which is healthy itself, for a user of this registration.
    pub(crate) fn health(&self, nonce: u64) -> Health {
        match self.outcome().as_ref() {
            Some(outcome) if outcome.nonce == nonce => match &outcome.namespace {
                Ok(_) => Health::Healthy,
                Err(refused) => Health::Refused(refused.to_string()),
            },
            _ => Health::Attaching,
        }
    }

    pub(crate) fn outcome(&self) -> MutexGuard<'_, Option<Outcome>> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The client's health and attachment.
pub(crate) struct Current {
    /// The health as the keeper last saw it. While this is healthy, the attachment's own view counts
    /// (`Current::health()`).
    pub(crate) health: Health,
    /// There is one while `health` is healthy, and also while its engine is gone, until the arena is replaced or
    /// removed: chunks that have been looked up can still be loaded.
    pub(crate) attachment: Option<Arc<Attachment>>,
}

impl Current {
    /// The attachment, if its engine was healthy when the keeper last looked.
    pub(crate) fn attached(&self) -> Result<&Arc<Attachment>, Health> {
        match &self.attachment {
            Some(attachment) if self.health.is_healthy() => Ok(attachment),
            _ => Err(self.health.clone()),
        }
    }

    pub(crate) fn health(&self) -> Health {
        self.attached().map_or_else(|health| health, |attachment| attachment.link.health())
    }
}

/// State that the caller's threads share with the keeper.
pub(crate) struct Shared {
    pub(crate) checked: Checked,
    pub(crate) role: Role,
    pub(crate) fork: ForkGuard,
    /// Counts changes of `current`: a probe with an older count takes the link anew.
    pub(crate) generation: AtomicU64,
    current: Mutex<Current>,
    /// Notified when `current` or a registration's outcome changes.
    changed: Condvar,
    pub(crate) registrations: Mutex<Vec<Arc<Registered>>>,
    /// Slots that were granted and whose commit or abort is not done yet.
    pub(crate) ledger: Ledger,
    /// Leases that the engine holds for this client.
    pub(crate) leases: Leases,
    pub(crate) counters: Counters,
    pub(crate) dma: Mutex<Dma>,
    /// The last session id given out. The engine knows leases by client and session, so all users of this client draw
    /// ids from here.
    sessions: AtomicU64,
    /// The keeper's futex: raised when the keeper should look around.
    pub(crate) control: AtomicU32,
    pub(crate) stop: AtomicBool,
}

impl Shared {
    pub(crate) fn new(role: Role, checked: Checked) -> Shared {
        Shared {
            checked,
            role,
            fork: ForkGuard::new(),
            generation: AtomicU64::new(0),
            current: Mutex::new(Current { health: Health::Attaching, attachment: None }),
            changed: Condvar::new(),
            registrations: Mutex::new(Vec::new()),
            ledger: Ledger::default(),
            leases: Leases::default(),
            counters: Counters::default(),
            dma: Mutex::default(),
            sessions: AtomicU64::new(0),
            control: AtomicU32::new(0),
            stop: AtomicBool::new(false),
        }
    }

    pub(crate) fn current(&self) -> MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn dma(&self) -> MutexGuard<'_, Dma> {
        self.dma.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeper: there is a new attachment, ready for callers.
    pub(crate) fn set_attached(&self, attachment: Arc<Attachment>) {
        self.set_current(Health::Healthy, Some(attachment));
    }

    /// Keeper: the engine is gone for now, and its arena is kept.
    pub(crate) fn set_suspended(&self, health: Health) {
        let attachment = self.current().attachment.clone();
        self.set_current(health, attachment);
    }

    /// Keeper: there is no attachment, for this reason.
    pub(crate) fn set_detached(&self, health: Health) {
        self.set_current(health, None);
    }

    /// Sets the health and the attachment, and logs and counts the change if the health is another one than before.
    fn set_current(&self, health: Health, attachment: Option<Arc<Attachment>>) {
        let mut current = self.current();
        let before = core::mem::replace(&mut *current, Current { health: health.clone(), attachment });
        // SYNC POINT: Release; pairs with the Acquire in `Probe::refresh`.
        self.generation.fetch_add(1, Ordering::Release);
        drop(current);
        self.changed.notify_all();
        let was = before.health.clone();
        // Dropped outside the lock, because the last holder unmaps the arena.
        drop(before);
        if was != health {
            self.changed_to(&health);
        }
    }

    /// Counts a change of health and logs it, in words for people who run vLLM: nothing else in vLLM's log tells them
    /// about the engine's health.
    pub(crate) fn changed_to(&self, health: &Health) {
        self.counters.transition(health);
        let (engine, role) = (&self.checked.options.engine, self.role.as_str());
        match health {
            Health::Healthy => tracing::info!(%engine, role, "connected to the kvring engine"),
            Health::ShutDown => tracing::debug!(%engine, role, "client shut down"),
            _ => {
                let reason = health.explain(engine);
                tracing::warn!(%engine, role, %reason, "the kvring engine is not available: nothing is stored until it is");
            }
        }
    }

    /// Is this the health as the keeper last saw it, without the attachment's own view?
    pub(crate) fn is_health(&self, health: &Health) -> bool {
        self.current().health == *health
    }

    /// A session id that no other session of this client has.
    pub(crate) fn next_session(&self) -> u64 {
        // Relaxed: only the number matters.
        self.sessions.fetch_add(1, Ordering::Relaxed) + 1
    }

    pub(crate) fn registrations(&self) -> Vec<Arc<Registered>> {
        self.registrations.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn notify_changed(&self) {
        // A waiter checks under this lock. Taking it here makes sure that the waiter sees the change or sleeps already.
        drop(self.current());
        self.changed.notify_all();
    }

    /// Waits until `current` or a registration's outcome has changed, at most `timeout`.
    pub(crate) fn wait_for_change<'a>(
        &self,
        current: MutexGuard<'a, Current>,
        timeout: Duration,
    ) -> MutexGuard<'a, Current> {
        self.changed.wait_timeout(current, timeout).unwrap_or_else(PoisonError::into_inner).0
    }

    /// Makes the keeper look around.
    pub(crate) fn poke(&self) {
        // Release; pairs with the keeper's Acquire load of the word before it looks.
        self.control.fetch_add(1, Ordering::Release);
        wake_all(&self.control);
    }

    /// Keeper: sleeps until poked or until `deadline`.
    pub(crate) fn wait_for_poke(&self, seen: u32, deadline: Deadline) {
        wait_any(&[(&self.control, seen)], deadline);
    }
}
