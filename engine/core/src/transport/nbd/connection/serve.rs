//! Requests without data (flush, trim, write zeroes, cache, block status), and statistics of the fast path. Part of
//! `connection`, whose invariants hold here.

use std::time::Instant;

use blkloom_wire::{Command, Header, flags};

use super::Connection;
use crate::fast_path::{self, Progress};
use crate::operation::Flags;
use crate::request::Memory;
use crate::stats::Op;
use crate::transport::LoopContext;

/// Requests that the fast path has ended in this iteration, by operation: (count, bytes, errors). Bytes without a count
/// belong to a write that is written in parts.
pub(super) type Tally = [(u64, u64, u64); Op::ALL.len()];

impl Connection {
    pub(super) fn command(
        &mut self,
        header: &Header,
        command: Command,
        cx: &mut LoopContext,
        started: Instant,
    ) -> Option<()> {
        let op = operation(command);
        let device = &self.export.device;
        let wanted = wanted(header.flags);
        let attempt = match op {
            _ if header.length == 0 && op != Op::Flush => Progress::Done,
            Op::Flush => fast_path::flush(device, cx.shard),
            Op::Discard | Op::WriteZeroes => {
                fast_path::clear(device, cx.shard, op, header.offset, header.length, wanted)
            }
            _ => Progress::Queue(0),
        };
        if let Some(done) = self.answer_now(header, op, attempt, cx) {
            let reservation = self.memory.reserve(self.need(header, command), cx)?;
            self.queue_rest(header, (Memory::None, reservation), done, cx, started);
        }
        Some(())
    }

    pub(super) fn tally(&mut self, op: Op, bytes: u64, failed: bool) {
        let tally = &mut self.tally[op as usize];
        *tally = (tally.0 + 1, tally.1 + bytes, tally.2 + u64::from(failed));
    }

    pub(super) fn count(&mut self, cx: &LoopContext, started: Instant) {
        for (op, tally) in Op::ALL.into_iter().zip(&mut self.tally) {
            let (count, bytes, errors) = std::mem::take(tally);
            if count > 0 || bytes > 0 {
                cx.count(&self.export, op, (count, bytes, errors), started);
            }
        }
    }
}

pub(super) fn operation(command: Command) -> Op {
    match command {
        Command::Read => Op::Read,
        Command::Write => Op::Write,
        Command::Flush | Command::Disconnect => Op::Flush,
        Command::Trim => Op::Discard,
        Command::Cache => Op::Cache,
        Command::WriteZeroes => Op::WriteZeroes,
        Command::BlockStatus => Op::Extents,
    }
}

pub(super) fn wanted(bits: u16) -> Flags {
    Flags {
        fua: bits & flags::FUA != 0,
        unmap: bits & flags::NO_HOLE == 0,
        fast: bits & flags::FAST_ZERO != 0,
        one: bits & flags::REQ_ONE != 0,
        through_gate: false,
    }
}
