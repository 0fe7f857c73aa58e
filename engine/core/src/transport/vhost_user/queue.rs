//! `Queue`: serves the requests of one queue of a virtio block device.
//!
//! `poll` takes heads from the available ring until there is none, or `MOST_AT_ONCE` were served. Requests that must wait
//! go to the loop's queue with the memory of the guest, and are answered when they come back. A driver that breaks the
//! rules for rings ends its queue; a request that is not for this device gets an error as its status.
//!
//! A queue that ends is `Detaching` (another engine may continue), `Ending` (closed; the requests in flight are answered)
//! or `Gone` (nothing more is stored in the memory of the guest; requests in flight must still end). A queue that is
//! detached to be drained serves all that it has taken. Otherwise its waiting requests are withdrawn, and stay marked in
//! the region of the requests in flight.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use blkloom_io::{Buffer, Slice};
use blkloom_virtio_wire::block::{
    ID_SIZE, Kind, MOST_SEGMENTS, Request as Asked, SECTOR, SEGMENT_SIZE, Segment, Status as Answer,
};
use blkloom_virtio_wire::split::{self, Chain, Malformed, Piece};
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use smallvec::{SmallVec, smallvec};

use super::call::Call;
use super::disk::Disk;
use super::vring::Vring;
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

/// The transport kind of virtio queues.
pub const KIND: &str = "vhost-user";

/// Memory of a request without its data.
const REQUEST: usize = 1024;
/// Longest read or write.
const LONGEST: u64 = 32 << 20;
/// Most requests served in one iteration, so that the loop's other transports are served, too.
const MOST_AT_ONCE: usize = 32;
/// Most used heads that become visible together: the callers of the first requests continue while the next are served.
const MOST_TOGETHER: usize = 8;
/// Bytes of such requests from which they are not kept back: the driver uses the data of one while the next is copied.
const MUCH_TOGETHER: u64 = 128 << 10;
/// Lists of pieces that are kept for the next requests.
const MOST_LISTS: usize = 64;

/// A queue that has ended. next: index in the available ring of the first chain that was not taken. failure: why it ended,
/// if it was not detached.
pub struct Detached {
    pub next: u16,
    pub failure: Option<String>,
}

/// Where the answer of a request goes.
struct Reply {
    /// Its status byte, in the memory of the guest.
    status: Slice<'static>,
    /// All that the request may write there, if that is logged.
    writes: Vec<Piece>,
}

/// One operation on the device. A request to discard or to write zeroes has several.
#[derive(Clone, Copy)]
struct Part {
    op: Op,
    offset: u64,
    length: u64,
    flags: Flags,
}

/// A request in the loop's queue, by its head.
struct Ticket {
    /// Number of its parts that have not ended.
    parts: usize,
    error: Option<Errno>,
    withdrawn: bool,
    reply: Reply,
    /// Number of bytes written if it succeeds, without the status.
    written: u32,
    /// Kept until the request ends.
    _reservation: Reservation,
}

pub(super) struct Queue {
    disk: Arc<Disk>,
    vring: Vring,
    write_through: bool,
    kick: OwnedFd,
    call: Arc<Call>,
    /// The driver was called once: a former engine may have died before it did that.
    has_called: bool,
    chain: Chain,
    /// By head.
    tickets: Vec<Option<Ticket>>,
    in_queue: usize,
    /// Moved by requests that are answered, and not published yet.
    unpublished_bytes: u64,
    memory: NextMemory,
    lists: Vec<Vec<Slice<'static>>>,
    /// Of `Detaching`: whether all requests that were taken are served first.
    state: State<bool>,
}

impl Queue {
    pub fn new(
        disk: Arc<Disk>,
        vring: Vring,
        write_through: bool,
        (kick, call): (OwnedFd, Arc<Call>),
        budget: Arc<Budget>,
    ) -> Queue {
        let account = Account::new(budget, disk.export.device.clone(), false);
        let tickets = std::iter::repeat_with(|| None).take(split::LARGEST.into()).collect();
        Queue {
            disk,
            vring,
            write_through,
            kick,
            call,
            has_called: false,
            chain: Chain::default(),
            tickets,
            in_queue: 0,
            unpublished_bytes: 0,
            memory: NextMemory::new(account),
            lists: Vec::new(),
            state: State::Open,
        }
    }

