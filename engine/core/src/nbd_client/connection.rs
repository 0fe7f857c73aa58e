//! One connection to a server: sends requests, receives replies. An event loop drives it.
//!
//! A request's cookie is its slot and a number that no other request of the connection has. Every reply is checked
//! against its request. A reply that breaks the protocol cuts the connection; so do a request that is not answered in
//! time and an answer of ESHUTDOWN. All unanswered operations then go back to the client.

use std::io::IoSlice;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blkloom_io::{Buffer, Errno};
use blkloom_wire::{Content, Coverage, Header, Parsed, Reply, Style, flags, server_reply};
use rustix::event::epoll::EventFlags;
use rustix::net::{RecvFlags, Shutdown, recv, shutdown};
use slab::Slab;

use super::line::Line;
use super::output::{COPIED, Output};
use super::sent::Sent;
use super::{NbdClient, Offer, Queued, Settings};
use crate::backend::Operation;
use crate::driven::Driven;
use crate::stats::Op;
use crate::transport::nbd::StreamError;

/// Most requests in flight on a connection, and most bytes of them; a single one may have more.
pub(super) const MOST: usize = 256;
pub(super) const MOST_BYTES: u64 = 32 << 20;
/// Most receives of one `poll`: the loop serves others, too.
const RECEIVES: usize = 8;
/// From this many missing bytes on, read data is received where it belongs, rather than copied there.
const DIRECT: usize = 32 << 10;

/// Transmission flags.
mod offers {
    pub const FLUSH: u16 = 1 << 2;
    pub const FUA: u16 = 1 << 3;
    pub const TRIM: u16 = 1 << 5;
    pub const WRITE_ZEROES: u16 = 1 << 6;
    pub const FAST_ZERO: u16 = 1 << 11;
}

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const WRITE_ZEROES: u16 = 6;
const BLOCK_STATUS: u16 = 7;

/// A request that is not answered.
struct Flight {
    queued: Queued,
    cookie: u64,
    /// The type of the request that was sent last for the operation.
    command: u16,
    /// The range that was sent: of a read it may be longer than that of the operation.
    offset: u64,
    len: u64,
    /// `Output::queued` after the request: it is sent when as many bytes are sent.
    end: u64,
    /// A flush follows, because the server has no FUA.
    flush_after: bool,
    data: Vec<u8>,
    coverage: Coverage,
    error: Option<Errno>,
    runs: Option<Vec<(u64, u32)>>,
}

/// Read data that is being received.
struct Body {
    slot: usize,
    /// In `Flight::data`.
    at: usize,
    left: usize,
    done: bool,
}

#[derive(PartialEq, Eq)]
enum Phase {
    Open,
    /// Cut by this side. The server has not closed the connection yet.
    Ending,
    Over,
}

pub(super) struct Connection {
    client: Arc<NbdClient>,
    slot: usize,
    line: Line,
    offer: Offer,
    block: u64,
    timeout: Option<Duration>,
    phase: Phase,
    flights: Slab<Flight>,
    /// Bytes that they move.
    bytes: u64,
    next_cookie: u32,
    sent: Sent,
    output: Output,
    /// The beginning of a reply.
    partial: Vec<u8>,
    body: Option<Body>,
    taken: Vec<Queued>,
}

/// Why a connection is lost.
enum Lost {
    /// The server has closed it.
    Closed(String),
    /// This side cuts it.
    Cut(String),
}

impl Connection {
    pub fn new(client: Arc<NbdClient>, slot: usize, line: Line, offer: Offer, settings: Settings) -> Connection {
        Connection {
            client,
            slot,
            line,
            offer,
            block: settings.block.max(1),
            timeout: settings.timeout,
            phase: Phase::Open,
            flights: Slab::new(),
            bytes: 0,
            next_cookie: 0,
            sent: Sent::default(),
            output: Output::default(),
            partial: Vec::new(),
            body: None,
            taken: Vec::new(),
        }
    }

    // Requests

    fn pull(&mut self) -> bool {
        let mut taken = std::mem::take(&mut self.taken);
        let (mut count, mut bytes) = (self.flights.len(), self.bytes);
        let offer = self.offer;
        let fits = |operation: &Operation| {
            let weight = weight(operation, offer);
            let fits = count == 0 || count < MOST && bytes + weight <= MOST_BYTES;
            (count, bytes) = (count + 1, bytes + weight);
            fits
        };
        if !self.client.take(self.slot, fits, &mut taken) {
            self.leave();
            return true;
        }
        let any = !taken.is_empty();
        taken.drain(..).for_each(|queued| self.start(queued));
        self.taken = taken;
        any
    }

