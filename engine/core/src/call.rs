//! The in-process API: a caller's thread does what it can itself and waits for a loop for the rest.

use std::sync::Arc;
use std::time::Instant;

use blkloom_io::{Slice, errno::EINVAL, errno::ENOSPC, errno::ESHUTDOWN};

use crate::device::{Device, SuspendError};
use crate::engine::Engine;
use crate::now::{self, Besides, Now, Patience};
use crate::request::{Context, Flags, Found, Memory, Owner, Request, Waiter};
use crate::stats::{Op, Shard};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    Read,
    Write,
}

impl Direction {
    fn op(self) -> Op {
        match self {
            Direction::Read => Op::Read,
            Direction::Write => Op::Write,
        }
    }
}

/// Larger reads find their own way into the caches, and would drive each other out.
const WORTH_FETCHING: u64 = 16 << 10;

/// Larger transfers are done by a loop while their caller, who has other things to do, goes on.
const AT_ONCE: u64 = 256 << 10;

/// How many reads of a batch ahead memory is fetched.
const AHEAD: usize = 2;

/// One I/O of a caller's.
#[derive(Clone, Copy)]
pub struct Transfer {
    pub direction: Direction,
    pub memory: Slice,
    pub offset: u64,
}

impl Transfer {
    /// next: memory that will be read soon.
    fn now(&self, device: &Device, shard: Shard, patience: Patience, next: Option<Slice>) -> Now {
        match self.direction {
            Direction::Read => {
                now::read(device, shard, self.offset, self.memory, patience, Besides { next, zeros: None })
            }
            Direction::Write => now::write(device, shard, self.offset, self.memory, patience),
        }
    }

    /// The memory it will copy from, where fetching that ahead pays.
    fn source(&self, device: &Device, shard: Shard) -> Option<Slice> {
        let len = self.memory.len() as u64;
        let pays = self.direction == Direction::Read && len <= WORTH_FETCHING;
        (pays && check(device, Op::Read, self.offset, len).is_ok())
            .then(|| now::source(device, shard, self.offset, len))
    }

    fn later(&self, device: &Arc<Device>, flags: Flags, done: u64, started: Instant, owner: Owner) -> Request {
        Request {
            device: device.clone(),
            op: self.direction.op(),
            offset: self.offset,
            len: self.memory.len() as u64,
            flags,
            memory: Memory::Borrowed(self.memory),
            owner,
            started,
            context: None,
            done,
        }
    }
}

fn check(device: &Device, op: Op, offset: u64, len: u64) -> Result<(), i32> {
    match offset.checked_add(len) {
        Some(end) if end <= device.size() => Ok(()),
        _ if device.closed() => Err(ESHUTDOWN),
        _ if op == Op::Write || op == Op::WriteZeroes => Err(ENOSPC),
        _ => Err(EINVAL),
    }
}

pub type Batch = Vec<Transfer>;

impl Engine {
    /// One transfer, waiting for its end.
    pub fn transfer(&self, device: &Arc<Device>, transfer: Transfer, fua: bool) -> Result<(), i32> {
        let (op, len) = (transfer.direction.op(), transfer.memory.len() as u64);
        check(device, op, transfer.offset, len)?;
        let (shard, started) = (Shard::of_caller(), Instant::now());
        device.stats.start(shard, 1);
        let attempt = match fua && device.needs_flush() {
            true => Now::Later(0),
            false => transfer.now(device, shard, Patience::Wait, None),
        };
        match attempt {
            Now::Later(done) => {
                let waiter = Waiter::new(1);
                let owner = Owner::Waiter { waiter: waiter.clone(), index: 0 };
                self.submit(transfer.later(device, Flags { fua, ..Flags::default() }, done, started, owner));
                match waiter.wait().0[0] {
                    0 => Ok(()),
                    errno => Err(errno),
                }
            }
            now => {
                let result = if let Now::Failed(errno) = now { Err(errno) } else { Ok(()) };
                let errors = u64::from(result.is_err());
                let bytes = if result.is_ok() { len } else { 0 };
                device.stats.end(shard, op, 1, bytes, errors, nanoseconds(started));
                result
            }
        }
    }

    /// Many transfers in no order; an errno each, 0 for success. What storage would make wait goes to
    /// the loop all at once.
    pub fn batch(&self, device: &Arc<Device>, batch: &[Transfer]) -> Vec<i32> {
        let (shard, started) = (Shard::of_caller(), Instant::now());
        let mut results = vec![0; batch.len()];
        let mut later = Vec::new();
        // (count, bytes, errors) a direction
        let mut sums = [(0, 0, 0); 2];
        device.stats.start(shard, batch.len() as u64);
        for (index, transfer) in batch.iter().enumerate() {
            let (op, len) = (transfer.direction.op(), transfer.memory.len() as u64);
            let next = batch.get(index + AHEAD).and_then(|next| next.source(device, shard));
            let attempt = match check(device, op, transfer.offset, len) {
                Ok(()) => transfer.now(device, shard, Patience::Nowait, next),
                Err(errno) => Now::Failed(errno),
            };
            let sum = &mut sums[op as usize];
            match attempt {
                Now::Done => *sum = (sum.0 + 1, sum.1 + len, sum.2),
                Now::Failed(errno) => {
                    results[index] = errno;
                    *sum = (sum.0 + 1, sum.1, sum.2 + 1);
                }
                Now::Later(done) => later.push((index, done)),
            }
        }
        for (op, (count, bytes, errors)) in [Op::Read, Op::Write].into_iter().zip(sums) {
            if count > 0 {
                device.stats.end(shard, op, count, bytes, errors, nanoseconds(started) / batch.len() as u64);
            }
        }
        if !later.is_empty() {
            let waiter = Waiter::new(later.len());
            for (at, &(index, done)) in later.iter().enumerate() {
                let owner = Owner::Waiter { waiter: waiter.clone(), index: at };
                self.submit(batch[index].later(device, Flags::default(), done, started, owner));
            }
            let (errors, _) = waiter.wait();
            for (&(index, _), errno) in later.iter().zip(errors) {
                results[index] = errno;
            }
        }
        results
    }

