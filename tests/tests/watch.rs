//! `tests/watch`, which ends tests that hang: every kind of hang is found, and nothing that is merely slow.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use std::path::Path;
use std::process::{Child, Command, Output};

const WATCH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/watch");

/// A Python program under `tests/watch`, with limits of a few seconds.
fn watched(limits: &[&str], program: &str) -> Output {
    Command::new(WATCH).args(limits).args(["python3", "-c", program]).output().unwrap()
}

/// It was killed, for this reason, and its report names the program.
fn is_ended(output: &Output, why: &str, program: &str) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains(why) && said.contains(program), "{output:?}");
}

#[test]
fn what_sleeps_for_ever_is_ended() {
    let program = "import threading as t; lock = t.Lock(); lock.acquire(); lock.acquire()";
    is_ended(&watched(&["--still", "2"], program), "stood still", program);
}

#[test]
fn what_spins_for_ever_is_ended() {
    let program = "while True: pass";
    is_ended(&watched(&["--own", "3"], program), "does not end", program);
}

/// A program that neither stands still nor spins.
#[test]
fn what_looks_again_and_again_for_ever_is_ended() {
    let program = "import time\nwhile True:\n  end = time.thread_time() + 0.01\n  while time.thread_time() < end: pass\n  time.sleep(0.01)";
    is_ended(&watched(&["--still", "3", "--own", "4"], program), "does not end", "time.sleep");
}

/// Descendants count: a child in a session of its own, and one whose parent is gone.
#[test]
fn what_waits_for_a_working_descendant_is_not_ended() {
    let program = "
import os, time
if (child := os.fork()) == 0:
    os.setsid()
    if os.fork() == 0:
        while time.process_time() < 4: pass
        open(os.environ['DONE'], 'w').close()
    os._exit(0)
os.waitpid(child, 0)
while not os.path.exists(os.environ['DONE']): time.sleep(0.1)
";
    let scratch = tempfile(program);
    let output = Command::new(WATCH)
        .args(["--still", "2", "python3", "-c", program])
        .env("DONE", &scratch)
        .output()
        .unwrap();
    std::fs::remove_file(&scratch).unwrap();
    assert!(output.status.success(), "{output:?}");
}

/// A path that nothing is at.
fn tempfile(tag: &str) -> std::path::PathBuf {
    std::env::temp_dir().join(format!("kvring-watch-{}-{}", std::process::id(), tag.len()))
}

/// Other processes that use the core as long as this lives.
struct Rivals(Vec<Child>);

impl Rivals {
    fn new(count: usize) -> Rivals {
        let program = format!("{ON_ONE_CORE}\nwhile True: pass");
        Rivals((0..count).map(|_| Command::new("python3").args(["-c", &program]).spawn().unwrap()).collect())
    }
}

impl Drop for Rivals {
    fn drop(&mut self) {
        for rival in &mut self.0 {
            let _ = rival.kill();
            let _ = rival.wait();
        }
    }
}

const ON_ONE_CORE: &str = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])";

/// A program that needs one second of CPU time, and gets it in the course of more seconds than either limit.
#[test]
fn what_has_no_core_is_not_ended() {
    let _rivals = Rivals::new(7);
    let program = format!(
        "{ON_ONE_CORE}\nimport time\nbegan = time.monotonic()\nwhile time.process_time() < 1: pass\nprint(time.monotonic() - began)"
    );
    let output = watched(&["--still", "3", "--own", "4"], &program);
    assert!(output.status.success(), "{output:?}");
    let took: f64 = String::from_utf8_lossy(&output.stdout).trim().parse().unwrap();
    assert!(took > 4.0, "it had the core, and this tests nothing: {took} s");
}

/// The command goes on and reports it. Its other children are not ended: one that works, and one that waits for a lock of the
/// first.
#[test]
fn of_several_tests_the_one_that_hangs_is_ended() {
    let program = "
import os, subprocess, sys, tempfile
path = tempfile.mktemp()
lock = f'import fcntl, time; file = open({path!r}, \"w\"); fcntl.flock(file, fcntl.LOCK_EX)'
tests = ['import time; time.sleep(1000)', f'{lock}\\nwhile time.process_time() < 6: pass', lock]
running = [subprocess.Popen([sys.executable, '-c', test]) for test in tests]
print([test.wait() for test in running])
os.unlink(path)
";
    let output = watched(&["--each", "--still", "3"], program);
    is_ended(&output, "stood still", "time.sleep(1000)");
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "[-6, 0, 0]");
}

#[test]
fn what_ends_is_what_ended() {
    assert!(Path::new(WATCH).is_file());
    for code in [0, 7] {
        let output = watched(&[], &format!("import sys; print('told'); sys.exit({code})"));
        assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(code), &b"told\n"[..]));
        assert!(output.stderr.is_empty());
    }
    let killed = watched(&[], "import os; os.kill(os.getpid(), 9)");
    assert_eq!(killed.status.code(), Some(128 + 9));
}
