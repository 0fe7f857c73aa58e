//! The engine: loops, started when first needed, and the pool they share.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use blkloom_io::errno::ESHUTDOWN;
use blkloom_io::{Process, Ring};

use crate::budget::{Budget, MemoryUse};
use crate::call::nanoseconds;
use crate::device::Export;
use crate::inbox::{Inbox, Message};
use crate::lock;
use crate::looper::{self, LoopSettings};
use crate::nbd::{Connection, Session};
use crate::notice::Notices;
use crate::pool::Pool;
use crate::request::Request;
use crate::stats::Shard;

/// What an engine keeps for its clients, unless told otherwise.
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

/// What a connection of NBD's transmission phase was told by its handshake.
pub struct NbdSession {
    pub export: Arc<Export>,
    pub fd: OwnedFd,
    pub session: Session,
    pub notices: Arc<Notices>,
    pub token: u64,
}

struct Member {
    inbox: Arc<Inbox>,
    connections: Arc<AtomicUsize>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

pub struct Engine {
    use_ring: bool,
    /// A loop that gets no ring of its own after all goes without.
    may_do_without: bool,
    count: usize,
    spin: Duration,
    pool: Arc<Pool>,
    budget: Arc<Budget>,
    members: OnceLock<Result<Vec<Member>, String>>,
    next: AtomicUsize,
    next_connection: AtomicU64,
    closed: Mutex<bool>,
    home: Process,
}

/// A served connection, for ending it.
pub struct ConnectionHandle {
    inbox: Arc<Inbox>,
    id: u64,
}

impl ConnectionHandle {
    pub fn close(&self) {
        self.inbox.send(Message::CloseConnection(self.id));
    }

    /// Lets go of the client without its noticing; the notice brings what the next engine needs. From
    /// then on `close` does nothing. drain: not before the client has taken its replies, or `detach` without `drain`.
    pub fn detach(&self, drain: bool) {
        self.inbox.send(Message::DetachConnection { id: self.id, drain });
    }
}

impl Engine {
    /// loops: 0 for one a CPU.
    pub fn new(loops: usize, io: IoChoice, spin: Duration, threads: usize) -> Result<Engine, EngineError> {
        // As large as the loops': a small one may be allowed where that is not.
        let use_ring = match (io, Ring::new(looper::RING_ENTRIES)) {
            (IoChoice::Threads, _) => false,
            (IoChoice::Ring, Err(error)) => return Err(EngineError::NoRing(error)),
            (_, probed) => probed.is_ok(),
        };
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Engine {
            use_ring,
            may_do_without: io == IoChoice::Auto,
            count: if loops == 0 { cpus } else { loops }.clamp(1, 64),
            spin,
            pool: Arc::new(Pool::new(threads)),
            budget: Budget::new(MEMORY),
            members: OnceLock::new(),
            next: AtomicUsize::new(0),
            next_connection: AtomicU64::new(1),
            closed: Mutex::new(false),
            home: Process::current(),
        })
    }

    /// With another budget of memory for what clients make it keep. Before the first of them comes.
    pub fn with_memory(mut self, bytes: usize) -> Engine {
        self.budget = Budget::new(bytes);
        self
    }

    pub fn memory_use(&self) -> MemoryUse {
        self.budget.memory_use()
    }

    /// False in a fork of the process that made it: its threads are not there, and nothing of it may be used.
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
        let inbox = Arc::new(Inbox::new().map_err(|error| EngineError::Os("eventfd", error))?);
        let connections = Arc::new(AtomicUsize::new(0));
        let settings = LoopSettings {
            inbox: inbox.clone(),
            pool: self.pool.clone(),
            use_ring: self.use_ring,
            spin: self.spin,
            shard: Shard::of_loop(index),
            buffers: self.budget.at_hand() / self.count,
            connections: connections.clone(),
        };
        let thread = match looper::start(index, settings.clone()) {
            Err(_) if self.may_do_without => looper::start(index, LoopSettings { use_ring: false, ..settings }),
            started => started,
        };
        let thread = thread.map_err(|error| EngineError::Os("starting a loop", error))?;
        Ok(Member { inbox, connections, thread: Mutex::new(Some(thread)) })
    }

    /// Gives a request to a loop.
    pub fn submit(&self, request: Request) {
        let closed = lock(&self.closed);
        match self.members() {
            Ok(members) if !*closed => {
                let turn = self.next.fetch_add(1, Ordering::Relaxed);
                members[turn % members.len()].inbox.send(Message::Submit(Box::new(request)));
            }
            _ => {
                let latency = nanoseconds(request.started);
                request.device.stats().end(Shard::of_caller(), request.op, 1, 0, 1, latency);
                request.owner.complete(ESHUTDOWN, Vec::new());
            }
        }
    }

    /// Serves a connection on the loop that has the fewest.
    pub fn serve_nbd(&self, session: NbdSession) -> Result<ConnectionHandle, EngineError> {
        let closed = lock(&self.closed);
        if *closed {
            return Err(EngineError::Closed);
        }
        let members = self.members()?;
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        let order = (0..members.len()).map(|i| &members[(turn + i) % members.len()]);
        let Some(member) = order.min_by_key(|member| member.connections.load(Ordering::Relaxed)) else {
            return Err(EngineError::Closed);
        };
        let id = self.next_connection.fetch_add(1, Ordering::Relaxed);
        member.connections.fetch_add(1, Ordering::Relaxed);
        member.inbox.send(Message::Serve(Box::new(Connection::new(id, session, self.budget.clone()))));
        Ok(ConnectionHandle { inbox: member.inbox.clone(), id })
    }

    /// Closes connections, finishes what is in flight and joins the loops. A client has `looper::LAST_REPLIES` to take
    /// its replies. Later requests get ESHUTDOWN. Nothing in a fork: the loops are the parent's.
    pub fn close(&self) {
        if !self.is_here() {
            return;
        }
        *lock(&self.closed) = true;
        if let Some(Ok(members)) = self.members.get() {
            members.iter().for_each(|member| member.inbox.send(Message::Stop));
            for member in members {
                if let Some(thread) = lock(&member.thread).take() {
                    // A loop that panicked has said so; there is nothing left to join.
                    let _joined = thread.join();
                }
            }
        }
        self.pool.stop();
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if self.is_here() {
            self.close();
        } else {
            // Handles of threads that are not there must not even be dropped.
            std::mem::forget(self.members.take());
        }
    }
}
