//! One budget of memory for what clients make an engine keep: payloads, replies, and copies made on the way.
//!
//! A request reserves all it may need before its payload is received. Where that is not to be had it waits in line, and
//! its connection is not read meanwhile; a message to the connection's loop brings the reservation. Small and large
//! requests have a share and a line each, so that clients that stall with large ones do not hold small ones up, and
//! small ones never starve large ones. Within a share it is first come, first served, over all loops.
//!
//! Some things show only when they are there: replies the socket does not take, bytes received together with a request
//! that waits. They count against the share of small requests (`Kept`), and once half of that is used connections keep
//! next to none of them (`Account::is_tight`).
//!
//! A request may need others of the same engine before it can end: a device's storage may be reached through another
//! device's export, by a target, a mount or another process, which the engine does not see. Such devices never stand in
//! a circle. So a device that has nothing reserved may take the first small request beyond the share, and for a client
//! in the engine's own process also the first large one: the device at the bottom can always go on, and ends what waits
//! for it. A request larger than its share is served alone.
//!
//! Reserving takes no lock while nobody waits. Any thread.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use crate::device::Device;
use crate::inbox::{Inbox, Message};
use crate::lock;

/// Requests for more bytes are large.
const SMALL: u64 = 1 << 20;

/// Shares of the budget in eighths; the rest is for memory that loops keep at hand.
const SHARES: [usize; 2] = [3, 4];
const AT_HAND: usize = 1;

/// Which share a request's memory comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Size {
    Small,
    Large,
}

/// The memory that a request may need.
#[derive(Clone, Copy, Debug)]
pub struct Need {
    size: Size,
    bytes: usize,
}

impl Need {
    /// bytes: for a request of `length`.
    pub fn new(length: u64, bytes: usize) -> Need {
        Need { size: if length > SMALL { Size::Large } else { Size::Small }, bytes }
    }
}

pub struct Budget {
    limit: usize,
    shares: [Share; 2],
}

struct Share {
    limit: usize,
    reserved: AtomicUsize,
    /// How many are in line; while somebody is, nobody is served before them.
    waiting: AtomicUsize,
    line: Mutex<VecDeque<InLine>>,
}

struct InLine {
    account: Arc<Account>,
    need: Need,
    inbox: Arc<Inbox>,
    slot: usize,
}

/// The budget as it is now, in bytes; waiting: requests.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemoryUse {
    pub budget: usize,
    pub reserved: usize,
    pub waiting: usize,
}

impl Budget {
    pub fn new(limit: usize) -> Arc<Budget> {
        let share = |eighths| Share {
            limit: limit / 8 * eighths,
            reserved: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
            line: Mutex::default(),
        };
        Arc::new(Budget { limit, shares: SHARES.map(share) })
    }

    /// What all loops together may keep at hand for the next requests.
    pub fn at_hand(&self) -> usize {
        self.limit / 8 * AT_HAND
    }

    pub fn memory_use(&self) -> MemoryUse {
        let sum = |pick: fn(&Share) -> &AtomicUsize| self.shares.iter().map(|share| pick(share).load(SeqCst)).sum();
        MemoryUse { budget: self.limit, reserved: sum(|share| &share.reserved), waiting: sum(|share| &share.waiting) }
    }
}

impl Share {
    /// Serves those in line: in order, and past one that must wait only what is served from beyond the share.
    fn serve(&self) {
        if self.waiting.load(SeqCst) == 0 {
            return;
        }
        let mut served = Vec::new();
        let mut line = lock(&self.line);
        let mut at = 0;
        while let Some(InLine { account, need, .. }) = line.get(at) {
            let taken = if at == 0 { account.take(*need) } else { account.take_beyond(*need) };
            match taken {
                Some(reservation) => served.extend(line.remove(at).map(|waiter| (waiter, reservation))),
                None => at += 1,
            }
        }
        self.waiting.store(line.len(), SeqCst);
        // Dropping a reservation, as of a loop that has ended, takes the lock again.
        drop(line);
        for (InLine { account, inbox, slot, .. }, reservation) in served {
            inbox.send(Message::Reserved { slot, id: account.id, reservation });
        }
    }

    fn give_back(&self, bytes: usize) {
        self.reserved.fetch_sub(bytes, SeqCst);
        self.serve();
    }
}

