//! FUSE over io_uring: the layout of requests and replies in the entries of a ring, and the commands about entries.
//!
//! An entry is two pieces of the server's memory: a header of `HEADER_SIZE` bytes (fuse_uring_req_header), and a
//! payload of at least `payload_size` bytes. REGISTER passes an entry to the kernel, and completes when the kernel has
//! written a request to it. COMMIT_AND_FETCH sends the reply in the entry, and completes when the next request is in
//! the entry. The kernel has one queue for each possible CPU, and uses rings only when each queue has an entry. A
//! request goes to the queue of the CPU that its caller runs on. FORGET, INTERRUPT and notifications always use
//! /dev/fuse.
//!
//! Source: Linux include/uapi/linux/fuse.h (7.42), fs/fuse/dev_uring.c,
//! Documentation/filesystems/fuse/fuse-io-uring.rst.

use crate::request::{HEADER_SIZE as IN_HEADER_SIZE, parse_apart};
use crate::{Malformed, Negotiated, Reason, Request, Unique, reply};

/// Size of an entry's header in bytes.
pub const HEADER_SIZE: usize = 288;
/// Size of a command in bytes, of the 80 bytes for commands in an SQE of 128 bytes.
pub const COMMAND_SIZE: usize = 24;
/// Opcode of the command that registers an entry.
pub const REGISTER: u32 = 1;
/// Opcode of the command that sends the reply in an entry and fetches the next request.
pub const COMMIT_AND_FETCH: u32 = 2;

/// Payload size in bytes that the kernel always accepts (FUSE_MIN_READ_BUFFER).
const SMALLEST_PAYLOAD: usize = 8192;
/// Offsets of the parts in a header: fuse_in_header or fuse_out_header, the operation's own header, and
/// fuse_uring_ent_in_out.
const OPERATION_AT: usize = 128;
const ENTRY_AT: usize = 256;
const COMMIT_AT: usize = ENTRY_AT + 8;
const PAYLOAD_LENGTH_AT: usize = ENTRY_AT + 16;

pub type Header = [u8; HEADER_SIZE];

/// Smallest payload size in bytes of an entry that the kernel accepts.
pub const fn payload_size(negotiated: &Negotiated, page_size: usize) -> usize {
    let pages = negotiated.max_pages as usize * page_size;
    let write = negotiated.max_write as usize;
    let most = if pages > write { pages } else { write };
    if most > SMALLEST_PAYLOAD { most } else { SMALLEST_PAYLOAD }
}

/// Builds a command about an entry of a queue. commit: the commit id of the answered request; 0 for REGISTER.
pub fn command(queue: u16, commit: u64) -> [u8; COMMAND_SIZE] {
    let mut bytes = [0; COMMAND_SIZE];
    bytes[8..16].copy_from_slice(&commit.to_ne_bytes());
    bytes[16..18].copy_from_slice(&queue.to_ne_bytes());
    bytes
}

/// The commit id of the request in an entry, for COMMIT_AND_FETCH.
pub fn commit(header: &Header) -> u64 {
    u64::from_ne_bytes(std::array::from_fn(|at| header[COMMIT_AT + at]))
}

/// Parses the request in an entry.
pub fn parse<'a>(header: &'a Header, payload: &'a [u8]) -> Result<Request<'a>, Malformed> {
    let (head, stated) = (&header[..IN_HEADER_SIZE], u32_at(header, 0));
    let length = u32_at(header, PAYLOAD_LENGTH_AT) as usize;
    let body = (stated as usize).checked_sub(IN_HEADER_SIZE + length);
    let body = body.and_then(|body| header[OPERATION_AT..ENTRY_AT].get(..body));
    match (body, payload.get(..length)) {
        (Some(body), Some(rest)) => parse_apart(head, body, rest),
        _ => {
            let unique = Unique(u64::from_ne_bytes(std::array::from_fn(|at| header[8 + at])));
            let reason = Reason::Length { stated, received: IN_HEADER_SIZE + length };
            Err(Malformed { unique: Some(unique), opcode: u32_at(header, 4), reason })
        }
    }
}

/// Writes a reply's header (the first bytes of the result of a `reply` function) to an entry. payload_length: bytes of
/// the rest of the reply, which is in the entry's payload.
pub fn answer(header: &mut Header, head: &[u8; reply::HEADER_SIZE], payload_length: u32) {
    header[..reply::HEADER_SIZE].copy_from_slice(head);
    header[PAYLOAD_LENGTH_AT..PAYLOAD_LENGTH_AT + 4].copy_from_slice(&payload_length.to_ne_bytes());
}

fn u32_at(header: &Header, at: usize) -> u32 {
    u32::from_ne_bytes(std::array::from_fn(|byte| header[at + byte]))
}