    /// Ends the connection of a client that is closed.
    fn leave(&mut self) {
        if self.output.is_empty() {
            self.disconnect();
        }
        self.phase = Phase::Over;
        for mut flight in self.flights.drain() {
            flight.queued.operation.complete(Err(Errno::SHUTDOWN));
        }
    }

    fn offers(&self, flag: u16) -> bool {
        self.offer.flags & flag != 0
    }

    fn start(&mut self, queued: Queued) {
        let Operation { op, offset, len, flags, .. } = queued.operation;
        let (start, end) = (offset & !(self.block - 1), (offset + len).next_multiple_of(self.block));
        let aligned = start == offset && end == offset + len;
        let flush_after = op == Op::Write && flags.fua && !self.offers(offers::FUA) && self.offers(offers::FLUSH);
        let (command, flags, range) = match op {
            Op::Read => (READ, 0, (start, end - start)),
            Op::Write | Op::WriteZeroes if !aligned => return self.finish(queued_only(queued), Err(Errno::INVAL)),
            Op::Write if flags.fua && self.offers(offers::FUA) => (WRITE, flags::FUA, (offset, len)),
            Op::Write => (WRITE, 0, (offset, len)),
            Op::WriteZeroes if flags.fast && !self.offers(offers::FAST_ZERO) => {
                return self.finish(queued_only(queued), Err(Errno::OPNOTSUPP));
            }
            Op::WriteZeroes if !self.offers(offers::WRITE_ZEROES) => (WRITE, 0, (offset, len)),
            Op::WriteZeroes => {
                let hole = if flags.unmap { 0 } else { flags::NO_HOLE };
                let fast = if flags.fast { flags::FAST_ZERO } else { 0 };
                (WRITE_ZEROES, hole | fast, (offset, len))
            }
            Op::Discard if self.offers(offers::TRIM) => {
                let (start, end) = (offset.next_multiple_of(self.block), (offset + len) & !(self.block - 1));
                if start >= end {
                    return self.finish(queued_only(queued), Ok(None));
                }
                (TRIM, 0, (start, end - start))
            }
            Op::Flush if self.offers(offers::FLUSH) => (FLUSH, 0, (0, 0)),
            Op::Extents if self.offer.allocation.is_some() => {
                (BLOCK_STATUS, if flags.one { flags::REQ_ONE } else { 0 }, (start, end - start))
            }
            Op::Extents => {
                let mut queued = queued;
                queued.operation.complete_extents(vec![(len, 0)]);
                return self.client.completed(queued.resent);
            }
            Op::Discard | Op::Flush | Op::Cache => return self.finish(queued_only(queued), Ok(None)),
        };
        self.bytes += weight(&queued.operation, self.offer);
        let (offset, len) = range;
        let slot = self.flights.insert(Flight { offset, len, flush_after, ..queued_only(queued) });
        self.send_later(slot, command, flags);
    }

    /// Queues a request for the operation in a slot.
    fn send_later(&mut self, slot: usize, command: u16, command_flags: u16) {
        self.next_cookie = self.next_cookie.wrapping_add(1);
        let cookie = u64::from(self.next_cookie) << 32 | slot as u64;
        let style = self.offer.style;
        let Flight { queued, offset, len, .. } = &self.flights[slot];
        let (offset, len) = if command == FLUSH { (0, 0) } else { (*offset, *len) };
        let with_length = style == Style::Extended && command == WRITE;
        let command_flags = command_flags | if with_length { flags::PAYLOAD_LEN } else { 0 };
        let header = Header { flags: command_flags, kind: command, cookie, offset, length: len };
        let zeros;
        let payload = match command {
            WRITE if queued.operation.op == Op::Write => queued.operation.payload(),
            WRITE => {
                zeros = vec![0; len as usize];
                &zeros
            }
            _ => &[],
        };
        if payload.len() <= COPIED || queued.operation.op != Op::Write {
            self.output.request(header, style, payload);
        } else {
            let len = payload.len();
            self.output.request(header, style, &[]);
            self.output.payload(slot, len);
        }
        let end = self.output.queued();
        let flight = &mut self.flights[slot];
        (flight.cookie, flight.command, flight.end) = (cookie, command, end);
        if self.timeout.is_some() {
            let flights = &self.flights;
            self.sent.add(Instant::now(), cookie, |cookie| is_in_flight(flights, cookie));
        }
    }

