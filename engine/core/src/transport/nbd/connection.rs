//! One NBD connection in its transmission phase.
//!
//! `poll` receives all input that has arrived by one receive call (`receive`), serves requests on the fast path
//! (`serve`, `transfer`) and sends all replies by one send call (`reply`). Requests that must wait go to the loop's
//! queue and are answered when they come back (`queued`). An idle connection owns no buffers. A request's memory is
//! reserved first (`memory`, and see `budget`); a request that waits for memory stays in the stash, and nothing is
//! received meanwhile.
//!
//! A connection that ends is `Ending` (nothing more is received, requests in flight are answered) or `Gone` (the client
//! is gone or given up; requests in flight must still end before the connection is removed). A connection that another
//! engine will serve is `Detaching` (see `detach`).

mod detach;
mod memory;
mod queued;
mod receive;
mod reply;
mod serve;
mod transfer;

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use blkloom_io::Buffer;
use blkloom_wire::{Header, Rules};
use rustix::event::epoll::EventFlags;

use self::queued::Tickets;
use self::serve::Tally;
use super::output::Output;
use super::session::{KIND, Selected, Session, Skipping, Unfinished};
use super::stream::Stream;
use crate::budget::{Account, Budget, Kept, Reservation};
use crate::clock::LONGEST_TIMEOUT;
use crate::device::Export;
use crate::notice::Outcome;
use crate::queue::Ended;
use crate::request::Request;
use crate::transport::ending::State;
use crate::transport::next_memory::NextMemory;
use crate::transport::{LoopContext, Status, Transport};

enum Input {
    Header,
    Payload {
        /// The header of the write, or of its rest if parts of it are written already.
        header: Header,
        /// Memory for the whole rest, or for one part at a time.
        buffer: Buffer,
        have: usize,
        reservation: Reservation,
    },
    Skip(Skipping),
}

/// State of a connection that is being detached.
struct Leaving {
    /// Withdrawn requests, for the next engine: (order, bytes).
    returned: Vec<(u64, Vec<u8>)>,
    /// Also wait until the client has received its replies.
    drain: bool,
}

pub struct Connection {
    stream: Box<dyn Stream>,
    export: Arc<Export>,
    rules: Rules,
    contexts: Box<[Selected]>,
    stall: Duration,
    input: Input,
    /// Received bytes that are not processed yet: part of a header, or more while the connection is full.
    stash: Vec<u8>,
    /// A payload that the engine before was skipping. It follows the stash.
    skips_next: Option<Skipping>,
    output: Output,
    kept: Kept,
    /// Memory for the request in the stash.
    memory: NextMemory,
    /// The requests in flight.
    tickets: Tickets,
    in_flight_bytes: u64,
    /// Number of requests submitted to the queue ever.
    queued: u64,
    state: State<Leaving>,
    /// `detach` was called.
    leaving: bool,
    /// The client's disconnect request, if it was received.
    parting: Option<Header>,
    tally: Tally,
}

const MOST_IN_FLIGHT: usize = 1024;
const MOST_BYTES_IN_FLIGHT: u64 = 64 << 20;
/// More would be evicted from the CPU cache before it is sent.
const MOST_OUTPUT: usize = 256 << 10;
/// Bytes to receive at once while memory is tight. A stash of this size is not counted.
const LITTLE: usize = 4096;
/// Largest size of a reply header, an error, or a block status that fits a page.
const HEAD: usize = 4096 + 64;

impl Connection {
    pub fn new(export: Arc<Export>, stream: Box<dyn Stream>, session: Session, budget: Arc<Budget>) -> Connection {
        let rules = Rules {
            style: session.style,
            size: export.device.size(),
            read_only: export.read_only || session.read_only,
            block_status: !session.contexts.is_empty(),
            max_payload: u64::from(session.max_payload),
        };
        let Unfinished { initial, unsent, skipping } = session.unfinished;
        let mut output = Output::default();
        if !unsent.is_empty() {
            output.push(unsent, None, None);
        }
        let (input, skips_next) = match skipping {
            Some(skipping) if initial.is_empty() => (Input::Skip(skipping), None),
            skipping => (Input::Header, skipping),
        };
        let account = Account::new(budget, export.device.clone(), is_own_process(stream.descriptor()));
        Connection {
            stream,
            export,
            rules,
            contexts: session.contexts,
            stall: session.stall.min(LONGEST_TIMEOUT),
            input,
            stash: initial,
            skips_next,
            output,
            kept: Kept::new(account.clone()),
            memory: NextMemory::new(account),
            tickets: Tickets::default(),
            in_flight_bytes: 0,
            queued: 0,
            state: State::Open,
            leaving: false,
            parting: None,
            tally: Tally::default(),
        }
    }

    fn wants_input(&self) -> bool {
        self.takes_input() && !self.full()
    }

