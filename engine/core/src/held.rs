//! Held requests: faults whose target said "not now". No time is set for them. They wait until their device is
//! told to ask again (`Device::retry_held`), until the gate of a device they are inside of closes (then they wait
//! there), or until they are to fail (`Device::fail_held`).
//!
//! A loop enters its task here first, and looks at the gates and at `Holding::is_over` after that; who closes a gate or
//! asks again looks here after that: one of the two sees the other. `count` is what `Device::held` tells; it grows with
//! the target's word, not with the loop's hearing of it, and falls when the request has got further: never too low, too
//! high for moments.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use crate::inbox::{Inbox, Message, TaskId};
use crate::lock;

#[derive(Default)]
pub(crate) struct Held {
    count: AtomicUsize,
    /// How often all were asked for again.
    rounds: AtomicU64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// By the loop's inbox (its address) and the task.
    tasks: BTreeMap<(usize, TaskId), Arc<Inbox>>,
    refused: bool,
}

/// Counts as held for as long as it lives.
pub struct Holding {
    held: Arc<Held>,
    round: u64,
}

impl Holding {
    /// All were asked for again since.
    pub(crate) fn is_over(&self) -> bool {
        self.held.rounds.load(Ordering::SeqCst) != self.round
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        self.held.count.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Held {
    pub fn count(&self) -> usize {
        self.count.load(Ordering::SeqCst)
    }

    pub fn hold(self: &Arc<Self>) -> Holding {
        self.count.fetch_add(1, Ordering::SeqCst);
        Holding { held: self.clone(), round: self.rounds.load(Ordering::SeqCst) }
    }

    /// The task waits. False: it must not.
    pub fn enter(&self, inbox: &Arc<Inbox>, task: TaskId) -> bool {
        let mut state = lock(&self.state);
        if !state.refused {
            state.tasks.insert(key(inbox, task), inbox.clone());
        }
        !state.refused
    }

    pub fn leave(&self, inbox: &Arc<Inbox>, task: TaskId) {
        lock(&self.state).tasks.remove(&key(inbox, task));
    }

    /// All of them are walked again from their beginning.
    pub fn release(&self) {
        self.rounds.fetch_add(1, Ordering::SeqCst);
        for ((_, task), inbox) in std::mem::take(&mut lock(&self.state).tasks) {
            inbox.send(Message::Released(task));
        }
    }

    /// All of them fail, and what is to be held from now on.
    pub fn refuse(&self) {
        let mut state = lock(&self.state);
        state.refused = true;
        for ((_, task), inbox) in std::mem::take(&mut state.tasks) {
            inbox.send(Message::HoldRefused(task));
        }
    }
}

fn key(inbox: &Arc<Inbox>, task: TaskId) -> (usize, TaskId) {
    (Arc::as_ptr(inbox) as usize, task)
}
