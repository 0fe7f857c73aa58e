//! `Event`: an eventfd that is readable after `raise` and until `clear`. Any thread may call either.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};

pub(crate) struct Event {
    fd: OwnedFd,
    /// The condition that a loom model waits for: a thread of a model must not wait in the kernel.
    #[cfg(loom)]
    raised: (crate::sync::Mutex<bool>, crate::sync::Condvar),
}

impl Event {
    pub fn new() -> std::io::Result<Event> {
        Ok(Event {
            fd: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            #[cfg(loom)]
            raised: Default::default(),
        })
    }

    /// Makes the event readable. A full counter (EAGAIN) is readable already.
    pub fn raise(&self) {
        let _written = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
        #[cfg(loom)]
        {
            *crate::sync::lock(&self.raised.0) = true;
            self.raised.1.notify_all();
        }
    }

    /// Makes the event unreadable. EAGAIN: it was not readable.
    pub fn clear(&self) {
        let _read = rustix::io::read(&self.fd, &mut [0u8; 8]);
        #[cfg(loom)]
        {
            *crate::sync::lock(&self.raised.0) = false;
        }
    }

    /// Waits until the event is raised, as epoll does for an event loop.
    #[cfg(loom)]
    pub fn wait(&self) {
        let mut raised = crate::sync::lock(&self.raised.0);
        while !*raised {
            raised = self.raised.1.wait(raised).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
