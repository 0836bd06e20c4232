//! A client in another process, driven over its pipes.

use crate::ends;
use crate::engine::{all_stopped, peer_binary, put_down};
use crate::held::HeldBackend;
use crate::proto::{Ask, Found, Handle, Loaded, SchedulerSpec, Stored, Tally, Tell, WorkerSpec};
use crate::scheduler::SchedulerSide;
use crate::wait::LIMIT;
use crate::worker::WorkerSide;
use kvring_adapter::{JobId, Key, Round};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, channel};
use std::time::Duration;

/// Another process with a worker, a scheduler, or both.
pub struct Peer {
    child: Child,
    asks: ChildStdin,
    tells: Receiver<String>,
}

impl Peer {
    /// A process without anything in it yet.
    ///
    /// # Panics
    /// When there is no process to be had.
    #[must_use]
    pub fn spawn() -> Peer {
        Peer::spawn_with(&[])
    }

    /// The same, with further variables in its environment.
    ///
    /// # Panics
    /// When there is no process to be had.
    #[must_use]
    pub fn spawn_with(environment: &[(&str, &str)]) -> Peer {
        let mut child = Command::new(peer_binary())
            .arg("client")
            .envs(environment.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a peer process");
        let asks = child.stdin.take().expect("its stdin");
        let stdout = child.stdout.take().expect("its stdout");
        let (line, tells) = channel();
        // Reading in a thread: a peer that hangs must not hang the test.
        std::thread::spawn(move || {
            for text in BufReader::new(stdout).lines().map_while(Result::ok) {
                if line.send(text).is_err() {
                    break;
                }
            }
        });
        Peer { child, asks, tells }
    }

    /// A process with a worker that is attached and registered.
    ///
    /// # Panics
    /// When that fails.
    #[must_use]
    pub fn worker(spec: &WorkerSpec) -> Peer {
        let mut peer = Peer::spawn();
        peer.add_worker(spec).unwrap_or_else(|error| panic!("the worker: {error}"));
        peer.ready();
        peer
    }

    /// A process with a scheduler that is attached.
    ///
    /// # Panics
    /// When that fails.
    #[must_use]
    pub fn scheduler(spec: &SchedulerSpec) -> Peer {
        let mut peer = Peer::spawn();
        peer.add_scheduler(spec);
        peer.ready();
        peer
    }

    /// A scheduler in this process, attached or not.
    ///
    /// # Panics
    /// For options that cannot be.
    pub fn add_scheduler(&mut self, spec: &SchedulerSpec) {
        self.done(&Ask::Scheduler(Box::new(spec.clone()))).expect("a scheduler");
    }

    /// Makes it another user's process, for good.
    ///
    /// # Panics
    /// Without the privilege.
    pub fn become_user(&mut self, uid: u32) {
        self.done(&Ask::BecomeUser { uid }).expect("another user");
    }

    /// A worker in this process.
    ///
    /// # Errors
    /// What its registration said.
    pub fn add_worker(&mut self, spec: &WorkerSpec) -> Result<(), String> {
        self.done(&Ask::Worker(Box::new(spec.clone())))
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal.
    ///
    /// # Panics
    /// When it is gone.
    pub fn send(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).expect("a signal to our own child");
    }

    /// SIGSTOP, and waits until all its threads stand still.
    pub fn stop(&self) {
        self.send(Signal::SIGSTOP);
        all_stopped(self.child.id());
    }

    /// SIGCONT.
    pub fn resume(&self) {
        self.send(Signal::SIGCONT);
    }

    /// `kill -9`, and waits until it is gone.
    pub fn kill(&mut self) {
        put_down(&mut self.child);
    }

    /// A process with a worker that has a copy of `keys` running, and a scheduler; with `dma` it says that devices write for
    /// it.
    ///
    /// # Panics
    /// When it does not come to that.
    #[must_use]
    pub fn holding(spec: &WorkerSpec, scheduler: &SchedulerSpec, dma: bool, keys: &[Key]) -> Peer {
        let mut peer = Peer::spawn();
        peer.done(&Ask::HeldWorker(Box::new(spec.clone()))).unwrap_or_else(|error| panic!("{error}"));
        peer.add_scheduler(scheduler);
        if dma {
            peer.done(&Ask::RegisterDma).expect("a word");
        }
        peer.ready();
        peer.done(&Ask::HoldAStore { round: (77, 1), keys: keys.to_vec(), version: 1 }).expect("a store");
        peer
    }

    /// Its keepers end, and nothing else of it does.
    ///
    /// # Panics
    /// When they do not.
    pub fn end_keepers(&mut self) {
        self.done(&Ask::EndKeepers).expect("its keepers' end");
    }

    /// One question, one answer.
    ///
    /// # Panics
    /// When the peer has died.
    pub fn ask(&mut self, ask: &Ask) -> Tell {
        self.try_ask(ask).unwrap_or_else(|| panic!("{ask:?}: the peer has died"))
    }

    /// One question, one answer; `None` where the peer dies over it, or has.
    ///
    /// # Panics
    /// When it says what makes no sense.
    pub fn try_ask(&mut self, ask: &Ask) -> Option<Tell> {
        self.begin(ask);
        self.end(ask)
    }

    /// Asks without waiting for the answer, which is [`Peer::end`]'s.
    ///
    /// # Panics
    /// Never: a peer that has died does not answer.
    pub fn begin(&mut self, ask: &Ask) {
        let mut line = serde_json::to_string(ask).expect("an ask is JSON");
        line.push('\n');
        // Its end of the pipe may be closed: then its end of the other one is, too.
        let _ = self.asks.write_all(line.as_bytes()).and_then(|()| self.asks.flush());
    }

    /// The answer to what was asked; `None` where the peer has died instead.
    ///
    /// # Panics
    /// When it says what makes no sense.
    pub fn end(&mut self, ask: &Ask) -> Option<Tell> {
        let answer = self.tells.recv().ok()?;
        Some(serde_json::from_str(&answer).unwrap_or_else(|error| panic!("{ask:?}: {answer}: {error}")))
    }

    /// The answer to what was asked, if it comes within `limit`.
    ///
    /// # Panics
    /// When the peer has died, or says what makes no sense.
    pub fn end_within(&mut self, ask: &Ask, limit: Duration) -> Option<Tell> {
        match self.tells.recv_timeout(limit) {
            Ok(answer) => Some(
                serde_json::from_str(&answer).unwrap_or_else(|error| panic!("{ask:?}: {answer}: {error}")),
            ),
            Err(RecvTimeoutError::Disconnected) => panic!("{ask:?}: the peer has died"),
            Err(RecvTimeoutError::Timeout) => None,
        }
    }

    /// Waits until a peer that has hung up has ended: how. `None` where it has not hung up.
    pub fn has_ended(&mut self) -> Option<ExitStatus> {
        if matches!(self.tells.try_recv(), Err(TryRecvError::Disconnected)) {
            return self.child.wait().ok();
        }
        self.ended()
    }

    /// How it ended, if it has.
    ///
    /// # Panics
    /// When it cannot be waited for.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("our own child")
    }

