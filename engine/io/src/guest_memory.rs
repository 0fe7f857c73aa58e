//! `SharedMemory`: a part of a file of memory (memfd) that another program shares. `GuestMemory`: the memory of a
//! virtual machine, in such parts, by guest and by user address.
//!
//! The other program is hostile. An access to a mapping beyond the end of its file raises SIGBUS, so only files are mapped
//! that cannot shrink (F_SEAL_SHRINK), within their size. Huge pages are refused: the other program can give them back,
//! and an access raises SIGBUS where the system has none left then. A program that may end this process anyway, because it
//! belongs to the same user, may share any file (`Sharer::MayEndThis`). A fork does not have the mappings.

use std::os::fd::BorrowedFd;

use rustix::fs::{SealFlags, fcntl_get_seals, fstat, fstatfs};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap};

use crate::fork::Process;
use crate::mapping::unmap;
use crate::memory::Slice;

/// f_type of a file with huge pages: linux/magic.h.
const HUGETLBFS: u64 = 0x9584_58f6;

/// A part of a file that is memory of the guest. guest: its address there. user: its address in the other program.
#[derive(Clone, Copy, Debug)]
pub struct GuestRegion<'f> {
    pub file: BorrowedFd<'f>,
    pub offset: u64,
    pub size: u64,
    pub guest: u64,
    pub user: u64,
}

/// The program that shares memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sharer {
    /// It must not be able to end this process: the memory cannot be taken away.
    Other,
    /// It may end this process anyway, by a signal.
    MayEndThis,
}

/// Why memory of another program cannot be used.
#[derive(Debug)]
pub enum GuestMemoryError {
    NotSealed,
    HugePages,
    TooSmall {
        end: u128,
        found: u64,
    },
    /// It is empty, or its addresses exceed 64 bits.
    Range {
        address: u64,
        size: u64,
    },
    /// Two regions have this guest address.
    Overlap(u64),
    Os(&'static str, Errno),
}

impl std::fmt::Display for GuestMemoryError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            GuestMemoryError::NotSealed => {
                write!(f, "its file can shrink: share a memfd that is sealed against that (F_SEAL_SHRINK)")
            }
            GuestMemoryError::HugePages => write!(f, "it has huge pages (hugetlbfs): share memory without"),
            GuestMemoryError::TooSmall { end, found } => write!(f, "its file has {found} bytes, and it ends at {end}"),
            GuestMemoryError::Range { address, size } => write!(f, "{size} bytes at {address:#x} are no range"),
            GuestMemoryError::Overlap(address) => write!(f, "two regions have the guest address {address:#x}"),
            GuestMemoryError::Os(call, error) => write!(f, "{call}: {error}"),
        }
    }
}

impl std::error::Error for GuestMemoryError {}

/// A mapping of memory that another program shares. Dropping it unmaps the memory.
pub struct SharedMemory {
    /// Valid as long as the mapping exists.
    memory: Slice<'static>,
    home: Process,
}

impl SharedMemory {
    /// Maps `size` bytes from `offset` on, which must be on a page boundary.
    pub fn new(file: BorrowedFd<'_>, offset: u64, size: u64, sharer: Sharer) -> Result<SharedMemory, GuestMemoryError> {
        let os = |call| move |errno| GuestMemoryError::Os(call, errno);
        if sharer == Sharer::Other {
            let seals = fcntl_get_seals(file).map_err(|_| GuestMemoryError::NotSealed)?;
            if !seals.contains(SealFlags::SHRINK) {
                return Err(GuestMemoryError::NotSealed);
            }
            if fstatfs(file).map_err(os("fstatfs"))?.f_type as u64 == HUGETLBFS {
                return Err(GuestMemoryError::HugePages);
            }
        }
        let (found, end) = (fstat(file).map_err(os("fstat"))?.st_size as u64, u128::from(offset) + u128::from(size));
        if end > found.into() {
            return Err(GuestMemoryError::TooSmall { end, found });
        }
        let len = usize::try_from(size).ok().filter(|&len| len > 0 && isize::try_from(len).is_ok());
        let len = len.ok_or(GuestMemoryError::Range { address: offset, size })?;
        let (protection, null) = (ProtFlags::READ | ProtFlags::WRITE, std::ptr::null_mut());
        // SAFETY: a fresh mapping at an address of the kernel's choosing, unmapped only in Drop.
        let at = unsafe { mmap(null, len, protection, MapFlags::SHARED, file, offset) }.map_err(os("mmap"))?;
        // SAFETY: mapped by the line above, within a file that does not shrink, or that is truncated only by a program
        // that ends this process by that: an access raises SIGBUS then.
        let shared = SharedMemory { memory: unsafe { Slice::new(at.cast(), len) }, home: Process::current() };
        // SAFETY: the mapping stays as it is for this process.
        unsafe { madvise(at, len, Advice::LinuxDontFork) }.map_err(os("madvise"))?;
        Ok(shared)
    }

