//! Reads and writes of one connection: on the fast path with the loop's buffers, or through the queue. Part of
//! `connection`, whose invariants hold here.

use std::time::Instant;

use blkloom_io::{Buffer, Source};
use blkloom_wire::{Command, Framing, Header, Style, flags};

use super::memory::{REQUEST, THROUGH_ARENA};
use super::{Connection, HEAD, Input};
use crate::budget::Reservation;
use crate::fast_path::{self, Besides, Patience, Progress};
use crate::request::Memory;
use crate::stats::Op;
use crate::transport::LoopContext;

/// Larger writes to memory are written in parts of about this size: the client can send the next part meanwhile, and
/// the copied bytes are still in the CPU cache.
const PART: u64 = 256 << 10;
/// Smallest part. With fewer bytes the write waits for more.
const LEAST: u64 = 128 << 10;
/// Parts end at page boundaries, so that no page is written twice.
const PAGE: u64 = 4096;

/// Number of bytes to write now, of `have` received bytes of an incomplete write.
fn part(header: &Header, have: u64) -> u64 {
    if have < LEAST { 0 } else { (header.offset + have) / PAGE * PAGE - header.offset }
}

impl Connection {
    /// Serves a read. None: it waits for memory.
    pub(super) fn read(&mut self, header: &Header, cx: &mut LoopContext, started: Instant) -> Option<()> {
        let framing = self.framing(header);
        let length = header.length as usize;
        if length == 0 {
            blkloom_wire::success(&framing, &mut cx.arena);
            return Some(());
        }
        if header.length > THROUGH_ARENA || self.memory.is_tight() {
            return self.read_apart(header, cx, started);
        }
        if cx.arena.room() < length + HEAD {
            self.send_replies(cx);
        }
        let start = cx.arena.used();
        cx.zeros.clear();
        blkloom_wire::read_data(&framing, &mut cx.arena, header.offset, header.length, true);
        let data = cx.arena.used();
        let memory = cx.arena.claim(length);
        let besides = Besides { zeros: self.may_send_holes(header).then_some(&mut cx.zeros), next: None };
        match fast_path::read(&self.export.device, cx.shard, header.offset, memory, Patience::Nowait, besides) {
            Progress::Done if cx.zeros.is_empty() => self.tally(Op::Read, header.length, false),
            Progress::Done => {
                let bytes = cx.arena.bytes()[data..].to_vec();
                cx.arena.rewind(start);
                let out = sparse(&framing, &bytes, &cx.zeros);
                self.put(out, cx);
                self.tally(Op::Read, header.length, false);
            }
            Progress::Failed(errno) => {
                cx.arena.rewind(start);
                self.fail(&framing, errno, &mut cx.arena);
                self.tally(Op::Read, 0, true);
            }
            Progress::Queue(done) => {
                let Some(reservation) = self.memory.reserve(self.need(header, Command::Read), cx) else {
                    cx.arena.rewind(start);
                    return None;
                };
                let mut buffer = cx.buffers.take(length);
                let read = done as usize;
                buffer.bytes_mut()[..read].copy_from_slice(&cx.arena.bytes()[data..data + read]);
                cx.arena.rewind(start);
                self.queue_rest(header, (Memory::owned(buffer), reservation), done, cx, started);
            }
        }
        Some(())
    }

    /// Serves a read through a buffer of its own, which the reply keeps until the client has received it.
    fn read_apart(&mut self, header: &Header, cx: &mut LoopContext, started: Instant) -> Option<()> {
        let framing = self.framing(header);
        let mut reservation = self.memory.reserve(self.need(header, Command::Read), cx)?;
        let mut buffer = cx.buffers.take(header.length as usize);
        let memory = buffer.slice();
        cx.zeros.clear();
        let besides = Besides { zeros: self.may_send_holes(header).then_some(&mut cx.zeros), next: None };
        match fast_path::read(&self.export.device, cx.shard, header.offset, memory, Patience::Nowait, besides) {
            Progress::Done if !cx.zeros.is_empty() => {
                self.send_replies(cx);
                let out = sparse(&framing, buffer.bytes(), &cx.zeros);
                cx.buffers.put(buffer);
                reservation.shrink(out.capacity() + REQUEST);
                self.output.push(out, None, Some(reservation));
                self.send_waiting(cx);
                self.tally(Op::Read, header.length, false);
            }
            Progress::Done => {
                self.send_replies(cx);
                let mut head = Vec::with_capacity(48);
                blkloom_wire::read_data(&framing, &mut head, header.offset, header.length, true);
                reservation.shrink(Buffer::capacity(buffer.len()) + REQUEST);
                self.output.push(head, Some(buffer), Some(reservation));
                self.send_waiting(cx);
                self.tally(Op::Read, header.length, false);
            }
            Progress::Failed(errno) => {
                cx.buffers.put(buffer);
                self.fail(&framing, errno, &mut cx.arena);
                self.tally(Op::Read, 0, true);
            }
            Progress::Queue(done) => {
                self.queue_rest(header, (Memory::owned(buffer), reservation), done, cx, started);
            }
        }
        Some(())
    }

    // Writing

