//! `BounceBuffer`: memory that the CPU can access and that is also a file (a mapped memfd).
//!
//! io_uring cannot copy between two memory ranges. So the bytes of a registered buffer are copied by a read or write
//! between the registered buffer and this file.

use std::sync::Arc;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use crate::file::{File, FileError};
use crate::mapping::Mapping;
use crate::memory::Slice;

/// A mapped memfd.
pub struct BounceBuffer {
    file: Arc<File>,
    mapping: Mapping,
}

impl BounceBuffer {
    /// Creates a buffer of at least `len` bytes.
    pub fn new(len: usize) -> Result<BounceBuffer, FileError> {
        let len = len.max(1).next_power_of_two().max(4096);
        let fd = memfd_create("blkloom-bounce", MemfdFlags::CLOEXEC).map_err(|e| FileError::Os("memfd_create", e))?;
        ftruncate(&fd, len as u64).map_err(|error| FileError::Os("ftruncate", error))?;
        let mapping = Mapping::new(&fd, len).map_err(|error| FileError::Os("mmap", error))?;
        Ok(BounceBuffer { file: Arc::new(File::new(fd, true, false, "a bounce buffer".into())?), mapping })
    }

    /// The memfd, for transfers of a ring.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    pub fn len(&self) -> usize {
        self.mapping.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The memory, without a borrow.
    ///
    /// # Safety
    /// The buffer is kept until the last use of the result.
    pub unsafe fn promised(&self) -> Slice<'static> {
        // SAFETY: promised by the caller.
        unsafe { self.mapping.promised() }
    }
}
