//! Letting go of a client so that another engine goes on with it, without the client noticing. Part of
//! `connection`, whose invariants hold here.
//!
//! From `detach` on nothing is read and nothing new is begun. What was begun ends; what does nothing but wait at a
//! closed gate is taken back by the loop (`Queue::withdraw`, `take_back`). So each request is either answered here or
//! among the bytes the next engine gets, and never both. What the client has not taken of the answers goes along, too,
//! and how much of a refused payload is still to be skipped: nothing here waits for the client, unless the caller asked
//! for its replies to be sent first (`drain`).

use std::sync::Arc;

use super::{Connection, Input, State, Unfinished, Workbench};
use crate::notice::Outcome;
use crate::request::{Memory, Owner, Request};

impl Connection {
    /// drain: once the client has taken its replies. Without it also ends the waiting for that.
    pub fn detach(&mut self, drain: bool) {
        self.leaving = true;
        self.waiting = None;
        self.reserved = None;
        match (&mut self.state, self.parting) {
            (State::Open, _) => self.state = State::Detaching { returned: Vec::new(), drain },
            (State::Detaching { drain: before, .. }, _) => *before &= drain,
            // Requests under way may still be taken back: then the disconnection belongs behind them.
            (State::Ending(_), Some(parting)) => {
                self.state = State::Detaching { returned: Vec::new(), drain };
                parting.put(self.rules.style, &mut self.stash);
            }
            (State::Ending(_), None) if !drain => self.gone("closed by the server"),
            _ => {}
        }
    }

    /// Its requests must not wait any more, at gates or held: another engine is to go on with it, or its client is gone
    /// and may have a successor already. Who said goodbye first has a right to what it asked for before.
    pub fn is_leaving(&self) -> bool {
        self.leaving || self.is_gone() && self.parting.is_none()
    }

    pub fn is_detaching(&self) -> bool {
        matches!(self.state, State::Detaching { .. })
    }

    /// Keeps a request of its own, which the queue gave back, for the next engine.
    pub fn take_back(&mut self, request: Request, bench: &mut Workbench) {
        let (Owner::Connection(ticket), State::Detaching { returned, .. }) = (&request.owner, &mut self.state) else {
            return;
        };
        self.in_flight -= 1;
        self.export.stats.withdraw(bench.shard);
        self.export.device.stats.withdraw(bench.shard);
        let mut bytes = Vec::new();
        ticket.header.put(self.rules.style, &mut bytes);
        if let Memory::Owned(buffer) = request.memory {
            self.in_flight_bytes -= ticket.header.length;
            if request.op.writes() {
                bytes.extend_from_slice(buffer.bytes());
            }
            if let Ok(buffer) = Arc::try_unwrap(buffer) {
                bench.buffers.put(buffer);
            }
        }
        returned.push((ticket.order, bytes));
    }

    /// For the next engine: the socket, and all that is unfinished.
    pub(super) fn detached(mut self, returned: Vec<(u64, Vec<u8>)>) -> Outcome {
        let initial = self.unserved(returned);
        let skipping = match self.input {
            Input::Skip(skipping) => Some(skipping),
            _ => self.skips_next,
        };
        let unfinished = Unfinished { initial, unsent: self.output.take(), skipping };
        Outcome::Detached { fd: self.fd, unfinished }
    }

    /// All that was received and not served, in the order it came.
    fn unserved(&mut self, mut returned: Vec<(u64, Vec<u8>)>) -> Vec<u8> {
        returned.sort_unstable_by_key(|(order, _)| *order);
        let mut bytes: Vec<u8> = returned.into_iter().flat_map(|(_, bytes)| bytes).collect();
        if let Input::Payload { header, buffer, have, .. } = &self.input {
            header.put(self.rules.style, &mut bytes);
            bytes.extend_from_slice(&buffer.bytes()[..*have]);
        }
        bytes.append(&mut self.stash);
        bytes
    }
}
