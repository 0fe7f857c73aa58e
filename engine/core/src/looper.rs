//! A loop thread: connections, the queue and the ring, in one place and without locks.
//!
//! Each turn takes messages, completions and whatever the active connections received; a turn in
//! which nothing moved polls on for a short while, because waking a sleeping thread costs more than
//! anything else here, and then sleeps in epoll. How long it polls adapts: waits that ended soon
//! argue for it, waits that did not argue against.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use blkloom_io::{Buffer, BufferPool, Ring, errno::ESHUTDOWN};
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use slab::Slab;

use crate::call::nanoseconds;
use crate::inbox::{Inbox, Message};
use crate::nbd::{Arena, Connection, Ticket, Workbench};
use crate::pool::Pool;
use crate::queue::{Ended, Queue};
use crate::request::Owner;
use crate::stats::Shard;

const INPUT: usize = 256 << 10;
const ARENA: usize = 1 << 20;
const BUFFERS: usize = 64 << 20;
pub const RING_ENTRIES: u32 = 256;
/// Connections polled without asking epoll which of them is ready.
const FEW: usize = 4;
/// When the kernel was too busy to take submissions, they are offered again after this.
const RETRY_SUBMIT: Duration = Duration::from_millis(1);
/// While storage works for us a loop polls up to this long, if storage tends to answer within it: asleep,
/// it would be woken on the client's CPU, and both would then take turns there while others idle.
const STORAGE_SPIN: Duration = Duration::from_micros(600);
/// Longer timeouts do not fit what every kernel's epoll takes.
const LONGEST_SLEEP: Duration = Duration::from_secs(86400);
/// What clients have to take their replies when a loop stops.
pub const LAST_REPLIES: Duration = Duration::from_secs(1);
const INBOX: u64 = u64::MAX;
const RING: u64 = u64::MAX - 1;

#[derive(Clone)]
pub struct LoopSettings {
    pub inbox: Arc<Inbox>,
    pub pool: Arc<Pool>,
    pub use_ring: bool,
    pub spin: Duration,
    pub shard: Shard,
    pub connections: Arc<AtomicUsize>,
    /// Bytes of memory to keep at hand for the next requests.
    pub buffers: usize,
}

struct Member {
    connection: Connection,
    /// What epoll was told; None: nothing.
    interest: Option<epoll::EventFlags>,
    stalls_at: Option<Instant>,
    /// `Connection::taken` when it was last looked at.
    taken: Option<u64>,
    /// It counts among `Loop::leaving`.
    leaving: bool,
}

struct Loop {
    inbox: Arc<Inbox>,
    bench: Workbench,
    input: Buffer,
    epoll: OwnedFd,
    members: Slab<Member>,
    count: Arc<AtomicUsize>,
    stalls: BTreeSet<(Instant, usize)>,
    /// Slots worth polling: what moved lately.
    active: Vec<usize>,
    ended: Vec<Ended>,
    spin: Duration,
    /// Evidence for polling before sleeping, 0 to 8.
    spin_pays: u32,
    /// How long a turn without anything to do lasts while storage has work of ours: a moving average.
    storage_wait: Duration,
    /// Connections whose requests must not wait any more.
    leaving: usize,
    /// It ends, and clients may take their replies until then.
    stopping: Option<Instant>,
}

/// Starts loop number `index`.
pub fn start(index: usize, settings: LoopSettings) -> std::io::Result<JoinHandle<()>> {
    let ring = if settings.use_ring { Some(Ring::new(RING_ENTRIES)?) } else { None };
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    epoll::add(&epoll, &settings.inbox.event, epoll::EventData::new_u64(INBOX), epoll::EventFlags::IN)?;
    if let Some(ring) = &ring {
        epoll::add(&epoll, ring.fd(), epoll::EventData::new_u64(RING), epoll::EventFlags::IN)?;
    }
    let bench = Workbench {
        queue: Queue::new(ring, settings.pool, settings.inbox.clone(), settings.shard),
        buffers: BufferPool::new(settings.buffers.min(BUFFERS)),
        inbox: settings.inbox.clone(),
        arena: Arena::new(ARENA),
        zeros: Vec::new(),
        shard: settings.shard,
        was_idle: true,
    };
    let mut this = Loop {
        inbox: settings.inbox,
        bench,
        input: Buffer::new(INPUT),
        epoll,
        members: Slab::new(),
        count: settings.connections,
        stalls: BTreeSet::new(),
        active: Vec::new(),
        ended: Vec::new(),
        spin: settings.spin,
        spin_pays: 4,
        storage_wait: Duration::ZERO,
        leaving: 0,
        stopping: None,
    };
    std::thread::Builder::new().name(format!("blkloom-loop{index}")).spawn(move || {
        let _last_resort = AbortOnPanic;
        this.run();
    })
}

