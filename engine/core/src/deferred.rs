//! Deferred requests of a device: faults that their target answered with "retry later" (`Answer::Defer`).
//!
//! A deferred request waits until one of these events: the device retries (`Device::retry_deferred`), the target's time
//! has passed, the gate of a device that the request is inside of closes (then the request waits at that gate), or the
//! device fails its deferred requests (`Device::fail_deferred`). Requests that wait for an instant, and reads in a
//! backend, are registered here too, because a closed gate ends their wait in the same way.
//!
//! No wakeup is lost: a loop first registers its task here and then checks the gates and `Deferral::is_over`. A thread
//! that closes a gate or retries first changes that state and then wakes the tasks registered here. So one of the two
//! sees the other. `count` is the value of `Device::deferred`. It grows when the target answers, before the loop
//! receives the answer, and falls when the request continues. So it is never too low, and too high only for a moment.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::mailbox::Poster;
use crate::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use crate::sync::{Mutex, lock};
use crate::wake::{TaskId, Wake};

/// The deferred requests of one device.
#[derive(Default)]
pub(crate) struct Deferred {
    count: AtomicUsize,
    /// Number of retries of all deferred requests.
    rounds: AtomicU64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// By the address of the loop's mailbox, and the task.
    tasks: BTreeMap<(usize, TaskId), Entry>,
    refused: bool,
}

struct Entry {
    wakes: Poster<Wake>,
    /// The task waits for an instant or a backend, not for its target.
    timed: bool,
}

/// Counts one deferred request until it is dropped.
pub struct Deferral {
    deferred: Arc<Deferred>,
    round: u64,
    /// The target itself deferred the request (its handler was not cancelled).
    pub(crate) seen: bool,
}

impl Deferral {
    /// Whether the device has retried its deferred requests since.
    pub(crate) fn is_over(&self) -> bool {
        self.deferred.rounds.load(Ordering::SeqCst) != self.round
    }
}

impl Drop for Deferral {
    fn drop(&mut self) {
        self.deferred.count.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Deferred {
    pub fn count(&self) -> usize {
        self.count.load(Ordering::SeqCst)
    }

    pub fn defer(self: &Arc<Self>) -> Deferral {
        self.count.fetch_add(1, Ordering::SeqCst);
        Deferral { deferred: self.clone(), round: self.rounds.load(Ordering::SeqCst), seen: true }
    }

    /// Registers a waiting task. timed: the task waits for an instant or a backend, not for its target. False: the task
    /// must not wait.
    pub fn enter(&self, wakes: &Poster<Wake>, task: TaskId, timed: bool) -> bool {
        let mut state = lock(&self.state);
        if !state.refused {
            state.tasks.insert(key(wakes, task), Entry { wakes: wakes.clone(), timed });
        }
        !state.refused
    }

    pub fn leave(&self, wakes: &Poster<Wake>, task: TaskId) {
        lock(&self.state).tasks.remove(&key(wakes, task));
    }

    /// Wakes the requests that wait for their targets: their ranges are walked again.
    pub fn release(&self) {
        self.wake(|entry| !entry.timed);
    }

    /// Wakes all requests registered here, because a gate has closed.
    pub fn release_all(&self) {
        self.wake(|_| true);
    }

    fn wake(&self, wanted: impl Fn(&Entry) -> bool) {
        self.rounds.fetch_add(1, Ordering::SeqCst);
        lock(&self.state).tasks.retain(|(_, task), entry| {
            let wake = wanted(entry);
            if wake {
                entry.wakes.post(Wake::Released(*task));
            }
            !wake
        });
    }

    /// Fails all deferred requests, and those deferred from now on. Requests that wait for an instant continue.
    pub fn refuse(&self) {
        let mut state = lock(&self.state);
        state.refused = true;
        for ((_, task), entry) in std::mem::take(&mut state.tasks) {
            entry.wakes.post(Wake::Refused(task));
        }
    }
}

fn key(wakes: &Poster<Wake>, task: TaskId) -> (usize, TaskId) {
    (Arc::as_ptr(wakes).cast::<()>() as usize, task)
}
