//! The other processes of a test: this package's own binary, which plays the part that its arguments name. A process is
//! killed when its guard is dropped, also by a panic.

use crate::wait::eventually;
use kvring_rig::child::thread_state;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, TryRecvError, channel};

/// A child process, with a pipe to it and the lines that it prints.
pub struct Process {
    child: Child,
    input: Option<ChildStdin>,
    /// Read by a thread, so that a child that hangs does not hang the test.
    pub lines: Receiver<String>,
}

/// The binary beside the test's own: Cargo builds it with the tests of this package.
fn binary() -> PathBuf {
    // target/<profile>/deps/<test> → target/<profile>/kvring-test-peer
    let exe = std::env::current_exe().expect("this test's own path");
    let candidates = exe.ancestors().skip(1).take(2).map(|dir| dir.join("kvring-test-peer"));
    candidates.into_iter().find(|path| path.is_file()).expect("kvring-test-peer beside the test binary")
}

impl Process {
    /// Starts the binary with these arguments, and with these variables added to its environment.
    pub fn start<'a>(
        arguments: &[&str],
        environment: impl IntoIterator<Item = (&'a str, &'a str)>,
        stderr: Stdio,
    ) -> Process {
        let mut child = Command::new(binary())
            .args(arguments)
            .envs(environment)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .expect("another process");
        let input = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().expect("its stdout"));
        let (line, lines) = channel();
        std::thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|text| line.send(text)));
        Process { child, input, lines }
    }

    /// Writes a line to its standard input. A child that has died reads it no more, which is no error.
    pub fn say(&mut self, line: &str) {
        let _ = self.input.as_mut().map(|input| writeln!(input, "{line}").and_then(|()| input.flush()));
    }

    /// Closes its standard input.
    pub fn hang_up(&mut self) {
        self.input = None;
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The directory of its main thread in `/proc`.
    pub fn task(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{0}/task/{0}", self.pid()))
    }

    /// Sends a signal. As long as nobody has waited for the child, its id is not another's.
    pub fn send(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).expect("a signal to our own child");
    }

    /// SIGSTOP, and waits until all its threads have stopped.
    pub fn stop(&self) {
        self.send(Signal::SIGSTOP);
        self.has_stopped();
    }

    /// Waits until all its threads have stopped, where a fail point stops it.
    pub fn has_stopped(&self) {
        let tasks = format!("/proc/{}/task", self.pid());
        eventually("every thread of a process has stopped", || {
            let tasks = std::fs::read_dir(&tasks).expect("the process's threads");
            tasks.flatten().all(|task| thread_state(&task.path()).is_none_or(|state| state == 'T'))
        });
    }

    /// Has it stopped?
    pub fn is_stopped(&self) -> bool {
        thread_state(&self.task()) == Some('T')
    }

    /// SIGCONT.
    pub fn resume(&self) {
        self.send(Signal::SIGCONT);
    }

    /// `kill -9`, and waits until it is gone. SIGKILL also ends a process that is stopped.
    pub fn kill(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("our own child")
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> ExitStatus {
        self.child.wait().expect("our own child")
    }

    /// How it ended, if it has closed its standard output or ended. One that has closed it is waited for.
    pub fn has_ended(&mut self) -> Option<ExitStatus> {
        if matches!(self.lines.try_recv(), Err(TryRecvError::Disconnected)) {
            return Some(self.wait());
        }
        self.ended()
    }

    /// Kills it, and gives back what it has written to its standard error, where that is a pipe.
    pub fn last_words(&mut self) -> String {
        self.kill();
        let mut said = String::new();
        let _ =
            self.child.stderr.take().map(|mut stderr| std::io::Read::read_to_string(&mut stderr, &mut said));
        said.trim().to_owned()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Makes a call on a thread of its own, and returns when that thread is in this state: `S`, it sleeps in the call, or `R`, it
/// spins.
pub fn in_a_call<T: Send + 'static>(
    state: char,
    call: impl FnOnce() -> T + Send + 'static,
) -> std::thread::JoinHandle<T> {
    let (tell, told) = channel();
    let thread = std::thread::spawn(move || {
        tell.send(nix::unistd::gettid()).expect("a test that waits for it");
        call()
    });
    let task = PathBuf::from(format!("/proc/self/task/{}", told.recv().expect("a thread")));
    eventually("a thread waits in its call", || thread_state(&task) == Some(state));
    thread
}
