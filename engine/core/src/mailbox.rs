//! `Mailbox`: a message queue from other threads to an event loop, with an eventfd that wakes the loop.
//!
//! Posting to a loop that is awake costs a lock and no system call: the loop sets a flag before it sleeps, and checks
//! the mailbox once more after that. Only the reader knows all kinds of messages; a sender has a `Poster` for the one
//! kind that it sends. Any thread may post, one thread reads.

use std::sync::Arc;

use blkloom_io::Process;

use crate::event::Event;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Mutex, lock};

/// A receiver of messages of one kind.
pub trait Post<M>: Send + Sync {
    fn post(&self, message: M);
}

/// The sender's side of a mailbox, for one kind of message.
pub type Poster<M> = Arc<dyn Post<M>>;

pub struct Mailbox<T> {
    messages: Mutex<Vec<T>>,
    waiting: AtomicBool,
    asleep: AtomicBool,
    pub(crate) event: Event,
    home: Process,
}

impl<T> Mailbox<T> {
    pub fn new() -> std::io::Result<Mailbox<T>> {
        Ok(Mailbox {
            messages: Mutex::new(Vec::new()),
            waiting: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
            event: Event::new()?,
            home: Process::current(),
        })
    }

    /// Queues a message and wakes the reader if it sleeps. In a fork of the reader's process the message is dropped:
    /// the reader does not exist there.
    pub fn send(&self, message: T) {
        if !self.home.is_current() {
            return;
        }
        lock(&self.messages).push(message);
        self.waiting.store(true, Ordering::SeqCst);
        if self.asleep.swap(false, Ordering::SeqCst) {
            self.event.raise();
        }
    }

    pub fn has_messages(&self) -> bool {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Takes all messages, oldest first, in exchange for an empty list, whose memory is used for later messages.
    pub fn take(&self, into: &mut Vec<T>) {
        assert!(into.is_empty(), "messages would be taken again");
        if self.waiting.swap(false, Ordering::SeqCst) {
            std::mem::swap(&mut *lock(&self.messages), into);
        }
    }

    /// Allocates memory for `additional` messages beside those that wait.
    pub fn reserve(&self, additional: usize) {
        lock(&self.messages).reserve(additional);
    }

    /// Announces that the reader will sleep. False: there are messages, and it must not sleep.
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

    /// Clears the event. The reader calls this when epoll reports the event, and then takes the messages. `woke` cannot
    /// do it: a sender may raise the event after the reader has woken for another reason, and then the event would stay
    /// readable for ever.
    pub fn clear(&self) {
        self.event.clear();
    }
}

impl<M, T: From<M> + Send> Post<M> for Mailbox<T> {
    fn post(&self, message: M) {
        self.send(message.into());
    }
}
