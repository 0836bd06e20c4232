//! One client's process, as the coordinator sees it.

use super::Said;
use crate::chaos::message::{FromScheduler, FromWorker, Tally};
use crate::chaos::plan::Who;
use crate::chaos::{HANG_AFTER, JOB_MAX};
use anyhow::{Context, anyhow};
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
        let open = match who {
            Who::Scheduler { instance } => {
                let (messages, open) = pipe.drain::<FromScheduler>(Duration::ZERO).context(name)?;
                for message in messages {
                    match message {
                        FromScheduler::Ready => self.ready = true,
                        FromScheduler::Quiet => self.quiet = true,
                        FromScheduler::Beat(beat) => {
                            tally.add(beat);
                            continue;
                        }
                        _ => {}
                    }
                    said.push(Said::Scheduler(instance, message));
                }
                open
            }
            Who::Worker { instance, rank } => {
                let (messages, open) = pipe.drain::<FromWorker>(Duration::ZERO).context(name)?;
                for message in messages {
                    match message {
                        FromWorker::Ready => self.ready = true,
                        FromWorker::Quiet => self.quiet = true,
                        FromWorker::Beat(beat) => {
                            let oldest = Duration::from_millis(beat.oldest_job_ms);
                            tally.add(beat);
                            if oldest > JOB_MAX + limit {
                                said.push(Said::Hangs(who, format!("a job has been open for {oldest:?}")));
                            }
                            continue;
                        }
                        _ => {}
                    }
                    said.push(Said::Worker(instance, rank, message));
                }
                open
            }
        };
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
