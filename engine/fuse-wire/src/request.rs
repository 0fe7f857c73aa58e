//! Parser of requests: converts the bytes of one read(2) to a `Request`.

use std::time::Duration;

use crate::init::Init;

/// The node number of the file in every request (FUSE_ROOT_ID).
pub const ROOT_NODE: u64 = 1;
/// Minimum size of a buffer for INIT in bytes (FUSE_MIN_READ_BUFFER).
pub const INIT_BUFFER_SIZE: usize = 8192;
/// Offset of the data in a WRITE message: after fuse_in_header and fuse_write_in.
pub const WRITE_DATA_OFFSET: usize = HEADER_SIZE + 40;

/// Bytes of fuse_in_header.
pub(crate) const HEADER_SIZE: usize = 40;
const WRITE: u32 = 16;
const RESENT: u64 = 1 << 63;

/// The identity of a request, which its reply repeats.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Unique(pub u64);

impl Unique {
    /// Whether the request was read before, and was sent again after FUSE_NOTIFY_RESEND.
    pub const fn is_resent(self) -> bool {
        self.0 & RESENT != 0
    }

    /// The same for all copies of a request, resent or not.
    pub const fn origin(self) -> Unique {
        Unique(self.0 & !RESENT)
    }
}

/// An open file, identified by the number in the answer to its OPEN.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Handle(pub u64);

/// fuse_in_header without the lengths. user, group and process are those of the caller; zeros for operations of the
/// kernel itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    pub unique: Unique,
    pub opcode: u32,
    pub node: u64,
    pub user: u32,
    pub group: u32,
    pub process: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request<'a> {
    pub header: Header,
    pub operation: Operation<'a>,
}

/// The operation of a request. Offsets, sizes and lengths are bytes. flags: of open(2) unless stated otherwise.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operation<'a> {
    Init(Init),
    GetAttributes,
    SetAttributes(SetAttributes),
    Open {
        flags: u32,
    },
    Read {
        handle: Handle,
        offset: u64,
        size: u32,
        flags: u32,
    },
    /// cached: from the page cache (a mapping was written); `handle` is then any file open for writing.
    Write {
        handle: Handle,
        offset: u64,
        data: &'a [u8],
        flags: u32,
        cached: bool,
    },
    /// data_only: fdatasync(2).
    Fsync {
        handle: Handle,
        data_only: bool,
    },
    /// A descriptor of the file was closed; its file may have others.
    Flush {
        handle: Handle,
    },
    /// mode: FALLOC_FL_* of fallocate(2).
    Fallocate {
        handle: Handle,
        offset: u64,
        length: u64,
        mode: u32,
    },
    /// Finds the next data, or the next hole.
    Seek {
        handle: Handle,
        offset: u64,
        whence: Whence,
    },
    StatFs,
    /// The last descriptor of an open file was closed. The kernel ignores an error in the reply.
    Release {
        handle: Handle,
        flags: u32,
    },
    /// mask: of access(2). Not sent if the mount has `default_permissions`.
    Access {
        mask: u32,
    },
    /// The caller of another request got a signal. No reply is needed; after EAGAIN the kernel sends it again, after
    /// ENOSYS it sends no more of them.
    Interrupt {
        interrupted: Unique,
    },
    /// The kernel has forgotten nodes. There must be no reply.
    Forget,
    /// The file system is unmounted.
    Destroy,
    /// An unsupported operation, to be answered with ENOSYS: the kernel then works without it, or its caller gets an
    /// error.
    Unsupported,
}

/// The changes of SETATTR; None: unchanged. handle: of the file that ftruncate(2) or fchmod(2) names. user, group and
/// mode are set by chown(2) and chmod(2); times are relative to 1970.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct SetAttributes {
    pub handle: Option<Handle>,
    pub size: Option<u64>,
    pub mode: Option<u32>,
    pub user: Option<u32>,
    pub group: Option<u32>,
    pub access_time: Option<SetTime>,
    pub modification_time: Option<SetTime>,
    pub change_time: Option<SetTime>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SetTime {
    Now,
    To(Duration),
}

/// The kinds of `Seek`. The kernel answers all other kinds of lseek(2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Whence {
    Data,
    Hole,
}

/// A message that breaks the protocol. unique: of the request, if the message has a header; the request must be
/// answered with an error, or its caller waits for ever. Without unique, the descriptor is not /dev/fuse.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("FUSE request {opcode}: {reason}")]
pub struct Malformed {
    pub unique: Option<Unique>,
    pub opcode: u32,
    pub reason: Reason,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Reason {
    #[error("{received} bytes are no header, which has 40")]
    NoHeader { received: usize },
    #[error("{received} bytes were received, and its header says {stated}")]
    Length { stated: u32, received: usize },
    #[error("{received} bytes follow its header, and {needed} are needed")]
    Body { needed: usize, received: usize },
    #[error("it names node {node}; the mount has node 1 only")]
    Node { node: u64 },
    #[error("{received} bytes of data were received, and it says {stated}")]
    Data { stated: u32, received: usize },
    #[error("whence {whence} is neither SEEK_DATA (3) nor SEEK_HOLE (4)")]
    Whence { whence: u32 },
    #[error("{nanoseconds} nanoseconds are a second or more")]
    Time { nanoseconds: u32 },
}

/// Parses one message, the result of one read(2) of /dev/fuse.
pub fn parse(message: &[u8]) -> Result<Request<'_>, Malformed> {
    let (header, body) = header(message, message.len())?;
    request(header, operation(&header, body))
}