    /// Whether heads are served that were taken before.
    fn serves(&self) -> bool {
        !self.memory.is_waiting() && matches!(self.state, State::Open | State::Detaching(true))
    }

    fn end_now(&mut self, reason: &str) {
        if self.state.end_now(reason) {
            self.memory.forget();
        }
    }

    pub fn break_off(&mut self, malformed: Malformed) {
        self.end_now(&format!("the driver has broken the rules of virtio: {malformed}"));
    }

    // Answers

    fn answer(&mut self, head: u16, reply: &Reply, answer: Answer, written: u32) {
        reply.status.store_u8(0, answer as u8);
        self.vring.mark(&reply.writes);
        self.vring.put(head, written + 1);
        if self.vring.unpublished() >= MOST_TOGETHER || self.unpublished_bytes >= MUCH_TOGETHER {
            self.publish();
        }
    }

    fn succeed(&mut self, head: u16, reply: &Reply, written: u32) {
        self.answer(head, reply, Answer::Ok, written);
    }

    fn fail(&mut self, head: u16, reply: &Reply, errno: Errno) {
        let answer = if errno == Errno::OPNOTSUPP { Answer::Unsupported } else { Answer::IoError };
        self.answer(head, reply, answer, 0);
    }

    fn publish(&mut self) {
        self.unpublished_bytes = 0;
        let any = self.vring.unpublished() > 0;
        if self.vring.publish() || !self.has_called {
            self.has_called = true;
            self.call.raise();
        }
        if any {
            self.vring.tell_log();
        }
    }

    // Requests

    /// Serves requests that are available. Returns whether there was any work.
    fn serve_some(&mut self, cx: &mut LoopContext) -> bool {
        for served in 0..MOST_AT_ONCE {
            if !self.serves() {
                return served > 0;
            }
            let head = match self.vring.take_again() {
                None if self.state.is_open() => self.vring.take(),
                head => Ok(head),
            };
            match head {
                Ok(Some(head)) => self.serve(head, cx),
                Ok(None) => return served > 0,
                Err(malformed) => {
                    self.break_off(malformed);
                    return true;
                }
            }
            if served == 0 {
                self.vring.ask_for_nothing();
            }
        }
        true
    }

    fn serve(&mut self, head: u16, cx: &mut LoopContext) {
        let mut chain = std::mem::take(&mut self.chain);
        let served = self.serve_chain(head, &mut chain, cx);
        self.chain = chain;
        if let Err(malformed) = served {
            self.break_off(malformed);
        }
    }

    fn serve_chain(&mut self, head: u16, chain: &mut Chain, cx: &mut LoopContext) -> Result<(), Malformed> {
        let started = Instant::now();
        self.vring.collect(head, chain)?;
        let asked = Asked::parse(chain, &self.vring.memory())?;
        let at_status = Piece { address: asked.status, length: 1 };
        // SAFETY: used before the queue, which has the vring, is dropped.
        let status = unsafe { self.vring.part(at_status) };
        let status = status.ok_or(Malformed::Buffer { address: at_status.address, length: 1 })?;
        let mut reply = Reply { status, writes: Vec::new() };
        self.log(&mut reply, &[at_status]);
        let (readable, writable) = (&chain.pieces[asked.readable.clone()], &chain.pieces[asked.writable.clone()]);
        let write = Flags { fua: self.write_through, ..Flags::default() };
        let (op, data, flags) = match asked.kind {
            Kind::Read => (Op::Read, writable, Flags::default()),
            Kind::Write => (Op::Write, readable, write),
            Kind::Flush => (Op::Flush, &chain.pieces[..0], Flags::default()),
            Kind::Discard => (Op::Discard, readable, write),
            Kind::WriteZeroes => (Op::WriteZeroes, readable, write),
            Kind::Identify => {
                self.identify(head, reply, writable);
                return Ok(());
            }
            Kind::Other(_) => {
                self.fail(head, &reply, Errno::OPNOTSUPP);
                return Ok(());
            }
        };
        let parts = match op {
            Op::Discard | Op::WriteZeroes => self.segments(op, data, flags),
            Op::Flush => Ok(smallvec![Part { op, offset: 0, length: 0, flags }]),
            _ => self.part(op, asked.sector, split::length(data), flags).map(|part| smallvec![part]),
        };
        let mut memory = self.lists.pop().unwrap_or_default();
        let parts = parts.and_then(|parts| match op {
            Op::Read | Op::Write => self.add_memory(data, &mut memory).map(|()| parts),
            _ => Ok(parts),
        });
        match parts {
            Ok(parts) => {
                if op == Op::Read {
                    self.log(&mut reply, data);
                }
                self.execute(head, reply, &parts, memory, started, cx);
            }
            Err(errno) => {
                self.keep_list(memory);
                self.fail(head, &reply, errno);
                cx.count(&self.disk.export, op, (1, 0, 1), started);
            }
        }
        Ok(())
    }

