//! What both scheduler adapters share: sessions, admissions, their answers and their leases.
//!
//! An answer stays until the session ends or the next admission: asking again gives the same answer and does no work.
//! Everything a session may hold in the engine is known here, so that ending it gives all of it back.

use crate::client::{Client, Probe};
use crate::error::CallError;
use crate::hit::Hit;
use crate::leases::{Asking, Lease};
use crate::link::{Answer, Link, Pending, Undo};
use kvring_shm_abi::chunk::ChunkWord;
use kvring_shm_abi::futex::Deadline;
use kvring_shm_abi::message::{KEY_WORDS, KEYS_MAX, Key, Records, Request};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// The answer to `check_lookup`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup<'a> {
    /// Not known yet: ask again in a later step.
    Pending,
    /// The answer for this admission.
    Hit(&'a Hit),
}

/// Counts of what lookups came to, since the adapter was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LookupStats {
    /// Answers that came from the engine.
    pub answered: u64,
    /// 0 matched because the engine was not fit to be asked.
    pub degraded: u64,
    /// 0 matched because no answer came in time.
    pub timed_out: u64,
    /// 0 matched because no worker has registered the namespace yet, or too much is leased.
    pub refused: u64,
}

pub(crate) enum State {
    /// Nothing has been asked yet: our own table of operations was full.
    Unasked {
        keys: Vec<Key>,
        /// When it is answered 0.
        until: Option<Deadline>,
    },
    Waiting(Asked),
    Answered(Hit),
}

/// What a lookup was asked for.
pub(crate) struct AskedParts {
    keys: usize,
    namespace: u32,
    link: Arc<Link>,
}

impl Asked {
    /// What waits, until when, and what it was.
    pub(crate) fn take_apart(self) -> (Pending, Option<Deadline>, AskedParts) {
        let Asked { pending, until, parts } = self;
        (pending, until, parts)
    }

    /// Back together: it waits on.
    pub(crate) fn again(pending: Pending, until: Option<Deadline>, parts: AskedParts) -> Asked {
        Asked { pending, until, parts }
    }
}

/// A lookup whose answer has not been taken.
pub(crate) struct Asked {
    pending: Pending,
    until: Option<Deadline>,
    parts: AskedParts,
}

pub(crate) struct Session {
    id: u64,
    admission: u32,
    pub(crate) state: State,
    /// Lookups that were asked, and may have leases.
    leases: Vec<Asking>,
}

pub(crate) struct Sessions {
    pub(crate) probe: Probe,
    fingerprint: [u64; 4],
    /// The namespace's id in an attachment.
    namespace: Option<(u64, u32)>,
    sessions: HashMap<Box<str>, Session>,
    pub(crate) stats: LookupStats,
}

impl Sessions {
    pub(crate) fn new(client: &Arc<Client>, fingerprint: [u64; 4]) -> Sessions {
        Sessions {
            probe: client.probe(),
            fingerprint,
            namespace: None,
            sessions: HashMap::new(),
            stats: LookupStats::default(),
        }
    }

    pub(crate) fn get(&mut self, request: &str) -> Option<&mut Session> {
        self.sessions.get_mut(request)
    }

    /// Starts the lookup of this admission, unless it has been started already and its answer holds. It may stay pending for
    /// `timeout`, if one is given; where that is zero, the engine is not asked.
    pub(crate) fn begin(
        &mut self,
        request: &str,
        admission: u32,
        keys: &[Key],
        timeout: Option<Duration>,
    ) -> Result<(), CallError> {
        let is_known = self.sessions.get(request).is_some_and(|session| session.admission == admission);
        if is_known && self.is_current(request) {
            return Ok(());
        }
        if keys.len() > KEYS_MAX {
            return Err(CallError::TooManyKeys { limit: KEYS_MAX, got: keys.len() });
        }
        if is_known {
            // What an engine that is gone had pinned: its successor, if it has taken that over, gives it back.
            self.release(request, admission, 0);
        }
        let id = match self.sessions.get(request) {
            Some(session) => session.id,
            None => self.probe.client().shared.next_session(),
        };
        let (state, lease) = self.ask(id, admission, keys, timeout.map(Deadline::after))?;
        match self.sessions.get_mut(request) {
            // Dropping an earlier admission's pending lookup abandons it: its lease is given back when it comes.
            Some(session) => {
                session.admission = admission;
                session.state = state;
                session.leases.extend(lease);
            }
            None => {
                let leases = lease.into_iter().collect();
                self.sessions.insert(request.into(), Session { id, admission, state, leases });
            }
        }
        Ok(())
    }

