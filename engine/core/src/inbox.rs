//! How other threads reach a loop: a list of messages and an eventfd that wakes it.
//!
//! Sending to a loop that is awake costs a lock and no system call: the loop says when it is about
//! to sleep, and looks into the inbox once more after saying so.

use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use blkloom_io::Process;
use rustix::event::{EventfdFlags, eventfd};

use crate::budget::Reservation;
use crate::fault::Answer;
use crate::lock;
use crate::nbd::Connection;
use crate::notice::{clear, raise};
use crate::pool::Work;
use crate::request::Request;

/// Names a task of a loop; a task that is gone has another generation.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct TaskId {
    pub slot: usize,
    pub generation: u32,
}

pub enum Message {
    Submit(Box<Request>),
    /// A pool thread did a task's work.
    Worked(TaskId, Work),
    /// Python answered a fault.
    Answered(TaskId, Answer),
    /// The gate a task waited at has opened (or its device has closed).
    GateOpened(TaskId),
    /// A held task is walked again.
    Released(TaskId),
    /// A held task fails.
    HoldRefused(TaskId),
    /// Memory that the connection's next request waited for.
    Reserved {
        slot: usize,
        id: u64,
        reservation: Reservation,
    },
    Serve(Box<Connection>),
    CloseConnection(u64),
    DetachConnection {
        id: u64,
        drain: bool,
    },
    Stop,
}

pub struct Inbox {
    messages: Mutex<Vec<Message>>,
    waiting: AtomicBool,
    asleep: AtomicBool,
    pub(crate) event: OwnedFd,
    home: Process,
}

impl Inbox {
    pub fn new() -> std::io::Result<Inbox> {
        Ok(Inbox {
            messages: Mutex::new(Vec::new()),
            waiting: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            home: Process::current(),
        })
    }

    /// In a fork of the loop's process, where there is no loop, the message is dropped.
    pub fn send(&self, message: Message) {
        if !self.home.is_current() {
            return;
        }
        lock(&self.messages).push(message);
        self.waiting.store(true, Ordering::SeqCst);
        if self.asleep.swap(false, Ordering::SeqCst) {
            raise(&self.event);
        }
    }

    pub fn has_messages(&self) -> bool {
        self.waiting.load(Ordering::Relaxed)
    }

    pub fn take(&self) -> Vec<Message> {
        if !self.waiting.swap(false, Ordering::SeqCst) {
            return Vec::new();
        }
        std::mem::take(&mut lock(&self.messages))
    }

    /// Announces sleep. False: there are messages, do not.
    pub fn doze(&self) -> bool {
        self.asleep.store(true, Ordering::SeqCst);
        if self.waiting.load(Ordering::SeqCst) {
            self.asleep.store(false, Ordering::SeqCst);
            return false;
        }
        true
    }

    pub fn woke(&self) {
        self.asleep.store(false, Ordering::SeqCst);
    }

    /// Makes the event unreadable; whoever was told of it looks for messages next. Not left to `woke`:
    /// a sender may raise it only after the loop woke for another reason, and it would then be
    /// readable, and the loop sleepless, for ever.
    pub fn clear(&self) {
        clear(&self.event);
    }
}
