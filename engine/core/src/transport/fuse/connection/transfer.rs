//! Reads and writes: on the fast path in the message's memory, or through the queue. Part of `connection`, whose
//! invariants hold here.

use std::time::Instant;

use blkloom_fuse_wire::{Errno, Unique, reply};
use rustix::io;

use super::super::link::Link;
use super::Connection;
use super::queued::Answer;
use crate::fast_path::{self, Besides, Patience, Progress};
use crate::operation::Flags;
use crate::stats::Op;
use crate::transport::LoopContext;

impl<L: Link> Connection<L> {
    pub(super) fn read(
        &mut self,
        mut message: L::Message,
        unique: Unique,
        (offset, size): (u64, u32),
        cx: &mut LoopContext,
    ) {
        let (started, export) = (Instant::now(), self.file.export.clone());
        let length = self.file.size().saturating_sub(offset).min(size.into()) as usize;
        if length == 0 {
            return match export.device.closed() {
                true => self.fail(message, unique, io::Errno::SHUTDOWN), // a closed device has size 0
                false => self.send_data(message, unique, 0),
            };
        }
        if length > self.link.room(&message) {
            // Larger than was negotiated.
            return self.fail(message, unique, io::Errno::INVAL);
        }
        let memory = self.link.destination(&mut message, length);
        match fast_path::read(&export.device, cx.shard, offset, memory, Patience::Nowait, Besides::default()) {
            Progress::Done => {
                self.send_data(message, unique, length);
                cx.count(&export, Op::Read, (1, length as u64, 0), started);
            }
            Progress::Failed(errno) => {
                self.fail(message, unique, errno);
                cx.count(&export, Op::Read, (1, 0, 1), started);
            }
            Progress::Queue(done) => self.queue_read(message, unique, (offset, length, done), started, cx),
        }
    }

    /// Submits a read to the queue. done: bytes read already.
    fn queue_read(
        &mut self,
        message: L::Message,
        unique: Unique,
        (offset, length, done): (u64, usize, u64),
        started: Instant,
        cx: &mut LoopContext,
    ) {
        let Some(reservation) = self.reserve(Op::Read, length, cx) else {
            self.stash = Some(message);
            return;
        };
        let what = (Op::Read, offset, length as u64, Flags::default());
        self.submit((unique, message, Answer::Data), what, (reservation, done), started, cx);
    }

    pub(super) fn write(
        &mut self,
        message: L::Message,
        unique: Unique,
        (offset, length, fua): (u64, usize, bool),
        cx: &mut LoopContext,
    ) {
        let (started, export) = (Instant::now(), self.file.export.clone());
        let room = self.file.size().saturating_sub(offset);
        if export.read_only || room == 0 && length > 0 {
            return match export.device.closed() {
                true => self.fail(message, unique, io::Errno::SHUTDOWN),
                false if export.read_only => self.send_reply(message, &reply::error(unique, Errno::ROFS)),
                false => self.send_reply(message, &reply::error(unique, Errno::NOSPC)),
            };
        }
        let length = length.min(usize::try_from(room).unwrap_or(usize::MAX));
        if length == 0 {
            return self.send_reply(message, &reply::written(unique, 0));
        }
        self.file.note_written();
        let from = self.link.source(&message, length);
        let attempt = match fua && export.device.needs_flush() {
            true => Progress::Queue(0),
            false => fast_path::write(&export.device, cx.shard, offset, from, Patience::Nowait),
        };
        match attempt {
            Progress::Done => {
                self.send_reply(message, &reply::written(unique, length as u32));
                cx.count(&export, Op::Write, (1, length as u64, 0), started);
            }
            Progress::Failed(errno) => {
                self.fail(message, unique, errno);
                cx.count(&export, Op::Write, (1, 0, 1), started);
            }
            Progress::Queue(done) => {
                let Some(reservation) = self.reserve(Op::Write, length, cx) else {
                    self.stash = Some(message);
                    return;
                };
                let flags = Flags { fua, ..Flags::default() };
                let what = (Op::Write, offset, length as u64, flags);
                self.submit((unique, message, Answer::Written), what, (reservation, done), started, cx);
            }
        }
    }
}
