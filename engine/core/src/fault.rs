//! Faults: requests that the map cannot resolve. They go to the device's mapper thread, and its answer comes back.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::{Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use blkloom_io::{Buffer, Errno};

use crate::clock::LONGEST_TIMEOUT;
use crate::deferred::Deferral;
use crate::device::Device;
use crate::event::Event;
use crate::lock;
use crate::mailbox::Poster;
use crate::operation::{Context, Flags};
use crate::stats::Op;
use crate::wake::TaskId;

/// The target's answer to a fault.
pub enum Answer {
    /// The map has changed: the request is walked again.
    Retry,
    /// The target has executed the operation. For a read: the bytes.
    Done(Option<Vec<u8>>),
    /// Block status: (length, flags) of runs from the fault's offset on.
    Extents(Vec<(u64, u32)>),
    Fail(Errno),
    /// Retry later: the request is deferred (see `deferred`). time: the target is asked again after this time, or
    /// earlier.
    Defer {
        /// The error of the request if it must fail while it is deferred.
        errno: Errno,
        deferral: Deferral,
        time: Option<Duration>,
    },
}

/// The answer to the fault of a task.
pub(crate) struct Answered {
    pub task: TaskId,
    pub answer: Answer,
}

/// A write's bytes. They stay valid until the fault is answered, even when the request has timed out.
pub(crate) enum Payload {
    None,
    Shared { buffer: Arc<Buffer>, at: usize },
    Copied(Vec<u8>),
}

impl Payload {
    pub fn bytes(&self, len: usize) -> &[u8] {
        match self {
            Payload::None => &[],
            Payload::Shared { buffer, at } => &buffer.bytes()[*at..*at + len],
            Payload::Copied(bytes) => bytes,
        }
    }
}

/// A request for the target. A fault that is dropped without an answer fails with EIO.
pub struct Fault {
    pub op: Op,
    pub owner: u32,
    /// Bytes from the start of the device that faulted.
    pub offset: u64,
    pub len: u64,
    pub flags: Flags,
    /// The metadata context, for extents.
    pub context: Context,
    /// The sync of a file of this device, or of one below, failed. The request fails with that error whatever the
    /// answer is, but only after the answer.
    pub sync_failed: bool,
    /// The request was deferred before.
    pub again: bool,
    /// The write was sent where the map says, and storage failed it with this errno (no space).
    pub no_space: Option<Errno>,
    /// The request came from a client that may be handed over to another process, not from this process itself.
    pub from_client: bool,
    /// The device whose map faulted.
    pub(crate) device: Arc<Device>,
    /// The devices above `device` that the request is inside of. None: there are none.
    pub(crate) above: Option<Box<[Arc<Device>]>>,
    pub(crate) payload: Payload,
    pub(crate) answers: Poster<Answered>,
    pub(crate) task: TaskId,
    pub(crate) deadline: Instant,
    pub(crate) answered: bool,
}

impl Fault {
    /// Whether the fault has timed out. Its request has failed or is about to, and its client may have continued: the
    /// operation must not be started any more.
    pub fn expired(&self) -> bool {
        self.deadline <= Instant::now()
    }

    /// The bytes to write.
    pub fn payload(&self) -> &[u8] {
        self.payload.bytes(self.len as usize)
    }

    /// Answers the fault. Only the first answer counts.
    pub fn answer(&mut self, answer: Answer) {
        if !std::mem::replace(&mut self.answered, true) {
            self.payload = Payload::None;
            self.answers.post(Answered { task: self.task, answer });
        }
    }

    /// Whether a device that the request is inside of has closed its gate and may wait for this answer. An interrupted
    /// request waits at that gate.
    pub fn blocks_suspend(&self) -> bool {
        !self.device.is_live() || self.above.iter().flatten().any(|device| !device.is_live())
    }

    /// Time until the fault expires.
    pub fn time_left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    /// Defers the request until its target is told to retry: see `Answer::Defer`.
    pub fn defer(&mut self, errno: Errno) {
        let deferral = self.device.deferred.defer();
        self.answer(Answer::Defer { errno, deferral, time: None });
    }

