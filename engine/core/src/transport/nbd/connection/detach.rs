//! Detach: hands a connection over to another engine, without the client noticing. Part of `connection`, whose
//! invariants hold here.
//!
//! After `detach` nothing is received and no request is started. Requests in flight end; requests that only wait (at a
//! closed gate, deferred or delayed) are withdrawn by the loop (`Queue::withdraw`, `take_back`). So each request is
//! either answered here or among the bytes for the next engine, and never both. Replies that the client has not
//! received, and the rest of a payload that is being skipped, go to the next engine, too. Nothing here waits for the
//! client, except with `drain`: then the client receives its replies first. A stream that cannot move to another engine
//! (TLS) is closed instead.

use super::super::session::{Detached, Unfinished};
use super::{Connection, Input, Leaving, State};
use crate::notice::Outcome;
use crate::request::{Memory, Request};
use crate::transport::LoopContext;

impl Connection {
    /// Starts to detach. drain: wait until the client has received its replies. A later call without `drain` ends that
    /// wait.
    pub(super) fn let_go(&mut self, drain: bool) {
        self.leaving = true;
        self.memory.forget();
        match (&mut self.state, self.parting) {
            (State::Open, _) => self.state = State::Detaching(Leaving { returned: Vec::new(), drain }),
            (State::Detaching(Leaving { drain: before, .. }), _) => *before &= drain,
            // Requests in flight may still be withdrawn: then the disconnect request must follow them.
            (State::Ending(_), Some(parting)) => {
                self.state = State::Detaching(Leaving { returned: Vec::new(), drain });
                parting.put(self.rules.style, &mut self.stash);
            }
            (State::Ending(_), None) if !drain => self.end_now("closed by the server"),
            _ => {}
        }
    }

    /// Whether waiting requests must be withdrawn: the connection is being detached, or its client is gone and may have
    /// connected again. Requests before a regular disconnect (NBD_CMD_DISC) are executed.
    pub(super) fn is_leaving(&self) -> bool {
        self.leaving || self.is_gone() && self.parting.is_none()
    }

    /// Keeps a withdrawn request for the next engine. Some: there is no next engine.
    pub(super) fn keep(&mut self, token: u64, request: Request, cx: &mut LoopContext) -> Option<Request> {
        let State::Detaching(Leaving { returned, .. }) = &mut self.state else {
            return Some(request);
        };
        let Some(ticket) = self.tickets.take(token) else {
            return Some(request);
        };
        self.export.stats.withdraw(cx.shard);
        let mut bytes = Vec::new();
        ticket.header.put(self.rules.style, &mut bytes);
        if let Memory::Owned(buffer) = request.memory {
            self.in_flight_bytes -= ticket.header.length;
            if request.op.writes() {
                bytes.extend_from_slice(buffer.bytes());
            }
            if let Some(buffer) = buffer.take() {
                cx.buffers.put(buffer);
            }
        }
        returned.push((ticket.order, bytes));
        None
    }

    /// The socket and all unfinished bytes, for the next engine.
    pub(super) fn left(mut self, Leaving { returned, drain }: Leaving) -> Outcome {
        let initial = self.unserved(returned);
        let skipping = match self.input {
            Input::Skip(skipping) => Some(skipping),
            _ => self.skips_next,
        };
        let unfinished = Unfinished { initial, unsent: self.output.take(), skipping };
        match self.stream.take_descriptor() {
            Some(fd) => Outcome::Detached(Box::new(Detached { fd, unfinished })),
            None if drain => Outcome::Closed { reason: "disconnected".to_owned() },
            None => Outcome::Closed { reason: "disconnected: another server cannot go on with its stream".to_owned() },
        }
    }

    /// All bytes that were received and not served, in order.
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
