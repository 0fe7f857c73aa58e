//! io_uring, as much of it as the loops need: reads and writes that come back as (key, result).
//!
//! One ring belongs to one loop thread. The kernel side may be forbidden (containers, sysctl);
//! `Ring::new` then fails with its errno and the caller uses threads instead.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use io_uring::{IoUring, opcode, types};
use rustix::fd::BorrowedFd;
use slab::Slab;

use crate::errno::EINVAL;
use crate::file::File;
use crate::memory::Slice;

pub struct Ring {
    ring: IoUring,
    /// What the kernel still uses: the file stays open until its completion was reaped.
    in_flight: Slab<(Arc<File>, u64)>,
    unsubmitted: usize,
    limit: usize,
}

pub struct Completion {
    pub key: u64,
    /// Bytes moved, or -errno.
    pub result: i32,
}

const RWF_DSYNC: i32 = 2;

impl Ring {
    /// entries: submission slots; completions may wait in four times as many.
    pub fn new(entries: u32) -> std::io::Result<Ring> {
        let build = |cooperative: bool| {
            let mut builder = IoUring::builder();
            builder.setup_clamp().setup_cqsize(entries * 4).dontfork();
            if cooperative {
                // The loop enters the kernel all the time: completions need not interrupt it for that.
                builder.setup_coop_taskrun();
            }
            builder.build(entries)
        };
        let ring = match build(true) {
            // Linux before 5.19.
            Err(error) if error.raw_os_error() == Some(EINVAL) => build(false)?,
            other => other?,
        };
        let limit = ring.params().cq_entries() as usize;
        Ok(Ring { ring, in_flight: Slab::new(), unsubmitted: 0, limit })
    }

    /// Readable when completions have arrived.
    pub fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring's descriptor is open as long as the ring is, which the borrow outlives not.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }

    /// More would overflow the completion queue; use threads for the excess.
    pub fn is_full(&self) -> bool {
        self.in_flight.len() >= self.limit
    }

    pub fn is_idle(&self) -> bool {
        self.in_flight.is_empty()
    }

    /// Queues a read; `key` comes back with its completion. An error: the ring cannot take it now.
    pub fn read(&mut self, file: &Arc<File>, offset: u64, into: Slice, key: u64) -> std::io::Result<()> {
        let entry = opcode::Read::new(types::Fd(raw(file)), into.ptr(), part(into)).offset(offset).build();
        self.push(entry, file, key)
    }

    /// Queues a write; `durable` makes it as if followed by fdatasync.
    pub fn write(
        &mut self,
        file: &Arc<File>,
        offset: u64,
        from: Slice,
        durable: bool,
        key: u64,
    ) -> std::io::Result<()> {
        let entry = opcode::Write::new(types::Fd(raw(file)), from.ptr(), part(from))
            .offset(offset)
            .rw_flags(if durable { RWF_DSYNC } else { 0 })
            .build();
        self.push(entry, file, key)
    }

    fn push(&mut self, entry: io_uring::squeue::Entry, file: &Arc<File>, key: u64) -> std::io::Result<()> {
        let slot = self.in_flight.insert((file.clone(), key));
        let entry = entry.user_data(slot as u64);
        // SAFETY: the memory was promised for as long as slices of it are in use (Slice::new), and
        // the file is held in `in_flight` until the completion.
        let mut pushed = unsafe { self.ring.submission().push(&entry) };
        if pushed.is_err() && self.submit().is_ok() {
            // SAFETY: as above.
            pushed = unsafe { self.ring.submission().push(&entry) };
        }
        if pushed.is_err() {
            // The kernel takes none now; waiting for it here might be waiting for completions that
            // nobody reaps meanwhile.
            self.in_flight.remove(slot);
            return Err(std::io::ErrorKind::WouldBlock.into());
        }
        self.unsubmitted += 1;
        Ok(())
    }

    /// Something is queued that the kernel has not taken yet: `submit` must be called again.
    pub fn is_unsubmitted(&self) -> bool {
        self.unsubmitted > 0
    }

    /// Tells the kernel of what was queued. Where it is busy the rest stays queued for the next call.
    pub fn submit(&mut self) -> std::io::Result<()> {
        while self.unsubmitted > 0 {
            match self.ring.submit() {
                Ok(0) => return Ok(()),
                Ok(taken) => self.unsubmitted -= taken.min(self.unsubmitted),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) if matches!(error.raw_os_error(), Some(16 | 11)) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Takes the completions that have arrived; no system call unless the kernel's side overflowed.
    pub fn reap(&mut self, into: &mut Vec<Completion>) {
        for entry in self.ring.completion() {
            let (_file, key) = self.in_flight.remove(entry.user_data() as usize);
            into.push(Completion { key, result: entry.result() });
        }
        if self.ring.submission().cq_overflow() {
            // The kernel moves its overflow list on the next enter; an error shows again at submit.
            let _entered = self.ring.submitter().submit();
        }
    }
}

/// What one entry moves at most; the queue asks again for the rest.
fn part(memory: Slice) -> u32 {
    memory.len().min(1 << 30) as u32
}

fn raw(file: &File) -> RawFd {
    file.fd().as_raw_fd()
}