/// Parses one message that one readv(2) has read into two parts, the first of `WRITE_DATA_OFFSET` bytes: the data of a
/// WRITE is all of `rest`. joined: buffer for messages that must be joined, which are short and rare.
pub fn parse_parts<'a>(head: &'a [u8], rest: &'a [u8], joined: &'a mut Vec<u8>) -> Result<Request<'a>, Malformed> {
    let (header, body) = header(head, head.len() + rest.len())?;
    if rest.is_empty() {
        return request(header, operation(&header, body));
    }
    if header.opcode == WRITE {
        return request(header, write(&header, &mut Fields { rest: body }, Some(rest)));
    }
    joined.clear();
    joined.extend_from_slice(body);
    joined.extend_from_slice(rest);
    request(header, operation(&header, joined))
}

/// A request in three parts: fuse_in_header, the operation's own header, and the rest (a WRITE's data, names).
pub(crate) fn parse_apart<'a>(head: &[u8], body: &'a [u8], rest: &'a [u8]) -> Result<Request<'a>, Malformed> {
    let (header, _) = header(head, head.len() + body.len() + rest.len())?;
    if header.opcode == WRITE {
        return request(header, write(&header, &mut Fields { rest: body }, Some(rest)));
    }
    request(header, operation(&header, body))
}

/// The header of a message of `received` bytes, and the rest of the message.
fn header(message: &[u8], received: usize) -> Result<(Header, &[u8]), Malformed> {
    let mut fields = Fields { rest: message };
    let mut read = || {
        let stated = fields.u32()?;
        let opcode = fields.u32()?;
        let unique = Unique(fields.u64()?);
        let node = fields.u64()?;
        let (user, group, process) = (fields.u32()?, fields.u32()?, fields.u32()?);
        let _extensions_and_padding = fields.u32()?;
        Ok((stated, Header { unique, opcode, node, user, group, process }))
    };
    let (stated, header) = read().map_err(|_: Reason| {
        let reason = Reason::NoHeader { received: message.len() };
        Malformed { unique: None, opcode: 0, reason }
    })?;
    if stated as usize != received {
        let reason = Reason::Length { stated, received };
        return Err(Malformed { unique: Some(header.unique), opcode: header.opcode, reason });
    }
    Ok((header, fields.rest))
}

fn request<'a>(header: Header, operation: Result<Operation<'a>, Reason>) -> Result<Request<'a>, Malformed> {
    match operation {
        Ok(operation) => Ok(Request { header, operation }),
        Err(reason) => Err(Malformed { unique: Some(header.unique), opcode: header.opcode, reason }),
    }
}

fn operation<'a>(header: &Header, body: &'a [u8]) -> Result<Operation<'a>, Reason> {
    let mut fields = Fields { rest: body };
    let about_file = match header.opcode {
        3 => {
            fields.need(16)?;
            Operation::GetAttributes
        }
        4 => Operation::SetAttributes(set_attributes(&mut fields)?),
        14 => {
            fields.need(8)?;
            Operation::Open { flags: fields.u32()? }
        }
        15 => {
            fields.need(40)?;
            let (handle, offset, size) = (fields.handle()?, fields.u64()?, fields.u32()?);
            let (_read_flags, _lock_owner, flags) = (fields.u32()?, fields.u64()?, fields.u32()?);
            Operation::Read { handle, offset, size, flags }
        }
        WRITE => return write(header, &mut fields, None),
        17 => Operation::StatFs,
        18 => {
            fields.need(24)?;
            Operation::Release { handle: fields.handle()?, flags: fields.u32()? }
        }
        20 => {
            fields.need(16)?;
            Operation::Fsync { handle: fields.handle()?, data_only: fields.u32()? & 1 != 0 }
        }
        25 => {
            fields.need(24)?;
            Operation::Flush { handle: fields.handle()? }
        }
        34 => {
            fields.need(8)?;
            Operation::Access { mask: fields.u32()? }
        }
        43 => {
            fields.need(32)?;
            let (handle, offset, length) = (fields.handle()?, fields.u64()?, fields.u64()?);
            Operation::Fallocate { handle, offset, length, mode: fields.u32()? }
        }
        46 => {
            fields.need(24)?;
            let (handle, offset) = (fields.handle()?, fields.u64()?);
            let whence = match fields.u32()? {
                3 => Whence::Data,
                4 => Whence::Hole,
                whence => return Err(Reason::Whence { whence }),
            };
            Operation::Seek { handle, offset, whence }
        }
        2 | 42 => return Ok(Operation::Forget),
        26 => return Ok(Operation::Init(Init::parse(&mut fields)?)),
        36 => return Ok(Operation::Interrupt { interrupted: Unique(fields.u64()?) }),
        38 => return Ok(Operation::Destroy),
        _ => return Ok(Operation::Unsupported),
    };
    check_node(header)?;
    Ok(about_file)
}

