//! A client in another process, driven over its pipes: each question is a line of JSON, and so is its answer.

use crate::ends;
use crate::held::HeldBackend;
use crate::process::Process;
use crate::proto::{Found, Loaded, SchedulerSpec, Stored, WorkerSpec, all_stored};
use crate::scheduler::SchedulerSide;
use crate::wait::LIMIT;
use crate::worker::WorkerSide;
use kvring_adapter::{Client, JobId, Key, Round};
use kvring_rig::wire::Handle;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::io::Write;
use std::ops::{Deref, DerefMut};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

/// What a test asks of a client in another process. The methods of [`Peer`] say what the answers mean.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Ask {
    BecomeUser {
        uid: u32,
    },
    Worker(Box<WorkerSpec>),
    /// A worker whose copies can be held: see [`HeldBackend`].
    HeldWorker(Box<WorkerSpec>),
    Scheduler(Box<SchedulerSpec>),
    WaitReady,
    RegisterDma,
    Health,
    Store {
        round: (u32, u32),
        keys: Vec<Key>,
        version: u64,
    },
    Load {
        handles: Vec<Handle>,
        version: u64,
    },
    Lookup {
        request: String,
        admission: u32,
        keys: Vec<Key>,
    },
    Release {
        request: String,
        admission: u32,
        keep: u32,
    },
    EndSession {
        request: String,
    },
    /// Begins a store whose copy stands still until [`Ask::FinishTheStore`].
    HoldAStore {
        round: (u32, u32),
        keys: Vec<Key>,
        version: u64,
    },
    FinishTheStore,
    /// Ends in one of the ways of [`ends::End`].
    End {
        how: u32,
    },
    /// Ends its keepers' threads, and nothing else of the process.
    EndKeepers,
    /// Forks a child that does nothing; the answer is the child's id.
    Fork,
    Shutdown,
}

impl Ask {
    pub fn store(round: Round, keys: &[Key], version: u64) -> Ask {
        Ask::Store { round: (round.source, round.number), keys: keys.to_vec(), version }
    }

    pub fn hold_a_store(round: Round, keys: &[Key], version: u64) -> Ask {
        Ask::HoldAStore { round: (round.source, round.number), keys: keys.to_vec(), version }
    }

    pub fn lookup(request: &str, admission: u32, keys: &[Key]) -> Ask {
        Ask::Lookup { request: request.to_owned(), admission, keys: keys.to_vec() }
    }
}

/// What was asked for, as JSON, or an error in words.
pub type Answer = Result<Value, String>;

/// The value of an answer that is of this type.
pub fn value_of<T: DeserializeOwned>(answer: &Answer) -> Option<T> {
    serde_json::from_value(answer.clone().ok()?).ok()
}

/// Another process with a worker, a scheduler, or both.
pub struct Peer(Process);

impl Deref for Peer {
    type Target = Process;

    fn deref(&self) -> &Process {
        &self.0
    }
}

impl DerefMut for Peer {
    fn deref_mut(&mut self) -> &mut Process {
        &mut self.0
    }
}

impl Peer {
    /// A process without a client yet.
    pub fn spawn() -> Peer {
        Peer::spawn_with(&[])
    }

    /// The same, with these variables added to its environment.
    pub fn spawn_with(environment: &[(&str, &str)]) -> Peer {
        Peer(Process::start(&["client"], environment.iter().copied(), Stdio::inherit()))
    }

    /// A process with a worker that is attached and registered.
    pub fn worker(spec: &WorkerSpec) -> Peer {
        let mut peer = Peer::spawn();
        peer.add_worker(spec).unwrap_or_else(|error| panic!("the worker: {error}"));
        peer.ready();
        peer
    }

    /// A process with a scheduler that is attached.
    pub fn scheduler(spec: &SchedulerSpec) -> Peer {
        let mut peer = Peer::spawn();
        peer.add_scheduler(spec);
        peer.ready();
        peer
    }

