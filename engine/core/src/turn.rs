//! One at a time, and for those that wait a deadline (which std's mutexes do not have).

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Instant;

use crate::lock;

#[derive(Default)]
pub struct Turn {
    taken: Mutex<bool>,
    free: Condvar,
}

/// Whose turn it is, until dropped.
pub struct Held<'a>(&'a Turn);

impl Turn {
    /// Waits for the turn; None when the deadline passed first.
    pub fn take(&self, deadline: Option<Instant>) -> Option<Held<'_>> {
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
        Some(Held(self))
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        *lock(&self.0.taken) = false;
        self.0.free.notify_one();
    }
}
