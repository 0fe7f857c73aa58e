//! Receive path: receives bytes, parses requests and dispatches them. Part of `connection`, whose invariants hold here.

use std::time::Instant;

use blkloom_io::Buffer;
use blkloom_wire::{Command, ErrorCode, Header, Refusal, Style};
use rustix::io::Errno;

use super::super::stream::StreamError;
use super::{Connection, HEAD, Input, LITTLE, Skipping};
use crate::request::Memory;
use crate::transport::LoopContext;

/// When replies are sent early (`LoopContext::replies_early`): bytes of the first send of an iteration. Each further
/// send has twice as many.
const FIRST_REPLIES: usize = 16 << 10;

enum Received {
    Nothing,
    End,
    /// Only bytes of the current payload.
    Payload,
    /// `count` bytes, in the input buffer after the `behind` bytes of the stash.
    Bytes {
        count: usize,
        behind: usize,
    },
}

impl Connection {
    /// Receives and serves requests. Returns whether anything was received or served.
    pub(super) fn receive_and_serve(&mut self, input: &mut Buffer, cx: &mut LoopContext) -> bool {
        if !self.wants_input() {
            return false;
        }
        let started = Instant::now();
        let stashed = self.stash.len();
        match self.receive(input) {
            Ok(Received::Bytes { count, behind }) => self.consume(&input.bytes()[..behind + count], cx, started),
            Ok(Received::Payload) => self.finish_payload(cx, started),
            // A request that was stashed while the connection was full, or by the engine before, may be served now.
            // The next receive reports the end or the error again.
            Ok(Received::Nothing | Received::End) | Err(_) if stashed >= self.rules.style.header_size() => {
                let stash = std::mem::take(&mut self.stash);
                self.consume(&stash, cx, started);
            }
            Ok(Received::Nothing) => return false,
            Ok(Received::End) | Err(StreamError::Io(Errno::CONNRESET)) => {
                let middle = !matches!(self.input, Input::Header) || stashed > 0;
                self.end_now(if middle {
                    "the client vanished in the middle of a request"
                } else {
                    "the client hung up"
                });
            }
            Err(error) => self.end_now(&error.reason("receive")),
        }
        self.send_replies(cx);
        self.count(cx, started);
        true
    }

    /// Receives once. A current payload is filled first.
    fn receive(&mut self, into: &mut Buffer) -> Result<Received, StreamError> {
        let mut filled = false;
        if let Input::Payload { header, buffer, have, .. } = &mut self.input {
            let want = buffer.len() - *have;
            match self.stream.receive(&mut buffer.bytes_mut()[*have..]) {
                Ok(0) => return Ok(Received::End),
                Ok(count) => {
                    *have += count;
                    filled = true;
                    if count < want || (buffer.len() as u64) < header.length {
                        return Ok(Received::Payload);
                    }
                }
                Err(StreamError::Again) => return Ok(Received::Nothing),
                Err(error) => return Err(error),
            }
        }
        let behind = self.stash.len();
        if behind >= into.len() || self.skips_next.is_some() {
            return Ok(Received::Nothing); // the stash must be served first
        }
        let room = if self.memory.is_tight() { LITTLE } else { into.len() };
        let end = into.len().min(behind + room);
        match self.stream.receive(&mut into.bytes_mut()[behind..end]) {
            // The next receive reports the end or the error again, after this payload was served.
            Ok(0) | Err(_) if filled => Ok(Received::Payload),
            Ok(0) => Ok(Received::End),
            Ok(count) => {
                into.bytes_mut()[..behind].copy_from_slice(&self.stash);
                self.stash.clear();
                self.stash.shrink_to(LITTLE);
                Ok(Received::Bytes { count, behind })
            }
            Err(StreamError::Again) => Ok(Received::Nothing),
            Err(error) => Err(error),
        }
    }

