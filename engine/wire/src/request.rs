//! Parser of request headers, compact (28 bytes) and extended (32 bytes).

use crate::reply::{ErrorCode, Sink};

const COMPACT_MAGIC: u32 = 0x2560_9513;
const EXTENDED_MAGIC: u32 = 0x21e4_1c71;

/// Command flags.
pub mod flags {
    pub const FUA: u16 = 1 << 0;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const REQ_ONE: u16 = 1 << 3;
    pub const FAST_ZERO: u16 = 1 << 4;
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Command {
    Read,
    Write,
    Disconnect,
    Flush,
    Trim,
    Cache,
    WriteZeroes,
    BlockStatus,
}

/// The negotiated form of requests and replies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Style {
    Simple,
    Structured,
    Extended,
}

/// A parsed header that is not checked yet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    pub flags: u16,
    pub kind: u16,
    pub cookie: u64,
    pub offset: u64,
    pub length: u64,
}

/// The request magic is wrong: the connection must be closed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Malformed {
    pub magic: u32,
}

/// The reason why a request is answered with an error without being executed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Refusal {
    pub code: ErrorCode,
    pub why: &'static str,
}

/// A checked request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    pub header: Header,
    /// None: the command is unknown, and there is a refusal.
    pub command: Option<Command>,
    /// Bytes of payload that follow the header, also if the request is refused.
    pub payload: u64,
    pub refusal: Option<Refusal>,
}

impl Style {
    pub const fn header_size(self) -> usize {
        match self {
            Style::Extended => 32,
            _ => 28,
        }
    }

    /// Parses one header. None: not enough bytes yet.
    pub fn header(self, bytes: &[u8]) -> Result<Option<Header>, Malformed> {
        let magic = match self {
            Style::Extended => EXTENDED_MAGIC,
            _ => COMPACT_MAGIC,
        };
        let Some(found) = bytes.first_chunk::<4>().map(|b| u32::from_be_bytes(*b)) else {
            return Ok(None);
        };
        if found != magic {
            return Err(Malformed { magic: found });
        }
        if bytes.len() < self.header_size() {
            return Ok(None);
        }
        let u16_at = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        let u64_at = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_be_bytes(word)
        };
        let length = match self {
            Style::Extended => u64_at(24),
            _ => u64_at(20) & 0xffff_ffff,
        };
        Ok(Some(Header { flags: u16_at(4), kind: u16_at(6), cookie: u64_at(8), offset: u64_at(16), length }))
    }
}

impl Header {
    /// Appends the header's bytes, the inverse of `Style::header`.
    pub fn put(self, style: Style, out: &mut impl Sink) {
        let (magic, length) = match style {
            Style::Extended => (EXTENDED_MAGIC, self.length.to_be_bytes()),
            _ => (COMPACT_MAGIC, (self.length << 32).to_be_bytes()),
        };
        out.put(&magic.to_be_bytes());
        out.put(&self.flags.to_be_bytes());
        out.put(&self.kind.to_be_bytes());
        out.put(&self.cookie.to_be_bytes());
        out.put(&self.offset.to_be_bytes());
        out.put(&length[..style.header_size() - 24]);
    }
}

/// What the export and the handshake allow. Requests are checked against it.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    pub style: Style,
    pub size: u64,
    pub read_only: bool,
    pub block_status: bool,
    pub max_payload: u64,
}

impl Header {
    /// Checks a header: command, length of the payload, and whether the request must be refused.
    pub fn request(self, rules: &Rules) -> Request {
        // Extended headers require PAYLOAD_LEN for a write, but QEMU up to 10 sends writes with a payload without it.
        // QEMU's server accepts that, and so does this parser.
        let has_payload = self.kind == 1 || rules.style == Style::Extended && self.flags & flags::PAYLOAD_LEN != 0;
        let payload = if has_payload { self.length } else { 0 };
        let command = match self.kind {
            0 => Some(Command::Read),
            1 => Some(Command::Write),
            2 => Some(Command::Disconnect),
            3 => Some(Command::Flush),
            4 => Some(Command::Trim),
            5 => Some(Command::Cache),
            6 => Some(Command::WriteZeroes),
            7 => Some(Command::BlockStatus),
            _ => None,
        };
        let refusal = match command {
            Some(command) => self.judge(command, rules),
            None => Some(Refusal { code: ErrorCode::Invalid, why: "unknown command" }),
        };
        Request { header: self, command, payload, refusal }
    }

    fn judge(self, command: Command, rules: &Rules) -> Option<Refusal> {
        let refuse = |code, why| Some(Refusal { code, why });
        let structured = rules.style != Style::Simple;
        // FUA is valid with every command.
        let known = flags::FUA
            | match command {
                Command::Read if structured => flags::DF,
                Command::Write if rules.style == Style::Extended => flags::PAYLOAD_LEN,
                Command::WriteZeroes => flags::NO_HOLE | flags::FAST_ZERO,
                Command::BlockStatus => flags::REQ_ONE,
                Command::Read | Command::Write | Command::Trim | Command::Flush | Command::Cache => 0,
                Command::Disconnect => return None,
            };
        if self.flags & !known != 0 {
            return refuse(ErrorCode::Invalid, "unknown command flag");
        }
        let writes = matches!(command, Command::Write | Command::Trim | Command::WriteZeroes);
        if writes && rules.read_only {
            return refuse(ErrorCode::NotPermitted, "the export is read-only");
        }
        if command == Command::Flush {
            return if self.offset | self.length == 0 {
                None
            } else {
                refuse(ErrorCode::Invalid, "a flush has no offset and no length")
            };
        }
        if command == Command::BlockStatus && !rules.block_status {
            return refuse(ErrorCode::Invalid, "no metadata context was negotiated");
        }
        if command == Command::BlockStatus && self.length == 0 {
            return refuse(ErrorCode::Invalid, "a block status needs a length");
        }
        if self.offset.checked_add(self.length).is_none_or(|end| end > rules.size) {
            let code = if matches!(command, Command::Write | Command::WriteZeroes) {
                ErrorCode::NoSpace
            } else {
                ErrorCode::Invalid
            };
            return refuse(code, "beyond the end of the export");
        }
        if command == Command::Read && self.length > rules.max_payload {
            return refuse(ErrorCode::Overflow, "longer than the maximum payload");
        }
        if command == Command::Write && self.length > rules.max_payload {
            return refuse(ErrorCode::Invalid, "longer than the maximum payload");
        }
        None
    }
}
