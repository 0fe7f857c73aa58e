//! `Queue`: serves one queue of a ublk device.
//!
//! An entry of the ring is a tag of the driver's queue. A tag is with the driver from `FETCH` or `COMMIT_AND_FETCH` until
//! that command has completed: then its descriptor and its payload have a request. The request is served at once where
//! possible (`fast_path`), or goes to the loop's queue, and is answered when it comes back. Answers are sent together.
//!
//! A queue ends in one of these ways:
//! - The driver returns all tags, because the block device is removed.
//! - `close` or `detach`: requests in flight are answered. Those that have arrived and were not begun fail, and so do those
//!   that wait and that `detach` withdraws; a node that leaves requests unanswered leaves them. Then the ring is dropped,
//!   and the driver takes its tags back: requests wait for another server if the device has user recovery, or fail.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use blkloom_io::{Arrival, Buffer, CommandRing, ReadOnlyMapping, Slice, Source};
use blkloom_ublk_wire::{
    COMMIT_AND_FETCH, DESCRIPTOR_SIZE, FETCH, Operation, Request as Asked, command, descriptors_length,
    descriptors_offset,
};
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::param::page_size;

use super::QueueSettings;
use super::node::Node;
use super::unprivileged::without_admin;
use crate::budget::{Account, Budget, Need, Reservation};
use crate::clock::nanoseconds;
use crate::fast_path::{self, Besides, Patience, Progress};
use crate::notice::Outcome;
use crate::operation::Flags;
use crate::queue::Ended;
use crate::request::{Memory, Request};
use crate::stats::Op;
use crate::transport::ending::State;
use crate::transport::next_memory::NextMemory;
use crate::transport::{LoopContext, Status, Transport};

/// The transport kind of ublk queues.
pub const KIND: &str = "ublk";

/// Memory of a request without its data.
const REQUEST: usize = 1024;
/// Most requests served in one iteration, so that the loop's other transports are served, too.
const MOST_AT_ONCE: usize = 32;
/// Most answers that are sent together: the callers of the first requests continue while the next are served.
const MOST_TOGETHER: usize = 8;

/// A request in the loop's queue.
struct Ticket {
    /// Kept until the request ends.
    _reservation: Reservation,
}

pub(super) struct Queue {
    node: Arc<Node>,
    number: u16,
    ring: CommandRing,
    descriptors: ReadOnlyMapping,
    payload: usize,
    privileged: bool,
    /// All tags were passed to the driver once.
    is_fetched: bool,
    /// Tags with requests that were not begun.
    arrived: VecDeque<u16>,
    /// By tag.
    tickets: Vec<Option<Ticket>>,
    in_queue: usize,
    /// Number of answers that wait to be sent.
    waiting: usize,
    memory: NextMemory,
    /// Why the driver has returned tags without a request.
    returned: Option<Errno>,
    state: State<()>,
}

impl Queue {
    pub fn new(
        node: Arc<Node>,
        device: BorrowedFd<'_>,
        QueueSettings { number, depth, payload, privileged }: QueueSettings,
        budget: Arc<Budget>,
    ) -> std::io::Result<Queue> {
        let (page, depth) = (page_size(), usize::from(depth));
        let offset = descriptors_offset(number, page);
        let descriptors = ReadOnlyMapping::new(device, offset, descriptors_length(depth, page))?;
        let ring = CommandRing::new(device, depth, 0, payload)?;
        let account = Account::new(budget, node.export.device.clone(), false);
        Ok(Queue {
            node,
            number,
            ring,
            descriptors,
            payload,
            privileged,
            is_fetched: false,
            arrived: VecDeque::with_capacity(depth),
            tickets: std::iter::repeat_with(|| None).take(depth).collect(),
            in_queue: 0,
            waiting: 0,
            memory: NextMemory::new(account),
            returned: None,
            state: State::Open,
        })
    }

    fn reads(&self) -> bool {
        self.state.is_open() && !self.memory.is_waiting()
    }

    fn end_now(&mut self, reason: &str) {
        if self.state.end_now(reason) {
            self.arrived.clear();
            self.memory.forget();
        }
    }

    fn check(&mut self, result: std::io::Result<()>) {
        if let Err(error) = result {
            self.end_now(&format!("io_uring: {error}"));
        }
    }

    /// Takes no further requests, and ends when those in flight have ended.
    fn finish(&mut self, reason: &str) {
        if self.state.end_after_replies(reason) {
            self.memory.forget();
            self.reap();
            for tag in std::mem::take(&mut self.arrived) {
                if !self.node.leaves() {
                    self.fail(tag, Errno::IO);
                }
            }
            self.submit();
        }
    }

    // Commands

    /// Passes all tags to the driver. On the thread of the loop: a queue belongs to the thread that does this.
    fn fetch(&mut self) -> std::io::Result<()> {
        self.is_fetched = true;
        for tag in 0..self.tickets.len() {
            let number = self.number;
            self.ring.command_with_payload(tag, FETCH, |buffer| command(number, tag as u16, 0, buffer))?;
        }
        if self.privileged { self.ring.submit() } else { without_admin(|| self.ring.submit()) }
    }

