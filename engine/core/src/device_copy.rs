//! Copies one device to another, or compares two devices, on threads of its own.
//!
//! The range is divided into pieces by the block status of the source: data, at most one request long, and zeros. The
//! threads take pieces in ascending order and wait for the I/O of one piece at a time, so there are as many requests in
//! flight as there are threads. What the piece is was asked before it is read: the source must not change meanwhile.
//!
//! `position` says up to where everything is done. An event is raised when it reaches the watched offset, and at the end.
//! The first failure ends the copy; pieces that other threads have begun are finished first. So the difference that a
//! comparison finds is the first one.

use std::collections::{BTreeSet, VecDeque};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use blkloom_io::{Buffer, Errno};

use crate::call::{Direction, Transfer};
use crate::device::Device;
use crate::engine::{Engine, EngineError};
use crate::event::Event;
use crate::lock;
use crate::operation::{Flags, Found};
use crate::stats::Op;

/// Bytes for which the block status of the source is asked at once.
const LOOK_AHEAD: u64 = 1 << 30;
/// Most bytes that are zeroed or skipped by one piece.
const MOST_ZEROS: u64 = 256 << 20;
/// The flag of `base:allocation` for a range that reads as zeros.
const ZERO: u32 = 2;

/// One of the two devices.
pub struct End {
    pub engine: Arc<Engine>,
    pub device: Arc<Device>,
}

/// What happens to zeros of the source.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Zeroes {
    /// Nothing: the target reads as zeros.
    Skip,
    /// The target's blocks are deallocated, or zeros are written where that is impossible.
    Unmap,
    /// Blocks with zeros are allocated.
    Allocate,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purpose {
    /// detect: blocks of this size of the data are zeros, too, if all of their bytes are. 0: the source is believed.
    Copy {
        zeroes: Zeroes,
        detect: u64,
    },
    Compare,
}

pub struct Plan {
    pub source: End,
    pub target: End,
    /// Bytes [start, end) of both.
    pub start: u64,
    pub end: u64,
    /// Bytes of a request.
    pub request: usize,
    pub threads: usize,
    pub purpose: Purpose,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    Source,
    Target,
}

/// Why a copy has ended before its time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Failure {
    Io {
        side: Side,
        op: Op,
        offset: u64,
        len: u64,
        errno: Errno,
    },
    /// The first byte that differs.
    Differs {
        offset: u64,
    },
}

impl Failure {
    fn offset(&self) -> u64 {
        let (Failure::Io { offset, .. } | Failure::Differs { offset }) = self;
        *offset
    }
}

/// Bytes of the source: those that were read, and those that are zeros.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Counts {
    pub data: u64,
    pub zeros: u64,
}

#[derive(Clone, Copy)]
struct Piece {
    offset: u64,
    len: u64,
    zeros: bool,
}

struct Work {
    /// The start of what no thread has taken.
    next: u64,
    /// Ranges from `next` on whose status is known.
    known: VecDeque<Piece>,
    /// Starts of the pieces that threads have taken.
    taken: BTreeSet<u64>,
    /// The event is raised when the position reaches this.
    watched: u64,
    /// Threads that have not ended.
    running: usize,
    failure: Option<Failure>,
}

impl Work {
    fn position(&self) -> u64 {
        self.taken.first().copied().unwrap_or(self.next)
    }
}

struct Shared {
    plan: Plan,
    work: Mutex<Work>,
    /// Held by the thread that asks for the block status, without the lock of `work`.
    looking: Mutex<()>,
    stopped: AtomicBool,
    data: AtomicU64,
    zeros: AtomicU64,
    event: Event,
}