    /// Serves a write. Returns the number of payload bytes used. None: it waits for memory.
    pub(super) fn write(
        &mut self,
        header: &Header,
        rest: &[u8],
        cx: &mut LoopContext,
        started: Instant,
    ) -> Option<usize> {
        let length = header.length as usize;
        if length == 0 {
            blkloom_wire::success(&self.framing(header), &mut cx.arena);
            return Some(0);
        }
        if rest.len() < length {
            let reservation = self.memory.reserve(self.need(header, Command::Write), cx)?;
            self.input = self.payload(*header, rest, reservation, cx);
            return Some(rest.len());
        }
        if let Some(done) = self.write_now(header, rest[..length].into(), cx) {
            let reservation = self.memory.reserve(self.need(header, Command::Write), cx)?;
            let mut buffer = cx.buffers.take(length);
            buffer.bytes_mut().copy_from_slice(&rest[..length]);
            self.queue_rest(header, (Memory::owned(buffer), reservation), done, cx, started);
        }
        Some(length)
    }

    /// Starts a write whose payload is incomplete.
    fn payload(
        &mut self,
        mut header: Header,
        mut rest: &[u8],
        reservation: Reservation,
        cx: &mut LoopContext,
    ) -> Input {
        let mut size = header.length;
        if self.goes_in_parts(&header, cx) {
            let first = part(&header, rest.len() as u64) as usize;
            if self.write_part(&mut header, rest[..first].into(), cx) {
                rest = &rest[first..];
                size = header.length.min(PART);
            }
        }
        let mut buffer = cx.buffers.take(size as usize);
        buffer.bytes_mut()[..rest.len()].copy_from_slice(rest);
        Input::Payload { header, buffer, have: rest.len(), reservation }
    }

    /// Whether a write may be written in parts. A durable (FUA) write may not, because its end is a flush of the whole.
    /// A write with extended headers may not, because its reply contains the original offset.
    fn goes_in_parts(&self, header: &Header, cx: &LoopContext) -> bool {
        header.length > PART
            && header.flags & flags::FUA == 0
            && self.rules.style != Style::Extended
            && fast_path::would_copy(&self.export.device, cx.shard, (header.offset, PART))
    }

    /// Writes the next part of a payload. If the fast path cannot write it, the rest waits until the payload is
    /// complete.
    pub(super) fn next_part(
        &mut self,
        mut header: Header,
        mut buffer: Buffer,
        mut have: usize,
        reservation: Reservation,
        cx: &mut LoopContext,
    ) -> Input {
        let count = part(&header, have as u64) as usize;
        if count == 0 {
            return Input::Payload { header, buffer, have, reservation };
        }
        if self.write_part(&mut header, buffer.bytes()[..count].into(), cx) {
            buffer.bytes_mut().copy_within(count..have, 0);
            have -= count;
            buffer.shorten(header.length.min(PART) as usize);
        } else {
            let mut whole = cx.buffers.take(header.length as usize);
            whole.bytes_mut()[..have].copy_from_slice(&buffer.bytes()[..have]);
            cx.buffers.put(std::mem::replace(&mut buffer, whole));
        }
        Input::Payload { header, buffer, have, reservation }
    }

    /// Writes the first bytes of a write on the fast path, and changes the header to that of the rest. False: the fast
    /// path cannot. The client gets one reply, after the rest is written, too.
    fn write_part(&mut self, header: &mut Header, memory: Source<'_>, cx: &mut LoopContext) -> bool {
        let len = memory.len() as u64;
        let written = len == 0
            || fast_path::write(&self.export.device, cx.shard, header.offset, memory, Patience::Nowait)
                == Progress::Done;
        if written {
            (header.offset, header.length) = (header.offset + len, header.length - len);
            self.tally[Op::Write as usize].1 += len;
        }
        written
    }

    /// Writes on the fast path and answers. Some: that many bytes are written, and the rest must go to the queue.
    pub(super) fn write_now(&mut self, header: &Header, memory: Source<'_>, cx: &mut LoopContext) -> Option<u64> {
        let device = &self.export.device;
        let attempt = match header.flags & flags::FUA != 0 && device.needs_flush() {
            true => Progress::Queue(0),
            false => fast_path::write(device, cx.shard, header.offset, memory, Patience::Nowait),
        };
        self.answer_now(header, Op::Write, attempt, cx)
    }

    pub(super) fn answer_now(
        &mut self,
        header: &Header,
        op: Op,
        attempt: Progress,
        cx: &mut LoopContext,
    ) -> Option<u64> {
        let framing = self.framing(header);
        if cx.arena.room() < HEAD {
            self.send_replies(cx);
        }
        match attempt {
            Progress::Done => {
                blkloom_wire::success(&framing, &mut cx.arena);
                self.tally(op, header.length, false);
                None
            }
            Progress::Failed(errno) => {
                self.fail(&framing, errno, &mut cx.arena);
                self.tally(op, 0, true);
                None
            }
            Progress::Queue(done) => Some(done),
        }
    }
}

/// The structured reply to a read with zero ranges: a chunk for each run of data and each hole.
fn sparse(framing: &Framing, bytes: &[u8], zeros: &[(u64, u64)]) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len());
    let (mut at, end) = (0u64, bytes.len() as u64);
    let data = |out: &mut Vec<u8>, from: u64, to: u64| {
        blkloom_wire::read_data(framing, out, framing.offset + from, to - from, to == end);
        out.extend_from_slice(&bytes[from as usize..to as usize]);
    };
    for &(start, len) in zeros {
        if start > at {
            data(&mut out, at, start);
        }
        at = start + len;
        blkloom_wire::hole(framing, &mut out, framing.offset + start, len, at == end);
    }
    if at < end {
        data(&mut out, at, end);
    }
    out.shrink_to_fit();
    out
}
