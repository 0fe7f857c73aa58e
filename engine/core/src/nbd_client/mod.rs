//! `NbdClient`: a backend whose bytes are on an NBD server.
//!
//! The caller negotiates. It gives the client connected sockets (`connect`), and is told by `fd` when one is lost. Each
//! connection is driven by an event loop. An operation goes to a connection of the loop that submits it, if there is
//! one, so that no other thread is involved.
//!
//! Operations in flight on a lost connection are sent again on another one. Three rules keep a write that was sent twice
//! from overwriting a newer one:
//!
//! - A client that cuts a connection with unanswered writes asks the server to end it (NBD_CMD_DISC, which a server
//!   obeys after all outstanding requests, and the end of the stream), and waits until the server has closed it
//!   (`Slot::Ending`). Meanwhile nothing is sent on any connection.
//! - Writes that are sent again go first. While they are not answered, no other write is sent.
//! - An operation is completed once, by the answer to the copy that was sent last.
//!
//! "Write" means every operation that changes data. Operations wait without a limit of time until `give_up`.

mod connection;
mod line;
mod output;
mod sent;

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use blkloom_io::{Errno, Process};
pub use blkloom_wire::Style;

use self::connection::Connection;
use self::line::Line;
use crate::backend::{Backend, Limits, Operation, OperationId};
use crate::driven::DrivenHandle;
use crate::engine::{Engine, EngineError};
use crate::event::Event;
use crate::stats::Op;
use crate::sync::{Mutex, lock};
use crate::transport::nbd::Stream;

/// Settings that hold for all connections.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Most bytes of a read or write, and of an operation without bytes.
    pub longest: u64,
    pub longest_range: u64,
    /// Offsets and lengths of requests are multiples of this, a power of two.
    pub block: u64,
    /// How long a request may be unanswered before its connection is cut. None: without a limit.
    pub timeout: Option<Duration>,
    pub connections: usize,
    /// Others may have written before, such as the client of a former process: a flush must cover that, too.
    pub unflushed: bool,
}

/// What a server offers on one connection.
#[derive(Clone, Copy, Debug)]
pub struct Offer {
    pub style: Style,
    /// Transmission flags.
    pub flags: u16,
    /// The id of `base:allocation`, if it was negotiated.
    pub allocation: Option<u32>,
}

/// An operation, with its place in the order of submission.
struct Queued {
    operation: Operation,
    number: u64,
    /// It changes data, and was sent before on another connection.
    resent: bool,
    /// `NbdClient::written` when it was submitted.
    written: u64,
}

enum Slot {
    /// The caller should connect it.
    Absent,
    Up {
        handle: DrivenHandle,
        waiting: VecDeque<Queued>,
        kicked: bool,
    },
    /// Cut by this side; the server has not closed it yet.
    Ending {
        handle: DrivenHandle,
    },
}

struct State {
    slots: Vec<Slot>,
    /// Operations that were in flight on lost connections, in the order of their numbers.
    resend: VecDeque<Queued>,
    /// Other operations that wait for a connection, or for the end of `replaying`.
    parked: VecDeque<Queued>,
    /// Number of writes that are in flight for the second time.
    replaying: usize,
    next_number: u64,
    next_slot: usize,
    /// Operations fail at once.
    failing: bool,
    closed: bool,
    reconnects: u64,
    connects: u64,
    /// Connections that were lost, and why, until the caller takes them.
    lost: Vec<(usize, String)>,
}

/// State of a slot, for the caller.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Link {
    Absent,
    Up,
    Ending,
}

/// The client's state, for the caller.
#[derive(Clone, Debug)]
pub struct Report {
    pub links: Vec<Link>,
    /// Whether operations are being sent.
    pub usable: bool,
    pub failing: bool,
    pub in_flight: usize,
    pub waiting: usize,
    pub reconnects: u64,
    /// Connections that were lost, and why, if they are taken.
    pub lost: Vec<(usize, String)>,
}

pub struct NbdClient {
    settings: Settings,
    state: Mutex<State>,
    /// Operations on connections.
    in_flight: AtomicUsize,
    /// Number of writes that have ended, and of those that a flush has covered.
    written: AtomicU64,
    flushed: AtomicU64,
    event: Event,
    home: Process,
}

