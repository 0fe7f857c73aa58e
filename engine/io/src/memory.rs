//! `Slice`: raw memory that its maker promised to keep.

#[cfg(target_arch = "x86_64")]
const CACHE_LINE: usize = 64;
/// Copied between two lots of prefetches: few enough misses at a time that none is dropped.
const STEP: usize = 256;

/// Some bytes of memory that stay mapped for as long as any copy of the slice is used.
///
/// The contents may be changed by others at any time (a client's buffer in Python, memory shared
/// with a guest), so they are only ever copied, never borrowed as `&[u8]` beyond one system call.
#[derive(Clone, Copy)]
pub struct Slice {
    ptr: *mut u8,
    len: usize,
}

// SAFETY: a slice is an address and a length; what makes using it sound is the promise given to
// `Slice::new`, which does not depend on the thread.
unsafe impl Send for Slice {}
// SAFETY: as above.
unsafe impl Sync for Slice {}

impl Slice {
    /// # Safety
    /// `ptr..ptr + len` must stay mapped until the last use of this slice and its copies, and must be
    /// writable if the slice is used as the destination of a read. Concurrent access by others yields
    /// torn bytes, which is what a block device promises for overlapping requests; formally it is a
    /// data race outside Rust's model, as in every server of shared guest memory.
    pub unsafe fn new(ptr: *mut u8, len: usize) -> Slice {
        Slice { ptr, len }
    }

    pub fn empty() -> Slice {
        Slice { ptr: std::ptr::NonNull::dangling().as_ptr(), len: 0 }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn address(&self) -> usize {
        self.ptr as usize
    }

    pub(crate) fn ptr(&self) -> *mut u8 {
        self.ptr
    }

    /// `len` bytes from `at` on. Panics when out of bounds, as slicing does.
    pub fn part(&self, at: usize, len: usize) -> Slice {
        assert!(at <= self.len && len <= self.len - at, "part {at}+{len} of a slice of {}", self.len);
        // SAFETY: in bounds of the memory promised for self, just checked.
        Slice { ptr: unsafe { self.ptr.add(at) }, len }
    }

    pub fn zero(&self) {
        // SAFETY: the promise of `new`.
        unsafe { self.ptr.write_bytes(0, self.len) }
    }

    /// Copies from `from`, which must be as long. The two may not overlap.
    pub fn copy_from(&self, from: &[u8]) {
        assert_eq!(self.len, from.len(), "lengths of a copy");
        // SAFETY: the promise of `new`; lengths are equal; `from` is a live borrow that nobody maps twice.
        unsafe { self.ptr.copy_from_nonoverlapping(from.as_ptr(), self.len) }
    }

    pub fn copy_from_slice(&self, from: Slice) {
        assert_eq!(self.len, from.len, "lengths of a copy");
        // SAFETY: both promises; `copy_from` (memmove) allows overlap.
        unsafe { self.ptr.copy_from(from.ptr, self.len) }
    }

    /// Copies from `from`, which must be as long, while the processor fetches `next` into its caches:
    /// random pages otherwise come out of the machine's memory one miss after the other.
    pub(crate) fn copy_from_while_fetching(&self, from: Slice, next: Slice) {
        let mut at = 0;
        while at < self.len {
            let step = STEP.min(self.len - at);
            if at < next.len {
                next.part(at, STEP.min(next.len - at)).prefetch();
            }
            self.part(at, step).copy_from_slice(from.part(at, step));
            at += step;
        }
    }

    /// A hint that faults nothing in.
    fn prefetch(&self) {
        #[cfg(target_arch = "x86_64")]
        for line in (0..self.len).step_by(CACHE_LINE) {
            // SAFETY: prefetching has no effect but on time, at any address; this one is in bounds.
            unsafe {
                core::arch::x86_64::_mm_prefetch::<{ core::arch::x86_64::_MM_HINT_T0 }>(self.ptr.add(line).cast())
            }
        }
    }

    pub fn to_vec(&self) -> Vec<u8> {
        let mut copy = vec![0; self.len];
        // SAFETY: the promise of `new`; the destination is as long.
        unsafe { self.ptr.copy_to_nonoverlapping(copy.as_mut_ptr(), self.len) };
        copy
    }
}
