//! Clears, and how a scheduler comes to rest: everything is looked up and loaded once more.

use super::turns::AT_ONCE;
use super::{Mode, Scheduler};
use crate::chaos::{INSTANCES, Turn};
use crate::instances::message::{DRAIN, FromClient, FromScheduler, OPERATION};
use crate::instances::requests::Request;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// How often a clear, a last lookup, or a last word to the engine is tried again.
const RETRY: Duration = Duration::from_millis(20);
/// How often a last lookup is tried before it counts as not answered.
const RETRIES: u32 = 80;

impl Scheduler {
    /// Asks until the answer is yes. The engine may still do a clear that has timed out, and must not do it after we have said that
    /// the clear is done.
    pub(super) fn clear(&mut self) -> anyhow::Result<()> {
        if self.clear_at.is_some_and(|at| at <= Instant::now()) {
            let adapter = &mut self.adapter;
            let cleared = self.watch.call("reset_cache", OPERATION, || adapter.reset_cache());
            self.clear_at = if cleared.is_ok() { None } else { Some(Instant::now() + RETRY) };
            if cleared.is_ok() {
                self.say(FromScheduler::Cleared)?;
            }
        }
        Ok(())
    }

    /// Looks everything up once more, loads it, and comes to rest.
    pub(super) fn finish(&mut self) -> anyhow::Result<()> {
        let busy = self.requests.len();
        let (phase, made, instance) = (self.phase, self.made, self.start.who.instance());
        let calm = self.start.is_calm();
        let Mode::Finishing(left) = &mut self.mode else { return Ok(()) };
        let Some(left) = left else {
            if busy == 0 && calm {
                *left = Some(VecDeque::new());
            } else if busy == 0 {
                let mine = |turn: &Turn| turn.conversation % INSTANCES == instance;
                // The other instance may have got further.
                *left = Some(Turn::all(phase, made * 2 + 64).filter(mine).collect());
            }
            return Ok(());
        };
        if busy >= AT_ONCE {
            return Ok(());
        }
        if let Some(turn) = left.pop_front() {
            return self.audit(turn);
        }
        if busy == 0 && Instant::now() >= self.next_at {
            self.next_at = Instant::now() + RETRY;
            let client = &self.client;
            if self.watch.call("noop", OPERATION, || client.noop()).is_ok() {
                self.mode = Mode::Idle;
                let tally = self.take_tally();
                self.tell(&FromClient::Beat(tally))?;
                self.tell(&FromClient::Quiet)?;
            }
        }
        Ok(())
    }

    fn audit(&mut self, turn: Turn) -> anyhow::Result<()> {
        let job = self.next_job();
        for admission in 0..RETRIES {
            let keys = turn.keys(self.seed);
            let (found, answered) = self.look_up(job, admission, &keys, Some(turn))?;
            if answered {
                let mut request = Request::new(job, Some(turn), keys, found);
                request.audit = true;
                return self.begin(request, admission);
            }
            std::thread::sleep(RETRY);
        }
        self.end_session(job);
        Ok(())
    }

    pub(super) fn end(&mut self) -> anyhow::Result<()> {
        let adapter = &mut self.adapter;
        self.watch.call("shutdown", DRAIN, || adapter.shutdown());
        let tally = self.take_tally();
        self.tell(&FromClient::Beat(tally))
    }
}
