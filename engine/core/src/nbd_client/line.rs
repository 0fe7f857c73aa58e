//! `Line`: the byte stream below a connection, a socket or a TLS session.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use blkloom_io::BufferPool;
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendFlags, recvmsg, sendmsg};

use crate::transport::nbd::{Stream, StreamError};

/// Bytes of buffers that a TLS session keeps for the next records.
const BUFFERS: usize = 1 << 20;

pub(super) enum Line {
    Plain(OwnedFd),
    Tls(Box<dyn Stream>, BufferPool),
}

impl Line {
    pub fn new(stream: Box<dyn Stream>) -> Line {
        Line::Tls(stream, BufferPool::new(BUFFERS))
    }

    pub fn descriptor(&self) -> BorrowedFd<'_> {
        match self {
            Line::Plain(fd) => fd.as_fd(),
            Line::Tls(stream, _) => stream.descriptor(),
        }
    }

    /// Receives into the first piece, and into the second one what a socket has beyond that.
    pub fn receive(&mut self, first: &mut [u8], second: &mut [u8]) -> Result<usize, StreamError> {
        match self {
            Line::Plain(fd) => loop {
                let mut into = [IoSliceMut::new(first), IoSliceMut::new(second)];
                match recvmsg(&*fd, &mut into, &mut RecvAncillaryBuffer::default(), RecvFlags::DONTWAIT) {
                    Err(Errno::INTR) => {}
                    received => return Ok(received.map(|message| message.bytes)?),
                }
            },
            Line::Tls(stream, _) => stream.receive(if first.is_empty() { second } else { first }),
        }
    }

    pub fn send(&mut self, parts: &[IoSlice<'_>]) -> Result<usize, StreamError> {
        match self {
            Line::Plain(fd) => loop {
                let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                match sendmsg(&*fd, parts, &mut SendAncillaryBuffer::default(), flags) {
                    Err(Errno::INTR) => {}
                    sent => return Ok(sent?),
                }
            },
            Line::Tls(stream, buffers) => stream.send(parts, buffers),
        }
    }

    /// Sends accepted bytes that the socket has refused before.
    pub fn flush(&mut self) -> Result<(), StreamError> {
        match self {
            Line::Plain(_) => Ok(()),
            Line::Tls(stream, buffers) => stream.flush(buffers),
        }
    }

    pub fn has_unsent(&self) -> bool {
        matches!(self, Line::Tls(stream, _) if stream.has_unsent())
    }

    /// Whether all that has arrived may not have been received although less came than was asked for.
    pub fn is_sealed(&self) -> bool {
        matches!(self, Line::Tls(..))
    }

    /// Tells the server that nothing follows.
    pub fn close(&mut self) {
        if let Line::Tls(stream, _) = self {
            stream.close();
        }
    }
}
