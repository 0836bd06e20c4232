//! The scheduler's adapters: lookups that may be pending, and lookups that are not.

use crate::client::Client;
use crate::error::CallError;
use crate::health::Health;
use crate::hit::Hit;
use crate::sessions::{Asked, Lookup, LookupStats, Sessions, State};
use kvring_shm_abi::futex::Deadline;
use kvring_shm_abi::message::Key;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The options of a scheduler's lookups. See [`PollingSchedulerAdapter`] for an example.
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

/// The methods of a scheduler adapter. None has a default, so that a wrapper cannot forget to forward one.
///
/// A request is known by its name. An *admission* counts how often the request has been preempted: a preempted request
/// comes back with the next one. An answer stays until the session ends or the next admission begins.
pub trait SchedulerApi {
    /// Starts the lookup of the longest visible prefix of `keys`, once for each request, admission and engine.
    ///
    /// # Errors
    /// Only the caller's mistakes: too many keys, or a call in a forked child. If the engine is in trouble, the answer
    /// is 0.
    fn submit_lookup(&mut self, request: &str, admission: u32, keys: &[Key]) -> Result<(), CallError>;

    /// The answer, or that it is pending. A request that was never submitted has 0 chunks. If too many lookups are
    /// under way, this one is pending, and is sent when there is room.
    fn check_lookup(&mut self, request: &str) -> Lookup<'_>;

    /// Does the answer of the request's present admission still hold? It does not if the engine that has pinned the
    /// chunks has died or was restarted: then the next `submit_lookup` or `lookup` of this admission asks again. Costs
    /// a few loads.
    fn is_current(&mut self, request: &str) -> bool;

    /// Gives up an admission's pins beyond its first `keep` chunks: call it when all ranks have reported the load
    /// (`keep` 0), or when less is loaded than was found. Ignores an unknown request. If the release cannot be
    /// delivered now, it is delivered later.
    fn free_lookup_locks(&mut self, request: &str, admission: u32, keep: u32);

    /// Ends a request: drops its answer, its pending lookup and its pins. Ignores an unknown one.
    fn end_session(&mut self, request: &str);

    /// Drops everything in this namespace that is not pinned. Returns the number of chunks dropped.
    fn reset_cache(&mut self) -> Result<u64, CallError>;

    /// Is the engine healthy? Costs a few loads.
    fn is_healthy(&mut self) -> bool;

    /// The engine's health.
    fn health(&self) -> Health;

    /// Counts of lookups by their outcomes.
    fn lookup_stats(&self) -> LookupStats;

    /// How many sessions are open.
    fn open_sessions(&self) -> usize;

    /// Ends the client. Idempotent.
    fn shutdown(&mut self);
}

/// The answer when nothing is known.
static NOTHING: Hit = Hit::nothing();

/// A scheduler's adapter, in one of two ways to wait: see [`SchedulerAdapter`] and [`PollingSchedulerAdapter`].
pub struct Adapter<const POLLING: bool> {
    sessions: Sessions,
    options: SchedulerOptions,
    /// How long the lookups of this step may still wait; `None` if the caller never says when a step begins.
    left: Option<Duration>,
}

/// How to wait for an answer.
#[derive(Clone, Copy)]
enum Patience {
    /// Look once, do not wait; a lookup past its deadline fails.
    Look,
    /// Spin for so long.
    Spin(Duration),
    /// Wait for so long, then the answer is definite.
    Wait(Duration),
    /// As `Wait`, but so short that a missed deadline does not count as a stall of the engine.
    WaitShort(Duration),
}

impl Patience {
    /// The patience that is left when `gone` has passed.
    fn after(self, gone: Duration) -> Patience {
        match self {
            Patience::Look => Patience::Look,
            Patience::Spin(time) => Patience::Spin(time.saturating_sub(gone)),
            Patience::Wait(time) => Patience::Wait(time.saturating_sub(gone)),
            Patience::WaitShort(time) => Patience::WaitShort(time.saturating_sub(gone)),
        }
    }
}

/// The pause between two attempts to send a lookup that waits for room.
const ROOM_EVERY: Duration = Duration::from_micros(50);

