//! An adapter that several Python threads share.

use pyo3::prelude::*;
use std::mem::ManuallyDrop;
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

/// An adapter behind a lock. No thread waits for the lock while it is attached to the interpreter, or for the
/// interpreter while it holds the lock.
pub(crate) struct Held<T: Send>(Mutex<ManuallyDrop<T>>);

impl<T: Send> Held<T> {
    pub(crate) fn new(value: T) -> Held<T> {
        Held(Mutex::new(ManuallyDrop::new(value)))
    }

    fn lock(&self) -> MutexGuard<'_, ManuallyDrop<T>> {
        // A caller whose call panicked has got an error; the adapter's state is sound all the same.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `act`, which takes no time; `None` if another thread holds the lock.
    pub(crate) fn try_now<R>(&self, act: impl FnOnce(&mut T) -> R) -> Option<R> {
        match self.0.try_lock() {
            Ok(mut value) => Some(act(&mut value)),
            Err(TryLockError::Poisoned(poisoned)) => Some(act(&mut poisoned.into_inner())),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Calls `act`, which takes no time, once the lock is free.
    pub(crate) fn now<R: Send>(&self, py: Python<'_>, act: impl FnOnce(&mut T) -> R + Send) -> R {
        match self.0.try_lock() {
            Ok(mut value) => act(&mut value),
            Err(TryLockError::Poisoned(poisoned)) => act(&mut poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => self.wait(py, act),
        }
    }

    /// Calls `act`, which takes no time unless `may_wait`: a GPU's driver may hold its locks for a while.
    pub(crate) fn soon<R: Send>(
        &self,
        py: Python<'_>,
        may_wait: bool,
        act: impl FnOnce(&mut T) -> R + Send,
    ) -> R {
        if may_wait { self.wait(py, act) } else { self.now(py, act) }
    }

    /// Calls `act`, which may wait, detached from the interpreter.
    pub(crate) fn wait<R: Send>(&self, py: Python<'_>, act: impl FnOnce(&mut T) -> R + Send) -> R {
        py.detach(|| act(&mut self.lock()))
    }
}

impl<T: Send> Drop for Held<T> {
    fn drop(&mut self) {
        let value = self.0.get_mut().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the value is taken only here, once, and nobody uses it after this drop.
        let value = unsafe { ManuallyDrop::take(value) };
        // Dropping an adapter waits for copies and for threads, so do it detached from the interpreter. If there is no
        // interpreter any more, it is dropped all the same, with the closure.
        let _ = Python::try_attach(|py| py.detach(|| drop(value)));
    }
}
