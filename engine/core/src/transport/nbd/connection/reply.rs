//! Replies: framing, errors and sending. Part of `connection`, whose invariants hold here.

use blkloom_io::Errno;
use blkloom_wire::{ErrorCode, Framing, Header, Refusal, Sink};

use super::{Connection, HEAD};
use crate::transport::LoopContext;

impl Connection {
    pub(super) fn framing(&self, header: &Header) -> Framing {
        Framing { style: self.rules.style, cookie: header.cookie, offset: header.offset }
    }

    /// Adds a reply of any length to the output.
    pub(super) fn put(&mut self, reply: Vec<u8>, cx: &mut LoopContext) {
        if cx.arena.room() < reply.len() {
            self.send_replies(cx);
        }
        match cx.arena.room() < reply.len() {
            true => self.output.push(reply, None, None),
            false => cx.arena.put(&reply),
        }
    }

    pub(super) fn refuse(&mut self, framing: &Framing, refusal: Refusal, cx: &mut LoopContext) {
        if cx.arena.room() < HEAD {
            self.send_replies(cx);
        }
        blkloom_wire::error(framing, &mut cx.arena, refusal.code, refusal.why);
    }

    pub(super) fn fail(&self, framing: &Framing, errno: Errno, out: &mut impl Sink) {
        let code = blkloom_wire::nbd_errno(errno.raw_os_error());
        let message = if code == ErrorCode::Io && errno != Errno::IO {
            std::io::Error::from(errno).to_string()
        } else {
            String::new()
        };
        blkloom_wire::error(framing, out, code, &message);
    }

    /// Sends the send queue and the arena.
    pub(super) fn send_replies(&mut self, cx: &mut LoopContext) {
        if self.is_gone() {
            cx.arena.rewind(0);
        } else if let Err(error) = self.output.send_arena(&mut *self.stream, &mut cx.arena, &mut cx.buffers) {
            cx.arena.rewind(0);
            self.end_now(&error.reason("send"));
        }
    }

    /// Sends the send queue.
    pub(super) fn send_waiting(&mut self, cx: &mut LoopContext) {
        if !self.is_gone()
            && let Err(error) = self.output.send(&mut *self.stream, &mut cx.buffers)
        {
            self.end_now(&error.reason("send"));
        }
    }
}
