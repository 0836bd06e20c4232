//! Other processes: none outlives this one, and none dies unexplained.

use crate::pipe::{Abort, Pipe};
use anyhow::{Context, anyhow, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How long a process may take to read a message that it is sent. Far above anything real: only a hang reaches it.
const SEND_MAX: Duration = Duration::from_secs(120);
/// How long a process may take to end after it was told to.
const END_MAX: Duration = Duration::from_secs(30);
/// How long we wait for the end of a process that has just closed its pipe.
const LAST_MOMENT: Duration = Duration::from_millis(500);

/// Makes this process end with its parent, however that ends: the kernel sends it SIGKILL then.
///
/// # Errors
/// The kernel refuses.
pub fn die_with_parent() -> anyhow::Result<()> {
    // If the parent has ended before this, the pipe to it is closed: that ends us as well.
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).context("prctl(PR_SET_PDEATHSIG)")
}

/// The state of a process or thread with this directory in `/proc`: R running, S asleep, T stopped, Z dead and not waited for.
/// `None` once it is gone.
#[must_use]
pub fn thread_state(task: &Path) -> Option<char> {
    state_in(&std::fs::read_to_string(task.join("stat")).ok()?)
}

/// The third field of a `stat` file. The second one is a name in brackets, which may contain anything.
fn state_in(stat: &str) -> Option<char> {
    stat.rsplit_once(") ")?.1.chars().next()
}

/// What becomes of the lines that a process writes to its standard error.
#[derive(Clone, Copy, Debug)]
pub enum Stderr {
    /// They go where ours go.
    Inherited,
    /// Each is handed to this function, with the name of the process before it.
    Shown(fn(&str)),
}

/// A process of ours, killed when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    /// Hands on what it writes to its standard error.
    shows: Option<JoinHandle<()>>,
}

impl Process {
    /// Starts a process in a process group of its own: Ctrl-C is for us alone, who then end everything in order.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(name: String, mut command: Command, stderr: Stderr) -> anyhow::Result<Process> {
        command.process_group(0);
        if let Stderr::Shown(_) = stderr {
            command.stderr(Stdio::piped());
        }
        let child = command.spawn().with_context(|| format!("cannot start {name}"))?;
        let mut process = Process { name, child, shows: None };
        if let (Stderr::Shown(show), Some(lines)) = (stderr, process.child.stderr.take()) {
            let name = process.name.clone();
            let read = move || {
                let lines = BufReader::new(lines).lines().map_while(Result::ok);
                lines.for_each(|line| show(&format!("{name}: {line}")));
            };
            let thread = thread::Builder::new().name("kvring-stderr".to_owned()).spawn(read);
            process.shows = Some(thread.context("cannot start a thread")?);
        }
        Ok(process)
    }

    /// Its name, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The process, for its pipes.
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

    /// Adds to an error the name of the process, and how it has ended. All that it has written has been shown then.
    #[must_use]
    pub fn explain(&mut self, error: anyhow::Error) -> anyhow::Error {
        let ended = self.wait(LAST_MOMENT);
        // Its last lines come before the error.
        let until = Instant::now() + LAST_MOMENT;
        while self.shows.as_ref().is_some_and(|shows| !shows.is_finished()) && Instant::now() < until {
            thread::sleep(Duration::from_millis(2));
        }
        match ended {
            Some(status) => error.context(format!("{} has ended ({status})", self.name)),
            None => error.context(format!("{} still runs", self.name)),
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

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
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

    /// Tells it to end, and waits until it has ended.
    ///
    /// # Errors
    /// It fails, or does not end in time.
    pub fn finish(mut self) -> anyhow::Result<()> {
        self.pipe = None;
        self.process.succeed()
    }
}

#[cfg(test)]
mod tests {
    use super::state_in;

    #[test]
    fn a_name_with_brackets_does_not_hide_the_state() {
        assert_eq!(state_in("12 (kvring) S 1 12"), Some('S'));
        assert_eq!(state_in("12 (a) R (b) T 1 12"), Some('T'));
        assert_eq!(state_in("12"), None);
    }
}