    fn send(&mut self) -> Result<bool, Lost> {
        let lost = |error: StreamError| lost_by("send", &error);
        if self.line.has_unsent() {
            match self.line.flush() {
                Ok(()) | Err(StreamError::Again) => {}
                Err(error) => return Err(lost(error)),
            }
        }
        if self.output.is_empty() {
            return Ok(false);
        }
        let flights = &self.flights;
        self.output.send(&mut self.line, |slot| flights[slot].queued.operation.payload()).map_err(lost)
    }

    // Replies

    fn receive(&mut self, input: &mut Buffer) -> Result<bool, Lost> {
        let mut any = false;
        for _ in 0..RECEIVES {
            let room = input.len();
            let direct: &mut [u8] = match &self.body {
                Some(body) if body.left >= DIRECT => &mut self.flights[body.slot].data[body.at..body.at + body.left],
                _ => &mut [],
            };
            let placed = direct.len();
            let count = match self.line.receive(direct, input.bytes_mut()) {
                Ok(0) => return Err(Lost::Closed("the server closed the connection".into())),
                Ok(count) => count,
                Err(StreamError::Again) => return Ok(any),
                Err(error) => return Err(lost_by("receive", &error)),
            };
            any = true;
            let direct = count.min(placed);
            if direct > 0 {
                self.received(direct)?;
            }
            self.process(&input.bytes()[..count - direct])?;
            if count < placed + room && !self.line.is_sealed() {
                break; // the socket is empty, most probably
            }
        }
        Ok(any)
    }

    /// `count` more bytes of the body are in place.
    fn received(&mut self, count: usize) -> Result<(), Lost> {
        if let Some(body) = &mut self.body {
            (body.at, body.left) = (body.at + count, body.left - count);
            if body.left == 0 {
                let (slot, done) = (body.slot, body.done);
                self.body = None;
                if done {
                    self.answered(slot)?;
                }
            }
        }
        Ok(())
    }

    fn process(&mut self, mut bytes: &[u8]) -> Result<(), Lost> {
        let style = self.offer.style;
        while !bytes.is_empty() {
            if let Some(body) = &self.body {
                let count = body.left.min(bytes.len());
                let (now, rest) = bytes.split_at(count);
                self.flights[body.slot].data[body.at..body.at + count].copy_from_slice(now);
                bytes = rest;
                self.received(count)?;
                continue;
            }
            if self.partial.is_empty() {
                match server_reply(style, bytes).map_err(cut)? {
                    Parsed::Reply(reply, used) => {
                        bytes = &bytes[used..];
                        self.reply(reply)?;
                    }
                    Parsed::Needs(_) => {
                        self.partial.extend_from_slice(bytes);
                        return Ok(());
                    }
                }
                continue;
            }
            let needs = match server_reply(style, &self.partial).map_err(cut)? {
                Parsed::Needs(needs) => needs,
                Parsed::Reply(_, used) => used,
            };
            let (more, rest) = bytes.split_at(needs.saturating_sub(self.partial.len()).min(bytes.len()));
            self.partial.extend_from_slice(more);
            bytes = rest;
            if let Parsed::Reply(reply, _) = server_reply(style, &self.partial).map_err(cut)? {
                self.partial.clear();
                self.partial.shrink_to(64 << 10);
                self.reply(reply)?;
            }
        }
        Ok(())
    }

    fn reply(&mut self, Reply { cookie, done, content }: Reply) -> Result<(), Lost> {
        let slot = cookie as u32 as usize;
        let simple_reads = self.offer.style == Style::Simple;
        let known = self.flights.get_mut(slot).filter(|flight| flight.cookie == cookie);
        let Some(flight) = known else {
            return Err(violation(format!("a reply to request {cookie:#x}, which is not in flight")));
        };
        if flight.end > self.output.sent() {
            return Err(violation("a reply to a request before it was sent".into()));
        }
        match content {
            Content::Simple { error: 0 } if flight.command == READ => {
                if !simple_reads {
                    return Err(violation("a simple reply to a read, with structured replies".into()));
                }
                flight.data.resize(flight.len as usize, 0);
                flight.coverage.add(0, flight.len, flight.len).map_err(cut)?;
                self.body = Some(Body { slot, at: 0, left: flight.len as usize, done: true });
                return Ok(());
            }
            Content::Simple { error: 0 } if flight.command == BLOCK_STATUS => {
                return Err(violation("a simple reply to a block status".into()));
            }
            Content::Simple { error: 0 } | Content::None => {}
            Content::Simple { error } | Content::Error { code: error } => {
                if error == Errno::SHUTDOWN.raw_os_error() as u32 {
                    return Err(Lost::Cut("the server is shutting down".into()));
                }
                flight.error = flight.error.or(Some(errno(error)));
            }
            Content::Data { offset, len } | Content::Hole { offset, len } if flight.command == READ => {
                let at = offset.checked_sub(flight.offset);
                let at = at.ok_or_else(|| violation("read data outside of the request".into()))?;
                flight.coverage.add(at, len, flight.len).map_err(cut)?;
                flight.data.resize(flight.len as usize, 0);
                if let Content::Data { .. } = content {
                    self.body = Some(Body { slot, at: at as usize, left: len as usize, done });
                    return Ok(());
                }
            }
            Content::Status { context, runs } if flight.command == BLOCK_STATUS => {
                if Some(context) != self.offer.allocation || flight.runs.is_some() {
                    return Err(violation("a block status of a context that was not asked for, or twice".into()));
                }
                flight.runs = Some(clamp(&runs, flight));
            }
            Content::Data { .. } | Content::Hole { .. } | Content::Status { .. } => {
                return Err(violation("a chunk that does not fit its request".into()));
            }
        }
        if done { self.answered(slot) } else { Ok(()) }
    }

