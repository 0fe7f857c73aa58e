//! `Mapping` and `ReadOnlyMapping`: shared memory mappings (mmap) of a file.

use rustix::fd::AsFd;
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

use crate::memory::Slice;

/// A shared, writable mapping. Dropping it unmaps the memory.
pub(crate) struct Mapping {
    /// Valid as long as the mapping exists.
    memory: Slice<'static>,
}

impl Mapping {
    /// Maps the first `len` bytes of a file. The file must be at least that long and must never be truncated: an access
    /// past its end raises SIGBUS.
    pub fn new(fd: impl AsFd, len: usize) -> Result<Mapping, Errno> {
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::NORESERVE);
        // SAFETY: a fresh mapping at an address of the kernel's choosing, unmapped only in Drop.
        let memory = unsafe { Slice::new(mmap(std::ptr::null_mut(), len, protection, flags, fd, 0)?.cast(), len) };
        Ok(Mapping { memory })
    }

    pub fn len(&self) -> usize {
        self.memory.len()
    }

    /// The memory, as long as self is borrowed.
    pub fn slice(&self) -> Slice<'_> {
        self.memory
    }

    /// The memory, without a borrow.
    ///
    /// # Safety
    /// The mapping is kept until the last use of the result.
    pub unsafe fn promised(&self) -> Slice<'static> {
        self.memory
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped with this address and length in `new`; slices of it are no longer used.
        unsafe { unmap(self.memory) }
    }
}

/// Memory of a driver that the process may only read. A fork does not have it. Dropping it unmaps the memory.
pub struct ReadOnlyMapping {
    /// Valid as long as the mapping exists.
    memory: Slice<'static>,
}

impl ReadOnlyMapping {
    /// Maps `len` bytes from `offset` on of a character device, whose memory does not shrink.
    pub fn new(device: impl AsFd, offset: u64, len: usize) -> Result<ReadOnlyMapping, Errno> {
        let null = std::ptr::null_mut();
        // SAFETY: a fresh mapping at an address of the kernel's choosing, unmapped only in Drop.
        let memory = unsafe { mmap(null, len, ProtFlags::READ, MapFlags::SHARED, device, offset) }?;
        // SAFETY: mapped by the line above; it is not written.
        let mapping = ReadOnlyMapping { memory: unsafe { Slice::new(memory.cast(), len) } };
        // SAFETY: the mapping stays as it is for this process.
        unsafe { madvise(memory, len, Advice::LinuxDontFork) }?;
        Ok(mapping)
    }

    /// Copies the bytes from `at` on. Panics when out of bounds, as slicing does.
    pub fn read<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut bytes = [0; N];
        Slice::from(&mut bytes[..]).copy_from(self.memory.part(at, N).source());
        bytes
    }
}

impl Drop for ReadOnlyMapping {
    fn drop(&mut self) {
        // SAFETY: mapped with this address and length in `new`; nothing else uses it.
        unsafe { unmap(self.memory) }
    }
}

/// # Safety
/// The memory is a mapping that is not used any more.
pub(crate) unsafe fn unmap(memory: Slice<'static>) {
    // SAFETY: promised by the caller.
    if let Err(error) = unsafe { munmap(memory.as_ptr().cast(), memory.len()) } {
        tracing::error!(%error, bytes = memory.len(), "munmap failed; the addresses stay taken");
    }
}
