//! One link of a FUSE connection: a descriptor or a ring.
//!
//! `poll` receives requests from the link until there is none, or `MOST_AT_ONCE` were served (`serve`, `transfer`), and
//! answers each before it receives the next. Requests that must wait go to the loop's queue and are answered when they
//! come back (`queued`). While a request waits for memory, or the link has none for another message (`Link::receives`),
//! nothing is received: the kernel keeps further messages.
//!
//! A connection that ends is `Ending` (nothing more is received, requests in flight are answered) or `Gone` (unmounted
//! or aborted; requests in flight must still end before the connection is removed). A connection that another engine
//! will serve is `Detaching`: waiting requests are withdrawn without an answer, and the kernel sends them again.

mod queued;
mod seek;
mod serve;
mod transfer;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use blkloom_io::Buffer;
use rustix::event::epoll::EventFlags;

use self::queued::Tickets;
use super::file::FuseFile;
use super::link::{Ended as LinkEnded, Link};
use crate::budget::{Account, Budget, Reservation};
use crate::notice::{Outcome, Recipient};
use crate::queue::Ended;
use crate::request::Request;
use crate::transport::ending::State;
use crate::transport::next_memory::NextMemory;
use crate::transport::{LoopContext, Status, Transport};

/// The transport kind of FUSE links.
pub const KIND: &str = "fuse";

/// Most requests in the queue. Those with data are also limited by the link's memory.
const MOST_IN_FLIGHT: usize = 384;
/// Most requests served in one iteration, so that the loop's other transports are served, too.
const MOST_AT_ONCE: usize = 32;

/// Withdrawn messages that the kernel would not send again: (order, bytes).
type Returned = Vec<(u64, Vec<u8>)>;

/// A detached connection, as in `Outcome::Detached`.
pub struct Detached {
    pub fd: OwnedFd,
    /// Messages for `serve`, if the kernel does not support RESEND.
    pub unserved: Vec<u8>,
}

pub(super) struct Connection<L: Link> {
    link: L,
    file: Arc<FuseFile>,
    /// Gets a notice when the file's open count changes.
    recipient: Recipient,
    /// Memory for the request in the stash.
    memory: NextMemory,
    /// The message that waits for memory, or whose memory was just granted.
    stash: Option<L::Message>,
    tickets: Tickets<L>,
    state: State<Returned>,
}

impl<L: Link> Connection<L> {
    pub fn new(file: Arc<FuseFile>, link: L, recipient: Recipient, budget: Arc<Budget>) -> Connection<L> {
        let account = Account::new(budget, file.export.device.clone(), false);
        Connection {
            link,
            file,
            recipient,
            memory: NextMemory::new(account),
            stash: None,
            tickets: Tickets::new(MOST_IN_FLIGHT),
            state: State::Open,
        }
    }

    fn reads(&self) -> bool {
        self.state.is_open()
            && !self.memory.is_waiting()
            && self.tickets.len() < MOST_IN_FLIGHT
            && (self.stash.is_some() || self.link.receives())
    }

    fn is_gone(&self) -> bool {
        self.state.is_gone()
    }

    fn end_now(&mut self, reason: &str) {
        if self.state.end_now(reason) {
            self.forget_input();
        }
    }

    fn forget_input(&mut self) {
        self.stash = None;
        self.memory.forget();
    }

    /// Ends the connection if the link has ended.
    fn check(&mut self, result: Result<(), LinkEnded>) {
        if let Err(reason) = result {
            self.end_now(&reason);
        }
    }

    fn receive(&mut self) -> Option<L::Message> {
        if self.stash.is_some() {
            return self.stash.take();
        }
        match self.link.receive() {
            Ok(message) => message,
            Err(reason) => {
                self.end_now(&reason);
                None
            }
        }
    }

    /// Receives and serves requests. Returns whether there was any work.
    fn serve_some(&mut self, cx: &mut LoopContext) -> bool {
        for served in 0..MOST_AT_ONCE {
            let open = self.state.is_open();
            if !self.reads() {
                return served > 0;
            }
            match self.receive() {
                Some(message) => self.serve(message, cx),
                None => return served > 0 || open && self.is_gone(),
            }
        }
        true
    }
}

impl<L: Link + 'static> Transport for Connection<L> {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.link.descriptor()
    }

    fn status(&self) -> Status {
        let mut interest = EventFlags::empty();
        interest.set(EventFlags::IN, self.reads());
        Status {
            interest: (!self.is_gone()).then_some(interest),
            ready: self.reads() && (self.stash.is_some() || self.link.is_ready()),
            stall: None,
            taken: None,
            leaving: matches!(self.state, State::Detaching(_) | State::Gone(_)),
            over: self.tickets.len() == 0 && !self.state.is_open(),
        }
    }

    fn reserves(&self) -> usize {
        MOST_IN_FLIGHT
    }

    fn poll(&mut self, _: &mut Buffer, cx: &mut LoopContext) -> bool {
        let moved = self.serve_some(cx);
        let sent = self.link.send();
        self.check(sent);
        moved
    }

    fn complete(&mut self, token: u64, ended: Ended, cx: &mut LoopContext) {
        self.answer(token, ended, cx);
    }

    fn send(&mut self, _: &mut LoopContext) {
        let sent = self.link.send();
        self.check(sent);
    }

    fn granted(&mut self, reservation: Reservation) {
        self.memory.granted(reservation);
    }

    /// The kernel accepts replies at once, so drain makes no difference.
    fn detach(&mut self, _drain: bool) {
        if self.state.is_open() {
            let stash = self.stash.take();
            let unserved = self.link.unserved(stash);
            self.forget_input();
            self.state = State::Detaching(vec![(u64::MAX, unserved)]);
        }
    }

    fn take_back(&mut self, token: u64, request: Request, cx: &mut LoopContext) -> Option<Request> {
        let State::Detaching(unserved) = &mut self.state else {
            return Some(request);
        };
        let Some(ticket) = self.tickets.take(token) else {
            return Some(request);
        };
        self.file.export.stats.withdraw(cx.shard);
        if !self.file.is_resent() {
            unserved.push((ticket.order, self.link.unanswered(&ticket.kept, &request.memory)));
        }
        let message = self.link.regain(ticket.kept, request.memory);
        self.link.forget(message);
        None
    }

    fn close(&mut self, reason: &str) {
        if self.state.end_after_replies(reason) {
            self.forget_input();
        }
    }

    fn hung_up(&mut self) {
        let reason = self.link.why_broken();
        self.end_now(&reason);
    }

    fn abort(&mut self, reason: &str) {
        self.end_now(reason);
    }

    fn end(self: Box<Self>) -> Outcome {
        let Connection { state, file, link, .. } = *self;
        state.outcome(|mut returned| {
            returned.sort_unstable_by_key(|(order, _)| *order);
            let all = returned.into_iter().flat_map(|(_, bytes)| bytes);
            let unserved = if file.is_resent() { Vec::new() } else { all.collect() };
            Outcome::Detached(Box::new(Detached { fd: link.into_descriptor(), unserved }))
        })
    }
}
