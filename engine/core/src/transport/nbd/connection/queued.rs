//! Requests that go through the queue, and their replies. Part of `connection`, whose invariants hold here.

use std::time::Instant;

use blkloom_io::Buffer;
use blkloom_io::Errno;
use blkloom_wire::{Command, ErrorCode, Header, flags};
use slab::Slab;

use super::Connection;
use super::memory::REQUEST;
use super::serve::{operation, wanted};
use crate::budget::Reservation;
use crate::clock::nanoseconds;
use crate::generations::InFlight;
use crate::operation::{Context, Found};
use crate::queue::{Ended, MOST_FOUND};
use crate::request::{Memory, Request};
use crate::stats::Op;
use crate::transport::LoopContext;

/// A request in flight, with the data for its reply.
pub(super) struct Ticket {
    /// Number of the connection's requests that were submitted before this one.
    pub order: u64,
    pub header: Header,
    command: Command,
    /// For a block status: the extents (length, flags) of each metadata context that has answered, in order.
    told: Vec<Vec<(u64, u32)>>,
    reservation: Reservation,
    _in_flight: InFlight,
}

/// The requests in flight, by token.
#[derive(Default)]
pub(super) struct Tickets(Slab<Ticket>);

/// A larger table is released when no request is in flight.
const FEW_TICKETS: usize = 64;

impl Tickets {
    pub fn len(&self) -> usize {
        self.0.len()
    }

    fn put(&mut self, ticket: Ticket) -> u64 {
        self.0.insert(ticket) as u64
    }

    pub fn take(&mut self, token: u64) -> Option<Ticket> {
        let ticket = self.0.try_remove(token as usize);
        if self.0.is_empty() && self.0.capacity() > FEW_TICKETS {
            self.0 = Slab::new();
        }
        ticket
    }
}

impl Connection {
    /// Submits the rest of a request to the queue.
    pub(super) fn queue_rest(
        &mut self,
        header: &Header,
        (memory, reservation): (Memory, Reservation),
        done: u64,
        cx: &mut LoopContext,
        started: Instant,
    ) {
        let Some(command) = header.request(&self.rules).command else {
            return;
        };
        let (op, length) = (operation(command), header.length);
        let ticket = Ticket {
            order: self.queued,
            header: *header,
            command,
            told: Vec::new(),
            reservation,
            _in_flight: InFlight::new(self.export.clone()),
        };
        let context = self.next_context(&ticket);
        let token = self.tickets.put(ticket);
        self.queued += 1;
        self.in_flight_bytes += if matches!(memory, Memory::None) { 0 } else { length };
        self.export.stats.start(cx.shard, 1);
        cx.submit(Request {
            device: self.export.device.clone(),
            op,
            offset: header.offset,
            len: length,
            flags: wanted(header.flags),
            memory,
            context,
            owner: cx.owner(token),
            started,
            done,
        });
    }

    /// Answers a request that came back from the queue.
    pub(super) fn answer(&mut self, token: u64, ended: Ended, cx: &mut LoopContext) {
        let Ended { request, mut error, found } = ended;
        let Some(mut ticket) = self.tickets.take(token) else {
            return;
        };
        if error.is_none() && ticket.command == Command::BlockStatus {
            match self.told(&ticket, &found) {
                Some(told) => ticket.told.push(told),
                None => error = Some(Errno::IO),
            }
            if error.is_none() && ticket.told.len() < self.contexts.len() && !self.is_gone() {
                return self.ask_next(ticket, request, cx);
            }
        }
        let length = ticket.header.length;
        let bytes = if error.is_none() && request.op != Op::Extents { length } else { 0 };
        let latency = nanoseconds(request.started);
        self.export.stats.end(cx.shard, request.op, 1, bytes, u64::from(error.is_some()), latency);
        let buffer = match request.memory {
            Memory::Owned(buffer) => {
                self.in_flight_bytes -= length;
                buffer.take()
            }
            _ => None,
        };
        if self.is_gone() {
            if let Some(buffer) = buffer {
                cx.buffers.put(buffer);
            }
            return;
        }
        let (framing, mut head) = (&self.framing(&ticket.header), Vec::with_capacity(48));
        if let Some(errno) = error {
            match self.next_context(&ticket) {
                Some(gone) if errno == Errno::INVAL => {
                    let message = format!("the export has no metadata context {gone} any more");
                    blkloom_wire::error(framing, &mut head, ErrorCode::Invalid, &message);
                }
                _ => self.fail(framing, errno, &mut head),
            }
        } else {
            match ticket.command {
                Command::Read => blkloom_wire::read_data(framing, &mut head, framing.offset, length, true),
                Command::BlockStatus => {
                    let told = self.contexts.iter().map(|selected| selected.id).zip(ticket.told);
                    blkloom_wire::block_status(framing, &mut head, told);
                }
                _ => blkloom_wire::success(framing, &mut head),
            }
        }
        match buffer {
            Some(buffer) if error.is_none() && ticket.command == Command::Read => {
                let mut reservation = ticket.reservation;
                reservation.shrink(Buffer::capacity(buffer.len()) + REQUEST);
                self.output.push(head, Some(buffer), Some(reservation));
            }
            Some(buffer) => {
                cx.buffers.put(buffer);
                self.output.push(head, None, None);
            }
            None => self.output.push(head, None, None),
        }
    }

    /// The next metadata context of a block status request. None for `base:allocation`, and for other requests.
    fn next_context(&self, ticket: &Ticket) -> Context {
        match ticket.command {
            Command::BlockStatus => self.contexts.get(ticket.told.len())?.context.clone(),
            _ => None,
        }
    }

    /// Asks for the next metadata context. The contexts are asked one after the other, so that the request is a single
    /// one that waits or is withdrawn as a whole.
    fn ask_next(&mut self, ticket: Ticket, request: Request, cx: &mut LoopContext) {
        let context = self.next_context(&ticket);
        let owner = cx.owner(self.tickets.put(ticket));
        cx.submit(Request { context, owner, ..request });
    }

    /// Converts the extents found to NBD descriptors from the request's start on. None: nothing was found, and the
    /// context has no default value.
    fn told(&self, ticket: &Ticket, found: &[Found]) -> Option<Vec<(u64, u32)>> {
        let header = &ticket.header;
        let one = header.flags & flags::REQ_ONE != 0;
        // All contexts together must not use more memory than one alone may.
        let most = if one { 1 } else { (MOST_FOUND / self.contexts.len().max(1)).max(1) };
        let mut extents: Vec<(u64, u32)> = Vec::new();
        let mut at = header.offset;
        for found in
            found.iter().take_while(|found| std::mem::replace(&mut at, found.offset + found.len) == found.offset)
        {
            let count = extents.len();
            match extents.last_mut() {
                Some((len, flags)) if *flags == found.flags => *len += found.len,
                _ if count == most => break,
                _ => extents.push((found.len, found.flags)),
            }
        }
        if extents.is_empty() && self.next_context(ticket).is_none() {
            extents.push((header.length, 0)); // "a server MAY always safely report a status of 0"
        }
        (!extents.is_empty()).then_some(extents)
    }
}
