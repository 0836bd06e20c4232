//! Waiting by state. Nothing here has a limit by the clock, which a slow machine would meet: `tests/watch` ends a test that
//! hangs, and the test has said by then what it waits for.

use core::fmt::{Debug, Display};
use std::io::Write;
use std::time::{Duration, Instant};

/// As good as for ever: the deadline of calls that are not to end by their deadline.
pub const LIMIT: Duration = Duration::from_secs(24 * 3600);
/// What a call may take beyond its own deadline, not counting time in which a thread was ready and had no core.
pub const SLACK: Duration = Duration::from_secs(2);

/// Looks at a state, which come seldomer the longer a wait takes: so a wait in vain uses no CPU, and `tests/watch` sees
/// that it stands still.
#[derive(Default)]
struct Looks(u32);

impl Looks {
    /// Waits until the next look. A wait that takes long is told on the real standard error, which is not captured.
    fn pause(&mut self, what: &dyn Display) {
        self.0 += 1;
        if self.0.is_multiple_of(1000) {
            let _ = writeln!(std::io::stderr(), "still waiting, after {} looks: {what}", self.0);
        }
        match self.0 {
            ..20 => std::thread::yield_now(),
            looks => std::thread::sleep(Duration::from_millis(u64::from(1 + looks / 50).min(100))),
        }
    }
}

/// Waits until `look` says something other than `None`, and gives that.
pub fn until<T>(what: impl Display, mut look: impl FnMut() -> Option<T>) -> T {
    let mut looks = Looks::default();
    loop {
        if let Some(found) = look() {
            return found;
        }
        looks.pause(&what);
    }
}

/// Waits until `state` says so.
pub fn eventually(what: &str, mut state: impl FnMut() -> bool) {
    until(what, || state().then_some(()));
}

/// Waits until `value` is `expected`. The message of a wait in vain names both.
pub fn becomes<T: PartialEq + Debug>(what: &str, expected: T, value: impl FnMut() -> T) {
    // A test does not live for so many looks.
    let _ = becomes_in(u32::MAX, what, expected, value);
}

/// The same with at most this many looks more than one. The error says what the value was at the last one.
pub fn becomes_in<T: PartialEq + Debug>(
    looks_max: u32,
    what: impl Display,
    expected: T,
    mut value: impl FnMut() -> T,
) -> Result<(), String> {
    let mut looks = Looks::default();
    loop {
        let now = value();
        if now == expected {
            return Ok(());
        }
        let in_vain = format!("{what}: expected {expected:?}, it is {now:?}");
        if looks.0 == looks_max {
            return Err(in_vain);
        }
        looks.pause(&in_vain);
    }
}

/// How long the threads of this process were ready and had no core, all of them together.
fn refused() -> Duration {
    let of_thread = |task: std::fs::DirEntry| {
        let told = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        told.split(' ').nth(1)?.parse::<u64>().ok()
    };
    let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    Duration::from_nanos(tasks.filter_map(of_thread).sum())
}

/// What a call gives, and what it took: without the time in which a thread of this process was ready and had no core.
pub fn took<T>(call: impl FnOnce() -> T) -> (T, Duration) {
    let (began, before) = (Instant::now(), refused());
    let result = call();
    let elapsed = began.elapsed();
    (result, elapsed.saturating_sub(refused().saturating_sub(before)))
}

/// A call that must come back by its own deadline, give or take [`SLACK`], and that depends on no other process.
pub fn within<T>(deadline: Duration, what: &str, call: impl FnOnce() -> T) -> T {
    let (result, took) = took(call);
    assert!(took <= deadline + SLACK, "{what} took {took:?}, its deadline is {deadline:?}");
    result
}
