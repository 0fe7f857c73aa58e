//! `Registered`: buffers registered with a ring (io_uring fixed buffers). The kernel moves their bytes.
//!
//! The CPU need not access such a buffer, and cannot access one that a kernel driver registers (ublk with zero copy).

use std::io::IoSlice;
use std::os::fd::RawFd;

use io_uring::IoUring;
use slab::Slab;

use crate::memory::Slice;

/// Number of slots of a ring's table.
const MOST: usize = 1024;

/// A range of a registered buffer. It borrows nothing: the kernel checks each use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Registered {
    pub(crate) ring: RawFd,
    pub(crate) index: u16,
    /// The address that the kernel uses for the range.
    pub(crate) address: usize,
    len: usize,
}

impl Registered {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// `len` bytes from `at` on. Panics when out of bounds, as slicing does.
    pub fn part(&self, at: usize, len: usize) -> Registered {
        assert!(at <= self.len && len <= self.len - at, "part {at}+{len} of a registered buffer of {}", self.len);
        Registered { address: self.address + at, len, ..*self }
    }
}

/// The used slots of a ring's buffer table. The kernel's table is created with the first buffer.
#[derive(Default)]
pub(crate) struct Table {
    made: bool,
    taken: Slab<()>,
}

impl Table {
    pub fn register(&mut self, ring: &IoUring, number: RawFd, memory: Slice<'static>) -> std::io::Result<Registered> {
        if self.taken.len() == MOST {
            return Err(std::io::ErrorKind::QuotaExceeded.into());
        }
        if !self.made {
            ring.submitter().register_buffers_sparse(MOST as u32)?;
            self.made = true;
        }
        let index = self.taken.insert(());
        // SAFETY: the memory is valid until the last I/O on it has ended, and no reference to its bytes exists
        // (`Slice::new`). The kernel pins its pages.
        if let Err(error) = unsafe { fill(ring, index, memory.as_ptr(), memory.len()) } {
            self.taken.remove(index);
            return Err(error);
        }
        Ok(Registered { ring: number, index: index as u16, address: memory.as_ptr() as usize, len: memory.len() })
    }

    /// Frees a slot. I/O in flight keeps the pages.
    pub fn unregister(&mut self, ring: &IoUring, index: u16) -> std::io::Result<()> {
        if self.taken.try_remove(index.into()).is_none() {
            return Ok(());
        }
        // SAFETY: an empty slot names no memory.
        unsafe { fill(ring, index.into(), std::ptr::null(), 0) }
    }
}

/// Sets one slot of the kernel's table.
///
/// # Safety
/// As for `IoUring::register_buffers_update`.
unsafe fn fill(ring: &IoUring, index: usize, memory: *const u8, len: usize) -> std::io::Result<()> {
    // The layout of an iovec (documented for `IoSlice`). Built from its parts, because a null pointer is not a valid
    // slice.
    let slot: [usize; 2] = [memory as usize, len];
    const { assert!(size_of::<IoSlice<'static>>() == size_of::<[usize; 2]>()) };
    // SAFETY: an iovec is a pointer and a length. The caller promises that the memory is valid.
    unsafe {
        let slots = std::slice::from_raw_parts(slot.as_ptr().cast(), 1);
        ring.submitter().register_buffers_update(index as u32, slots, None)
    }
}
