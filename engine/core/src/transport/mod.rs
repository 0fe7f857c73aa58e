//! `Transport`: the interface of protocols that bring requests to the engine and carry replies back.
//!
//! An event loop drives its transports: it waits for the events of `Status::interest` on the descriptor, calls `poll`
//! when they occur, and calls `complete` for each request that went through the queue. Only the loop's thread uses a
//! transport. A transport never waits on that thread: not for its peer, for storage or for Python.
//!
//! - `poll` receives all input that has arrived, serves requests by the fast path (`fast_path`) where possible, submits
//!   the others to the queue (`LoopContext::submit`), and sends all replies together.
//! - A submitted request has a token that the transport chooses. The request comes back once, by `complete` or by
//!   `take_back`; the transport keeps the request's memory alive until then. A transport is not `over` before all of
//!   its requests have come back.
//! - The memory of a request is the engine's, the transport's (in pieces), or a buffer registered with the loop's ring
//!   (`LoopContext::register`). The CPU may be unable to access a registered buffer: such requests skip the fast path.
//! - Replies from `complete` are collected. One `send` per iteration of the loop sends them.
//! - A transport with several descriptors adds them to an epoll of its own, and a transport that uses io_uring has a
//!   ring of its own. The loop waits for the descriptor of that epoll or ring.
//!
//! A new transport is one file (or directory) with an implementation of the trait, and a function that passes one to
//! `Engine::serve`.

mod context;
mod ending;
pub mod fuse;
pub mod nbd;
mod next_memory;
pub mod ublk;
pub mod vhost_user;

use std::os::fd::BorrowedFd;
use std::time::Duration;

use blkloom_io::Buffer;
use rustix::event::epoll::EventFlags;

pub use self::context::{Arena, LoopContext};
use crate::budget::Reservation;
use crate::notice::Outcome;
use crate::queue::Ended;
use crate::request::Request;

/// State of a transport, which tells the loop what to wait for.
#[derive(Clone, Copy, Debug)]
pub struct Status {
    /// The epoll events to wait for. None: the descriptor is not watched, not even for errors.
    pub interest: Option<EventFlags>,
    /// `poll` has work to do without new input.
    pub ready: bool,
    /// The transport waits for its peer to complete a request or to receive replies, and is aborted after this time.
    pub stall: Option<Duration>,
    /// While replies wait for the peer: the total number of bytes of such replies that the peer has received. Only this
    /// counts as progress then.
    pub taken: Option<u64>,
    /// The transport is being detached: requests that wait at gates or are deferred are withdrawn. It stays true.
    pub leaving: bool,
    /// The transport has ended and can be removed.
    pub over: bool,
}

/// One connection or mount that an event loop serves.
pub trait Transport: Send {
    /// The kind of transport. Exports count their transports by kind.
    fn kind(&self) -> &'static str;

    /// The descriptor to watch. It does not change while the loop has the transport.
    fn descriptor(&self) -> BorrowedFd<'_>;

    fn status(&self) -> Status;

    /// Most requests in flight for which the loop must need no allocation: it allocates all memory for them before the
    /// first `poll`. 0: memory is allocated as it is needed. Needed where the kernel may wait for a write of this
    /// transport before it gives the process memory.
    fn reserves(&self) -> usize {
        0
    }

    /// Receives and serves requests, and sends waiting replies. Returns whether there was any work. input: memory to
    /// receive into, valid during the call only.
    fn poll(&mut self, input: &mut Buffer, cx: &mut LoopContext) -> bool;

    /// Called when the loop stops polling the transport until the next event. Returns whether input has arrived: then
    /// the loop goes on polling it. Needed where a peer is told that it need not raise events while it is polled.
    fn rest(&mut self) -> bool {
        false
    }

    /// Processes the result of a request that went through the queue. `send` follows.
    fn complete(&mut self, token: u64, ended: Ended, cx: &mut LoopContext);

    /// Sends the replies of `complete`.
    fn send(&mut self, cx: &mut LoopContext);

    /// Delivers the memory that the transport waited for (`LoopContext::wait_for_memory`). `poll` follows.
    fn granted(&mut self, reservation: Reservation);

    /// Detaches the peer, which another engine will serve. The transport stops receiving, and is over when all requests
    /// have ended or were withdrawn. drain: also wait until the peer has received its replies, or until a `detach`
    /// without `drain`.
    fn detach(&mut self, drain: bool);

    /// Keeps a withdrawn request for the engine that serves the peer next. Some: there is no such engine, and the
    /// request fails.
    fn take_back(&mut self, token: u64, request: Request, cx: &mut LoopContext) -> Option<Request>;

    /// Stops receiving and answers the requests in flight. The transport is over when the peer has received the
    /// replies.
    fn close(&mut self, reason: &str);

    /// The descriptor has ended (EPOLLHUP, EPOLLERR) while the transport receives nothing.
    fn hung_up(&mut self) {
        self.abort("the client hung up");
    }

    /// Drops the peer without replies. The transport is over when the requests in flight have ended.
    fn abort(&mut self, reason: &str);

    /// The outcome to report, called when the transport is over.
    fn end(self: Box<Self>) -> Outcome;
}
