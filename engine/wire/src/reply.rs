//! Builder of replies: simple replies, structured and extended reply chunks. All are appended to the caller's buffer.

use crate::request::Style;

const SIMPLE_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_MAGIC: u32 = 0x668e_33ef;
const EXTENDED_MAGIC: u32 = 0x6e8a_278c;
const DONE: u16 = 1;
const NONE: u16 = 0;
const OFFSET_DATA: u16 = 1;
const OFFSET_HOLE: u16 = 2;
const BLOCK_STATUS: u16 = 5;
const BLOCK_STATUS_EXT: u16 = 6;
const ERROR: u16 = (1 << 15) | 1;

/// Maximum number of block status descriptors in one chunk (the protocol recommends at most 2^20).
pub const MAX_DESCRIPTORS: usize = 1 << 16;

/// The error values that the protocol allows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum ErrorCode {
    NotPermitted = 1,
    Io = 5,
    NoMemory = 12,
    Invalid = 22,
    NoSpace = 28,
    Overflow = 75,
    NotSupported = 95,
    Shutdown = 108,
}

/// Converts an errno (Linux numbers) to an error value of the protocol.
pub fn nbd_errno(errno: i32) -> ErrorCode {
    match errno {
        1 | 13 | 30 => ErrorCode::NotPermitted, // EPERM EACCES EROFS
        12 => ErrorCode::NoMemory,
        22 => ErrorCode::Invalid,
        27 | 28 | 122 => ErrorCode::NoSpace, // EFBIG ENOSPC EDQUOT
        75 => ErrorCode::Overflow,
        95 => ErrorCode::NotSupported,
        108 => ErrorCode::Shutdown,
        _ => ErrorCode::Io,
    }
}

/// The values of a request that its reply repeats.
#[derive(Clone, Copy, Debug)]
pub struct Framing {
    pub style: Style,
    pub cookie: u64,
    pub offset: u64,
}

/// A buffer that replies are appended to.
pub trait Sink {
    fn put(&mut self, bytes: &[u8]);
}

impl Sink for Vec<u8> {
    fn put(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}

impl Framing {
    /// Appends the header of a chunk. Not for `Style::Simple`, which has no chunks.
    fn chunk(&self, out: &mut impl Sink, flags: u16, kind: u16, length: u64) {
        match self.style {
            Style::Simple | Style::Structured => {
                let mut head = [0; 20];
                head[0..4].copy_from_slice(&STRUCTURED_MAGIC.to_be_bytes());
                head[4..6].copy_from_slice(&flags.to_be_bytes());
                head[6..8].copy_from_slice(&kind.to_be_bytes());
                head[8..16].copy_from_slice(&self.cookie.to_be_bytes());
                head[16..20].copy_from_slice(&(length as u32).to_be_bytes());
                out.put(&head);
            }
            Style::Extended => {
                let mut head = [0; 32];
                head[0..4].copy_from_slice(&EXTENDED_MAGIC.to_be_bytes());
                head[4..6].copy_from_slice(&flags.to_be_bytes());
                head[6..8].copy_from_slice(&kind.to_be_bytes());
                head[8..16].copy_from_slice(&self.cookie.to_be_bytes());
                head[16..24].copy_from_slice(&self.offset.to_be_bytes());
                head[24..32].copy_from_slice(&length.to_be_bytes());
                out.put(&head);
            }
        }
    }

    fn simple(&self, out: &mut impl Sink, error: u32) {
        let mut head = [0; 16];
        head[0..4].copy_from_slice(&SIMPLE_MAGIC.to_be_bytes());
        head[4..8].copy_from_slice(&error.to_be_bytes());
        head[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        out.put(&head);
    }
}

/// Appends a reply of success without data.
pub fn success(framing: &Framing, out: &mut impl Sink) {
    match framing.style {
        Style::Simple => framing.simple(out, 0),
        _ => framing.chunk(out, DONE, NONE, 0),
    }
}

/// Appends an error reply. Simple replies have no `message`.
pub fn error(framing: &Framing, out: &mut impl Sink, code: ErrorCode, message: &str) {
    if framing.style == Style::Simple {
        return framing.simple(out, code as u32);
    }
    let message = &message.as_bytes()[..message.len().min(4096)];
    framing.chunk(out, DONE, ERROR, 6 + message.len() as u64);
    out.put(&(code as u32).to_be_bytes());
    out.put(&(message.len() as u16).to_be_bytes());
    out.put(message);
}

/// Appends the header of a read's data. `length` bytes of data must follow. offset: of this part. last: no further
/// chunk of this request follows. A simple reply has exactly one part.
pub fn read_data(framing: &Framing, out: &mut impl Sink, offset: u64, length: u64, last: bool) {
    if framing.style == Style::Simple {
        return framing.simple(out, 0);
    }
    framing.chunk(out, if last { DONE } else { 0 }, OFFSET_DATA, 8 + length);
    out.put(&offset.to_be_bytes());
}

/// Appends a hole: a part of a read that is all zeros (structured and extended replies only). length: below 2^32.
pub fn hole(framing: &Framing, out: &mut impl Sink, offset: u64, length: u64, last: bool) {
    framing.chunk(out, if last { DONE } else { 0 }, OFFSET_HOLE, 12);
    out.put(&offset.to_be_bytes());
    out.put(&(length as u32).to_be_bytes());
}

/// Appends a block status reply: one chunk per metadata context, with its id and its descriptors (length, status). At
/// least one context, and at least one descriptor per context.
pub fn block_status<E: AsRef<[(u64, u32)]>>(
    framing: &Framing,
    out: &mut impl Sink,
    contexts: impl IntoIterator<Item = (u32, E)>,
) {
    let mut contexts = contexts.into_iter().peekable();
    while let Some((context, extents)) = contexts.next() {
        let flags = if contexts.peek().is_none() { DONE } else { 0 };
        context_status(framing, out, flags, context, extents.as_ref());
    }
}

/// Appends the chunk of one context. A structured reply shortens a run that does not fit 32 bits, and ends there.
fn context_status(framing: &Framing, out: &mut impl Sink, flags: u16, context: u32, extents: &[(u64, u32)]) {
    let extents = &extents[..extents.len().min(MAX_DESCRIPTORS)];
    if framing.style == Style::Extended {
        framing.chunk(out, flags, BLOCK_STATUS_EXT, 8 + 16 * extents.len() as u64);
        out.put(&context.to_be_bytes());
        out.put(&(extents.len() as u32).to_be_bytes());
        for &(length, status) in extents {
            out.put(&length.to_be_bytes());
            out.put(&u64::from(status).to_be_bytes());
        }
        return;
    }
    const LONGEST: u64 = 0xffff_f000;
    let whole = extents.iter().position(|&(length, _)| length > LONGEST).map_or(extents.len(), |at| at + 1);
    framing.chunk(out, flags, BLOCK_STATUS, 4 + 8 * whole as u64);
    out.put(&context.to_be_bytes());
    for &(length, status) in &extents[..whole] {
        out.put(&(length.min(LONGEST) as u32).to_be_bytes());
        out.put(&status.to_be_bytes());
    }
}