    /// The memory, as long as self is borrowed.
    pub fn slice(&self) -> Slice<'_> {
        self.memory
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // A fork does not have the mapping, and may have another one there.
        if self.home.is_current() {
            // SAFETY: mapped with this address and length in `new`; slices of it are no longer used.
            unsafe { unmap(self.memory) }
        }
    }
}

struct Mapped {
    guest: u64,
    user: u64,
    memory: SharedMemory,
}

/// Memory of a virtual machine.
pub struct GuestMemory {
    /// By guest address. No two overlap there.
    regions: Vec<Mapped>,
}

impl GuestMemory {
    pub fn new<'f>(
        regions: impl IntoIterator<Item = GuestRegion<'f>>,
        sharer: Sharer,
    ) -> Result<GuestMemory, GuestMemoryError> {
        let mut mapped = Vec::new();
        for GuestRegion { file, offset, size, guest, user } in regions {
            for address in [guest, user] {
                address.checked_add(size).ok_or(GuestMemoryError::Range { address, size })?;
            }
            mapped.push(Mapped { guest, user, memory: SharedMemory::new(file, offset, size, sharer)? });
        }
        mapped.sort_by_key(|region| region.guest);
        for pair in mapped.windows(2) {
            if pair[0].guest + pair[0].memory.slice().len() as u64 > pair[1].guest {
                return Err(GuestMemoryError::Overlap(pair[1].guest));
            }
        }
        Ok(GuestMemory { regions: mapped })
    }

    /// The first guest address after all memory.
    pub fn end(&self) -> u64 {
        self.regions.last().map_or(0, |region| region.guest + region.memory.slice().len() as u64)
    }

    /// The memory from a guest address on: `len` bytes, or those of them that lie in one region. None: the address is not
    /// memory.
    pub fn guest(&self, address: u64, len: usize) -> Option<Slice<'_>> {
        let region = self.regions[..self.regions.partition_point(|region| region.guest <= address)].last()?;
        let (memory, at) = (region.memory.slice(), usize::try_from(address - region.guest).ok()?);
        (at < memory.len()).then(|| memory.part(at, len.min(memory.len() - at)))
    }

    /// `len` bytes from a user address on, in one region.
    pub fn user(&self, address: u64, len: usize) -> Option<Slice<'_>> {
        self.regions.iter().find_map(|region| {
            let (memory, at) = (region.memory.slice(), usize::try_from(address.checked_sub(region.user)?).ok()?);
            (at <= memory.len() && len <= memory.len() - at).then(|| memory.part(at, len))
        })
    }

    /// Copies the bytes from a guest address on. False: not all of them are memory.
    pub fn read(&self, address: u64, into: &mut [u8]) -> bool {
        let mut done = 0;
        while done < into.len() {
            let address = address.checked_add(done as u64);
            let Some(part) = address.and_then(|address| self.guest(address, into.len() - done)) else {
                return false;
            };
            Slice::from(&mut into[done..done + part.len()]).copy_from(part.source());
            done += part.len();
        }
        true
    }
}
