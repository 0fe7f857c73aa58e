//! A lock on byte ranges: read-modify-write of a block must see no other writer of it.
//!
//! Writers that fit the alignment share; a read-modify-write is exclusive. Held by requests, not by
//! threads. `try_lock` never waits (loops use it); `lock` waits (pool threads use it). A waiter does
//! not keep later comers out, so a steady stream of sharers on one block could starve it; sharers
//! on the block of an unaligned write are the client's own overlapping requests.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

#[derive(Default)]
struct State {
    held: Vec<(u64, u64, bool)>,
}

#[derive(Default)]
pub struct RangeLock {
    state: Mutex<State>,
    released: Condvar,
}

/// Releases its range when dropped.
pub struct RangeGuard {
    lock: Arc<RangeLock>,
    range: (u64, u64, bool),
}

impl State {
    fn free(&self, start: u64, end: u64, exclusive: bool) -> bool {
        self.held.iter().all(|&(s, e, x)| e <= start || end <= s || !(x || exclusive))
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
