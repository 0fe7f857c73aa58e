//! I/O errors of one device: a counter, the last error, and the new errors for the log. The size is bounded.
//!
//! An error is counted when a request ends because storage or a target failed. It is counted on the device that
//! received the request, not on the devices below. Errors of the client are not counted (a range past the end, a write
//! to a read-only device), nor are ranges that the table makes fail (`error` target). Any thread may record; the lock
//! is taken only for an error.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use blkloom_io::Errno;

use crate::lock;
use crate::stats::Op;

/// Most kinds of new errors (operation, errno and file) that are kept one by one. Errors of further kinds are only
/// counted.
const MOST_KINDS: usize = 8;

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct IoError {
    pub op: Op,
    /// Bytes from the start of the device.
    pub offset: u64,
    pub errno: Errno,
    /// Path of the file that failed. "" if a target returned the error.
    pub file: String,
}

/// Errors since the last `take`.
#[derive(Default, PartialEq, Eq, Debug)]
pub struct News {
    /// The last error of each kind, and the number of errors of that kind.
    pub kinds: Vec<(IoError, u64)>,
    /// Errors of further kinds.
    pub others: u64,
}

#[derive(Default)]
struct State {
    last: Option<IoError>,
    news: News,
}

#[derive(Default)]
pub struct IoErrors {
    count: AtomicU64,
    waiting: AtomicBool,
    state: Mutex<State>,
}

impl IoErrors {
    /// Records an error. Returns whether the reader of `take` must be woken.
    pub(crate) fn record(&self, error: IoError) -> bool {
        let mut state = lock(&self.state);
        self.count.fetch_add(1, Ordering::Relaxed);
        let alike = |known: &IoError| (known.op, known.errno, &known.file) == (error.op, error.errno, &error.file);
        if let Some((known, times)) = state.news.kinds.iter_mut().find(|(known, _)| alike(known)) {
            (known.offset, *times) = (error.offset, *times + 1);
        } else if state.news.kinds.len() < MOST_KINDS {
            state.news.kinds.push((error.clone(), 1));
        } else {
            state.news.others += 1;
        }
        state.last = Some(error);
        !self.waiting.swap(true, Ordering::Relaxed)
    }

    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    pub fn last(&self) -> Option<IoError> {
        lock(&self.state).last.clone()
    }

    /// Whether `take` has errors to return.
    pub fn waiting(&self) -> bool {
        self.waiting.load(Ordering::Relaxed)
    }

    pub fn take(&self) -> News {
        let mut state = lock(&self.state);
        self.waiting.store(false, Ordering::Relaxed);
        std::mem::take(&mut state.news)
    }
}

/// Whether this errno, returned by storage, is an error of storage. "Not supported" and "shut down" are not.
pub(crate) fn is_of_storage(errno: Errno) -> bool {
    !matches!(errno, Errno::OPNOTSUPP | Errno::SHUTDOWN)
}

/// Whether this errno, returned by a target, is an error of storage. A target also rejects requests that are not
/// allowed.
pub(crate) fn is_of_target(errno: Errno) -> bool {
    is_of_storage(errno) && !matches!(errno, Errno::ROFS | Errno::PERM | Errno::INVAL)
}
