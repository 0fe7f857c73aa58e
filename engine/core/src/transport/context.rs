//! `LoopContext`: the resources of an event loop that a transport may use during a call (queue, buffers, statistics).

use std::sync::Arc;
use std::time::Instant;

use blkloom_io::{Buffer, BufferPool, Registered, Slice};

use crate::budget::{Account, Granted, Need, Waiting};
use crate::clock::nanoseconds;
use crate::device::Export;
use crate::mailbox::Poster;
use crate::queue::Queue;
use crate::request::{Owner, Request, TransportId};
use crate::stats::{Op, Shard};

/// Resources of an event loop, passed to each call of a transport.
pub struct LoopContext {
    /// The transport that is being called.
    pub(crate) transport: TransportId,
    pub(crate) queue: Queue,
    pub(crate) grants: Poster<Granted>,
    pub buffers: BufferPool,
    /// Empty between two calls of a transport.
    pub arena: Arena,
    /// Scratch memory for the zero ranges of one request.
    pub zeros: Vec<(u64, u64)>,
    /// The loop's statistics shard.
    pub shard: Shard,
    /// Send the first replies of an iteration early: the loop was idle before, and a CPU is free for the waiting peer.
    pub replies_early: bool,
}

impl LoopContext {
    /// The owner of a request that comes back by `Transport::complete`.
    pub fn owner(&self, token: u64) -> Owner {
        Owner::Transport { transport: self.transport, token }
    }

    /// Submits a request to the queue. The caller has checked its range against the device's size. The device's
    /// statistics are updated here and at its end; the transport updates those of the export.
    pub fn submit(&mut self, request: Request) {
        request.device.stats.start(self.shard, 1);
        self.queue.submit(request);
    }

    /// Registers memory with the loop's ring, for requests of this transport (`Memory::Registered`). The memory must
    /// stay valid until it is unregistered and the last such request has ended. Fails if there is no ring or no free
    /// slot.
    pub fn register(&mut self, memory: Slice<'static>) -> std::io::Result<Registered> {
        self.queue.register(memory)
    }

    pub fn unregister(&mut self, buffer: Registered) -> std::io::Result<()> {
        self.queue.unregister(buffer)
    }

    /// Counts requests that the fast path served: (requests, bytes, errors).
    pub fn count(&self, export: &Export, op: Op, (count, bytes, errors): (u64, u64, u64), started: Instant) {
        let latency = nanoseconds(started);
        for stats in [&export.stats, &export.device.stats] {
            stats.start(self.shard, count);
            stats.end(self.shard, op, count, bytes, errors, latency);
        }
    }

    /// Waits for memory of the budget. `Transport::granted` delivers the reservation.
    pub fn wait_for_memory(&self, account: &Arc<Account>, need: Need) -> Waiting {
        account.wait(need, self.grants.clone(), self.transport)
    }
}

/// A loop's buffer for the replies of one iteration.
pub struct Arena {
    buffer: Buffer,
    used: usize,
}

impl Arena {
    pub fn new(capacity: usize) -> Arena {
        Arena { buffer: Buffer::new(capacity), used: 0 }
    }

    pub fn room(&self) -> usize {
        self.buffer.len() - self.used
    }

    pub fn used(&self) -> usize {
        self.used
    }

    pub fn bytes(&self) -> &[u8] {
        &self.buffer.bytes()[..self.used]
    }

    /// Returns the buffer with its contents. The arena gets another buffer.
    pub fn give(&mut self, buffers: &mut BufferPool) -> Buffer {
        let next = buffers.take(self.buffer.len());
        let mut given = std::mem::replace(&mut self.buffer, next);
        given.shorten(std::mem::take(&mut self.used));
        given
    }

    /// Drops all bytes from `to` on.
    pub fn rewind(&mut self, to: usize) {
        self.used = self.used.min(to);
    }

    /// Appends `len` bytes and returns them as memory to read into.
    pub fn claim(&mut self, len: usize) -> Slice<'_> {
        let at = self.used;
        assert!(len <= self.room(), "claims are checked against the room");
        self.used += len;
        self.buffer.slice().part(at, len)
    }

    pub fn put(&mut self, bytes: &[u8]) {
        assert!(bytes.len() <= self.room(), "callers leave room for heads and errors");
        self.buffer.bytes_mut()[self.used..self.used + bytes.len()].copy_from_slice(bytes);
        self.used += bytes.len();
    }
}
