//! Requests that go through the queue, and their replies. Part of `connection`, whose invariants hold here.

use std::time::Instant;

use blkloom_fuse_wire::{Errno, Unique, Whence, reply};
use slab::Slab;

use super::super::link::{Bytes, Link};
use super::Connection;
use super::seek::{Sought, look};
use crate::budget::{Need, Reservation};
use crate::clock::nanoseconds;
use crate::operation::Flags;
use crate::queue::Ended;
use crate::request::Request;
use crate::stats::Op;
use crate::transport::LoopContext;

/// Memory of a request without its data, which is in memory of the link.
const REQUEST: usize = 1024;
/// Most memory of the extents of a range.
const EXTENTS: usize = 5 << 18;
/// Most bytes that one step of a search for data or a hole covers.
const SEARCHED: u64 = 4 << 30;
/// Bytes of the first step: the result is usually near, and a range may have very many extents. Each later step is
/// longer.
const SEARCHED_FIRST: u64 = 64 << 10;
const LONGER: u64 = 16;

/// The reply to a request that has succeeded.
#[derive(Clone, Copy)]
pub(super) enum Answer {
    Data,
    Written,
    Done,
    /// The offset of the data or hole. The search has reached this offset.
    Found {
        at: u64,
        whence: Whence,
    },
}

/// A request in flight, with the data for its reply.
pub(super) struct Ticket<L: Link> {
    /// Number of the connection's requests that were submitted before this one.
    pub order: u64,
    unique: Unique,
    /// The request's message.
    pub kept: L::Kept,
    answer: Answer,
    reservation: Reservation,
}

/// The requests in flight, by token.
pub(super) struct Tickets<L: Link> {
    all: Slab<Ticket<L>>,
    /// Number of requests submitted to the queue ever.
    queued: u64,
}

impl<L: Link> Tickets<L> {
    pub fn new(most: usize) -> Tickets<L> {
        Tickets { all: Slab::with_capacity(most), queued: 0 }
    }

    pub fn len(&self) -> usize {
        self.all.len()
    }

    pub fn take(&mut self, token: u64) -> Option<Ticket<L>> {
        self.all.try_remove(token as usize)
    }
}

impl<L: Link> Connection<L> {
    /// Reserves memory. None: the message must be kept until memory is granted.
    pub(super) fn reserve(&mut self, op: Op, length: usize, cx: &LoopContext) -> Option<Reservation> {
        let bytes = match op {
            Op::Read | Op::Write if self.file.export.device.copies() => length,
            Op::Extents => EXTENTS,
            _ => 0,
        };
        self.memory.reserve(Need::new(length as u64, bytes + REQUEST), cx)
    }

    /// Submits the rest of a request to the queue.
    pub(super) fn submit(
        &mut self,
        (unique, message, answer): (Unique, L::Message, Answer),
        (op, offset, len, flags): (Op, u64, u64, Flags),
        (reservation, done): (Reservation, u64),
        started: Instant,
        cx: &mut LoopContext,
    ) {
        let bytes = match op {
            Op::Read => Bytes::Read { length: len as usize, done: done as usize },
            Op::Write => Bytes::Write { length: len as usize },
            _ => Bytes::None,
        };
        let (memory, kept) = self.link.keep(message, bytes);
        let ticket = Ticket { order: self.tickets.queued, unique, kept, answer, reservation };
        self.tickets.queued += 1;
        let token = self.tickets.all.insert(ticket) as u64;
        self.file.export.stats.start(cx.shard, 1);
        let (device, owner) = (self.file.export.device.clone(), cx.owner(token));
        cx.submit(Request { device, op, offset, len, flags, memory, context: None, owner, started, done });
    }

    /// Answers a request that came back from the queue.
    pub(super) fn answer(&mut self, token: u64, ended: Ended, cx: &mut LoopContext) {
        let Ended { request, error, found } = ended;
        let Some(ticket) = self.tickets.take(token) else {
            return;
        };
        let bytes = if error.is_none() && request.op != Op::Extents { request.len } else { 0 };
        let latency = nanoseconds(request.started);
        self.file.export.stats.end(cx.shard, request.op, 1, bytes, u64::from(error.is_some()), latency);
        let (unique, message) = (ticket.unique, self.link.regain(ticket.kept, request.memory));
        if self.is_gone() {
            return self.link.forget(message);
        }
        if let Some(errno) = error {
            return self.fail(message, unique, errno);
        }
        match ticket.answer {
            Answer::Data => self.send_data(message, unique, request.len as usize),
            Answer::Written => self.send_reply(message, &reply::written(unique, request.len as u32)),
            Answer::Done => self.send_reply(message, &reply::done(unique)),
            Answer::Found { at, whence } => {
                let (end, size) = (request.offset + request.len, self.file.size());
                match (look(&found, at, end, whence), whence) {
                    (Sought::At(offset), _) => self.send_reply(message, &reply::found(unique, offset)),
                    (Sought::NotBefore(offset), _) if offset < size => {
                        let longest = request.len.saturating_mul(LONGER);
                        let sought = (offset, whence, longest);
                        self.ask_extents((unique, message), sought, ticket.reservation, request.started, cx);
                    }
                    // Every file has a hole after its end.
                    (Sought::NotBefore(_), Whence::Hole) => self.send_reply(message, &reply::found(unique, size)),
                    (Sought::NotBefore(_), Whence::Data) => {
                        self.send_reply(message, &reply::error(unique, Errno::NXIO));
                    }
                }
            }
        }
    }

    pub(super) fn begin_search(
        &mut self,
        identity: (Unique, L::Message),
        (at, whence): (u64, Whence),
        reservation: Reservation,
        cx: &mut LoopContext,
    ) {
        self.ask_extents(identity, (at, whence, SEARCHED_FIRST), reservation, Instant::now(), cx);
    }

    /// Continues a search with a block status request of limited length.
    fn ask_extents(
        &mut self,
        (unique, message): (Unique, L::Message),
        (at, whence, longest): (u64, Whence, u64),
        reservation: Reservation,
        started: Instant,
        cx: &mut LoopContext,
    ) {
        let length = self.file.size().saturating_sub(at).min(longest.min(SEARCHED));
        let what = (Op::Extents, at, length, Flags::default());
        let answer = (unique, message, Answer::Found { at, whence });
        self.submit(answer, what, (reservation, 0), started, cx);
    }
}
