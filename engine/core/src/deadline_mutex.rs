//! A mutex whose lock operation has a deadline (std's `Mutex` has none).

use std::sync::PoisonError;
use std::time::Instant;

use crate::sync::{Condvar, Mutex, lock};

#[derive(Default)]
pub struct DeadlineMutex {
    /// The mutex is locked.
    taken: Mutex<bool>,
    free: Condvar,
}

/// The guard: the mutex is unlocked when this is dropped.
pub struct DeadlineGuard<'a>(&'a DeadlineMutex);

impl DeadlineMutex {
    /// Locks. None: the deadline passed first.
    pub fn lock(&self, deadline: Option<Instant>) -> Option<DeadlineGuard<'_>> {
        let mut taken = lock(&self.taken);
        while *taken {
            taken = match deadline {
                None => self.free.wait(taken).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.checked_duration_since(Instant::now())?;
                    self.free.wait_timeout(taken, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        *taken = true;
        Some(DeadlineGuard(self))
    }
}

impl Drop for DeadlineGuard<'_> {
    fn drop(&mut self) {
        *lock(&self.0.taken) = false;
        self.0.free.notify_one();
    }
}
