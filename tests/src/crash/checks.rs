//! Checks that are counted instead of panicking: with a rule broken some must fail, without one none may.

use super::BREAK;
use crate::wait::{LIMIT, SLACK};
use core::fmt::{Debug, Display};
use std::time::{Duration, Instant};

/// What has gone wrong so far.
pub struct Checks {
    violations: Vec<String>,
    /// How long a state is waited for.
    patience: Duration,
}

impl Default for Checks {
    fn default() -> Self {
        Checks::new()
    }
}

impl Checks {
    /// Nothing has gone wrong yet.
    #[must_use]
    pub fn new() -> Checks {
        // Where a rule is broken a hang is what we wait for.
        let patience = if std::env::var_os(BREAK).is_some() { Duration::from_secs(4) } else { LIMIT };
        Checks { violations: Vec::new(), patience }
    }

    /// Something that must be so.
    pub fn holds(&mut self, holds: bool, otherwise: impl Display) {
        if !holds {
            self.violations.push(otherwise.to_string());
        }
    }

    /// Two things that must be the same.
    pub fn same<T: PartialEq + Debug>(&mut self, what: impl Display, expected: T, found: T) {
        if expected != found {
            self.violations.push(format!("{what}: expected {expected:?}, found {found:?}"));
        }
    }

    /// Something that must come to be so. True where it did.
    pub fn becomes<T: PartialEq + Debug>(
        &mut self,
        what: impl Display,
        expected: T,
        mut value: impl FnMut() -> T,
    ) -> bool {
        let began = Instant::now();
        loop {
            let now = value();
            if now == expected {
                return true;
            }
            if began.elapsed() > self.patience {
                let patience = self.patience;
                self.violations
                    .push(format!("{what}: expected {expected:?}, after {patience:?} it is {now:?}"));
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// A call that must come back at once, or by its own deadline.
    pub fn within<T>(&mut self, deadline: Duration, what: impl Display, call: impl FnOnce() -> T) -> T {
        let began = Instant::now();
        let result = call();
        let took = began.elapsed();
        self.holds(
            took <= deadline + SLACK,
            format_args!("{what} took {took:?}, its deadline is {deadline:?}"),
        );
        result
    }

    /// How long a state is waited for.
    #[must_use]
    pub fn patience(&self) -> Duration {
        self.patience
    }

    /// Has anything gone wrong?
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.violations.is_empty()
    }

    /// All that has gone wrong.
    #[must_use]
    pub fn finish(self) -> Vec<String> {
        self.violations
    }
}