/// A copy, or a comparison, in progress. Dropping it stops it.
pub struct DeviceCopy {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl DeviceCopy {
    /// Starts the threads.
    pub fn start(plan: Plan) -> Result<DeviceCopy, EngineError> {
        let (count, start) = (plan.threads.max(1), plan.start);
        let event = Event::new().map_err(|error| EngineError::Os("eventfd", error))?;
        let work = Work {
            next: start,
            known: VecDeque::new(),
            taken: BTreeSet::new(),
            watched: u64::MAX,
            running: count,
            failure: None,
        };
        let (data, zeros) = (AtomicU64::new(0), AtomicU64::new(0));
        let (work, looking, stopped) = (Mutex::new(work), Mutex::new(()), AtomicBool::new(false));
        let shared = Arc::new(Shared { plan, work, looking, stopped, data, zeros, event });
        let copy = DeviceCopy { shared, threads: Mutex::default() };
        for index in 0..count {
            let shared = copy.shared.clone();
            let thread = std::thread::Builder::new()
                .name(format!("blkloom-copy-{index}"))
                .spawn(move || shared.run())
                .map_err(|error| EngineError::Os("starting a thread", error))?;
            lock(&copy.threads).push(thread);
        }
        Ok(copy)
    }

    /// Readable when the position has reached the watched offset, and at the end.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.shared.event.as_fd()
    }

    /// Makes the descriptor unreadable until the position reaches `offset`.
    pub fn watch(&self, offset: u64) {
        let mut work = lock(&self.shared.work);
        self.shared.event.clear();
        work.watched = offset;
        self.shared.tell(&mut work);
    }

    /// Everything before this offset is done.
    pub fn position(&self) -> u64 {
        lock(&self.shared.work).position()
    }

    pub fn counts(&self) -> Counts {
        let Shared { data, zeros, .. } = &*self.shared;
        Counts { data: data.load(Ordering::Relaxed), zeros: zeros.load(Ordering::Relaxed) }
    }

    pub fn has_ended(&self) -> bool {
        lock(&self.shared.work).running == 0
    }

    pub fn failure(&self) -> Option<Failure> {
        lock(&self.shared.work).failure
    }

    /// Takes no more pieces. Those that were begun are finished.
    pub fn stop(&self) {
        self.shared.stopped.store(true, Ordering::Relaxed);
    }

    /// Waits for the threads.
    pub fn join(&self) {
        for thread in lock(&self.threads).drain(..) {
            // A thread that panicked has said so; its piece is not done, as `position` tells.
            let _joined = thread.join();
        }
    }
}

impl Drop for DeviceCopy {
    fn drop(&mut self) {
        self.stop();
        self.join();
    }
}

/// Ends a thread, also one that panics.
struct Running<'a>(&'a Shared);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let mut work = lock(&self.0.work);
        work.running -= 1;
        self.0.tell(&mut work);
    }
}

impl Shared {
    fn run(&self) {
        let running = Running(self);
        let mut buffers = [Buffer::new(self.plan.request), Buffer::new(self.compared_bytes())];
        while let Some(piece) = self.take() {
            let result = match self.plan.purpose {
                Purpose::Copy { zeroes, detect } if !piece.zeros => self.copy(piece, &mut buffers[0], (zeroes, detect)),
                Purpose::Copy { zeroes, .. } => self.clear(piece.offset, piece.len, zeroes),
                Purpose::Compare if piece.zeros => self.compare_zeros(piece, &mut buffers[0]),
                Purpose::Compare => self.compare(piece, &mut buffers),
            };
            let mut work = lock(&self.work);
            match result {
                Ok(()) => {
                    let count = if piece.zeros { &self.zeros } else { &self.data };
                    count.fetch_add(piece.len, Ordering::Relaxed);
                    work.taken.remove(&piece.offset);
                }
                // It stays among the taken ones: the position must not pass it.
                Err(failure) if work.failure.is_none_or(|known| known.offset() > failure.offset()) => {
                    work.failure = Some(failure);
                }
                Err(_) => {}
            }
            self.tell(&mut work);
        }
        drop(running);
    }

    fn compared_bytes(&self) -> usize {
        if self.plan.purpose == Purpose::Compare { self.plan.request } else { 0 }
    }

    fn tell(&self, work: &mut Work) {
        if work.running == 0 || work.position() >= work.watched {
            work.watched = u64::MAX;
            self.event.raise();
        }
    }