    /// Adds pieces that a request may write.
    fn log(&self, reply: &mut Reply, pieces: &[Piece]) {
        if self.vring.is_logged() {
            reply.writes.extend_from_slice(pieces);
        }
    }

    /// The pieces as memory.
    fn add_memory(&self, pieces: &[Piece], memory: &mut Vec<Slice<'static>>) -> Result<(), Errno> {
        for &(mut piece) in pieces {
            while piece.length > 0 {
                // SAFETY: the memory is used by the request, and a transport is dropped only when all of its requests
                // have ended. The queue has the vring.
                let part = unsafe { self.vring.part(piece) }.ok_or(Errno::FAULT)?;
                piece.address += part.len() as u64;
                piece.length -= part.len() as u32;
                memory.push(part);
            }
        }
        Ok(())
    }

    fn keep_list(&mut self, mut memory: Vec<Slice<'static>>) {
        if self.lists.len() < MOST_LISTS {
            memory.clear();
            self.lists.push(memory);
        }
    }

    fn identify(&mut self, head: u16, mut reply: Reply, writable: &[Piece]) {
        let (mut memory, mut done) = (Vec::new(), 0);
        // The serial has no more bytes, and so no more pieces of them.
        let mut left = ID_SIZE as u32;
        let pieces: SmallVec<[Piece; 2]> = writable
            .iter()
            .map(|&Piece { address, length }| {
                let length = length.min(left);
                left -= length;
                Piece { address, length }
            })
            .filter(|piece| piece.length > 0)
            .collect();
        if let Err(errno) = self.add_memory(&pieces, &mut memory) {
            return self.fail(head, &reply, errno);
        }
        self.log(&mut reply, &pieces);
        for part in memory {
            let length = part.len().min(ID_SIZE - done);
            part.part(0, length).copy_from(self.disk.serial[done..done + length].into());
            done += length;
        }
        self.succeed(head, &reply, done as u32);
    }

    /// Checks an operation.
    fn part(&self, op: Op, sector: u64, length: u64, flags: Flags) -> Result<Part, Errno> {
        let export = &self.disk.export;
        if export.device.closed() {
            return Err(Errno::SHUTDOWN); // a closed device has size 0
        }
        let too_long = matches!(op, Op::Read | Op::Write) && length > LONGEST;
        let offset = sector.checked_mul(SECTOR).ok_or(Errno::IO)?;
        let end = offset.checked_add(length).ok_or(Errno::IO)?;
        if too_long || !length.is_multiple_of(SECTOR) || end > export.device.size() {
            return Err(Errno::IO);
        }
        if export.read_only && op.writes() {
            return Err(Errno::ROFS);
        }
        Ok(Part { op, offset, length, flags })
    }

