//! Devices, requests and the loops that execute them.
//!
//! A request makes one pass: an export or a caller (`nbd`, `call`) asks a `Device`; what can be done
//! at once is (`now`); the rest goes to a loop's `Queue`, which looks places up, moves bytes through
//! io_uring or the thread `Pool`, parks faults and completes the request as one. Threads here never
//! call Python. Lookups take no lock; a device's `Epochs` say when an old map is out of use.

mod budget;
mod call;
mod copy;
mod device;
mod engine;
mod epoch;
mod fault;
mod held;
mod inbox;
mod io_errors;
mod looper;
mod nbd;
mod notice;
mod now;
mod pool;
mod queue;
mod request;
mod stacking;
mod stats;
mod turn;

pub use budget::MemoryUse;
pub use call::{Batch, Direction, Transfer};
pub use copy::copy;
pub use device::{Device, Export, Kinds, Map, Mapping, SuspendError};
pub use engine::{ConnectionHandle, Engine, EngineError, IoChoice, NbdSession};
pub use fault::{Answer, Fault};
pub use io_errors::{IoError, IoErrors, News};
pub use nbd::{Selected, Session, Skipping, Unfinished};
pub use notice::{Notice, Notices, Outcome};
pub use request::{Context, Flags, Found, Memory, Owner, Request, Waiter, context};
pub use stats::{Op, Shard, Stats, Totals};

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks a mutex whose data no panic can leave half-changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
