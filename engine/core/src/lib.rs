//! Devices, requests, and the event loops that execute requests.
//!
//! A `Transport` or an in-process caller (`call`) sends a request to a `Device`. The fast path (`fast_path`) executes
//! the part that does not wait. The rest goes to a loop's `Queue`, which looks up the map, moves bytes through io_uring
//! or the thread `Pool`, sends faults to the mapper, and completes the request. Threads of this crate never call
//! Python. Lookups take no lock; a device's `Epochs` tell when an old map is no longer used.

mod backend;
mod backend_queue;
mod bounds;
mod budget;
mod call;
mod clock;
mod copy;
mod deadline_mutex;
mod deferred;
mod device;
mod device_copy;
mod driven;
mod engine;
mod epoch;
mod event;
mod event_loop;
pub mod fast_path;
mod fault;
pub mod filter;
mod generations;
mod io_errors;
pub mod log;
mod mailbox;
#[cfg(all(loom, test))]
mod models;
pub mod nbd_client;
mod notice;
mod operation;
mod pool;
mod queue;
mod request;
mod semantics;
mod stacking;
mod stats;
mod sync;
mod tee;
mod transport;
mod wake;

pub use backend::{Backend, Limits, Operation, OperationId};
pub use backend_queue::{BackendQueue, Taken};
pub use bounds::OutOfBounds;
pub use budget::{Account, Budget, Kept, MemoryUse, Need, Reservation, Waiting};
pub use call::{Direction, Transfer};
pub use copy::copy;
pub use device::{Device, Export, Kinds, Map, Mapping, SuspendError, SwapError};
pub use device_copy::{Counts, DeviceCopy, End, Failure, Plan, Purpose, Side, Zeroes};
pub use engine::{Engine, EngineError, IoChoice, TransportHandle};
pub use fault::{Answer, Fault};
pub use io_errors::{IoError, IoErrors, News};
pub use notice::{Notice, Notices, Outcome, Recipient};
pub use operation::{Context, Flags, Found, context};
pub use queue::Ended;
pub use request::{Memory, OwnedBuffer, Owner, Request, TransportId, Waiter};
pub use stats::{Op, Shard, Stats, Totals};
pub use tee::Tee;
pub use transport::{Arena, LoopContext, Status, Transport, fuse, nbd, ublk, vhost_user};

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks a mutex whose data no panic can leave half-changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