    /// Whether received bytes are still processed.
    fn takes_input(&self) -> bool {
        self.state.is_open()
    }

    fn wants_output(&self) -> bool {
        self.has_unsent() && !self.is_gone()
    }

    /// Whether replies wait for the client.
    fn has_unsent(&self) -> bool {
        !self.output.is_empty() || self.stream.has_unsent()
    }

    fn is_gone(&self) -> bool {
        self.state.is_gone()
    }

    /// Whether the connection has ended and can be removed.
    fn is_over(&self) -> bool {
        self.tickets.len() == 0
            && match self.state {
                State::Open => false,
                State::Detaching(Leaving { drain, .. }) => !drain || !self.has_unsent(),
                State::Ending(_) => !self.has_unsent(),
                State::Gone(_) => true,
            }
    }

    /// Whether it waits for the client: for the rest of a request, or to receive replies.
    fn is_waiting(&self) -> bool {
        let mid_request = !matches!(self.input, Input::Header)
            || (!self.stash.is_empty() || self.stream.is_in_record()) && !self.full();
        self.wants_output() || mid_request && self.takes_input()
    }

    /// Whether a whole header that was received can be served now, or more bytes that have arrived can be received.
    fn can_go_on(&self) -> bool {
        let stashed = self.stash.len() >= self.rules.style.header_size();
        self.takes_input() && !self.full() && (stashed || self.stream.has_unread())
    }

    fn full(&self) -> bool {
        self.memory.is_waiting()
            || self.tickets.len() >= MOST_IN_FLIGHT
            || self.in_flight_bytes >= MOST_BYTES_IN_FLIGHT
            || self.output.bytes() >= MOST_OUTPUT
            || !self.output.is_empty() && self.memory.is_tight()
    }

    fn end_after_replies(&mut self, reason: &str) {
        if self.state.end_after_replies(reason) {
            self.forget_input();
        }
    }

    fn end_now(&mut self, reason: &str) {
        if self.state.end_now(reason) {
            self.output.clear();
            self.forget_input();
            self.stream.close();
            // The peer sees the end at once, even if another process has the socket open.
            let _unconnected = rustix::net::shutdown(self.stream.descriptor(), rustix::net::Shutdown::Both);
        }
    }

    fn forget_input(&mut self) {
        self.stash = Vec::new();
        self.input = Input::Header;
        self.memory.forget();
    }
}

impl Transport for Connection {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.stream.descriptor()
    }

    fn status(&self) -> Status {
        let mut interest = EventFlags::empty();
        interest.set(EventFlags::IN, self.wants_input());
        interest.set(EventFlags::OUT, self.wants_output());
        Status {
            // epoll would report the hang-up of a dropped connection for ever.
            interest: (!self.is_gone()).then_some(interest),
            ready: self.can_go_on(),
            stall: self.is_waiting().then_some(self.stall),
            taken: self.wants_output().then(|| self.output.sent() + self.stream.sent()),
            leaving: self.is_leaving(),
            over: self.is_over(),
        }
    }

    fn poll(&mut self, input: &mut Buffer, cx: &mut LoopContext) -> bool {
        let mut moved = self.receive_and_serve(input, cx);
        if self.wants_output() {
            let before = (self.output.bytes(), self.stream.sent());
            self.send_waiting(cx);
            moved |= (self.output.bytes(), self.stream.sent()) != before;
        }
        if moved {
            self.count_kept();
        }
        moved
    }

    fn complete(&mut self, token: u64, ended: Ended, cx: &mut LoopContext) {
        self.answer(token, ended, cx);
    }

    fn send(&mut self, cx: &mut LoopContext) {
        self.send_waiting(cx);
        self.count_kept();
    }

    fn granted(&mut self, reservation: Reservation) {
        self.memory.granted(reservation);
    }

    fn detach(&mut self, drain: bool) {
        self.let_go(drain);
        self.count_kept();
    }

    fn take_back(&mut self, token: u64, request: Request, cx: &mut LoopContext) -> Option<Request> {
        let refused = self.keep(token, request, cx);
        self.count_kept();
        refused
    }

    fn close(&mut self, reason: &str) {
        self.end_after_replies(reason);
        self.count_kept();
    }

    fn abort(&mut self, reason: &str) {
        self.end_now(reason);
        self.count_kept();
    }

    fn end(mut self: Box<Self>) -> Outcome {
        let state = std::mem::replace(&mut self.state, State::Open);
        if !matches!(state, State::Detaching(_)) {
            self.stream.close();
        }
        state.outcome(|left| self.left(left))
    }
}

/// Whether the client is a thread of this process.
fn is_own_process(fd: BorrowedFd<'_>) -> bool {
    rustix::net::sockopt::socket_peercred(fd).is_ok_and(|peer| peer.pid == rustix::process::getpid())
}