    /// The segments of a request to discard or to write zeroes.
    fn segments(&self, op: Op, data: &[Piece], flags: Flags) -> Result<SmallVec<[Part; 1]>, Errno> {
        let length = split::length(data);
        if !length.is_multiple_of(SEGMENT_SIZE as u64) || length == 0 || length > (MOST_SEGMENTS * SEGMENT_SIZE) as u64
        {
            return Err(Errno::IO);
        }
        let mut bytes = [0; MOST_SEGMENTS * SEGMENT_SIZE];
        let bytes = &mut bytes[..length as usize];
        if !split::gather(data, &self.vring.memory(), bytes) {
            return Err(Errno::FAULT);
        }
        let (segments, _) = bytes.as_chunks::<SEGMENT_SIZE>();
        let parts = segments.iter().map(|&bytes| {
            let Segment { sector, sectors, unmap, other_flags } = Segment::parse(bytes);
            if other_flags || unmap && op == Op::Discard {
                return Err(Errno::OPNOTSUPP);
            }
            self.part(op, sector, u64::from(sectors) * SECTOR, Flags { unmap, ..flags })
        });
        parts.collect()
    }

    /// Executes the parts of a request as far as that is possible without a wait, and submits the others.
    fn execute(
        &mut self,
        head: u16,
        reply: Reply,
        parts: &[Part],
        memory: Vec<Slice<'static>>,
        started: Instant,
        cx: &mut LoopContext,
    ) {
        let export = self.disk.export.clone();
        let mut waiting: SmallVec<[(Part, u64); 1]> = SmallVec::new();
        for part in parts {
            match self.attempt(part, &memory, cx) {
                Progress::Done => {}
                Progress::Queue(done) => waiting.push((*part, done)),
                Progress::Failed(errno) => {
                    self.keep_list(memory);
                    self.fail(head, &reply, errno);
                    return cx.count(&export, part.op, (1, 0, 1), started);
                }
            }
        }
        // A request has one operation at least.
        let Part { op, length, .. } = parts[0];
        let written = if op == Op::Read { length as u32 } else { 0 };
        if waiting.is_empty() {
            self.keep_list(memory);
            let bytes = parts.iter().map(|part| part.length).sum();
            self.unpublished_bytes += bytes;
            self.succeed(head, &reply, written);
            return cx.count(&export, op, (parts.len() as u64, bytes, 0), started);
        }
        let has_data = matches!(op, Op::Read | Op::Write);
        let copies = if has_data && export.device.copies() { length as usize } else { 0 };
        let need = Need::new(if has_data { length } else { 0 }, copies + REQUEST * waiting.len());
        let Some(reservation) = self.memory.reserve(need, cx) else {
            self.keep_list(memory);
            return self.vring.postpone(head);
        };
        self.in_queue += 1;
        self.tickets[usize::from(head)] = Some(Ticket {
            parts: waiting.len(),
            error: None,
            withdrawn: false,
            reply,
            written,
            _reservation: reservation,
        });
        let mut memory = Some(memory);
        for (Part { op, offset, length: len, flags }, done) in waiting {
            export.stats.start(cx.shard, 1);
            let memory = match (memory.take(), op) {
                (Some(pieces), Op::Read) => Memory::Pieces(pieces),
                (Some(pieces), Op::Write) => Memory::Pieces(pieces),
                _ => Memory::None,
            };
            let (device, owner) = (export.device.clone(), cx.owner(head.into()));
            cx.submit(Request { device, op, offset, len, flags, memory, context: None, owner, started, done });
        }
    }

