//! A client: one role, one keeper, one attachment at a time.
//!
//! The caller's threads never attach, register or clean up: that is the keeper's. They take the current attachment
//! (an `Arc`), use it, and get a typed error when it is gone.

use crate::attachment::Attachment;
use crate::counters::ClientStats;
use crate::engine_view::EngineView;
use crate::error::{AttachError, CallError, RegisterError};
use crate::fork::ForkGuard;
use crate::health::Health;
use crate::keeper;
use crate::link::Link;
use crate::options::{ClientOptions, ConfigError};
use crate::shared::{Outcome, Registered, Shared};
use kvring_shm_abi::lobby::Role;
use kvring_shm_abi::message::{Registration, Request};
use kvring_shm_abi::sync::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// One attachment to an engine, in one role: attaches, notices death and restart, and attaches again, by itself.
///
/// Making a client never waits for an engine: an absent one is a state ([`Health::Absent`]), not an error.
/// Adapters share a client through an `Arc`; the last one to go shuts it down.
pub struct Client {
    pub(crate) shared: Arc<Shared>,
    keeper: Mutex<Option<JoinHandle<()>>>,
}

impl Client {
    /// Starts a client. Only wrong options are an error.
    pub fn new(role: Role, options: ClientOptions) -> Result<Arc<Client>, ConfigError> {
        let shared = Arc::new(Shared::new(role, options.check()?));
        let keeper = keeper::spawn(shared.clone()).map_err(|e| ConfigError::Thread(e.to_string()))?;
        Ok(Arc::new(Client { shared, keeper: Mutex::new(Some(keeper)) }))
    }

    /// The role it was made for.
    #[must_use]
    pub fn role(&self) -> Role {
        self.shared.role
    }

    /// The options it was made with.
    #[must_use]
    pub fn options(&self) -> &ClientOptions {
        &self.shared.checked.options
    }

    /// How the engine looks now. Takes a lock: for logs and decisions, not for every call (see [`Probe`]).
    #[must_use]
    pub fn health(&self) -> Health {
        if !self.shared.fork.is_ours() {
            return Health::ShutDown;
        }
        self.shared.current().health()
    }

    /// What this client has seen of its engine, and what came of it, since it was made.
    #[must_use]
    pub fn stats(&self) -> ClientStats {
        self.shared.counters.snapshot()
    }

    /// From now on devices may write into the arena for this client (a GPU's copy engine, say): where its process dies, the
    /// engine gives its slots away when the *process* is gone for good, not when its keeper's end is noticed. Idempotent,
    /// and for good: each later attachment says so from its beginning. Attached or not; waits for nothing but, perhaps, the
    /// keeper's opening of a file.
    ///
    /// Call it before the first store is submitted that a device carries out. Then the order is safe: the word is in the
    /// entry before a slot is asked for (its Release, the reservation's through the ring), so the engine that has granted
    /// the slot sees it, and it sees it after the kernel's mark, which comes later still. Slots that were granted before
    /// this call are to be written by the CPU alone.
    pub fn register_dma(&self) {
        if self.shared.fork.is_ours() {
            self.shared.dma().register();
        }
    }

    /// Is the engine there and well?
    #[must_use]
    pub fn is_healthy(&self) -> bool {
        self.health().is_healthy()
    }

    /// A handle for health checks on a hot path: a few loads each.
    #[must_use]
    pub fn probe(self: &Arc<Self>) -> Probe {
        let (shared, fork) = (self.shared.clone(), self.shared.fork);
        Probe { client: self.clone(), shared, fork, held: None, generation: u64::MAX }
    }

