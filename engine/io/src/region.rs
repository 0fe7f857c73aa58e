//! `Region`: shared memory of a sealed memfd, read and written by memcpy.
//!
//! The memfd must be sealed against shrinking, so no access can raise SIGBUS past its end. One bit per page tells
//! whether the page was ever written: a read of an unwritten page returns zeros without touching the page, and so
//! without allocating it. A write sets the bit *after* it has copied the bytes. So a discard between copy and bit
//! leaves a zeroed page with its bit set, and never old bytes that a later write would uncover.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use rustix::fs::{FallocateFlags, SealFlags, SeekFrom, fallocate, fcntl_get_seals, fstat, seek};
use rustix::io::Errno;

use crate::mapping::Mapping;
use crate::memory::{Ahead, Slice, Source};

/// Why a memfd cannot be a region.
#[derive(Debug)]
pub enum RegionError {
    NotSealed,
    TooSmall { size: u64, found: u64 },
    PageSize(u64),
    Os(&'static str, Errno),
}

impl std::fmt::Display for RegionError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            RegionError::NotSealed => write!(f, "the memfd is not sealed against shrinking (F_SEAL_SHRINK)"),
            RegionError::TooSmall { size, found } => {
                write!(f, "the memfd holds {found} bytes, {size} were promised")
            }
            RegionError::PageSize(size) => {
                write!(f, "page size {size} is not a power of two of at least 4096")
            }
            RegionError::Os(call, error) => write!(f, "{call}: {error}"),
        }
    }
}

impl std::error::Error for RegionError {}

const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);

/// Memory of a device.
pub struct Region {
    fd: OwnedFd,
    mapping: Mapping,
    page_shift: u32,
    written: Box<[AtomicU64]>,
}