    /// A process with a scheduler, and a worker with a copy of `keys` that stands still; with `dma` it declares that
    /// devices write for it.
    pub fn holding(
        worker: &WorkerSpec,
        scheduler: &SchedulerSpec,
        dma: bool,
        round: Round,
        keys: &[Key],
    ) -> Peer {
        let mut peer = Peer::spawn();
        peer.get::<()>(&Ask::HeldWorker(Box::new(worker.clone())));
        peer.add_scheduler(scheduler);
        if dma {
            peer.get::<()>(&Ask::RegisterDma);
        }
        peer.ready();
        peer.get::<()>(&Ask::hold_a_store(round, keys, u64::from(round.source)));
        peer
    }

    /// A worker in this process. The error is what its registration said.
    pub fn add_worker(&mut self, spec: &WorkerSpec) -> Result<(), String> {
        self.ask(&Ask::Worker(Box::new(spec.clone()))).map(|_| ())
    }

    /// A scheduler in this process, attached or not.
    pub fn add_scheduler(&mut self, spec: &SchedulerSpec) {
        self.get(&Ask::Scheduler(Box::new(spec.clone())))
    }

    /// Makes it another user's process, for good.
    pub fn become_user(&mut self, uid: u32) {
        self.get(&Ask::BecomeUser { uid })
    }

    /// Waits until its clients are attached and registered.
    pub fn ready(&mut self) {
        self.get(&Ask::WaitReady)
    }

    /// How it sees the engine.
    pub fn health(&mut self) -> String {
        self.get(&Ask::Health)
    }

    /// See [`WorkerSide::store`].
    pub fn store(&mut self, round: Round, keys: &[Key], version: u64) -> Stored {
        self.get(&Ask::store(round, keys, version))
    }

    /// Stores these chunks, all of which are written. Returns their keys.
    #[track_caller]
    pub fn stores(&mut self, round: Round, keys: Vec<Key>, version: u64) -> Vec<Key> {
        assert_eq!(self.store(round, &keys, version), all_stored(keys.len()));
        keys
    }

    /// See [`WorkerSide::load`].
    pub fn load(&mut self, handles: &[Handle], version: u64) -> Loaded {
        self.get(&Ask::Load { handles: handles.to_vec(), version })
    }

    /// See [`SchedulerSide::lookup`].
    pub fn lookup(&mut self, request: &str, admission: u32, keys: &[Key]) -> Found {
        self.get(&Ask::lookup(request, admission, keys))
    }

    /// Looks these chunks up, all of which are found.
    #[track_caller]
    pub fn finds(&mut self, request: &str, admission: u32, keys: &[Key]) -> Found {
        let found = self.lookup(request, admission, keys);
        assert_eq!(found.chunks as usize, keys.len(), "found for {request}");
        found
    }

    /// Gives up its leases beyond the first `keep` chunks.
    pub fn release(&mut self, request: &str, admission: u32, keep: u32) {
        self.get(&Ask::Release { request: request.to_owned(), admission, keep })
    }

    pub fn end_session(&mut self, request: &str) {
        self.get(&Ask::EndSession { request: request.to_owned() })
    }

    /// Ends its keepers, and nothing else of it.
    pub fn end_keepers(&mut self) {
        self.get(&Ask::EndKeepers)
    }

    /// A clean end of its adapters.
    pub fn shutdown(&mut self) {
        self.get(&Ask::Shutdown)
    }

    /// Asks, and waits for an answer of this type.
    pub fn get<T: DeserializeOwned>(&mut self, ask: &Ask) -> T {
        let value = self.ask(ask).unwrap_or_else(|error| panic!("{ask:?}: {error}"));
        serde_json::from_value(value).unwrap_or_else(|error| panic!("{ask:?}: {error}"))
    }

    fn ask(&mut self, ask: &Ask) -> Answer {
        self.try_ask(ask).unwrap_or_else(|| panic!("{ask:?}: the peer has died"))
    }

    /// Asks, and waits for the answer; `None` where the peer dies over it, or has died.
    pub fn try_ask(&mut self, ask: &Ask) -> Option<Answer> {
        self.begin(ask);
        Some(decoded(&self.lines.recv().ok()?))
    }

    /// Asks without waiting for the answer.
    pub fn begin(&mut self, ask: &Ask) {
        self.say(&serde_json::to_string(ask).expect("an ask is JSON"));
    }

