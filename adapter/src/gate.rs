//! Knows who writes into reserved slots of a claim, and when the last of them has ended.
//!
//! When a client gives its entry up, the engine frees the slots that the client was writing. So the keeper gives the
//! entry up only after the last copy into the arena has ended and no further one can begin.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

#[derive(Debug, Default)]
struct State {
    writers: usize,
    closed: bool,
}

/// The gate of one claim.
#[derive(Debug, Default)]
pub(crate) struct WriterGate {
    state: Mutex<State>,
    changed: Condvar,
}

/// The right to write into slots reserved under this claim, until the pass is dropped.
#[derive(Debug)]
pub(crate) struct WriterPass(Arc<WriterGate>);

impl WriterGate {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A pass, unless the claim is being given up.
    pub(crate) fn enter(self: &Arc<Self>) -> Option<WriterPass> {
        let mut state = self.state();
        if state.closed {
            return None;
        }
        state.writers += 1;
        Some(WriterPass(self.clone()))
    }

    /// Gives out no more passes, and waits until those that it gave out are dropped: copies end by themselves, whatever
    /// the engine does.
    pub(crate) fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        while state.writers > 0 {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for WriterPass {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.writers -= 1;
        drop(state);
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn closing_waits_for_who_is_inside_and_lets_nobody_in() {
        let gate = Arc::new(WriterGate::default());
        let pass = gate.enter().unwrap();
        let (closed, was_closed) = mpsc::channel();
        let theirs = gate.clone();
        let closer = std::thread::spawn(move || {
            theirs.close();
            closed.send(()).unwrap();
        });
        while gate.enter().is_some() {
            std::thread::yield_now();
        }
        assert_eq!(was_closed.recv_timeout(Duration::from_millis(30)), Err(mpsc::RecvTimeoutError::Timeout));
        drop(pass);
        was_closed.recv().unwrap();
        closer.join().unwrap();
    }
}
