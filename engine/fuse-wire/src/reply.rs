//! Builder of replies and notifications: the bytes of one write(2) each.
//!
//! A reply is written by one write(2) or writev(2). A read's reply is one writev of its header (`data`) and the data.
//! ENOENT from that write: the request was aborted, or it was read through another descriptor.

use std::time::Duration;

use crate::request::{Handle, Unique};
use crate::{Errno, Negotiated, ROOT_NODE};

/// Size of fuse_out_header in bytes.
pub const HEADER_SIZE: usize = 16;

/// I/O bypasses the page cache (FOPEN_DIRECT_IO), and several writes may be in flight at once
/// (FOPEN_PARALLEL_DIRECT_WRITES).
const OPEN_FLAGS: u32 = 1 << 0 | 1 << 6;
const REGULAR_FILE: u32 = 0o100_000;
const NOTIFY_INVALIDATE: i32 = 2;
const NOTIFY_RESEND: i32 = 7;

/// File attributes, as in stat(2). mode: permission bits. Times are relative to 1970.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Attributes {
    /// In bytes.
    pub size: u64,
    /// Allocated bytes, for `du`.
    pub allocated: u64,
    pub mode: u32,
    pub user: u32,
    pub group: u32,
    pub access_time: Duration,
    pub modification_time: Duration,
    pub change_time: Duration,
    /// Preferred I/O size in bytes.
    pub block_size: u32,
}

/// File system statistics, as in statfs(2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FileSystem {
    /// Block size in bytes.
    pub block_size: u32,
    pub blocks: u64,
    pub free_blocks: u64,
}

/// A reply of success without data, for Fsync, Flush, Fallocate, Release, Access and Destroy.
pub fn done(unique: Unique) -> [u8; HEADER_SIZE] {
    header(HEADER_SIZE as u32, 0, unique)
}

pub fn error(unique: Unique, errno: Errno) -> [u8; HEADER_SIZE] {
    header(HEADER_SIZE as u32, -errno.number(), unique)
}

/// The header of a read's reply. `length` bytes of data must follow in the same write; fewer than requested mean end of
/// file. None: more than a message can contain.
pub fn data(unique: Unique, length: usize) -> Option<[u8; HEADER_SIZE]> {
    let length = u32::try_from(length).ok()?.checked_add(HEADER_SIZE as u32)?;
    Some(header(length, 0, unique))
}

/// The reply to Init.
pub fn initialized(unique: Unique, negotiated: &Negotiated) -> [u8; HEADER_SIZE + Negotiated::SIZE] {
    let mut reply = Reply::new(unique);
    reply.put(&negotiated.to_bytes());
    reply.end()
}

/// The reply to an Init of a later major version: this server supports version 7.
pub fn other_version(unique: Unique) -> [u8; HEADER_SIZE + Negotiated::SIZE] {
    let mut reply = Reply::new(unique);
    reply.u32(7);
    reply.end()
}

/// The reply to GetAttributes and SetAttributes. valid: how long the kernel may cache the attributes.
pub fn attributes(unique: Unique, attributes: &Attributes, valid: Duration) -> [u8; HEADER_SIZE + 104] {
    let times = [attributes.access_time, attributes.modification_time, attributes.change_time];
    let mut reply = Reply::new(unique);
    reply.u64(valid.as_secs());
    reply.u32(valid.subsec_nanos());
    reply.u32(0);
    reply.u64(ROOT_NODE); // the inode's number
    reply.u64(attributes.size);
    reply.u64(attributes.allocated.div_ceil(512));
    times.iter().for_each(|time| reply.u64(time.as_secs()));
    times.iter().for_each(|time| reply.u32(time.subsec_nanos()));
    reply.u32(REGULAR_FILE | attributes.mode & 0o7777);
    reply.u32(1); // links
    reply.u32(attributes.user);
    reply.u32(attributes.group);
    reply.u32(0); // number of a device
    reply.u32(attributes.block_size);
    reply.u32(0); // flags
    reply.end()
}

