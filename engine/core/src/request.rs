//! `Request`: one request to a device, with its memory and its owner.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

use blkloom_io::{Buffer, Errno, Registered, Slice, Source};

use crate::device::Device;
use crate::lock;
use crate::notice::{Notices, Outcome};
use crate::operation::{Context, Flags, Found};
use crate::stats::Op;
use crate::wake::TaskId;

/// The memory that a request reads into or writes from.
///
/// Borrowed memory is not accepted, because a request may outlive the call that started it:
///
/// ```compile_fail,E0597
/// # use blkloom_core::Memory;
/// # use blkloom_io::Buffer;
/// let mut buffer = Buffer::new(4096);
/// let memory = Memory::Borrowed(buffer.slice());
/// ```
///
/// ```compile_fail,E0597
/// # use blkloom_core::Memory;
/// # use blkloom_io::Buffer;
/// let mut buffer = Buffer::new(8192);
/// let whole = buffer.slice();
/// let memory = Memory::Pieces(vec![whole.part(4096, 4096), whole.part(0, 4096)]);
/// ```
///
/// Safe code cannot access a buffer while a request owns it:
///
/// ```compile_fail,E0599
/// # use blkloom_core::Memory;
/// # use blkloom_io::Buffer;
/// let slice = Memory::owned(Buffer::new(4096)).slice();
/// slice.zero(); // the buffer is gone
/// ```
pub enum Memory {
    None,
    /// A buffer of the request. A fault may share a write's bytes.
    Owned(OwnedBuffer),
    /// Memory of the caller, which keeps it alive until the request ends.
    Borrowed(Slice<'static>),
    /// Like `Borrowed`, for writes only.
    Source(Source<'static>),
    /// Like `Borrowed`, but in several pieces (scatter-gather list). `Ended::request` returns the list, so that it can
    /// be used again.
    Pieces(Vec<Slice<'static>>),
    /// A buffer that is registered with the loop's io_uring. The CPU may be unable to access it; extents that need the
    /// bytes get a copy. The queue accepts it, the fast path does not.
    Registered(Registered),
}

/// A buffer that belongs to a request.
pub struct OwnedBuffer(Arc<Buffer>);

impl OwnedBuffer {
    pub fn bytes(&self) -> &[u8] {
        self.0.bytes()
    }

    pub fn new(buffer: Buffer) -> OwnedBuffer {
        OwnedBuffer(Arc::new(buffer))
    }

    /// The buffer, if no fault shares it. A fault may do so when its request has timed out.
    pub fn unshared(&mut self) -> Option<&mut Buffer> {
        Arc::get_mut(&mut self.0)
    }

    /// Returns the buffer, after the request has ended. None: a fault still shares it.
    pub fn take(self) -> Option<Buffer> {
        Arc::try_unwrap(self.0).ok()
    }

    /// A reference for a fault, which reads the written bytes.
    pub(crate) fn share(&self) -> Arc<Buffer> {
        self.0.clone()
    }

    /// # Safety
    /// As of `Memory::destination`.
    unsafe fn slice(&self) -> Slice<'static> {
        // SAFETY: the caller promises that the buffer exists, and that no reference to bytes that are written exists.
        unsafe { Slice::new(self.0.as_ptr(), self.0.len()) }
    }
}

impl Memory {
    pub fn owned(buffer: Buffer) -> Memory {
        Memory::Owned(OwnedBuffer::new(buffer))
    }

    /// Whether the memory suits a request: it is long enough, and a read does not get memory that is only for writes.
    pub(crate) fn fits(&self, op: Op, len: u64) -> bool {
        let found = match self {
            Memory::None => 0,
            Memory::Owned(buffer) => buffer.0.len(),
            Memory::Borrowed(slice) => slice.len(),
            Memory::Source(_) if op == Op::Read => return false,
            Memory::Source(source) => source.len(),
            Memory::Registered(buffer) => buffer.len(),
            Memory::Pieces(pieces) => pieces.iter().fold(0, |sum: usize, piece| sum.saturating_add(piece.len())),
        };
        !matches!(op, Op::Read | Op::Write) || found as u64 >= len
    }

    /// Number of bytes from `at` on that lie in one piece, at most `len`.
    pub(crate) fn run(&self, at: usize, len: usize) -> usize {
        match self {
            Memory::Pieces(pieces) => locate(pieces, at).map_or(0, |(piece, skip)| len.min(piece.len() - skip)),
            _ => len,
        }
    }

    /// The destination of a read: `len` bytes from `at` on, or those of them that lie in one piece. Panics when out of
    /// bounds, as slicing does. Memory that `fits` is not out of bounds; a registered buffer always is.
    ///
    /// # Safety
    /// The request does not end before the last use of the result. The request is a read, or its bytes are not accessed
    /// otherwise meanwhile.
    pub(crate) unsafe fn destination(&self, at: usize, len: usize) -> Slice<'static> {
        match self {
            Memory::None | Memory::Source(_) | Memory::Registered(_) => Slice::empty().part(at, len),
            // SAFETY: promised by the caller.
            Memory::Owned(buffer) => unsafe { buffer.slice() }.part(at, len),
            Memory::Borrowed(slice) => slice.part(at, len),
            Memory::Pieces(pieces) => part_of(pieces, at, len),
        }
    }

    /// The source of a write: `len` bytes from `at` on, or those of them that lie in one piece. Panics as `destination`
    /// does.
    ///
    /// # Safety
    /// The request does not end before the last use of the result.
    pub(crate) unsafe fn source(&self, at: usize, len: usize) -> Source<'static> {
        match self {
            Memory::None | Memory::Registered(_) => Source::empty().part(at, len),
            // SAFETY: promised by the caller; nothing writes through it.
            Memory::Owned(buffer) => unsafe { buffer.slice() }.source().part(at, len),
            Memory::Borrowed(slice) => slice.source().part(at, len),
            Memory::Source(source) => source.part(at, len),
            Memory::Pieces(pieces) => part_of(pieces, at, len).source(),
        }
    }

