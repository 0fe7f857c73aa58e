//! An event loop: one thread that owns transports, a queue and an io_uring, and uses them without locks.
//!
//! Each iteration processes messages, completions and the input of active transports. When an iteration finds no work,
//! the loop keeps polling for a short time, because waking a sleeping thread is expensive, and then sleeps in epoll.
//! The polling time adapts: short waits make polling more likely, long waits make it less likely.

mod drives;
mod members;

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use blkloom_io::{Buffer, BufferPool, Ring};
use rustix::event::epoll::EventFlags;
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use slab::Slab;

use self::drives::Drive;
use self::members::Member;
pub use self::members::Serving;
use crate::budget::Granted;
use crate::driven::Driven;
use crate::fault::Answered;
use crate::mailbox::Mailbox;
use crate::pool::{JobDone, Pool};
use crate::queue::{Ended, Ports, Queue};
use crate::request::{Request, TransportId};
use crate::stats::Shard;
use crate::transport::{Arena, LoopContext};
use crate::wake::Wake;

const INPUT: usize = 256 << 10;
const ARENA: usize = 1 << 20;
const BUFFERS: usize = 64 << 20;
pub const RING_ENTRIES: u32 = 256;
/// Up to this many transports are polled without asking epoll which of them are ready.
const FEW: usize = 4;
/// When the kernel is too busy to accept submissions, the loop submits them again after this time.
const RETRY_SUBMIT: Duration = Duration::from_millis(1);
/// A loop polls up to this long for storage if storage usually answers within this time. A sleeping loop would be woken
/// on the client's CPU, and both would share that CPU while others are idle.
const STORAGE_SPIN: Duration = Duration::from_micros(600);
/// Longest timeout that epoll of every supported kernel accepts.
const LONGEST_SLEEP: Duration = Duration::from_secs(86400);
/// Time for peers to receive their replies when a loop stops.
pub const LAST_REPLIES: Duration = Duration::from_secs(1);
const MAILBOX: u64 = u64::MAX;
const RING: u64 = u64::MAX - 1;
/// Bit of the epoll keys of a backend's descriptors.
const DRIVEN: u64 = 1 << 62;

/// A message from another thread to a loop.
pub enum Message {
    Submit(Box<Request>),
    /// A pool thread has finished a task's job.
    JobDone(JobDone),
    /// A fault was answered, or a backend has completed an operation.
    Answered(Answered),
    Woken(Wake),
    Granted(Granted),
    Serve(Box<Serving>),
    /// Drives a backend's descriptor, which has this number.
    Drive(Box<dyn Driven>, u64),
    /// Polls the backend's descriptor with this number.
    Kick(u64),
    /// Closes the transport with this number.
    Close(u64),
    Detach {
        number: u64,
        drain: bool,
    },
    Stop,
}

impl From<JobDone> for Message {
    fn from(done: JobDone) -> Message {
        Message::JobDone(done)
    }
}

impl From<Answered> for Message {
    fn from(answered: Answered) -> Message {
        Message::Answered(answered)
    }
}

impl From<Wake> for Message {
    fn from(wake: Wake) -> Message {
        Message::Woken(wake)
    }
}

impl From<Granted> for Message {
    fn from(granted: Granted) -> Message {
        Message::Granted(granted)
    }
}

#[derive(Clone)]
pub struct LoopSettings {
    pub mailbox: Arc<Mailbox<Message>>,
    pub pool: Arc<Pool>,
    pub use_ring: bool,
    pub spin: Duration,
    pub shard: Shard,
    /// Number of transports on this loop.
    pub count: Arc<AtomicUsize>,
    pub processors: Arc<Processors>,
    /// Bytes of buffers to keep for the next requests.
    pub buffers: usize,
}

/// Number of CPUs for this process, and number of its loops that are awake.
pub struct Processors {
    count: usize,
    awake: AtomicUsize,
}

impl Processors {
    pub fn new(count: usize) -> Processors {
        Processors { count, awake: AtomicUsize::new(0) }
    }

    /// Whether a CPU is free for a client beside the loops that are awake.
    fn has_one_for_a_client(&self) -> bool {
        self.awake.load(Ordering::Relaxed) < self.count
    }
}

struct Loop {
    mailbox: Arc<Mailbox<Message>>,
    /// Empty between two iterations, as `touched` is: their memory is used again.
    messages: Vec<Message>,
    context: LoopContext,
    input: Buffer,
    epoll: OwnedFd,
    members: Slab<Member>,
    drives: Slab<Drive>,
    /// Slots of the backends' descriptors to poll, as `active`.
    active_drives: Vec<usize>,
    /// Number of transports, including those that a message still brings.
    count: Arc<AtomicUsize>,
    processors: Arc<Processors>,
    stalls: BTreeSet<(Instant, usize)>,
    /// Slots of the transports to poll: those with recent activity.
    active: Vec<usize>,
    ended: Vec<Ended>,
    /// The transports whose requests have ended in this iteration.
    touched: Vec<TransportId>,
    spin: Duration,
    /// Score for polling before sleep, 0 to 8. Short waits raise it, long waits lower it.
    spin_pays: u32,
    /// Average time that this loop waits while storage executes its I/O.
    storage_wait: Duration,
    /// Number of transports that are being detached: their waiting requests are withdrawn.
    leaving: usize,
    /// Set when the loop stops: peers may receive their replies until then.
    stopping: Option<Instant>,
}

