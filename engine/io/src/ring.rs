//! `Ring`: an io_uring for reads and writes. Each operation completes with its key and result.
//!
//! Each loop thread has one ring. io_uring may be forbidden (by a container or by sysctl): then `Ring::new` fails with
//! the kernel's errno, and the caller uses threads instead.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, types};
use rustix::fd::BorrowedFd;
use rustix::io::Errno;
use slab::Slab;

use crate::file::File;
use crate::memory::{Slice, Source};
use crate::registered::{Registered, Table};

/// An io_uring.
pub struct Ring {
    ring: IoUring,
    /// Operations in flight: (file, key). The file stays open until its completion is reaped.
    in_flight: Slab<(Arc<File>, u64)>,
    /// Slots of the operations that are queued and that the kernel has not accepted, in order.
    unsubmitted: VecDeque<usize>,
    /// Since this time the kernel has accepted no operation.
    refused: Option<Instant>,
    /// `take_back` was called: queued operations must never be submitted, because their memory may be freed.
    given_up: bool,
    limit: usize,
    buffers: Table,
}

/// The completion of one operation.
pub struct Completion {
    pub key: u64,
    /// Bytes moved.
    pub result: Result<u64, Errno>,
}

const RWF_DSYNC: i32 = 2;
/// When the kernel has accepted no operation for this long, the ring counts as broken.
const PATIENCE: Duration = Duration::from_secs(5);

impl Ring {
    /// Creates a ring. entries: size of the submission queue; the completion queue has four times as many entries.
    pub fn new(entries: u32) -> std::io::Result<Ring> {
        let build = |cooperative: bool| {
            let mut builder = IoUring::builder();
            builder.setup_clamp().setup_cqsize(entries * 4).dontfork();
            if cooperative {
                // The loop enters the kernel often: completions need not interrupt it.
                builder.setup_coop_taskrun();
            }
            builder.build(entries)
        };
        let ring = match build(true) {
            // Linux before 5.19.
            Err(error) if Errno::from_io_error(&error) == Some(Errno::INVAL) => build(false)?,
            other => other?,
        };
        let limit = ring.params().cq_entries() as usize;
        Ok(Ring {
            ring,
            in_flight: Slab::with_capacity(limit),
            unsubmitted: VecDeque::with_capacity(limit),
            refused: None,
            given_up: false,
            limit,
            buffers: Table::default(),
        })
    }

    /// A descriptor that is readable when completions have arrived.
    pub fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring's descriptor is open as long as the ring exists, and the borrow does not outlive the ring.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }

    /// Whether another operation could overflow the completion queue. The caller must use threads instead.
    pub fn is_full(&self) -> bool {
        self.in_flight.len() >= self.limit
    }

    /// Most completions that `reap` appends.
    pub fn limit(&self) -> usize {
        self.limit
    }

    pub fn is_idle(&self) -> bool {
        self.in_flight.is_empty()
    }

    /// Queues a read. Its completion has the same `key`. An error: the ring cannot accept the read now.
    ///
    /// The memory must be valid until the completion, so borrowed memory is not accepted:
    ///
    /// ```compile_fail,E0597
    /// # use std::sync::Arc;
    /// # fn read(ring: &mut blkloom_io::Ring, file: &Arc<blkloom_io::File>) {
    /// let mut buffer = blkloom_io::Buffer::new(4096);
    /// let _queued = ring.read(file, 0, buffer.slice(), 1);
    /// # }
    /// ```
    pub fn read(&mut self, file: &Arc<File>, offset: u64, into: Slice<'static>, key: u64) -> std::io::Result<()> {
        let entry = opcode::Read::new(types::Fd(raw(file)), into.as_ptr(), part(into.len())).offset(offset).build();
        self.push(entry, file, key)
    }

    /// Queues a write. durable: as if followed by fdatasync (RWF_DSYNC).
    pub fn write(
        &mut self,
        file: &Arc<File>,
        offset: u64,
        from: Source<'static>,
        durable: bool,
        key: u64,
    ) -> std::io::Result<()> {
        let entry = opcode::Write::new(types::Fd(raw(file)), from.as_ptr(), part(from.len()))
            .offset(offset)
            .rw_flags(if durable { RWF_DSYNC } else { 0 })
            .build();
        self.push(entry, file, key)
    }

    /// Registers memory with this ring. The memory must be valid until it is unregistered and all I/O on it has ended.
    pub fn register(&mut self, memory: Slice<'static>) -> std::io::Result<Registered> {
        self.buffers.register(&self.ring, self.ring.as_raw_fd(), memory)
    }

    /// Unregisters a buffer and frees its slot. I/O in flight on it is not affected.
    pub fn unregister(&mut self, buffer: Registered) -> std::io::Result<()> {
        self.check(buffer)?;
        self.buffers.unregister(&self.ring, buffer.index)
    }

