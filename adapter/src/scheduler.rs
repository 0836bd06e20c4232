//! The scheduler's adapters: lookups that may be pending, and lookups that are not.

use crate::client::Client;
use crate::error::CallError;
use crate::health::Health;
use crate::sessions::{Asked, Hit, Lookup, LookupStats, Sessions, State};
use kvring_shm_abi::futex::Deadline;
use kvring_shm_abi::message::Key;
use std::sync::Arc;
use std::time::Duration;

/// What a scheduler's lookups need to know.
#[derive(Clone, Debug)]
pub struct SchedulerOptions {
    /// Names the namespace: the same digest as the workers register.
    pub fingerprint: [u64; 4],
    /// How long a synchronous lookup may take; its answer is 0 matched chunks after that. Default 5 ms.
    pub lookup_timeout: Duration,
    /// How long an asynchronous lookup may stay pending; its answer is 0 matched chunks after that. Default 30 s.
    pub pending_timeout: Duration,
}

impl SchedulerOptions {
    /// The defaults, for a namespace.
    #[must_use]
    pub fn new(fingerprint: [u64; 4]) -> SchedulerOptions {
        SchedulerOptions {
            fingerprint,
            lookup_timeout: Duration::from_millis(5),
            pending_timeout: Duration::from_secs(30),
        }
    }
}

/// What a scheduler adapter does. No default methods: a wrapper cannot forget to forward one.
///
/// A request is known by its name; an *admission* is one of its lives: a request that was preempted comes back with
/// the next one. An answer stays until the session ends or the next admission.
pub trait SchedulerApi {
    /// Starts the lookup of the longest visible prefix of `keys`, once per request and admission.
    ///
    /// # Errors
    /// Only the caller's own: too many keys, or called in a forked child. An engine in trouble is an answer of 0.
    fn submit_lookup(&mut self, request: &str, admission: u32, keys: &[Key]) -> Result<(), CallError>;

    /// The answer, or that it is pending. A request that was never submitted has 0 chunks.
    fn check_lookup(&mut self, request: &str) -> Lookup<'_>;

    /// Gives up an admission's pins beyond its first `keep` chunks: when all ranks have reported the load (0), or when
    /// less was loaded than found. Unknown is fine; delivered later where it cannot be delivered now.
    fn free_lookup_locks(&mut self, request: &str, admission: u32, keep: u32);

    /// Ends a request: its answer, its pending lookup, its pins. Unknown is fine.
    fn end_session(&mut self, request: &str);

    /// Drops everything in this namespace that is not pinned. Returns the number of chunks dropped.
    fn reset_cache(&mut self) -> Result<u64, CallError>;

    /// Is the engine there and well? A few loads.
    fn is_healthy(&mut self) -> bool;

    /// How the engine looks.
    fn health(&self) -> Health;

    /// What lookups have come to.
    fn lookup_stats(&self) -> LookupStats;

    /// How many sessions are open.
    fn open_sessions(&self) -> usize;

    /// Ends the client. Idempotent.
    fn shutdown(&mut self);
}

/// The answer where there is nothing to say.
static NOTHING: Hit = Hit::nothing();

/// A scheduler's adapter, in one of two ways to wait: see [`SchedulerAdapter`] and [`PollingSchedulerAdapter`].
pub struct Adapter<const POLLING: bool> {
    sessions: Sessions,
    options: SchedulerOptions,
}

/// Lookups that return at once and are asked about later: for an engine with slower tiers, and for schedulers that
/// would rather wait a step than a microsecond.
pub type SchedulerAdapter = Adapter<false>;

/// Synchronous lookups: one call gives a definite answer within `lookup_timeout`. It polls the completion ring in its
/// own process, spinning first and sleeping then; it never occupies the engine.
///
/// A timed-out 0 is that admission's answer: asking again does not wait again; the late completion is consumed and its
/// lease released.
pub type PollingSchedulerAdapter = Adapter<true>;

impl<const POLLING: bool> Adapter<POLLING> {
    /// An adapter on a client of the scheduler's role.
    #[must_use]
    pub fn new(client: &Arc<Client>, options: SchedulerOptions) -> Self {
        Adapter { sessions: Sessions::new(client, options.fingerprint), options }
    }

    /// How long a call waits for an answer.
    fn patience(&self) -> Option<Duration> {
        POLLING.then_some(self.options.lookup_timeout)
    }
}

