//! Parser of the replies of a server: simple replies, structured and extended chunks. The inverse of `reply`.
//!
//! It sees one reply at a time and knows no requests: whether a cookie is known, and whether a chunk fits its request,
//! is decided by the caller (`Coverage` helps).

use crate::request::Style;

const SIMPLE_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_MAGIC: u32 = 0x668e_33ef;
const EXTENDED_MAGIC: u32 = 0x6e8a_278c;
const DONE: u16 = 1;
/// Most bytes of the payload of a chunk, other than read data. A block status of 2^16 long descriptors fits.
pub const MOST_PAYLOAD: u64 = 2 << 20;

/// A reply breaks the protocol: the connection must be closed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Violation(pub &'static str);

/// One reply, or one chunk of a reply.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Reply {
    pub cookie: u64,
    /// The last chunk of its request.
    pub done: bool,
    pub content: Content,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Content {
    /// A simple reply. If it answers a read and `error` is 0, the data follows.
    Simple {
        error: u32,
    },
    /// Nothing, which is success if it is the last chunk.
    None,
    /// `len` bytes of data follow, which belong at `offset` of the export.
    Data {
        offset: u64,
        len: u64,
    },
    /// `len` bytes of zeros at `offset` of the export.
    Hole {
        offset: u64,
        len: u64,
    },
    /// Runs of one metadata context: (length, flags).
    Status {
        context: u32,
        runs: Vec<(u64, u64)>,
    },
    Error {
        code: u32,
    },
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Parsed {
    /// The reply needs at least so many bytes in all.
    Needs(usize),
    /// A reply, and how many bytes it takes, without data that follows.
    Reply(Reply, usize),
}

/// Parses the reply at the start of `bytes`.
pub fn server_reply(style: Style, bytes: &[u8]) -> Result<Parsed, Violation> {
    let fields = Fields(bytes);
    let Some(magic) = fields.u32(0) else {
        return Ok(Parsed::Needs(16));
    };
    match (style, magic) {
        (Style::Simple | Style::Structured, SIMPLE_MAGIC) => {
            let (Some(error), Some(cookie)) = (fields.u32(4), fields.u64(8)) else {
                return Ok(Parsed::Needs(16));
            };
            Ok(Parsed::Reply(Reply { cookie, done: true, content: Content::Simple { error } }, 16))
        }
        (Style::Structured, STRUCTURED_MAGIC) => chunk(fields, 20, fields.u32(16).map(u64::from), false),
        (Style::Extended, EXTENDED_MAGIC) => chunk(fields, 32, fields.u64(24), true),
        (Style::Simple, STRUCTURED_MAGIC) => Err(Violation("a structured reply, which was not negotiated")),
        (_, SIMPLE_MAGIC | STRUCTURED_MAGIC | EXTENDED_MAGIC) => {
            Err(Violation("a reply of another form than negotiated"))
        }
        _ => Err(Violation("a reply without magic number")),
    }
}

fn chunk(fields: Fields<'_>, head: usize, length: Option<u64>, extended: bool) -> Result<Parsed, Violation> {
    let (Some(flags), Some(kind), Some(cookie), Some(length)) = (fields.u16(4), fields.u16(6), fields.u64(8), length)
    else {
        return Ok(Parsed::Needs(head));
    };
    let done = flags & DONE != 0;
    let with_data = kind == 1;
    if with_data {
        if length <= 8 {
            return Err(Violation("a chunk of read data without data"));
        }
        let Some(offset) = fields.u64(head) else {
            return Ok(Parsed::Needs(head + 8));
        };
        let content = Content::Data { offset, len: length - 8 };
        return Ok(Parsed::Reply(Reply { cookie, done, content }, head + 8));
    }
    if length > MOST_PAYLOAD {
        return Err(Violation("a chunk that is too long"));
    }
    let end = head + length as usize;
    let Some(payload) = fields.0.get(head..end).map(Fields) else {
        return Ok(Parsed::Needs(end));
    };
    let content = match kind {
        0 if length == 0 && done => Content::None,
        0 => return Err(Violation("a chunk of type NONE with a payload, or not the last one")),
        2 => match (length, payload.u64(0), payload.u32(8)) {
            (12, Some(offset), Some(len)) if len > 0 => Content::Hole { offset, len: len.into() },
            _ => return Err(Violation("a malformed hole")),
        },
        5 if !extended => status(payload, 4, 8)?,
        6 if extended => status(payload, 8, 16)?,
        _ if kind & 1 << 15 != 0 => error(kind, payload)?,
        _ => return Err(Violation("a chunk of an unknown type")),
    };
    Ok(Parsed::Reply(Reply { cookie, done, content }, end))
}

fn status(payload: Fields<'_>, head: usize, each: usize) -> Result<Content, Violation> {
    let (bytes, wrong) = (payload.0, Violation("a malformed block status"));
    let context = payload.u32(0).ok_or(wrong)?;
    let runs = bytes.get(head..).ok_or(wrong)?;
    if runs.is_empty() || !runs.len().is_multiple_of(each) {
        return Err(wrong);
    }
    if each == 16 && payload.u32(4).is_none_or(|count| count != 0 && count as usize != runs.len() / each) {
        return Err(Violation("a block status with another number of runs than it says"));
    }
    let run = |run: &[u8]| {
        let run = Fields(run);
        match each {
            8 => Some((run.u32(0)?.into(), run.u32(4)?.into())),
            _ => Some((run.u64(0)?, run.u64(8)?)),
        }
    };
    let runs: Vec<(u64, u64)> = runs.chunks_exact(each).filter_map(run).collect();
    if runs.iter().any(|&(length, _)| length == 0) {
        return Err(Violation("a block status with an empty run"));
    }
    Ok(Content::Status { context, runs })
}

fn error(kind: u16, payload: Fields<'_>) -> Result<Content, Violation> {
    let (Some(code), Some(message)) = (payload.u32(0), payload.u16(4)) else {
        return Err(Violation("a malformed error chunk"));
    };
    let rest = payload.0.len() - 6;
    let fits = match kind {
        0x8001 => rest == usize::from(message),
        0x8002 => rest == usize::from(message) + 8,
        _ => rest >= usize::from(message), // an unknown kind of error is an error
    };
    if !fits || code == 0 {
        return Err(Violation("a malformed error chunk"));
    }
    Ok(Content::Error { code })
}

/// Which bytes of a read have come. Chunks may have any order, and must not overlap.
#[derive(Clone, Default, Debug)]
pub struct Coverage {
    /// Sorted, neither overlapping nor adjacent: (start, end).
    runs: Vec<(u64, u64)>,
}

impl Coverage {
    /// Most separate pieces of a read: it bounds the memory that a server can make its client use.
    pub const MOST: usize = 4096;

    /// Adds `len` bytes at `at` of a read of `of` bytes.
    pub fn add(&mut self, at: u64, len: u64, of: u64) -> Result<(), Violation> {
        let end = at.checked_add(len).filter(|&end| end <= of).ok_or(Violation("read data outside of the request"))?;
        let next = self.runs.partition_point(|&(start, _)| start < at);
        if self.runs.get(next).is_some_and(|&(start, _)| start < end) || next > 0 && self.runs[next - 1].1 > at {
            return Err(Violation("read data that overlaps"));
        }
        let joins_last = next > 0 && self.runs[next - 1].1 == at;
        let joins_next = self.runs.get(next).is_some_and(|&(start, _)| start == end);
        match (joins_last, joins_next) {
            (true, true) => {
                self.runs[next - 1].1 = self.runs[next].1;
                self.runs.remove(next);
            }
            (true, false) => self.runs[next - 1].1 = end,
            (false, true) => self.runs[next].0 = at,
            (false, false) => self.runs.insert(next, (at, end)),
        }
        if self.runs.len() > Coverage::MOST {
            return Err(Violation("read data in too many pieces"));
        }
        Ok(())
    }

    /// Whether all of `of` bytes have come.
    pub fn is_whole(&self, of: u64) -> bool {
        matches!(self.runs[..], [(0, end)] if end == of) || of == 0
    }
}

#[derive(Clone, Copy)]
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn at<const N: usize>(self, at: usize) -> Option<[u8; N]> {
        self.0.get(at..)?.first_chunk().copied()
    }

    fn u16(self, at: usize) -> Option<u16> {
        self.at(at).map(u16::from_be_bytes)
    }

    fn u32(self, at: usize) -> Option<u32> {
        self.at(at).map(u32::from_be_bytes)
    }

    fn u64(self, at: usize) -> Option<u64> {
        self.at(at).map(u64::from_be_bytes)
    }
}
