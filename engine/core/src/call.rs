//! The in-process API: requests from threads of this process, without a client connection.
//!
//! The caller's thread executes the fast path itself. A loop executes the rest, and the caller waits for it or gets a
//! notice.

use std::sync::Arc;
use std::time::Instant;

use blkloom_io::{Ahead, Errno, Slice, Source};

use crate::clock::nanoseconds;
use crate::device::{Device, SuspendError};
use crate::engine::Engine;
use crate::fast_path::{self, Besides, Patience, Progress};
use crate::operation::{Context, Flags, Found};
use crate::request::{Memory, Owner, Request, Waiter};
use crate::stats::{Op, Shard};

/// Direction of a transfer, with the memory of its bytes.
#[derive(Clone, Copy)]
pub enum Direction<'m> {
    Read(Slice<'m>),
    Write(Source<'m>),
}

impl Direction<'_> {
    pub fn op(self) -> Op {
        match self {
            Direction::Read(_) => Op::Read,
            Direction::Write(_) => Op::Write,
        }
    }

    /// Bytes.
    #[allow(clippy::len_without_is_empty, reason = "a length of a transfer, not of a collection")]
    pub fn len(self) -> u64 {
        match self {
            Direction::Read(into) => into.len() as u64,
            Direction::Write(from) => from.len() as u64,
        }
    }
}

/// Largest read that is prefetched. The hardware prefetches larger reads, and they would evict each other.
const WORTH_FETCHING: u64 = 16 << 10;

/// Largest transfer that `attempt` executes. A loop executes larger ones, and the caller continues meanwhile.
const AT_ONCE: u64 = 256 << 10;

/// Distance of the prefetch in a batch, in transfers.
const AHEAD: usize = 2;

/// One read or write of a caller.
#[derive(Clone, Copy)]
pub struct Transfer<'m> {
    pub direction: Direction<'m>,
    pub offset: u64,
}

impl Transfer<'_> {
    /// Runs the fast path. next: memory that a queued read needs.
    fn now(&self, device: &Device, shard: Shard, patience: Patience, next: Option<Ahead>) -> Progress {
        match self.direction {
            Direction::Read(into) => {
                fast_path::read(device, shard, self.offset, into, patience, Besides { next, zeros: None })
            }
            Direction::Write(from) => fast_path::write(device, shard, self.offset, from, patience),
        }
    }

    /// The memory that it will copy from, if a prefetch is useful.
    fn source(&self, device: &Device, shard: Shard) -> Option<Ahead> {
        let len = self.direction.len();
        let pays = matches!(self.direction, Direction::Read(_)) && len <= WORTH_FETCHING;
        (pays && check(device, Op::Read, self.offset, len).is_ok())
            .then(|| fast_path::source(device, shard, self.offset, len))
    }

    /// Makes a request for the rest of the transfer, after `done` bytes.
    ///
    /// # Safety
    /// The request ends before the memory is released or used otherwise.
    unsafe fn rest(&self, device: &Arc<Device>, flags: Flags, done: u64, started: Instant, owner: Owner) -> Request {
        // SAFETY: the caller waits for the request's end.
        let memory = unsafe {
            match self.direction {
                Direction::Read(into) => Memory::Borrowed(Slice::new(into.as_ptr(), into.len())),
                Direction::Write(from) => Memory::Source(Slice::new(from.as_ptr().cast_mut(), from.len()).source()),
            }
        };
        Request {
            device: device.clone(),
            op: self.direction.op(),
            offset: self.offset,
            len: self.direction.len(),
            flags,
            memory,
            owner,
            started,
            context: None,
            done,
        }
    }
}

fn check(device: &Device, op: Op, offset: u64, len: u64) -> Result<(), Errno> {
    match offset.checked_add(len) {
        Some(end) if end <= device.size() => Ok(()),
        _ if device.closed() => Err(Errno::SHUTDOWN),
        _ if op == Op::Write || op == Op::WriteZeroes => Err(Errno::NOSPC),
        _ => Err(Errno::INVAL),
    }
}

