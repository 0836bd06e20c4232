//! Other processes: none outlives this one, and none dies unexplained.

use crate::pipe::{Abort, Pipe};
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

/// How long a process may take to read a message that it is sent. Far above anything real: only a hang reaches it.
const SEND_MAX: Duration = Duration::from_secs(120);
/// How long a process may take to end after it was told to.
const END_MAX: Duration = Duration::from_secs(30);
/// How long we wait for the last lines of a process that has failed.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// How many lines of its standard error are kept.
const TAIL_LINES: usize = 12;

/// Makes this process end with its parent, however that ends: the kernel sends it SIGKILL then.
///
/// # Errors
/// The kernel refuses.
pub fn die_with_parent() -> anyhow::Result<()> {
    // If the parent has ended before this, the pipe to it is closed: that ends us as well.
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).context("prctl(PR_SET_PDEATHSIG)")
}

/// What becomes of the lines that a process writes to its standard error.
#[derive(Clone, Copy, Debug)]
pub enum Stderr {
    /// They go where ours go.
    Inherited,
    /// The last ones are kept, and are a part of the error if the process fails.
    Kept,
    /// Each is handed to this function, with the name of the process before it.
    Shown(fn(&str)),
}

/// A process of ours, killed when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    tail: Option<Tail>,
}

impl Process {
    /// Starts a process in a process group of its own: Ctrl-C is for us alone, who then end everything in order.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(name: String, mut command: Command, stderr: Stderr) -> anyhow::Result<Process> {
        command.process_group(0);
        if !matches!(stderr, Stderr::Inherited) {
            command.stderr(Stdio::piped());
        }
        let mut child = command.spawn().with_context(|| format!("cannot start {name}"))?;
        let show = if let Stderr::Shown(show) = stderr { Some(show) } else { None };
        let tail = child.stderr.take().map(|stderr| Tail::read(&name, stderr, show));
        Ok(Process { name, child, tail })
    }

    /// Its name, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The process, for its pipes and its id.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Sends it a signal, unless it has ended.
    pub fn signal(&mut self, signal: Signal) {
        // It is our child: as long as it has not been waited for, the id is its own.
        if self.ended().is_none()
            && let Ok(pid) = i32::try_from(self.child.id())
        {
            let _ = kill(Pid::from_raw(pid), signal);
        }
    }

    /// How it has ended; `None` while it runs.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Waits for its end, for at most `timeout`.
    pub fn wait(&mut self, timeout: Duration) -> Option<ExitStatus> {
        let until = Instant::now() + timeout;
        loop {
            match self.ended() {
                None if Instant::now() < until => thread::sleep(Duration::from_millis(2)),
                status => return status,
            }
        }
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It fails, or does not end in time.
    pub fn succeed(&mut self) -> anyhow::Result<()> {
        match self.wait(END_MAX) {
            Some(status) if status.success() => Ok(()),
            Some(_) => Err(self.explain(anyhow!("it failed at its end"))),
            None => Err(self.explain(anyhow!("it did not end within {} s", END_MAX.as_secs()))),
        }
    }

    /// The last lines that it wrote to its standard error, where they are kept.
    pub fn last_words(&self) -> Vec<String> {
        self.tail.as_ref().map(Tail::last_words).unwrap_or_default()
    }

    /// Adds to an error the name of the process, how it has ended, and its last lines.
    #[must_use]
    pub fn explain(&mut self, error: anyhow::Error) -> anyhow::Error {
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

/// The last lines of a process's standard error.
#[derive(Debug)]
struct Tail {
    lines: Arc<Mutex<VecDeque<String>>>,
    reader: Option<JoinHandle<()>>,
}

impl Tail {
    fn read(name: &str, stderr: ChildStderr, show: Option<fn(&str)>) -> Tail {
        let lines = Arc::new(Mutex::new(VecDeque::with_capacity(TAIL_LINES)));
        let (kept, name) = (lines.clone(), name.to_owned());
        let read = move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                if let Some(show) = show {
                    show(&format!("{name}: {line}"));
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

    /// The lines that are kept, once the process and its children have closed their end, or after a moment.
    fn last_words(&self) -> Vec<String> {
        let until = Instant::now() + LAST_WORDS;
        while self.reader.as_ref().is_some_and(|reader| !reader.is_finished()) && Instant::now() < until {
            thread::sleep(Duration::from_millis(2));
        }
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }
}

/// A process that we exchange messages with, over its standard input and output.
#[derive(Debug)]
pub struct Peer {
    process: Process,
    /// `None` once it has been told to end.
    pipe: Option<Pipe>,
}

impl Peer {
    /// Starts it. A message to it, or from it, is given up when `abort` is called.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(name: String, mut command: Command, stderr: Stderr, abort: Abort) -> anyhow::Result<Peer> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = Process::start(name, command, stderr)?;
        let child = process.child();
        let (Some(input), Some(output)) = (child.stdout.take(), child.stdin.take()) else {
            bail!("{}: no pipes", process.name());
        };
        Ok(Peer { process, pipe: Some(Pipe::new(input.into(), output.into(), abort)) })
    }

    /// Its name, for messages.
    pub fn name(&self) -> &str {
        self.process.name()
    }

    /// Its process's id.
    pub fn pid(&mut self) -> u32 {
        self.process.child().id()
    }

    /// Sends it a message.
    ///
    /// # Errors
    /// It has ended, or does not read.
    pub fn send(&mut self, message: &impl Serialize) -> anyhow::Result<()> {
        let Some(pipe) = &mut self.pipe else { bail!("{} was told to end", self.process.name()) };
        let sent = pipe.send(message, Instant::now() + SEND_MAX);
        sent.map_err(|error| self.process.explain(error))
    }

    /// Its next message.
    ///
    /// # Errors
    /// It has ended, or says nothing for `timeout`.
    pub fn receive<T: DeserializeOwned>(&mut self, timeout: Duration) -> anyhow::Result<T> {
        let Some(pipe) = &mut self.pipe else { bail!("{} was told to end", self.process.name()) };
        match pipe.receive(Some(Instant::now() + timeout)) {
            Ok(Some(message)) => Ok(message),
            Ok(None) => Err(self.process.explain(anyhow!("it closed its pipe"))),
            Err(error) => Err(self.process.explain(error)),
        }
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// The pipes to it, until it has been told to end.
    pub fn pipe(&mut self) -> Option<&mut Pipe> {
        self.pipe.as_mut()
    }

    /// Tells it to end, by closing the pipes to it.
    pub fn close(&mut self) {
        self.pipe = None;
    }

    /// Tells it to end, and waits until it has ended. Returns its last lines, where they are kept.
    ///
    /// # Errors
    /// It fails, or does not end in time.
    pub fn finish(mut self) -> anyhow::Result<Vec<String>> {
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
        let tail = Tail::read("sh", child.stderr.take().unwrap(), None);
        assert!(child.wait().unwrap().success());
        let words = tail.last_words();
        assert_eq!((words.len(), words[0].as_str(), words[11].as_str()), (12, "line 19", "line 30"));
    }
}