    fn done(&mut self, ask: &Ask) -> Result<(), String> {
        match self.ask(ask) {
            Tell::Done => Ok(()),
            Tell::Failed(error) => Err(error),
            other => panic!("{ask:?}: {other:?}"),
        }
    }

    /// Waits until it is attached and registered.
    ///
    /// # Panics
    /// When it does not come to that.
    pub fn ready(&mut self) {
        self.done(&Ask::WaitReady).unwrap_or_else(|health| panic!("never ready: {health}"));
    }

    /// How it sees the engine.
    pub fn health(&mut self) -> String {
        match self.ask(&Ask::Health) {
            Tell::Health(health) => health,
            other => panic!("{other:?}"),
        }
    }

    /// Computes and stores chunks; see [`WorkerSide::store`].
    pub fn store(&mut self, round: Round, keys: &[Key], version: u64) -> Stored {
        let ask = Ask::Store {
            request: "store".to_owned(),
            round: (round.source, round.number),
            parent: None,
            keys: keys.to_vec(),
            version,
        };
        match self.ask(&ask) {
            Tell::Stored(stored) => stored,
            other => panic!("{other:?}"),
        }
    }

    /// Loads and verifies chunks; see [`WorkerSide::load`].
    pub fn load(&mut self, handles: &[Handle], version: u64) -> Loaded {
        let ask = Ask::Load { request: "load".to_owned(), handles: handles.to_vec(), version };
        match self.ask(&ask) {
            Tell::Loaded(loaded) => loaded,
            other => panic!("{other:?}"),
        }
    }

    /// Looks up; see [`SchedulerSide::lookup`].
    pub fn lookup(&mut self, request: &str, admission: u32, keys: &[Key]) -> Found {
        let ask = Ask::Lookup { request: request.to_owned(), admission, keys: keys.to_vec() };
        match self.ask(&ask) {
            Tell::Found(found) => found,
            other => panic!("{other:?}"),
        }
    }

    /// Gives up pins beyond the first `keep` chunks.
    pub fn release(&mut self, request: &str, admission: u32, keep: u32) {
        self.done(&Ask::Release { request: request.to_owned(), admission, keep }).expect("a release");
    }

    /// Ends a session.
    pub fn end_session(&mut self, request: &str) {
        self.done(&Ask::EndSession { request: request.to_owned() }).expect("an end");
    }

    /// Drops what is not pinned; how many chunks that were.
    pub fn reset_cache(&mut self) -> u64 {
        match self.ask(&Ask::ResetCache) {
            Tell::Count(count) => count,
            other => panic!("{other:?}"),
        }
    }

    /// What its lookups have come to.
    pub fn tally(&mut self) -> Tally {
        match self.ask(&Ask::Tally) {
            Tell::Tally(tally) => tally,
            other => panic!("{other:?}"),
        }
    }

    /// A clean end of its adapters.
    pub fn shutdown(&mut self) {
        self.done(&Ask::Shutdown).expect("a clean end");
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        put_down(&mut self.child);
    }
}