    /// Answers the request of a tag. result: bytes, or a negative errno.
    fn commit(&mut self, tag: u16, result: i32) {
        let number = self.number;
        let bytes = |buffer| command(number, tag, result, buffer);
        let queued = self.ring.command_with_payload(tag.into(), COMMIT_AND_FETCH, bytes);
        self.check(queued);
        self.waiting += 1;
        if self.waiting >= MOST_TOGETHER {
            self.submit();
        }
    }

    fn succeed(&mut self, tag: u16, op: Op, length: u64) {
        // Only reads and writes are shorter than an i32.
        self.commit(tag, if matches!(op, Op::Read | Op::Write) { length as i32 } else { 0 });
    }

    fn fail(&mut self, tag: u16, errno: Errno) {
        // The block layer would take EAGAIN for a request that must not wait, and does not know ESHUTDOWN.
        let told = if matches!(errno, Errno::SHUTDOWN | Errno::AGAIN) { Errno::IO } else { errno };
        self.commit(tag, -told.raw_os_error());
    }

    fn submit(&mut self) {
        self.waiting = 0;
        let submitted = self.ring.submit();
        self.check(submitted);
    }

    fn reap(&mut self) {
        let (arrived, returned) = (&mut self.arrived, &mut self.returned);
        self.ring.reap(|arrival| match arrival {
            Arrival::Completed(tag, Ok(())) => arrived.push_back(tag as u16),
            Arrival::Completed(_, Err(errno)) => *returned = Some(errno),
            Arrival::Readable => {}
        });
    }

    /// Ends the queue when the driver has returned all tags.
    fn check_returned(&mut self) {
        let is_empty = self.arrived.is_empty() && self.in_queue == 0 && self.ring.outstanding() == 0;
        match self.returned {
            Some(Errno::NODEV) if is_empty => self.end_now("removed"),
            None | Some(Errno::NODEV) => {}
            Some(errno) => self.end_now(&format!("a command to the ublk driver failed: {errno}")),
        }
    }

    // Requests

    /// Serves requests that have arrived. Returns whether there was any work.
    fn serve_some(&mut self, cx: &mut LoopContext) -> bool {
        if !self.is_fetched && self.state.is_open() {
            let fetched = self.fetch();
            self.check(fetched);
        }
        if self.arrived.is_empty() && !self.state.is_gone() {
            self.reap();
        }
        for served in 0..MOST_AT_ONCE {
            if !self.reads() {
                return served > 0;
            }
            let Some(tag) = self.arrived.pop_front() else {
                self.check_returned();
                return served > 0 || self.state.is_gone();
            };
            self.serve(tag, cx);
        }
        true
    }

    /// Answers the request of a tag, or submits it to the loop's queue.
    fn serve(&mut self, tag: u16, cx: &mut LoopContext) {
        let started = Instant::now();
        let descriptor: [u8; DESCRIPTOR_SIZE] = self.descriptors.read(usize::from(tag) * DESCRIPTOR_SIZE);
        let Asked { operation, offset, length } = match Asked::parse(&descriptor) {
            Ok(asked) => asked,
            Err(malformed) => {
                tracing::error!(%malformed, "a request of the ublk driver fails");
                return self.fail(tag, Errno::OPNOTSUPP);
            }
        };
        let (op, flags) = match operation {
            Operation::Read => (Op::Read, Flags::default()),
            Operation::Write { fua } => (Op::Write, Flags { fua, ..Flags::default() }),
            Operation::Flush => (Op::Flush, Flags::default()),
            Operation::Discard => (Op::Discard, Flags::default()),
            Operation::WriteZeroes { unmap, fua } => (Op::WriteZeroes, Flags { unmap, fua, ..Flags::default() }),
        };
        let attempt = match self.refusal(op, offset, length) {
            Some(errno) => Progress::Failed(errno),
            None => self.attempt(tag, (op, offset, length, flags), cx),
        };
        let export = self.node.export.clone();
        match attempt {
            Progress::Done => {
                self.succeed(tag, op, length);
                cx.count(&export, op, (1, length, 0), started);
            }
            Progress::Failed(Errno::SHUTDOWN) if self.node.leaves() => {}
            Progress::Failed(errno) => {
                self.fail(tag, errno);
                cx.count(&export, op, (1, 0, 1), started);
            }
            Progress::Queue(done) => self.queue(tag, (op, offset, length, flags), done, started, cx),
        }
    }

    /// Why a request is not served.
    fn refusal(&self, op: Op, offset: u64, length: u64) -> Option<Errno> {
        let export = &self.node.export;
        if export.device.closed() {
            return Some(Errno::SHUTDOWN); // a closed device has size 0
        }
        let too_long = matches!(op, Op::Read | Op::Write) && length > self.payload as u64;
        if too_long || offset + length > export.device.size() {
            return Some(Errno::IO);
        }
        (export.read_only && op.writes()).then_some(Errno::ROFS)
    }

