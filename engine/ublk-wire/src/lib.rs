//! The ublk driver's interface as bytes: requests of a block device as values, commands as bytes.
//!
//! Pure: no I/O, no unsafe, no allocation. All commands are io_uring commands (IORING_OP_URING_CMD) in SQEs of 128 bytes.
//! Those of this crate's root go to /dev/ublkcN, which serves the device /dev/ublkbN; those of `control` go to
//! /dev/ublk-control, which makes and removes devices.
//!
//! # Queues and tags
//!
//! A device has queues, and a queue has `depth` tags. Each tag has a descriptor of `DESCRIPTOR_SIZE` bytes in memory of
//! the driver, which mmap(2) of /dev/ublkcN gives read-only (`descriptors_offset`), and a buffer of the server.
//! `FETCH` passes a tag with its buffer to the driver. It completes when a request is in the descriptor of the tag; the
//! buffer then has the data of a write. `COMMIT_AND_FETCH` answers that request and passes the tag to the driver again;
//! the driver takes the data of a read from the buffer before it returns. The block device appears only when all tags of
//! all queues are with the driver. One thread sends all commands of a queue.
//!
//! A command that completes with ENODEV has brought no request: the device is being stopped, or the server ends.
//!
//! A result of 0 or more is the number of bytes. The driver sends the rest of a shorter write again; a read of 0 bytes
//! fails. Requests without data succeed with any such result.
//!
//! Source: Linux include/uapi/linux/ublk_cmd.h, drivers/block/ublk_drv.c, Documentation/block/ublk.rst. Numbers are in
//! the machine's byte order.
#![forbid(unsafe_code)]

pub mod control;

/// Size in bytes of a command to /dev/ublkcN.
pub const COMMAND_SIZE: usize = 16;
/// Size of a tag's descriptor in bytes.
pub const DESCRIPTOR_SIZE: usize = 24;
/// Most tags of a queue.
pub const DEEPEST: usize = 4096;
/// Bytes of a sector.
pub const SECTOR: u64 = 512;

/// Opcode of the command that passes a tag to the driver for the first time.
pub const FETCH: u32 = encoded(READ_WRITE, 0x20, COMMAND_SIZE);
/// Opcode of the command that answers the request of a tag and passes the tag to the driver again.
pub const COMMIT_AND_FETCH: u32 = encoded(READ_WRITE, 0x21, COMMAND_SIZE);

const READ: u32 = 2;
const READ_WRITE: u32 = 3;

/// An opcode as ioctl(2) numbers are encoded, with the letter 'u'. Source: Linux include/uapi/asm-generic/ioctl.h.
const fn encoded(direction: u32, number: u32, size: usize) -> u32 {
    direction << 30 | (size as u32) << 16 | (b'u' as u32) << 8 | number
}

/// The operation of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operation {
    Read,
    Write {
        /// Force unit access: durable before the answer.
        fua: bool,
    },
    Flush,
    Discard,
    WriteZeroes {
        /// Blocks may be deallocated.
        unmap: bool,
        fua: bool,
    },
}

/// A request. offset and length: bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    pub operation: Operation,
    pub offset: u64,
    pub length: u64,
}

/// A descriptor that is no request of a device without zones.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Malformed {
    #[error("operation {0} is unknown")]
    Operation(u8),
    #[error("{sectors} sectors from {start} on are no range")]
    Range { start: u64, sectors: u32 },
}

const FLAG_FUA: u32 = 1 << 13;
const FLAG_NO_UNMAP: u32 = 1 << 15;

impl Request {
    pub fn parse(descriptor: &[u8; DESCRIPTOR_SIZE]) -> Result<Request, Malformed> {
        let u32_at = |at: usize| u32::from_ne_bytes(std::array::from_fn(|byte| descriptor[at + byte]));
        let (flags, sectors) = (u32_at(0), u32_at(4));
        let start = u64::from_ne_bytes(std::array::from_fn(|byte| descriptor[8 + byte]));
        let (fua, unmap) = (flags & FLAG_FUA != 0, flags & FLAG_NO_UNMAP == 0);
        let operation = match flags as u8 {
            0 => Operation::Read,
            1 => Operation::Write { fua },
            // The range of a flush has no meaning.
            2 => return Ok(Request { operation: Operation::Flush, offset: 0, length: 0 }),
            3 => Operation::Discard,
            5 => Operation::WriteZeroes { unmap, fua },
            other => return Err(Malformed::Operation(other)),
        };
        let length = u64::from(sectors) * SECTOR;
        let offset = start.checked_mul(SECTOR).filter(|offset| offset.checked_add(length).is_some());
        let offset = offset.ok_or(Malformed::Range { start, sectors })?;
        Ok(Request { operation, offset, length })
    }
}

/// Builds a `FETCH` or `COMMIT_AND_FETCH`. result: bytes, or a negative errno; 0 for `FETCH`. buffer: address of the
/// memory for the tag's next request.
pub fn command(queue: u16, tag: u16, result: i32, buffer: u64) -> [u8; COMMAND_SIZE] {
    let mut bytes = [0; COMMAND_SIZE];
    bytes[0..2].copy_from_slice(&queue.to_ne_bytes());
    bytes[2..4].copy_from_slice(&tag.to_ne_bytes());
    bytes[4..8].copy_from_slice(&result.to_ne_bytes());
    bytes[8..16].copy_from_slice(&buffer.to_ne_bytes());
    bytes
}

/// Offset in /dev/ublkcN of a queue's descriptors, for mmap(2).
pub const fn descriptors_offset(queue: u16, page_size: usize) -> u64 {
    queue as u64 * descriptors_length(DEEPEST, page_size) as u64
}

/// Length of the mapping of a queue's descriptors, for mmap(2).
pub const fn descriptors_length(depth: usize, page_size: usize) -> usize {
    (depth * DESCRIPTOR_SIZE).next_multiple_of(page_size)
}
