//! Reads and writes of one connection: at once through the loop's buffers, or through the queue. Part
//! of `connection`, whose invariants hold here.

use std::sync::Arc;
use std::time::Instant;

use blkloom_io::{Buffer, Slice};
use blkloom_wire::{Command, Framing, Header, Style, flags};

use super::memory::REQUEST;
use super::{Connection, HEAD, Input, THROUGH_ARENA, Workbench};
use crate::budget::Reservation;
use crate::now::{self, Besides, Now, Patience};
use crate::request::Memory;
use crate::stats::Op;

/// Larger writes to memory are done in parts, of about this size where they come in time: the client can go on sending
/// meanwhile, and what is copied is still in the processor's cache.
const PART: u64 = 256 << 10;
/// Less than this waits for more to come.
const LEAST: u64 = 128 << 10;
/// What ends between two pages would have the second part write one of them again.
const PAGE: u64 = 4096;

/// Of a write that is not all there: how many of the bytes that are to write now.
fn part(header: &Header, have: u64) -> u64 {
    if have < LEAST { 0 } else { (header.offset + have) / PAGE * PAGE - header.offset }
}

impl Connection {
    /// None: it waits for memory.
    pub(super) fn read(&mut self, slot: usize, header: &Header, bench: &mut Workbench, started: Instant) -> Option<()> {
        let framing = self.framing(header);
        let length = header.length as usize;
        if length == 0 {
            blkloom_wire::success(&framing, &mut bench.arena);
            return Some(());
        }
        if header.length > THROUGH_ARENA || self.account.is_tight() {
            return self.read_apart(slot, header, bench, started);
        }
        if bench.arena.room() < length + HEAD {
            self.flush(bench);
        }
        let start = bench.arena.used();
        bench.zeros.clear();
        blkloom_wire::read_data(&framing, &mut bench.arena, header.offset, header.length, true);
        let data = bench.arena.used();
        let memory = bench.arena.claim(length);
        let besides = Besides { zeros: self.may_send_holes(header).then_some(&mut bench.zeros), next: None };
        match now::read(&self.export.device, bench.shard, header.offset, memory, Patience::Nowait, besides) {
            Now::Done if bench.zeros.is_empty() => self.tally(Op::Read, header.length, false),
            Now::Done => {
                let bytes = bench.arena.bytes()[data..].to_vec();
                bench.arena.rewind(start);
                let out = sparse(&framing, &bytes, &bench.zeros);
                self.put(out, bench);
                self.tally(Op::Read, header.length, false);
            }
            Now::Failed(errno) => {
                bench.arena.rewind(start);
                self.fail(&framing, errno, &mut bench.arena);
                self.tally(Op::Read, 0, true);
            }
            Now::Later(done) => {
                let Some(reservation) = self.reserve(slot, self.need(header, Command::Read), bench) else {
                    bench.arena.rewind(start);
                    return None;
                };
                let mut buffer = bench.buffers.take(length);
                let read = done as usize;
                buffer.bytes_mut()[..read].copy_from_slice(&bench.arena.bytes()[data..data + read]);
                bench.arena.rewind(start);
                self.later(slot, header, (Memory::Owned(Arc::new(buffer)), reservation), done, bench, started);
            }
        }
        Some(())
    }

    /// A read through memory of its own, which the reply keeps until the client has taken it.
    fn read_apart(&mut self, slot: usize, header: &Header, bench: &mut Workbench, started: Instant) -> Option<()> {
        let framing = self.framing(header);
        let mut reservation = self.reserve(slot, self.need(header, Command::Read), bench)?;
        let buffer = bench.buffers.take(header.length as usize);
        // SAFETY: the buffer is kept below until the read has ended.
        let memory = unsafe { buffer.slice() };
        bench.zeros.clear();
        let besides = Besides { zeros: self.may_send_holes(header).then_some(&mut bench.zeros), next: None };
        match now::read(&self.export.device, bench.shard, header.offset, memory, Patience::Nowait, besides) {
            Now::Done if !bench.zeros.is_empty() => {
                self.flush(bench);
                let out = sparse(&framing, buffer.bytes(), &bench.zeros);
                bench.buffers.put(buffer);
                reservation.shrink(out.capacity() + REQUEST);
                self.output.push(out, None, Some(reservation));
                self.send(bench);
                self.tally(Op::Read, header.length, false);
            }
            Now::Done => {
                self.flush(bench);
                let mut head = Vec::with_capacity(48);
                blkloom_wire::read_data(&framing, &mut head, header.offset, header.length, true);
                reservation.shrink(Buffer::capacity(buffer.len()) + REQUEST);
                self.output.push(head, Some(buffer), Some(reservation));
                self.send(bench);
                self.tally(Op::Read, header.length, false);
            }
            Now::Failed(errno) => {
                bench.buffers.put(buffer);
                self.fail(&framing, errno, &mut bench.arena);
                self.tally(Op::Read, 0, true);
            }
            Now::Later(done) => {
                self.later(slot, header, (Memory::Owned(Arc::new(buffer)), reservation), done, bench, started);
            }
        }
        Some(())
    }

    // Writing

