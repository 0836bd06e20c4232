//! The clients' processes: schedulers and workers, each of which is killed, stopped and started again by itself.

mod client;

use super::message::{FromScheduler, Reply, Start, Tally, ToScheduler, ToWorker, Who};
use crate::child;
use crate::console::Console;
use anyhow::Context;
use client::Client;
use kvring_rig::child::Peer;
use kvring_rig::pipe::Abort;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use std::time::{Duration, Instant};

/// A message of a client, or a fact about it.
#[derive(Debug)]
pub(crate) enum Said {
    /// It takes messages.
    Ready(Who),
    /// A message of the scheduler of this instance.
    Scheduler(u32, FromScheduler),
    /// An answer of the worker of this instance and rank.
    Reply(u32, u32, Reply),
    /// It has ended though nobody had killed it; the explanation, unless it had been told to end.
    Ended(Who, Option<String>),
    /// It has said nothing for too long, or a job of its takes too long.
    Hangs(Who, String),
}

/// All clients.
pub(crate) struct Fleet {
    /// Makes the job of this life of a client.
    start: Box<dyn Fn(Who, u32) -> Start>,
    console: Console,
    abort: Abort,
    hang_limit: Duration,
    clients: Vec<Client>,
    /// The sum of all tallies of all their lives.
    pub(crate) tally: Tally,
}

impl Fleet {
    /// Nobody is started yet.
    pub(crate) fn new(
        clients: Vec<Who>,
        start: Box<dyn Fn(Who, u32) -> Start>,
        console: &Console,
        abort: &Abort,
        hang_limit: Duration,
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
            wrong_bytes: 0,
        };
        Fleet {
            start,
            console: console.clone(),
            abort: abort.clone(),
            hang_limit,
            clients: clients.into_iter().map(client).collect(),
            tally: Tally::default(),
        }
    }

    /// Whose loads brought wrong bytes, and how many.
    pub(crate) fn wrong(&self) -> Vec<(Who, u64)> {
        let wrong = self.clients.iter().map(|client| (client.who, client.wrong_bytes));
        wrong.filter(|(_, bytes)| *bytes > 0).collect()
    }

    /// Negative control: `kill -9`, as if nobody had done it.
    pub(crate) fn kill_secretly(&mut self, who: Who) {
        if let Some(peer) = self.client(who).and_then(|client| client.peer.as_mut()) {
            peer.process().signal(Signal::SIGKILL);
        }
    }

    fn client(&mut self, who: Who) -> Option<&mut Client> {
        self.clients.iter_mut().find(|client| client.who == who)
    }

    /// Which life of the client takes messages now.
    pub(crate) fn life(&self, who: Who) -> Option<u32> {
        self.clients.iter().find(|client| client.who == who && client.ready).map(|client| client.life)
    }

    /// Does everybody take messages?
    pub(crate) fn all_ready(&self) -> bool {
        self.clients.iter().all(|client| client.ready && client.stopped_until.is_none())
    }

    /// Is everybody of these quiet?
    pub(crate) fn all_quiet(&self, of: impl Fn(Who) -> bool) -> bool {
        self.clients.iter().all(|client| client.quiet || !of(client.who))
    }

    /// Has everybody ended?
    pub(crate) fn all_ended(&self) -> bool {
        self.clients.iter().all(|client| client.peer.is_none())
    }

    /// The client that is struck: the one that is meant, else the next one that takes messages.
    pub(crate) fn target(&self, who: Who) -> Option<Who> {
        let fit =
            |client: &&Client| client.ready && client.stopped_until.is_none() && client.ending.is_none();
        let meant = self.clients.iter().position(|client| client.who == who)?;
        let (before, after) = self.clients.split_at(meant);
        after.iter().chain(before).find(fit).map(|client| client.who)
    }

    /// To a scheduler that takes messages; else it is for nobody.
    pub(crate) fn tell_scheduler(&mut self, instance: u32, message: &ToScheduler) {
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
    pub(crate) fn tell_worker(&mut self, instance: u32, rank: u32, life: u32, message: &ToWorker) {
        let worker = self.client(Who::Worker { instance, rank });
        if let Some(client) = worker.filter(|client| client.ready && client.life == life)
            && let Some(peer) = &mut client.peer
            && let Err(error) = peer.send(message)
        {
            tracing::debug!(%error, "not told");
        }
    }

    /// `kill -9`; started again after `pause`.
    pub(crate) fn kill(&mut self, who: Who, pause: Duration) {
        if let Some(client) = self.client(who) {
            // Killed and waited for: also one that stands still.
            client.gone(Some(Instant::now() + pause));
        }
    }

    /// It stands still for a while; forever, and without anybody's knowing, for a negative control.
    pub(crate) fn stop(&mut self, who: Who, pause: Option<Duration>) {
        if let Some(client) = self.client(who)
            && let Some(peer) = &mut client.peer
        {
            peer.process().signal(Signal::SIGSTOP);
            client.stopped_until = pause.map(|pause| Instant::now() + pause);
        }
    }

    /// It ends politely, and is started again if `restart`.
    pub(crate) fn end(&mut self, who: Who, restart: bool) {
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
    pub(crate) fn calm(&mut self) {
        let now = Instant::now();
        for client in &mut self.clients {
            client.stopped_until = client.stopped_until.map(|_| now);
            client.restart_at = client.restart_at.map(|_| now);
        }
    }

    /// Nobody is quiet any more.
    pub(crate) fn stir(&mut self) {
        self.clients.iter_mut().for_each(|client| client.quiet = false);
    }

    /// Does what is due. Returns the numbers of lives that began, and of workers that went on after a stop.
    pub(crate) fn tick(&mut self) -> anyhow::Result<(u64, u64)> {
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
        let start = (self.start)(client.who, client.life);
        let name = client.who.to_string();
        let mut command = child::command(&start)?;
        let stderr = self.console.hand_to(&mut command);
        client.peer = Some(Peer::start(name, command, stderr, self.abort.clone())?);
        (client.ready, client.quiet, client.restart_at, client.heard) = (false, false, None, Instant::now());
        Ok(())
    }

    /// Waits until some client sends a message, for at most `patience`, and collects all messages, in each client's order.
    pub(crate) fn listen(&mut self, patience: Duration, said: &mut Vec<Said>) -> anyhow::Result<()> {
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