    /// Serves a request as far as that is possible without a wait.
    fn attempt(&mut self, tag: u16, (op, offset, length, flags): (Op, u64, u64, Flags), cx: &LoopContext) -> Progress {
        let (device, entry) = (&self.node.export.device, usize::from(tag));
        match op {
            Op::Read => {
                let memory: Slice<'_> = (&mut self.ring.payload_mut(entry)[..length as usize]).into();
                fast_path::read(device, cx.shard, offset, memory, Patience::Nowait, Besides::default())
            }
            Op::Write if flags.fua && device.needs_flush() => Progress::Queue(0),
            Op::Write => {
                let memory: Source<'_> = self.ring.payload(entry)[..length as usize].into();
                fast_path::write(device, cx.shard, offset, memory, Patience::Nowait)
            }
            Op::Flush => fast_path::flush(device, cx.shard),
            _ => fast_path::clear(device, cx.shard, op, offset, length, flags),
        }
    }

    /// Submits the rest of a request to the loop's queue. done: bytes that are transferred already.
    fn queue(
        &mut self,
        tag: u16,
        (op, offset, len, flags): (Op, u64, u64, Flags),
        done: u64,
        started: Instant,
        cx: &mut LoopContext,
    ) {
        let device = self.node.export.device.clone();
        let has_data = matches!(op, Op::Read | Op::Write);
        let copies = if has_data && device.copies() { len as usize } else { 0 };
        let Some(reservation) = self.memory.reserve(Need::new(len, copies + REQUEST), cx) else {
            self.arrived.push_front(tag);
            return;
        };
        let (entry, length) = (usize::from(tag), len as usize);
        // SAFETY: no command uses the entry before `complete`, which is called when the request has ended. No reference
        // to its payload exists meanwhile. A transport is dropped only when all of its requests have ended.
        let memory = unsafe {
            match op {
                Op::Read => Memory::Borrowed(self.ring.lend(entry, length)),
                Op::Write => Memory::Source(self.ring.lend(entry, length).source()),
                _ => Memory::None,
            }
        };
        self.tickets[entry] = Some(Ticket { _reservation: reservation });
        self.in_queue += 1;
        self.node.export.stats.start(cx.shard, 1);
        let owner = cx.owner(tag.into());
        cx.submit(Request { device, op, offset, len, flags, memory, context: None, owner, started, done });
    }

    /// Ends the ticket of a token. None: there is none.
    fn take(&mut self, token: u64) -> Option<u16> {
        let ticket = self.tickets.get_mut(usize::try_from(token).ok()?)?.take();
        self.in_queue -= usize::from(ticket.is_some());
        ticket.map(|_| token as u16)
    }
}

impl Transport for Queue {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.ring.fd()
    }

    fn status(&self) -> Status {
        let mut interest = EventFlags::empty();
        interest.set(EventFlags::IN, self.reads());
        let (gone, unsent) = (self.state.is_gone(), self.ring.is_unsubmitted());
        let has_requests = self.reads() && (!self.arrived.is_empty() || !self.is_fetched);
        Status {
            interest: (!gone).then_some(interest),
            ready: has_requests || unsent && !gone,
            stall: None,
            taken: None,
            leaving: !self.state.is_open(),
            over: self.in_queue == 0 && !self.state.is_open() && (gone || !unsent),
        }
    }

    /// Each tag has memory of its own for the data.
    fn reserves(&self) -> usize {
        self.tickets.len()
    }

    fn poll(&mut self, _: &mut Buffer, cx: &mut LoopContext) -> bool {
        let moved = self.serve_some(cx);
        self.submit();
        moved
    }

    fn complete(&mut self, token: u64, ended: Ended, cx: &mut LoopContext) {
        let Ended { request, error, .. } = ended;
        let Some(tag) = self.take(token) else {
            return;
        };
        let bytes = if error.is_none() { request.len } else { 0 };
        let latency = nanoseconds(request.started);
        self.node.export.stats.end(cx.shard, request.op, 1, bytes, u64::from(error.is_some()), latency);
        let op = request.op;
        drop(request);
        match error {
            _ if self.state.is_gone() => {}
            None => self.succeed(tag, op, bytes),
            Some(Errno::SHUTDOWN) if self.node.leaves() => {}
            Some(errno) => self.fail(tag, errno),
        }
    }

    fn send(&mut self, _: &mut LoopContext) {
        self.submit();
    }

    fn granted(&mut self, reservation: Reservation) {
        self.memory.granted(reservation);
    }

    fn detach(&mut self, _drain: bool) {
        self.finish("detached");
    }

    fn take_back(&mut self, token: u64, request: Request, cx: &mut LoopContext) -> Option<Request> {
        let Some(tag) = self.take(token) else {
            return Some(request);
        };
        self.node.export.stats.withdraw(cx.shard);
        drop(request);
        if !self.state.is_gone() && !self.node.leaves() {
            self.fail(tag, Errno::IO);
            self.submit();
        }
        None
    }

    fn close(&mut self, reason: &str) {
        self.finish(reason);
    }

    fn abort(&mut self, reason: &str) {
        self.end_now(reason);
    }

    fn end(self: Box<Self>) -> Outcome {
        self.state.outcome(|()| Outcome::Closed { reason: "left to another server".to_owned() })
    }
}
