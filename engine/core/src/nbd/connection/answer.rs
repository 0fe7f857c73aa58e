//! Replies to requests that came back from the queue. Part of `connection`, whose invariants hold here.

use std::sync::Arc;

use blkloom_io::Buffer;
use blkloom_io::errno::{EINVAL, EIO};
use blkloom_wire::{Command, ErrorCode, Framing, Sink, flags};

use super::memory::REQUEST;
use super::{Connection, Ticket, Workbench};
use crate::call::nanoseconds;
use crate::queue::{Ended, MOST_FOUND};
use crate::request::{Context, Found, Memory, Owner, Request};
use crate::stats::Op;

impl Connection {
    /// Answers a request that came back from the queue.
    pub fn finish(&mut self, mut ticket: Ticket, ended: Ended, bench: &mut Workbench) {
        let Ended { request, mut error, found } = ended;
        if error == 0 && ticket.command == Command::BlockStatus {
            match self.told(&ticket, &found) {
                Some(told) => ticket.told.push(told),
                None => error = EIO,
            }
            if error == 0 && ticket.told.len() < self.contexts.len() && !self.is_gone() {
                return self.ask_next(ticket, request, bench);
            }
        }
        self.in_flight -= 1;
        let length = ticket.header.length;
        let bytes = if error == 0 && request.op != Op::Extents { length } else { 0 };
        let latency = nanoseconds(request.started);
        self.export.stats.end(bench.shard, request.op, 1, bytes, u64::from(error != 0), latency);
        let buffer = match request.memory {
            Memory::Owned(buffer) => {
                self.in_flight_bytes -= length;
                Arc::try_unwrap(buffer).ok()
            }
            _ => None,
        };
        if self.is_gone() {
            if let Some(buffer) = buffer {
                bench.buffers.put(buffer);
            }
            return;
        }
        let (framing, mut head) = (&self.framing(&ticket.header), Vec::with_capacity(48));
        if error != 0 {
            match self.next_context(&ticket) {
                Some(gone) if error == EINVAL => {
                    let message = format!("the export has no metadata context {gone} any more");
                    blkloom_wire::error(framing, &mut head, ErrorCode::Invalid, &message);
                }
                _ => self.fail(framing, error, &mut head),
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
            Some(buffer) if error == 0 && ticket.command == Command::Read => {
                let mut reservation = ticket.reservation;
                reservation.shrink(Buffer::capacity(buffer.len()) + REQUEST);
                self.output.push(head, Some(buffer), Some(reservation));
            }
            Some(buffer) => {
                bench.buffers.put(buffer);
                self.output.push(head, None, None);
            }
            None => self.output.push(head, None, None),
        }
    }

    /// The metadata context that a request is about next; None for any other request, too.
    pub(super) fn next_context(&self, ticket: &Ticket) -> Context {
        match ticket.command {
            Command::BlockStatus => self.contexts.get(ticket.told.len())?.context.clone(),
            _ => None,
        }
    }

    /// Asks for the next metadata context. One after the other: until the last has been answered the request is a
    /// single one that waits or is taken back as a whole.
    fn ask_next(&self, ticket: Ticket, request: Request, bench: &mut Workbench) {
        self.export.device.stats.start(bench.shard, 1);
        let context = self.next_context(&ticket);
        bench.queue.submit(Request { context, owner: Owner::Connection(ticket), ..request });
    }

    /// What was found, as descriptors from the request's start on. None: nothing at all, of a context that has no
    /// value which would always be safe.
    fn told(&self, ticket: &Ticket, found: &[Found]) -> Option<Vec<(u64, u32)>> {
        let header = &ticket.header;
        let one = header.flags & flags::REQ_ONE != 0;
        // All contexts together take no more memory than one might.
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

    pub(super) fn fail(&self, framing: &Framing, errno: i32, out: &mut impl Sink) {
        let code = blkloom_wire::nbd_errno(errno);
        let message = if code == ErrorCode::Io && errno != 5 {
            format!("{}", std::io::Error::from_raw_os_error(errno))
        } else {
            String::new()
        };
        blkloom_wire::error(framing, out, code, &message);
    }
}
