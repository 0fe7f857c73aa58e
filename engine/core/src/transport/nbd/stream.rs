//! `Stream`: the byte stream of an NBD connection. `Plain` is a socket; TLS sessions are in a crate of their own.
//!
//! Nothing here waits: a stream that has nothing to receive, or accepts no more bytes, says `StreamError::Again`.

use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use blkloom_io::BufferPool;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, recv, send, sendmsg};

/// Why a stream has moved no bytes.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StreamError {
    /// Nothing has arrived, or nothing can be accepted: try again when the descriptor is ready.
    #[error("try again")]
    Again,
    #[error("{0}")]
    Io(Errno),
    /// The peer has broken the rules of the stream; the text is the whole reason.
    #[error("{0}")]
    Broken(String),
}

impl From<Errno> for StreamError {
    fn from(errno: Errno) -> StreamError {
        if errno == Errno::AGAIN { StreamError::Again } else { StreamError::Io(errno) }
    }
}

impl StreamError {
    /// The reason to report. doing: "send" or "receive".
    pub fn reason(&self, doing: &str) -> String {
        match self {
            StreamError::Broken(reason) => reason.clone(),
            error => format!("{doing}: {error}"),
        }
    }
}

/// A connected stream. After an error other than `Again`, every later call fails too.
pub trait Stream: Send {
    /// The socket.
    fn descriptor(&self) -> BorrowedFd<'_>;

    /// Receives what has arrived, up to the length of `into`. 0: the peer has closed its side in an orderly way.
    fn receive(&mut self, into: &mut [u8]) -> Result<usize, StreamError>;

    /// Sends a prefix of the parts, and returns its length: at least 1. buffers: memory for bytes on their way.
    fn send(&mut self, parts: &[IoSlice<'_>], buffers: &mut BufferPool) -> Result<usize, StreamError>;

    /// Sends accepted bytes that the socket has refused before.
    fn flush(&mut self, _buffers: &mut BufferPool) -> Result<(), StreamError> {
        Ok(())
    }

    /// Whether accepted bytes wait for the socket.
    fn has_unsent(&self) -> bool {
        false
    }

    /// Total bytes that were accepted and had to wait for the socket.
    fn sent(&self) -> u64 {
        0
    }

    /// Whether `receive` has bytes that arrived earlier: the descriptor does not report them.
    fn has_unread(&self) -> bool {
        false
    }

    /// Whether a part of a record has arrived.
    fn is_in_record(&self) -> bool {
        false
    }

    /// Bytes of memory that the stream occupies.
    fn footprint(&self) -> usize {
        0
    }

    /// Tells the peer that no more bytes follow, as far as the socket takes it.
    fn close(&mut self) {}

    /// The socket, for another engine. None: the stream cannot go on there, and is closed.
    fn take_descriptor(self: Box<Self>) -> Option<OwnedFd>;
}

/// A socket without encryption.
pub struct Plain(OwnedFd);

impl From<OwnedFd> for Box<dyn Stream> {
    fn from(fd: OwnedFd) -> Box<dyn Stream> {
        Box::new(Plain(fd))
    }
}

impl Stream for Plain {
    fn descriptor(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn receive(&mut self, into: &mut [u8]) -> Result<usize, StreamError> {
        loop {
            match recv(&self.0, &mut *into, RecvFlags::DONTWAIT) {
                Ok((count, _)) => return Ok(count),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn send(&mut self, parts: &[IoSlice<'_>], _buffers: &mut BufferPool) -> Result<usize, StreamError> {
        const FLAGS: SendFlags = SendFlags::NOSIGNAL.union(SendFlags::DONTWAIT);
        loop {
            let sent = match parts {
                [part] => send(&self.0, part, FLAGS),
                parts => sendmsg(&self.0, parts, &mut SendAncillaryBuffer::default(), FLAGS),
            };
            match sent {
                Ok(count) => return Ok(count),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn take_descriptor(self: Box<Self>) -> Option<OwnedFd> {
        Some(self.0)
    }
}
