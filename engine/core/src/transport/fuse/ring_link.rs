//! `RingLink`: messages over io_uring. Requests arrive in entries of a ring, and replies are written to the same
//! entries and sent together.
//!
//! A message is an entry. Reads and writes use the entry's payload as memory, also in the queue. The ring has `depth`
//! entries for each of the kernel's queues; further requests wait in the kernel. Messages that the kernel does not send
//! over a ring (INTERRUPT, FORGET) come over the descriptor, which the ring watches.
//!
//! The kernel cannot send requests of a ring again, so no other engine can take over such a connection: requests that
//! are not answered when the ring ends fail when the connection ends.

use std::collections::VecDeque;
use std::os::fd::{BorrowedFd, OwnedFd};

use blkloom_fuse_wire::ring::{self, Header};
use blkloom_fuse_wire::{Errno, Malformed, Negotiated, Request, Unique, reply};
use blkloom_io::{Arrival, CommandRing, Slice, Source};
use rustix::io;
use rustix::param::page_size;

use super::buffers::Buffers;
use super::device_link::{self, DeviceLink};
use super::link::{Bytes, Ended, Link};
use super::ring_size::{depth, queues};
use crate::request::Memory;

/// Most replies that are sent together: the callers of the first requests continue while the next are served.
const MOST_TOGETHER: usize = 8;

pub(super) enum Either<D> {
    Entry(usize),
    /// A message over the descriptor.
    Device(D),
}

pub(super) struct RingLink {
    device: DeviceLink,
    ring: CommandRing,
    depth: usize,
    /// Entries with requests that were not received yet.
    arrived: VecDeque<usize>,
    /// Number of replies that wait to be sent.
    waiting: usize,
    readable: bool,
    /// All entries were registered with the kernel.
    is_registered: bool,
    /// Why the descriptor has ended. The kernel then returns all entries.
    broken: Option<Ended>,
}

impl RingLink {
    pub fn new(fd: OwnedFd, negotiated: &Negotiated) -> std::io::Result<RingLink> {
        let payload = ring::payload_size(negotiated, page_size());
        let (queues, depth) = (queues()?, depth(queues()?, payload));
        let ring = CommandRing::new(&fd, queues * depth, ring::HEADER_SIZE, payload)?;
        Ok(RingLink {
            // The messages that come over the descriptor are answered at once.
            device: DeviceLink::new(fd, Vec::new(), Buffers::one(payload)?),
            ring,
            depth,
            arrived: VecDeque::with_capacity(queues * depth),
            waiting: 0,
            readable: false,
            is_registered: false,
            broken: None,
        })
    }

    fn queue_of(&self, entry: usize) -> u16 {
        (entry / self.depth) as u16
    }

    fn header(&self, entry: usize) -> &Header {
        self.ring.head(entry).first_chunk().expect("heads have HEADER_SIZE bytes")
    }

    fn register(&mut self) -> std::io::Result<()> {
        for entry in 0..self.ring.entries() {
            let command = ring::command(self.queue_of(entry), 0);
            self.ring.register(entry, ring::REGISTER, &command)?;
        }
        self.ring.watch()?;
        self.ring.submit()
    }

    fn reap(&mut self) -> Result<(), Ended> {
        let (arrived, readable, mut failed) = (&mut self.arrived, &mut self.readable, None);
        self.ring.reap(|arrival| match arrival {
            Arrival::Completed(entry, Ok(())) => arrived.push_back(entry),
            // The request was aborted, as all requests are at the end of the connection.
            Arrival::Completed(_, Err(errno)) => failed = Some(errno),
            Arrival::Readable => *readable = true,
        });
        match failed {
            None => {}
            Some(io::Errno::NOTCONN | io::Errno::CONNABORTED | io::Errno::NODEV | io::Errno::NOENT) => {
                self.broken.get_or_insert_with(|| "unmounted".to_owned());
            }
            Some(errno) => return Err(format!("FUSE over io_uring: {errno}")),
        }
        match &self.broken {
            Some(reason) if self.ring.outstanding() == 0 && self.arrived.is_empty() => Err(reason.clone()),
            _ => Ok(()),
        }
    }

    /// Receives a message from the descriptor.
    fn receive_plain(&mut self) -> Result<Option<device_link::Message>, Ended> {
        match self.device.receive() {
            Ok(None) => {
                self.readable = false;
                self.ring.watch().and_then(|()| self.ring.submit()).map_err(|error| format!("io_uring: {error}"))?;
                Ok(None)
            }
            Ok(message) => Ok(message),
            Err(reason) => {
                self.readable = false;
                self.broken = Some(reason);
                Ok(None)
            }
        }
    }

    fn answer(&mut self, entry: usize, head: &[u8; reply::HEADER_SIZE], length: usize) -> Result<(), Ended> {
        let commit = ring::commit(self.header(entry));
        let header = self.ring.head_mut(entry).first_chunk_mut().expect("heads have HEADER_SIZE bytes");
        ring::answer(header, head, length as u32);
        let command = ring::command(self.queue_of(entry), commit);
        let queued = self.ring.command(entry, ring::COMMIT_AND_FETCH, &command);
        queued.map_err(|error| format!("io_uring: {error}"))?;
        self.waiting += 1;
        if self.waiting >= MOST_TOGETHER { self.send() } else { Ok(()) }
    }
}

