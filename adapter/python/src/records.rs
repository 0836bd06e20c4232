//! The queue between who logs and who forwards: bounded, and nobody who puts something in waits.

use core::fmt::Write;
use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Records kept for a reader that does not come; the oldest goes first.
pub(crate) const RECORDS_MAX: usize = 4096;

/// `logging` level, logger, text.
pub(crate) type Record = (i32, String, String);

#[derive(Default)]
struct State {
    records: VecDeque<Record>,
    dropped: u64,
    closed: bool,
}

#[derive(Default)]
pub(crate) struct Records {
    state: Mutex<State>,
    /// A record, or the end.
    news: Condvar,
}

impl Records {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a record; after the end it goes nowhere.
    pub(crate) fn push(&self, record: Record) {
        let mut state = self.state();
        if state.closed {
            return;
        }
        if state.records.len() >= RECORDS_MAX {
            state.records.pop_front();
            state.dropped += 1;
        }
        state.records.push_back(record);
        drop(state);
        self.news.notify_one();
    }

    /// What there is; waits for the first one, at most `timeout`. What was dropped before is said in the first.
    pub(crate) fn take(&self, timeout: Duration) -> Vec<Record> {
        let empty = |state: &mut State| state.records.is_empty() && !state.closed;
        let waited = self.news.wait_timeout_while(self.state(), timeout, empty);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let mut records: Vec<Record> = state.records.drain(..).collect();
        let dropped = core::mem::take(&mut state.dropped);
        if let Some((_, _, text)) = records.first_mut()
            && dropped > 0
        {
            // Writing to a string does not fail.
            let _ = write!(text, " ({dropped} earlier log records were dropped)");
        }
        records
    }

    /// No more records; nobody waits any more.
    pub(crate) fn close(&self) {
        self.state().closed = true;
        self.news.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn record(text: &str) -> Record {
        (20, "kvring".to_owned(), text.to_owned())
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn the_oldest_are_dropped_and_counted() {
        let records = Records::default();
        assert!(records.take(Duration::ZERO).is_empty());
        for number in 0..RECORDS_MAX + 3 {
            records.push(record(&number.to_string()));
        }
        let taken = records.take(LONG);
        assert_eq!(taken.len(), RECORDS_MAX);
        assert_eq!(taken[0], record("3 (3 earlier log records were dropped)"));
        assert_eq!(taken[1], record("4"));
        records.push(record("later"));
        assert_eq!(records.take(LONG), [record("later")]);
    }

    #[test]
    fn the_end_wakes_the_reader_and_loses_nothing_that_came_before() {
        let records = Arc::new(Records::default());
        let theirs = records.clone();
        let reader = std::thread::spawn(move || theirs.take(LONG));
        records.push(record("woken"));
        assert_eq!(reader.join().unwrap(), [record("woken")]);
        let theirs = records.clone();
        let reader = std::thread::spawn(move || theirs.take(LONG));
        records.close();
        assert!(reader.join().unwrap().is_empty());
        let records = Records::default();
        records.push(record("before"));
        records.close();
        records.push(record("after"));
        assert_eq!(records.take(LONG), [record("before")]);
        assert!(records.take(LONG).is_empty());
    }
}
