//! One client's process, as the coordinator sees it.

use super::Said;
use crate::instances::message::{FromClient, Tally, Who};
use crate::instances::{HANG_AFTER, JOB_MAX};
use anyhow::{Context, anyhow, bail};
use kvring_rig::child::Peer;
use std::time::{Duration, Instant};

/// One client.
pub(super) struct Client {
    pub(super) who: Who,
    /// Counts up.
    pub(super) life: u32,
    pub(super) peer: Option<Peer>,
    pub(super) ready: bool,
    pub(super) quiet: bool,
    pub(super) stopped_until: Option<Instant>,
    pub(super) restart_at: Option<Instant>,
    /// When it was told to end.
    pub(super) ending: Option<Instant>,
    /// Its last word, or when it could speak again.
    pub(super) heard: Instant,
    /// Wrong bytes that its loads brought.
    pub(super) wrong_bytes: u64,
}

impl Client {
    /// Without a process.
    pub(super) fn gone(&mut self, restart_at: Option<Instant>) {
        self.peer = None;
        (self.ready, self.quiet) = (false, false);
        (self.stopped_until, self.ending, self.restart_at) = (None, None, restart_at);
    }

    pub(super) fn hear(
        &mut self,
        tally: &mut Tally,
        said: &mut Vec<Said>,
        limit: Duration,
    ) -> anyhow::Result<()> {
        let who = self.who;
        let Some(peer) = &mut self.peer else { return Ok(()) };
        let name = peer.name().to_owned();
        let Some(pipe) = peer.pipe() else { return Ok(()) };
        self.heard = Instant::now();
        let (messages, open) = pipe.drain::<FromClient>(Duration::ZERO).context(name)?;
        for message in messages {
            match (message, who) {
                (FromClient::Ready, _) => {
                    self.ready = true;
                    said.push(Said::Ready(who));
                }
                (FromClient::Quiet, _) => self.quiet = true,
                (FromClient::Beat(beat), _) => {
                    let oldest = Duration::from_millis(beat.oldest_job_ms);
                    self.wrong_bytes += beat.wrong_bytes;
                    tally.add(beat);
                    if oldest > JOB_MAX + limit {
                        said.push(Said::Hangs(who, format!("a job has been open for {oldest:?}")));
                    }
                }
                (FromClient::Scheduler(message), Who::Scheduler { instance }) => {
                    said.push(Said::Scheduler(instance, message));
                }
                (FromClient::Reply(reply), Who::Worker { instance, rank }) => {
                    said.push(Said::Reply(instance, rank, reply));
                }
                (message, who) => bail!("{who}: expected what it can say, got {message:?}"),
            }
        }
        if !open {
            self.ended(said);
        }
        Ok(())
    }

    /// It has closed its pipe.
    fn ended(&mut self, said: &mut Vec<Said>) {
        let Some(mut peer) = self.peer.take() else { return };
        let in_order = self.ending.is_some() && peer.process().succeed().is_ok();
        let restart_at = if in_order { self.restart_at } else { Some(Instant::now()) };
        let last_words = (!in_order).then(|| {
            let error = peer.process().explain(anyhow!("nobody had killed it"));
            format!("{error:#}")
        });
        drop(peer);
        self.gone(restart_at);
        said.push(Said::Ended(self.who, last_words));
    }

    pub(super) fn judge_silence(&mut self, limit: Duration, said: &mut Vec<Said>) {
        let silent = self.heard.elapsed();
        if self.peer.is_some() && self.stopped_until.is_none() && silent > HANG_AFTER + limit {
            said.push(Said::Hangs(self.who, format!("it has said nothing for {silent:?}")));
        }
    }
}
