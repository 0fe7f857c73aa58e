//! I/O errors of one device: a counter, the last one, and what is new for the log, of bounded size.
//!
//! An error counts where a request ends because storage failed it, or the target that was asked; on the device
//! that the request came to, not on those below. What a client asked for and may not have (a range past the end, a
//! write to what is read-only) is none, nor is what a table promises to fail. Any thread; the lock is taken for errors
//! only.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use blkloom_io::errno::{EINVAL, EOPNOTSUPP, EPERM, EROFS, ESHUTDOWN};

use crate::lock;
use crate::stats::Op;

/// Kinds of new errors (operation, errno and file) that are told apart; others are counted.
const MOST_KINDS: usize = 8;

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct IoError {
    pub op: Op,
    /// Bytes from the start of the device.
    pub offset: u64,
    pub errno: i32,
    /// The path of the file that failed; "" where a target answered so.
    pub file: String,
}

/// What has come since it was last taken.
#[derive(Default, PartialEq, Eq, Debug)]
pub struct News {
    /// The last of each kind, and how many there were.
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
    /// Whether whoever takes the news must be told that there are some.
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

    /// Whether `take` has something.
    pub fn waiting(&self) -> bool {
        self.waiting.load(Ordering::Relaxed)
    }

    pub fn take(&self) -> News {
        let mut state = lock(&self.state);
        self.waiting.store(false, Ordering::Relaxed);
        std::mem::take(&mut state.news)
    }
}

/// Whether a request that storage has answered so has failed for a reason of storage's.
pub(crate) fn is_of_storage(errno: i32) -> bool {
    !matches!(errno, EOPNOTSUPP | ESHUTDOWN)
}

/// The same of a target's answer, which may also be about what was asked.
pub(crate) fn is_of_target(errno: i32) -> bool {
    is_of_storage(errno) && !matches!(errno, EROFS | EPERM | EINVAL)
}