impl Region {
    pub fn new(fd: OwnedFd, size: u64, page_size: u64) -> Result<Region, RegionError> {
        if !page_size.is_power_of_two() || page_size < 4096 {
            return Err(RegionError::PageSize(page_size));
        }
        let seals = fcntl_get_seals(&fd).map_err(|_| RegionError::NotSealed)?;
        if !seals.contains(SealFlags::SHRINK) {
            return Err(RegionError::NotSealed);
        }
        let found = fstat(&fd).map_err(|error| RegionError::Os("fstat", error))?.st_size as u64;
        let mapped = match size.checked_next_multiple_of(page_size) {
            Some(mapped) if size > 0 && mapped <= found => mapped,
            _ => return Err(RegionError::TooSmall { size, found }),
        };
        let mapping = Mapping::new(&fd, mapped as usize).map_err(|error| RegionError::Os("mmap", error))?;
        let pages = mapped / page_size;
        let written = (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        let region = Region { fd, mapping, page_shift: page_size.trailing_zeros(), written };
        region.find_written(mapped)?;
        Ok(region)
    }

    /// Sets the bits of pages that the memfd has already (a device handed over from another process).
    fn find_written(&self, end: u64) -> Result<(), RegionError> {
        let mut at = 0;
        while at < end {
            let data = match seek(&self.fd, SeekFrom::Data(at)) {
                Ok(data) if data >= end => return Ok(()), // the memfd is longer than the region
                Ok(data) => data,
                Err(Errno::NXIO) => return Ok(()),
                Err(Errno::INVAL | Errno::OPNOTSUPP) => at, // hugetlbfs of older kernels does not support it
                Err(error) => return Err(RegionError::Os("lseek", error)),
            };
            let hole = match seek(&self.fd, SeekFrom::Hole(data)) {
                Ok(hole) if hole > data => hole,
                _ => end,
            };
            self.mark(data, hole.min(end) - data);
            at = hole;
        }
        Ok(())
    }

    pub fn size(&self) -> u64 {
        self.mapping.len() as u64
    }

    pub fn resident(&self) -> u64 {
        let pages: u64 = self.written.iter().map(|word| u64::from(word.load(Ordering::Relaxed).count_ones())).sum();
        pages << self.page_shift
    }

    /// Reads all of `into`. next: memory that a later read needs, prefetched during the copy.
    pub fn read(&self, offset: u64, into: Slice<'_>, next: Ahead) {
        let mut done = 0;
        while done < into.len() {
            let (run, written) = self.run(offset + done as u64, (into.len() - done) as u64);
            let part = into.part(done, run as usize);
            if written {
                let from = self.mapping.slice().part(offset as usize + done, run as usize).source();
                if next.is_nothing() { part.copy_from(from) } else { part.copy_from_while_fetching(from, next) }
            } else {
                part.zero();
            }
            done += run as usize;
        }
    }

    /// A range as a prefetch hint, for `read`'s `next`.
    pub fn ahead(&self, offset: u64, len: usize) -> Ahead {
        self.mapping.slice().part(offset as usize, len).source().into()
    }

    pub fn write(&self, offset: u64, from: Source<'_>) {
        self.mapping.slice().part(offset as usize, from.len()).copy_from(from);
        self.mark(offset, from.len() as u64);
    }

    /// Zeroes a range. unmap: whole pages are deallocated; otherwise all pages stay or become allocated.
    pub fn zero(&self, offset: u64, len: u64, unmap: bool) -> Result<(), Errno> {
        let page = 1u64 << self.page_shift;
        let (first, last) = (offset.next_multiple_of(page), (offset + len) & !(page - 1));
        if !unmap {
            self.mapping.slice().part(offset as usize, len as usize).zero();
            self.mark(offset, len);
            return Ok(());
        }
        // Huge pages are not deallocated: the system's pool may be empty when the page is touched again, and that
        // raises SIGBUS.
        if first >= last || page > 4096 {
            self.zero_written(offset, len);
            return Ok(());
        }
        self.zero_written(offset, first - offset);
        self.zero_written(last, offset + len - last);
        self.unmark(first >> self.page_shift, last >> self.page_shift);
        // Pairs with the fence in `mark`: a writer that still saw the bit set has copied its bytes before the hole
        // is punched.
        fence(Ordering::SeqCst);
        while let Err(error) = fallocate(&self.fd, PUNCH, first, last - first) {
            if error != Errno::INTR {
                // An unmarked page must not keep old bytes.
                self.mapping.slice().part(first as usize, (last - first) as usize).zero();
                self.mark(first, last - first);
                break;
            }
        }
        Ok(())
    }

    /// Clears the bits of pages `first..last`, a word at a time.
    fn unmark(&self, first: u64, last: u64) {
        let mut index = first;
        while index < last {
            let end = last.min((index / 64 + 1) * 64);
            let bits = u64::MAX >> (64 - (end - index)) << (index % 64);
            let word = &self.written[(index / 64) as usize];
            if word.load(Ordering::Relaxed) & bits != 0 {
                word.fetch_and(!bits, Ordering::AcqRel);
            }
            index = end;
        }
    }

    fn zero_written(&self, offset: u64, len: u64) {
        let mut done = 0;
        while done < len {
            let (run, written) = self.run(offset + done, len - done);
            if written {
                self.mapping.slice().part((offset + done) as usize, run as usize).zero();
            }
            done += run;
        }
    }

    /// The length of the run of pages from `offset` on that are all written or all unwritten (at most `len`), and
    /// whether they are written.
    pub fn run(&self, offset: u64, len: u64) -> (u64, bool) {
        let mut index = offset >> self.page_shift;
        let written = self.is_written(index);
        let end = offset + len;
        loop {
            index += 1;
            let at = index << self.page_shift;
            if at >= end {
                return (len, written);
            }
            let word = self.written[(index / 64) as usize].load(Ordering::Acquire);
            if index.is_multiple_of(64) && word == if written { u64::MAX } else { 0 } {
                index += 63;
                continue;
            }
            if (word >> (index % 64) & 1 == 1) != written {
                return (at - offset, written);
            }
        }
    }

    fn is_written(&self, index: u64) -> bool {
        self.written[(index / 64) as usize].load(Ordering::Acquire) >> (index % 64) & 1 == 1
    }

    fn mark(&self, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        // The bytes are copied before the bits are read: a discard that clears a bit after this thread saw it set must
        // punch away these bytes. Otherwise the page would contain bytes that its clear bit hides, and that the next
        // write to the page uncovers.
        fence(Ordering::SeqCst);
        for index in offset >> self.page_shift..=(offset + len - 1) >> self.page_shift {
            let word = &self.written[(index / 64) as usize];
            let bit = 1u64 << (index % 64);
            // The load avoids the contended instruction for pages that are written already. Both ways order the bytes
            // before the bit: a reader that sees the bit sees the bytes.
            if word.load(Ordering::Acquire) & bit == 0 {
                word.fetch_or(bit, Ordering::Release);
            }
        }
    }
}
