//! An adapter that several Python threads share.

use pyo3::prelude::*;
use std::mem::ManuallyDrop;
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

/// Behind a lock that is never waited for while attached to the interpreter, and never held while waiting for that.
pub(crate) struct Held<T: Send>(Mutex<ManuallyDrop<T>>);

impl<T: Send> Held<T> {
    pub(crate) fn new(value: T) -> Held<T> {
        Held(Mutex::new(ManuallyDrop::new(value)))
    }

    fn lock(&self) -> MutexGuard<'_, ManuallyDrop<T>> {
        // A call that panicked has been told so; what the adapter holds is sound all the same.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something that takes no time; `None` where somebody else is at it.
    pub(crate) fn try_now<R>(&self, act: impl FnOnce(&mut T) -> R) -> Option<R> {
        match self.0.try_lock() {
            Ok(mut value) => Some(act(&mut value)),
            Err(TryLockError::Poisoned(poisoned)) => Some(act(&mut poisoned.into_inner())),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Does something that takes no time, once nobody else is at it.
    pub(crate) fn now<R: Send>(&self, py: Python<'_>, act: impl FnOnce(&mut T) -> R + Send) -> R {
        match self.0.try_lock() {
            Ok(mut value) => act(&mut value),
            Err(TryLockError::Poisoned(poisoned)) => act(&mut poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => self.wait(py, act),
        }
    }

    /// Does something that takes no time, unless `may_wait`: a GPU's driver may hold its locks for a while.
    pub(crate) fn soon<R: Send>(
        &self,
        py: Python<'_>,
        may_wait: bool,
        act: impl FnOnce(&mut T) -> R + Send,
    ) -> R {
        if may_wait { self.wait(py, act) } else { self.now(py, act) }
    }

    /// Does something that may wait.
    pub(crate) fn wait<R: Send>(&self, py: Python<'_>, act: impl FnOnce(&mut T) -> R + Send) -> R {
        py.detach(|| act(&mut self.lock()))
    }
}

impl<T: Send> Drop for Held<T> {
    fn drop(&mut self) {
        let value = self.0.get_mut().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: taken once, here; nobody uses it after its drop.
        let value = unsafe { ManuallyDrop::take(value) };
        // Ending an adapter waits for copies and for threads. Where there is no interpreter any more, just so.
        let _ = Python::try_attach(|py| py.detach(|| drop(value)));
    }
}