fn check_node(header: &Header) -> Result<(), Reason> {
    if header.node == ROOT_NODE { Ok(()) } else { Err(Reason::Node { node: header.node }) }
}

/// apart: the data, if it is not in the message itself.
fn write<'a>(header: &Header, fields: &mut Fields<'a>, apart: Option<&'a [u8]>) -> Result<Operation<'a>, Reason> {
    const CACHE: u32 = 1 << 0;
    fields.need(40)?;
    let (handle, offset, stated, write_flags) = (fields.handle()?, fields.u64()?, fields.u32()?, fields.u32()?);
    let (_lock_owner, flags, _padding) = (fields.u64()?, fields.u32()?, fields.u32()?);
    let data = apart.unwrap_or(fields.rest);
    check_node(header)?;
    if data.len() != stated as usize {
        return Err(Reason::Data { stated, received: data.len() });
    }
    Ok(Operation::Write { handle, offset, data, flags, cached: write_flags & CACHE != 0 })
}

/// Bits of fuse_setattr_in.valid (FATTR_*).
mod valid {
    pub const MODE: u32 = 1 << 0;
    pub const USER: u32 = 1 << 1;
    pub const GROUP: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ACCESS_TIME: u32 = 1 << 4;
    pub const MODIFICATION_TIME: u32 = 1 << 5;
    pub const HANDLE: u32 = 1 << 6;
    pub const ACCESS_TIME_NOW: u32 = 1 << 7;
    pub const MODIFICATION_TIME_NOW: u32 = 1 << 8;
    pub const CHANGE_TIME: u32 = 1 << 10;
}

fn set_attributes(fields: &mut Fields<'_>) -> Result<SetAttributes, Reason> {
    fields.need(88)?;
    let (bits, _padding) = (fields.u32()?, fields.u32()?);
    let (handle, size, _lock_owner) = (fields.handle()?, fields.u64()?, fields.u64()?);
    let seconds = [fields.u64()?, fields.u64()?, fields.u64()?];
    let nanoseconds = [fields.u32()?, fields.u32()?, fields.u32()?];
    let (mode, _unused, user, group) = (fields.u32()?, fields.u32()?, fields.u32()?, fields.u32()?);
    let time = |index: usize, to: u32, now: u32| {
        if bits & now != 0 {
            Ok(Some(SetTime::Now))
        } else if bits & to == 0 {
            Ok(None)
        } else if nanoseconds[index] >= 1_000_000_000 {
            Err(Reason::Time { nanoseconds: nanoseconds[index] })
        } else {
            Ok(Some(SetTime::To(Duration::new(seconds[index], nanoseconds[index]))))
        }
    };
    Ok(SetAttributes {
        handle: (bits & valid::HANDLE != 0).then_some(handle),
        size: (bits & valid::SIZE != 0).then_some(size),
        mode: (bits & valid::MODE != 0).then_some(mode),
        user: (bits & valid::USER != 0).then_some(user),
        group: (bits & valid::GROUP != 0).then_some(group),
        access_time: time(0, valid::ACCESS_TIME, valid::ACCESS_TIME_NOW)?,
        modification_time: time(1, valid::MODIFICATION_TIME, valid::MODIFICATION_TIME_NOW)?,
        change_time: time(2, valid::CHANGE_TIME, 0)?,
    })
}

/// Reads numbers from the front of a byte slice.
pub(crate) struct Fields<'a> {
    pub rest: &'a [u8],
}

impl Fields<'_> {
    /// Checks for a structure's size at once, so that an error says it.
    pub fn need(&self, needed: usize) -> Result<(), Reason> {
        if self.rest.len() < needed { Err(Reason::Body { needed, received: self.rest.len() }) } else { Ok(()) }
    }

    pub fn u16(&mut self) -> Result<u16, Reason> {
        self.take().map(u16::from_ne_bytes)
    }

    pub fn u32(&mut self) -> Result<u32, Reason> {
        self.take().map(u32::from_ne_bytes)
    }

    pub fn u64(&mut self) -> Result<u64, Reason> {
        self.take().map(u64::from_ne_bytes)
    }

    fn handle(&mut self) -> Result<Handle, Reason> {
        self.u64().map(Handle)
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], Reason> {
        let (taken, rest) =
            self.rest.split_first_chunk().ok_or(Reason::Body { needed: N, received: self.rest.len() })?;
        self.rest = rest;
        Ok(*taken)
    }
}