/// Lookups that return at once, and whose answers the caller asks for later. For an engine with slower tiers, and for
/// schedulers that would rather wait for the next step than for a microsecond.
///
/// # Example
/// ```
/// use kvring_adapter::{Client, Lookup, Role, SchedulerAdapter, SchedulerApi, SchedulerOptions};
///
/// # let (engine, options) = include!(concat!(env!("CARGO_MANIFEST_DIR"), "/doc/engine.rs"));
/// let client = Client::new(Role::Scheduler, options)?;
/// let mut scheduler = SchedulerAdapter::new(&client, SchedulerOptions::new([1, 2, 3, 4]));
/// scheduler.submit_lookup("request", 0, &[[10, 0], [20, 0]])?;
/// let chunks = loop {
///     match scheduler.check_lookup("request") {
///         Lookup::Hit(hit) => break hit.chunks,
///         // A scheduler goes on with its other requests here.
///         Lookup::Pending => std::thread::yield_now(),
///     }
/// };
/// assert_eq!(chunks, 0, "nobody has stored them");
/// scheduler.end_session("request");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub type SchedulerAdapter = Adapter<false>;

/// Synchronous lookups: one call gives a definite answer within `lookup_timeout`. The calling thread polls the
/// completion ring, first spinning, then sleeping; the polling costs the engine nothing.
///
/// If a lookup times out, 0 is that admission's answer, and asking again does not wait again. When the late completion
/// arrives, it is drained and its lease released.
///
/// # Example
/// ```
/// use kvring_adapter::{Client, ClientOptions, PollingSchedulerAdapter, Role, SchedulerApi, SchedulerOptions};
/// use std::time::Duration;
///
/// let options = ClientOptions { engine: "nobody".to_owned(), ..ClientOptions::default() };
/// let client = Client::new(Role::Scheduler, options)?;
/// let options = SchedulerOptions { lookup_timeout: Duration::from_millis(2), ..SchedulerOptions::new([1, 2, 3, 4]) };
/// let mut scheduler = PollingSchedulerAdapter::new(&client, options);
/// scheduler.begin_step();
/// // Without an engine a lookup finds nothing, and says so at once.
/// assert_eq!(scheduler.lookup("request", 0, &[[10, 0]])?.chunks, 0);
/// assert_eq!(scheduler.lookup_stats().degraded, 1);
/// scheduler.end_session("request");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
/// See [`Hit`] for a lookup that finds something.
pub type PollingSchedulerAdapter = Adapter<true>;

impl<const POLLING: bool> Adapter<POLLING> {
    /// An adapter on a client of the scheduler's role.
    #[must_use]
    pub fn new(client: &Arc<Client>, options: SchedulerOptions) -> Self {
        Adapter { sessions: Sessions::new(client, options.fingerprint), options, left: None }
    }

    /// How long a call may wait for an answer now.
    fn left(&self) -> Duration {
        self.left.unwrap_or(self.options.lookup_timeout)
    }

    /// How long a lookup that begins now may take.
    fn begin_timeout(&self) -> Option<Duration> {
        // A polling lookup is ended by the thread that waits for it, so only whether any time is left matters here.
        if POLLING { self.left.filter(Duration::is_zero) } else { Some(self.options.pending_timeout) }
    }

    /// Looks for the answer, and takes the time that this costs off the step's.
    fn settle(&mut self, request: &str, patience: Patience) -> Lookup<'_> {
        match &mut self.left {
            Some(left) if !matches!(patience, Patience::Look) && self.sessions.is_waiting(request) => {
                let began = Instant::now();
                let is_pending = matches!(self.sessions.settle(request, patience), Lookup::Pending);
                *left = left.saturating_sub(began.elapsed());
                if is_pending { Lookup::Pending } else { Lookup::Hit(self.sessions.answer(request)) }
            }
            _ => self.sessions.settle(request, patience),
        }
    }
}

impl PollingSchedulerAdapter {
    /// Begins a scheduling step: from here on all lookups together may wait for `lookup_timeout`. After that, further
    /// lookups answer 0 at once, without asking the engine, and that is their admission's answer. If this is never
    /// called, each lookup may wait that long.
    pub fn begin_step(&mut self) {
        self.left = Some(self.options.lookup_timeout);
    }

    /// [`PollingSchedulerAdapter::lookup`] without sleeping: looks at least once, and spins for `spin`. `None`: the
    /// answer is not known yet, and `lookup` with the same arguments waits for it.
    ///
    /// # Errors
    /// As [`SchedulerApi::submit_lookup`].
    pub fn try_lookup(
        &mut self,
        request: &str,
        admission: u32,
        keys: &[Key],
        spin: Duration,
    ) -> Result<Option<&Hit>, CallError> {
        self.sessions.begin(request, admission, keys, self.begin_timeout())?;
        let spin = spin.min(self.left());
        Ok(match self.settle(request, Patience::Spin(spin)) {
            Lookup::Hit(hit) => Some(hit),
            Lookup::Pending => None,
        })
    }

