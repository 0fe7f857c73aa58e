//! NBD's transmission phase as bytes: requests in, replies out.
//!
//! Pure: no I/O, no unsafe, no allocation but the caller's buffer. Parsing never fails on what the
//! protocol lets a connection survive: a parsed `Request` may still carry a `refusal`. Source:
//! NetworkBlockDevice doc/proto.md, with the extended headers of its extension-ext-header branch.
#![forbid(unsafe_code)]

mod reply;
mod request;

pub use reply::{ErrorCode, Framing, MAX_DESCRIPTORS, Sink, block_status, error, hole, nbd_errno, read_data, success};
pub use request::{Command, Header, Malformed, Refusal, Request, Rules, Style, flags};
