//! `CommandRing`: an io_uring for commands to the driver of one descriptor (IORING_OP_URING_CMD). Each command is about
//! an entry: memory that the driver reads and writes.
//!
//! An entry is a head and a payload. The driver owns an entry from the command about it until that command has
//! completed; the caller owns it otherwise. An access by the caller while the driver owns the entry panics. One thread
//! submits all commands, and the driver works on that thread: it fills entries when the thread enters the kernel.
//!
//! The ring may be dropped while commands are outstanding. The driver ends those commands a little later, so their
//! memory is unmapped, and its addresses stay reserved for ever.
//!
//! Source: io_uring_enter(2), linux/io_uring.h.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr::null_mut;
use std::time::{Duration, Instant};

use io_uring::squeue::Entry128;
use io_uring::{IoUring, cqueue, opcode, types};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use crate::buffer::make_present;
use crate::memory::Slice;

/// Size in bytes of the command in an SQE of 128 bytes.
pub const COMMAND: usize = 80;
/// Offset of `len` in an SQE.
const SQE_LEN_AT: usize = 24;
const PAGE: usize = 4096;
/// Index of the descriptor among the ring's registered files.
const FILE: types::Fixed = types::Fixed(0);
const WATCH: u64 = u64::MAX;
const POLLIN: u32 = 1;

const _: () = assert!(size_of::<Entry128>() == 128);

/// A completion of the ring.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Arrival {
    /// The command about an entry has completed: the caller owns the entry again.
    Completed(usize, Result<(), Errno>),
    /// The descriptor is readable or broken: `watch` has ended.
    Readable,
}

pub struct CommandRing {
    ring: IoUring<Entry128, cqueue::Entry>,
    /// For each entry: head and payload as two struct iovec.
    iovecs: Vec<[usize; 4]>,
    /// For each entry: whether the driver owns it.
    lent: Vec<bool>,
    outstanding: usize,
    /// Number of queued commands that the kernel has not accepted.
    queued: u32,
    head: usize,
    payload: usize,
    memory: EntryMemory,
}

impl CommandRing {
    /// Creates a ring with entries of `head` and `payload` bytes. Payloads are page-aligned. All pages are
    /// present when it returns.
    pub fn new(file: impl AsFd, entries: usize, head: usize, payload: usize) -> std::io::Result<CommandRing> {
        let (head, payload) = (head.next_multiple_of(64), payload.next_multiple_of(PAGE));
        let slots = u32::try_from(entries + 1).map_err(|_| std::io::ErrorKind::InvalidInput)?;
        let mut builder = IoUring::builder();
        // The thread enters the kernel often: requests need not interrupt it. If a command fails, the next ones are
        // still submitted.
        builder.dontfork().setup_coop_taskrun().setup_submit_all();
        let ring: IoUring<Entry128, cqueue::Entry> = builder.build(slots.next_power_of_two())?;
        ring.submitter().register_files(&[file.as_fd().as_raw_fd()])?;
        let payloads = entries.checked_mul(payload).ok_or(std::io::ErrorKind::InvalidInput)?;
        let memory = EntryMemory::new(payloads + (entries * head).next_multiple_of(PAGE))?;
        let address = |at| memory.at(at) as usize;
        let iovecs = (0..entries)
            .map(|entry| [address(payloads + entry * head), head, address(entry * payload), payload])
            .collect();
        Ok(CommandRing { ring, iovecs, lent: vec![false; entries], outstanding: 0, queued: 0, head, payload, memory })
    }

    /// A descriptor that is readable when completions have arrived.
    pub fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring's descriptor is open as long as the ring exists, and the borrow does not outlive the ring.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }

    pub fn entries(&self) -> usize {
        self.lent.len()
    }

    /// Number of entries that the driver owns.
    pub fn outstanding(&self) -> usize {
        self.outstanding
    }

    pub fn head(&self, entry: usize) -> &[u8] {
        let at = self.own(entry, self.entries() * self.payload + entry * self.head);
        // SAFETY: in the mapping, and owned by the caller: the driver does not write to it, and only `&mut self` can
        // change that.
        unsafe { std::slice::from_raw_parts(at, self.head) }
    }

    pub fn head_mut(&mut self, entry: usize) -> &mut [u8] {
        let at = self.own(entry, self.entries() * self.payload + entry * self.head);
        // SAFETY: as above, and self is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(at, self.head) }
    }

    pub fn payload(&self, entry: usize) -> &[u8] {
        let at = self.own(entry, entry * self.payload);
        // SAFETY: as in `head`; a caller with a part from `lend` promises not to call this.
        unsafe { std::slice::from_raw_parts(at, self.payload) }
    }

    pub fn payload_mut(&mut self, entry: usize) -> &mut [u8] {
        let at = self.own(entry, entry * self.payload);
        // SAFETY: as above, and self is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(at, self.payload) }
    }

