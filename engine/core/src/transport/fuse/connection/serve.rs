//! Executes each kind of request and sends its reply. Part of `connection`, whose invariants hold here.

use std::time::{Duration, Instant};

use blkloom_fuse_wire::{Errno, Handle, Malformed, Operation, Unique, Whence, reply};
use rustix::fs::OFlags;
use rustix::io;

use super::super::link::Link;
use super::Connection;
use super::queued::Answer;
use crate::fast_path::{self, Progress};
use crate::notice::Outcome;
use crate::operation::Flags;
use crate::stats::Op;
use crate::transport::LoopContext;

/// The handle of all open files: they have no state of their own.
const HANDLE: Handle = Handle(1);

/// fallocate(2).
mod allocate {
    pub const KEEP_SIZE: u32 = 1;
    pub const PUNCH_HOLE: u32 = 2;
    pub const ZERO_RANGE: u32 = 16;
}

impl<L: Link> Connection<L> {
    /// Answers a message, or submits its request to the queue.
    pub(super) fn serve(&mut self, message: L::Message, cx: &mut LoopContext) {
        let mut joined = Vec::new(); // used for attributes and names only
        let request = match self.link.parse(&message, &mut joined) {
            Ok(request) => request,
            Err(malformed) => return self.refuse(message, &malformed),
        };
        let unique = request.header.unique;
        match request.operation {
            Operation::Read { offset, size, .. } => self.read(message, unique, (offset, size), cx),
            Operation::Write { offset, data, flags, .. } => {
                let (length, durable) = (data.len(), flags & OFlags::DSYNC.bits() != 0);
                self.write(message, unique, (offset, length, durable), cx);
            }
            Operation::Fsync { .. } => {
                let attempt = fast_path::flush(&self.file.export.device, cx.shard);
                self.command(message, unique, (Op::Flush, 0, 0, Flags::default()), attempt, cx);
            }
            Operation::Fallocate { offset, length, mode, .. } => match self.zeroing(offset, length, mode) {
                Ok((length, flags)) => {
                    let device = &self.file.export.device;
                    self.file.note_written();
                    let attempt = match length {
                        0 => Progress::Done,
                        _ => fast_path::clear(device, cx.shard, Op::WriteZeroes, offset, length, flags),
                    };
                    self.command(message, unique, (Op::WriteZeroes, offset, length, flags), attempt, cx);
                }
                Err(errno) => self.send_reply(message, &reply::error(unique, errno)),
            },
            Operation::Seek { offset, whence, .. } => match offset < self.file.size() {
                true => self.seek(message, unique, offset, whence, cx),
                false => self.send_reply(message, &reply::error(unique, Errno::NXIO)),
            },
            Operation::GetAttributes => self.send_attributes(message, unique),
            Operation::SetAttributes(set) => match self.file.set_attributes(&set) {
                Ok(()) => self.send_attributes(message, unique),
                Err(errno) => self.send_reply(message, &reply::error(unique, errno)),
            },
            Operation::Open { flags } => {
                let writes = flags & (OFlags::WRONLY | OFlags::RDWR).bits() != 0;
                match writes && self.file.export.read_only {
                    true => self.send_reply(message, &reply::error(unique, Errno::ROFS)),
                    false => {
                        self.send_reply(message, &reply::opened(unique, HANDLE));
                        self.count_user(true);
                    }
                }
            }
            Operation::StatFs => {
                let reply = reply::file_system(unique, &self.file.system());
                self.send_reply(message, &reply);
            }
            Operation::Access { .. } | Operation::Destroy => self.send_reply(message, &reply::done(unique)),
            Operation::Release { .. } => {
                self.send_reply(message, &reply::done(unique));
                self.count_user(false);
            }
            // INTERRUPT: requests are not cancelled; each ends or is sent again. FLUSH: close(2) does not sync a
            // device. The kernel writes back the pages of mappings without it, and it could deadlock if the serving
            // process itself has the file open and dies. INIT was answered before.
            Operation::Interrupt { .. } | Operation::Flush { .. } | Operation::Unsupported | Operation::Init(_) => {
                self.send_reply(message, &reply::error(unique, Errno::NOSYS));
            }
            Operation::Forget => self.link.forget(message),
        }
    }