    fn consume(&mut self, bytes: &[u8], cx: &mut LoopContext, started: Instant) {
        let mut at = 0;
        // If the loop was idle, the client waits as well: it can process the first replies and send its next requests
        // while the others are served. If the loop has other work, or no CPU is free for the client, one send for all
        // replies is cheaper.
        let mut enough = if cx.replies_early { FIRST_REPLIES } else { usize::MAX };
        self.finish_payload(cx, started);
        while at < bytes.len() && self.takes_input() {
            if let Input::Skip(skipping) = &mut self.input {
                let skipped = skipping.left.min((bytes.len() - at) as u64);
                skipping.left -= skipped;
                at += skipped as usize;
                if skipping.left == 0 {
                    let reply = std::mem::take(&mut skipping.reply);
                    self.input = Input::Header;
                    self.put(reply, cx);
                }
                continue;
            }
            if self.full() {
                break;
            }
            match self.rules.style.header(&bytes[at..]) {
                Ok(Some(header)) => {
                    let behind = at + self.rules.style.header_size();
                    match self.request(header, &bytes[behind..], cx, started) {
                        Some(taken) => at = behind + taken,
                        None => break,
                    }
                    if cx.arena.used() >= enough {
                        self.send_replies(cx);
                        enough *= 2;
                    }
                }
                Ok(None) => break,
                Err(malformed) => {
                    self.end_now(&format!("garbage: request magic {:#010x}", malformed.magic));
                    return;
                }
            }
        }
        if self.takes_input() {
            self.stash.extend_from_slice(&bytes[at..]);
            if self.stash.is_empty()
                && let Some(skipping) = self.skips_next.take()
            {
                self.input = Input::Skip(skipping);
            }
        }
        self.memory.release();
    }

    /// Serves a write whose payload is complete, or the received part of one that is written in parts.
    fn finish_payload(&mut self, cx: &mut LoopContext, started: Instant) {
        match std::mem::replace(&mut self.input, Input::Header) {
            Input::Payload { header, buffer, have, reservation } if (buffer.len() as u64) < header.length => {
                self.input = self.next_part(header, buffer, have, reservation, cx);
            }
            Input::Payload { header, buffer, have, reservation } if have == buffer.len() => {
                match self.write_now(&header, buffer.bytes().into(), cx) {
                    Some(done) => {
                        let memory = Memory::owned(buffer);
                        self.queue_rest(&header, (memory, reservation), done, cx, started);
                    }
                    None => cx.buffers.put(buffer),
                }
            }
            unfinished => self.input = unfinished,
        }
    }

    /// Serves one request. Returns the number of bytes after the header that were used. None: the request waits for
    /// memory.
    fn request(&mut self, header: Header, rest: &[u8], cx: &mut LoopContext, started: Instant) -> Option<usize> {
        self.rules.size = self.export.device.size();
        let request = header.request(&self.rules);
        let framing = self.framing(&header);
        if cx.arena.room() < HEAD {
            self.send_replies(cx);
        }
        if let Some(mut refusal) = request.refusal {
            if self.export.device.closed() {
                refusal = Refusal { code: ErrorCode::Shutdown, why: "the device is closed" };
            }
            if self.rules.style == Style::Extended && request.payload > self.rules.max_payload {
                self.end_now("a payload longer than the maximum");
                return Some(0);
            }
            if request.payload == 0 {
                self.refuse(&framing, refusal, cx);
            } else {
                let mut reply = Vec::new();
                blkloom_wire::error(&framing, &mut reply, refusal.code, refusal.why);
                self.input = Input::Skip(Skipping { left: request.payload, reply });
            }
            return Some(0);
        }
        match request.command {
            Some(Command::Disconnect) => {
                self.end_after_replies("the client disconnected");
                self.parting = Some(header);
            }
            Some(Command::Write) => return self.write(&header, rest, cx, started),
            Some(Command::Read) => self.read(&header, cx, started)?,
            Some(command) => self.command(&header, command, cx, started)?,
            None => {}
        }
        Some(0)
    }
}
