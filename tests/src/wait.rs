//! Waiting by state. The limits are so generous that only a hang reaches them.

use std::time::{Duration, Instant};

/// How long anything may take on a machine that is busy with other things.
pub const LIMIT: Duration = Duration::from_secs(40);
/// What a call may take beyond its own deadline.
pub const SLACK: Duration = Duration::from_secs(2);

/// Waits until `state` says so.
///
/// # Panics
/// When it has not within [`LIMIT`].
pub fn eventually(what: &str, mut state: impl FnMut() -> bool) {
    let began = Instant::now();
    while !state() {
        assert!(began.elapsed() < LIMIT, "waited {LIMIT:?} in vain until {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Waits until `value` is `expected`; the message of a failure names both.
///
/// # Panics
/// When it is not within [`LIMIT`].
pub fn becomes<T: PartialEq + core::fmt::Debug>(what: &str, expected: T, mut value: impl FnMut() -> T) {
    let began = Instant::now();
    loop {
        let now = value();
        if now == expected {
            return;
        }
        assert!(began.elapsed() < LIMIT, "{what}: expected {expected:?}, after {LIMIT:?} it is {now:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A call that must come back by its own deadline, give or take [`SLACK`].
///
/// # Panics
/// When it takes longer.
pub fn within<T>(deadline: Duration, what: &str, call: impl FnOnce() -> T) -> T {
    let began = Instant::now();
    let result = call();
    let took = began.elapsed();
    assert!(took <= deadline + SLACK, "{what} took {took:?}, its deadline is {deadline:?}");
    result
}