impl Engine {
    /// Executes one transfer and waits for its end.
    pub fn transfer(&self, device: &Arc<Device>, transfer: Transfer<'_>, fua: bool) -> Result<(), Errno> {
        let (op, len) = (transfer.direction.op(), transfer.direction.len());
        check(device, op, transfer.offset, len)?;
        let (shard, started) = (Shard::of_caller(), Instant::now());
        device.stats.start(shard, 1);
        let attempt = match fua && device.needs_flush() {
            true => Progress::Queue(0),
            false => transfer.now(device, shard, Patience::Wait, None),
        };
        match attempt {
            Progress::Queue(done) => {
                let waiter = Waiter::new(1);
                let owner = Owner::Waiter { waiter: waiter.clone(), index: 0 };
                let flags = Flags { fua, ..Flags::default() };
                // SAFETY: the transfer's memory is there until this function returns, which is after the request's end.
                self.submit(unsafe { transfer.rest(device, flags, done, started, owner) });
                waiter.wait().0[0].map_or(Ok(()), Err)
            }
            now => {
                let result = if let Progress::Failed(errno) = now { Err(errno) } else { Ok(()) };
                let errors = u64::from(result.is_err());
                let bytes = if result.is_ok() { len } else { 0 };
                device.stats.end(shard, op, 1, bytes, errors, nanoseconds(started));
                result
            }
        }
    }

