//! The other processes of a run: this executable again. None outlives us, and none dies unexplained.

use super::pipe::{Abort, Pipe};
use crate::console::{self, LOG_ENV, LogChoice};
use anyhow::{Context, anyhow, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::VecDeque;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// The longest that one load or store of a worker may take. Far above anything real: only a hang reaches it.
pub(crate) const STEP_MAX: Duration = Duration::from_secs(120);
/// The longest that a scheduler waits for a worker: somewhat more, so that who hangs is told by who is nearest.
pub(crate) const REPLY_MAX: Duration = Duration::from_secs(150);
/// The longest that the coordinator waits for a scheduler: a load and a store.
pub(crate) const REQUEST_MAX: Duration = Duration::from_secs(330);
/// How long a process may take to end after it was told to.
const END_MAX: Duration = Duration::from_secs(30);
/// How long we wait for what a failed process still has to say.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// Lines of stderr that are kept.
const TAIL_LINES: usize = 12;

/// In a child: ends with its parent, however that ends.
pub(crate) fn die_with_parent() -> anyhow::Result<()> {
    // If the parent has ended before this, the pipe to it is closed: that ends us as well.
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).context("prctl(PR_SET_PDEATHSIG)")
}

/// What becomes of a process's stderr.
pub(crate) enum Stderr<'a> {
    /// Ours: our parent reads it.
    Ours,
    /// Its end is kept, and shown if the process fails; all of it is shown if the user asked for logs.
    Kept(&'a LogChoice),
}

/// A process of ours, killed when dropped.
pub(crate) struct Process {
    name: String,
    child: Child,
    tail: Option<Tail>,
}

impl Process {
    /// Starts this executable with these arguments; standard input and output as the caller sets them up.
    pub(crate) fn start(
        name: String,
        stderr: &Stderr<'_>,
        set_up: impl FnOnce(&mut Command) -> &mut Command,
    ) -> anyhow::Result<Process> {
        let program = std::env::current_exe().context("this executable's path")?;
        let mut command = Command::new(program);
        set_up(&mut command);
        // A group of its own: Ctrl-C is for us, who then end everything in order.
        command.process_group(0);
        let mut shown = false;
        if let Stderr::Kept(log) = stderr {
            command.stderr(Stdio::piped());
            if let Some(asked) = log.asked() {
                command.env(LOG_ENV, asked);
                shown = true;
            }
        }
        let mut child = command.spawn().with_context(|| format!("cannot start {name}"))?;
        let tail = child.stderr.take().map(|stderr| Tail::read(&name, stderr, shown));
        Ok(Process { name, child, tail })
    }

    /// For messages.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The process, for its pipes and its id.
    pub(crate) fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Sends it a signal; that it has ended is fine.
    pub(crate) fn signal(&mut self, signal: Signal) {
        // It is our child: as long as it has not been waited for, the id is its own.
        if self.ended().is_none()
            && let Ok(pid) = i32::try_from(self.child.id())
        {
            let _ = kill(Pid::from_raw(pid), signal);
        }
    }

    /// Has it ended?
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Waits for its end, at most `timeout`.
    pub(crate) fn wait(&mut self, timeout: Duration) -> Option<ExitStatus> {
        let until = Instant::now() + timeout;
        loop {
            match self.ended() {
                None if Instant::now() < until => thread::sleep(Duration::from_millis(2)),
                status => return status,
            }
        }
    }

    /// Waits for its end; anything but success in time is an error.
    pub(crate) fn succeed(&mut self) -> anyhow::Result<()> {
        match self.wait(END_MAX) {
            Some(status) if status.success() => Ok(()),
            Some(_) => Err(self.explain(anyhow!("it failed at its end"))),
            None => Err(self.explain(anyhow!("it did not end within {} s", END_MAX.as_secs()))),
        }
    }

    /// The end of what it said, if that has not been shown.
    pub(crate) fn last_words(&self) -> Vec<String> {
        self.tail.as_ref().map(Tail::last_words).unwrap_or_default()
    }

