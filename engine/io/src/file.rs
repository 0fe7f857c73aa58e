//! A file or block device and how to move bytes to and from it.
//!
//! Three ways: *now* (RWF_NOWAIT, or plain on file systems that are memory), *blocking* (for pool
//! threads and synchronous callers), and *later* (`Ring`). A transfer is never silently short: an end
//! of file met inside the device is EIO, for the table promised those bytes and somebody truncated
//! the file. Direct files accept any alignment: what does not fit goes through `blocking`, which
//! reads, modifies and writes whole blocks under a range lock. Once a sync has failed, all later ones do
//! (`durability`).

use std::io::{IoSlice, IoSliceMut};
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rustix::fs::{
    self, Advice, AtFlags, FallocateFlags, FileType, SeekFrom, StatxFlags, fadvise, fallocate, fdatasync, fstat,
    fstatfs, seek, statx,
};
use rustix::io::{Errno as Os, ReadWriteFlags, preadv2, pwritev2};

use crate::Errno;
use crate::buffer::{ALIGNMENT, Buffer};
use crate::durability::{Durability, Syncing};
use crate::errno::{EAGAIN, EIO, EOPNOTSUPP};
use crate::memory::Slice;
use crate::range_lock::{RangeGuard, RangeLock};

/// Logical blocks of block devices are no larger.
const LARGEST_BLOCK: u64 = 4096;
/// Times a range may be made dirty again by others while it is being cleaned.
const MOST_BUSY: u32 = 8;
const TMPFS_MAGIC: u64 = 0x0102_1994;
const RAMFS_MAGIC: u64 = 0x8584_58f6;
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// How a file is met first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum InlinePolicy {
    /// Memory in all but name: plain reads and writes do not wait for a device.
    Always,
    /// Buffered reads are tried with RWF_NOWAIT.
    Nowait,
    /// Direct I/O waits for the device by nature.
    Never,
}

#[derive(Debug)]
pub enum FileError {
    NotAFile,
    Os(&'static str, Os),
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

/// The outcome of trying at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Inline {
    Done,
    /// So many bytes were moved; the rest would wait.
    Wait(usize),
    Failed(Errno),
}

/// A run of a file: data, or a hole that reads as zeros.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stretch {
    pub len: u64,
    pub hole: bool,
}

pub struct File {
    fd: OwnedFd,
    label: String,
    writable: bool,
    direct: bool,
    block_device: bool,
    policy: InlinePolicy,
    /// Cleared when the file system turns out not to know RWF_NOWAIT for this direction.
    nowait_read: AtomicBool,
    nowait_write: AtomicBool,
    /// The file may have holes: it had some, or some were punched here.
    holes: AtomicBool,
    offset_alignment: u64,
    memory_alignment: u64,
    blocks: Arc<RangeLock>,
    busy: AtomicUsize,
    durability: Durability,
}

