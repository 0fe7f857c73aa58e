//! Filters: rules of a filtered extent (`Extent::Filtered`). Before an operation reaches the extent behind it, the filter
//! lets it pass, delays it, fails it, drops it, or sends it to another extent.
//!
//! The walk of a request asks the filter, on the thread of an event loop or of a caller. A filter never waits and does no
//! I/O. A piece that waited in a filter passes it afterwards, and so does one that waited in a filter behind it. After a
//! suspend the filter is asked again. Block status and prefetches are not filtered.

mod bad_blocks;
mod delay;
mod errors;
mod flakey;
mod switch;
mod throttle;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use blkloom_io::Errno;

pub use bad_blocks::BadBlocks;
pub use delay::Delay;
pub use errors::{CERTAIN, Errors, Operations};
pub use flakey::Flakey;
pub use switch::{Switch, Treatment};
#[cfg(all(loom, test))]
pub(crate) use throttle::Bucket;
pub use throttle::{Limit, Per, Throttle};

use crate::stats::Op;

/// What happens to a piece of a request.
#[derive(Debug)]
pub enum Verdict {
    /// It goes to the extent behind the filter.
    Pass,
    /// It waits, and then goes to the extent behind the filter. The counter counts it meanwhile.
    Wait(Duration, Option<Counted>),
    Fail(Errno),
    /// It succeeds and has no effect. Only for operations that change data.
    Drop,
    /// It goes to the third extent of the filtered one.
    Elsewhere,
}

/// Whether the filter may be asked about the same piece again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Asked {
    /// It is not: `Pass` and `Wait` change the filter (a throttle counts the piece).
    Once,
    /// It is if the verdict is `Wait`, or if the extent behind the filter makes the piece wait: neither `Pass` nor `Wait`
    /// changes the filter. If the piece has passed without a wait, `Filter::passed` is called.
    Tentatively,
}

pub trait Filter: Send + Sync {
    /// The verdict on a read, write, discard or write-zeroes of `len` bytes (> 0) from `at` on, an offset in the filtered
    /// range; and the number of bytes that it is for, 1 to `len`.
    fn decide(&self, op: Op, at: u64, len: u64, asked: Asked) -> (Verdict, u64);

    /// Whether a read that has passed and then fails goes to the third extent instead: the whole request is read again.
    fn retries_elsewhere(&self) -> bool {
        false
    }

    /// The errno of a flush that the filter fails.
    fn fails_flush(&self) -> Option<Errno> {
        None
    }

    /// A piece that may pass, as the filter has said when asked tentatively, has been executed.
    fn passed(&self, _op: Op, _at: u64, _len: u64) {}
}

/// Counts one waiting piece until it is dropped.
#[derive(Debug)]
pub struct Counted(Arc<AtomicUsize>);

impl Counted {
    pub fn new(counter: &Arc<AtomicUsize>) -> Counted {
        counter.fetch_add(1, Ordering::Relaxed);
        Counted(counter.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
