//! `Wire`: the socket below OpenSSL.
//!
//! Records to send are collected in one buffer and sent together. While the socket is full, the buffer is filled with the
//! next ones: they are ready when the peer has made room. The buffer belongs to the session only while it has
//! unsent records. Records that OpenSSL writes by itself (handshake, alerts, answers to key updates) go there, too; if
//! there is no room for them, the session does not read on, so a peer cannot make it grow.

use std::io::{Error, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;

use blkloom_io::{Buffer, BufferPool};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

/// Bytes that a session receives at once.
pub const RECEIVED: usize = 128 << 10;
/// Most bytes that may arrive without data of the peer among them: handshake messages, key updates, empty records.
const WITHOUT_DATA: usize = 128 << 10;
/// Bytes of records to collect.
const COLLECTED: usize = 512 << 10;
/// Bytes to send together: the peer decrypts them while the next ones are encrypted.
const TOGETHER: usize = 64 << 10;
/// The same for what OpenSSL writes by itself.
const OWN: usize = 32 << 10;

pub struct Wire {
    socket: OwnedFd,
    unsent: Option<Buffer>,
    /// The unsent part of that buffer.
    from: usize,
    to: usize,
    /// The socket has refused bytes since the last `begin`.
    full: bool,
    /// Total bytes sent.
    sent: u64,
    /// Bytes that have arrived since data of the peer was read.
    without_data: usize,
    /// Whether one more receive is allowed: after data was read, the session returns instead.
    may_receive: bool,
}

impl Wire {
    pub fn new(socket: OwnedFd) -> Wire {
        Wire { socket, unsent: None, from: 0, to: 0, full: false, sent: 0, without_data: 0, may_receive: true }
    }

    pub fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    pub fn allow_receive(&mut self, allowed: bool) {
        self.may_receive = allowed;
    }

    /// The session has read data of the peer.
    pub fn has_data(&mut self) {
        self.without_data = 0;
    }

    pub fn has_unsent(&self) -> bool {
        self.to > self.from
    }

    pub fn sent(&self) -> u64 {
        self.sent
    }

    pub fn footprint(&self) -> usize {
        self.unsent.as_ref().map_or(0, Buffer::footprint)
    }

    /// Bytes of records that can still be collected.
    pub fn room(&mut self) -> usize {
        let len = self.unsent.as_ref().map_or(OWN, Buffer::len);
        // Later the move would be long, and earlier it would be for little room.
        if self.from >= len / 2 {
            self.move_to_start();
        }
        len - self.to
    }

    fn move_to_start(&mut self) {
        if let Some(buffer) = &mut self.unsent {
            buffer.bytes_mut().copy_within(self.from..self.to, 0);
        }
        (self.from, self.to) = (0, self.to - self.from);
    }

    /// Allows `send_some` to try the socket again.
    pub fn begin(&mut self) {
        self.full = false;
    }

    /// Sends the collected records if there are enough of them, unless the socket is full.
    pub fn send_some(&mut self) -> Result<(), Errno> {
        if self.to - self.from < TOGETHER || self.full { Ok(()) } else { self.flush() }
    }

    /// Takes a buffer to collect records in, if the session has none.
    pub fn prepare(&mut self, buffers: &mut BufferPool) {
        if self.unsent.is_none() {
            self.unsent = Some(buffers.take(COLLECTED));
        }
    }

    /// Returns the buffer, if all of it was sent.
    pub fn release(&mut self, buffers: &mut BufferPool) {
        if let Some(buffer) = self.unsent.take_if(|_| self.to == self.from) {
            buffers.put(buffer);
        }
    }

    /// Sends the collected records, as far as the socket accepts them.
    pub fn flush(&mut self) -> Result<(), Errno> {
        while let Some(buffer) = &self.unsent
            && self.from < self.to
        {
            match send(&self.socket, &buffer.bytes()[self.from..self.to], SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(count) => {
                    self.from += count;
                    self.sent += count as u64;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.full = true;
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        if self.from == self.to {
            (self.from, self.to) = (0, 0);
            self.unsent.take_if(|buffer| buffer.len() == OWN);
        }
        Ok(())
    }
}

impl Write for Wire {
    fn write(&mut self, record: &[u8]) -> std::io::Result<usize> {
        let len = self.unsent.as_ref().map_or(OWN, Buffer::len);
        if len - self.to < record.len() && self.from > 0 {
            self.move_to_start();
        }
        let buffer = self.unsent.get_or_insert_with(|| Buffer::new(OWN));
        let count = record.len().min(buffer.len() - self.to);
        if count == 0 {
            return Err(ErrorKind::WouldBlock.into());
        }
        buffer.bytes_mut()[self.to..self.to + count].copy_from_slice(&record[..count]);
        self.to += count;
        Ok(count)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Read for Wire {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        if !self.may_receive {
            return Err(ErrorKind::WouldBlock.into());
        }
        if self.without_data > WITHOUT_DATA {
            return Err(Error::other("it sends records without data"));
        }
        loop {
            match recv(&self.socket, &mut *into, RecvFlags::DONTWAIT) {
                Ok((count, _)) => {
                    self.without_data += count;
                    return Ok(count);
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}
