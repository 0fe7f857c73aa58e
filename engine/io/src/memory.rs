//! `Slice` and `Source`: pointers to memory that bytes are copied to and from, with a lifetime.
//!
//! Other programs may change the memory at any time (a client's buffer in Python, memory shared with a virtual
//! machine). So its bytes are only copied, and never borrowed as `&[u8]` for longer than one system call. If two
//! threads copy to the same bytes at the same time, the result is a mixture, as a block device allows for overlapping
//! requests. Formally this is a data race outside Rust's memory model, as in every server of shared VM memory.
//!
//! Safe code gets a slice only of memory that it has borrowed, and the compiler checks the borrow:
//!
//! ```compile_fail,E0597
//! # use blkloom_io::{Buffer, Slice};
//! let slice: Slice;
//! {
//!     let mut buffer = Buffer::new(4096);
//!     slice = buffer.slice();
//! }
//! slice.zero(); // the buffer is gone
//! ```
//!
//! ```compile_fail,E0502
//! # use blkloom_io::Buffer;
//! let mut buffer = Buffer::new(4096);
//! let slice = buffer.slice();
//! let bytes = buffer.bytes(); // while the slice may write to them
//! slice.zero();
//! assert_eq!(bytes[0], 0);
//! ```
//!
//! For memory that the kernel, another thread or another language uses beyond a borrow, the caller of `Slice::new`
//! promises that it stays valid.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};

#[cfg(target_arch = "x86_64")]
const CACHE_LINE: usize = 64;
/// Bytes copied between two groups of prefetches. So few cache misses are outstanding that the CPU drops no prefetch.
const STEP: usize = 256;

/// Memory that can be read and written during `'m`.
#[derive(Clone, Copy)]
pub struct Slice<'m> {
    ptr: *mut u8,
    len: usize,
    of: PhantomData<&'m [u8]>,
}

// SAFETY: a slice is an address and a length. Its use is sound because the memory is valid during `'m`, on any thread.
unsafe impl Send for Slice<'_> {}
// SAFETY: as above.
unsafe impl Sync for Slice<'_> {}

impl<'m> From<&'m mut [u8]> for Slice<'m> {
    fn from(bytes: &'m mut [u8]) -> Slice<'m> {
        Slice { ptr: bytes.as_mut_ptr(), len: bytes.len(), of: PhantomData }
    }
}

impl<'m> Slice<'m> {
    /// Makes a slice of memory that no borrow keeps valid: memory of I/O that outlives the call that started it,
    /// mappings, and buffers of other languages. This is the only constructor for such memory.
    ///
    /// # Safety
    /// `ptr..ptr + len` must stay mapped during `'m`. If I/O on it is still in flight then, it must stay mapped until
    /// the completion is reaped. No reference (`&[u8]`) to the memory may exist while it is written through the slice.
    /// The memory need not be writable if the slice is only converted to a `Source`.
    pub unsafe fn new(ptr: *mut u8, len: usize) -> Slice<'m> {
        Slice { ptr, len, of: PhantomData }
    }

    pub fn empty() -> Slice<'m> {
        Slice { ptr: std::ptr::NonNull::dangling().as_ptr(), len: 0, of: PhantomData }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr
    }

    pub fn source(self) -> Source<'m> {
        Source(self)
    }

    /// `len` bytes from `at` on. Panics when out of bounds, as slicing does.
    pub fn part(&self, at: usize, len: usize) -> Slice<'m> {
        assert!(at <= self.len && len <= self.len - at, "part {at}+{len} of a slice of {}", self.len);
        // SAFETY: the range was just checked to be in the memory of self, which is valid during `'m`.
        unsafe { Slice::new(self.ptr.add(at), len) }
    }

    pub fn zero(&self) {
        // SAFETY: mapped and writable during `'m`.
        unsafe { self.ptr.write_bytes(0, self.len) }
    }

    /// Copies from `from`, which must have the same length. The two may overlap.
    pub fn copy_from(&self, from: Source<'_>) {
        assert_eq!(self.len, from.len(), "lengths of a copy");
        // SAFETY: both are mapped; `copy_from` (memmove) allows overlap.
        unsafe { self.ptr.copy_from(from.as_ptr(), self.len) }
    }

    /// Copies from `from`, which must have the same length, while the CPU prefetches `next` into its caches. Without
    /// it, reads of random pages wait for one cache miss after the other.
    pub(crate) fn copy_from_while_fetching(&self, from: Source<'_>, next: Ahead) {
        let mut at = 0;
        while at < self.len {
            let step = STEP.min(self.len - at);
            next.fetch(at, STEP);
            self.part(at, step).copy_from(from.part(at, step));
            at += step;
        }
    }

    pub fn to_vec(&self) -> Vec<u8> {
        self.source().to_vec()
    }

    /// Reads a little-endian number that another program stores. What it has stored before is visible after this.
    pub fn load_u16(&self, at: usize) -> u16 {
        u16::from_le(self.shared_u16(at).load(Ordering::Acquire))
    }

    /// Stores a little-endian number that another program loads. What was stored before is visible to it then.
    pub fn store_u16(&self, at: usize, value: u16) {
        self.shared_u16(at).store(value.to_le(), Ordering::Release);
    }

    /// Stores a byte, as `store_u16` does.
    pub fn store_u8(&self, at: usize, value: u8) {
        let part = self.part(at, 1);
        // SAFETY: mapped and writable during `'m`. As in `shared_u16`.
        unsafe { AtomicU8::from_ptr(part.ptr) }.store(value, Ordering::Release);
    }

    /// Sets bits of a byte that another program also changes. What was stored before is visible to a program that then
    /// takes the bits.
    pub fn set_bits(&self, at: usize, bits: u8) {
        let part = self.part(at, 1);
        // SAFETY: mapped and writable during `'m`. As in `shared_u16`.
        unsafe { AtomicU8::from_ptr(part.ptr) }.fetch_or(bits, Ordering::SeqCst);
    }

    /// Panics when out of bounds, as slicing does, or when it is not aligned.
    fn shared_u16(&self, at: usize) -> &AtomicU16 {
        let part = self.part(at, size_of::<u16>());
        assert!(part.ptr.cast::<AtomicU16>().is_aligned(), "shared numbers are aligned");
        // SAFETY: mapped and writable during `'m`, which self outlives no borrow of, and aligned. Other accesses by
        // this process are atomic, too; those of other programs are outside of Rust's memory model, as all here.
        unsafe { AtomicU16::from_ptr(part.ptr.cast()) }
    }
}