    /// All chunks of the request in a slot have come.
    fn answered(&mut self, slot: usize) -> Result<(), Lost> {
        let flight = &mut self.flights[slot];
        let result = match (flight.error, flight.command) {
            (Some(errno), _) => Err(errno),
            (None, READ) if !flight.coverage.is_whole(flight.len) => {
                return Err(violation("an answer to a read without all of its data".into()));
            }
            (None, BLOCK_STATUS) if flight.runs.is_none() => {
                return Err(violation("an answer to a block status without one".into()));
            }
            (None, READ) => {
                let (skip, len) =
                    ((flight.queued.operation.offset - flight.offset) as usize, flight.queued.operation.len);
                let mut data = std::mem::take(&mut flight.data);
                data.drain(..skip);
                data.truncate(len as usize);
                Ok(Some(data))
            }
            (None, WRITE) if flight.flush_after => {
                flight.flush_after = false;
                self.send_later(slot, FLUSH, 0);
                return Ok(());
            }
            (None, _) => Ok(None),
        };
        let flight = self.flights.remove(slot);
        self.bytes -= weight(&flight.queued.operation, self.offer);
        self.finish(flight, result);
        Ok(())
    }

    fn finish(&mut self, mut flight: Flight, result: Result<Option<Vec<u8>>, Errno>) {
        self.client.ends(&flight.queued, result.is_ok());
        match flight.runs.take() {
            Some(runs) if result.is_ok() => flight.queued.operation.complete_extents(runs),
            _ => flight.queued.operation.complete(result),
        }
        self.client.completed(flight.queued.resent);
    }

    // The end

    fn lose(&mut self, lost: Lost) {
        let mut unanswered: Vec<Queued> = self.flights.drain().map(|flight| flight.queued).collect();
        unanswered.sort_unstable_by_key(|queued| queued.number);
        self.bytes = 0;
        let (why, ending) = match lost {
            Lost::Closed(why) => (why, false),
            // The server may still execute the writes.
            Lost::Cut(why) => (why, unanswered.iter().any(|queued| queued.operation.op.writes())),
        };
        let between_requests = self.output.is_empty();
        self.output = Output::default();
        self.body = None;
        (self.partial, self.sent) = (Vec::new(), Sent::default());
        self.phase = if ending { Phase::Ending } else { Phase::Over };
        // Before the server can close it.
        self.client.lost(self.slot, why, unanswered, ending);
        if ending {
            if between_requests {
                self.disconnect();
            }
            // ENOTCONN: the server has closed it meanwhile, and receiving says so.
            self.line.close();
            let _shut = shutdown(self.line.descriptor(), Shutdown::Write);
        }
    }

    /// Sends NBD_CMD_DISC, if the socket takes it: the end of the stream follows anyway.
    fn disconnect(&mut self) {
        let mut bytes = Vec::with_capacity(32);
        Header { flags: 0, kind: DISCONNECT, cookie: 0, offset: 0, length: 0 }.put(self.offer.style, &mut bytes);
        let _sent = self.line.send(&[IoSlice::new(&bytes)]);
    }

    /// Receives and ignores all replies until the server closes the connection.
    fn drain(&mut self, input: &mut Buffer) -> bool {
        // Also of a TLS session: nothing that the server still says counts.
        match recv(self.line.descriptor(), input.bytes_mut(), RecvFlags::DONTWAIT) {
            Ok((count, _)) if count > 0 => true,
            Err(Errno::INTR) => true,
            Err(Errno::AGAIN) if self.client.is_open() => false,
            _ => {
                self.phase = Phase::Over;
                self.client.ended(self.slot);
                true
            }
        }
    }
}

