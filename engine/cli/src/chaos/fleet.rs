//! The clients' processes: schedulers and workers, each of which is killed, stopped and started again by itself.

mod client;

use super::message::{FromScheduler, FromWorker, Start, Tally, ToScheduler, ToWorker};
use super::plan::Who;
use crate::children::kvring;
use crate::console::LogChoice;
use anyhow::Context;
use client::Client;
use kvring_rig::child::Peer;
use kvring_rig::pipe::Abort;
use kvring_rig::random::Random;
use kvring_shm_abi::segment::EngineName;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use std::time::{Duration, Instant};

/// What a client says.
#[derive(Debug)]
pub(super) enum Said {
    /// A scheduler.
    Scheduler(u32, FromScheduler),
    /// A worker.
    Worker(u32, u32, FromWorker),
    /// It has ended, and nobody had killed it: what it said last, if that was not in order.
    Ended(Who, Option<String>),
    /// It has said nothing for too long, or a job of its takes too long.
    Hangs(Who, String),
}

/// All clients.
pub(super) struct Fleet {
    engine: EngineName,
    seed: u64,
    log: LogChoice,
    abort: Abort,
    hang_limit: Duration,
    /// Negative control of the workers.
    careless: bool,
    clients: Vec<Client>,
    /// What all of them have done, in all their lives.
    pub(super) tally: Tally,
}

impl Fleet {
    /// Nobody is started yet.
    pub(super) fn new(
        engine: &EngineName,
        seed: u64,
        log: &LogChoice,
        abort: &Abort,
        hang_limit: Duration,
        careless: bool,
    ) -> Fleet {
        let client = |who| Client {
            who,
            life: 0,
            peer: None,
            ready: false,
            quiet: false,
            stopped_until: None,
            restart_at: Some(Instant::now()),
            ending: None,
            heard: Instant::now(),
        };
        Fleet {
            engine: engine.clone(),
            seed,
            log: log.clone(),
            abort: abort.clone(),
            hang_limit,
            careless,
            clients: Who::all().into_iter().map(client).collect(),
            tally: Tally::default(),
        }
    }

    fn client(&mut self, who: Who) -> Option<&mut Client> {
        self.clients.iter_mut().find(|client| client.who == who)
    }

    /// Which life of the client takes messages now.
    pub(super) fn life(&self, who: Who) -> Option<u32> {
        self.clients.iter().find(|client| client.who == who && client.ready).map(|client| client.life)
    }

    /// Does everybody take messages?
    pub(super) fn all_ready(&self) -> bool {
        self.clients.iter().all(|client| client.ready && client.stopped_until.is_none())
    }

    /// Is everybody of these quiet?
    pub(super) fn all_quiet(&self, of: impl Fn(Who) -> bool) -> bool {
        self.clients.iter().all(|client| client.quiet || !of(client.who))
    }

    /// Has everybody ended?
    pub(super) fn all_ended(&self) -> bool {
        self.clients.iter().all(|client| client.peer.is_none())
    }

    /// Whoever may be struck: the one that is meant, else the next one that takes messages.
    pub(super) fn target(&self, who: Who) -> Option<Who> {
        let fit =
            |client: &&Client| client.ready && client.stopped_until.is_none() && client.ending.is_none();
        let meant = self.clients.iter().position(|client| client.who == who)?;
        let (before, after) = self.clients.split_at(meant);
        after.iter().chain(before).find(fit).map(|client| client.who)
    }

    /// To a scheduler that takes messages; else it is for nobody.
    pub(super) fn tell_scheduler(&mut self, instance: u32, message: &ToScheduler) {
        let scheduler = self.client(Who::Scheduler { instance });
        if let Some(client) = scheduler.filter(|client| client.ready)
            && let Some(peer) = &mut client.peer
            && let Err(error) = peer.send(message)
        {
            // It has just ended: that is seen when its pipe is looked at.
            tracing::debug!(%error, "not told");
        }
    }

    /// To a worker, if it is in that life.
    pub(super) fn tell_worker(&mut self, instance: u32, rank: u32, life: u32, message: &ToWorker) {
        let worker = self.client(Who::Worker { instance, rank });
        if let Some(client) = worker.filter(|client| client.ready && client.life == life)
            && let Some(peer) = &mut client.peer
            && let Err(error) = peer.send(message)
        {
            tracing::debug!(%error, "not told");
        }
    }

    /// `kill -9`; started again after `pause`.
    pub(super) fn kill(&mut self, who: Who, pause: Duration) {
        if let Some(client) = self.client(who) {
            // Killed and waited for: also one that stands still.
            client.gone(Some(Instant::now() + pause));
        }
    }

