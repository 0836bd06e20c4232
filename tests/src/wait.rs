//! Waiting by state. Nothing here has a limit by the clock, which a slow machine would meet: what hangs is ended by
//! `tests/watch`, and has said by then what it waits for.

use std::io::Write;
use std::time::{Duration, Instant};

/// As good as for ever: the deadline of whatever is not to end by its deadline.
pub const LIMIT: Duration = Duration::from_secs(24 * 3600);
/// What a call may take beyond its own deadline, not counting time in which a thread was ready and had no core.
pub const SLACK: Duration = Duration::from_secs(2);

/// Looks that come seldomer the longer one has waited: a wait in vain stands still, as `tests/watch` sees it.
#[derive(Default)]
pub struct Looks(u32);

impl Looks {
    /// So many there were.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.0
    }

    /// Until the next look. A wait that takes long is told, past what captures a test's output.
    pub fn pause(&mut self, what: &dyn core::fmt::Display) {
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
pub fn until<T>(what: impl core::fmt::Display, mut look: impl FnMut() -> Option<T>) -> T {
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

/// Waits until `value` is `expected`; what is told of a wait in vain names both.
pub fn becomes<T: PartialEq + core::fmt::Debug>(what: &str, expected: T, mut value: impl FnMut() -> T) {
    let mut looks = Looks::default();
    loop {
        let now = value();
        if now == expected {
            return;
        }
        looks.pause(&format_args!("{what}: expected {expected:?}, it is {now:?}"));
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

/// A call that must come back by its own deadline, give or take [`SLACK`]. It waits for nobody but this process.
///
/// # Panics
/// When it takes longer.
pub fn within<T>(deadline: Duration, what: &str, call: impl FnOnce() -> T) -> T {
    let (result, took) = took(call);
    assert!(took <= deadline + SLACK, "{what} took {took:?}, its deadline is {deadline:?}");
    result
}