    /// Like `defer`. The target is asked again after `time`, or earlier.
    pub fn defer_for(&mut self, errno: Errno, time: Duration) {
        let deferral = self.device.deferred.defer();
        self.answer(Answer::Defer { errno, deferral, time: Some(time) });
    }

    /// Like `defer`, for a handler that was cancelled. The next fault of the request does not count as deferred before.
    pub fn interrupt(&mut self, errno: Errno) {
        let mut deferral = self.device.deferred.defer();
        deferral.seen = false;
        self.answer(Answer::Defer { errno, deferral, time: None });
    }
}

impl Drop for Fault {
    /// Fails the request of a fault that was never answered. The request must not hang.
    fn drop(&mut self) {
        self.answer(Answer::Fail(Errno::IO));
    }
}

/// Faults that may be queued before their list has to grow, unless the mapper takes some. The mapper's thread allocates
/// the list, so that a loop need not.
const MOST_WITHOUT_GROWTH: usize = 64;

#[derive(Default)]
struct State {
    faults: Vec<Fault>,
    woken: bool,
    attached: bool,
    closed: bool,
}

/// The faults of one device that its mapper thread has not taken yet.
#[derive(Default)]
pub(crate) struct FaultQueue {
    state: Mutex<State>,
    arrived: Condvar,
    /// Readable while `next` would not wait. Created only for a mapper that also waits for other descriptors.
    event: OnceLock<Event>,
}

impl FaultQueue {
    pub fn attach(&self) {
        lock(&self.state).attached = true;
    }

    /// Queues a fault for the mapper. Without a mapper the fault is dropped, and so fails.
    pub fn push(&self, fault: Fault) {
        let mut state = lock(&self.state);
        if state.attached && !state.closed {
            state.faults.push(fault);
            if state.faults.len() == 1 {
                self.announce();
            }
            drop(state);
            self.arrived.notify_one();
        }
    }

    /// An eventfd that is readable while `next` would not wait.
    pub fn event(&self) -> std::io::Result<BorrowedFd<'_>> {
        let state = lock(&self.state);
        if self.event.get().is_none() {
            // Set only under the lock, so no other thread has set it meanwhile.
            let made = Event::new()?;
            let event = self.event.get_or_init(|| made);
            if state.woken || state.closed || !state.faults.is_empty() {
                event.raise();
            }
        }
        self.event.get().map(AsFd::as_fd).ok_or_else(|| std::io::ErrorKind::NotFound.into())
    }

    /// Like `wake`, but only if the mapper waits for the event.
    pub fn wake_by_event(&self) {
        if self.event.get().is_some() {
            self.wake();
        }
    }

    /// Raises the event. Called under the lock, as is `clear` in `next`, so that the event agrees with the state.
    fn announce(&self) {
        if let Some(event) = self.event.get() {
            event.raise();
        }
    }

    /// Makes `next` return, even without a fault.
    pub fn wake(&self) {
        let mut state = lock(&self.state);
        state.woken = true;
        self.announce();
        drop(state);
        self.arrived.notify_one();
    }

    /// Waits for a fault and returns all that are queued. Empty after `timeout` or `wake`. None once closed.
    pub fn next(&self, timeout: Option<Duration>) -> Option<Vec<Fault>> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout.min(LONGEST_TIMEOUT));
        let next = Vec::with_capacity(MOST_WITHOUT_GROWTH);
        let mut state = lock(&self.state);
        loop {
            if std::mem::take(&mut state.woken) || !state.faults.is_empty() {
                if let Some(event) = self.event.get().filter(|_| !state.closed) {
                    event.clear();
                }
                return Some(std::mem::replace(&mut state.faults, next));
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
        self.announce();
        let dropped = std::mem::take(&mut state.faults);
        drop(state);
        drop(dropped);
        self.arrived.notify_all();
    }
}