/// One connection, as the budget knows it.
pub struct Account {
    budget: Arc<Budget>,
    device: Arc<Device>,
    id: u64,
    /// The client is a part of this process.
    own: bool,
}

impl Account {
    pub fn new(budget: Arc<Budget>, device: Arc<Device>, id: u64, own: bool) -> Arc<Account> {
        Arc::new(Account { budget, device, id, own })
    }

    fn share(&self, size: Size) -> &Share {
        &self.budget.shares[size as usize]
    }

    /// Half of the share of small requests is used: connections must not keep what was not reserved.
    pub fn is_tight(&self) -> bool {
        let share = self.share(Size::Small);
        share.reserved.load(SeqCst) > share.limit / 2
    }

    /// None: it must wait.
    pub fn reserve(self: &Arc<Self>, need: Need) -> Option<Reservation> {
        if self.share(need.size).waiting.load(SeqCst) > 0 {
            return None;
        }
        self.take(need)
    }

    /// Gets in line; a message to the inbox brings the reservation.
    pub fn wait(self: &Arc<Self>, need: Need, inbox: Arc<Inbox>, slot: usize) -> Waiting {
        let share = self.share(need.size);
        let mut line = lock(&share.line);
        line.push_back(InLine { account: self.clone(), need, inbox, slot });
        share.waiting.store(line.len(), SeqCst);
        drop(line);
        share.serve(); // what was given back meanwhile saw nobody in line
        Waiting { account: self.clone(), size: need.size }
    }

    fn take(self: &Arc<Self>, need: Need) -> Option<Reservation> {
        let share = self.share(need.size);
        let fits = |reserved: usize| {
            let sum = reserved.saturating_add(need.bytes);
            (reserved == 0 || sum <= share.limit).then_some(sum)
        };
        if share.reserved.fetch_update(SeqCst, SeqCst, fits).is_err() {
            return self.take_beyond(need);
        }
        self.device.reservations[need.size as usize].fetch_add(1, SeqCst);
        Some(Reservation { account: self.clone(), need })
    }

    /// The first of its device, beyond the share.
    fn take_beyond(self: &Arc<Self>, need: Need) -> Option<Reservation> {
        let may = need.size == Size::Small || self.own;
        let first = &self.device.reservations[need.size as usize];
        if !may || first.compare_exchange(0, 1, SeqCst, SeqCst).is_err() {
            return None;
        }
        self.share(need.size).reserved.fetch_add(need.bytes, SeqCst);
        Some(Reservation { account: self.clone(), need })
    }
}

/// Memory that is a request's to use until this is dropped.
pub struct Reservation {
    account: Arc<Account>,
    need: Need,
}

impl Reservation {
    pub fn covers(&self, need: Need) -> bool {
        self.need.size == need.size && self.need.bytes >= need.bytes
    }

    /// Gives back all but `bytes`.
    pub fn shrink(&mut self, bytes: usize) {
        if let Some(more) = self.need.bytes.checked_sub(bytes).filter(|more| *more > 0) {
            self.need.bytes = bytes;
            self.account.share(self.need.size).give_back(more);
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.account.device.reservations[self.need.size as usize].fetch_sub(1, SeqCst);
        self.account.share(self.need.size).give_back(self.need.bytes);
    }
}

/// A place in line, given up when it is dropped.
pub struct Waiting {
    account: Arc<Account>,
    size: Size,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let share = self.account.share(self.size);
        let mut line = lock(&share.line);
        let left = line.iter().position(|waiter| Arc::ptr_eq(&waiter.account, &self.account));
        let gone = left.and_then(|at| line.remove(at));
        share.waiting.store(line.len(), SeqCst);
        drop(line);
        if gone.is_some() {
            share.serve();
        }
    }
}

/// What a connection keeps without having reserved it. Counted, never refused.
pub struct Kept {
    account: Arc<Account>,
    bytes: usize,
}

impl Kept {
    pub fn new(account: Arc<Account>) -> Kept {
        Kept { account, bytes: 0 }
    }

    pub fn set(&mut self, bytes: usize) {
        let before = std::mem::replace(&mut self.bytes, bytes);
        let share = self.account.share(Size::Small);
        if bytes > before {
            share.reserved.fetch_add(bytes - before, SeqCst);
        } else if bytes < before {
            share.give_back(before - bytes);
        }
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.set(0);
    }
}