    /// It stands still for a while; forever, and without anybody's knowing, for a negative control.
    pub(super) fn stop(&mut self, who: Who, pause: Option<Duration>) {
        if let Some(client) = self.client(who)
            && let Some(peer) = &mut client.peer
        {
            peer.process().signal(Signal::SIGSTOP);
            client.stopped_until = pause.map(|pause| Instant::now() + pause);
        }
    }

    /// It ends politely, and is started again if `restart`.
    pub(super) fn end(&mut self, who: Who, restart: bool) {
        let Some(client) = self.client(who) else { return };
        if let Some(peer) = &mut client.peer
            && client.ending.is_none()
        {
            let sent = match who {
                Who::Scheduler { .. } => peer.send(&ToScheduler::End),
                Who::Worker { .. } => peer.send(&ToWorker::End),
            };
            if let Err(error) = sent {
                tracing::debug!(%error, "not told");
            }
            (client.ready, client.ending, client.heard) = (false, Some(Instant::now()), Instant::now());
            client.restart_at = restart.then(Instant::now);
        }
    }

    /// Everybody goes on, or is started, at once.
    pub(super) fn calm(&mut self) {
        let now = Instant::now();
        for client in &mut self.clients {
            client.stopped_until = client.stopped_until.map(|_| now);
            client.restart_at = client.restart_at.map(|_| now);
        }
    }

    /// Nobody is quiet any more.
    pub(super) fn stir(&mut self) {
        self.clients.iter_mut().for_each(|client| client.quiet = false);
    }

    /// What is due. The numbers of lives that began, and of workers that go on after a stop.
    pub(super) fn tick(&mut self) -> anyhow::Result<(u64, u64)> {
        let now = Instant::now();
        let (mut starts, mut resumed) = (0, 0);
        for at in 0..self.clients.len() {
            let client = &mut self.clients[at];
            if client.stopped_until.take_if(|until| *until <= now).is_some() {
                client.heard = now;
                resumed += u64::from(matches!(client.who, Who::Worker { .. }));
                if let Some(peer) = &mut client.peer {
                    peer.process().signal(Signal::SIGCONT);
                }
            }
            if client.peer.is_none() && client.restart_at.is_some_and(|due| due <= now) {
                self.start(at)?;
                starts += 1;
            }
        }
        Ok((starts, resumed))
    }

    fn start(&mut self, at: usize) -> anyhow::Result<()> {
        let client = &mut self.clients[at];
        client.life += 1;
        let (subcommand, instance, rank) = match client.who {
            Who::Scheduler { instance } => ("chaos-scheduler", instance, None),
            Who::Worker { instance, rank } => ("chaos-worker", instance, Some(rank)),
        };
        let mut random = Random::new(self.seed, (at as u64) << 32 | u64::from(client.life));
        let start = Start {
            engine: self.engine.to_string(),
            seed: self.seed,
            instance,
            rank,
            life: client.life,
            // Mostly as it is by default; else so short that a stopped engine counts as stalled.
            stall_ms: if random.percent(50) { 2000 } else { 300 },
            careless: self.careless,
        };
        let name = client.who.to_string();
        let mut command = kvring(subcommand)?;
        let stderr = self.log.hand_to(&mut command);
        let mut peer = Peer::start(name, command, stderr, self.abort.clone())?;
        match client.who {
            Who::Scheduler { .. } => peer.send(&ToScheduler::Start(start))?,
            Who::Worker { .. } => peer.send(&ToWorker::Start(start))?,
        }
        client.peer = Some(peer);
        (client.ready, client.quiet, client.restart_at, client.heard) = (false, false, None, Instant::now());
        Ok(())
    }

    /// Waits until somebody speaks, at most `patience`; what was said, in each client's order.
    pub(super) fn listen(&mut self, patience: Duration, said: &mut Vec<Said>) -> anyhow::Result<()> {
        let mut at = Vec::new();
        let mut fds = Vec::new();
        for (index, client) in self.clients.iter_mut().enumerate() {
            if let Some(pipe) = client.peer.as_mut().and_then(Peer::pipe) {
                at.push(index);
                fds.push(PollFd::new(pipe.input(), PollFlags::POLLIN));
            }
        }
        let timeout = PollTimeout::try_from(patience.as_millis()).unwrap_or(PollTimeout::ZERO);
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno).context("poll"),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        drop(fds);
        for (index, _) in at.into_iter().zip(ready).filter(|(_, ready)| *ready) {
            self.clients[index].hear(&mut self.tally, said, self.hang_limit)?;
        }
        let limit = self.hang_limit;
        for client in &mut self.clients {
            client.judge_silence(limit, said);
        }
        Ok(())
    }
}
