//! State of an NBD connection at its start (from the handshake or another engine) and after a detach.

use std::os::fd::OwnedFd;
use std::time::Duration;

use blkloom_wire::Style;

use crate::operation::Context;

/// The transport kind of NBD connections.
pub const KIND: &str = "nbd";

/// The result of the handshake.
pub struct Session {
    pub style: Style,
    /// The selected metadata contexts. A block status reply covers all of them.
    pub contexts: Box<[Selected]>,
    pub unfinished: Unfinished,
    /// This client may not write, whatever the export is.
    pub read_only: bool,
    pub max_payload: u32,
    /// Timeout for a client that stalls in a request, or while it receives replies.
    pub stall: Duration,
}

/// Unprocessed bytes from the handshake or from the engine that served the connection before.
#[derive(Default)]
pub struct Unfinished {
    /// Bytes received and not served.
    pub initial: Vec<u8>,
    /// Bytes of replies that the client has not received yet.
    pub unsent: Vec<u8>,
    /// A payload that is being skipped. It follows `initial`.
    pub skipping: Option<Skipping>,
}

impl From<Vec<u8>> for Unfinished {
    fn from(initial: Vec<u8>) -> Unfinished {
        Unfinished { initial, ..Unfinished::default() }
    }
}

/// The payload of a refused request: `left` bytes are skipped, then the reply is sent.
pub struct Skipping {
    pub left: u64,
    pub reply: Vec<u8>,
}

/// A metadata context with its NBD context id.
pub struct Selected {
    pub id: u32,
    pub context: Context,
}

/// A detached connection, as in `Outcome::Detached`.
pub struct Detached {
    pub fd: OwnedFd,
    pub unfinished: Unfinished,
}
