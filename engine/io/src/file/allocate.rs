//! Blocks of a file: punched, zeroed, prefetched, and where there are holes. Part of `file`.

use std::io::IoSlice;
use std::sync::atomic::Ordering;

use rustix::fs::{Advice, FallocateFlags, SeekFrom, fadvise, fallocate, seek};
use rustix::io::{Errno, ReadWriteFlags, pwritev2};

use super::File;
use super::unaligned::Scratch;
use crate::buffer::ALIGNMENT;
use crate::range_lock::RangeGuard;

/// Largest logical block size of a block device.
const LARGEST_BLOCK: u64 = 4096;
/// Attempts to write back a range that other writers make dirty again.
const MOST_BUSY: u32 = 8;

/// A run of a file: data, or a hole that reads as zeros.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FileExtent {
    pub len: u64,
    pub hole: bool,
}

#[repr(align(4096))]
struct Zeros([u8; 64 << 10]);

static ZEROS: Zeros = Zeros([0; 64 << 10]);
/// Pieces of `ZEROS` in one write.
const PIECES: usize = 16;

/// `len` zeros or fewer, the first at `skip` of its page.
fn zeros(skip: usize, len: u64) -> [IoSlice<'static>; PIECES] {
    let (mut skip, mut left) = (skip, usize::try_from(len).unwrap_or(usize::MAX));
    std::array::from_fn(|_| {
        let piece = &ZEROS.0[std::mem::take(&mut skip)..];
        let piece = &piece[..piece.len().min(left)];
        left -= piece.len();
        IoSlice::new(piece)
    })
}

impl File {
    /// Deallocates the range. A hint: does nothing where holes cannot be punched.
    pub fn punch(&self, offset: u64, len: u64) -> Result<(), Errno> {
        let _alone = self.exclude(offset, len)?;
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match self.allocate(mode, offset, len) {
            Err(Errno::OPNOTSUPP) if self.block_device => {
                // Whole blocks only. A discard may leave the rest unchanged.
                let (first, last) = (offset.next_multiple_of(LARGEST_BLOCK), (offset + len) & !(LARGEST_BLOCK - 1));
                let inner = if first < last { self.allocate(mode, first, last - first) } else { Ok(()) };
                inner.or_else(|errno| if errno == Errno::OPNOTSUPP { Ok(()) } else { Err(errno) })
            }
            Err(Errno::OPNOTSUPP) => Ok(()),
            other => other,
        }
    }

    /// Makes the range read as zeros. unmap: blocks may be deallocated; otherwise they stay allocated. fast: fail with
    /// EOPNOTSUPP rather than write zeros.
    pub fn zero(&self, offset: u64, len: u64, unmap: bool, fast: bool, scratch: &mut Scratch) -> Result<(), Errno> {
        let _alone = self.exclude(offset, len)?;
        if unmap {
            match self.allocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len) {
                Err(Errno::OPNOTSUPP) => {}
                other => return other,
            }
        }
        match self.allocate(FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, offset, len) {
            Err(Errno::OPNOTSUPP) if !fast => {}
            other => return other,
        }
        self.write_zeroes(offset, offset + len, scratch)
    }

    /// Writes zeros from `start` to `end`. The caller has locked the range exclusively.
    fn write_zeroes(&self, start: u64, end: u64, scratch: &mut Scratch) -> Result<(), Errno> {
        let block = self.offset_alignment;
        let (first, last) = (start.next_multiple_of(block).min(end), end / block * block);
        self.zero_in_blocks(start, first, scratch)?;
        let mut at = first;
        while at < last {
            // Memory pages are aligned like the file's pages: at the end of a memory page the kernel may stop for a
            // page fault, and the bytes written so far may reach the disk alone. They must not end inside a sector.
            let skip = if self.direct { 0 } else { at as usize % ALIGNMENT };
            match pwritev2(&self.fd, &zeros(skip, last - at), at, ReadWriteFlags::empty()) {
                Ok(0) => return Err(Errno::IO),
                Ok(written) => at += written as u64,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        self.zero_in_blocks(first.max(last), end, scratch)
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
                Err(Errno::INTR) => {}
                // The block device is opened exclusively (by this or another process), and the range has dirty pages:
                // the kernel drops only clean pages.
                Err(Errno::BUSY) if self.block_device && busy < MOST_BUSY => {
                    busy += 1;
                    self.sync()?;
                }
                Err(Errno::BUSY) if self.block_device => return Err(Errno::OPNOTSUPP),
                // A block device fails with EINVAL if the range is not aligned to logical blocks.
                Err(Errno::INVAL) if self.block_device => return Err(Errno::OPNOTSUPP),
                Err(Errno::NOSYS | Errno::NODEV) => return Err(Errno::OPNOTSUPP),
                Err(error) => return Err(error),
            }
        }
    }

    /// Data and holes from `offset` on, at most `most` extents (the last may end before the range).
    pub fn extents(&self, offset: u64, len: u64, most: usize) -> Result<Vec<FileExtent>, Errno> {
        let whole = |hole| vec![FileExtent { len, hole }];
        if self.block_device {
            return Ok(whole(false));
        }
        let end = offset + len;
        let (mut at, mut found) = (offset, Vec::new());
        while at < end && found.len() < most {
            match seek(&self.fd, SeekFrom::Data(at)) {
                Ok(data) if data > at => {
                    found.push(FileExtent { len: data.min(end) - at, hole: true });
                    at = data;
                }
                Ok(_) => match seek(&self.fd, SeekFrom::Hole(at)) {
                    Ok(hole) if hole > at => {
                        found.push(FileExtent { len: hole.min(end) - at, hole: false });
                        at = hole;
                    }
                    Ok(_) => {} // the file changed between the two calls: try again
                    Err(Errno::NXIO) => {
                        found.push(FileExtent { len: end - std::mem::replace(&mut at, end), hole: true })
                    }
                    Err(error) => return Err(error),
                },
                Err(Errno::NXIO) => found.push(FileExtent { len: end - std::mem::replace(&mut at, end), hole: true }),
                Err(Errno::INVAL) => return Ok(whole(false)), // not supported by the file system
                Err(error) => return Err(error),
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
    }
}
