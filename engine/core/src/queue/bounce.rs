//! Bounce buffers: copies of registered buffers, for extents that need a request's bytes. Part of `queue`, whose
//! invariants hold here.
//!
//! The CPU cannot access a registered buffer. The ring moves bytes between it and a file directly. Other extents
//! declare that they need the bytes (`Action::needs_bytes`), and then the request gets one bounce buffer. A write's
//! bytes are copied to it before any extent uses them, and the ranges that wait for the copy are walked again. A read's
//! bytes are placed in it range by range, and copied back before the request ends. Only the ring can copy: if the ring
//! is lost, such requests fail with EIO.

use std::io::{self, ErrorKind};
use std::sync::Arc;

use blkloom_io::{BounceBuffer, Errno, File, Registered, Slice};

use super::{Active, Attempt, Kind, Path, Queue, Walk};
use crate::pool::{BlockShare, JobDone, JobResult};
use crate::request::Memory;
use crate::stats::Op;
use crate::wake::{TaskId, Wake};

/// Bounce buffers that a queue keeps for its next requests.
const KEPT: usize = 16;

/// The bounce buffer of a request.
pub(super) struct Bounce {
    buffer: BounceBuffer,
    /// The buffer as memory of the request.
    memory: Memory,
    /// For a write: the bytes have been copied to the buffer.
    filled: bool,
    /// (offset in the device, length, delays waited for). For a write: ranges to walk when the buffer is filled. For a
    /// read: ranges to copy back.
    ranges: Vec<(u64, u64, u32)>,
}

impl Active {
    /// The request's memory, or its bounce buffer if it has one.
    pub(super) fn memory(&self) -> &Memory {
        match (&self.request.memory, &self.bounce) {
            (Memory::Registered(_), Some(bounce)) => &bounce.memory,
            (memory, _) => memory,
        }
    }

    /// Records that a range of a read is, or will be, in the bounce buffer and must be copied back.
    pub(super) fn found_bytes(&mut self, offset: u64, len: u64) {
        let Some(Bounce { ranges, .. }) = &mut self.bounce else { return };
        match ranges.last_mut() {
            Some((at, before, _)) if *at + *before == offset => *before += len,
            _ => ranges.push((offset, len, 0)),
        }
    }

    /// A part of the request's registered buffer. None: its memory is not registered.
    fn registered(&self, offset: u64, len: u64) -> Option<Registered> {
        match &self.request.memory {
            Memory::Registered(buffer) => Some(buffer.part((offset - self.request.offset) as usize, len as usize)),
            _ => None,
        }
    }

    pub(super) fn is_registered(&self) -> bool {
        matches!(self.request.memory, Memory::Registered(_))
    }
}

impl Queue {
    /// Registers memory with the loop's ring. Fails if there is no ring or no free slot.
    pub fn register(&mut self, memory: Slice<'static>) -> io::Result<Registered> {
        self.ring.as_mut().ok_or(ErrorKind::Unsupported)?.register(memory)
    }

    pub fn unregister(&mut self, buffer: Registered) -> io::Result<()> {
        self.ring.as_mut().ok_or(ErrorKind::Unsupported)?.unregister(buffer)
    }

    /// Whether the CPU can access the bytes of a piece. False: the piece is walked again after the copy, or the request
    /// fails.
    pub(super) fn has_bytes(&mut self, walk: &Walk<'_>, root: u64, len: u64) -> bool {
        if !self.actives[walk.active].is_registered() {
            return true;
        }
        if self.actives[walk.active].bounce.is_none() && !self.add_bounce(walk.active) {
            return false;
        }
        let active = &mut self.actives[walk.active];
        let (write, range) = (active.request.op == Op::Write, (active.request.offset, active.request.len));
        let Some(bounce) = active.bounce.as_mut().filter(|bounce| write && !bounce.filled) else {
            return true;
        };
        bounce.ranges.push((root, len, walk.attempt.filters));
        if bounce.ranges.len() == 1 {
            self.copy(walk.active, range.0, range.1);
        }
        false
    }

    fn add_bounce(&mut self, index: usize) -> bool {
        let len = self.actives[index].request.len as usize;
        let made = match self.bounces.iter().position(|kept| kept.len() >= len) {
            Some(at) => Ok(self.bounces.swap_remove(at)),
            None => BounceBuffer::new(len),
        };
        match made {
            Ok(buffer) => {
                // SAFETY: the buffer is dropped with the request, after the last task that uses it.
                let memory = Memory::Borrowed(unsafe { buffer.promised() });
                self.actives[index].bounce = Some(Bounce { buffer, memory, filled: false, ranges: Vec::new() });
                true
            }
            Err(error) => {
                tracing::warn!(%error, len, "no memory for the copy of a request's bytes");
                self.fail(index, Errno::NOMEM);
                false
            }
        }
    }