    /// Takes the next piece. None: there is none, or the copy ends.
    fn take(&self) -> Option<Piece> {
        let Plan { end, request, purpose, .. } = self.plan;
        let mut work = lock(&self.work);
        loop {
            if self.stopped.load(Ordering::Relaxed) || work.failure.is_some() {
                return None;
            }
            let Some(found) = work.known.pop_front() else {
                if work.next >= end {
                    return None;
                }
                drop(work);
                self.look();
                work = lock(&self.work);
                continue;
            };
            let Piece { offset, len, zeros } = found;
            if zeros && matches!(purpose, Purpose::Copy { zeroes: Zeroes::Skip, .. }) {
                work.next = offset + len;
                self.zeros.fetch_add(len, Ordering::Relaxed);
                self.tell(&mut work);
                continue;
            }
            let most = if zeros { MOST_ZEROS } else { request as u64 };
            let piece = Piece { offset, len: len.min(most - offset % most), zeros };
            if piece.len < len {
                work.known.push_front(Piece { offset: offset + piece.len, len: len - piece.len, zeros });
            }
            work.next = offset + piece.len;
            work.taken.insert(offset);
            return Some(piece);
        }
    }

    /// Asks for the block status of the source, unless another thread did. Where the answer is an error or has a gap,
    /// there is data: reading it will tell.
    fn look(&self) {
        let _looking = lock(&self.looking);
        let Plan { source, end, .. } = &self.plan;
        let start = {
            let work = lock(&self.work);
            if !work.known.is_empty() || work.next >= *end {
                return;
            }
            work.next
        };
        let len = LOOK_AHEAD.min(end - start);
        let found = source.engine.extents(&source.device, start, len, None).unwrap_or_default();
        let mut known = VecDeque::<Piece>::new();
        let (mut at, limit) = (start, start + len);
        for Found { offset, len, flags } in found {
            if offset != at || at >= limit {
                break;
            }
            let (len, zeros) = (len.min(limit - at), flags & ZERO != 0);
            match known.back_mut() {
                Some(last) if last.zeros == zeros => last.len += len,
                _ => known.push_back(Piece { offset, len, zeros }),
            }
            at += len;
        }
        if at == start {
            known.push_back(Piece { offset: at, len, zeros: false });
        }
        lock(&self.work).known = known;
    }

    fn read(&self, side: Side, offset: u64, buffer: &mut Buffer, len: usize) -> Result<(), Failure> {
        let End { engine, device } = self.end(side);
        let transfer = Transfer { direction: Direction::Read(buffer.slice().part(0, len)), offset };
        engine.transfer(device, transfer, false).map_err(|errno| Failure::Io {
            side,
            op: Op::Read,
            offset,
            len: len as u64,
            errno,
        })
    }

    fn end(&self, side: Side) -> &End {
        match side {
            Side::Source => &self.plan.source,
            Side::Target => &self.plan.target,
        }
    }

    fn copy(&self, piece: Piece, buffer: &mut Buffer, (zeroes, detect): (Zeroes, u64)) -> Result<(), Failure> {
        let (offset, len) = (piece.offset, piece.len as usize);
        self.read(Side::Source, offset, buffer, len)?;
        let bytes = &buffer.bytes()[..len];
        let mut at = 0;
        while at < len {
            let (run, zeros) = run(&bytes[at..], offset + at as u64, detect);
            let here = offset + at as u64;
            if zeros {
                self.clear(here, run as u64, zeroes)?;
            } else {
                let End { engine, device } = &self.plan.target;
                let transfer = Transfer { direction: Direction::Write(bytes[at..at + run].into()), offset: here };
                engine.transfer(device, transfer, false).map_err(|errno| Failure::Io {
                    side: Side::Target,
                    op: Op::Write,
                    offset: here,
                    len: run as u64,
                    errno,
                })?;
            }
            at += run;
        }
        Ok(())
    }