    /// The longest visible prefix of `keys`, pinned for this request and admission: a definite answer.
    ///
    /// # Errors
    /// As [`SchedulerApi::submit_lookup`].
    pub fn lookup(&mut self, request: &str, admission: u32, keys: &[Key]) -> Result<&Hit, CallError> {
        self.sessions.begin(request, admission, keys, self.begin_timeout())?;
        match self.check_lookup(request) {
            Lookup::Hit(hit) => Ok(hit),
            // Not reached, because `check_lookup` of a polling adapter waits. An empty answer is always right.
            Lookup::Pending => Ok(&NOTHING),
        }
    }
}

impl<const POLLING: bool> SchedulerApi for Adapter<POLLING> {
    fn submit_lookup(&mut self, request: &str, admission: u32, keys: &[Key]) -> Result<(), CallError> {
        self.sessions.begin(request, admission, keys, self.begin_timeout())?;
        if POLLING {
            self.check_lookup(request);
        }
        Ok(())
    }

    fn check_lookup(&mut self, request: &str) -> Lookup<'_> {
        let left = self.left();
        let patience = match POLLING {
            false => Patience::Look,
            // Only a few microseconds of the step may be left.
            true if left < self.options.lookup_timeout / 2 => Patience::WaitShort(left),
            true => Patience::Wait(left),
        };
        self.settle(request, patience)
    }

    fn is_current(&mut self, request: &str) -> bool {
        self.sessions.is_current(request)
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
    /// Has this request's lookup not been answered yet?
    fn is_waiting(&mut self, request: &str) -> bool {
        self.get(request).is_some_and(|session| !matches!(session.state, State::Answered(_)))
    }

    /// Sends a lookup for which there was no room, as soon as there is some within the caller's patience. Returns the
    /// patience that is left. `None`: there is still no room.
    fn send(&mut self, request: &str, patience: Patience) -> Option<Patience> {
        let began = Instant::now();
        loop {
            let asked = self.ask_again(request);
            let left = patience.after(began.elapsed());
            match left {
                left if asked => return Some(left),
                Patience::Wait(Duration::ZERO) | Patience::WaitShort(Duration::ZERO) => {
                    self.give_up_asking(request);
                    return Some(left);
                }
                Patience::Look | Patience::Spin(Duration::ZERO) => return None,
                Patience::Spin(_) => core::hint::spin_loop(),
                Patience::Wait(_) | Patience::WaitShort(_) => std::thread::sleep(ROOM_EVERY),
            }
        }
    }

    /// The answer, as far as it is known.
    fn answer(&mut self, request: &str) -> &Hit {
        match self.get(request).map(|session| &session.state) {
            Some(State::Answered(hit)) => hit,
            _ => &NOTHING,
        }
    }

    /// The answer of a request's current admission; waits for it with `patience`.
    fn settle(&mut self, request: &str, patience: Patience) -> Lookup<'_> {
        let Some(patience) = self.send(request, patience) else { return Lookup::Pending };
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
        Lookup::Hit(self.answer(request))
    }

    fn reset_cache(&mut self) -> Result<u64, CallError> {
        let namespace = self.namespace();
        match namespace.and_then(|namespace| self.probe.client().clear_namespace(namespace)) {
            // No worker has registered the namespace, or it has been forgotten, so it is empty.
            Err(CallError::NotRegistered) => Ok(0),
            other => other,
        }
    }
}

enum Taken {
    Answer(crate::link::Answer),
    Not(crate::link::Pending),
    Failed(CallError),
}

fn take(pending: crate::link::Pending, until: Option<Deadline>, patience: Patience) -> Taken {
    let waited = |pending: crate::link::Pending, timeout| match pending.wait(timeout) {
        Ok(answer) => Taken::Answer(answer),
        Err(error) => Taken::Failed(error),
    };
    let looked = match patience {
        Patience::Wait(timeout) => return waited(pending, timeout),
        Patience::WaitShort(timeout) => return waited(pending.forgiving(), timeout),
        Patience::Spin(time) => pending.spin(time),
        Patience::Look => pending.try_take(),
    };
    match looked {
        Ok(answer) => Taken::Answer(answer),
        Err(pending) => match pending.hopeless(until.unwrap_or(Deadline::NEVER)) {
            Some(error) => Taken::Failed(error),
            None => Taken::Not(pending),
        },
    }
}