impl NbdClient {
    pub fn new(settings: Settings) -> std::io::Result<Arc<NbdClient>> {
        let state = State {
            slots: (0..settings.connections.max(1)).map(|_| Slot::Absent).collect(),
            resend: VecDeque::new(),
            parked: VecDeque::new(),
            replaying: 0,
            next_number: 0,
            next_slot: 0,
            failing: false,
            closed: false,
            reconnects: 0,
            connects: 0,
            lost: Vec::new(),
        };
        Ok(Arc::new(NbdClient {
            settings,
            state: Mutex::new(state),
            in_flight: AtomicUsize::new(0),
            written: AtomicU64::new(u64::from(settings.unflushed)),
            flushed: AtomicU64::new(0),
            event: Event::new()?,
            home: Process::current(),
        }))
    }

    /// A descriptor that is readable after the state of a slot has changed, until `report` takes it.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Uses a socket or TLS session whose handshake is complete for an absent slot. It is closed if the slot is not
    /// absent or the client is closed.
    pub fn connect(
        self: &Arc<Self>,
        engine: &Engine,
        slot: usize,
        socket: Result<OwnedFd, Box<dyn Stream>>,
        offer: Offer,
    ) -> Result<(), EngineError> {
        let line = socket.map_or_else(Line::new, Line::Plain);
        let state = lock(&self.state);
        let absent = matches!(state.slots.get(slot), Some(Slot::Absent)) && !state.closed;
        drop(state);
        if !absent {
            return Err(EngineError::Closed);
        }
        engine.drive(slot, |handle| {
            let mut state = lock(&self.state);
            state.slots[slot] = Slot::Up { handle, waiting: VecDeque::new(), kicked: false };
            state.failing = false;
            state.connects += 1;
            if state.connects > state.slots.len() as u64 {
                state.reconnects += 1;
            }
            state.dispatch();
            Box::new(Connection::new(self.clone(), slot, line, offer, self.settings))
        })
    }

    /// The state. take: with the connections that were lost since the last such call, and makes `fd` unreadable.
    pub fn report(&self, take: bool) -> Report {
        let mut state = lock(&self.state);
        if take {
            self.event.clear();
        }
        let waiting = |slot: &Slot| if let Slot::Up { waiting, .. } = slot { waiting.len() } else { 0 };
        Report {
            links: state.slots.iter().map(Slot::link).collect(),
            usable: state.is_usable(),
            failing: state.failing,
            in_flight: self.in_flight.load(Ordering::Relaxed),
            waiting: state.resend.len() + state.parked.len() + state.slots.iter().map(waiting).sum::<usize>(),
            reconnects: state.reconnects,
            lost: if take { std::mem::take(&mut state.lost) } else { Vec::new() },
        }
    }

    /// Fails all operations that wait for a connection, and later ones at once, until the next `connect`. Does nothing
    /// while operations are being sent. Returns whether it did.
    pub fn give_up(&self, errno: Errno) -> bool {
        let mut state = lock(&self.state);
        if state.is_usable() {
            return false;
        }
        state.failing = true;
        let waiting = state.take_waiting();
        drop(state);
        fail(waiting, errno);
        true
    }

    /// Ends all connections. Waiting and later operations fail.
    pub fn close(&self) {
        let mut state = lock(&self.state);
        state.closed = true;
        let waiting = state.take_waiting();
        for slot in &state.slots {
            if let Slot::Up { handle, .. } | Slot::Ending { handle } = slot {
                handle.kick();
            }
        }
        drop(state);
        fail(waiting, Errno::SHUTDOWN);
    }

    // For connections

    /// Moves operations that a connection may send now to `into`, as long as `fits` returns true. False: the client is
    /// closed, and the connection must end.
    fn take(&self, slot: usize, mut fits: impl FnMut(&Operation) -> bool, into: &mut Vec<Queued>) -> bool {
        let mut state = lock(&self.state);
        if state.closed {
            return false;
        }
        if let Slot::Up { waiting, kicked, .. } = &mut state.slots[slot] {
            *kicked = false;
            while waiting.front().is_some_and(|queued| fits(&queued.operation))
                && let Some(queued) = waiting.pop_front()
            {
                into.push(queued);
            }
            self.in_flight.fetch_add(into.len(), Ordering::Relaxed);
        }
        true
    }