    /// Adds to an error who it was, how it ended, and what it said last.
    pub(crate) fn explain(&mut self, error: anyhow::Error) -> anyhow::Error {
        let fate = match self.wait(LAST_WORDS) {
            Some(status) => format!("{} has ended ({status})", self.name),
            None => format!("{} still runs", self.name),
        };
        let said = self.last_words();
        if said.is_empty() {
            error.context(fate)
        } else {
            error.context(format!("{fate}; it said last:\n  {}\n", said.join("\n  ")))
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // One that has ended already cannot be killed; that is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The last lines of a process's stderr.
struct Tail {
    lines: Arc<Mutex<VecDeque<String>>>,
    reader: Option<JoinHandle<()>>,
}

impl Tail {
    fn read(name: &str, stderr: ChildStderr, shown: bool) -> Tail {
        let lines = Arc::new(Mutex::new(VecDeque::with_capacity(TAIL_LINES)));
        let (kept, name) = (lines.clone(), name.to_owned());
        let read = move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                if shown {
                    console::say(&format!("{name}: {line}"));
                    continue;
                }
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                if kept.len() == TAIL_LINES {
                    kept.pop_front();
                }
                kept.push_back(line);
            }
        };
        let reader = thread::Builder::new().name("kvring-stderr".to_owned()).spawn(read).ok();
        Tail { lines, reader }
    }

    /// What was said, once the process and its children have closed their end, or after a moment.
    fn last_words(&self) -> Vec<String> {
        let until = Instant::now() + LAST_WORDS;
        while self.reader.as_ref().is_some_and(|reader| !reader.is_finished()) && Instant::now() < until {
            thread::sleep(Duration::from_millis(2));
        }
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }
}

/// A process that we talk to.
pub(crate) struct Peer {
    process: Process,
    /// `None` once it was told to end.
    pipe: Option<Pipe>,
}

impl Peer {
    /// Starts `kvring SUBCOMMAND`, with pipes to it.
    pub(crate) fn start(
        name: String,
        subcommand: &str,
        stderr: &Stderr<'_>,
        abort: Abort,
    ) -> anyhow::Result<Peer> {
        let mut process = Process::start(name, stderr, |command| {
            command.arg(subcommand).stdin(Stdio::piped()).stdout(Stdio::piped())
        })?;
        let child = process.child();
        let (Some(input), Some(output)) = (child.stdout.take(), child.stdin.take()) else {
            bail!("{}: no pipes", process.name());
        };
        Ok(Peer { process, pipe: Some(Pipe::new(input.into(), output.into(), abort)) })
    }

    /// For messages.
    pub(crate) fn name(&self) -> &str {
        self.process.name()
    }

    /// Its process.
    pub(crate) fn pid(&mut self) -> u32 {
        self.process.child().id()
    }

    /// Tells it something.
    pub(crate) fn send(&mut self, message: &impl Serialize) -> anyhow::Result<()> {
        let Some(pipe) = &mut self.pipe else { bail!("{} was told to end", self.process.name()) };
        let sent = pipe.send(message, Instant::now() + STEP_MAX);
        sent.map_err(|error| self.process.explain(error))
    }

    /// Its next message.
    pub(crate) fn receive<T: DeserializeOwned>(&mut self, timeout: Duration) -> anyhow::Result<T> {
        let Some(pipe) = &mut self.pipe else { bail!("{} was told to end", self.process.name()) };
        match pipe.receive(Some(Instant::now() + timeout)) {
            Ok(Some(message)) => Ok(message),
            Ok(None) => Err(self.process.explain(anyhow!("it closed its pipe"))),
            Err(error) => Err(self.process.explain(error)),
        }
    }

    /// Its process.
    pub(crate) fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// The pipes to it, until it was told to end.
    pub(crate) fn pipe(&mut self) -> Option<&mut Pipe> {
        self.pipe.as_mut()
    }

    /// Tells it to end.
    pub(crate) fn close(&mut self) {
        self.pipe = None;
    }

    /// Tells it to end, and waits until it has, well. Answers what it said last, if that has not been shown.
    pub(crate) fn finish(mut self) -> anyhow::Result<Vec<String>> {
        self.close();
        self.process.succeed()?;
        Ok(self.process.last_words())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_kept() {
        let mut child = Command::new("sh")
            .args(["-c", "for i in $(seq 30); do echo line $i >&2; done"])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let tail = Tail::read("sh", child.stderr.take().unwrap(), false);
        assert!(child.wait().unwrap().success());
        let words = tail.last_words();
        assert_eq!((words.len(), words[0].as_str(), words[11].as_str()), (12, "line 19", "line 30"));
    }
}
