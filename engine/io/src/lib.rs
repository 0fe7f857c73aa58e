//! Memory, files and io_uring: the only unsafe code below the Python bindings.
//!
//! `Slice` and `Source` point to memory that is borrowed, or that the caller promises to keep. `Buffer`, `Region` and
//! `BounceBuffer` own memory. `Registered` is a buffer that only a ring can access. `File` moves bytes between memory
//! and a file descriptor, without waiting or blocking. `Ring` moves bytes asynchronously. `CommandRing` sends commands
//! to a driver, which fills and empties memory. `GuestMemory` and `SharedMemory` are memory of other programs, `Signal` an
//! eventfd of another program. `Process` detects a fork.
//!
//! This crate starts no threads and does not know devices or requests. Errors are errnos. Errors without a caller to
//! return to are `tracing` events.

mod bounce;
mod buffer;
mod command_ring;
mod durability;
mod file;
mod fork;
mod guest_memory;
mod mapping;
mod memory;
mod range_lock;
mod region;
mod registered;
mod ring;
mod signal;

pub use bounce::BounceBuffer;
pub use buffer::{Buffer, BufferPool};
pub use command_ring::{Arrival, CommandRing};
pub use durability::Syncing;
pub use file::{Busy, File, FileError, FileExtent, Inline, InlinePolicy, Scratch};
pub use fork::Process;
pub use guest_memory::{GuestMemory, GuestMemoryError, GuestRegion, SharedMemory, Sharer};
pub use mapping::ReadOnlyMapping;
pub use memory::{Ahead, Slice, Source};
pub use range_lock::{RangeGuard, RangeLock};
pub use region::{Region, RegionError};
pub use registered::Registered;
pub use ring::{Completion, Ring};
pub use rustix::io::Errno;
pub use signal::Signal;
