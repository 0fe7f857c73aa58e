//! The engine: event loops, started when first needed, and the thread pool that they share.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use blkloom_io::Errno;
use blkloom_io::{Process, Ring};

use crate::budget::{Budget, MemoryUse};
use crate::clock::nanoseconds;
use crate::device::Export;
use crate::driven::{Driven, DrivenHandle};
use crate::event_loop::{self, LoopSettings, Message, Processors, Serving};
use crate::lock;
use crate::log;
use crate::mailbox::Mailbox;
use crate::notice::Recipient;
use crate::pool::Pool;
use crate::request::Request;
use crate::stats::Shard;
use crate::transport::Transport;

/// Default memory budget for clients, in bytes.
const MEMORY: usize = 256 << 20;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IoChoice {
    Auto,
    Ring,
    Threads,
}

#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error("io_uring is not available here: {0}")]
    NoRing(std::io::Error),
    #[error("{0}: {1}")]
    Os(&'static str, std::io::Error),
    #[error("the engine is closed")]
    Closed,
}

/// One event loop.
struct Member {
    mailbox: Arc<Mailbox<Message>>,
    /// Number of transports on this loop.
    transports: Arc<AtomicUsize>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// Event loops with a thread pool and a memory budget.
pub struct Engine {
    use_ring: bool,
    /// A loop whose io_uring cannot be created uses threads instead.
    may_do_without: bool,
    count: usize,
    processors: Arc<Processors>,
    spin: Duration,
    pool: Arc<Pool>,
    budget: Arc<Budget>,
    members: OnceLock<Result<Vec<Member>, String>>,
    next: AtomicUsize,
    next_transport: AtomicU64,
    closed: Mutex<bool>,
    home: Process,
}

/// A handle to close or detach a transport that an engine serves.
pub struct TransportHandle {
    mailbox: Arc<Mailbox<Message>>,
    number: u64,
}

impl TransportHandle {
    pub fn close(&self) {
        self.mailbox.send(Message::Close(self.number));
    }

    /// Detaches the peer from this engine; the peer does not notice. The notice carries the state that the next engine
    /// needs. From then on `close` does nothing. drain: wait until the peer has received its replies, or until a
    /// `detach` without `drain`.
    pub fn detach(&self, drain: bool) {
        self.mailbox.send(Message::Detach { number: self.number, drain });
    }
}

impl Engine {
    /// loops: number of event loops, 0 for one per CPU.
    pub fn new(loops: usize, io: IoChoice, spin: Duration, threads: usize) -> Result<Engine, EngineError> {
        log::install();
        // As large as the rings of the loops: a smaller ring may be allowed where theirs is not.
        let use_ring = match (io, Ring::new(event_loop::RING_ENTRIES)) {
            (IoChoice::Threads, _) => false,
            (IoChoice::Ring, Err(error)) => return Err(EngineError::NoRing(error)),
            (IoChoice::Auto, Err(error)) => {
                say_that_there_is_no_ring(&error);
                false
            }
            (_, Ok(_)) => true,
        };
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let processors = Arc::new(Processors::new(cpus));
        Ok(Engine {
            use_ring,
            may_do_without: io == IoChoice::Auto,
            count: if loops == 0 { cpus } else { loops }.clamp(1, 64),
            processors,
            spin,
            pool: Arc::new(Pool::new(threads)),
            budget: Budget::new(MEMORY),
            members: OnceLock::new(),
            next: AtomicUsize::new(0),
            next_transport: AtomicU64::new(1),
            closed: Mutex::new(false),
            home: Process::current(),
        })
    }

    /// Sets the memory budget for clients. Must be called before the first client is served.
    pub fn with_memory(mut self, bytes: usize) -> Engine {
        self.budget = Budget::new(bytes);
        self
    }

    /// The memory budget for clients.
    pub fn budget(&self) -> &Arc<Budget> {
        &self.budget
    }

    pub fn memory_use(&self) -> MemoryUse {
        self.budget.memory_use()
    }

    /// False in a fork of the process that created the engine. Its threads do not exist there, and the engine must not
    /// be used.
    pub fn is_here(&self) -> bool {
        self.home.is_current()
    }

    pub fn uses_ring(&self) -> bool {
        self.use_ring
    }

    pub fn loops(&self) -> usize {
        self.count
    }

    fn members(&self) -> Result<&[Member], EngineError> {
        let started = self.members.get_or_init(|| {
            (0..self.count).map(|index| self.start_loop(index)).collect::<Result<_, _>>().map_err(|e| e.to_string())
        });
        started.as_deref().map_err(|error| EngineError::Os("starting a loop", std::io::Error::other(error.clone())))
    }