    /// The answer to what was asked, if it comes within `limit`.
    pub fn end_within(&mut self, limit: Duration) -> Option<Answer> {
        match self.lines.recv_timeout(limit) {
            Ok(line) => Some(decoded(&line)),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => panic!("the peer has died"),
        }
    }
}

fn decoded(line: &str) -> Answer {
    serde_json::from_str(line).unwrap_or_else(|error| panic!("a peer says {line}: {error}"))
}

/// The clients of the other process.
struct Clients {
    worker: Option<WorkerSide>,
    scheduler: Option<SchedulerSide>,
    backend: Arc<HeldBackend>,
    held: Option<JobId>,
}

/// What the other process does: it answers until its input ends.
pub fn serve() {
    let mut clients = Clients { worker: None, scheduler: None, backend: HeldBackend::new(), held: None };
    for line in std::io::stdin().lines().map_while(Result::ok) {
        let answer = clients.answer(serde_json::from_str(&line).expect("an ask"));
        let text = serde_json::to_string(&answer).expect("an answer is JSON");
        let mut out = std::io::stdout().lock();
        if writeln!(out, "{text}").and_then(|()| out.flush()).is_err() {
            return;
        }
    }
}

fn said(error: impl ToString) -> String {
    error.to_string()
}

impl Clients {
    fn worker(&mut self) -> &mut WorkerSide {
        self.worker.as_mut().expect("a process with a worker")
    }

    fn scheduler(&mut self) -> &mut SchedulerSide {
        self.scheduler.as_mut().expect("a process with a scheduler")
    }

    fn clients(&self) -> impl Iterator<Item = &Arc<Client>> {
        let worker = self.worker.iter().map(WorkerSide::client);
        worker.chain(self.scheduler.iter().map(SchedulerSide::client))
    }

    fn answer(&mut self, ask: Ask) -> Answer {
        let round = |(source, number)| Round { source, number };
        match ask {
            Ask::Health => {
                let worker = self.worker.as_mut().map(|worker| worker.adapter().health());
                let health = worker.unwrap_or_else(|| self.scheduler().client().health());
                return Ok(json!(health.to_string()));
            }
            Ask::Store { round: it, keys, version } => {
                return Ok(json!(self.worker().store(round(it), &keys, version)));
            }
            Ask::Load { handles, version } => return Ok(json!(self.worker().load(&handles, version))),
            Ask::Lookup { request, admission, keys } => {
                return Ok(json!(self.scheduler().try_lookup(&request, admission, &keys).map_err(said)?));
            }
            Ask::FinishTheStore => {
                self.backend.let_go();
                let job = self.held.take().expect("a store that is held");
                return Ok(json!(self.worker().finished_store(job)));
            }
            Ask::Fork => return Ok(json!(ends::fork_idle())),
            Ask::BecomeUser { uid } => {
                nix::unistd::setresuid(uid.into(), uid.into(), uid.into()).map_err(said)?;
            }
            Ask::Worker(spec) => self.worker = Some(WorkerSide::start(&spec).map_err(said)?),
            Ask::HeldWorker(spec) => {
                let worker = WorkerSide::copying_with(&spec, self.backend.clone());
                self.worker = Some(worker.map_err(said)?);
            }
            Ask::Scheduler(spec) => self.scheduler = Some(SchedulerSide::start(&spec)),
            Ask::WaitReady => self.clients().try_for_each(|client| client.wait_ready(LIMIT)).map_err(said)?,
            Ask::RegisterDma => self.clients().for_each(|client| client.register_dma()),
            Ask::Release { request, admission, keep } => {
                self.scheduler().api().free_lookup_locks(&request, admission, keep);
            }
            Ask::EndSession { request } => self.scheduler().api().end_session(&request),
            Ask::HoldAStore { round: it, keys, version } => {
                let worker = self.worker.as_mut().expect("a process with a worker");
                self.held = Some(self.backend.hold_a_store(worker, round(it), &keys, version));
            }
            Ask::End { how } => ends::end(how),
            Ask::EndKeepers => ends::end_threads("kvring-keeper"),
            Ask::Shutdown => {
                self.worker.iter_mut().for_each(|worker| worker.adapter().shutdown());
                self.scheduler.iter_mut().for_each(|scheduler| scheduler.api().shutdown());
            }
        }
        Ok(Value::Null)
    }
}
