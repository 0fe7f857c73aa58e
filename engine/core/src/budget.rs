//! Memory budget of an engine for its clients: payloads, replies and copies of requests in flight.
//!
//! A request reserves all memory that it may need before its payload is received. If that memory is not available, the
//! request waits in a FIFO, and its connection is not read meanwhile. A message to the connection's loop brings the
//! reservation. Small and large requests have a share of the budget and a FIFO each: a client that stalls with a large
//! request does not delay small requests, and small requests never starve large ones. All loops use the same FIFOs.
//!
//! Some memory is known only when it is already in use: replies that the socket does not accept, and bytes that were
//! received together with a request that waits. This memory counts against the share of small requests (`Kept`). Once
//! half of that share is used, connections keep almost none of it (`Account::is_tight`).
//!
//! A request may depend on other requests of the same engine: a device's storage may be reached through another
//! device's export (by a target, a mount or another process), and the engine does not see that. Such devices never form
//! a cycle. To avoid a deadlock, a device without any reservation may exceed the share for its first small request, and
//! for its first large request if the client is in the engine's own process. So the lowest device can always make
//! progress, and then the requests above it can, too. A request larger than its share is served alone.
//!
//! Reserving takes no lock while no request waits. Any thread may reserve.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use crate::device::Device;
use crate::lock;
use crate::mailbox::Poster;
use crate::request::TransportId;

/// Requests for more bytes are large.
const SMALL: u64 = 1 << 20;

/// Shares of the budget in eighths. The rest is for buffers that loops keep for their next requests.
const SHARES: [usize; 2] = [3, 4];
const AT_HAND: usize = 1;
/// Requests that may wait, one of each transport, before a line has to grow.
const IN_LINE: usize = 256;

/// The share that a request's memory comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Size {
    Small,
    Large,
}

/// The most memory that a request may need.
#[derive(Clone, Copy, Debug)]
pub struct Need {
    size: Size,
    bytes: usize,
}

impl Need {
    /// A request of `length` bytes that needs `bytes` of memory.
    pub fn new(length: u64, bytes: usize) -> Need {
        Need { size: if length > SMALL { Size::Large } else { Size::Small }, bytes }
    }
}

/// The memory budget of one engine.
pub struct Budget {
    limit: usize,
    shares: [Share; 2],
}

struct Share {
    limit: usize,
    reserved: AtomicUsize,
    /// Length of `line`. While it is not 0, new requests join the line.
    waiting: AtomicUsize,
    /// Requests that wait for memory, oldest first.
    line: Mutex<VecDeque<InLine>>,
}

struct InLine {
    account: Arc<Account>,
    need: Need,
    grants: Poster<Granted>,
    transport: TransportId,
}

/// The reservation that the next request of a transport waited for.
pub struct Granted {
    pub transport: TransportId,
    pub reservation: Reservation,
}

/// Current use of the budget, in bytes. waiting: number of requests.
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
            line: Mutex::new(VecDeque::with_capacity(IN_LINE)),
        };
        Arc::new(Budget { limit, shares: SHARES.map(share) })
    }

    /// Bytes that all loops together may keep in buffers for their next requests.
    pub fn at_hand(&self) -> usize {
        self.limit / 8 * AT_HAND
    }

    pub fn memory_use(&self) -> MemoryUse {
        let sum = |pick: fn(&Share) -> &AtomicUsize| self.shares.iter().map(|share| pick(share).load(SeqCst)).sum();
        MemoryUse { budget: self.limit, reserved: sum(|share| &share.reserved), waiting: sum(|share| &share.waiting) }
    }
}

impl Share {
    /// Grants memory to waiting requests, in order. Behind a request that must go on waiting, only requests that may
    /// exceed the share (`take_beyond`) are granted.
    fn serve(&self) {
        // Posted without the lock: a loop that has ended drops the reservation at once, which takes the lock again.
        while self.waiting.load(SeqCst) > 0
            && let Some((InLine { grants, transport, .. }, reservation)) = self.next_served()
        {
            grants.post(Granted { transport, reservation });
        }
    }

    /// Takes the first request from the line that can be granted its memory now.
    fn next_served(&self) -> Option<(InLine, Reservation)> {
        let mut line = lock(&self.line);
        let take = |(at, InLine { account, need, .. }): (usize, &InLine)| {
            let taken = if at == 0 { account.take(*need) } else { account.take_beyond(*need) };
            taken.map(|reservation| (at, reservation))
        };
        let (at, reservation) = line.iter().enumerate().find_map(take)?;
        let served = line.remove(at);
        self.waiting.store(line.len(), SeqCst);
        served.map(|waiter| (waiter, reservation))
    }

    fn give_back(&self, bytes: usize) {
        self.reserved.fetch_sub(bytes, SeqCst);
        self.serve();
    }
}

/// The budget's view of one transport.
pub struct Account {
    budget: Arc<Budget>,
    device: Arc<Device>,
    /// The client is in this process.
    own: bool,
}

impl Account {
    pub fn new(budget: Arc<Budget>, device: Arc<Device>, own: bool) -> Arc<Account> {
        Arc::new(Account { budget, device, own })
    }

    fn share(&self, size: Size) -> &Share {
        &self.budget.shares[size as usize]
    }

    /// Whether half of the share of small requests is used. Connections must then keep no unreserved memory.
    pub fn is_tight(&self) -> bool {
        let share = self.share(Size::Small);
        share.reserved.load(SeqCst) > share.limit / 2
    }

    /// Reserves memory without waiting. None: the request must `wait`.
    pub fn reserve(self: &Arc<Self>, need: Need) -> Option<Reservation> {
        if self.share(need.size).waiting.load(SeqCst) > 0 {
            return None;
        }
        self.take(need)
    }

    /// Joins the line. A message to `grants` brings the reservation.
    pub fn wait(self: &Arc<Self>, need: Need, grants: Poster<Granted>, transport: TransportId) -> Waiting {
        let share = self.share(need.size);
        let mut line = lock(&share.line);
        line.push_back(InLine { account: self.clone(), need, grants, transport });
        share.waiting.store(line.len(), SeqCst);
        drop(line);
        share.serve(); // memory given back just before saw an empty line
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

    /// Reserves beyond the share, if the device has no other reservation of this size.
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

/// Memory reserved for one request until this is dropped.
pub struct Reservation {
    account: Arc<Account>,
    need: Need,
}

impl Reservation {
    pub fn covers(&self, need: Need) -> bool {
        self.need.size == need.size && self.need.bytes >= need.bytes
    }

    /// Returns all memory but `bytes` to the budget.
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

/// A request's entry in the line of its share. Dropping it removes the entry.
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

/// Unreserved memory that a transport keeps. It is counted and never refused.
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