impl Link for RingLink {
    type Message = Either<device_link::Message>;
    type Kept = Either<device_link::Kept>;

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.ring.fd()
    }

    fn receive(&mut self) -> Result<Option<Self::Message>, Ended> {
        if !self.is_registered {
            // Not in `new`: entries belong to the thread that submits them.
            self.register().map_err(|error| format!("FUSE over io_uring: {error}"))?;
            self.is_registered = true;
        }
        if self.arrived.is_empty() {
            self.reap()?;
        }
        if self.readable
            && self.device.receives()
            && let Some(message) = self.receive_plain()?
        {
            return Ok(Some(Either::Device(message)));
        }
        Ok(self.arrived.pop_front().map(Either::Entry))
    }

    /// Each entry has memory of its own.
    fn receives(&self) -> bool {
        true
    }

    fn why_broken(&mut self) -> Ended {
        self.device.why_broken()
    }

    fn is_ready(&self) -> bool {
        !self.arrived.is_empty()
            || self.readable && self.device.receives()
            || self.ring.is_unsubmitted()
            || !self.is_registered
    }

    fn parse<'a>(&'a self, message: &'a Self::Message, joined: &'a mut Vec<u8>) -> Result<Request<'a>, Malformed> {
        match message {
            Either::Entry(entry) => ring::parse(self.header(*entry), self.ring.payload(*entry)),
            Either::Device(message) => self.device.parse(message, joined),
        }
    }

    fn room(&self, message: &Self::Message) -> usize {
        match message {
            Either::Entry(entry) => self.ring.payload(*entry).len(),
            Either::Device(message) => self.device.room(message),
        }
    }

    fn destination<'a>(&'a mut self, message: &'a mut Self::Message, length: usize) -> Slice<'a> {
        match message {
            Either::Entry(entry) => (&mut self.ring.payload_mut(*entry)[..length]).into(),
            Either::Device(message) => self.device.destination(message, length),
        }
    }

    fn source<'a>(&'a self, message: &'a Self::Message, length: usize) -> Source<'a> {
        match message {
            Either::Entry(entry) => self.ring.payload(*entry)[..length].into(),
            Either::Device(message) => self.device.source(message, length),
        }
    }

    fn keep(&mut self, message: Self::Message, bytes: Bytes) -> (Memory, Self::Kept) {
        let entry = match message {
            Either::Entry(entry) => entry,
            Either::Device(message) => {
                let (memory, kept) = self.device.keep(message, bytes);
                return (memory, Either::Device(kept));
            }
        };
        // SAFETY: no command uses the entry before `regain`, which is called when the request has ended. No reference
        // to its payload exists meanwhile. A transport is dropped only when all of its requests have ended.
        let memory = unsafe {
            match bytes {
                Bytes::None => Memory::None,
                Bytes::Read { length, .. } => Memory::Borrowed(self.ring.lend(entry, length)),
                Bytes::Write { length } => Memory::Source(self.ring.lend(entry, length).source()),
            }
        };
        (memory, Either::Entry(entry))
    }

    fn regain(&mut self, kept: Self::Kept, memory: Memory) -> Self::Message {
        match kept {
            Either::Entry(entry) => Either::Entry(entry),
            Either::Device(kept) => Either::Device(self.device.regain(kept, memory)),
        }
    }

    fn reply(&mut self, message: Self::Message, reply: &[u8]) -> Result<(), Ended> {
        let entry = match message {
            Either::Entry(entry) => entry,
            Either::Device(message) => return self.device.reply(message, reply),
        };
        let (head, body) = reply.split_first_chunk().expect("replies begin with a header");
        self.ring.payload_mut(entry)[..body.len()].copy_from_slice(body);
        self.answer(entry, head, body.len())
    }

    fn reply_data(&mut self, message: Self::Message, unique: Unique, length: usize) -> Result<(), Ended> {
        let entry = match message {
            Either::Entry(entry) => entry,
            Either::Device(message) => return self.device.reply_data(message, unique, length),
        };
        match reply::data(unique, length) {
            Some(head) => self.answer(entry, &head, length),
            None => self.answer(entry, &reply::error(unique, Errno::IO), 0),
        }
    }

    /// The entry keeps its unanswered request until the connection ends.
    fn forget(&mut self, message: Self::Message) {
        if let Either::Device(message) = message {
            self.device.forget(message);
        }
    }

    fn send(&mut self) -> Result<(), Ended> {
        self.waiting = 0;
        self.ring.submit().map_err(|error| format!("io_uring_enter: {error}"))
    }

    fn unanswered(&self, _: &Self::Kept, _: &Memory) -> Vec<u8> {
        Vec::new()
    }

    fn unserved(&mut self, _: Option<Self::Message>) -> Vec<u8> {
        Vec::new()
    }

    fn into_descriptor(self) -> OwnedFd {
        self.device.into_descriptor()
    }
}
