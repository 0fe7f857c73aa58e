//! Page-aligned memory for payloads, and a pool of it a loop.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};

use crate::memory::Slice;

/// Of every buffer, in bytes.
pub const ALIGNMENT: usize = 4096;

/// Owned memory, aligned for direct I/O. Its address does not change when it moves.
pub struct Buffer {
    ptr: std::ptr::NonNull<u8>,
    capacity: usize,
    len: usize,
}

// SAFETY: a Buffer owns its memory alone, like a Box<[u8]>.
unsafe impl Send for Buffer {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// `len` zeroed bytes.
    pub fn new(len: usize) -> Buffer {
        let capacity = Self::capacity(len);
        let layout = Self::layout(capacity);
        // SAFETY: the layout's size is not zero.
        let ptr = unsafe { alloc_zeroed(layout) };
        let Some(ptr) = std::ptr::NonNull::new(ptr) else { handle_alloc_error(layout) };
        Buffer { ptr, capacity, len }
    }

    /// The memory that a buffer of `len` bytes takes.
    pub fn capacity(len: usize) -> usize {
        len.max(1).next_power_of_two().max(ALIGNMENT)
    }

    fn layout(capacity: usize) -> Layout {
        Layout::from_size_align(capacity, ALIGNMENT).expect("payloads are far below isize::MAX")
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// The memory that it takes, however much of that is shown.
    pub fn footprint(&self) -> usize {
        self.capacity
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `len` initialised bytes are owned by self (alloc_zeroed).
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and self is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }

    /// Makes it no longer than `len`.
    pub fn shorten(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// The memory for an I/O that outlives this borrow.
    ///
    /// # Safety
    /// The buffer must not be dropped, returned to its pool or borrowed while the slice is in use.
    pub unsafe fn slice(&self) -> Slice {
        // SAFETY: valid and writable while the buffer lives, which the caller promises.
        unsafe { Slice::new(self.ptr.as_ptr(), self.len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated with this very layout in `new`.
        unsafe { dealloc(self.ptr.as_ptr(), Self::layout(self.capacity)) }
    }
}

/// Buffers kept for the next request, by power-of-two size, within `limit` bytes in all.
pub struct BufferPool {
    free: Vec<Vec<Buffer>>,
    held: usize,
    limit: usize,
}

impl BufferPool {
    pub fn new(limit: usize) -> BufferPool {
        BufferPool { free: Vec::new(), held: 0, limit }
    }

    /// A buffer of `len` bytes with old contents: the caller overwrites or zeroes what it shows.
    pub fn take(&mut self, len: usize) -> Buffer {
        let class = Self::class(len);
        if let Some(mut buffer) = self.free.get_mut(class).and_then(Vec::pop) {
            self.held -= buffer.capacity;
            buffer.len = len;
            return buffer;
        }
        Buffer::new(len)
    }

    pub fn put(&mut self, buffer: Buffer) {
        if self.held + buffer.capacity > self.limit {
            return;
        }
        let class = Self::class(buffer.capacity);
        if self.free.len() <= class {
            self.free.resize_with(class + 1, Vec::new);
        }
        self.held += buffer.capacity;
        self.free[class].push(buffer);
    }

    fn class(len: usize) -> usize {
        Buffer::capacity(len).trailing_zeros() as usize
    }
}
