//! Checks that are counted instead of panicking: with a rule broken some must fail, without one none may.

use super::BREAK;
use crate::wait::{Looks, SLACK, took};
use core::fmt::{Debug, Display};
use std::time::Duration;

/// What has gone wrong so far.
pub struct Checks {
    violations: Vec<String>,
    /// How often a state is looked at before it counts as one that does not come.
    looks: u32,
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
        // Where a rule is broken a hang is what we wait for. Else `tests/watch` ends it.
        let looks = if std::env::var_os(BREAK).is_some() { 500 } else { u32::MAX };
        Checks { violations: Vec::new(), looks }
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
        let mut looks = Looks::default();
        loop {
            let now = value();
            if now == expected {
                return true;
            }
            let in_vain = format!("{what}: expected {expected:?}, it is {now:?}");
            if looks.count() == self.looks {
                self.violations.push(in_vain);
                return false;
            }
            looks.pause(&in_vain);
        }
    }

    /// A call that must come back at once, or by its own deadline.
    pub fn within<T>(&mut self, deadline: Duration, what: impl Display, call: impl FnOnce() -> T) -> T {
        let (result, took) = took(call);
        self.holds(
            took <= deadline + SLACK,
            format_args!("{what} took {took:?}, its deadline is {deadline:?}"),
        );
        result
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