/// Starts loop number `index`.
pub fn start(index: usize, settings: LoopSettings) -> std::io::Result<JoinHandle<()>> {
    let ring = if settings.use_ring { Some(Ring::new(RING_ENTRIES)?) } else { None };
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    epoll::add(&epoll, &settings.mailbox.event, epoll::EventData::new_u64(MAILBOX), EventFlags::IN)?;
    if let Some(ring) = &ring {
        epoll::add(&epoll, ring.fd(), epoll::EventData::new_u64(RING), EventFlags::IN)?;
    }
    let context = LoopContext {
        transport: TransportId::NONE,
        queue: Queue::new(ring, settings.pool, Ports::of(&settings.mailbox), settings.shard),
        buffers: BufferPool::new(settings.buffers.min(BUFFERS)),
        grants: settings.mailbox.clone(),
        arena: Arena::new(ARENA),
        zeros: Vec::new(),
        shard: settings.shard,
        replies_early: true,
    };
    let mut this = Loop {
        mailbox: settings.mailbox,
        messages: Vec::new(),
        context,
        input: Buffer::new(INPUT),
        epoll,
        members: Slab::new(),
        drives: Slab::new(),
        active_drives: Vec::new(),
        count: settings.count,
        processors: settings.processors,
        stalls: BTreeSet::new(),
        active: Vec::new(),
        ended: Vec::new(),
        touched: Vec::new(),
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

/// Aborts the process when a loop panics. An unwinding loop would free memory that the kernel still reads and writes,
/// and threads that wait for the loop would wait for ever. The supervisor starts another process.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            crate::log::spill();
            std::process::abort();
        }
    }
}

