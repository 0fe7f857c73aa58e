//! Send queue of an NBD connection.
//!
//! The replies of one loop iteration are collected in the loop's `Arena` and sent by one call. Bytes that the socket
//! does not accept, and replies whose data is in a buffer of its own, wait in the connection's queue, in order, and are
//! sent by gathered sends. If the socket leaves more than `LITTLE` bytes of the arena, they are not copied: the queue
//! gets the arena's buffer, and the arena gets another one.

use std::collections::VecDeque;
use std::io::IoSlice;

use blkloom_io::{Buffer, BufferPool};
use blkloom_wire::Sink;

use super::stream::{Stream, StreamError};
use crate::budget::Reservation;
use crate::transport::Arena;

impl Sink for Arena {
    fn put(&mut self, bytes: &[u8]) {
        Arena::put(self, bytes);
    }
}

struct Chunk {
    head: Vec<u8>,
    body: Option<Buffer>,
    /// Bytes sent, of head and body together.
    sent: usize,
    /// The reservation of its memory, if there is one.
    reservation: Option<Reservation>,
}

impl Chunk {
    fn len(&self) -> usize {
        self.head.len() + self.body.as_ref().map_or(0, Buffer::len)
    }

    fn unreserved(&self) -> usize {
        let body = self.body.as_ref().map_or(0, Buffer::footprint);
        if self.reservation.is_some() { 0 } else { self.head.len() + body }
    }
}

#[derive(Default)]
pub struct Output {
    queue: VecDeque<Chunk>,
    bytes: usize,
    unreserved: usize,
    /// Total bytes sent from the queue.
    sent: u64,
}

/// Up to this many bytes are copied from the arena; for more, the arena's buffer is kept.
const LITTLE: usize = 128 << 10;
/// Most parts of one gathered send.
const PARTS: usize = 128;

impl Output {
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Bytes in the queue.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Bytes of memory in the queue without a reservation.
    pub fn unreserved(&self) -> usize {
        self.unreserved
    }

    pub fn push(&mut self, head: Vec<u8>, body: Option<Buffer>, reservation: Option<Reservation>) {
        self.wait(Chunk { head, body, sent: 0, reservation });
    }

    fn wait(&mut self, chunk: Chunk) {
        self.bytes += chunk.len() - chunk.sent;
        self.unreserved += chunk.unreserved();
        self.queue.push_back(chunk);
    }

    /// Returns the queued bytes, for another engine to send.
    pub fn take(&mut self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.bytes);
        for Chunk { head, body, sent, .. } in std::mem::take(self).queue {
            let in_head = sent.min(head.len());
            bytes.extend_from_slice(&head[in_head..]);
            bytes.extend_from_slice(body.as_ref().map_or(&[], |body| &body.bytes()[sent - in_head..]));
        }
        bytes
    }

    /// Drops all queued bytes.
    pub fn clear(&mut self) {
        *self = Output::default();
    }

    /// Sends the queue and then the arena. Bytes that the socket does not accept are queued.
    pub fn send_arena(
        &mut self,
        stream: &mut dyn Stream,
        arena: &mut Arena,
        buffers: &mut BufferPool,
    ) -> Result<(), StreamError> {
        if arena.used() == 0 {
            return Ok(());
        }
        self.send(stream, buffers)?;
        let mut sent = 0;
        while self.is_empty() && sent < arena.used() {
            match stream.send(&[IoSlice::new(&arena.bytes()[sent..])], buffers) {
                Ok(n) => sent += n,
                Err(StreamError::Again) => break,
                Err(error) => return Err(error),
            }
        }
        let left = arena.used() - sent;
        if left > LITTLE {
            let body = Some(arena.give(buffers));
            self.wait(Chunk { head: Vec::new(), body, sent, reservation: None });
        } else if left > 0 {
            self.push(arena.bytes()[sent..].to_vec(), None, None);
        }
        arena.rewind(0);
        Ok(())
    }

    /// Sends the queue, as far as the socket accepts it.
    pub fn send(&mut self, stream: &mut dyn Stream, buffers: &mut BufferPool) -> Result<(), StreamError> {
        stream.flush(buffers)?;
        while !self.queue.is_empty() {
            let mut parts = Vec::with_capacity(16);
            for chunk in &self.queue {
                if parts.len() + 2 > PARTS {
                    break;
                }
                let head = chunk.sent.min(chunk.head.len());
                if head < chunk.head.len() {
                    parts.push(IoSlice::new(&chunk.head[head..]));
                }
                if let Some(body) = &chunk.body {
                    parts.push(IoSlice::new(&body.bytes()[chunk.sent - head..]));
                }
            }
            match stream.send(&parts, buffers) {
                Ok(sent) => self.forget(sent, buffers),
                Err(StreamError::Again) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn forget(&mut self, mut count: usize, buffers: &mut BufferPool) {
        self.bytes -= count;
        self.sent += count as u64;
        while let Some(chunk) = self.queue.front_mut() {
            let left = chunk.len() - chunk.sent;
            if count < left {
                chunk.sent += count;
                return;
            }
            count -= left;
            self.unreserved -= chunk.unreserved();
            if let Some(body) = self.queue.pop_front().and_then(|chunk| chunk.body) {
                buffers.put(body);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn bytes_that_the_socket_refuses_are_sent_in_order_and_count_with_their_buffers()
    -> Result<(), Box<dyn std::error::Error>> {
        const ARENA: usize = 1 << 20;
        let (mut client, server) = UnixStream::pair()?;
        server.set_nonblocking(true)?;
        let mut server: Box<dyn Stream> = OwnedFd::from(server).into();
        let (mut arena, mut buffers, mut output) = (Arena::new(ARENA), BufferPool::new(0), Output::default());
        let mut expected = Vec::new();
        for (round, length) in [700_000, 5000, ARENA, 200_000].into_iter().enumerate() {
            let bytes: Vec<u8> = (0..length).map(|at| (at / 7 + round) as u8).collect();
            arena.put(&bytes);
            expected.extend_from_slice(&bytes);
            let before = output.unreserved();
            output.send_arena(&mut *server, &mut arena, &mut buffers)?;
            assert_eq!(arena.room(), ARENA, "the arena is empty again");
            let kept = output.unreserved() - before;
            assert_eq!(kept, if length > LITTLE { ARENA } else { length }, "{length} bytes");
        }
        let waiting = output.bytes();
        assert!(expected.len() - waiting < 1 << 20, "a socket holds less");
        let mut received = vec![0; expected.len()];
        let mut at = 0;
        while at < received.len() {
            at += client.read(&mut received[at..])?;
            output.send(&mut *server, &mut buffers)?;
        }
        assert!(received == expected);
        assert_eq!((output.bytes(), output.unreserved(), output.sent()), (0, 0, waiting as u64));
        Ok(())
    }
}