    /// Serves a part as far as that is possible without a wait.
    fn attempt(&self, part: &Part, memory: &[Slice<'static>], cx: &LoopContext) -> Progress {
        let &Part { op, offset, length, flags } = part;
        let device = &self.disk.export.device;
        match op {
            Op::Write if flags.fua && device.needs_flush() => return Progress::Queue(0),
            Op::Read | Op::Write => {}
            Op::Flush => return fast_path::flush(device, cx.shard),
            _ => return fast_path::clear(device, cx.shard, op, offset, length, flags),
        }
        let mut done = 0;
        for &piece in memory {
            let at = offset + done;
            let progress = match op {
                Op::Read => fast_path::read(device, cx.shard, at, piece, Patience::Nowait, Besides::default()),
                _ => fast_path::write(device, cx.shard, at, piece.source(), Patience::Nowait),
            };
            match progress {
                Progress::Done => done += piece.len() as u64,
                Progress::Queue(more) => return Progress::Queue(done + more),
                failed => return failed,
            }
        }
        Progress::Done
    }

    /// Ends one part of a request. error: that of the part. Returns the pieces to the lists.
    fn end_part(&mut self, token: u64, memory: Memory, error: Option<Errno>, withdrawn: bool) {
        if let Memory::Pieces(pieces) = memory {
            self.keep_list(pieces);
        }
        let head = token as u16;
        let Some(ticket) = self.tickets.get_mut(usize::from(head)) else { return };
        let Some(Ticket { parts, error: first, withdrawn: before, .. }) = ticket else { return };
        *parts -= 1;
        *first = first.or(error);
        *before |= withdrawn;
        if *parts > 0 {
            return;
        }
        let Some(Ticket { error, withdrawn, reply, written, .. }) = ticket.take() else { return };
        self.in_queue -= 1;
        match error {
            // Another engine may serve it again; or nothing of this one may be seen any more. A part of its data may have
            // been written.
            _ if withdrawn || self.state.is_gone() => self.vring.mark(&reply.writes),
            None => self.succeed(head, &reply, written),
            Some(errno) => self.fail(head, &reply, errno),
        }
    }
}

impl Transport for Queue {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.kick.as_fd()
    }

    /// The eventfd is not read: only its changes are events.
    fn status(&self) -> Status {
        let (gone, unpublished) = (self.state.is_gone(), self.vring.unpublished() > 0);
        let drains = matches!(self.state, State::Detaching(true)) && self.vring.has_again();
        Status {
            interest: (!gone).then_some(EventFlags::IN | EventFlags::ET),
            ready: self.serves() && self.vring.has_again() || unpublished && !gone,
            stall: None,
            taken: None,
            leaving: matches!(self.state, State::Detaching(false) | State::Gone(_)),
            over: self.in_queue == 0 && !self.state.is_open() && (gone || !unpublished && !drains),
        }
    }

    fn poll(&mut self, _: &mut Buffer, cx: &mut LoopContext) -> bool {
        let moved = self.serve_some(cx);
        if !self.state.is_gone() {
            self.publish();
        }
        moved
    }

    fn rest(&mut self) -> bool {
        self.state.is_open() && self.serves() && self.vring.ask()
    }

    fn complete(&mut self, token: u64, ended: Ended, cx: &mut LoopContext) {
        let Ended { request, error, .. } = ended;
        let bytes = if error.is_none() { request.len } else { 0 };
        let latency = nanoseconds(request.started);
        self.disk.export.stats.end(cx.shard, request.op, 1, bytes, u64::from(error.is_some()), latency);
        self.end_part(token, request.memory, error, false);
    }

    fn send(&mut self, _: &mut LoopContext) {
        if !self.state.is_gone() {
            self.publish();
        }
    }

    fn granted(&mut self, reservation: Reservation) {
        self.memory.granted(reservation);
    }

    fn detach(&mut self, drain: bool) {
        match &mut self.state {
            State::Open => self.state = State::Detaching(drain),
            State::Detaching(drains) => *drains &= drain,
            State::Ending(_) | State::Gone(_) => {}
        }
        if matches!(self.state, State::Detaching(false)) {
            self.memory.forget();
        }
    }

    fn take_back(&mut self, token: u64, request: Request, cx: &mut LoopContext) -> Option<Request> {
        self.disk.export.stats.withdraw(cx.shard);
        self.end_part(token, request.memory, None, true);
        None
    }

    fn close(&mut self, reason: &str) {
        if self.state.end_after_replies(reason) {
            self.memory.forget();
        }
    }

    fn hung_up(&mut self) {
        self.end_now("the eventfd for kicks has ended");
    }

    fn abort(&mut self, reason: &str) {
        self.end_now(reason);
    }

    fn end(self: Box<Self>) -> Outcome {
        let next = self.vring.next();
        let detached = |failure| Outcome::Detached(Box::new(Detached { next, failure }));
        match self.state.outcome(|_| detached(None)) {
            Outcome::Closed { reason } => detached(Some(reason)),
            outcome => outcome,
        }
    }
}