    /// Keeps the bounce buffer of an ended request for the next one.
    pub(super) fn keep_bounce(&mut self, bounce: Option<Bounce>) {
        if self.bounces.len() < KEPT {
            self.bounces.extend(bounce.map(|bounce| bounce.buffer));
        }
    }

    /// Whether the ring can move the piece between the file and the registered buffer directly. Returns the share of
    /// the block lock that a write needs.
    pub(super) fn takes_registered(
        &self,
        active: usize,
        file: &File,
        offset: u64,
        root: u64,
        len: u64,
    ) -> Option<BlockShare> {
        let active = &self.actives[active];
        let buffer = active.registered(root, len).filter(|&buffer| file.fits_registered(offset, buffer))?;
        if active.bounced || self.ring_is_lost || buffer.is_empty() {
            return None;
        }
        if active.request.op == Op::Write { file.share_blocks(offset, len) } else { Some(None) }
    }

    /// Submits (the rest of) a transfer between a registered buffer and a file, or the bounce buffer, to the ring.
    pub(super) fn push_registered(&mut self, id: TaskId) {
        let task = &self.tasks[id.slot];
        let active = &self.actives[task.active];
        let (file, at, done) = match (&task.kind, &active.bounce) {
            (Kind::Ring { file, at, done, .. }, _) => (Arc::clone(file), at + done, *done),
            (Kind::Copy { done }, Some(bounce)) => {
                (bounce.buffer.file().clone(), task.offset - active.request.offset + done, *done)
            }
            _ => return,
        };
        let Some(buffer) = active.registered(task.offset + done, task.len - done) else { return };
        let (write, key) = (active.request.op == Op::Write, id.slot as u64);
        let pushed = match &mut self.ring {
            Some(ring) if !self.ring_is_lost && ring.is_full() => Err(ErrorKind::WouldBlock.into()),
            Some(ring) if !self.ring_is_lost && write => ring.write_registered(&file, at, buffer, key),
            Some(ring) if !self.ring_is_lost => ring.read_registered(&file, at, buffer, key),
            _ => Err(ErrorKind::Unsupported.into()),
        };
        match pushed {
            Ok(()) => {}
            // Continued in the loop's next iteration. By a message, like the error below: a walk may be in progress.
            Err(error) if error.kind() == ErrorKind::WouldBlock => self.ports.wakes.post(Wake::GateOpened(id)),
            Err(_) => self.ports.results.post(JobDone { task: id, result: JobResult::Ended(Err(Errno::IO)) }),
        }
    }

    /// Copies a range between the registered buffer and the bounce buffer: to the bounce buffer for a write, from it
    /// for a read.
    fn copy(&mut self, active: usize, offset: u64, len: u64) {
        let mut path = Path::new();
        let walk = Walk { active, path: &mut path, inside: &[], attempt: Attempt::default(), pieces: 0, filters: 0 };
        let id = self.task(&walk, offset, len, Path::new(), Kind::Copy { done: 0 });
        self.push_registered(id);
    }

    /// Handles a completion of a copy.
    pub(super) fn copied(&mut self, id: TaskId, result: Result<u64, Errno>) {
        let task = &mut self.tasks[id.slot];
        let Kind::Copy { done } = &mut task.kind else { return };
        match result {
            Err(Errno::INTR | Errno::AGAIN) => self.push_registered(id),
            Err(errno) => self.finish(id, Err(errno)),
            Ok(0) => self.finish(id, Err(Errno::IO)),
            Ok(moved) => {
                *done += moved;
                if *done < task.len {
                    return self.push_registered(id);
                }
                let active = &mut self.actives[task.active];
                if let Some(bounce) = active.bounce.as_mut().filter(|_| active.request.op == Op::Write) {
                    bounce.filled = true;
                    active.todo.extend(bounce.ranges.drain(..).rev());
                }
                self.finish(id, Ok(()));
            }
        }
    }

    /// Starts to copy the next range of a read back to the registered buffer. False: no range is left.
    pub(super) fn copy_back(&mut self, index: usize) -> bool {
        let active = &mut self.actives[index];
        let read = active.request.op == Op::Read;
        let Some((offset, len, _)) = active.bounce.as_mut().filter(|_| read).and_then(|bounce| bounce.ranges.pop())
        else {
            return false;
        };
        self.copy(index, offset, len);
        true
    }
}
