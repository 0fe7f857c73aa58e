//! A request on its way, and who waits for it.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

use blkloom_io::{Buffer, Slice};

use crate::device::Device;
use crate::lock;
use crate::nbd::Ticket;
use crate::notice::{Notices, Outcome};
use crate::stats::Op;

/// How a request is to be done; what does not apply to its operation is ignored.
#[derive(Clone, Copy, Default, Debug)]
pub struct Flags {
    /// Durable before it completes.
    pub fua: bool,
    /// Zeroed blocks may be given back.
    pub unmap: bool,
    /// Zeroing only if faster than writing zeros.
    pub fast: bool,
    /// One extent is enough.
    pub one: bool,
    /// Enter the device even while it is suspended (its own last flush).
    pub through_gate: bool,
}

/// The bytes a request reads into or writes from.
pub enum Memory {
    None,
    /// Ours; a write's bytes may be shared with a fault.
    Owned(Arc<Buffer>),
    /// The caller's, who keeps it until the request ends.
    Borrowed(Slice),
}

impl Memory {
    pub fn slice(&self) -> Slice {
        match self {
            Memory::None => Slice::empty(),
            // SAFETY: the buffer lives in the request, which its queue keeps until every I/O on it
            // has ended; nobody borrows its bytes meanwhile (a fault only reads a write's bytes).
            Memory::Owned(buffer) => unsafe { buffer.slice() },
            Memory::Borrowed(slice) => *slice,
        }
    }
}

/// What extents are asked for: the name of a metadata context that targets answer for, or None for NBD's
/// base:allocation, which the engine finds itself.
pub type Context = Option<Arc<str>>;

/// What the name of a metadata context asks for.
pub fn context(name: &str) -> Context {
    (name != "base:allocation").then(|| name.into())
}

/// A run of one status: flags as NBD's base:allocation (1 hole, 2 zero), or of the context asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Found {
    pub offset: u64,
    pub len: u64,
    pub flags: u32,
}

pub struct Request {
    pub device: Arc<Device>,
    pub op: Op,
    pub offset: u64,
    pub len: u64,
    pub flags: Flags,
    pub memory: Memory,
    pub owner: Owner,
    pub started: Instant,
    /// Of extents.
    pub context: Context,
    /// Bytes from the start that were moved already, by `now`.
    pub done: u64,
}

pub enum Owner {
    /// The request was answered already.
    Nobody,
    Connection(Ticket),
    Waiter {
        waiter: Arc<Waiter>,
        index: usize,
    },
    Notice {
        notices: Arc<Notices>,
        token: u64,
    },
}

impl Owner {
    /// Tells a waiter or a notice's reader. Connections are told by their loop.
    pub(crate) fn complete(self, error: i32, found: Vec<Found>) {
        match self {
            Owner::Nobody | Owner::Connection(_) => {}
            Owner::Waiter { waiter, index } => waiter.complete(index, error, found),
            Owner::Notice { notices, token } => notices.push(token, Outcome::Io { error, found }),
        }
    }
}

/// A thread waiting for several requests.
pub struct Waiter {
    state: Mutex<Waiting>,
    all: Condvar,
}

struct Waiting {
    left: usize,
    errors: Vec<i32>,
    found: Vec<Found>,
}

impl Waiter {
    pub fn new(count: usize) -> Arc<Waiter> {
        let state = Waiting { left: count, errors: vec![0; count], found: Vec::new() };
        Arc::new(Waiter { state: Mutex::new(state), all: Condvar::new() })
    }

    fn complete(&self, index: usize, error: i32, found: Vec<Found>) {
        let mut state = lock(&self.state);
        state.left -= 1;
        state.errors[index] = error;
        state.found = found;
        if state.left == 0 {
            self.all.notify_all();
        }
    }

    /// Waits for all; the errnos in order, and the extents of the last.
    pub fn wait(&self) -> (Vec<i32>, Vec<Found>) {
        let state = lock(&self.state);
        let mut state = self.all.wait_while(state, |s| s.left > 0).unwrap_or_else(PoisonError::into_inner);
        (std::mem::take(&mut state.errors), std::mem::take(&mut state.found))
    }

    /// As `wait`, until `deadline`; None when it passed.
    pub fn wait_until(&self, deadline: Instant) -> Option<Vec<i32>> {
        let state = lock(&self.state);
        let left = deadline.saturating_duration_since(Instant::now());
        let (mut state, timeout) =
            self.all.wait_timeout_while(state, left, |s| s.left > 0).unwrap_or_else(PoisonError::into_inner);
        (!timeout.timed_out()).then(|| std::mem::take(&mut state.errors))
    }
}