    /// Counts an open or a release, after the reply: a request that is sent again to another engine is counted there.
    fn count_user(&mut self, came: bool) {
        let users = self.file.count_user(came);
        self.recipient.clone().tell(Outcome::Users(users));
    }

    fn refuse(&mut self, message: L::Message, malformed: &Malformed) {
        match malformed.unique {
            Some(unique) => self.send_reply(message, &reply::error(unique, Errno::PROTO)),
            None => {
                self.link.forget(message);
                self.end_now(&malformed.to_string());
            }
        }
    }

    fn send_attributes(&mut self, message: L::Message, unique: Unique) {
        // The size may change at any time, so the kernel asks each time.
        let reply = reply::attributes(unique, &self.file.attributes(), Duration::ZERO);
        self.send_reply(message, &reply);
    }

    /// The range that an fallocate(2) zeroes: length in bytes, and flags.
    fn zeroing(&self, offset: u64, length: u64, mode: u32) -> Result<(u64, Flags), Errno> {
        use allocate::{KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE};
        if self.file.export.read_only {
            return Err(Errno::ROFS);
        }
        let unmap = match mode & !KEEP_SIZE {
            PUNCH_HOLE => true,
            ZERO_RANGE => false,
            // A device cannot reserve space.
            _ => return Err(Errno::OPNOTSUPP),
        };
        let room = self.file.size().saturating_sub(offset);
        if length > room && mode & KEEP_SIZE == 0 {
            return Err(Errno::NOSPC);
        }
        Ok((length.min(room), Flags { unmap, ..Flags::default() }))
    }

    /// Answers a request without data, or submits it to the queue.
    fn command(
        &mut self,
        message: L::Message,
        unique: Unique,
        (op, offset, length, flags): (Op, u64, u64, Flags),
        attempt: Progress,
        cx: &mut LoopContext,
    ) {
        let (started, export) = (Instant::now(), self.file.export.clone());
        match attempt {
            Progress::Done => {
                self.send_reply(message, &reply::done(unique));
                cx.count(&export, op, (1, length, 0), started);
            }
            Progress::Failed(errno) => {
                self.fail(message, unique, errno);
                cx.count(&export, op, (1, 0, 1), started);
            }
            Progress::Queue(done) => {
                let Some(reservation) = self.reserve(op, 0, cx) else {
                    self.stash = Some(message);
                    return;
                };
                let what = (op, offset, length, flags);
                let answer = (unique, message, Answer::Done);
                self.submit(answer, what, (reservation, done), started, cx);
            }
        }
    }

    fn seek(&mut self, message: L::Message, unique: Unique, offset: u64, whence: Whence, cx: &mut LoopContext) {
        let Some(reservation) = self.reserve(Op::Extents, 0, cx) else {
            self.stash = Some(message);
            return;
        };
        self.begin_search((unique, message), (offset, whence), reservation, cx);
    }

    // Replies

    /// Answers a message.
    pub(super) fn send_reply(&mut self, message: L::Message, bytes: &[u8]) {
        let sent = self.link.reply(message, bytes);
        self.check(sent);
    }

    /// Answers a read with the data in the message's memory.
    pub(super) fn send_data(&mut self, message: L::Message, unique: Unique, length: usize) {
        let sent = self.link.reply_data(message, unique, length);
        self.check(sent);
    }

    pub(super) fn fail(&mut self, message: L::Message, unique: Unique, errno: io::Errno) {
        // ESHUTDOWN becomes EIO: programs do not expect it from a file.
        let told = Errno::new(errno.raw_os_error()).filter(|_| errno != io::Errno::SHUTDOWN);
        self.send_reply(message, &reply::error(unique, told.unwrap_or(Errno::IO)));
    }
}