/// Counts as one of the file's operations that storage has not answered, until it is dropped.
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
        // Where the kernel says that it cannot be, O_DIRECT is accepted and not heeded.
        let alignment = if direct { alignment(fd.as_fd(), block_device) } else { None };
        let (direct, (memory_alignment, offset_alignment)) = (alignment.is_some(), alignment.unwrap_or((1, 1)));
        // A write that must allocate may wait even under NOWAIT, or fail half-way: only files that
        // have all their blocks are tried.
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

    /// Operations that storage has not answered; not those that are tried at once.
    pub fn in_flight(&self) -> usize {
        self.busy.load(Ordering::Relaxed)
    }

    pub(crate) fn durability(&self) -> &Durability {
        &self.durability
    }

    /// The errno of the sync that failed: from then on all fail, for what was written before may be lost.
    pub fn sync_error(&self) -> Option<Errno> {
        self.durability.error()
    }

    /// A sync has failed, here or in a former process that had the same open file description; or what was written to
    /// this file is lost for another reason.
    pub fn fail_syncs(&self, errno: Errno) {
        self.durability.fail(errno);
    }

    /// A sync has failed, and whoever must remember that has not been told yet (`set_failure_reported`).
    pub fn has_unreported_failure(&self) -> bool {
        self.durability.is_unreported()
    }

    pub fn set_failure_reported(&self) {
        self.durability.set_reported();
    }

    /// Bytes, now.
    pub fn size(&self) -> Result<u64, Errno> {
        if self.block_device {
            return seek(&self.fd, SeekFrom::End(0)).map_err(|error| error.raw_os_error());
        }
        fstat(&self.fd).map(|stat| stat.st_size as u64).map_err(|error| error.raw_os_error())
    }

    /// Whether a flush of this file has anything to do.
    pub fn needs_sync(&self) -> bool {
        self.writable && self.policy != InlinePolicy::Always
    }

    pub fn may_have_holes(&self) -> bool {
        self.holes.load(Ordering::Relaxed)
    }

    /// Whether an I/O may be handed to the kernel as it is.
    pub fn fits(&self, offset: u64, memory: Slice) -> bool {
        !self.direct
            || ((offset | memory.len() as u64).is_multiple_of(self.offset_alignment)
                && (memory.address() as u64).is_multiple_of(self.memory_alignment))
    }

    /// Writers of a direct file share its blocks; None when a read-modify-write holds one of them.
    pub fn share_blocks(&self, offset: u64, len: u64) -> Option<Option<RangeGuard>> {
        if !self.direct {
            return Some(None);
        }
        self.blocks.try_lock(offset, offset + len, false).map(Some)
    }

    pub fn read_now(&self, offset: u64, into: Slice) -> Inline {
        let flags = match self.policy {
            InlinePolicy::Always => ReadWriteFlags::empty(),
            InlinePolicy::Nowait if self.nowait_read.load(Ordering::Relaxed) => ReadWriteFlags::NOWAIT,
            _ => return Inline::Wait(0),
        };
        let mut done = 0;
        while done < into.len() {
            match self.read_once(offset + done as u64, into.part(done, into.len() - done), flags) {
                Ok(0) => return Inline::Failed(EIO),
                Ok(n) => done += n,
                Err(Os::INTR) => {}
                Err(error) => return self.would_wait(error, &self.nowait_read, done),
            }
        }
        Inline::Done
    }

    pub fn write_now(&self, offset: u64, from: Slice) -> Inline {
        let flags = match self.policy {
            InlinePolicy::Always => ReadWriteFlags::empty(),
            InlinePolicy::Nowait if self.nowait_write.load(Ordering::Relaxed) => ReadWriteFlags::NOWAIT,
            _ => return Inline::Wait(0),
        };
        let mut done = 0;
        while done < from.len() {
            match self.write_once(offset + done as u64, from.part(done, from.len() - done), flags) {
                Ok(0) => return Inline::Failed(EIO),
                Ok(n) => done += n,
                Err(Os::INTR) => {}
                Err(error) => return self.would_wait(error, &self.nowait_write, done),
            }
        }
        Inline::Done
    }

    fn would_wait(&self, error: Os, nowait: &AtomicBool, done: usize) -> Inline {
        match error.raw_os_error() {
            EAGAIN => Inline::Wait(done),
            EOPNOTSUPP if self.policy == InlinePolicy::Nowait => {
                nowait.store(false, Ordering::Relaxed);
                Inline::Wait(done)
            }
            errno => Inline::Failed(errno),
        }
    }

    /// Reads all of `into`, however long it takes and however it is aligned.
    pub fn read(&self, offset: u64, into: Slice) -> Result<(), Errno> {
        if self.fits(offset, into) {
            return self.read_whole(offset, into);
        }
        let hull = self.hull(offset, into.len() as u64);
        let bounce = Buffer::new((hull.1 - hull.0) as usize);
        // SAFETY: `bounce` outlives the call and is borrowed by nobody meanwhile.
        let memory = unsafe { bounce.slice() };
        let needed = offset - hull.0 + into.len() as u64;
        self.read_at_least(hull.0, memory, needed as usize)?;
        into.copy_from(&bounce.bytes()[(offset - hull.0) as usize..needed as usize]);
        Ok(())
    }

    /// Writes all of `from`; `durable` as if followed by fdatasync.
    pub fn write(&self, offset: u64, from: Slice, durable: bool) -> Result<(), Errno> {
        if !durable {
            return self.write_with(offset, from, ReadWriteFlags::empty());
        }
        if let Some(errno) = self.sync_error() {
            return Err(errno);
        }
        let syncing = Syncing::new(self);
        if let Err(errno) = self.write_with(offset, from, ReadWriteFlags::DSYNC) {
            self.examine(offset, from, errno, syncing);
            return Err(errno);
        }
        self.sync_error().map_or(Ok(()), Err)
    }

    /// A durable write has failed: finds out whether the write or the sync in it has, by writing once more without a
    /// sync. What storage takes now it took then, too.
    pub fn examine<F: Deref<Target = File>>(&self, offset: u64, from: Slice, errno: Errno, _syncing: Syncing<F>) {
        match self.write_with(offset, from, ReadWriteFlags::empty()) {
            // A direct write meets the device itself, and a cached one only space and limits. Where a cached one has
            // met an error of the device, the pages of others may be lost with it.
            Err(again) if self.direct || again == errno && errno != EIO => {}
            _ => self.fail_syncs(errno),
        }
    }

    fn write_with(&self, offset: u64, from: Slice, flags: ReadWriteFlags) -> Result<(), Errno> {
        if self.fits(offset, from) {
            let _shared = self.direct.then(|| self.blocks.lock(offset, offset + from.len() as u64, false));
            return self.write_whole(offset, from, flags);
        }
        let hull = self.hull(offset, from.len() as u64);
        let _alone = self.alone(hull)?;
        let bounce = Buffer::new((hull.1 - hull.0) as usize);
        // SAFETY: `bounce` outlives the calls and is borrowed by nobody meanwhile.
        let memory = unsafe { bounce.slice() };
        let (at, block) = ((offset - hull.0) as usize, self.offset_alignment);
        // Only the first and the last block keep old bytes. Past the end of the file there are none.
        let edges = if memory.len() as u64 <= 2 * block {
            vec![(hull.0, memory)]
        } else {
            let last = memory.len() - block as usize;
            vec![(hull.0, memory.part(0, block as usize)), (hull.0 + last as u64, memory.part(last, block as usize))]
        };
        for (offset, memory) in edges {
            self.read_at_least(offset, memory, 0)?;
        }
        memory.part(at, from.len()).copy_from_slice(from);
        self.write_hull(hull, offset + from.len() as u64, memory, flags)
    }

    /// Writes whole blocks, of which the bytes before `end` count: a file that ends inside the last
    /// of them does not grow past what was written or was there.
    fn write_hull(&self, hull: (u64, u64), end: u64, memory: Slice, flags: ReadWriteFlags) -> Result<(), Errno> {
        let size = if self.block_device { u64::MAX } else { self.size()?.max(end) };
        self.write_whole(hull.0, memory, flags)?;
        if size < hull.1 {
            return fs::ftruncate(&self.fd, size).map_err(|error| error.raw_os_error());
        }
        Ok(())
    }

    /// Keeps all other writers out of some blocks; out of all that follows, too, where the file ends
    /// inside them: `write_hull` will cut it there, and must not cut what others append meanwhile.
    fn alone(&self, hull: (u64, u64)) -> Result<RangeGuard, Errno> {
        let guard = self.blocks.lock(hull.0, hull.1, true);
        if self.block_device || self.size()? >= hull.1 {
            return Ok(guard);
        }
        drop(guard);
        Ok(self.blocks.lock(hull.0, u64::MAX, true))
    }

    fn hull(&self, offset: u64, len: u64) -> (u64, u64) {
        let block = self.offset_alignment;
        (offset / block * block, (offset + len).div_ceil(block) * block)
    }

    fn read_whole(&self, offset: u64, into: Slice) -> Result<(), Errno> {
        self.read_at_least(offset, into, into.len())
    }

    /// Reads up to `into.len()` bytes; an end of file before `least` is EIO.
    fn read_at_least(&self, offset: u64, into: Slice, least: usize) -> Result<(), Errno> {
        let mut done = 0;
        while done < into.len() {
            match self.read_once(offset + done as u64, into.part(done, into.len() - done), ReadWriteFlags::empty()) {
                Ok(0) if done >= least => break,
                Ok(0) => return Err(EIO),
                Ok(n) => done += n,
                Err(Os::INTR) => {}
                Err(error) => return Err(error.raw_os_error()),
            }
            // A direct read stops inside a block only at the end of the file; going on from there
            // would be unaligned.
            if self.direct && !(done as u64).is_multiple_of(self.offset_alignment) {
                return if done >= least { Ok(()) } else { Err(EIO) };
            }
        }
        Ok(())
    }

    fn write_whole(&self, offset: u64, from: Slice, flags: ReadWriteFlags) -> Result<(), Errno> {
        let mut done = 0;
        while done < from.len() {
            match self.write_once(offset + done as u64, from.part(done, from.len() - done), flags) {
                Ok(0) => return Err(EIO),
                Ok(n) => done += n,
                Err(Os::INTR) => {}
                Err(error) => return Err(error.raw_os_error()),
            }
        }
        Ok(())
    }

    fn read_once(&self, offset: u64, into: Slice, flags: ReadWriteFlags) -> Result<usize, Os> {
        // SAFETY: valid and writable (see Slice::new); the borrow lasts for one system call, during
        // which only the kernel touches the bytes through it.
        let bytes = unsafe { std::slice::from_raw_parts_mut(into.ptr(), into.len()) };
        preadv2(&self.fd, &mut [IoSliceMut::new(bytes)], offset, flags)
    }

    fn write_once(&self, offset: u64, from: Slice, flags: ReadWriteFlags) -> Result<usize, Os> {
        // SAFETY: valid (see Slice::new); the borrow lasts for one system call, which copies.
        let bytes = unsafe { std::slice::from_raw_parts(from.ptr(), from.len()) };
        pwritev2(&self.fd, &[IoSlice::new(bytes)], offset, flags)
    }

    /// fdatasync. Fails for ever once it has failed, or a durable write's sync.
    pub fn sync(&self) -> Result<(), Errno> {
        if let Some(errno) = self.sync_error() {
            return Err(errno);
        }
        let syncing = Syncing::new(self);
        loop {
            match fdatasync(&self.fd) {
                Ok(()) => break,
                Err(Os::INTR) => {}
                Err(error) => {
                    self.fail_syncs(error.raw_os_error());
                    break;
                }
            }
        }
        drop(syncing);
        self.durability.wait_for_others();
        self.sync_error().map_or(Ok(()), Err)
    }

    /// Gives the range's blocks back. A hint: where holes cannot be punched it does nothing.
    pub fn punch(&self, offset: u64, len: u64) -> Result<(), Errno> {
        let _alone = self.exclude(offset, len)?;
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match self.allocate(mode, offset, len) {
            Err(EOPNOTSUPP) if self.block_device => {
                // Whole blocks only; a discard may leave the rest as it is.
                let (first, last) = (offset.next_multiple_of(LARGEST_BLOCK), (offset + len) & !(LARGEST_BLOCK - 1));
                let inner = if first < last { self.allocate(mode, first, last - first) } else { Ok(()) };
                inner.or_else(|errno| if errno == EOPNOTSUPP { Ok(()) } else { Err(errno) })
            }
            Err(EOPNOTSUPP) => Ok(()),
            other => other,
        }
    }

    /// Makes the range read as zeros. unmap: blocks may be given back; otherwise they stay allocated.
    /// fast: EOPNOTSUPP rather than writing zeros.
    pub fn zero(&self, offset: u64, len: u64, unmap: bool, fast: bool) -> Result<(), Errno> {
        let _alone = self.exclude(offset, len)?;
        if unmap {
            match self.allocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len) {
                Err(EOPNOTSUPP) => {}
                other => return other,
            }
        }
        match self.allocate(FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, offset, len) {
            Err(EOPNOTSUPP) if !fast => {}
            other => return other,
        }
        self.write_zeroes(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), Errno> {
        const CHUNK: u64 = 1 << 20;
        const PAGE: u64 = ALIGNMENT as u64;
        let mut done = 0;
        let zeroes = Buffer::new((offset % PAGE).saturating_add(len).min(CHUNK) as usize);
        // SAFETY: `zeroes` outlives the writes and is borrowed by nobody meanwhile.
        let memory = unsafe { zeroes.slice() };
        while done < len {
            // As it lies in the file's pages: where a page of memory ends, the kernel may stop to fetch the next
            // one, and what is in the file by then may reach the disk alone. That must not be half a sector.
            let start = (offset + done) % PAGE;
            let part = memory.part(start as usize, (len - done).min(CHUNK - start) as usize);
            if self.fits(offset + done, part) {
                self.write_whole(offset + done, part, ReadWriteFlags::empty())?;
            } else {
                self.write_edges(offset + done, part)?;
            }
            done += part.len() as u64;
        }
        Ok(())
    }

    /// An unaligned write by somebody who already excludes the range.
    fn write_edges(&self, offset: u64, from: Slice) -> Result<(), Errno> {
        let hull = self.hull(offset, from.len() as u64);
        let bounce = Buffer::new((hull.1 - hull.0) as usize);
        // SAFETY: `bounce` outlives the calls and is borrowed by nobody meanwhile.
        let memory = unsafe { bounce.slice() };
        self.read_at_least(hull.0, memory, 0)?;
        memory.part((offset - hull.0) as usize, from.len()).copy_from_slice(from);
        self.write_hull(hull, offset + from.len() as u64, memory, ReadWriteFlags::empty())
    }

    fn exclude(&self, offset: u64, len: u64) -> Result<Option<RangeGuard>, Errno> {
        self.direct.then(|| self.alone(self.hull(offset, len))).transpose()
    }

    fn allocate(&self, mode: FallocateFlags, offset: u64, len: u64) -> Result<(), Errno> {
        if mode.contains(FallocateFlags::PUNCH_HOLE) {
            self.holes.store(true, Ordering::Relaxed);
            // Writes may have to allocate from now on: see `new`.
            self.nowait_write.store(false, Ordering::Relaxed);
        }
        let mut busy = 0;
        loop {
            match fallocate(&self.fd, mode, offset, len) {
                Ok(()) => return Ok(()),
                Err(Os::INTR) => {}
                // Somebody (we, elsewhere) has the block device exclusively open, and the range has
                // dirty pages: the kernel drops clean ones only.
                Err(Os::BUSY) if self.block_device && busy < MOST_BUSY => {
                    busy += 1;
                    self.sync()?;
                }
                Err(Os::BUSY) if self.block_device => return Err(EOPNOTSUPP),
                // A block device says EINVAL to a range that cuts a logical block.
                Err(Os::INVAL) if self.block_device => return Err(EOPNOTSUPP),
                Err(Os::NOSYS | Os::NODEV) => return Err(EOPNOTSUPP),
                Err(error) => return Err(error.raw_os_error()),
            }
        }
    }

    /// Data and holes from `offset` on, `most` stretches at most (the last may end before the range).
    pub fn stretches(&self, offset: u64, len: u64, most: usize) -> Result<Vec<Stretch>, Errno> {
        let whole = |hole| vec![Stretch { len, hole }];
        if self.block_device {
            return Ok(whole(false));
        }
        let end = offset + len;
        let (mut at, mut found) = (offset, Vec::new());
        while at < end && found.len() < most {
            match seek(&self.fd, SeekFrom::Data(at)) {
                Ok(data) if data > at => {
                    found.push(Stretch { len: data.min(end) - at, hole: true });
                    at = data;
                }
                Ok(_) => match seek(&self.fd, SeekFrom::Hole(at)) {
                    Ok(hole) if hole > at => {
                        found.push(Stretch { len: hole.min(end) - at, hole: false });
                        at = hole;
                    }
                    Ok(_) => {} // changed between the two calls: look again
                    Err(Os::NXIO) => found.push(Stretch { len: end - std::mem::replace(&mut at, end), hole: true }),
                    Err(error) => return Err(error.raw_os_error()),
                },
                Err(Os::NXIO) => found.push(Stretch { len: end - std::mem::replace(&mut at, end), hole: true }),
                Err(Os::INVAL) => return Ok(whole(false)), // the file system cannot tell
                Err(error) => return Err(error.raw_os_error()),
            }
        }
        Ok(found)
    }

    /// Starts reading a range into the page cache.
    pub fn prefetch(&self, offset: u64, len: u64) -> Result<(), Errno> {
        if self.direct {
            return Ok(());
        }
        fadvise(&self.fd, offset, std::num::NonZeroU64::new(len), Advice::WillNeed)
            .map_err(|error| error.raw_os_error())
    }
}

/// (memory, offset) alignment of direct I/O in bytes: what statx(STATX_DIOALIGN) says, or what is
/// safe everywhere where the kernel or the file system does not say. None: it says that there is none.
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