    /// Makes a range of the target read as zeros.
    fn clear(&self, offset: u64, len: u64, zeroes: Zeroes) -> Result<(), Failure> {
        let unmap = match zeroes {
            Zeroes::Skip => return Ok(()),
            Zeroes::Unmap => true,
            Zeroes::Allocate => false,
        };
        let End { engine, device } = &self.plan.target;
        let flags = Flags { unmap, ..Flags::default() };
        engine.command(device, Op::WriteZeroes, offset, len, flags).map_err(|errno| Failure::Io {
            side: Side::Target,
            op: Op::WriteZeroes,
            offset,
            len,
            errno,
        })
    }

    fn compare(&self, piece: Piece, [one, other]: &mut [Buffer; 2]) -> Result<(), Failure> {
        let (offset, len) = (piece.offset, piece.len as usize);
        self.read(Side::Source, offset, one, len)?;
        self.read(Side::Target, offset, other, len)?;
        let (one, other) = (&one.bytes()[..len], &other.bytes()[..len]);
        if one == other {
            return Ok(());
        }
        let at = one.iter().zip(other).take_while(|(a, b)| a == b).count();
        Err(Failure::Differs { offset: offset + at as u64 })
    }

    /// Compares a range of the target with zeros. What its block status says to be zeros is not read.
    fn compare_zeros(&self, piece: Piece, buffer: &mut Buffer) -> Result<(), Failure> {
        let (mut at, end) = (piece.offset, piece.offset + piece.len);
        let End { engine, device } = &self.plan.target;
        while at < end {
            let found = engine.extents(device, at, end - at, None).unwrap_or_default();
            let (mut len, zeros) = match found.first() {
                Some(first) if first.offset == at && first.len > 0 => {
                    (first.len.min(end - at), first.flags & ZERO != 0)
                }
                _ => (end - at, false),
            };
            if !zeros {
                len = len.min(self.plan.request as u64);
                self.read(Side::Target, at, buffer, len as usize)?;
                if let Some(byte) = buffer.bytes()[..len as usize].iter().position(|&byte| byte != 0) {
                    return Err(Failure::Differs { offset: at + byte as u64 });
                }
            }
            at += len;
        }
        Ok(())
    }
}

/// The first run of blocks that are all zeros, or all not: its length, and whether it is zeros. offset: of `bytes` in the
/// device; blocks are aligned there.
fn run(bytes: &[u8], offset: u64, block: u64) -> (usize, bool) {
    if block == 0 {
        return (bytes.len(), false);
    }
    let mut at = 0;
    let mut zeros = None;
    while at < bytes.len() {
        let len = ((block - (offset + at as u64) % block) as usize).min(bytes.len() - at);
        let zero = is_zero(&bytes[at..at + len]);
        if *zeros.get_or_insert(zero) != zero {
            break;
        }
        at += len;
    }
    (at, zeros == Some(true))
}

/// Whether all bytes are zero.
fn is_zero(bytes: &[u8]) -> bool {
    let (chunks, rest) = bytes.as_chunks::<64>();
    chunks.iter().all(|chunk| chunk.iter().fold(0, |sum, byte| sum | byte) == 0) && rest.iter().all(|&byte| byte == 0)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::{is_zero, run};

    #[test]
    fn runs_end_at_aligned_blocks_where_zeros_begin_or_end() {
        let mut bytes = vec![0; 5000];
        bytes[2048] = 1;
        assert_eq!(run(&bytes, 0, 1024), (2048, true));
        assert_eq!(run(&bytes[2048..], 2048, 1024), (1024, false));
        assert_eq!(run(&bytes[3072..], 3072, 1024), (5000 - 3072, true), "the last block is a short one");
        assert_eq!(run(&bytes, 512, 1024), (1536, true), "blocks are aligned in the device");
        assert_eq!(run(&bytes, 0, 0), (5000, false), "nothing is looked for");
    }

    #[test]
    fn a_byte_anywhere_is_not_zero() {
        for len in [1, 63, 64, 65, 512] {
            assert!(is_zero(&vec![0; len]));
            for at in 0..len {
                let mut bytes = vec![0; len];
                bytes[at] = 128;
                assert!(!is_zero(&bytes), "{at} of {len}");
            }
        }
    }
}
