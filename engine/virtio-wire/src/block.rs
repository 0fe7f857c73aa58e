//! Requests of a virtio block device: header, data, status.
//!
//! The header is the first bytes of a chain that the device reads, the status the last byte that it writes; how a driver
//! divides them into buffers is up to it.

use std::ops::Range;

use crate::Memory;
use crate::split::{Chain, Malformed, Piece, gather};

pub const SECTOR: u64 = 512;
const HEADER_SIZE: usize = 16;
pub const SEGMENT_SIZE: usize = 16;
/// Most segments of a request to discard or to write zeroes.
pub const MOST_SEGMENTS: usize = 32;
/// Length of the answer to `Kind::Identify`.
pub const ID_SIZE: usize = 20;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Read,
    Write,
    Flush,
    /// The device's serial.
    Identify,
    Discard,
    WriteZeroes,
    /// A request of this type, which is not known.
    Other(u32),
}

/// The result of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// A request. The data that the device reads and writes is in these pieces of its chain.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Request {
    pub kind: Kind,
    pub sector: u64,
    pub readable: Range<usize>,
    pub writable: Range<usize>,
    /// Address of the status byte.
    pub status: u64,
}

impl Request {
    /// Takes header and status out of a chain.
    pub fn parse(chain: &mut Chain, memory: &impl Memory) -> Result<Request, Malformed> {
        let (pieces, split) = (&mut chain.pieces[..], chain.readable);
        let mut header = [0; HEADER_SIZE];
        if !gather(&pieces[..split], memory, &mut header) {
            return Err(Malformed::Missing("header of a request"));
        }
        let mut first = 0;
        let mut left = HEADER_SIZE as u32;
        while left > 0 {
            let Piece { address, length } = &mut pieces[first];
            let part = left.min(*length);
            (*address, *length, left) = (*address + u64::from(part), *length - part, left - part);
            first += usize::from(*length == 0);
        }
        let mut end = pieces.len();
        let Some(Piece { address, length }) = pieces[split..].last_mut() else {
            return Err(Malformed::Missing("byte for the status of a request"));
        };
        *length -= 1;
        let status = *address + u64::from(*length);
        end -= usize::from(*length == 0);
        let header = u128::from_le_bytes(header);
        let kind = match header as u32 {
            0 => Kind::Read,
            1 => Kind::Write,
            4 => Kind::Flush,
            8 => Kind::Identify,
            11 => Kind::Discard,
            13 => Kind::WriteZeroes,
            other => Kind::Other(other),
        };
        Ok(Request { kind, sector: (header >> 64) as u64, readable: first..split, writable: split..end, status })
    }
}

/// A range of a request to discard or to write zeroes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segment {
    pub sector: u64,
    pub sectors: u32,
    pub unmap: bool,
    /// It has flags that are not known.
    pub other_flags: bool,
}

impl Segment {
    pub fn parse(bytes: [u8; SEGMENT_SIZE]) -> Segment {
        let whole = u128::from_le_bytes(bytes);
        let flags = (whole >> 96) as u32;
        Segment {
            sector: whole as u64,
            sectors: (whole >> 64) as u32,
            unmap: flags & 1 != 0,
            other_flags: flags & !1 != 0,
        }
    }
}