    fn is_open(&self) -> bool {
        !lock(&self.state).closed
    }

    /// An operation of a connection ends with success or not. Called before the caller is told.
    fn ends(&self, queued: &Queued, succeeded: bool) {
        match queued.operation.op {
            Op::Flush if succeeded => {
                self.flushed.fetch_max(queued.written, Ordering::Relaxed);
            }
            // Also one that failed: a part of it may be written.
            op if op.writes() => {
                self.written.fetch_add(1, Ordering::Relaxed);
            }
            _ => {}
        }
    }

    /// One operation of a connection is complete.
    fn completed(&self, resent: bool) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
        if resent {
            let mut state = lock(&self.state);
            state.replaying -= 1;
            if state.replaying == 0 {
                state.dispatch();
            }
        }
    }

    /// A connection is lost, with unanswered operations in the order of their numbers. ending: the server has not closed
    /// it, and `ended` follows.
    fn lost(&self, slot: usize, why: String, unanswered: Vec<Queued>, ending: bool) {
        let mut state = lock(&self.state);
        self.in_flight.fetch_sub(unanswered.len(), Ordering::Relaxed);
        state.take_back(unanswered);
        state.slots[slot] = match std::mem::replace(&mut state.slots[slot], Slot::Absent) {
            Slot::Up { handle, waiting, .. } => {
                state.park(waiting);
                if ending { Slot::Ending { handle } } else { Slot::Absent }
            }
            other => other,
        };
        // Unsent operations of the other connections go behind those that are sent again.
        for at in 0..state.slots.len() {
            if let Slot::Up { waiting, .. } = &mut state.slots[at] {
                let waiting = std::mem::take(waiting);
                state.park(waiting);
            }
        }
        state.lost.push((slot, why));
        state.dispatch();
        let (closed, failing) = (state.closed, state.failing);
        let waiting = if closed || failing { state.take_waiting() } else { Vec::new() };
        drop(state);
        self.event.raise();
        fail(waiting, if closed { Errno::SHUTDOWN } else { Errno::IO });
    }

    /// The server has closed a connection that this side had cut.
    fn ended(&self, slot: usize) {
        let mut state = lock(&self.state);
        state.slots[slot] = Slot::Absent;
        state.dispatch();
        drop(state);
        self.event.raise();
    }
}

impl State {
    fn is_ending(&self) -> bool {
        self.slots.iter().any(|slot| matches!(slot, Slot::Ending { .. }))
    }

    /// Whether operations are being sent: there is a connection, and none that the server must close first.
    fn is_usable(&self) -> bool {
        !self.is_ending() && self.slots.iter().any(|slot| matches!(slot, Slot::Up { .. }))
    }

    fn take_waiting(&mut self) -> Vec<Queued> {
        let mut all: Vec<Queued> = self.resend.drain(..).chain(self.parked.drain(..)).collect();
        for slot in &mut self.slots {
            if let Slot::Up { waiting, .. } = slot {
                all.extend(waiting.drain(..));
            }
        }
        // Those that were handed to a connection already.
        self.replaying -= all.iter().filter(|queued| queued.resent).count();
        all
    }

    /// Sorts unanswered operations into those that are sent again.
    fn take_back(&mut self, unanswered: Vec<Queued>) {
        for mut queued in unanswered {
            if std::mem::take(&mut queued.resent) {
                self.replaying -= 1;
            }
            insert(&mut self.resend, queued);
        }
    }

    /// Parks operations that were not sent.
    fn park(&mut self, waiting: VecDeque<Queued>) {
        for queued in waiting {
            if queued.resent {
                self.take_back(vec![queued]);
            } else {
                insert(&mut self.parked, queued);
            }
        }
    }

