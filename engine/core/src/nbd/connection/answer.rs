//! Replies to requests that came back from the queue. Part of `connection`, whose invariants hold here.

use std::sync::Arc;

use blkloom_wire::{Command, ErrorCode, Framing, Header, Sink, flags};

use super::{Connection, Ticket, Workbench};
use crate::call::nanoseconds;
use crate::queue::Ended;
use crate::request::{Found, Memory};
use crate::stats::Op;

impl Connection {
    /// Answers a request that came back from the queue.
    pub fn finish(&mut self, ticket: &Ticket, ended: Ended, bench: &mut Workbench) {
        let Ended { request, error, found } = ended;
        self.in_flight -= 1;
        let length = ticket.header.length;
        let bytes = if error == 0 && request.op != Op::Extents { length } else { 0 };
        let latency = nanoseconds(request.started);
        self.export.stats.end(bench.shard, request.op, 1, bytes, u64::from(error != 0), latency);
        let buffer = match request.memory {
            Memory::Owned(buffer) => {
                self.in_flight_bytes -= length;
                Arc::try_unwrap(buffer).ok()
            }
            _ => None,
        };
        if self.is_gone() {
            if let Some(buffer) = buffer {
                bench.buffers.put(buffer);
            }
            return;
        }
        let (framing, mut head) = (&self.framing(&ticket.header), Vec::with_capacity(48));
        if error != 0 {
            self.fail(framing, error, &mut head);
        } else {
            match ticket.command {
                Command::Read => blkloom_wire::read_data(framing, &mut head, framing.offset, length, true),
                Command::BlockStatus => self.block_status(&ticket.header, &found, &mut head),
                _ => blkloom_wire::success(framing, &mut head),
            }
        }
        match buffer {
            Some(buffer) if error == 0 && ticket.command == Command::Read => self.output.push(head, Some(buffer)),
            Some(buffer) => {
                bench.buffers.put(buffer);
                self.output.push(head, None);
            }
            None => self.output.push(head, None),
        }
    }

    fn block_status(&self, header: &Header, found: &[Found], head: &mut Vec<u8>) {
        let mut extents: Vec<(u64, u32)> = Vec::new();
        let mut at = header.offset;
        let one = header.flags & flags::REQ_ONE != 0;
        for found in
            found.iter().take_while(|found| std::mem::replace(&mut at, found.offset + found.len) == found.offset)
        {
            match extents.last_mut() {
                Some((len, flags)) if *flags == found.flags => *len += found.len,
                Some(_) if one => break,
                _ => extents.push((found.len, found.flags)),
            }
        }
        if extents.is_empty() {
            extents.push((header.length, 0)); // "a server MAY always safely report a status of 0"
        }
        blkloom_wire::block_status(&self.framing(header), head, self.context.unwrap_or(0), &extents);
    }

    pub(super) fn fail(&self, framing: &Framing, errno: i32, out: &mut impl Sink) {
        let code = blkloom_wire::nbd_errno(errno);
        let message = if code == ErrorCode::Io && errno != 5 {
            format!("{}", std::io::Error::from_raw_os_error(errno))
        } else {
            String::new()
        };
        blkloom_wire::error(framing, out, code, &message);
    }
}