impl PollingSchedulerAdapter {
    /// The longest visible prefix of `keys`, pinned for this request and admission: a definite answer.
    ///
    /// # Errors
    /// As [`SchedulerApi::submit_lookup`].
    pub fn lookup(&mut self, request: &str, admission: u32, keys: &[Key]) -> Result<&Hit, CallError> {
        self.sessions.begin(request, admission, keys, None)?;
        match self.check_lookup(request) {
            Lookup::Hit(hit) => Ok(hit),
            // It waits: this is not reached, and an empty answer is always right.
            Lookup::Pending => Ok(&NOTHING),
        }
    }
}

impl<const POLLING: bool> SchedulerApi for Adapter<POLLING> {
    fn submit_lookup(&mut self, request: &str, admission: u32, keys: &[Key]) -> Result<(), CallError> {
        let pending_for = (!POLLING).then_some(self.options.pending_timeout);
        self.sessions.begin(request, admission, keys, pending_for)?;
        if POLLING {
            self.check_lookup(request);
        }
        Ok(())
    }

    fn check_lookup(&mut self, request: &str) -> Lookup<'_> {
        self.sessions.settle(request, self.patience())
    }

    fn free_lookup_locks(&mut self, request: &str, admission: u32, keep: u32) {
        self.sessions.release(request, admission, keep);
    }

    fn end_session(&mut self, request: &str) {
        self.sessions.end(request);
    }

    fn reset_cache(&mut self) -> Result<u64, CallError> {
        self.sessions.reset_cache()
    }

    fn is_healthy(&mut self) -> bool {
        self.sessions.probe.is_healthy()
    }

    fn health(&self) -> Health {
        self.sessions.probe.client().health()
    }

    fn lookup_stats(&self) -> LookupStats {
        self.sessions.stats
    }

    fn open_sessions(&self) -> usize {
        self.sessions.len()
    }

    fn shutdown(&mut self) {
        self.sessions.probe.client().shutdown();
    }
}

impl Sessions {
    /// The answer of a request's current admission; waits for it for `patience`, if there is any.
    fn settle(&mut self, request: &str, patience: Option<Duration>) -> Lookup<'_> {
        let Some(session) = self.get(request) else { return Lookup::Hit(&NOTHING) };
        if let State::Waiting(_) = &session.state {
            let State::Waiting(asked) =
                core::mem::replace(&mut session.state, State::Answered(Hit::default()))
            else {
                return Lookup::Hit(&NOTHING);
            };
            let (pending, until, asked) = asked.take_apart();
            match take(pending, until, patience) {
                Taken::Not(pending) => {
                    if let Some(session) = self.get(request) {
                        session.state = State::Waiting(Asked::again(pending, until, asked));
                    }
                    return Lookup::Pending;
                }
                Taken::Answer(answer) => match self.accept(request, asked, &answer) {
                    Ok(hit) => {
                        self.stats.answered += 1;
                        if let Some(session) = self.get(request) {
                            session.state = State::Answered(hit);
                        }
                    }
                    Err(error) => self.count_failure(&error),
                },
                Taken::Failed(error) => {
                    tracing::debug!(request, %error, "lookup answered 0");
                    self.count_failure(&error);
                }
            }
        }
        match self.get(request).map(|session| &session.state) {
            Some(State::Answered(hit)) => Lookup::Hit(hit),
            _ => Lookup::Hit(&NOTHING),
        }
    }

    fn reset_cache(&mut self) -> Result<u64, CallError> {
        match self.namespace() {
            Ok(namespace) => self.probe.client().clear_namespace(namespace),
            // Nobody has stored anything yet: it is empty.
            Err(CallError::NotRegistered) => Ok(0),
            Err(error) => Err(error),
        }
    }
}

enum Taken {
    Answer(crate::link::Answer),
    Not(crate::link::Pending),
    Failed(CallError),
}

fn take(pending: crate::link::Pending, until: Option<Deadline>, patience: Option<Duration>) -> Taken {
    if let Some(timeout) = patience {
        return match pending.wait(timeout) {
            Ok(answer) => Taken::Answer(answer),
            Err(error) => Taken::Failed(error),
        };
    }
    match pending.try_take() {
        Ok(answer) => Taken::Answer(answer),
        Err(pending) => match pending.hopeless(until.unwrap_or(Deadline::NEVER)) {
            Some(error) => Taken::Failed(error),
            None => Taken::Not(pending),
        },
    }
}
