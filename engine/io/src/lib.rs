//! Memory, files and rings: the only unsafe code below the Python glue.
//!
//! Roles: `Slice` is a promise that some memory stays valid; `Buffer` and `Region` are memory;
//! `File` moves bytes between memory and a descriptor, at once or blocking; `Ring` moves them later; `Process` tells a
//! fork from the process that something was made in.
//! No thread is started here and nothing here knows of devices or requests. Errors are errnos.

mod buffer;
mod durability;
mod file;
mod fork;
mod memory;
mod range_lock;
mod region;
mod ring;

pub use buffer::{Buffer, BufferPool};
pub use durability::Syncing;
pub use file::{Busy, File, FileError, Inline, InlinePolicy, Stretch};
pub use fork::Process;
pub use memory::Slice;
pub use range_lock::{RangeGuard, RangeLock};
pub use region::{Region, RegionError};
pub use ring::{Completion, Ring};

/// An errno as the kernel numbers them.
pub type Errno = i32;

pub mod errno {
    pub const EPERM: i32 = 1;
    pub const EIO: i32 = 5;
    pub const EAGAIN: i32 = 11;
    pub const EINVAL: i32 = 22;
    pub const ENOSPC: i32 = 28;
    pub const EROFS: i32 = 30;
    pub const EOPNOTSUPP: i32 = 95;
    pub const ESHUTDOWN: i32 = 108;
    pub const ETIMEDOUT: i32 = 110;
    pub const EDQUOT: i32 = 122;
}
