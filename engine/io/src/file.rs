//! `File`: an open regular file or block device, and the operations on it.
//!
//! There are three ways to transfer bytes: without waiting (RWF_NOWAIT, or plain I/O on tmpfs), blocking (for pool
//! threads and synchronous callers), and asynchronously (`Ring`). A transfer is never silently short: an end of file
//! inside the device is EIO, because the file was truncated below the size that the table needs. A file with O_DIRECT
//! accepts any alignment: unaligned I/O is blocking, and reads, modifies and writes whole blocks under a range lock
//! (`unaligned`). After a failed sync all later syncs fail (`durability`).

mod allocate;
mod transfer;
mod unaligned;

use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rustix::fs::{self, AtFlags, FileType, SeekFrom, StatxFlags, fstat, fstatfs, seek, statx};
use rustix::io::Errno;

pub use self::allocate::FileExtent;
pub use self::unaligned::Scratch;
use crate::durability::Durability;
use crate::memory::Source;
use crate::range_lock::{RangeGuard, RangeLock};
use crate::registered::Registered;

const TMPFS_MAGIC: u64 = 0x0102_1994;
const RAMFS_MAGIC: u64 = 0x8584_58f6;
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// Whether I/O on a file is first tried without waiting.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum InlinePolicy {
    /// tmpfs and similar: plain reads and writes never wait for a device.
    Always,
    /// Buffered I/O is tried with RWF_NOWAIT.
    Nowait,
    /// Direct I/O always waits for the device.
    Never,
}

#[derive(Debug)]
pub enum FileError {
    NotAFile,
    Os(&'static str, Errno),
}

impl std::fmt::Display for FileError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            FileError::NotAFile => write!(f, "neither a regular file nor a block device"),
            FileError::Os(call, error) => write!(f, "{call}: {error}"),
        }
    }
}

impl std::error::Error for FileError {}

/// The result of I/O without waiting.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Inline {
    Done,
    /// This many bytes were transferred. The rest would wait.
    Wait(usize),
    Failed(Errno),
}

/// An open regular file or block device.
pub struct File {
    fd: OwnedFd,
    label: String,
    writable: bool,
    direct: bool,
    block_device: bool,
    policy: InlinePolicy,
    /// Cleared when the file system does not support RWF_NOWAIT for this direction.
    nowait_read: AtomicBool,
    nowait_write: AtomicBool,
    /// The file may have holes: it had some when it was opened, or some were punched here.
    holes: AtomicBool,
    offset_alignment: u64,
    memory_alignment: u64,
    /// The locked blocks of a direct file.
    blocks: Arc<RangeLock>,
    busy: AtomicUsize,
    durability: Durability,
}

/// Counts one operation in flight on the file until it is dropped.
pub struct Busy<F: Deref<Target = File>>(F);

impl<F: Deref<Target = File>> Busy<F> {
    pub fn new(file: F) -> Busy<F> {
        file.busy.fetch_add(1, Ordering::Relaxed);
        Busy(file)
    }
}

impl<F: Deref<Target = File>> Deref for Busy<F> {
    type Target = F;

    fn deref(&self) -> &F {
        &self.0
    }
}

impl<F: Deref<Target = File>> Drop for Busy<F> {
    fn drop(&mut self) {
        self.0.busy.fetch_sub(1, Ordering::Relaxed);
    }
}