/// The reply to Open. I/O on the file bypasses the page cache, except for mappings, and writes may run in parallel.
pub fn opened(unique: Unique, handle: Handle) -> [u8; HEADER_SIZE + 16] {
    let mut reply = Reply::new(unique);
    reply.u64(handle.0);
    reply.u32(OPEN_FLAGS);
    reply.end()
}

/// The reply to Write. written: bytes; fewer than requested are a short write.
pub fn written(unique: Unique, written: u32) -> [u8; HEADER_SIZE + 8] {
    let mut reply = Reply::new(unique);
    reply.u32(written);
    reply.end()
}

/// The reply to Seek. If nothing is found, reply ENXIO by `error` instead.
pub fn found(unique: Unique, offset: u64) -> [u8; HEADER_SIZE + 8] {
    let mut reply = Reply::new(unique);
    reply.u64(offset);
    reply.end()
}

/// The reply to StatFs.
pub fn file_system(unique: Unique, system: &FileSystem) -> [u8; HEADER_SIZE + 80] {
    const NAME_MAX: u32 = 255;
    let mut reply = Reply::new(unique);
    reply.u64(system.blocks);
    reply.u64(system.free_blocks);
    reply.u64(system.free_blocks); // for ordinary users
    reply.u64(1); // files
    reply.u64(0); // files that may be made
    reply.u32(system.block_size);
    reply.u32(NAME_MAX);
    reply.u32(system.block_size); // of a fragment
    reply.end()
}

/// The notification FUSE_NOTIFY_RESEND: the kernel sends again every request that was read and not answered. See the
/// crate's documentation. EINVAL from the write: the kernel does not support it (before Linux 6.9).
pub fn resend() -> [u8; HEADER_SIZE] {
    header(HEADER_SIZE as u32, NOTIFY_RESEND, Unique(0))
}

/// The notification FUSE_NOTIFY_INVAL_INODE: the kernel drops cached attributes (the file was resized) and `length`
/// bytes at `offset` of the page cache. length 0: to the end. offset negative: attributes only. ENOENT from the write:
/// the kernel has nothing cached of the file.
pub fn invalidate(offset: i64, length: i64) -> [u8; HEADER_SIZE + 24] {
    let mut reply = Reply::with(NOTIFY_INVALIDATE, Unique(0));
    reply.u64(ROOT_NODE);
    reply.put(&offset.to_ne_bytes());
    reply.put(&length.to_ne_bytes());
    reply.end()
}

fn header(length: u32, error: i32, unique: Unique) -> [u8; HEADER_SIZE] {
    let mut bytes = [0; HEADER_SIZE];
    bytes[0..4].copy_from_slice(&length.to_ne_bytes());
    bytes[4..8].copy_from_slice(&error.to_ne_bytes());
    bytes[8..16].copy_from_slice(&unique.0.to_ne_bytes());
    bytes
}

/// Builder of a message of N bytes. Bytes that are not set are zero.
struct Reply<const N: usize> {
    bytes: [u8; N],
    used: usize,
}

impl<const N: usize> Reply<N> {
    fn new(unique: Unique) -> Reply<N> {
        Reply::with(0, unique)
    }

    fn with(error: i32, unique: Unique) -> Reply<N> {
        let mut reply = Reply { bytes: [0; N], used: 0 };
        reply.put(&header(N as u32, error, unique));
        reply
    }

    fn put(&mut self, bytes: &[u8]) {
        self.bytes[self.used..self.used + bytes.len()].copy_from_slice(bytes);
        self.used += bytes.len();
    }

    fn u32(&mut self, number: u32) {
        self.put(&number.to_ne_bytes());
    }

    fn u64(&mut self, number: u64) {
        self.put(&number.to_ne_bytes());
    }

    fn end(self) -> [u8; N] {
        self.bytes
    }
}