    /// A request without bytes of its own: flush, discard, write zeroes.
    pub fn command(&self, device: &Arc<Device>, op: Op, offset: u64, len: u64, flags: Flags) -> Result<(), i32> {
        check(device, op, offset, len)?;
        let (shard, started) = (Shard::of_caller(), Instant::now());
        device.stats.start(shard, 1);
        let attempt = match op {
            Op::Flush => now::flush(device, shard),
            Op::Discard | Op::WriteZeroes => now::clear(device, shard, op, offset, len, flags),
            _ => Now::Later(0),
        };
        match attempt {
            Now::Later(_) => self.ask(device, op, (offset, len), flags, None, started).map(drop),
            now => {
                let errors = u64::from(matches!(now, Now::Failed(_)));
                device.stats.end(shard, op, 1, if errors == 0 { len } else { 0 }, errors, nanoseconds(started));
                if let Now::Failed(errno) = now { Err(errno) } else { Ok(()) }
            }
        }
    }

    /// What a range holds, as far as one answer reaches.
    pub fn extents(&self, device: &Arc<Device>, offset: u64, len: u64, context: Context) -> Result<Vec<Found>, i32> {
        check(device, Op::Extents, offset, len)?;
        device.stats.start(Shard::of_caller(), 1);
        self.ask(device, Op::Extents, (offset, len), Flags::default(), context, Instant::now())
    }

    /// Gives a request to a loop and waits for its end.
    fn ask(
        &self,
        device: &Arc<Device>,
        op: Op,
        (offset, len): (u64, u64),
        flags: Flags,
        context: Context,
        started: Instant,
    ) -> Result<Vec<Found>, i32> {
        let waiter = Waiter::new(1);
        let owner = Owner::Waiter { waiter: waiter.clone(), index: 0 };
        let (device, memory) = (device.clone(), Memory::None);
        self.submit(Request { device, op, offset, len, flags, memory, owner, started, context, done: 0 });
        let (errors, found) = waiter.wait();
        if errors[0] == 0 { Ok(found) } else { Err(errors[0]) }
    }

    /// Does a request now if it is small and need not wait for anything: its result, and no notice follows. None:
    /// `start` it; what was done of it is noted in it.
    pub fn attempt(&self, request: &mut Request) -> Option<Result<(), i32>> {
        let Request { device, op, offset, len, flags, .. } = request;
        let shard = Shard::of_caller();
        let attempt = match (*op, check(device, *op, *offset, *len)) {
            (_, Err(errno)) => Now::Failed(errno),
            (Op::Read | Op::Write, _) if *len > AT_ONCE || flags.fua && device.needs_flush() => return None,
            (Op::Read, _) => {
                now::read(device, shard, *offset, request.memory.slice(), Patience::Nowait, Besides::default())
            }
            (Op::Write, _) => now::write(device, shard, *offset, request.memory.slice(), Patience::Nowait),
            (Op::Flush, _) => now::flush(device, shard),
            (Op::Discard | Op::WriteZeroes, _) => now::clear(device, shard, *op, *offset, *len, *flags),
            _ => return None,
        };
        let (bytes, errno) = match attempt {
            Now::Later(done) => {
                request.done = done;
                return None;
            }
            Now::Done => (*len, 0),
            Now::Failed(errno) => (0, errno),
        };
        device.stats.start(shard, 1);
        device.stats.end(shard, *op, 1, bytes, u64::from(errno != 0), nanoseconds(request.started));
        Some(if errno == 0 { Ok(()) } else { Err(errno) })
    }

    /// Starts a request whose end is a notice; the memory is the caller's until then.
    pub fn start(&self, request: Request) {
        let (device, op) = (&request.device, request.op);
        device.stats.start(Shard::of_caller(), 1);
        match check(device, op, request.offset, request.len) {
            Ok(()) => self.submit(request),
            Err(errno) => {
                device.stats.end(Shard::of_caller(), op, 1, 0, 1, nanoseconds(request.started));
                request.owner.complete(errno, Vec::new());
            }
        }
    }

    /// See `Device::suspend`; `flush` writes everything back before it returns.
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
            if errors[0] == 0 { Ok(()) } else { Err(SuspendError::Flush(errors[0])) }
        })
    }
}

pub(crate) fn nanoseconds(since: Instant) -> u64 {
    since.elapsed().as_nanos() as u64
}