    /// Hands waiting operations to connections, those that are sent again first.
    fn dispatch(&mut self) {
        if !self.is_usable() {
            return;
        }
        while let Some(mut queued) = self.resend.pop_front() {
            queued.resent = queued.operation.op.writes();
            self.replaying += usize::from(queued.resent);
            self.hand(queued);
        }
        let parked = std::mem::take(&mut self.parked);
        for queued in parked {
            if self.replaying > 0 && queued.operation.op.writes() {
                self.parked.push_back(queued);
            } else {
                self.hand(queued);
            }
        }
    }

    /// Hands an operation to a connection: one of its own loop, if there is one.
    fn hand(&mut self, queued: Queued) {
        self.next_slot = self.next_slot.wrapping_add(1);
        let (count, first) = (self.slots.len(), self.next_slot);
        let at = |step: usize| (first + step) % count;
        let up = |slot: &Slot| matches!(slot, Slot::Up { .. });
        let own = |slot: &Slot| matches!(slot, Slot::Up { handle, .. } if handle.queue() == queued.operation.id.queue);
        let found = (0..count)
            .map(at)
            .find(|&slot| own(&self.slots[slot]))
            .or_else(|| (0..count).map(at).find(|&slot| up(&self.slots[slot])));
        match found.map(|slot| &mut self.slots[slot]) {
            Some(Slot::Up { handle, waiting, kicked }) => {
                waiting.push_back(queued);
                if !std::mem::replace(kicked, true) {
                    handle.kick();
                }
            }
            _ => self.parked.push_back(queued),
        }
    }
}

impl Slot {
    fn link(&self) -> Link {
        match self {
            Slot::Absent => Link::Absent,
            Slot::Up { .. } => Link::Up,
            Slot::Ending { .. } => Link::Ending,
        }
    }
}

/// Inserts in the order of numbers. Mostly it is the last.
fn insert(into: &mut VecDeque<Queued>, queued: Queued) {
    let at = into.iter().rposition(|other| other.number < queued.number).map_or(0, |at| at + 1);
    into.insert(at, queued);
}

fn fail(waiting: Vec<Queued>, errno: Errno) {
    waiting.into_iter().for_each(|mut queued| queued.operation.complete(Err(errno)));
}

impl Backend for NbdClient {
    fn limits(&self) -> Limits {
        Limits { longest: self.settings.longest, most: connection::MOST, most_bytes: connection::MOST_BYTES }
    }

    fn longest_range(&self) -> u64 {
        self.settings.longest_range
    }

    fn block(&self) -> u64 {
        self.settings.block
    }

    fn reports_extents(&self) -> bool {
        true
    }

    fn has_own_timeout(&self) -> bool {
        true
    }

    fn submit(&self, mut operation: Operation) {
        let mut state = lock(&self.state);
        if state.closed || state.failing || !self.home.is_current() {
            let errno = if state.failing { Errno::IO } else { Errno::SHUTDOWN };
            drop(state);
            return operation.complete(Err(errno));
        }
        let written = self.written.load(Ordering::Relaxed);
        if operation.op == Op::Flush && self.flushed.load(Ordering::Relaxed) >= written {
            drop(state);
            return operation.complete(Ok(None)); // the server need not even be there
        }
        let number = state.next_number;
        state.next_number += 1;
        let queued = Queued { operation, number, resent: false, written };
        if !state.is_usable() || state.replaying > 0 && queued.operation.op.writes() {
            state.parked.push_back(queued);
        } else {
            state.hand(queued);
        }
    }

    /// Forgets an operation that was not sent. The answer to one that was sent is ignored.
    fn cancel(&self, id: OperationId) {
        let mut state = lock(&self.state);
        let State { parked, resend, slots, .. } = &mut *state;
        let waiting = slots.iter_mut().filter_map(|slot| match slot {
            Slot::Up { waiting, .. } => Some(waiting),
            _ => None,
        });
        let found = [parked, resend].into_iter().chain(waiting).find_map(|queue| {
            let at = queue.iter().position(|queued| queued.operation.id == id)?;
            queue.remove(at)
        });
        if found.as_ref().is_some_and(|queued| queued.resent) {
            state.replaying -= 1;
            state.dispatch();
        }
        drop(state);
        drop(found);
    }
}