    /// None: it waits for memory.
    pub(super) fn write(
        &mut self,
        slot: usize,
        header: &Header,
        rest: &[u8],
        bench: &mut Workbench,
        started: Instant,
    ) -> Option<usize> {
        let length = header.length as usize;
        if length == 0 {
            blkloom_wire::success(&self.framing(header), &mut bench.arena);
            return Some(0);
        }
        if rest.len() < length {
            let reservation = self.reserve(slot, self.need(header, Command::Write), bench)?;
            self.input = self.payload(*header, rest, reservation, bench);
            return Some(rest.len());
        }
        // SAFETY: `rest` is borrowed for the whole call; `write_now` only reads from the memory.
        let memory = unsafe { Slice::new(rest.as_ptr().cast_mut(), length) };
        if let Some(done) = self.write_now(header, memory, bench) {
            let reservation = self.reserve(slot, self.need(header, Command::Write), bench)?;
            let mut buffer = bench.buffers.take(length);
            buffer.bytes_mut().copy_from_slice(&rest[..length]);
            self.later(slot, header, (Memory::Owned(Arc::new(buffer)), reservation), done, bench, started);
        }
        Some(length)
    }

    /// A write whose payload has only begun to come.
    fn payload(
        &mut self,
        mut header: Header,
        mut rest: &[u8],
        reservation: Reservation,
        bench: &mut Workbench,
    ) -> Input {
        let mut size = header.length;
        if self.goes_in_parts(&header, bench) {
            let first = part(&header, rest.len() as u64) as usize;
            // SAFETY: `rest` is borrowed for the whole call; `write_part` only reads from the memory.
            let memory = unsafe { Slice::new(rest.as_ptr().cast_mut(), first) };
            if self.write_part(&mut header, memory, bench) {
                rest = &rest[first..];
                size = header.length.min(PART);
            }
        }
        let mut buffer = bench.buffers.take(size as usize);
        buffer.bytes_mut()[..rest.len()].copy_from_slice(rest);
        Input::Payload { header, buffer, have: rest.len(), reservation }
    }

    /// A durable write ends with a flush of all of it. An extended reply names the offset that was asked for, which the
    /// header of the rest does not tell any more.
    fn goes_in_parts(&self, header: &Header, bench: &Workbench) -> bool {
        header.length > PART
            && header.flags & flags::FUA == 0
            && self.rules.style != Style::Extended
            && now::would_copy(&self.export.device, bench.shard, (header.offset, PART))
    }

    /// More of a payload that is written in parts has come. What cannot be written so waits until all of it is there.
    pub(super) fn next_part(
        &mut self,
        mut header: Header,
        mut buffer: Buffer,
        mut have: usize,
        reservation: Reservation,
        bench: &mut Workbench,
    ) -> Input {
        let count = part(&header, have as u64) as usize;
        if count == 0 {
            return Input::Payload { header, buffer, have, reservation };
        }
        // SAFETY: the buffer lives to the end of this function; `write_part` only reads from the memory.
        if self.write_part(&mut header, unsafe { buffer.slice() }.part(0, count), bench) {
            buffer.bytes_mut().copy_within(count..have, 0);
            have -= count;
            buffer.shorten(header.length.min(PART) as usize);
        } else {
            let mut whole = bench.buffers.take(header.length as usize);
            whole.bytes_mut()[..have].copy_from_slice(&buffer.bytes()[..have]);
            bench.buffers.put(std::mem::replace(&mut buffer, whole));
        }
        Input::Payload { header, buffer, have, reservation }
    }

    /// Writes the beginning of a write at once and makes the header that of the rest; false if it cannot. Until the
    /// rest has been written, too, the client knows of nothing.
    fn write_part(&mut self, header: &mut Header, memory: Slice, bench: &mut Workbench) -> bool {
        let len = memory.len() as u64;
        let written = len == 0
            || now::write(&self.export.device, bench.shard, header.offset, memory, Patience::Nowait) == Now::Done;
        if written {
            (header.offset, header.length) = (header.offset + len, header.length - len);
            self.tally[Op::Write as usize].1 += len;
        }
        written
    }

    /// Writes at once and answers, or says how far it came.
    pub(super) fn write_now(&mut self, header: &Header, memory: Slice, bench: &mut Workbench) -> Option<u64> {
        let device = &self.export.device;
        let attempt = match header.flags & flags::FUA != 0 && device.needs_flush() {
            true => Now::Later(0),
            false => now::write(device, bench.shard, header.offset, memory, Patience::Nowait),
        };
        self.answer_now(header, Op::Write, attempt, bench)
    }

    pub(super) fn answer_now(&mut self, header: &Header, op: Op, attempt: Now, bench: &mut Workbench) -> Option<u64> {
        let framing = self.framing(header);
        if bench.arena.room() < HEAD {
            self.flush(bench);
        }
        match attempt {
            Now::Done => {
                blkloom_wire::success(&framing, &mut bench.arena);
                self.tally(op, header.length, false);
                None
            }
            Now::Failed(errno) => {
                self.fail(&framing, errno, &mut bench.arena);
                self.tally(op, 0, true);
                None
            }
            Now::Later(done) => Some(done),
        }
    }
}

/// The reply to a read whose data has zeros in it: data and holes as chunks of their own.
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