impl File {
    pub fn new(fd: OwnedFd, writable: bool, direct: bool, label: String) -> Result<File, FileError> {
        let stat = fstat(&fd).map_err(|error| FileError::Os("fstat", error))?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        let block_device = kind == FileType::BlockDevice;
        if kind != FileType::RegularFile && !block_device {
            return Err(FileError::NotAFile);
        }
        let magic = fstatfs(&fd).map_err(|error| FileError::Os("fstatfs", error))?.f_type as u64;
        let in_memory = !block_device && matches!(magic, TMPFS_MAGIC | RAMFS_MAGIC | HUGETLBFS_MAGIC);
        // If the kernel reports that direct I/O is not supported, O_DIRECT is ignored.
        let alignment = if direct { alignment(fd.as_fd(), block_device) } else { None };
        let (direct, (memory_alignment, offset_alignment)) = (alignment.is_some(), alignment.unwrap_or((1, 1)));
        // A write that must allocate blocks may wait in spite of NOWAIT, or fail half-way. So NOWAIT is used only for
        // files with all blocks allocated.
        let allocated = block_device || stat.st_blocks as u64 * 512 >= stat.st_size as u64;
        let policy = match (direct, in_memory) {
            (true, _) => InlinePolicy::Never,
            (false, true) => InlinePolicy::Always,
            (false, false) => InlinePolicy::Nowait,
        };
        Ok(File {
            fd,
            label,
            writable,
            direct,
            block_device,
            policy,
            nowait_read: AtomicBool::new(policy == InlinePolicy::Nowait),
            holes: AtomicBool::new(!allocated),
            nowait_write: AtomicBool::new(policy == InlinePolicy::Nowait && allocated),
            offset_alignment,
            memory_alignment,
            blocks: Arc::default(),
            busy: AtomicUsize::new(0),
            durability: Durability::default(),
        })
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub fn label(&self) -> &str {
        &self.label
    }

    pub fn writable(&self) -> bool {
        self.writable
    }

    pub fn direct(&self) -> bool {
        self.direct
    }

    pub fn is_block_device(&self) -> bool {
        self.block_device
    }

    pub fn policy(&self) -> InlinePolicy {
        self.policy
    }

    pub fn offset_alignment(&self) -> u64 {
        self.offset_alignment
    }

    pub fn memory_alignment(&self) -> u64 {
        self.memory_alignment
    }

    /// Number of operations in flight, without those that are tried without waiting.
    pub fn in_flight(&self) -> usize {
        self.busy.load(Ordering::Relaxed)
    }

    pub(crate) fn durability(&self) -> &Durability {
        &self.durability
    }

    /// The errno of the first failed sync. All later syncs fail with it, because bytes written before may be lost.
    pub fn sync_error(&self) -> Option<Errno> {
        self.durability.error()
    }

    /// Makes all later syncs fail: a sync has failed, here or in an earlier process with the same open file
    /// description, or bytes written to this file are lost for another reason.
    pub fn fail_syncs(&self, errno: Errno) {
        self.durability.fail(errno);
    }

    /// Whether a sync has failed and the failure is not stored outside of this process yet (`set_failure_reported`).
    pub fn has_unreported_failure(&self) -> bool {
        self.durability.is_unreported()
    }

    pub fn set_failure_reported(&self) {
        self.durability.set_reported();
    }

    /// Current size in bytes.
    pub fn size(&self) -> Result<u64, Errno> {
        if self.block_device {
            return seek(&self.fd, SeekFrom::End(0));
        }
        fstat(&self.fd).map(|stat| stat.st_size as u64)
    }

    /// Whether a flush of this file has anything to do.
    pub fn needs_sync(&self) -> bool {
        self.writable && self.policy != InlinePolicy::Always
    }

    pub fn may_have_holes(&self) -> bool {
        self.holes.load(Ordering::Relaxed)
    }

    /// Whether offset, address and length are aligned as the file needs.
    pub fn fits(&self, offset: u64, memory: Source<'_>) -> bool {
        self.is_aligned(offset, memory.as_ptr() as usize, memory.len())
    }

    /// Like `fits`, for a registered buffer.
    pub fn fits_registered(&self, offset: u64, memory: Registered) -> bool {
        self.is_aligned(offset, memory.address, memory.len())
    }

    fn is_aligned(&self, offset: u64, address: usize, len: usize) -> bool {
        !self.direct
            || ((offset | len as u64).is_multiple_of(self.offset_alignment)
                && (address as u64).is_multiple_of(self.memory_alignment))
    }

    /// Locks the blocks of an aligned write shared, if the file is direct. None: a read-modify-write has locked one of
    /// them.
    pub fn share_blocks(&self, offset: u64, len: u64) -> Option<Option<RangeGuard>> {
        if !self.direct {
            return Some(None);
        }
        self.blocks.try_lock(offset, offset + len, false).map(Some)
    }
}

/// (memory, offset) alignment of direct I/O in bytes, from statx(STATX_DIOALIGN), or a safe value if the kernel or the
/// file system does not report one. None: the kernel reports that direct I/O is not supported.
fn alignment(fd: BorrowedFd<'_>, block_device: bool) -> Option<(u64, u64)> {
    if let Ok(found) = statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)
        && StatxFlags::from_bits_retain(found.stx_mask).contains(StatxFlags::DIOALIGN)
    {
        let (memory, offset) = (u64::from(found.stx_dio_mem_align), u64::from(found.stx_dio_offset_align));
        return (offset > 0).then_some((memory.max(1), offset));
    }
    if block_device && let Ok(size) = fs::ioctl_blksszget(fd) {
        return Some((u64::from(size), u64::from(size)));
    }
    Some((4096, 4096))
}
