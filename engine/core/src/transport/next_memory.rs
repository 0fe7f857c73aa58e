//! `NextMemory`: the memory reservation, or the wait for it, of a connection's next request. A connection that waits
//! receives nothing more.

use std::sync::Arc;

use super::LoopContext;
use crate::budget::{Account, Need, Reservation, Waiting};

/// Memory for the next request of a connection.
pub(super) struct NextMemory {
    account: Arc<Account>,
    waiting: Option<Waiting>,
    /// The reservation that the next request waited for.
    reserved: Option<Reservation>,
}

impl NextMemory {
    pub fn new(account: Arc<Account>) -> NextMemory {
        NextMemory { account, waiting: None, reserved: None }
    }

    /// Whether the budget is nearly used up: see `Account::is_tight`.
    pub fn is_tight(&self) -> bool {
        self.account.is_tight()
    }

    pub fn is_waiting(&self) -> bool {
        self.waiting.is_some()
    }

    /// Reserves memory. None: the connection must keep the request until memory is granted.
    pub fn reserve(&mut self, need: Need, cx: &LoopContext) -> Option<Reservation> {
        if let Some(reservation) = self.reserved.take().filter(|reservation| reservation.covers(need)) {
            return Some(reservation);
        }
        let reservation = self.account.reserve(need);
        if reservation.is_none() {
            self.waiting = Some(cx.wait_for_memory(&self.account, need));
        }
        reservation
    }

    /// Stores the reservation that the next request waited for.
    pub fn granted(&mut self, reservation: Reservation) {
        if self.waiting.take().is_some() {
            self.reserved = Some(reservation);
        }
    }

    /// Releases the reservation: the request that waited for it does not need it any more.
    pub fn release(&mut self) {
        self.reserved = None;
    }

    /// Ends the wait and releases the reservation: there is no next request.
    pub fn forget(&mut self) {
        self.waiting = None;
        self.reserved = None;
    }
}