/// A loop that unwound would free memory the kernel still reads and writes, and leave everybody who
/// waits for it waiting for ever: the process ends instead, and its supervisor starts another.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}

impl Loop {
    fn run(&mut self) {
        // Since when nothing moved, and whether storage had work of ours then.
        let mut idle_since: Option<(Instant, bool)> = None;
        let mut turn = 0u32;
        loop {
            turn = turn.wrapping_add(1);
            let moved = self.turn();
            self.bench.was_idle = !moved;
            if self.stopping.is_some() && self.members.is_empty() && self.bench.queue.is_idle() {
                return;
            }
            if moved {
                if let Some((since, on_storage)) = idle_since.take() {
                    self.learn(since.elapsed(), on_storage);
                }
                // Those not polled must not starve while the polled ones are busy.
                if self.members.len() > self.active.len() && turn.is_multiple_of(16) {
                    self.ask(Some(Duration::ZERO));
                }
                continue;
            }
            let now = Instant::now();
            let (since, on_storage) = *idle_since.get_or_insert_with(|| (now, self.bench.queue.is_in_storage()));
            if now.duration_since(since) < self.patience(on_storage) {
                if self.members.len() > self.active.len() && turn.is_multiple_of(4) {
                    self.ask(Some(Duration::ZERO));
                }
                std::thread::yield_now();
                continue;
            }
            self.sleep(now);
            if let Some((since, on_storage)) = idle_since.take() {
                self.learn(since.elapsed(), on_storage);
            }
        }
    }

    /// How long to poll before sleeping.
    fn patience(&self, on_storage: bool) -> Duration {
        if on_storage && !self.spin.is_zero() && self.storage_wait < STORAGE_SPIN {
            return STORAGE_SPIN.max(self.spin);
        }
        if self.spin_pays > 0 { self.spin } else { Duration::ZERO }
    }

    /// Something moved after `waited`. A wait shorter than twice the polling time was, or would nearly
    /// have been, caught by polling.
    fn learn(&mut self, waited: Duration, on_storage: bool) {
        if on_storage {
            self.storage_wait = (self.storage_wait * 7 + waited.min(8 * STORAGE_SPIN)) / 8;
        } else if waited < 2 * self.spin {
            self.spin_pays = (self.spin_pays + 1).min(8);
        } else {
            self.spin_pays = self.spin_pays.saturating_sub(1);
        }
    }

    fn sleep(&mut self, now: Instant) {
        self.forget_waiting();
        if !self.active.is_empty() || !self.inbox.doze() {
            return;
        }
        let stall = self.stalls.first().map(|(at, _)| *at);
        let retry = self.bench.queue.is_unsubmitted().then(|| now + RETRY_SUBMIT);
        let stop = self.stopping.filter(|_| self.members.iter().any(|(_, member)| member.connection.wants_output()));
        let deadline = [self.bench.queue.next_deadline(), stall, retry, stop].into_iter().flatten().min();
        // Rounded up: waking a little early would only poll until the deadline.
        let wait = |at: Instant| (at.saturating_duration_since(now) + Duration::from_millis(1)).min(LONGEST_SLEEP);
        let timeout = deadline.map(wait);
        self.ask(timeout);
        self.inbox.woke();
    }

    /// Leaves to epoll all connections but those that can go on with what they received already: of
    /// them it will never tell.
    fn forget_waiting(&mut self) {
        let members = &self.members;
        self.active.retain(|&slot| members.get(slot).is_some_and(|member| member.connection.can_go_on()));
    }

