//! `BackendQueue`: a backend that queues its operations for a worker outside of the engine, for example in Python.
//!
//! Operations wait here in order until the worker may take them (see `Limits`). An eventfd is readable while there are
//! operations or cancellations to take. Any thread may submit and cancel; one thread takes.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd};

use blkloom_io::{Errno, Process};

use crate::backend::{Backend, Limits, Operation, OperationId};
use crate::event::Event;
use crate::stats::Op;
use crate::sync::{Mutex, lock};

#[derive(Default)]
struct State {
    waiting: VecDeque<Operation>,
    /// Operations that were taken and are not complete, with their bytes.
    taken: HashMap<OperationId, u64>,
    bytes: u64,
    cancelled: Vec<OperationId>,
    closed: bool,
}

/// The result of `BackendQueue::take`.
#[derive(Default)]
pub struct Taken {
    /// Operations to start.
    pub begun: Vec<Operation>,
    /// Operations taken before whose results are no longer needed.
    pub cancelled: Vec<OperationId>,
}

/// A queue of operations, and the backend that they are submitted to.
pub struct BackendQueue {
    limits: Limits,
    state: Mutex<State>,
    pub(crate) event: Event,
    home: Process,
}

impl BackendQueue {
    pub fn new(limits: Limits) -> std::io::Result<BackendQueue> {
        let event = Event::new()?;
        let limits = Limits { longest: limits.longest.max(1), ..limits };
        Ok(BackendQueue { limits, state: Mutex::default(), event, home: Process::current() })
    }

    /// A descriptor that is readable while `take` has operations or cancellations.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Takes operations to start, as many as the limits allow beside those taken before, and cancellations.
    pub fn take(&self) -> Taken {
        let mut state = lock(&self.state);
        self.event.clear();
        let mut begun = Vec::new();
        while state.waiting.front().is_some_and(|operation| self.has_room(&state, operation))
            && let Some(operation) = state.waiting.pop_front()
        {
            let bytes = weight(&operation);
            state.taken.insert(operation.id, bytes);
            state.bytes += bytes;
            begun.push(operation);
        }
        Taken { begun, cancelled: std::mem::take(&mut state.cancelled) }
    }

    /// Whether the limits allow to take another operation. The first one is always allowed.
    fn has_room(&self, state: &State, operation: &Operation) -> bool {
        state.taken.is_empty()
            || state.taken.len() < self.limits.most && state.bytes + weight(operation) <= self.limits.most_bytes
    }

    /// Completes an operation that was taken.
    pub fn complete(&self, operation: &mut Operation, result: Result<Option<Vec<u8>>, Errno>) {
        // Removed first: otherwise the queue would find it here and cancel it.
        let mut state = lock(&self.state);
        if let Some(bytes) = state.taken.remove(&operation.id) {
            state.bytes -= bytes;
        }
        if !state.waiting.is_empty() {
            self.event.raise();
        }
        drop(state);
        operation.complete(result);
    }

    /// Fails all waiting and later operations.
    pub fn close(&self) {
        let mut state = lock(&self.state);
        state.closed = true;
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        waiting.into_iter().for_each(|mut operation| operation.complete(Err(Errno::SHUTDOWN)));
    }
}

/// Bytes of the operation's payload or answer.
fn weight(operation: &Operation) -> u64 {
    if matches!(operation.op, Op::Read | Op::Write) { operation.len } else { 0 }
}

impl Backend for BackendQueue {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn submit(&self, mut operation: Operation) {
        let mut state = lock(&self.state);
        if state.closed || !self.home.is_current() {
            drop(state);
            return operation.complete(Err(Errno::SHUTDOWN));
        }
        state.waiting.push_back(operation);
        self.event.raise();
    }

    fn cancel(&self, id: OperationId) {
        let mut state = lock(&self.state);
        let waiting = state.waiting.iter().position(|operation| operation.id == id);
        let forgotten = waiting.and_then(|at| state.waiting.remove(at));
        if forgotten.is_none() && state.taken.contains_key(&id) {
            state.cancelled.push(id);
            self.event.raise();
        }
        drop(state);
        drop(forgotten);
    }
}