impl Loop {
    fn run(&mut self) {
        // When the last idle period began, and whether storage was executing I/O of this loop then.
        let mut idle_since: Option<(Instant, bool)> = None;
        let mut iteration = 0u32;
        self.processors.awake.fetch_add(1, Ordering::Relaxed);
        loop {
            iteration = iteration.wrapping_add(1);
            let moved = self.iterate();
            self.context.replies_early = !moved && self.processors.has_one_for_a_client();
            if self.stopping.is_some() && self.members.is_empty() && self.context.queue.is_idle() {
                self.processors.awake.fetch_sub(1, Ordering::Relaxed);
                return;
            }
            if moved {
                if let Some((since, on_storage)) = idle_since.take() {
                    self.learn(since.elapsed(), on_storage);
                }
                // Transports that are not polled must not starve while the polled ones are busy.
                if self.has_unpolled() && iteration.is_multiple_of(16) {
                    self.ask(Some(Duration::ZERO));
                }
                continue;
            }
            let now = Instant::now();
            let (since, on_storage) = *idle_since.get_or_insert_with(|| (now, self.context.queue.is_in_storage()));
            if now.duration_since(since) < self.patience(on_storage) {
                if self.has_unpolled() && iteration.is_multiple_of(4) {
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

    fn has_unpolled(&self) -> bool {
        self.members.len() > self.active.len() || self.drives.len() > self.active_drives.len()
    }

    /// Time to poll before sleeping.
    fn patience(&self, on_storage: bool) -> Duration {
        if on_storage && !self.spin.is_zero() && self.storage_wait < STORAGE_SPIN {
            return STORAGE_SPIN.max(self.spin);
        }
        if self.spin_pays > 0 { self.spin } else { Duration::ZERO }
    }

    /// Adapts the polling after a wait. A wait shorter than twice the polling time counts as one that polling catches.
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
        self.rest_drives();
        if !self.active.is_empty() || !self.mailbox.doze() {
            return;
        }
        let stall = self.stalls.first().map(|(at, _)| *at);
        let retry = self.context.queue.is_unsubmitted().then(|| now + RETRY_SUBMIT);
        let stop =
            self.stopping.filter(|_| self.members.iter().any(|(_, member)| member.transport.status().taken.is_some()));
        let drive = self.next_drive_deadline();
        let deadline = [self.context.queue.next_timer(), stall, retry, stop, drive].into_iter().flatten().min();
        // Rounded up: waking early would only poll until the deadline.
        let wait = |at: Instant| (at.saturating_duration_since(now) + Duration::from_millis(1)).min(LONGEST_SLEEP);
        let timeout = deadline.map(wait);
        self.processors.awake.fetch_sub(1, Ordering::Relaxed);
        self.ask(timeout);
        self.processors.awake.fetch_add(1, Ordering::Relaxed);
        self.mailbox.woke();
    }

    /// Stops polling transports, except those that have unprocessed input: epoll does not report that input.
    fn forget_waiting(&mut self) {
        let members = &mut self.members;
        self.active.retain(|&slot| {
            members.get_mut(slot).is_some_and(|member| member.transport.status().ready || member.transport.rest())
        });
    }

    /// Waits in epoll for up to `timeout` and activates the transports that are ready.
    fn ask(&mut self, timeout: Option<Duration>) {
        let timeout =
            timeout.map(|left| Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() });
        let mut events = [const { std::mem::MaybeUninit::<epoll::Event>::uninit() }; 64];
        let ready = match epoll::wait(&self.epoll, &mut events, timeout.as_ref()) {
            Ok((ready, _)) => ready,
            Err(Errno::INTR) => return,
            // Impossible with a valid descriptor and valid memory, and the loop cannot run without epoll.
            Err(error) => panic!("epoll_wait: {error}"),
        };
        if self.members.len() > FEW {
            self.forget_waiting();
        }
        for event in ready.iter() {
            let key = event.data.u64();
            if key == MAILBOX {
                self.mailbox.clear();
            }
            if key < RING && key & DRIVEN != 0 {
                self.activate_driven((key & !DRIVEN) as usize);
                continue;
            }
            let slot = key as usize;
            let Some(member) = self.members.get_mut(slot).filter(|_| key < RING) else {
                continue;
            };
            let (flags, broken) = (event.flags, EventFlags::HUP | EventFlags::ERR);
            let reads = || member.transport.status().interest.is_some_and(|interest| interest.contains(EventFlags::IN));
            if flags.intersects(broken) && !reads() {
                // Epoll would report this for ever, and `poll` does not see it while the transport reads nothing.
                member.transport.hung_up();
                self.settle(slot, true);
            } else if !self.active.contains(&slot) {
                self.active.push(slot);
            }
        }
    }

    /// Runs one iteration. Returns whether there was any work.
    fn iterate(&mut self) -> bool {
        let mut moved = false;
        if self.mailbox.has_messages() {
            self.mailbox.take(&mut self.messages);
            self.messages.reverse();
            while let Some(message) = self.messages.pop() {
                moved = true;
                self.message(message);
            }
        }
        moved |= self.context.queue.reap();
        moved |= self.poll_drives();
        let mut at = 0;
        while at < self.active.len() {
            let slot = self.active[at];
            match self.members.get_mut(slot) {
                Some(member) => {
                    self.context.transport = TransportId { slot, number: member.number };
                    if member.transport.poll(&mut self.input, &mut self.context) {
                        moved = true;
                        self.settle(slot, true);
                    }
                    at += 1;
                }
                None => {
                    self.active.swap_remove(at);
                }
            }
        }
        // Before the ring and the ended requests: a timer may end requests or start more I/O.
        self.expire();
        self.expire_drives();
        self.context.queue.submit_ring();
        if self.leaving > 0 {
            moved |= self.take_back();
        }
        moved |= self.complete_ended();
        moved
    }

    fn message(&mut self, message: Message) {
        match message {
            Message::Submit(request) => self.context.queue.submit(*request),
            Message::JobDone(done) => self.context.queue.job_done(done),
            Message::Answered(answered) => self.context.queue.answered(answered),
            Message::Woken(wake) => self.context.queue.woken(wake),
            Message::Granted(Granted { transport: id, reservation }) => {
                if let Some(member) = self.member(id) {
                    member.transport.granted(reservation);
                    if !self.active.contains(&id.slot) {
                        self.active.push(id.slot);
                    }
                }
            }
            Message::Drive(driven, number) => self.drive(driven, number),
            Message::Kick(number) => self.kick(number),
            Message::Serve(serving) => self.serve(*serving),
            Message::Close(number) => {
                if let Some((slot, _)) = self.members.iter().find(|(_, member)| member.number == number) {
                    self.close(slot);
                }
            }
            Message::Detach { number, drain } => {
                if let Some((slot, member)) = self.members.iter_mut().find(|(_, member)| member.number == number) {
                    member.transport.detach(drain);
                    self.settle(slot, true);
                }
            }
            Message::Stop => {
                // Requests that can be withdrawn must not fail with the others.
                self.take_back();
                self.stopping = Some(Instant::now() + LAST_REPLIES);
                self.context.queue.stop();
                let slots: Vec<usize> = self.members.iter().map(|(slot, _)| slot).collect();
                slots.into_iter().for_each(|slot| self.close(slot));
            }
        }
    }
}
