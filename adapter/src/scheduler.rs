//! The scheduler's adapter: lookups, admissions, and what they hold.
//!
//! A lookup reads the engine's own tables, in this thread, and is answered at once, whatever the engine is doing: it may sleep,
//! be stopped, dead, or recovering. An answer stays until the session ends or the next admission: asking again gives the same
//! answer and does no work. Everything that a session may hold is known here, so that ending it gives all of it back.

use crate::client::{Client, Probe};
use crate::error::CallError;
use crate::health::Health;
use crate::hit::Hit;
use crate::leases::Found;
use crate::link::Link;
use hashbrown::HashMap;
use hashbrown::hash_map::EntryRef;
use kvring_shm_abi::chunk::ChunkWord;
use kvring_shm_abi::engine_segment::NamespaceInfo;
use kvring_shm_abi::lobby::LookupTotals;
use kvring_shm_abi::lookup::Marked;
use kvring_shm_abi::message::{Key, PAGE_BYTES};
use kvring_shm_abi::namespace::namespace_index;
use std::hash::RandomState;
use std::sync::Arc;

/// The options of a scheduler's lookups. See [`PollingSchedulerAdapter`] for an example.
#[derive(Clone, Debug)]
pub struct SchedulerOptions {
    /// Names the namespace: the same digest as the workers register.
    pub fingerprint: [u64; 4],
}

impl SchedulerOptions {
    /// The options for a namespace.
    #[must_use]
    pub fn new(fingerprint: [u64; 4]) -> SchedulerOptions {
        SchedulerOptions { fingerprint }
    }
}

/// Counts of what lookups came to, since the adapter was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LookupStats {
    /// Answers from the engine's tables, also those of 0 chunks.
    pub answered: u64,
    /// Of those: while the engine was not serving (stopped, dead, recovering).
    pub not_serving: u64,
    /// Of those: cut, because this client holds as much as it may.
    pub cut: u64,
    /// 0 matched because there are no tables that may be read.
    pub degraded: u64,
    /// 0 matched because not all workers have registered the namespace yet.
    pub refused: u64,
}

/// A request that has looked something up.
struct Session {
    id: u64,
    /// The last admission that has looked something up.
    admission: Option<u32>,
    hit: Hit,
    /// How many chunks of the hit are still wanted.
    keep: usize,
    /// The nonce of the attachment whose engine knows that they are held.
    told: u64,
    /// The admissions that may hold something.
    holding: Vec<u32>,
}

/// The namespace, as the tables of one arena have it.
#[derive(Clone, Copy)]
struct Known {
    arena_id: [u64; 2],
    id: u32,
    chunk_tokens: u32,
    chunk_bytes: u64,
}

/// Synchronous lookups: one call gives a definite answer, in microseconds, and waits for nobody.
///
/// A request is known by its name. An *admission* counts how often the request has been preempted: a preempted request
/// comes back with the next one. An answer stays until the session ends or the next admission begins.
///
/// # Example
/// ```
/// use kvring_adapter::{Client, ClientOptions, PollingSchedulerAdapter, Role, SchedulerOptions};
///
/// let options = ClientOptions { engine: "nobody".to_owned(), ..ClientOptions::default() };
/// let client = Client::new(Role::Scheduler, options)?;
/// let mut scheduler = PollingSchedulerAdapter::new(&client, SchedulerOptions::new([1, 2, 3, 4]));
/// // If there has never been an engine, a lookup finds nothing.
/// assert_eq!(scheduler.lookup("request", 0, &[[10, 0]])?.chunks, 0);
/// assert_eq!(scheduler.lookup_stats().degraded, 1);
/// scheduler.end_session("request");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
/// See [`Hit`] for a lookup that finds something.
pub struct PollingSchedulerAdapter {
    tables: Tables,
    sessions: HashMap<String, Session, RandomState>,
}

/// The engine's tables, as this scheduler reads them.
struct Tables {
    probe: Probe,
    fingerprint: [u64; 4],
    known: Option<Known>,
    /// What the lookup that is under way has found.
    words: Vec<ChunkWord>,
    stats: LookupStats,
}

impl PollingSchedulerAdapter {
    /// An adapter on a client of the scheduler's role.
    #[must_use]
    pub fn new(client: &Arc<Client>, options: SchedulerOptions) -> Self {
        let tables = Tables {
            probe: client.probe(),
            fingerprint: options.fingerprint,
            known: None,
            words: Vec::new(),
            stats: LookupStats::default(),
        };
        PollingSchedulerAdapter { tables, sessions: HashMap::default() }
    }

    /// The longest visible prefix of `keys`, held for this request and admission until [`free_lookup_locks`] or
    /// [`end_session`]: a definite answer, the same whenever the admission asks again, as long as it holds ([`is_current`]).
    ///
    /// # Errors
    /// Only in a forked child. If the engine is in trouble, the answer is 0 at worst.
    ///
    /// [`free_lookup_locks`]: PollingSchedulerAdapter::free_lookup_locks
    /// [`end_session`]: PollingSchedulerAdapter::end_session
    /// [`is_current`]: PollingSchedulerAdapter::is_current
    pub fn lookup(&mut self, request: &str, admission: u32, keys: &[Key]) -> Result<&Hit, CallError> {
        self.lookup_lazily(request, admission, keys.len(), keys.iter().copied())
    }