    /// Waits until the client is attached and its registrations are through, at most `timeout`. For start-up and
    /// tools; nothing else needs to wait.
    pub fn wait_ready(&self, timeout: Duration) -> Result<(), Health> {
        let until = crate::options::until(timeout);
        let mut current = self.shared.current();
        loop {
            if !self.shared.fork.is_ours() {
                return Err(Health::ShutDown);
            }
            let health = match current.attached() {
                // An engine that has died may not have been noticed by the keeper yet.
                Ok(attachment) if attachment.link.alive().is_err() => attachment.link.health(),
                Ok(attachment) if self.is_registered(attachment.link.nonce) => return Ok(()),
                Ok(attachment) => attachment.link.health(),
                Err(Health::ShutDown) => return Err(Health::ShutDown),
                Err(health) => health,
            };
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(if health.is_healthy() { Health::Attaching } else { health });
            }
            current = self.shared.wait_for_change(current, left);
        }
    }

    /// Has every registration had its answer through this attachment?
    fn is_registered(&self, nonce: u64) -> bool {
        self.shared
            .registrations()
            .iter()
            .all(|registered| registered.outcome().as_ref().is_some_and(|outcome| outcome.nonce == nonce))
    }

    /// The nonce of the current attachment, if the engine is fit to be asked.
    pub(crate) fn attached_nonce(&self) -> Result<u64, Health> {
        self.usable().map(|attachment| attachment.link.nonce).map_err(|error| match error {
            CallError::Degraded(health) => health,
            _ => Health::ShutDown,
        })
    }

    /// The current attachment, if the engine is fit to be asked.
    pub(crate) fn usable(&self) -> Result<Arc<Attachment>, CallError> {
        if !self.shared.fork.is_ours() {
            return Err(CallError::Forked);
        }
        match self.shared.current().attached() {
            Ok(attachment) if attachment.link.is_healthy() => Ok(attachment.clone()),
            Ok(attachment) => Err(CallError::Degraded(attachment.link.health())),
            Err(health) => Err(CallError::Degraded(health)),
        }
    }

    /// What a store needs: an engine that answers, and the namespace's id there.
    pub(crate) fn to_store(&self, registered: &Registered) -> Result<(Arc<Attachment>, u32), CallError> {
        let attachment = self.usable()?;
        match registered.outcome().as_ref() {
            Some(Outcome { nonce, namespace: Ok(id), .. }) if *nonce == attachment.link.nonce => {
                Ok((attachment, *id))
            }
            _ => Err(CallError::NotRegistered),
        }
    }

    /// What a load needs: the arena, and the namespace's id in it. No engine: a load needs no answer.
    pub(crate) fn to_load(&self, registered: &Registered) -> Result<(Arc<Attachment>, u32), CallError> {
        if !self.shared.fork.is_ours() {
            return Err(CallError::Forked);
        }
        let current = self.shared.current();
        let Some(attachment) = current.attachment.clone() else {
            return Err(CallError::Degraded(current.health.clone()));
        };
        drop(current);
        match registered.outcome().as_ref() {
            Some(Outcome { arena_id, namespace: Ok(id), .. })
                if *arena_id == attachment.identity.arena_id =>
            {
                Ok((attachment, *id))
            }
            _ => Err(CallError::NotRegistered),
        }
    }

    /// The attachment, as long as there is one: also while its engine is gone.
    pub(crate) fn current_attachment(&self) -> Option<Arc<Attachment>> {
        if self.shared.fork.is_ours() { self.shared.current().attachment.clone() } else { None }
    }

    /// Adds a registration: the keeper makes it now, and again after every restart.
    pub(crate) fn add_registration(&self, record: Registration) -> Arc<Registered> {
        let registered = Arc::new(Registered { record, outcome: Mutex::new(None) });
        self.shared.registrations.lock().unwrap_or_else(PoisonError::into_inner).push(registered.clone());
        self.shared.poke();
        registered
    }

    /// Takes a registration back: it is not made again.
    pub(crate) fn remove_registration(&self, registered: &Arc<Registered>) {
        self.shared
            .registrations
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|other| !Arc::ptr_eq(other, registered));
    }

    /// Waits until a registration has its first outcome and can be used, at most `timeout`. `Ok(None)`: not yet; the keeper
    /// goes on trying.
    pub(crate) fn wait_registered(
        &self,
        registered: &Registered,
        timeout: Duration,
    ) -> Result<Option<u32>, RegisterError> {
        let until = crate::options::until(timeout);
        let mut current = self.shared.current();
        loop {
            if let Some(Outcome { nonce, namespace, .. }) = registered.outcome().clone() {
                // Who is told that it is registered stores at once: the keeper must be through with that attachment.
                let is_current = current.attached().is_ok_and(|attachment| attachment.link.nonce == nonce);
                if namespace.is_err() || is_current {
                    return namespace.map(Some);
                }
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || !self.shared.fork.is_ours() {
                return Ok(None);
            }
            current = self.shared.wait_for_change(current, left);
        }
    }

    /// Drops everything that is not leased, in all namespaces. An operator's call: waits up to `operation_timeout`.
    pub fn clear(&self) -> Result<u64, CallError> {
        self.clear_namespace(kvring_shm_abi::message::ANY_NAMESPACE)
    }

    pub(crate) fn clear_namespace(&self, namespace: u32) -> Result<u64, CallError> {
        let completion = self.call(Request::Clear { namespace })?;
        Ok(completion[0])
    }

    /// A round trip that does nothing: for measuring and for checking that the engine answers.
    pub fn noop(&self) -> Result<(), CallError> {
        self.call(Request::Noop).map(|_| ())
    }

    /// One request without payload, waited for.
    fn call(&self, request: Request) -> Result<[u64; 4], CallError> {
        let attachment = self.usable()?;
        attachment.link.call(request, self.options().operation_timeout)
    }

    /// Says goodbye to the engine and ends the keeper; idempotent. Waits for the last copy into
    /// the arena, for a registration that is under way (`register_timeout`), and then at most `drain_timeout` for the engine.
    pub fn shutdown(&self) {
        if !self.shared.fork.is_ours() {
            return;
        }
        // Release; pairs with the keeper's Acquire.
        self.shared.stop.store(true, Ordering::Release);
        self.shared.poke();
        let keeper = self.keeper.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(keeper) = keeper {
            // A keeper that panicked has said so; there is nothing left to clean up here.
            let _ = keeper.join();
        }
    }

    /// Why the last attempt to attach failed, as `attach` sees it now: for tools that want to say more than a state.
    pub fn diagnose(&self) -> Option<AttachError> {
        match EngineView::open(&self.shared.checked.name) {
            Err(error) => Some(error),
            Ok(view) if !view.owner_lives() => view.end(&self.shared.checked.name),
            Ok(_) => None,
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.shutdown();
    }
}

/// Health checks for a hot path: keeps the attachment at hand, so that a check is a few loads and no lock.
pub struct Probe {
    client: Arc<Client>,
    // Copies of what is behind `client`, a hop nearer.
    shared: Arc<Shared>,
    fork: ForkGuard,
    /// The link alone: a probe that nobody asks must not keep a dead engine's arena mapped.
    held: Option<Arc<Link>>,
    generation: u64,
}

impl Probe {
    /// Is the engine there and well? A few loads while nothing changes.
    #[inline]
    pub fn is_healthy(&mut self) -> bool {
        self.refresh();
        self.fork.is_ours() && self.held.as_ref().is_some_and(|link| link.is_healthy())
    }

    /// Takes the current attachment's link, if there is a new one.
    #[inline]
    fn refresh(&mut self) {
        // SYNC POINT: Acquire; pairs with the Release in `set_current`.
        let generation = self.shared.generation.load(Ordering::Acquire);
        if generation != self.generation {
            self.take_current();
        }
    }

    #[cold]
    fn take_current(&mut self) {
        if !self.fork.is_ours() {
            return;
        }
        let current = self.shared.current();
        // Under the lock under which it changes: the count is that of this link.
        self.generation = self.shared.generation.load(Ordering::Acquire);
        self.held = current.attached().ok().map(|attachment| attachment.link.clone());
    }

    /// A round trip that does nothing, by the way that lookups take: for measuring.
    pub fn noop(&mut self) -> Result<(), CallError> {
        let timeout = self.shared.checked.options.operation_timeout;
        self.link()?.call(Request::Noop, timeout).map(|_| ())
    }

    /// The client behind it.
    #[must_use]
    pub fn client(&self) -> &Arc<Client> {
        &self.client
    }

    /// Is the engine behind the attachment of this nonce still the one that is there, alive, and not restarted? Also while it
    /// stalls: what it has answered holds.
    #[inline]
    pub(crate) fn lives(&mut self, nonce: u64) -> bool {
        self.refresh();
        self.fork.is_ours()
            && self.held.as_ref().is_some_and(|link| link.nonce == nonce && link.alive().is_ok())
    }

    /// Is this the process that made it?
    pub(crate) fn is_ours(&self) -> bool {
        self.fork.is_ours()
    }

    /// The current attachment's link, if the engine is fit to be asked.
    #[inline]
    pub(crate) fn link(&mut self) -> Result<&Arc<Link>, CallError> {
        if !self.fork.is_ours() {
            return Err(CallError::Forked);
        }
        self.refresh();
        match &self.held {
            Some(link) if link.is_healthy() => Ok(link),
            _ => Err(CallError::Degraded(self.client.health())),
        }
    }
}
