//! `RangeLock`: a shared/exclusive lock on byte ranges, for read-modify-write of blocks.
//!
//! Aligned writes lock their range shared, and a read-modify-write locks its blocks exclusively. Requests own the
//! locks, not threads. `try_lock` never waits (for loops); `lock` waits (for pool threads). A waiter does not stop
//! later shared locks, so continuous aligned writes to one block could starve it. Only a client that writes to the same
//! block in overlapping requests can cause that.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// Ranges that may be locked at the same time before the list of them has to grow.
const MOST: usize = 512;

struct State {
    held: Vec<(u64, u64, bool)>,
}

pub struct RangeLock {
    state: Mutex<State>,
    released: Condvar,
}

/// A locked range. Dropping it unlocks the range.
pub struct RangeGuard {
    lock: Arc<RangeLock>,
    range: (u64, u64, bool),
}

impl State {
    fn free(&self, start: u64, end: u64, exclusive: bool) -> bool {
        self.held.iter().all(|&(s, e, x)| e <= start || end <= s || !(x || exclusive))
    }
}

impl Default for RangeLock {
    fn default() -> RangeLock {
        let state = Mutex::new(State { held: Vec::with_capacity(MOST) });
        RangeLock { state, released: Condvar::new() }
    }
}

impl RangeLock {
    pub fn try_lock(self: &Arc<Self>, start: u64, end: u64, exclusive: bool) -> Option<RangeGuard> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if !state.free(start, end, exclusive) {
            return None;
        }
        state.held.push((start, end, exclusive));
        Some(RangeGuard { lock: self.clone(), range: (start, end, exclusive) })
    }

    pub fn lock(self: &Arc<Self>, start: u64, end: u64, exclusive: bool) -> RangeGuard {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while !state.free(start, end, exclusive) {
            state = self.released.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.held.push((start, end, exclusive));
        RangeGuard { lock: self.clone(), range: (start, end, exclusive) }
    }
}

impl Drop for RangeGuard {
    fn drop(&mut self) {
        let mut state = self.lock.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = state.held.iter().position(|held| *held == self.range) {
            state.held.swap_remove(at);
        }
        drop(state);
        self.lock.released.notify_all();
    }
}
