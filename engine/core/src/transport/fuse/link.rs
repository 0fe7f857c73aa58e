//! `Link`: the interface to receive the messages of a FUSE connection and to send replies.
//!
//! Requests and replies are the same over every link (`connection`). Each message is answered once by `reply` or
//! `reply_data`, or dropped by `forget`. A message has memory for the data of a read. While its request is in the
//! queue, the message is a `Kept`.

use blkloom_fuse_wire::{Malformed, Request, Unique};
use blkloom_io::{Slice, Source};
use rustix::fd::{BorrowedFd, OwnedFd};

use crate::request::Memory;

/// Why a connection has ended.
pub(super) type Ended = String;

/// The data of a request that goes to the queue.
#[derive(Clone, Copy)]
pub(super) enum Bytes {
    None,
    /// A read of `length` bytes; the first `done` are read already.
    Read {
        length: usize,
        done: usize,
    },
    /// A write of the first `length` bytes of its data.
    Write {
        length: usize,
    },
}

/// A source of FUSE messages: /dev/fuse or an io_uring.
pub(super) trait Link: Send {
    type Message: Send;
    type Kept: Send;

    fn descriptor(&self) -> BorrowedFd<'_>;

    /// Whether a message could be received now. False: none has memory before a request ends.
    fn receives(&self) -> bool;

    /// Receives the next message, if there is one.
    fn receive(&mut self) -> Result<Option<Self::Message>, Ended>;

    /// Whether `receive` or `send` has work to do without new input.
    fn is_ready(&self) -> bool;

    /// Why the descriptor has ended (EPOLLHUP, EPOLLERR), while nothing is received.
    fn why_broken(&mut self) -> Ended;

    /// Parses a message. joined: scratch memory for a message whose parts must be joined.
    fn parse<'a>(&'a self, message: &'a Self::Message, joined: &'a mut Vec<u8>) -> Result<Request<'a>, Malformed>;

    /// Size of a message's memory for the data of a read.
    fn room(&self, message: &Self::Message) -> usize;

    /// The first bytes of a message's memory, no more than `room`.
    fn destination<'a>(&'a mut self, message: &'a mut Self::Message, length: usize) -> Slice<'a>;

    /// The first bytes of a write's data.
    fn source<'a>(&'a self, message: &'a Self::Message, length: usize) -> Source<'a>;

    /// Keeps a message while its request is in the queue. Returns the memory for the request.
    fn keep(&mut self, message: Self::Message, bytes: Bytes) -> (Memory, Self::Kept);

    /// Restores the message of a request that has ended, with the data of a read in its memory.
    fn regain(&mut self, kept: Self::Kept, memory: Memory) -> Self::Message;

    /// Answers with a whole reply.
    fn reply(&mut self, message: Self::Message, reply: &[u8]) -> Result<(), Ended>;

    /// Answers a read with the first `length` bytes of the message's memory.
    fn reply_data(&mut self, message: Self::Message, unique: Unique, length: usize) -> Result<(), Ended>;

    /// Drops a message without a reply.
    fn forget(&mut self, message: Self::Message);

    /// Sends waiting replies.
    fn send(&mut self) -> Result<(), Ended>;

    /// The bytes of a message whose request was withdrawn, for the next engine.
    fn unanswered(&self, kept: &Self::Kept, memory: &Memory) -> Vec<u8>;

    /// Takes the messages that were received and not served, `first` first, for the next engine.
    fn unserved(&mut self, first: Option<Self::Message>) -> Vec<u8>;

    /// The descriptor that the link was created with.
    fn into_descriptor(self) -> OwnedFd;
}