    /// As [`PollingSchedulerAdapter::lookup`], with keys that are made as they are needed: after a miss at most a few more are
    /// asked for. `count` is how many there are.
    ///
    /// # Errors
    /// As [`PollingSchedulerAdapter::lookup`].
    pub fn lookup_lazily(
        &mut self,
        request: &str,
        admission: u32,
        count: usize,
        keys: impl Iterator<Item = Key>,
    ) -> Result<&Hit, CallError> {
        let PollingSchedulerAdapter { tables, sessions } = self;
        if !tables.probe.is_ours() {
            return Err(CallError::Forked);
        }
        let mut keys = keys.peekable();
        let session = sessions.entry_ref(request);
        if let EntryRef::Vacant(_) = session {
            tables.prefetch(keys.peek());
        }
        let new = || Session::new(tables.probe.client().shared.next_session());
        let session = session.or_insert_with(new);
        if session.admission == Some(admission) {
            if tables.still_have(session) {
                return Ok(&session.hit);
            }
            // What it held is not there any more, or not in the arena that there is now.
            tables.release(session, admission, 0);
        }
        let (hit, told) = tables.find((session.id, admission), count, keys).unwrap_or_else(|error| {
            tracing::debug!(request, %error, "lookup answered 0");
            let is_refused = matches!(error, CallError::NotRegistered);
            tables.stats.refused += u64::from(is_refused);
            tables.stats.degraded += u64::from(!is_refused);
            (Hit::nothing(), 0)
        });
        if hit.chunks > 0 {
            session.holding.push(admission);
        }
        (session.keep, session.told) = (hit.chunks as usize, told);
        (session.admission, session.hit) = (Some(admission), hit);
        Ok(&session.hit)
    }

    /// Does the answer of the request's present admission still hold? It does not if the arena has been replaced, or if the
    /// engine could not wait for this client after a restart and has evicted what it held, or has thrown it out: then the next
    /// lookup of this admission looks again. Costs a few loads; after a restart, once, a load for each chunk.
    pub fn is_current(&mut self, request: &str) -> bool {
        self.sessions.get_mut(request).is_none_or(|session| self.tables.still_have(session))
    }

    /// Gives up what an admission holds beyond its first `keep` chunks: call it when all ranks have reported the load
    /// (`keep` 0), or when less is loaded than was found. Ignores an unknown request. If the engine cannot be told now, it is
    /// told later.
    pub fn free_lookup_locks(&mut self, request: &str, admission: u32, keep: u32) {
        if let Some(session) = self.sessions.get_mut(request) {
            self.tables.release(session, admission, keep as usize);
        }
    }

    /// Ends a request: drops its answer, and all that it holds. Ignores an unknown one.
    pub fn end_session(&mut self, request: &str) {
        let Some(Session { id, holding, .. }) = self.sessions.remove(request) else { return };
        if !holding.is_empty() && self.tables.probe.is_ours() {
            self.tables.probe.client().shared.leases.end_session(id, &holding);
        }
    }

    /// Drops everything in this namespace that nobody holds. Returns the number of chunks dropped. It waits for the engine.
    ///
    /// # Errors
    /// The engine cannot be asked now, or does not answer in time.
    pub fn reset_cache(&mut self) -> Result<u64, CallError> {
        let link = self.tables.probe.link()?.clone();
        // While not all workers have registered there may be chunks of an earlier vLLM.
        match link.engine.find_namespace(&self.tables.fingerprint) {
            Some(namespace) => self.tables.probe.client().clear_namespace(namespace),
            None => Ok(0),
        }
    }

    /// Is the engine healthy? Costs a few loads.
    pub fn is_healthy(&mut self) -> bool {
        self.tables.probe.is_healthy()
    }

    /// The engine's health.
    #[must_use]
    pub fn health(&self) -> Health {
        self.tables.probe.client().health()
    }

    /// Counts of lookups by their outcomes.
    #[must_use]
    pub fn lookup_stats(&self) -> LookupStats {
        self.tables.stats
    }

    /// How many sessions are open.
    #[must_use]
    pub fn open_sessions(&self) -> usize {
        self.sessions.len()
    }

    /// Ends the client. Idempotent.
    pub fn shutdown(&mut self) {
        self.tables.probe.client().shutdown();
    }
}

impl Session {
    fn new(id: u64) -> Session {
        Session { id, admission: None, hit: Hit::nothing(), keep: 0, told: 0, holding: Vec::new() }
    }
}