    /// Like `read`, into a buffer that is registered with this ring.
    pub fn read_registered(
        &mut self,
        file: &Arc<File>,
        offset: u64,
        into: Registered,
        key: u64,
    ) -> std::io::Result<()> {
        self.check(into)?;
        let (fd, memory) = (types::Fd(raw(file)), into.address as *mut u8);
        self.push(opcode::ReadFixed::new(fd, memory, part(into.len()), into.index).offset(offset).build(), file, key)
    }

    /// Like `write`, from a buffer that is registered with this ring.
    pub fn write_registered(
        &mut self,
        file: &Arc<File>,
        offset: u64,
        from: Registered,
        key: u64,
    ) -> std::io::Result<()> {
        self.check(from)?;
        let (fd, memory) = (types::Fd(raw(file)), from.address as *const u8);
        self.push(opcode::WriteFixed::new(fd, memory, part(from.len()), from.index).offset(offset).build(), file, key)
    }

    /// Fails for a buffer of another ring, which may use the same index.
    fn check(&self, buffer: Registered) -> std::io::Result<()> {
        if buffer.ring == self.ring.as_raw_fd() { Ok(()) } else { Err(std::io::ErrorKind::InvalidInput.into()) }
    }

    fn push(&mut self, entry: io_uring::squeue::Entry, file: &Arc<File>, key: u64) -> std::io::Result<()> {
        if self.given_up {
            return Err(std::io::ErrorKind::BrokenPipe.into());
        }
        let slot = self.in_flight.insert((file.clone(), key));
        let entry = entry.user_data(slot as u64);
        // SAFETY: the memory is valid until the completion (it is `'static`, or promised by Slice::new, or registered:
        // the kernel keeps registered pages), and `in_flight` keeps the file open until then.
        let mut pushed = unsafe { self.ring.submission().push(&entry) };
        if pushed.is_err() && self.submit().is_ok() {
            // SAFETY: as above.
            pushed = unsafe { self.ring.submission().push(&entry) };
        }
        if pushed.is_err() {
            // The kernel accepts none now. Waiting here could deadlock: this thread must reap completions first.
            self.in_flight.remove(slot);
            return Err(std::io::ErrorKind::WouldBlock.into());
        }
        self.unsubmitted.push_back(slot);
        Ok(())
    }

    /// Whether operations are queued that the kernel has not accepted: `submit` must be called again.
    pub fn is_unsubmitted(&self) -> bool {
        !self.unsubmitted.is_empty()
    }

    /// Submits the queued operations. If the kernel is busy, the rest stays queued for the next call. An error: the
    /// kernel accepts nothing any more, and the caller must execute the remaining operations in another way
    /// (`take_back`).
    pub fn submit(&mut self) -> std::io::Result<()> {
        while !self.unsubmitted.is_empty() {
            let refusal = match self.enter() {
                Ok(0) => std::io::ErrorKind::WouldBlock.into(),
                Ok(_) => continue,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) if matches!(Errno::from_io_error(&error), Some(Errno::BUSY | Errno::AGAIN)) => error,
                Err(error) => return Err(error),
            };
            let since = *self.refused.get_or_insert_with(Instant::now);
            return if since.elapsed() < PATIENCE { Ok(()) } else { Err(refusal) };
        }
        Ok(())
    }

    /// Enters the kernel once. Returns the number of operations that it accepted.
    fn enter(&mut self) -> std::io::Result<usize> {
        let taken = self.ring.submit()?.min(self.unsubmitted.len());
        self.unsubmitted.drain(..taken);
        if taken > 0 {
            self.refused = None;
        }
        Ok(taken)
    }

    /// Removes the operations that the kernel has not accepted and returns their keys, in order. The ring accepts
    /// nothing after this. Operations that the kernel has accepted still complete.
    pub fn take_back(&mut self) -> Vec<u64> {
        self.given_up = true;
        let slots = std::mem::take(&mut self.unsubmitted);
        slots.into_iter().map(|slot| self.in_flight.remove(slot).1).collect()
    }

    /// Appends the completions that have arrived. No system call, unless the completion queue has overflowed.
    pub fn reap(&mut self, into: &mut Vec<Completion>) {
        for entry in self.ring.completion() {
            let (_file, key) = self.in_flight.remove(entry.user_data() as usize);
            let result = entry.result();
            let result = u64::try_from(result).map_err(|_| Errno::from_raw_os_error(-result));
            into.push(Completion { key, result });
        }
        if !self.given_up && self.ring.submission().cq_overflow() {
            // The next io_uring_enter moves the kernel's overflow list. `submit` reports an error again.
            let _entered = self.enter();
        }
    }
}

/// Length of one operation, at most 1 GiB. The caller continues a short transfer.
fn part(len: usize) -> u32 {
    len.min(1 << 30) as u32
}

fn raw(file: &File) -> RawFd {
    file.fd().as_raw_fd()
}