    /// Executes many transfers, in no order, and returns the error of each. Transfers that must wait for storage are
    /// submitted to the loops together.
    pub fn batch(&self, device: &Arc<Device>, batch: &[Transfer<'_>]) -> Vec<Option<Errno>> {
        let (shard, started) = (Shard::of_caller(), Instant::now());
        let mut results = vec![None; batch.len()];
        let mut queued = Vec::new();
        // (count, bytes, errors) per direction
        let mut sums = [(0, 0, 0); 2];
        device.stats.start(shard, batch.len() as u64);
        for (index, transfer) in batch.iter().enumerate() {
            let (op, len) = (transfer.direction.op(), transfer.direction.len());
            let next = batch.get(index + AHEAD).and_then(|next| next.source(device, shard));
            let attempt = match check(device, op, transfer.offset, len) {
                Ok(()) => transfer.now(device, shard, Patience::Nowait, next),
                Err(errno) => Progress::Failed(errno),
            };
            let sum = &mut sums[op as usize];
            match attempt {
                Progress::Done => *sum = (sum.0 + 1, sum.1 + len, sum.2),
                Progress::Failed(errno) => {
                    results[index] = Some(errno);
                    *sum = (sum.0 + 1, sum.1, sum.2 + 1);
                }
                Progress::Queue(done) => queued.push((index, done)),
            }
        }
        for (op, (count, bytes, errors)) in [Op::Read, Op::Write].into_iter().zip(sums) {
            if count > 0 {
                device.stats.end(shard, op, count, bytes, errors, nanoseconds(started) / batch.len() as u64);
            }
        }
        if !queued.is_empty() {
            let waiter = Waiter::new(queued.len());
            for (at, &(index, done)) in queued.iter().enumerate() {
                let owner = Owner::Waiter { waiter: waiter.clone(), index: at };
                // SAFETY: the memory is there until this function returns, which is after the end of all requests.
                self.submit(unsafe { batch[index].rest(device, Flags::default(), done, started, owner) });
            }
            let (errors, _) = waiter.wait();
            for (&(index, _), error) in queued.iter().zip(errors) {
                results[index] = error;
            }
        }
        results
    }

    /// Executes a request without data (flush, discard, write zeroes, cache) and waits for its end.
    pub fn command(&self, device: &Arc<Device>, op: Op, offset: u64, len: u64, flags: Flags) -> Result<(), Errno> {
        check(device, op, offset, len)?;
        let (shard, started) = (Shard::of_caller(), Instant::now());
        device.stats.start(shard, 1);
        let attempt = match op {
            Op::Flush => fast_path::flush(device, shard),
            Op::Discard | Op::WriteZeroes => fast_path::clear(device, shard, op, offset, len, flags),
            _ => Progress::Queue(0),
        };
        match attempt {
            Progress::Queue(_) => self.ask(device, op, (offset, len), flags, None, started).map(drop),
            now => {
                let errors = u64::from(matches!(now, Progress::Failed(_)));
                device.stats.end(shard, op, 1, if errors == 0 { len } else { 0 }, errors, nanoseconds(started));
                if let Progress::Failed(errno) = now { Err(errno) } else { Ok(()) }
            }
        }
    }

    /// Block status of a range, from `offset` as far as one answer reaches.
    pub fn extents(&self, device: &Arc<Device>, offset: u64, len: u64, context: Context) -> Result<Vec<Found>, Errno> {
        check(device, Op::Extents, offset, len)?;
        device.stats.start(Shard::of_caller(), 1);
        self.ask(device, Op::Extents, (offset, len), Flags::default(), context, Instant::now())
    }

    /// Submits a request to a loop and waits for its end.
    fn ask(
        &self,
        device: &Arc<Device>,
        op: Op,
        (offset, len): (u64, u64),
        flags: Flags,
        context: Context,
        started: Instant,
    ) -> Result<Vec<Found>, Errno> {
        let waiter = Waiter::new(1);
        let owner = Owner::Waiter { waiter: waiter.clone(), index: 0 };
        let (device, memory) = (device.clone(), Memory::None);
        self.submit(Request { device, op, offset, len, flags, memory, owner, started, context, done: 0 });
        let (errors, found) = waiter.wait();
        errors[0].map_or(Ok(found), Err)
    }

    /// Executes a request on this thread if it is small and need not wait. Returns its result; no notice follows. None:
    /// the caller must `start` the request, which records in `done` what is done already.
    pub fn attempt(&self, request: &mut Request) -> Option<Result<(), Errno>> {
        let Request { device, op, offset, len, flags, memory, .. } = request;
        let shard = Shard::of_caller();
        let attempt = match (*op, check(device, *op, *offset, *len)) {
            (_, Err(errno)) => Progress::Failed(errno),
            _ if !memory.fits(*op, *len) => Progress::Failed(Errno::INVAL),
            (Op::Read | Op::Write, _) if *len > AT_ONCE || flags.fua && device.needs_flush() => return None,
            // Memory in several pieces.
            (Op::Read | Op::Write, _) if memory.run(0, *len as usize) < *len as usize => return None,
            (Op::Read, _) => {
                // SAFETY: the request has not ended, nor does it during this call.
                let into = unsafe { memory.destination(0, *len as usize) };
                fast_path::read(device, shard, *offset, into, Patience::Nowait, Besides::default())
            }
            (Op::Write, _) => {
                // SAFETY: as above.
                let from = unsafe { memory.source(0, *len as usize) };
                fast_path::write(device, shard, *offset, from, Patience::Nowait)
            }
            (Op::Flush, _) => fast_path::flush(device, shard),
            (Op::Discard | Op::WriteZeroes, _) => fast_path::clear(device, shard, *op, *offset, *len, *flags),
            _ => return None,
        };
        let (bytes, error) = match attempt {
            Progress::Queue(done) => {
                request.done = done;
                return None;
            }
            Progress::Done => (*len, None),
            Progress::Failed(errno) => (0, Some(errno)),
        };
        device.stats.start(shard, 1);
        device.stats.end(shard, *op, 1, bytes, u64::from(error.is_some()), nanoseconds(request.started));
        Some(error.map_or(Ok(()), Err))
    }

    /// Starts a request and returns. Its owner is notified of the end; until then the caller keeps the memory alive.
    pub fn start(&self, request: Request) {
        let (device, op) = (&request.device, request.op);
        device.stats.start(Shard::of_caller(), 1);
        match check(device, op, request.offset, request.len) {
            Ok(()) => self.submit(request),
            Err(errno) => {
                device.stats.end(Shard::of_caller(), op, 1, 0, 1, nanoseconds(request.started));
                request.owner.complete(Some(errno), Vec::new());
            }
        }
    }

    /// Suspends a device: see `Device::suspend`. flush: flush the device before this returns.
    pub fn suspend(&self, device: &Arc<Device>, flush: bool, deadline: Option<Instant>) -> Result<(), SuspendError> {
        device.suspend(deadline, || {
            if !flush || !device.needs_flush() {
                return Ok(());
            }
            let waiter = Waiter::new(1);
            let owner = Owner::Waiter { waiter: waiter.clone(), index: 0 };
            let flags = Flags { through_gate: true, ..Flags::default() };
            device.stats.start(Shard::of_caller(), 1);
            self.submit(Request {
                device: device.clone(),
                op: Op::Flush,
                offset: 0,
                len: 0,
                flags,
                memory: Memory::None,
                owner,
                started: Instant::now(),
                context: None,
                done: 0,
            });
            let errors = match deadline {
                None => waiter.wait().0,
                Some(deadline) => waiter.wait_until(deadline).ok_or(SuspendError::Timeout)?,
            };
            errors[0].map_or(Ok(()), |errno| Err(SuspendError::Flush(errno)))
        })
    }
}
