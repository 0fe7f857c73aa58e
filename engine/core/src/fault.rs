//! Faults: requests a map could not answer, on their way to the device's mapper thread and back.

use std::sync::Arc;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use blkloom_io::{Buffer, errno::EIO};

use crate::device::LONGEST_TIMEOUT;
use crate::held::{Held, Holding};
use crate::inbox::{Inbox, Message, TaskId};
use crate::lock;
use crate::request::{Context, Flags};
use crate::stats::Op;

/// What the target says to a fault.
pub enum Answer {
    /// The map has changed.
    Retry,
    /// The target did it; a read brings its bytes.
    Done(Option<Vec<u8>>),
    /// (length, flags) from the fault's offset on.
    Extents(Vec<(u64, u32)>),
    Fail(i32),
    /// Not now: the request waits (see `held`). The errno it fails with, if it comes to that.
    Hold(i32, Holding),
}

/// A write's bytes, kept alive however late the target looks.
pub(crate) enum Payload {
    None,
    Shared { buffer: Arc<Buffer>, at: usize },
    Copied(Vec<u8>),
}

pub struct Fault {
    pub op: Op,
    pub owner: u32,
    /// Bytes from the start of the device that faulted.
    pub offset: u64,
    pub len: u64,
    pub flags: Flags,
    /// Of extents.
    pub context: Context,
    /// A file of the device, or of one below, could not be synced. The operation, a flush or what ends with one, fails
    /// whatever is answered; but not before.
    pub sync_failed: bool,
    /// It was held before.
    pub again: bool,
    /// A write that was sent where the map says, and refused there with this errno (no space); else 0.
    pub full: i32,
    pub(crate) held: Arc<Held>,
    pub(crate) payload: Payload,
    pub(crate) inbox: Arc<Inbox>,
    pub(crate) task: TaskId,
    pub(crate) deadline: Instant,
    pub(crate) answered: bool,
}

impl Fault {
    /// Its request has failed, or is about to: what it asks for must not be begun any more, for whoever asked
    /// may have gone on.
    pub fn expired(&self) -> bool {
        self.deadline <= Instant::now()
    }

    pub fn payload(&self) -> &[u8] {
        match &self.payload {
            Payload::None => &[],
            Payload::Shared { buffer, at } => &buffer.bytes()[*at..*at + self.len as usize],
            Payload::Copied(bytes) => bytes,
        }
    }

    /// Only the first answer counts.
    pub fn answer(&mut self, answer: Answer) {
        if !std::mem::replace(&mut self.answered, true) {
            self.payload = Payload::None;
            self.inbox.send(Message::Answered(self.task, answer));
        }
    }

    /// See `Answer::Hold`.
    pub fn hold(&mut self, errno: i32) {
        let holding = self.held.hold();
        self.answer(Answer::Hold(errno, holding));
    }
}

impl Drop for Fault {
    /// A fault nobody answered fails its request rather than hang it.
    fn drop(&mut self) {
        self.answer(Answer::Fail(EIO));
    }
}

#[derive(Default)]
struct State {
    faults: Vec<Fault>,
    woken: bool,
    attached: bool,
    closed: bool,
}

#[derive(Default)]
pub(crate) struct FaultQueue {
    state: Mutex<State>,
    arrived: Condvar,
}

impl FaultQueue {
    pub fn attach(&self) {
        lock(&self.state).attached = true;
    }

    /// Hands the fault to the mapper; dropped (and so failed) where there is none.
    pub fn push(&self, fault: Fault) {
        let mut state = lock(&self.state);
        if state.attached && !state.closed {
            state.faults.push(fault);
            drop(state);
            self.arrived.notify_one();
        }
    }

    /// Has `next` return, though nothing waits.
    pub fn wake(&self) {
        lock(&self.state).woken = true;
        self.arrived.notify_one();
    }

    /// All that wait, waiting for the first; empty after `timeout` or a `wake`, None once closed.
    pub fn next(&self, timeout: Option<Duration>) -> Option<Vec<Fault>> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout.min(LONGEST_TIMEOUT));
        let mut state = lock(&self.state);
        loop {
            if std::mem::take(&mut state.woken) || !state.faults.is_empty() {
                return Some(std::mem::take(&mut state.faults));
            }
            if state.closed {
                return None;
            }
            state = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                None => self.arrived.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => return Some(Vec::new()),
                Some(left) => self.arrived.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0,
            };
        }
    }

    pub fn close(&self) {
        let mut state = lock(&self.state);
        state.closed = true;
        let dropped = std::mem::take(&mut state.faults);
        drop(state);
        drop(dropped);
        self.arrived.notify_all();
    }
}
