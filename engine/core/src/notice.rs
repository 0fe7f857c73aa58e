//! What an event loop of Python's is told: ended I/O, and connections that closed or were detached.
//!
//! A queue and an eventfd that is readable while the queue is not empty. Loops push, Python takes.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;

use blkloom_io::Process;
use rustix::event::{EventfdFlags, eventfd};

use crate::lock;
use crate::nbd::Unfinished;
use crate::request::Found;

pub enum Outcome {
    Io {
        error: i32,
        found: Vec<Found>,
    },
    Closed {
        reason: String,
    },
    /// The engine let go of the client.
    Detached {
        fd: OwnedFd,
        unfinished: Unfinished,
    },
}

pub struct Notice {
    pub token: u64,
    pub outcome: Outcome,
}

pub struct Notices {
    queue: Mutex<Vec<Notice>>,
    event: OwnedFd,
    home: Process,
}

impl Notices {
    pub fn new() -> std::io::Result<Notices> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Notices { queue: Mutex::new(Vec::new()), event, home: Process::current() })
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    pub(crate) fn push(&self, token: u64, outcome: Outcome) {
        let mut queue = lock(&self.queue);
        queue.push(Notice { token, outcome });
        if queue.len() == 1 {
            raise(&self.event);
        }
    }

    /// Nothing in a fork of the process: the event's counter is its parent's, too.
    pub fn take(&self) -> Vec<Notice> {
        if !self.home.is_current() {
            return Vec::new();
        }
        let mut queue = lock(&self.queue);
        clear(&self.event);
        std::mem::take(&mut *queue)
    }
}

/// Makes an eventfd readable. A full counter (EAGAIN) is readable already.
pub(crate) fn raise(event: &OwnedFd) {
    let _written = rustix::io::write(event, &1u64.to_ne_bytes());
}

/// Makes an eventfd unreadable. EAGAIN: it was.
pub(crate) fn clear(event: &OwnedFd) {
    let _read = rustix::io::read(event, &mut [0u8; 8]);
}