    /// Does what was answered in this request's present admission still hold? Not where the engine that has pinned it is gone:
    /// its successor may have nothing of it. True where nothing was found, or is not known yet.
    pub(crate) fn is_current(&mut self, request: &str) -> bool {
        let Some(session) = self.sessions.get(request) else { return true };
        match &session.state {
            State::Answered(hit) if hit.chunks > 0 => {
                let asking = session.leases.iter().find(|asking| asking.admission == session.admission);
                asking.is_none_or(|asking| self.probe.lives(asking.nonce))
            }
            _ => true,
        }
    }

    /// Sends a lookup, if that can be done now: how the session stands then, and what may be leased for it.
    fn ask(
        &mut self,
        id: u64,
        admission: u32,
        keys: &[Key],
        until: Option<Deadline>,
    ) -> Result<(State, Option<Asking>), CallError> {
        Ok(match self.submit(id, admission, keys, until) {
            Ok(Some(asked)) => {
                let nonce = asked.parts.link.nonce;
                (State::Waiting(asked), Some(Asking { admission, nonce, keep: u32::MAX }))
            }
            Ok(None) => (State::Answered(Hit::default()), None),
            Err(CallError::Forked) => return Err(CallError::Forked),
            // Our own table is full, of what others have asked: that is no answer.
            Err(CallError::Busy) => (State::Unasked { keys: keys.to_vec(), until }, None),
            Err(error) => {
                self.count_failure(&error);
                (State::Answered(Hit::default()), None)
            }
        })
    }

    /// A lookup that could not be sent: once more. False: it still could not.
    pub(crate) fn ask_again(&mut self, request: &str) -> bool {
        let Some(session) = self.sessions.get_mut(request) else { return true };
        let State::Unasked { keys, until } = &mut session.state else { return true };
        let (keys, until) = (core::mem::take(keys), *until);
        let (id, admission) = (session.id, session.admission);
        // In a forked child there is nothing to ask, and never will be.
        let asked = self.ask(id, admission, &keys, until);
        let (state, lease) = asked.unwrap_or((State::Answered(Hit::default()), None));
        let could = !matches!(state, State::Unasked { .. });
        if let Some(session) = self.sessions.get_mut(request) {
            session.state = state;
            session.leases.extend(lease);
        }
        could
    }

    /// A lookup that could not be sent for as long as its caller can wait.
    pub(crate) fn give_up_asking(&mut self, request: &str) {
        if let Some(session) = self.sessions.get_mut(request) {
            session.state = State::Answered(Hit::default());
            self.stats.timed_out += 1;
        }
    }

    /// `None`: nothing to look up. An answer of [`CallError::Busy`] is our own: the engine has not been asked.
    fn submit(
        &mut self,
        session: u64,
        admission: u32,
        keys: &[Key],
        until: Option<Deadline>,
    ) -> Result<Option<Asked>, CallError> {
        let link = self.probe.link()?;
        if keys.is_empty() {
            return Ok(None);
        }
        if until.is_some_and(Deadline::passed) {
            return Err(CallError::TimedOut { waited_ms: 0 });
        }
        let link = link.clone();
        let namespace = self.resolve(&link)?;
        // Each key is answered by one word.
        let per_key = KEY_WORDS + 1;
        // A prefix that fits is a right answer, if not the longest.
        let keys = &keys[..keys.len().min(link.payload().len() / 2 / per_key)];
        let pending = link.submit(
            keys.len() * per_key,
            |_| Undo::ReleaseLease { session, admission },
            |payload, region| {
                let written = payload.write(region.offset, bytemuck::cast_slice(keys));
                debug_assert!(written.is_ok());
                let keys = Records { offset: region.offset, count: keys.len() as u32 };
                let answer = region.offset + keys.count * KEY_WORDS as u32;
                Request::Lookup { session, admission, namespace, keys, answer }
            },
        )?;
        let parts = AskedParts { keys: keys.len(), namespace, link };
        Ok(Some(Asked { pending, until, parts }))
    }

