//! The FUSE protocol of one regular file that is the root of its mount: requests as values, replies as bytes.
//!
//! Pure: no I/O, no unsafe, no allocation. `parse` converts one message, the result of one read(2) of /dev/fuse, to a
//! `Request`; a message that breaks the protocol is a `Malformed` error, never a panic. Each function of `reply`
//! returns the bytes of one reply, for one write(2). `Init::negotiate` chooses the parameters of the connection. Its
//! result, `Negotiated`, must be kept for the lifetime of the mount, because the kernel sends INIT once.
//!
//! `ring` has the layout of the same requests and replies in the entries of an io_uring (Linux 6.14).
//!
//! Source: Linux include/uapi/linux/fuse.h, protocols 7.40 (Linux 6.9) and, for `ring`, 7.42. Numbers are in the machine's byte order.
//!
//! # The file
//!
//! The root of the mount is a regular file (mount option `rootmode=100000`). So each request concerns node 1, and there
//! are no lookups, creations or listings. Linux 6.18 sends to such a mount: INIT, GETATTR, SETATTR, OPEN, READ, WRITE,
//! FSYNC, RELEASE, FALLOCATE, LSEEK and STATFS; and, until the first of its kind is answered with ENOSYS, FLUSH,
//! GETXATTR (`ls -l`), STATX (for the birth time) and POLL. IOCTL is sent each time (mkfs.ext4 asks whether the file is
//! a block device); the kernel turns ENOSYS into ENOTTY. LOOKUP, ACCESS, FORGET and DESTROY were not observed with
//! blkloom's mount options (`default_permissions`). The kernel itself answers rename and unlink (EBUSY), paths below
//! the file (ENOTDIR), and locks.
//!
//! `open(2)` with O_TRUNC sends SETATTR with size 0. It must fail: a program assumes that a truncated file reads as
//! zeros, and may skip holes when it copies data.
//!
//! # Message layout
//!
//! A read(2) returns one whole message. It needs a buffer of `Negotiated::read_buffer_size` bytes (`INIT_BUFFER_SIZE`
//! before INIT), or fails with EINVAL. The data of a WRITE begins at byte `WRITE_DATA_OFFSET`: if a transport uses
//! readv(2) with a buffer of that size and aligned memory, the data is aligned for direct I/O (`parse_parts`).
//!
//! # Connections, descriptors and RESEND, as observed on Linux 6.18
//!
//! `tests/interop/test_fuse_connection.py` tests each of these.
//!
//! - The requests of a connection wait in one queue. Every descriptor of the connection reads from that queue: the one
//!   that was mounted, and each clone (`FUSE_DEV_IOC_CLONE` on a new /dev/fuse). Copies of a descriptor (dup, fork,
//!   SCM_RIGHTS) count as one descriptor.
//! - A request belongs to the descriptor that it was read through, and only that one (or a copy of it) can answer it;
//!   through another the answer is ENOENT.
//! - When the last copy of a descriptor closes, the requests that were read through it and not answered fail with
//!   ECONNABORTED. The other descriptors go on. When the last descriptor of all closes, the connection ends: each later
//!   request fails with ENOTCONN, until the file is unmounted.
//! - FUSE_NOTIFY_RESEND (`reply::resend`), written to any descriptor, puts every unanswered request of every descriptor
//!   back at the head of the queue, oldest first. Its unique has bit 63 set from then on (`Unique::is_resent`), and a
//!   reply must repeat that. It belongs to the descriptor that reads it then, whichever it was before.
//! - After RESEND an answer with the old unique is ENOENT: a process that was replaced cannot answer a request any more.
//!   But RESEND says nothing of when that process stops writing to storage.
//! - RESEND makes no difference between the requests of an old process and those that the new one has read already. A new
//!   process therefore sends RESEND before it reads, or gets its own requests twice.
//! - INIT is not sent again, RESEND or not, once it was answered. An INIT that was read and not answered is resent.
//! - Requests that were not read wait in the queue, whichever descriptors close; they need no RESEND.
//! - A signal to the caller of a request that was read sends one INTERRUPT, which names the unique of the request as it
//!   was last read. A request that is resent after that has another one behind it. ENOSYS as the answer to an INTERRUPT
//!   ends them for the whole connection. The request itself is answered either way, and its caller waits for that.
#![forbid(unsafe_code)]

mod init;
pub mod reply;
mod request;
pub mod ring;

pub use init::{Incompatible, Init, InitAnswer, Negotiated, NotNegotiated, Settings};
pub use request::{
    Handle, Header, INIT_BUFFER_SIZE, Malformed, Operation, ROOT_NODE, Reason, Request, SetAttributes, SetTime, Unique,
    WRITE_DATA_OFFSET, Whence, parse, parse_parts,
};

/// Bits of INIT's flags; those that an answer may have are in `Init::negotiate`.
pub mod capability {
    /// Several reads of the page cache (for example of a mapping) may be in flight at once.
    pub const ASYNC_READ: u64 = 1 << 0;
    /// Writes may be larger than a page.
    pub const BIG_WRITES: u64 = 1 << 5;
    /// Direct I/O that a program submits asynchronously is sent asynchronously.
    pub const ASYNC_DIO: u64 = 1 << 15;
    /// After an abort, a read of /dev/fuse fails with ECONNABORTED; without this bit with ENODEV, as after an unmount.
    pub const ABORT_ERROR: u64 = 1 << 21;
    /// `max_pages` of INIT's answer is valid; without this bit a request has at most 32 pages.
    pub const MAX_PAGES: u64 = 1 << 22;
    /// The upper half of the flags is valid.
    pub const INIT_EXT: u64 = 1 << 30;
    /// Files that bypass the page cache may be mapped shared (mmap(2)).
    pub const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;
    /// FUSE_NOTIFY_RESEND is supported.
    pub const HAS_RESEND: u64 = 1 << 39;
    /// Requests and replies may use io_uring.
    pub const OVER_IO_URING: u64 = 1 << 41;
}

/// An errno of a reply. The kernel accepts 1 to 511.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Errno(u16);

impl Errno {
    pub const PERM: Errno = Errno(1);
    pub const IO: Errno = Errno(5);
    pub const NXIO: Errno = Errno(6);
    pub const AGAIN: Errno = Errno(11);
    pub const INVAL: Errno = Errno(22);
    pub const NOSPC: Errno = Errno(28);
    pub const ROFS: Errno = Errno(30);
    pub const NOSYS: Errno = Errno(38);
    pub const PROTO: Errno = Errno(71);
    pub const OPNOTSUPP: Errno = Errno(95);

    /// The kernel's number of an error. None: a reply cannot have this number.
    pub const fn new(number: i32) -> Option<Errno> {
        if 0 < number && number < 512 { Some(Errno(number as u16)) } else { None }
    }

    pub const fn number(self) -> i32 {
        self.0 as i32
    }
}
