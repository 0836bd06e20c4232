//! Running the binary, and what it leaves.

#![allow(dead_code, reason = "each test file uses its own part")]
#![allow(clippy::expect_used, reason = "a test fails where it cannot go on")]

use kvring_shm_abi::sync::{AtomicU32, Ordering};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStderr, Command, Output, Stdio};
use std::time::Duration;

/// A name that no other test has.
pub(crate) fn unique_name(tag: &str) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("t-cli-{tag}-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

/// The binary, without the environment's opinion on logs.
pub(crate) fn kvring(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvring"));
    command.args(arguments).env_remove("KVRING_LOG").stdin(Stdio::null());
    command
}

/// The same behind a command that ends in `exec "$@"`.
fn kvring_by(starter: &[&str], arguments: &[&str]) -> Command {
    let Some((program, before)) = starter.split_first() else { return kvring(arguments) };
    let mut command = Command::new(program);
    command.args(before).arg(env!("CARGO_BIN_EXE_kvring")).args(arguments);
    command.env_remove("KVRING_LOG").stdin(Stdio::null());
    command
}

/// What a command that has ended said.
pub(crate) struct Said {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Said {
    pub(crate) fn of(output: Output) -> Said {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("utf-8");
        Said { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }

    /// Standard output, which must be exactly one JSON object.
    pub(crate) fn json(&self) -> Value {
        let value = serde_json::from_str(&self.stdout);
        value.unwrap_or_else(|error| panic!("{error} in {:?}; stderr: {}", self.stdout, self.stderr))
    }
}

/// Runs a command to its end.
pub(crate) fn run(arguments: &[&str]) -> Said {
    Said::of(kvring(arguments).output().expect("the binary runs"))
}

/// The names in /dev/shm that begin with `prefix`.
pub(crate) fn segments(prefix: &str) -> Vec<String> {
    let entries = std::fs::read_dir("/dev/shm").expect("/dev/shm");
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| name.starts_with(prefix)).collect()
}

/// Waits for something that must happen. No test depends on how fast something is: `tests/watch` ends a hang.
pub(crate) fn eventually(what: &str, mut happened: impl FnMut() -> bool) {
    for looks in 1_u64.. {
        if happened() {
            return;
        }
        if looks.is_multiple_of(1000) {
            // Past what captures a test's output.
            let _ = writeln!(std::io::stderr(), "still waiting, after {looks} looks: {what}");
        }
        std::thread::sleep(Duration::from_millis((5 + looks / 50).min(100)));
    }
}

/// A process of the binary's, killed when dropped.
pub(crate) struct Running {
    child: Child,
    pub(crate) name: String,
}

impl Running {
    /// Starts a command whose standard output and error are kept.
    pub(crate) fn start(name: &str, arguments: &[&str]) -> Running {
        let child =
            kvring(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
        Running { child, name: name.to_owned() }
    }

    /// Starts an engine and waits until it serves.
    pub(crate) fn serve(tag: &str) -> Running {
        Running::serve_to(tag, Stdio::piped())
    }

    /// The same, with another standard error.
    pub(crate) fn serve_to(tag: &str, stderr: Stdio) -> Running {
        Running::serve_as(&unique_name(tag), &[], &[], stderr)
    }

    /// The same behind a command that ends in `exec "$@"`.
    pub(crate) fn serve_by(tag: &str, starter: &[&str]) -> Running {
        Running::serve_as(&unique_name(tag), starter, &[], Stdio::piped())
    }

    /// The same under a given name, with further arguments.
    pub(crate) fn serve_as(name: &str, starter: &[&str], further: &[&str], stderr: Stdio) -> Running {
        let name = name.to_owned();
        let arguments = ["serve", "--name", &name, "--arena", "8MiB"];
        let child = kvring_by(starter, &[&arguments, further].concat())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .expect("it starts");
        let mut engine = Running { child, name };
        let mut line = String::new();
        BufReader::new(engine.child.stdout.as_mut().expect("stdout")).read_line(&mut line).expect("a line");
        assert_eq!(line, "serving\n");
        engine
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).expect("our own child");
    }

    /// Waits for its end; its exit code.
    pub(crate) fn wait(&mut self) -> Option<i32> {
        let mut status = None;
        eventually("the process ends", || {
            status = self.child.try_wait().expect("our own child");
            status.is_some()
        });
        status.and_then(|status| status.code())
    }

    /// Its standard error: dropping it closes it.
    pub(crate) fn take_stderr(&mut self) -> ChildStderr {
        self.child.stderr.take().expect("once")
    }

    /// The rest of its standard error, to its end.
    pub(crate) fn stderr(&mut self) -> String {
        let mut text = String::new();
        self.take_stderr().read_to_string(&mut text).expect("utf-8");
        text
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // What a failed test leaves behind must not fail the next one.
        let _ = run(&["remove", "--force", "--name", &self.name]);
    }
}
