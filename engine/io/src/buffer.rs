//! `Buffer`: page-aligned memory for payloads. `BufferPool`: free buffers of one loop.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};

use rustix::io::Errno;

use crate::memory::Slice;

/// Alignment of every buffer, in bytes.
pub const ALIGNMENT: usize = 4096;

/// Owned memory, aligned for direct I/O. The memory stays at its address when the `Buffer` moves.
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
    /// Allocates `len` zeroed bytes.
    pub fn new(len: usize) -> Buffer {
        Self::allocate(len).unwrap_or_else(|| handle_alloc_error(Self::layout(Self::capacity(len))))
    }

    /// Allocates `len` zeroed bytes, and makes every page of them present: no later access has to wait for a page.
    pub fn present(len: usize) -> Result<Buffer, Errno> {
        let mut buffer = Self::allocate(len).ok_or(Errno::NOMEM)?;
        make_present(buffer.slice());
        Ok(buffer)
    }

    fn allocate(len: usize) -> Option<Buffer> {
        let capacity = Self::capacity(len);
        // SAFETY: the layout's size is not zero.
        let ptr = std::ptr::NonNull::new(unsafe { alloc_zeroed(Self::layout(capacity)) })?;
        Some(Buffer { ptr, capacity, len })
    }

    /// Bytes of memory that a buffer of `len` bytes occupies.
    pub fn capacity(len: usize) -> usize {
        len.max(1).next_power_of_two().max(ALIGNMENT)
    }

    fn layout(capacity: usize) -> Layout {
        Layout::from_size_align(capacity, ALIGNMENT).expect("payloads are far below isize::MAX")
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// Bytes of memory that the buffer occupies; at least `len`.
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

    /// Limits the length to `len`.
    pub fn shorten(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// The memory as a slice to copy to and from.
    pub fn slice(&mut self) -> Slice<'_> {
        Slice::from(self.bytes_mut())
    }

    /// The address, for I/O that outlives every borrow: see `Slice::new`.
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated with the same layout in `new`.
        unsafe { dealloc(self.ptr.as_ptr(), Self::layout(self.capacity)) }
    }
}

/// Makes every page of new memory present: zeroes a byte of each.
pub(crate) fn make_present(memory: Slice<'_>) {
    for at in (0..memory.len()).step_by(ALIGNMENT) {
        // SAFETY: in the memory, which is writable. Volatile: the compiler may know that the memory is zero.
        unsafe { memory.as_ptr().add(at).write_volatile(0) };
    }
}

/// Free buffers for the next requests, by power-of-two size; at most `limit` bytes in total.
pub struct BufferPool {
    free: Vec<Vec<Buffer>>,
    held: usize,
    limit: usize,
}

impl BufferPool {
    pub fn new(limit: usize) -> BufferPool {
        BufferPool { free: Vec::new(), held: 0, limit }
    }

    /// Takes a buffer of `len` bytes. It may have old contents: the caller overwrites all bytes that it uses.
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
