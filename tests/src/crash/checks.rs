//! Checks that record violations instead of panicking: with a rule broken some must fail, without one none may.

use super::BREAK;
use crate::wait::{SLACK, becomes_in, took};
use core::fmt::{Debug, Display};
use std::time::Duration;

/// The violations so far.
pub struct Checks {
    violations: Vec<String>,
    /// How often a state is looked at before it counts as one that never comes.
    looks: u32,
}

impl Default for Checks {
    fn default() -> Self {
        Checks::new()
    }
}

impl Checks {
    /// Nothing has gone wrong yet.
    pub fn new() -> Checks {
        // Where a rule is broken a hang may be the violation. Elsewhere `tests/watch` ends what hangs.
        let looks = if std::env::var_os(BREAK).is_some() { 500 } else { u32::MAX };
        Checks { violations: Vec::new(), looks }
    }

    /// A condition that must hold.
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

    /// A value that must become the expected one. True where it did.
    pub fn becomes<T: PartialEq + Debug>(
        &mut self,
        what: impl Display,
        expected: T,
        value: impl FnMut() -> T,
    ) -> bool {
        let came = becomes_in(self.looks, what, expected, value);
        let is_so = came.is_ok();
        self.violations.extend(came.err());
        is_so
    }

    /// A call that must return by its own deadline.
    pub fn within<T>(&mut self, deadline: Duration, what: impl Display, call: impl FnOnce() -> T) -> T {
        let (result, took) = took(call);
        self.holds(
            took <= deadline + SLACK,
            format_args!("{what} took {took:?}, its deadline is {deadline:?}"),
        );
        result
    }

    /// Has anything gone wrong?
    pub fn is_clean(&self) -> bool {
        self.violations.is_empty()
    }

    /// All that has gone wrong.
    pub fn finish(self) -> Vec<String> {
        self.violations
    }
}
