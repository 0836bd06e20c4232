//! A client: one role, one keeper, one attachment at a time.
//!
//! The caller's threads never attach, register or clean up: the keeper does. They take the current attachment (an
//! `Arc`), use it, and get a typed error when it is gone.

use crate::attachment::Attachment;
use crate::counters::ClientStats;
use crate::engine_view::EngineView;
use crate::error::{AttachError, CallError, RegisterError};
use crate::fork::ForkGuard;
use crate::health::Health;
use crate::keeper;
use crate::leases::Leases;
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
/// Making a client never waits for an engine: an absent one is a state ([`Health::Absent`]), not an error. Its users
/// share it through an `Arc`; the last one to drop it shuts it down.
///
/// # Example
/// ```
/// use kvring_adapter::{Client, ClientOptions, Role};
/// use std::time::Duration;
///
/// let options = ClientOptions { engine: "nobody".to_owned(), ..ClientOptions::default() };
/// let client = Client::new(Role::Scheduler, options)?;
/// assert!(!client.is_healthy() && client.wait_ready(Duration::ZERO).is_err());
/// let why = client.diagnose().map(|why| why.to_string());
/// assert_eq!(
///     why.as_deref(),
///     Some("no kvring engine named nobody runs here; start one with `kvring serve --name nobody`")
/// );
/// # Ok::<(), kvring_adapter::ConfigError>(())
/// ```
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

    /// The client's role.
    #[must_use]
    pub fn role(&self) -> Role {
        self.shared.role
    }

    /// The options it was made with.
    #[must_use]
    pub fn options(&self) -> &ClientOptions {
        &self.shared.checked.options
    }

    /// The engine's health now. It takes a lock, so use it for logs and decisions, and a [`Probe`] for every call.
    #[must_use]
    pub fn health(&self) -> Health {
        if !self.shared.fork.is_ours() {
            return Health::ShutDown;
        }
        self.shared.current().health()
    }

    /// What this client has counted since it was made: changes of its engine's health, and what followed from them.
    #[must_use]
    pub fn stats(&self) -> ClientStats {
        self.shared.counters.snapshot()
    }

    /// Declares that from now on devices (a GPU's copy engine, say) may write into the arena for this client. When this
    /// process dies, the engine then gives its slots away only when the *process* is gone for good, not already when it
    /// notices the end of the keeper. The call is idempotent and cannot be taken back: each later claim declares the
    /// same from its beginning. It may be made with or without an attachment, and waits at most for the keeper to open
    /// a file.
    ///
    /// Call it before you submit the first store that a device carries out. This call stores the declaration in the
    /// entry (Release) before the reservation goes through the ring, so an engine that has granted a slot has seen it,
    /// also later, when it handles the kernel's mark on the life word (it then loads it with Acquire). Slots that were
    /// granted before this call must be written by the CPU alone.
    pub fn register_dma(&self) {
        if self.shared.fork.is_ours() {
            self.shared.dma().register();
        }
    }

    /// Is the engine healthy?
    #[must_use]
    pub fn is_healthy(&self) -> bool {
        self.health().is_healthy()
    }

    /// A handle for health checks on a hot path: each check is a few loads.
    #[must_use]
    pub fn probe(self: &Arc<Self>) -> Probe {
        let (shared, fork) = (self.shared.clone(), self.shared.fork);
        Probe { client: self.clone(), shared, fork, held: None, is_attached: false, generation: u64::MAX }
    }

    /// Waits at most `timeout` until the client is attached and the engine has answered its registrations. Only
    /// start-up code and tools need it.
    pub fn wait_ready(&self, timeout: Duration) -> Result<(), Health> {
        if !self.shared.fork.is_ours() {
            // A thread of the parent may have held the lock at the fork.
            return Err(Health::ShutDown);
        }
        let until = crate::options::until(timeout);
        let mut current = self.shared.current();
        loop {
            let health = match current.attached() {
                // The keeper may not have noticed yet that this engine has died.
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

    /// Has the engine answered every registration through this attachment?
    fn is_registered(&self, nonce: u64) -> bool {
        self.shared
            .registrations()
            .iter()
            .all(|registered| registered.outcome().as_ref().is_some_and(|outcome| outcome.nonce == nonce))
    }

    /// The nonce of the current attachment, if its engine is healthy.
    pub(crate) fn attached_nonce(&self) -> Result<u64, Health> {
        self.usable().map(|attachment| attachment.link.nonce).map_err(|error| match error {
            CallError::Degraded(health) => health,
            _ => Health::ShutDown,
        })
    }

    /// The current attachment, if its engine is healthy.
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

    /// What a store needs: the attachment to a healthy engine, and the namespace's id there.
    pub(crate) fn to_store(&self, registered: &Registered) -> Result<(Arc<Attachment>, u32), CallError> {
        let attachment = self.usable()?;
        match registered.outcome().as_ref() {
            Some(Outcome { nonce, namespace: Ok(id), .. }) if *nonce == attachment.link.nonce => {
                Ok((attachment, *id))
            }
            _ => Err(CallError::NotRegistered),
        }
    }

    /// What a load needs: the attachment, for its arena, and the namespace's id there. The engine may be dead, because
    /// a load asks it nothing.
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

    /// The attachment, if there is one, also while its engine is gone.
    pub(crate) fn current_attachment(&self) -> Option<Arc<Attachment>> {
        if self.shared.fork.is_ours() { self.shared.current().attachment.clone() } else { None }
    }

    /// Adds a registration: the keeper makes it now, and again after every restart of the engine.
    pub(crate) fn add_registration(&self, record: Registration) -> Arc<Registered> {
        let registered = Arc::new(Registered { record, outcome: Mutex::new(None) });
        self.shared.registrations.lock().unwrap_or_else(PoisonError::into_inner).push(registered.clone());
        self.shared.poke();
        registered
    }

    /// Removes a registration: the keeper does not make it again.
    pub(crate) fn remove_registration(&self, registered: &Arc<Registered>) {
        self.shared
            .registrations
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|other| !Arc::ptr_eq(other, registered));
    }

    /// Waits at most `timeout` until a registration has its first outcome and can be used. `Ok(None)` means not yet;
    /// the keeper goes on trying.
    pub(crate) fn wait_registered(
        &self,
        registered: &Registered,
        timeout: Duration,
    ) -> Result<Option<u32>, RegisterError> {
        let until = crate::options::until(timeout);
        let mut current = self.shared.current();
        loop {
            if let Some(Outcome { nonce, namespace, .. }) = registered.outcome().clone() {
                // The caller may store as soon as this returns, so the keeper must have made that attachment the
                // current one.
                let is_current = current.attached().is_ok_and(|attachment| attachment.link.nonce == nonce);
                if namespace.is_err() || is_current {
                    return namespace.map(Some);
                }
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            current = self.shared.wait_for_change(current, left);
        }
    }

    /// Drops every chunk that is not leased, in all namespaces. Meant for operators: it waits up to
    /// `operation_timeout`.
    ///
    /// # Errors
    /// The engine cannot be asked now, or does not answer in time.
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

    /// Sends one request without payload and waits for its answer.
    fn call(&self, request: Request) -> Result<[u64; 4], CallError> {
        let attachment = self.usable()?;
        attachment.link.call(request, self.options().operation_timeout)
    }

    /// Detaches from the engine and ends the keeper; idempotent. It waits for the last copy into the arena, for a
    /// registration that is under way (`register_timeout`), and then at most `drain_timeout` for the engine's answer.
    pub fn shutdown(&self) {
        if !self.shared.fork.is_ours() {
            return;
        }
        // Release; pairs with the keeper's Acquire.
        self.shared.stop.store(true, Ordering::Release);
        self.shared.poke();
        let keeper = self.keeper.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(keeper) = keeper {
            // A keeper that panicked has logged it; there is nothing left to clean up here.
            let _ = keeper.join();
        }
    }

    /// Why an attempt to attach would fail now; `None` if the engine lives. For tools that want to say more than a
    /// state.
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

/// Health checks for a hot path. It keeps the current attachment's link, so that a check is a few loads and takes no
/// lock.
///
/// # Example
/// ```
/// use kvring_adapter::{Client, Role};
/// # use std::time::Duration;
///
/// # let (engine, options) = include!(concat!(env!("CARGO_MANIFEST_DIR"), "/doc/engine.rs"));
/// let client = Client::new(Role::Scheduler, options)?;
/// # client.wait_ready(Duration::from_secs(3600)).map_err(|health| health.to_string())?;
/// let mut probe = client.probe();
/// assert!(probe.is_healthy());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Probe {
    client: Arc<Client>,
    // Copies of fields of `client`: each saves a pointer to follow.
    shared: Arc<Shared>,
    fork: ForkGuard,
    /// The link of the attachment, without its arena: a probe that is not used must not keep a dead engine's arena
    /// mapped. There is one also while its engine is gone, as long as the client keeps the arena.
    held: Option<Arc<Link>>,
    /// The engine was healthy when the keeper last looked.
    is_attached: bool,
    generation: u64,
}

impl Probe {
    /// Is the engine healthy? Costs a few loads while the attachment does not change.
    #[inline]
    pub fn is_healthy(&mut self) -> bool {
        self.refresh();
        self.fork.is_ours() && self.is_attached && self.held.as_ref().is_some_and(|link| link.is_healthy())
    }

    /// Takes the link of the current attachment where that has changed.
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
        // `generation` changes under this same lock, so the value belongs to this link.
        self.generation = self.shared.generation.load(Ordering::Acquire);
        self.is_attached = current.attached().is_ok();
        self.held = current.attachment.as_ref().map(|attachment| attachment.link.clone());
    }

    /// A round trip that does nothing and is sent as lookups are: for measuring.
    pub fn noop(&mut self) -> Result<(), CallError> {
        let timeout = self.shared.checked.options.operation_timeout;
        self.link()?.call(Request::Noop, timeout).map(|_| ())
    }

    /// The client that the probe belongs to.
    #[must_use]
    pub fn client(&self) -> &Arc<Client> {
        &self.client
    }

    /// Does this process own the probe (or did it inherit it by a fork)?
    pub(crate) fn is_ours(&self) -> bool {
        self.fork.is_ours()
    }

    /// The current attachment's link, if its engine is healthy.
    #[inline]
    pub(crate) fn link(&mut self) -> Result<&Arc<Link>, CallError> {
        if !self.fork.is_ours() {
            return Err(CallError::Forked);
        }
        self.refresh();
        match &self.held {
            Some(link) if self.is_attached && link.is_healthy() => Ok(link),
            _ => Err(CallError::Degraded(self.client.health())),
        }
    }

    /// The link of the attachment whose tables may be read, for a hint.
    #[inline]
    pub(crate) fn link_for_hints(&mut self) -> Option<&Link> {
        self.refresh();
        self.held.as_deref()
    }

    /// The link of the attachment whose tables may be read, whatever its engine is doing: see [`Link::reading`]. And the
    /// client's leases.
    #[inline]
    pub(crate) fn tables(&mut self) -> Result<(&Link, &Leases), CallError> {
        if !self.fork.is_ours() {
            return Err(CallError::Forked);
        }
        self.refresh();
        match &self.held {
            Some(link) => Ok((link, &self.shared.leases)),
            None => Err(CallError::Degraded(self.client.health())),
        }
    }
}