impl Driven for Connection {
    fn descriptor(&self) -> BorrowedFd<'_> {
        self.line.descriptor()
    }

    fn interest(&self) -> EventFlags {
        let sends = self.phase == Phase::Open && (!self.output.is_empty() || self.line.has_unsent());
        EventFlags::IN | if sends { EventFlags::OUT } else { EventFlags::empty() }
    }

    fn poll(&mut self, input: &mut Buffer) -> bool {
        match self.phase {
            Phase::Over => return false,
            Phase::Ending => return self.drain(input),
            Phase::Open => {}
        }
        let moved = self.pull();
        if self.phase != Phase::Open {
            return true;
        }
        // A server that has closed the connection may have answered before: replies are received first.
        let sent = self.send();
        match self.receive(input).and_then(|received| Ok(received | sent?)) {
            Ok(more) => moved | more,
            Err(lost) => {
                self.lose(lost);
                true
            }
        }
    }

    fn deadline(&self) -> Option<Instant> {
        self.sent.oldest()?.checked_add(self.timeout?)
    }

    fn expire(&mut self, now: Instant) {
        let Some(timeout) = self.timeout else { return };
        self.sent.forget(|cookie| is_in_flight(&self.flights, cookie));
        if self.deadline().is_some_and(|deadline| deadline <= now) {
            self.lose(Lost::Cut(format!("a request was not answered within {} s", timeout.as_secs_f64())));
        }
    }

    fn is_over(&self) -> bool {
        self.phase == Phase::Over
    }
}

impl Drop for Connection {
    /// The loop ends, or cannot watch the socket.
    fn drop(&mut self) {
        if self.phase == Phase::Open {
            self.lose(Lost::Closed("its event loop has ended".into()));
        }
    }
}

fn is_in_flight(flights: &Slab<Flight>, cookie: u64) -> bool {
    flights.get(cookie as u32 as usize).is_some_and(|flight| flight.cookie == cookie)
}

fn queued_only(queued: Queued) -> Flight {
    Flight {
        queued,
        cookie: 0,
        command: 0,
        offset: 0,
        len: 0,
        end: 0,
        flush_after: false,
        data: Vec::new(),
        coverage: Coverage::default(),
        error: None,
        runs: None,
    }
}

/// Bytes that an operation moves. A server without NBD_CMD_WRITE_ZEROES gets zeros as data.
fn weight(operation: &Operation, offer: Offer) -> u64 {
    let moves = match operation.op {
        Op::Read | Op::Write => true,
        Op::WriteZeroes => offer.flags & offers::WRITE_ZEROES == 0,
        _ => false,
    };
    if moves { operation.len } else { 0 }
}

/// The runs of a block status that lie in the operation's range: hole and zero flags.
fn clamp(runs: &[(u64, u64)], flight: &Flight) -> Vec<(u64, u32)> {
    let operation = &flight.queued.operation;
    let (mut at, end) = (flight.offset, operation.offset + operation.len);
    let mut found = Vec::with_capacity(runs.len());
    for &(length, status) in runs {
        let (from, to) = (at.max(operation.offset), at.saturating_add(length).min(end));
        at = at.saturating_add(length);
        if from < to {
            found.push((to - from, status as u32 & 3));
        }
    }
    if found.is_empty() {
        found.push((operation.len, 0)); // the run ended before the operation's range, which begins in a block
    }
    found
}

/// The errno of an error value. Unknown values count as EINVAL, as the protocol says.
fn errno(error: u32) -> Errno {
    match error {
        1 => Errno::PERM,
        5 => Errno::IO,
        12 => Errno::NOMEM,
        28 => Errno::NOSPC,
        75 => Errno::OVERFLOW,
        95 => Errno::OPNOTSUPP,
        _ => Errno::INVAL,
    }
}

fn cut(violation: blkloom_wire::Violation) -> Lost {
    self::violation(violation.0.into())
}

fn violation(what: String) -> Lost {
    Lost::Cut(format!("the server broke the protocol: {what}"))
}

/// Why a connection is lost whose stream has failed. doing: "send" or "receive".
fn lost_by(doing: &str, error: &StreamError) -> Lost {
    match error {
        // The server may not have noticed.
        StreamError::Broken(_) => Lost::Cut(error.reason(doing)),
        _ => Lost::Closed(error.reason(doing)),
    }
}
