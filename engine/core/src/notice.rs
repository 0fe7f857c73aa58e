//! Notices: a queue of events from event loops to Python's asyncio loop (ended I/O; transports' users, end and detach).
//!
//! An eventfd is readable while the queue is not empty. Event loops push, Python takes.

use std::any::Any;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex};

use blkloom_io::{Errno, Process};

use crate::event::Event;
use crate::lock;
use crate::operation::Found;

/// The event that a notice reports.
pub enum Outcome {
    Io {
        error: Option<Errno>,
        found: Vec<Found>,
    },
    Closed {
        reason: String,
    },
    /// The number of users has changed to this.
    Users(u64),
    /// The transport was detached. The state that the next engine needs to continue; its type depends on the transport.
    Detached(Box<dyn Any + Send>),
}

/// Where to report the end of one request or transport: a notice queue, and the reader's token.
#[derive(Clone)]
pub struct Recipient {
    pub notices: Arc<Notices>,
    pub token: u64,
}

impl Recipient {
    pub(crate) fn tell(self, outcome: Outcome) {
        self.notices.push(self.token, outcome);
    }
}

pub struct Notice {
    pub token: u64,
    pub outcome: Outcome,
}

pub struct Notices {
    queue: Mutex<Vec<Notice>>,
    event: Event,
    home: Process,
}

impl Notices {
    pub fn new() -> std::io::Result<Notices> {
        Ok(Notices { queue: Mutex::new(Vec::new()), event: Event::new()?, home: Process::current() })
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    pub(crate) fn push(&self, token: u64, outcome: Outcome) {
        let mut queue = lock(&self.queue);
        queue.push(Notice { token, outcome });
        if queue.len() == 1 {
            self.event.raise();
        }
    }

    /// Takes all notices. Empty in a fork: the eventfd is shared with the parent.
    pub fn take(&self) -> Vec<Notice> {
        if !self.home.is_current() {
            return Vec::new();
        }
        let mut queue = lock(&self.queue);
        self.event.clear();
        std::mem::take(&mut *queue)
    }
}