    /// The first `length` bytes of an entry's payload, for I/O that outlives the borrow of the ring.
    ///
    /// # Safety
    /// The I/O ends before a command uses the entry, its payload is borrowed, or the ring is dropped.
    pub unsafe fn lend(&self, entry: usize, length: usize) -> Slice<'static> {
        assert!(length <= self.payload, "{length} bytes of a payload of {}", self.payload);
        // SAFETY: mapped as long as the ring exists; the rest is promised by the caller.
        unsafe { Slice::new(self.own(entry, entry * self.payload), length) }
    }

    /// The address of an entry's memory. Panics if the driver owns the entry.
    fn own(&self, entry: usize, at: usize) -> *mut u8 {
        assert!(!self.lent[entry], "entry {entry} is the driver's");
        self.memory.at(at)
    }

    /// Queues a command that passes an entry's memory to the driver (`addr` and `len` of the SQE: two iovecs).
    pub fn register(&mut self, entry: usize, opcode: u32, command: &[u8]) -> std::io::Result<()> {
        let address = self.iovecs[entry].as_ptr() as u64;
        let mut sqe = command_sqe(opcode, command).addr(Some(address)).build();
        // SAFETY: an SQE is 128 bytes of plain numbers; this is one of them, which the builder leaves 0.
        unsafe { (&raw mut sqe).cast::<u8>().add(SQE_LEN_AT).cast::<u32>().write(2) };
        self.push(sqe, entry)
    }

    /// Queues a command about an entry that is registered with the driver.
    pub fn command(&mut self, entry: usize, opcode: u32, command: &[u8]) -> std::io::Result<()> {
        let sqe = command_sqe(opcode, command).build();
        self.push(sqe, entry)
    }

    /// Queues a command that contains the address of an entry's payload. command: makes the bytes of the command from
    /// that address.
    pub fn command_with_payload<const N: usize>(
        &mut self,
        entry: usize,
        opcode: u32,
        command: impl FnOnce(u64) -> [u8; N],
    ) -> std::io::Result<()> {
        let address = self.own(entry, entry * self.payload) as u64;
        self.command(entry, opcode, &command(address))
    }

    fn push(&mut self, sqe: Entry128, entry: usize) -> std::io::Result<()> {
        assert!(!self.lent[entry], "entry {entry} is the driver's");
        // SAFETY: the memory of entries is mapped as long as the ring exists, and the iovecs do not move.
        unsafe { self.ring.submission().push(&sqe.user_data(entry as u64)) }.map_err(std::io::Error::other)?;
        self.lent[entry] = true;
        self.outstanding += 1;
        self.queued += 1;
        Ok(())
    }

    /// Queues a wait until the descriptor is readable; one at a time.
    pub fn watch(&mut self) -> std::io::Result<()> {
        let sqe = Entry128::from(opcode::PollAdd::new(FILE, POLLIN).build()).user_data(WATCH);
        // SAFETY: the operation uses no memory.
        unsafe { self.ring.submission().push(&sqe) }.map_err(std::io::Error::other)?;
        self.queued += 1;
        Ok(())
    }

    /// Whether commands are queued that the kernel has not accepted: `submit` must be called again.
    pub fn is_unsubmitted(&self) -> bool {
        self.queued > 0
    }

    /// Submits the queued commands. If the kernel is busy, the rest stays queued for the next call.
    pub fn submit(&mut self) -> std::io::Result<()> {
        while self.queued > 0 {
            match self.ring.submit() {
                Ok(taken) => self.queued -= self.queued.min(taken as u32),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) if matches!(Errno::from_io_error(&error), Some(Errno::BUSY | Errno::AGAIN)) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Waits until completions have arrived, for up to `timeout`. Returns whether there are any.
    pub fn wait(&self, timeout: Duration) -> std::io::Result<bool> {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).map_err(std::io::Error::other)?;
            match poll(&mut [PollFd::new(&self.fd(), PollFlags::IN)], Some(&left)) {
                Ok(ready) => return Ok(ready > 0),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Takes the completions that have arrived, without a system call.
    pub fn reap(&mut self, mut each: impl FnMut(Arrival)) {
        for completion in self.ring.completion() {
            if completion.user_data() == WATCH {
                each(Arrival::Readable);
                continue;
            }
            let entry = completion.user_data() as usize;
            self.lent[entry] = false;
            self.outstanding -= 1;
            let result = completion.result();
            let result = if result < 0 { Err(Errno::from_raw_os_error(-result)) } else { Ok(()) };
            each(Arrival::Completed(entry, result));
        }
    }
}

impl Drop for CommandRing {
    fn drop(&mut self) {
        // The ring is dropped first, then the memory.
        self.memory.retired = self.outstanding > 0;
    }
}

fn command_sqe(opcode: u32, command: &[u8]) -> opcode::UringCmd80 {
    let mut bytes = [0; COMMAND];
    bytes[..command.len()].copy_from_slice(command);

    opcode::UringCmd80::new(FILE, opcode).cmd(bytes)
}

/// An anonymous private mapping.
struct EntryMemory {
    start: *mut u8,
    length: usize,
    /// The driver may still use it: the addresses stay reserved, without memory.
    retired: bool,
}

// SAFETY: a mapping is an address and a length, and any thread may unmap it.
unsafe impl Send for EntryMemory {}

impl EntryMemory {
    fn new(length: usize) -> std::io::Result<EntryMemory> {
        let (length, protection) = (length.max(PAGE), ProtFlags::READ | ProtFlags::WRITE);
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe { mmap_anonymous(null_mut(), length, protection, MapFlags::PRIVATE) }?.cast();
        // SAFETY: just mapped, and no reference to it exists.
        make_present(unsafe { Slice::new(start, length) });
        Ok(EntryMemory { start, length, retired: false })
    }

    fn at(&self, offset: usize) -> *mut u8 {
        assert!(offset <= self.length);
        // SAFETY: in the mapping.
        unsafe { self.start.add(offset) }
    }
}

impl Drop for EntryMemory {
    fn drop(&mut self) {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: mapped by `new`, and no reference to it exists any more. If the kernel accesses the addresses without
        // memory, its copy fails.
        let released = unsafe {
            match self.retired {
                true => mmap_anonymous(self.start.cast(), self.length, ProtFlags::empty(), flags).map(drop),
                false => munmap(self.start.cast(), self.length),
            }
        };
        if let Err(error) = released {
            tracing::error!(%error, bytes = self.length, "the memory of a ring's entries could not be released");
        }
    }
}