    fn start_loop(&self, index: usize) -> Result<Member, EngineError> {
        let mailbox = Arc::new(Mailbox::new().map_err(|error| EngineError::Os("eventfd", error))?);
        let transports = Arc::new(AtomicUsize::new(0));
        let settings = LoopSettings {
            mailbox: mailbox.clone(),
            pool: self.pool.clone(),
            use_ring: self.use_ring,
            spin: self.spin,
            shard: Shard::of_loop(index),
            buffers: self.budget.at_hand() / self.count,
            count: transports.clone(),
            processors: self.processors.clone(),
        };
        let thread = match event_loop::start(index, settings.clone()) {
            Err(error) if self.use_ring && self.may_do_without => {
                tracing::warn!(%error, index, "io_uring could not be set up for a loop; the loop uses threads");
                event_loop::start(index, LoopSettings { use_ring: false, ..settings })
            }
            started => started,
        };
        let thread = thread.map_err(|error| EngineError::Os("starting a loop", error))?;
        Ok(Member { mailbox, transports, thread: Mutex::new(Some(thread)) })
    }

    /// Submits a request to one of the loops.
    pub fn submit(&self, request: Request) {
        let closed = lock(&self.closed);
        match self.members() {
            Ok(members) if !*closed => {
                let next = self.next.fetch_add(1, Ordering::Relaxed);
                members[next % members.len()].mailbox.send(Message::Submit(Box::new(request)));
            }
            _ => {
                let latency = nanoseconds(request.started);
                request.device.stats().end(Shard::of_caller(), request.op, 1, 0, 1, latency);
                request.owner.complete(Some(Errno::SHUTDOWN), Vec::new());
            }
        }
    }

    /// Serves a transport on the loop that has the fewest transports. The recipient is notified when it ends.
    pub fn serve(
        &self,
        export: &Arc<Export>,
        transport: Box<dyn Transport>,
        recipient: Recipient,
    ) -> Result<TransportHandle, EngineError> {
        let closed = lock(&self.closed);
        if *closed {
            return Err(EngineError::Closed);
        }
        let members = self.members()?;
        if transport.reserves() > 0 {
            self.pool.start().map_err(|error| EngineError::Os("starting a thread", error))?;
        }
        let next = self.next.fetch_add(1, Ordering::Relaxed);
        let order = (0..members.len()).map(|i| &members[(next + i) % members.len()]);
        let Some(member) = order.min_by_key(|member| member.transports.load(Ordering::Relaxed)) else {
            return Err(EngineError::Closed);
        };
        let number = self.next_transport.fetch_add(1, Ordering::Relaxed);
        member.transports.fetch_add(1, Ordering::Relaxed);
        export.begin(transport.kind());
        let export = export.clone();
        member.mailbox.send(Message::Serve(Box::new(Serving { transport, number, export, recipient })));
        Ok(TransportHandle { mailbox: member.mailbox.clone(), number })
    }

    /// Drives a backend's descriptor on one of the loops: on another one for each `index`.
    pub(crate) fn drive(
        &self,
        index: usize,
        driven: impl FnOnce(DrivenHandle) -> Box<dyn Driven>,
    ) -> Result<(), EngineError> {
        let closed = lock(&self.closed);
        if *closed {
            return Err(EngineError::Closed);
        }
        let members = self.members()?;
        let mailbox = members[index % members.len()].mailbox.clone();
        let number = self.next_transport.fetch_add(1, Ordering::Relaxed);
        let driven = driven(DrivenHandle { mailbox: mailbox.clone(), number });
        mailbox.send(Message::Drive(driven, number));
        Ok(())
    }

    /// Closes all transports, finishes the requests in flight and joins the loops. A peer has
    /// `event_loop::LAST_REPLIES` to receive its replies. Later requests fail with ESHUTDOWN. Does nothing in a fork,
    /// where the loops do not exist.
    pub fn close(&self) {
        if !self.is_here() {
            return;
        }
        *lock(&self.closed) = true;
        if let Some(Ok(members)) = self.members.get() {
            members.iter().for_each(|member| member.mailbox.send(Message::Stop));
            for member in members {
                if let Some(thread) = lock(&member.thread).take() {
                    // A loop that panicked aborts the process, so the result is of no use.
                    let _joined = thread.join();
                }
            }
        }
        self.pool.stop();
    }
}

/// Logs once, for this process and its forks.
fn say_that_there_is_no_ring(error: &std::io::Error) {
    static SAID: AtomicBool = AtomicBool::new(false);
    if !SAID.swap(true, Ordering::Relaxed) {
        tracing::warn!(%error, "io_uring is not available here; threads are used instead, which is slower");
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if self.is_here() {
            self.close();
        } else {
            // The threads do not exist in a fork: their handles must not even be dropped.
            std::mem::forget(self.members.take());
        }
    }
}