impl Tables {
    /// Asks the processor for the lines of the directory that the first key needs, on the assumption that the namespace is what it
    /// was at the last lookup. They come while the session is made.
    fn prefetch(&mut self, first: Option<&Key>) {
        if let (Some(key), Some(known)) = (first, self.known)
            && let Some(link) = self.probe.link_for_hints()
        {
            let directory = link.engine.chunks.directory();
            directory.prefetch(directory.spot(namespace_index(known.id), *key));
        }
    }

    /// Reads the tables, and holds what they have. Returns the answer, and by which attachment the engine knows of it.
    fn find(
        &mut self,
        name: (u64, u32),
        count: usize,
        keys: impl Iterator<Item = Key>,
    ) -> Result<(Hit, u64), CallError> {
        let (link, leases) = self.probe.tables()?;
        let Some(reading) = link.reading() else { return Err(CallError::Degraded(link.health())) };
        let known = resolve(link, &self.fingerprint, self.known).ok_or(CallError::NotRegistered)?;
        self.known = Some(known);
        let Known { arena_id, id, chunk_tokens, chunk_bytes } = known;
        let words = &mut self.words;
        words.clear();
        link.engine.chunks.search(id, keys, count, reading.marked, words);
        let (mut hit, mut told, mut is_cut) = (Hit::nothing(), 0, false);
        if !words.is_empty() {
            let kept = leases.hold(link, Found { name, namespace: id, chunk_bytes, words });
            let chunks = kept.words.len() as u32;
            (told, is_cut) = (kept.told, kept.is_cut);
            if chunks > 0 {
                hit = Hit { chunks, arena_id, found: Some(kept.words) };
            }
        }
        self.stats.answered += 1;
        self.stats.not_serving += u64::from(!reading.is_serving);
        self.stats.cut += u64::from(is_cut);
        let tokens = |chunks: u64| chunks * u64::from(chunk_tokens);
        link.count_lookup(LookupTotals {
            lookups: 1,
            chunks_asked: count as u64,
            chunks_hit: hit.chunks.into(),
            tokens_asked: tokens(count as u64),
            tokens_hit: tokens(hit.chunks.into()),
            cut: is_cut.into(),
            not_serving: (!reading.is_serving).into(),
        });
        Ok((hit, told))
    }

    /// See [`PollingSchedulerAdapter::is_current`].
    fn still_have(&mut self, session: &mut Session) -> bool {
        let Hit { arena_id, found: Some(words), .. } = &session.hit else { return true };
        let Ok((link, leases)) = self.probe.tables() else { return false };
        if link.arena_id != *arena_id || link.reading().is_none() {
            return false;
        }
        // An engine that knows what is held does not evict it, and a dead one evicts nothing.
        if session.told == link.nonce {
            return true;
        }
        let words = &words[..session.keep];
        // A client that was thrown out has declared nothing to the engine that it is attached to now.
        let holds =
            session.admission.is_some_and(|admission| leases.holds((session.id, admission), session.keep))
                && link.engine.chunks.still(words, Marked::There) == words.len();
        if holds {
            session.told = link.nonce;
        }
        holds
    }

    /// See [`PollingSchedulerAdapter::free_lookup_locks`].
    fn release(&self, session: &mut Session, admission: u32, keep: usize) {
        if !session.holding.contains(&admission) {
            return;
        }
        if session.admission == Some(admission) {
            session.keep = session.keep.min(keep);
        }
        if keep == 0 {
            session.holding.retain(|one| *one != admission);
        }
        if self.probe.is_ours() {
            self.probe.client().shared.leases.release((session.id, admission), keep);
        }
    }
}

/// The namespace in these tables, once all its workers have registered; `known` is what it was at the last lookup.
fn resolve(link: &Link, fingerprint: &[u64; 4], known: Option<Known>) -> Option<Known> {
    let engine = &link.engine;
    let is_it = |known: &Known| known.arena_id == link.arena_id && engine.has_namespace(known.id);
    if let Some(known) = known.filter(is_it) {
        return Some(known);
    }
    let id = engine.find_namespace(fingerprint)?;
    let index = namespace_index(id);
    let namespace = engine.namespaces.get(usize::from(index)).and_then(|namespace| namespace.read(index))?;
    // Another namespace may have begun at this index while this one was read.
    let is_same = engine.find_namespace(fingerprint) == Some(id);
    let is_whole = |it: &NamespaceInfo| it.shard_bytes.len() == it.world as usize;
    if !is_same || !is_whole(&namespace) {
        return None;
    }
    let slot_bytes = |shard: &u64| shard.div_ceil(PAGE_BYTES).saturating_mul(PAGE_BYTES);
    let chunk_bytes = namespace.shard_bytes.iter().map(slot_bytes).fold(0, u64::saturating_add);
    Some(Known { arena_id: link.arena_id, id, chunk_tokens: namespace.chunk_tokens, chunk_bytes })
}

impl Drop for PollingSchedulerAdapter {
    fn drop(&mut self) {
        // The client may live on, for another adapter: what these sessions hold must not.
        let open: Vec<String> = self.sessions.keys().cloned().collect();
        for request in open {
            self.end_session(&request);
        }
    }
}