/// The other process's side: answers until its input ends.
///
/// # Panics
/// When the test says something that makes no sense.
pub fn serve() {
    let mut worker: Option<WorkerSide> = None;
    let mut scheduler: Option<SchedulerSide> = None;
    let backend = HeldBackend::new();
    let mut held: Option<JobId> = None;
    for line in std::io::stdin().lines().map_while(Result::ok) {
        let ask: Ask = serde_json::from_str(&line).expect("an ask");
        let tell = match (ask, worker.as_mut(), held) {
            (Ask::HeldWorker(spec), ..) => match WorkerSide::copying_with(&spec, backend.clone()) {
                Ok(side) => {
                    worker = Some(side);
                    Tell::Done
                }
                Err(error) => Tell::Failed(error.to_string()),
            },
            (Ask::HoldAStore { round: (source, number), keys, version }, Some(worker), _) => {
                backend.hold();
                let round = Round { source, number };
                held = Some(worker.submit_store("held", round, None, &keys, version).expect("a good job"));
                backend.holds(1);
                Tell::Done
            }
            (Ask::FinishTheStore, Some(worker), Some(job)) => {
                backend.let_go();
                Tell::Stored(worker.finished_store(job))
            }
            (Ask::End { how }, ..) => {
                ends::end(how);
                Tell::Done
            }
            (Ask::EndKeepers, ..) => {
                ends::end_threads("kvring-keeper");
                Tell::Done
            }
            (Ask::Fork, ..) => Tell::Count(ends::fork_idle() as u64),
            (ask, ..) => answer(ask, &mut worker, &mut scheduler),
        };
        let mut text = serde_json::to_string(&tell).expect("an answer is JSON");
        text.push('\n');
        let mut out = std::io::stdout().lock();
        if out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_err() {
            return;
        }
    }
}

fn answer(ask: Ask, worker: &mut Option<WorkerSide>, scheduler: &mut Option<SchedulerSide>) -> Tell {
    match (ask, worker.as_mut(), scheduler.as_mut()) {
        (Ask::BecomeUser { uid }, ..) => match nix::unistd::setresuid(uid.into(), uid.into(), uid.into()) {
            Ok(()) => Tell::Done,
            Err(errno) => Tell::Failed(errno.to_string()),
        },
        (Ask::Worker(spec), ..) => match WorkerSide::start(&spec) {
            Ok(side) => {
                *worker = Some(side);
                Tell::Done
            }
            Err(error) => Tell::Failed(error.to_string()),
        },
        (Ask::Scheduler(spec), ..) => {
            *scheduler = Some(SchedulerSide::start(&spec));
            Tell::Done
        }
        (Ask::WaitReady, worker, scheduler) => {
            let clients = [worker.map(|w| w.client().clone()), scheduler.map(|s| s.client().clone())];
            for client in clients.into_iter().flatten() {
                if let Err(health) = client.wait_ready(LIMIT) {
                    return Tell::Failed(health.to_string());
                }
            }
            Tell::Done
        }
        (Ask::RegisterDma, worker, scheduler) => {
            let clients = [worker.map(|w| w.client().clone()), scheduler.map(|s| s.client().clone())];
            clients.iter().flatten().for_each(|client| client.register_dma());
            Tell::Done
        }
        (Ask::Health, Some(worker), _) => Tell::Health(worker.adapter().health().to_string()),
        (Ask::Health, _, Some(scheduler)) => Tell::Health(scheduler.client().health().to_string()),
        (Ask::Store { request, round: (source, number), parent, keys, version }, Some(worker), _) => {
            Tell::Stored(worker.store(&request, Round { source, number }, parent, &keys, version))
        }
        (Ask::Load { request, handles, version }, Some(worker), _) => {
            Tell::Loaded(worker.load(&request, &handles, version))
        }
        (Ask::Lookup { request, admission, keys }, _, Some(scheduler)) => {
            match scheduler.lookup(&request, admission, &keys) {
                Ok(found) => Tell::Found(found),
                Err(error) => Tell::Failed(error.to_string()),
            }
        }
        (Ask::Release { request, admission, keep }, _, Some(scheduler)) => {
            scheduler.api().free_lookup_locks(&request, admission, keep);
            Tell::Done
        }
        (Ask::EndSession { request }, _, Some(scheduler)) => {
            scheduler.api().end_session(&request);
            Tell::Done
        }
        (Ask::ResetCache, _, Some(scheduler)) => match scheduler.api().reset_cache() {
            Ok(count) => Tell::Count(count),
            Err(error) => Tell::Failed(error.to_string()),
        },
        (Ask::Tally, _, Some(scheduler)) => Tell::Tally(scheduler.tally()),
        (Ask::Shutdown, worker, scheduler) => {
            if let Some(worker) = worker {
                worker.adapter().shutdown();
            }
            if let Some(scheduler) = scheduler {
                scheduler.api().shutdown();
            }
            Tell::Done
        }
        (ask, ..) => panic!("{ask:?} of a process that is not that"),
    }
}