    /// Asks epoll what is ready, waiting up to `timeout`.
    fn ask(&mut self, timeout: Option<Duration>) {
        let timeout =
            timeout.map(|left| Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() });
        let mut events = [const { std::mem::MaybeUninit::<epoll::Event>::uninit() }; 64];
        let ready = match epoll::wait(&self.epoll, &mut events, timeout.as_ref()) {
            Ok((ready, _)) => ready,
            Err(Errno::INTR) => return,
            Err(error) => {
                debug_assert!(false, "epoll_wait: {error}");
                return;
            }
        };
        if self.members.len() > FEW {
            self.forget_waiting();
        }
        for event in ready.iter() {
            let key = event.data.u64();
            if key == INBOX {
                self.inbox.clear();
            }
            let slot = key as usize;
            let Some(member) = self.members.get_mut(slot).filter(|_| key < RING) else {
                continue;
            };
            let (flags, broken) = (event.flags, epoll::EventFlags::HUP | epoll::EventFlags::ERR);
            if flags.intersects(broken) && !member.connection.wants_input() {
                // Reported for ever, and not seen by a receive while the connection takes none.
                member.connection.gone("the client hung up");
                self.settle(slot, true);
            } else if !self.active.contains(&slot) {
                self.active.push(slot);
            }
        }
    }

    /// One turn; whether anything moved.
    fn turn(&mut self) -> bool {
        let mut moved = false;
        if self.inbox.has_messages() {
            for message in self.inbox.take() {
                moved = true;
                self.message(message);
            }
        }
        moved |= self.bench.queue.reap();
        let mut at = 0;
        while at < self.active.len() {
            let slot = self.active[at];
            match self.members.get_mut(slot) {
                Some(member) => {
                    let mut this = member.connection.pump(slot, &mut self.bench, &mut self.input);
                    if member.connection.wants_output() {
                        let before = member.connection.waiting_output();
                        member.connection.send(&mut self.bench);
                        this |= member.connection.waiting_output() != before;
                    }
                    moved |= this;
                    if this || member.connection.is_over() {
                        self.settle(slot, true);
                    }
                    at += 1;
                }
                None => {
                    self.active.swap_remove(at);
                }
            }
        }
        // Before the ring and the ended are looked at: what expires may end requests or start more I/O.
        self.expire();
        self.bench.queue.submit_ring();
        if self.leaving > 0 {
            moved |= self.take_back();
        }
        moved |= self.finish_ended();
        moved
    }

    /// Gives requests that only wait, at gates or held, back to connections that are leaving. Where nobody is left
    /// to go on with such a connection, they fail.
    fn take_back(&mut self) -> bool {
        let members = &self.members;
        let of = |ticket: &Ticket| {
            members.get(ticket.slot).map(|member| &member.connection).filter(|connection| connection.id == ticket.id)
        };
        let withdrawn = self.bench.queue.withdraw(|ticket| of(ticket).is_some_and(Connection::is_leaving));
        let any = !withdrawn.is_empty();
        for request in withdrawn {
            let Owner::Connection(Ticket { slot, .. }) = request.owner else {
                continue;
            };
            match self.members.get_mut(slot).map(|member| &mut member.connection) {
                Some(connection) if connection.is_detaching() => {
                    connection.take_back(request, &mut self.bench);
                    self.settle(slot, true);
                }
                _ => self.ended.push(Ended { request, error: ESHUTDOWN, found: Vec::new() }),
            }
        }
        any
    }

    fn message(&mut self, message: Message) {
        match message {
            Message::Submit(request) => self.bench.queue.submit(*request),
            Message::Worked(task, work) => self.bench.queue.worked(task, work),
            Message::Answered(task, answer) => self.bench.queue.answered(task, answer),
            Message::GateOpened(task) => self.bench.queue.gate_opened(task),
            Message::Released(task) => self.bench.queue.released(task),
            Message::HoldRefused(task) => self.bench.queue.hold_refused(task),
            Message::Reserved { slot, id, reservation } => {
                if let Some(member) = self.members.get_mut(slot).filter(|member| member.connection.id == id) {
                    member.connection.reserved(reservation);
                    if !self.active.contains(&slot) {
                        self.active.push(slot);
                    }
                }
            }
            Message::Serve(connection) => self.serve(*connection),
            Message::CloseConnection(id) => {
                if let Some((slot, _)) = self.members.iter().find(|(_, member)| member.connection.id == id) {
                    self.close(slot);
                }
            }
            Message::DetachConnection { id, drain } => {
                if let Some((slot, member)) = self.members.iter_mut().find(|(_, member)| member.connection.id == id) {
                    member.connection.detach(drain);
                    self.settle(slot, true);
                }
            }
            Message::Stop => {
                // What can be given back must not be failed with the rest.
                self.take_back();
                self.stopping = Some(Instant::now() + LAST_REPLIES);
                self.bench.queue.stop();
                let slots: Vec<usize> = self.members.iter().map(|(slot, _)| slot).collect();
                slots.into_iter().for_each(|slot| self.close(slot));
            }
        }
    }

    fn serve(&mut self, connection: Connection) {
        let slot =
            self.members.insert(Member { connection, interest: None, stalls_at: None, taken: None, leaving: false });
        if self.stopping.is_some() {
            self.close(slot);
            return;
        }
        self.active.push(slot);
        self.settle(slot, true);
    }

    fn close(&mut self, slot: usize) {
        self.members[slot].connection.end("closed by the server");
        self.settle(slot, true);
    }

    /// Answers what the queue has finished; sends once a connection.
    fn finish_ended(&mut self) -> bool {
        self.bench.queue.take_ended(&mut self.ended);
        let any = !self.ended.is_empty();
        let mut touched = Vec::new();
        for mut ended in std::mem::take(&mut self.ended) {
            let request = &mut ended.request;
            let bytes = if ended.error == 0 { request.len } else { 0 };
            let latency = nanoseconds(request.started);
            request.device.stats().end(self.bench.shard, request.op, 1, bytes, u64::from(ended.error != 0), latency);
            let nobody = Owner::Nobody;
            match std::mem::replace(&mut request.owner, nobody) {
                Owner::Connection(ticket) => {
                    let slot = ticket.slot;
                    let member = self.members.get_mut(slot).filter(|m| m.connection.id == ticket.id);
                    if let Some(member) = member {
                        member.connection.finish(ticket, ended, &mut self.bench);
                        if !touched.contains(&slot) {
                            touched.push(slot);
                        }
                    }
                }
                owner => owner.complete(ended.error, ended.found),
            }
        }
        for slot in touched {
            if let Some(member) = self.members.get_mut(slot) {
                member.connection.send(&mut self.bench);
                if member.connection.can_go_on() && !self.active.contains(&slot) {
                    self.active.push(slot);
                }
            }
            self.settle(slot, true);
        }
        any
    }

    /// After a connection changed: what epoll watches, when it stalls, whether it is over.
    fn settle(&mut self, slot: usize, progress: bool) {
        let Some(member) = self.members.get_mut(slot) else {
            return;
        };
        member.connection.count_kept();
        if member.connection.is_leaving() && !member.leaving {
            member.leaving = true;
            self.leaving += 1;
        }
        // While replies wait nothing else counts: who sends requests and takes no replies would keep memory for ever.
        let taken = member.connection.taken();
        let progress = progress && (taken.is_none() || taken != member.taken);
        member.taken = taken;
        if let Some(at) = member.stalls_at
            && (progress || !member.connection.is_waiting() || member.connection.is_over())
        {
            self.stalls.remove(&(at, slot));
            member.stalls_at = None;
        }
        if member.connection.is_over() {
            if member.interest.is_some() {
                let _watched = epoll::delete(&self.epoll, member.connection.fd());
            }
            let member = self.members.remove(slot);
            self.leaving -= usize::from(member.leaving);
            self.active.retain(|&other| other != slot);
            self.count.fetch_sub(1, Ordering::Relaxed);
            member.connection.announce();
            return;
        }
        if member.stalls_at.is_none() && member.connection.is_waiting() {
            let at = Instant::now() + member.connection.stall;
            member.stalls_at = Some(at);
            self.stalls.insert((at, slot));
        }
        let mut wanted = epoll::EventFlags::empty();
        if member.connection.wants_input() {
            wanted |= epoll::EventFlags::IN;
        }
        if member.connection.wants_output() {
            wanted |= epoll::EventFlags::OUT;
        }
        // A connection nobody listens to any more reports its hang-up for ever: not watched at all.
        let wanted = (!member.connection.is_gone()).then_some(wanted);
        if wanted == member.interest {
            return;
        }
        let (fd, data) = (member.connection.fd(), epoll::EventData::new_u64(slot as u64));
        let changed = match (member.interest, wanted) {
            (None, Some(flags)) => epoll::add(&self.epoll, fd, data, flags),
            (Some(_), Some(flags)) => epoll::modify(&self.epoll, fd, data, flags),
            (_, None) => epoll::delete(&self.epoll, fd),
        };
        member.interest = wanted;
        if let Err(error) = changed {
            member.interest = None;
            member.connection.gone(&format!("epoll: {error}"));
            self.settle(slot, true);
        }
    }

    /// Drops clients that stopped half-way, and fails faults nobody answered.
    fn expire(&mut self) {
        if self.stalls.is_empty() && self.bench.queue.next_deadline().is_none() {
            return; // one that has replies to take is among the stalls
        }
        let now = Instant::now();
        if self.stopping.is_some_and(|until| until <= now) {
            let late = self.members.iter().filter(|(_, member)| member.connection.wants_output());
            let late: Vec<usize> = late.map(|(slot, _)| slot).collect();
            for slot in late {
                self.members[slot].connection.gone("the client did not take its replies before the server ended");
                self.settle(slot, true);
            }
        }
        self.bench.queue.expire(now);
        while let Some(&(at, slot)) = self.stalls.first()
            && at <= now
        {
            self.stalls.remove(&(at, slot));
            if let Some(member) = self.members.get_mut(slot) {
                member.stalls_at = None;
                member.connection.gone("the client stalled in the middle of a request or of its replies");
            }
            self.settle(slot, true);
        }
    }
}
