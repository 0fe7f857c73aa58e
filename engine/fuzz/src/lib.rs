//! A strict client of NBD's transmission phase: takes replies apart by the protocol's text and panics at whatever that
//! does not allow. It knows nothing of the engine's own reply builder.
#![forbid(unsafe_code)]

use blkloom_wire::Style;

/// A chunk, or a simple reply.
#[derive(Debug, PartialEq, Eq)]
pub enum Reply {
    /// Ends the request.
    Success,
    /// Ends the request; the protocol's error value.
    Error(u32),
    /// Bytes of a read.
    Data { offset: u64, bytes: Vec<u8>, last: bool },
    /// Zeros of a read.
    Hole { offset: u64, length: u64, last: bool },
    /// What one metadata context says: (length, flags).
    Status { context: u32, extents: Vec<(u64, u64)>, last: bool },
}

/// What was asked, as far as it tells how to take the reply apart.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    pub offset: u64,
    pub length: u64,
    pub is_read: bool,
}

/// Bytes, with a place in them.
struct Cursor<'a>(&'a [u8]);

impl Cursor<'_> {
    fn number(&mut self, width: usize) -> Option<u64> {
        let bytes = self.0.get(..width)?;
        self.0 = &self.0[width..];
        Some(bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    fn bytes(&mut self, count: u64) -> Option<Vec<u8>> {
        let count = usize::try_from(count).ok()?;
        let bytes = self.0.get(..count)?.to_vec();
        self.0 = &self.0[count..];
        Some(bytes)
    }
}

/// The first reply of a stream: its cookie, what it says, and how many bytes it takes. None: it is not all there.
/// `asked` finds a request by its cookie.
pub fn take(style: Style, stream: &[u8], asked: impl Fn(u64) -> Asked) -> Option<(u64, Reply, usize)> {
    let mut cursor = Cursor(stream);
    let (cookie, reply) = match style {
        Style::Simple => simple(&mut cursor, asked)?,
        Style::Structured | Style::Extended => chunk(style, &mut cursor, asked)?,
    };
    Some((cookie, reply, stream.len() - cursor.0.len()))
}

fn simple(cursor: &mut Cursor<'_>, asked: impl Fn(u64) -> Asked) -> Option<(u64, Reply)> {
    assert_eq!(cursor.number(4)?, 0x6744_6698, "magic of a simple reply");
    let (error, cookie) = (cursor.number(4)? as u32, cursor.number(8)?);
    let asked = asked(cookie);
    let reply = match error {
        0 if asked.is_read && asked.length > 0 => {
            Reply::Data { offset: asked.offset, bytes: cursor.bytes(asked.length)?, last: true }
        }
        0 => Reply::Success,
        error => Reply::Error(error),
    };
    Some((cookie, reply))
}

fn chunk(style: Style, cursor: &mut Cursor<'_>, asked: impl Fn(u64) -> Asked) -> Option<(u64, Reply)> {
    let extended = style == Style::Extended;
    assert_eq!(cursor.number(4)?, if extended { 0x6e8a_278c } else { 0x668e_33ef }, "magic of a chunk");
    let (flags, kind, cookie) = (cursor.number(2)?, cursor.number(2)?, cursor.number(8)?);
    assert!(flags <= 1, "flags {flags:#x}");
    let last = flags == 1;
    if extended {
        assert_eq!(cursor.number(8)?, asked(cookie).offset, "the offset that was asked for");
    }
    let length = cursor.number(if extended { 8 } else { 4 })?;
    let mut rest = Cursor(cursor.0.get(..usize::try_from(length).ok()?)?);
    cursor.0 = &cursor.0[length as usize..];
    let reply = content(extended, kind, last, length, &mut rest).expect("a chunk holds what its kind says");
    assert!(rest.0.is_empty(), "{} bytes too many in a chunk of kind {kind:#x}", rest.0.len());
    Some((cookie, reply))
}

fn content(extended: bool, kind: u64, last: bool, length: u64, rest: &mut Cursor<'_>) -> Option<Reply> {
    let width = if extended { 8 } else { 4 };
    Some(match kind {
        0 => {
            assert!(last && length == 0, "a chunk without content ends its request");
            Reply::Success
        }
        1 => {
            assert!(length > 8, "data without data");
            Reply::Data { offset: rest.number(8)?, bytes: rest.bytes(length - 8)?, last }
        }
        2 => {
            let (offset, length) = (rest.number(8)?, rest.number(4)?);
            assert!(length > 0, "a hole without length");
            Reply::Hole { offset, length, last }
        }
        5 | 6 => {
            assert_eq!(kind == 6, extended, "block status of the other style");
            let context = rest.number(4)? as u32;
            let count = if extended { rest.number(4)? } else { (length - 4) / 8 };
            let extents = (0..count).map(|_| Some((rest.number(width)?, rest.number(width)?)));
            Reply::Status { context, extents: extents.collect::<Option<_>>()?, last }
        }
        0x8001 => {
            assert!(last, "an error ends its request here");
            let (error, length) = (rest.number(4)? as u32, rest.number(2)?);
            assert_ne!(error, 0);
            assert!(String::from_utf8(rest.bytes(length)?).is_ok());
            Reply::Error(error)
        }
        kind => panic!("a chunk of kind {kind:#x}"),
    })
}