/// Memory that can be read during `'m`.
#[derive(Clone, Copy)]
pub struct Source<'m>(Slice<'m>);

impl<'m> From<&'m [u8]> for Source<'m> {
    fn from(bytes: &'m [u8]) -> Source<'m> {
        Source(Slice { ptr: bytes.as_ptr().cast_mut(), len: bytes.len(), of: PhantomData })
    }
}

impl<'m> From<Slice<'m>> for Source<'m> {
    fn from(slice: Slice<'m>) -> Source<'m> {
        Source(slice)
    }
}

impl<'m> Source<'m> {
    pub fn empty() -> Source<'m> {
        Source(Slice::empty())
    }

    pub fn len(&self) -> usize {
        self.0.len
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn as_ptr(&self) -> *const u8 {
        self.0.ptr
    }

    /// `len` bytes from `at` on. Panics when out of bounds, as slicing does.
    pub fn part(&self, at: usize, len: usize) -> Source<'m> {
        Source(self.0.part(at, len))
    }

    pub fn to_vec(&self) -> Vec<u8> {
        let mut copy = vec![0; self.len()];
        Slice::from(&mut copy[..]).copy_from(*self);
        copy
    }
}

/// A prefetch hint: the addresses of memory that will be read soon. The memory need not be valid any more, because
/// nothing is read from it.
#[derive(Clone, Copy)]
pub struct Ahead {
    address: *const u8,
    len: usize,
}

impl Ahead {
    pub const NOTHING: Ahead = Ahead { address: std::ptr::null(), len: 0 };

    pub fn is_nothing(&self) -> bool {
        self.len == 0
    }

    /// Prefetches up to `len` bytes from `at` on. This causes no page fault.
    fn fetch(&self, at: usize, len: usize) {
        #[cfg(target_arch = "x86_64")]
        for line in (at..self.len.min(at + len)).step_by(CACHE_LINE) {
            // SAFETY: a prefetch affects only timing, whatever the address is.
            unsafe {
                core::arch::x86_64::_mm_prefetch::<{ core::arch::x86_64::_MM_HINT_T0 }>(
                    self.address.wrapping_add(line).cast(),
                );
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _unused = (at, len, self.address);
    }
}

impl From<Source<'_>> for Ahead {
    fn from(memory: Source<'_>) -> Ahead {
        Ahead { address: memory.as_ptr(), len: memory.len() }
    }
}
