//! The queue between the threads that log and the one that forwards: it is bounded, and a thread that adds a record
//! never waits.

use core::fmt::Write;
use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The most records in the queue. If the reader does not keep up, the oldest are dropped.
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
    /// Notified when a record has been added, or the queue closed.
    news: Condvar,
}

impl Records {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a record; ignored once the queue is closed.
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

    /// Takes all records; waits at most `timeout` for the first one. The first one also says how many were dropped
    /// before it.
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

    /// Closes the queue: it takes no more records, and nobody waits for one any more.
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
