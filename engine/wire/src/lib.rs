//! Parsers and builders of NBD requests and replies (transmission phase): of a server, and of a client.
//!
//! No I/O, no unsafe code, and no allocation except in the caller's buffer. Parsing fails only if the connection must
//! be closed: an invalid request that the protocol answers with an error is a `Request` with a `refusal`. Source:
//! NetworkBlockDevice doc/proto.md, with the extended headers of its extension-ext-header branch.
#![forbid(unsafe_code)]

mod reply;
mod request;
mod server_reply;

pub use reply::{ErrorCode, Framing, MAX_DESCRIPTORS, Sink, block_status, error, hole, nbd_errno, read_data, success};
pub use request::{Command, Header, Malformed, Refusal, Request, Rules, Style, flags};
pub use server_reply::{Content, Coverage, MOST_PAYLOAD, Parsed, Reply, Violation, server_reply};