    /// The namespace's id, once a worker has registered it.
    fn resolve(&mut self, link: &Link) -> Result<u32, CallError> {
        let known = self.namespace.filter(|(at, id)| *at == link.nonce && link.engine.has_namespace(*id));
        let id = match known {
            Some((_, id)) => id,
            None => link.engine.find_namespace(&self.fingerprint).ok_or(CallError::NotRegistered)?,
        };
        self.namespace = Some((link.nonce, id));
        Ok(id)
    }

    /// The answer of a request's lookup, from its completion. What it found is leased from here on.
    pub(crate) fn accept(&self, request: &str, asked: AskedParts, answer: &Answer) -> Result<Hit, CallError> {
        let AskedParts { keys, namespace, link } = asked;
        crate::status::check(&answer.completion)?;
        let [chunks, offset, arena_low, arena_high] = answer.completion.results;
        let chunks = usize::try_from(chunks).unwrap_or(usize::MAX);
        if chunks > keys {
            return Err(CallError::Refused("an answer of more chunks than were asked for"));
        }
        let Some(session) = self.sessions.get(request) else { return Ok(Hit::nothing()) };
        // What has been released before the answer was taken is not promised any more.
        let asking = session.leases.iter().find(|asking| asking.admission == session.admission);
        let chunks = chunks.min(asking.map_or(0, |asking| asking.keep) as usize);
        if chunks == 0 {
            return Ok(Hit::nothing());
        }
        let mut words = vec![0; chunks];
        let offset = u32::try_from(offset).unwrap_or(u32::MAX);
        let outside = |_| CallError::Refused("an answer outside the payload area");
        answer.payload().read(offset, &mut words).map_err(outside)?;
        let chunks = chunks as u32;
        let found: Arc<[ChunkWord]> = words.into_iter().map(ChunkWord::from_bits).collect();
        let lease = Lease {
            session: session.id,
            admission: session.admission,
            namespace,
            found: found.clone(),
            keep: chunks,
        };
        let shared = &self.probe.client().shared;
        if !shared.leases.accept(&link, lease) {
            // Only what is pinned is promised.
            shared.counters.late_answers.add(1);
            return Err(CallError::Restarted);
        }
        Ok(Hit { chunks, arena_id: [arena_low, arena_high], found: Some(found) })
    }

    pub(crate) fn count_failure(&mut self, error: &CallError) {
        match error {
            CallError::TimedOut { .. } => self.stats.timed_out += 1,
            CallError::NotRegistered | CallError::Busy => self.stats.refused += 1,
            _ => self.stats.degraded += 1,
        }
    }

    /// Drops an admission's lease beyond `keep` chunks. Delivered later where it cannot be delivered now.
    pub(crate) fn release(&mut self, request: &str, admission: u32, keep: u32) {
        let Some(session) = self.sessions.get_mut(request) else { return };
        let Some(at) = session.leases.iter().position(|asking| asking.admission == admission) else { return };
        let (id, nonce) = (session.id, session.leases[at].nonce);
        if keep == 0 {
            session.leases.swap_remove(at);
        } else {
            let asking = &mut session.leases[at];
            asking.keep = asking.keep.min(keep);
        }
        if self.probe.is_ours() {
            self.probe.client().shared.leases.release(id, admission, keep, nonce);
        }
    }

    /// Ends a session: its answer, its pending lookup and all its leases.
    pub(crate) fn end(&mut self, request: &str) {
        let Some(session) = self.sessions.remove(request) else { return };
        let Session { id, state, leases, .. } = session;
        // Abandon first: then the end of the session follows its lookup in the ring.
        drop(state);
        if !leases.is_empty() && self.probe.is_ours() {
            self.probe.client().shared.leases.end_session(id, &leases);
        }
    }

    /// How many sessions are open.
    pub(crate) fn len(&self) -> usize {
        self.sessions.len()
    }

    /// The namespace's id here and now.
    pub(crate) fn namespace(&mut self) -> Result<u32, CallError> {
        let link = self.probe.link()?.clone();
        self.resolve(&link)
    }
}

impl Drop for Sessions {
    fn drop(&mut self) {
        // The client may live on, for another adapter: what these sessions lease must not.
        let open: Vec<Box<str>> = self.sessions.keys().cloned().collect();
        for request in open {
            self.end(&request);
        }
    }
}