    /// Copies `bytes` to the memory of a read, from `at` on.
    ///
    /// # Safety
    /// The request is a read that has not ended.
    pub(crate) unsafe fn copy_from(&self, mut at: usize, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            // SAFETY: promised by the caller.
            let into = unsafe { self.destination(at, bytes.len()) };
            let (first, rest) = bytes.split_at(into.len());
            into.copy_from(first.into());
            (at, bytes) = (at + first.len(), rest);
        }
    }

    /// Copies `len` bytes of a write, from `at` on.
    ///
    /// # Safety
    /// The request has not ended.
    pub(crate) unsafe fn to_vec(&self, at: usize, len: usize) -> Vec<u8> {
        let mut copy = vec![0; len];
        let mut done = 0;
        while done < len {
            // SAFETY: promised by the caller.
            let from = unsafe { self.source(at + done, len - done) };
            Slice::from(&mut copy[done..done + from.len()]).copy_from(from);
            done += from.len();
        }
        copy
    }
}

/// The piece that contains byte `at`, and the offset of that byte in the piece.
fn locate(pieces: &[Slice<'static>], mut at: usize) -> Option<(Slice<'static>, usize)> {
    for piece in pieces {
        if at < piece.len() {
            return Some((*piece, at));
        }
        at -= piece.len();
    }
    None
}

/// `len` bytes from `at` on, or those of them that lie in one piece.
fn part_of(pieces: &[Slice<'static>], at: usize, len: usize) -> Slice<'static> {
    match locate(pieces, at) {
        Some((piece, skip)) => piece.part(skip, len.min(piece.len() - skip)),
        None => Slice::empty().part(0, len),
    }
}

/// One request to a device. Offset and length are in bytes.
pub struct Request {
    pub device: Arc<Device>,
    pub op: Op,
    pub offset: u64,
    pub len: u64,
    pub flags: Flags,
    pub memory: Memory,
    pub owner: Owner,
    pub started: Instant,
    /// The metadata context, for extents.
    pub context: Context,
    /// Bytes from the start that the fast path has transferred already.
    pub done: u64,
}

/// Identifies a transport of an event loop: its slot there, and a number that is unique in the engine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TransportId {
    pub slot: usize,
    pub number: u64,
}

impl TransportId {
    /// The id of no transport.
    pub const NONE: TransportId = TransportId { slot: usize::MAX, number: u64::MAX };
}

/// Where the result of a request goes.
pub enum Owner {
    /// The request was answered already.
    None,
    /// A transport, which identifies the request by the token.
    Transport {
        transport: TransportId,
        token: u64,
    },
    Waiter {
        waiter: Arc<Waiter>,
        index: usize,
    },
    Notice {
        notices: Arc<Notices>,
        token: u64,
    },
    /// A task of the same queue, which waits for the devices of a tee.
    Tee(TaskId),
}

impl Owner {
    /// Reports the result to a waiter or a notice queue. Loops report to transports, and queues to their tasks.
    pub(crate) fn complete(self, error: Option<Errno>, found: Vec<Found>) {
        match self {
            Owner::None | Owner::Transport { .. } | Owner::Tee(_) => {}
            Owner::Waiter { waiter, index } => waiter.complete(index, error, found),
            Owner::Notice { notices, token } => notices.push(token, Outcome::Io { error, found }),
        }
    }
}

/// A thread that waits for several requests.
pub struct Waiter {
    state: Mutex<Waiting>,
    all: Condvar,
}

struct Waiting {
    left: usize,
    errors: Vec<Option<Errno>>,
    found: Vec<Found>,
}

impl Waiter {
    pub fn new(count: usize) -> Arc<Waiter> {
        let state = Waiting { left: count, errors: vec![None; count], found: Vec::new() };
        Arc::new(Waiter { state: Mutex::new(state), all: Condvar::new() })
    }

    fn complete(&self, index: usize, error: Option<Errno>, found: Vec<Found>) {
        let mut state = lock(&self.state);
        state.left -= 1;
        state.errors[index] = error;
        state.found = found;
        if state.left == 0 {
            self.all.notify_all();
        }
    }

    /// Waits for all requests. Returns their errors in order, and the extents of the last request that ended.
    pub fn wait(&self) -> (Vec<Option<Errno>>, Vec<Found>) {
        let state = lock(&self.state);
        let mut state = self.all.wait_while(state, |s| s.left > 0).unwrap_or_else(PoisonError::into_inner);
        (std::mem::take(&mut state.errors), std::mem::take(&mut state.found))
    }

    /// Like `wait`, until `deadline`. None: the deadline passed first.
    pub fn wait_until(&self, deadline: Instant) -> Option<Vec<Option<Errno>>> {
        let state = lock(&self.state);
        let left = deadline.saturating_duration_since(Instant::now());
        let (mut state, timeout) =
            self.all.wait_timeout_while(state, left, |s| s.left > 0).unwrap_or_else(PoisonError::into_inner);
        (!timeout.timed_out()).then(|| std::mem::take(&mut state.errors))
    }
}
