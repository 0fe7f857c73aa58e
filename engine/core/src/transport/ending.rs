//! `State`: the states of a connection from open to its end, for all transports of connections.

use crate::notice::Outcome;

/// The state of a connection. D: the data for the next engine.
pub(super) enum State<D> {
    Open,
    /// Another engine will serve the connection. The data for it that is known so far.
    Detaching(D),
    /// Nothing more is received; the requests in flight are answered.
    Ending(String),
    /// The peer is gone or given up; the requests in flight must still end.
    Gone(String),
}

impl<D> State<D> {
    pub fn is_open(&self) -> bool {
        matches!(self, State::Open)
    }

    pub fn is_gone(&self) -> bool {
        matches!(self, State::Gone(_))
    }

    /// Changes `Open` to `Ending`. Returns whether it was `Open`.
    pub fn end_after_replies(&mut self, reason: &str) -> bool {
        let open = self.is_open();
        if open {
            *self = State::Ending(reason.to_owned());
        }
        open
    }

    /// Changes any state to `Gone`. False: it was `Gone` already. The first reason is kept.
    pub fn end_now(&mut self, reason: &str) -> bool {
        if self.is_gone() {
            return false;
        }
        let reason = match self {
            State::Ending(first) => std::mem::take(first),
            _ => reason.to_owned(),
        };
        *self = State::Gone(reason);
        true
    }

    /// The outcome to report. detached: makes the outcome of a detached connection.
    pub fn outcome(self, detached: impl FnOnce(D) -> Outcome) -> Outcome {
        match self {
            State::Open => Outcome::Closed { reason: "closed".to_owned() },
            State::Detaching(left) => detached(left),
            State::Ending(reason) | State::Gone(reason) => Outcome::Closed { reason },
        }
    }
}
