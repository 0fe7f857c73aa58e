//! `Signal`: an eventfd of another program, raised without ever waiting.
//!
//! A write to an eventfd waits while its counter is full, unless the open file is non-blocking. The other program shares
//! the open file: it may fill the counter and make the file blocking at any time, and a check before the write comes too
//! early. The kernel itself never waits when it raises an eventfd, so each raise is the completion of an operation that
//! does nothing, in an io_uring that the eventfd is registered with.

use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, OwnedFd};

use io_uring::{IoUring, opcode};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::fork::Process;

pub struct Signal {
    event: OwnedFd,
    /// None: io_uring is forbidden.
    ring: Option<ManuallyDrop<IoUring>>,
    home: Process,
}

impl Signal {
    /// Where io_uring is forbidden, the eventfd is written if that would not wait at the moment.
    pub fn new(event: OwnedFd) -> std::io::Result<Signal> {
        let ring = match IoUring::builder().setup_clamp().dontfork().build(1) {
            Ok(ring) => {
                ring.submitter().register_eventfd(event.as_raw_fd())?;
                Some(ManuallyDrop::new(ring))
            }
            Err(error) => {
                tracing::debug!(%error, "no io_uring to raise an eventfd with");
                None
            }
        };
        Ok(Signal { event, ring, home: Process::current() })
    }

    /// Makes the eventfd readable. One whose counter is full is readable already.
    pub fn raise(&mut self) -> std::io::Result<()> {
        let Some(ring) = &mut self.ring else {
            let mut writable = [PollFd::new(&self.event, PollFlags::OUT)];
            poll(&mut writable, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
            if !writable[0].revents().contains(PollFlags::OUT) {
                return Ok(());
            }
            return match rustix::io::write(&self.event, &1u64.to_ne_bytes()) {
                Ok(_) | Err(Errno::AGAIN) => Ok(()),
                Err(errno) => Err(errno.into()),
            };
        };
        // SAFETY: the operation has no memory. If it is not pushed, the one before was not submitted, and is now.
        let _full = unsafe { ring.submission().push(&opcode::Nop::new().build()) };
        ring.submit()?;
        ring.completion().for_each(drop);
        Ok(())
    }
}

impl Drop for Signal {
    fn drop(&mut self) {
        // A fork does not have the mappings of the ring, and may have others there.
        if self.home.is_current()
            && let Some(ring) = &mut self.ring
        {
            // SAFETY: not used afterwards.
            unsafe { ManuallyDrop::drop(ring) }
        }
    }
}
