//! Client of a disk over vhost-user, with the driver of libblkio (crate `virtio-driver`). For tests: it knows nothing of
//! blkloom.
//!
//! `vhost_user_driver model SOCKET QUEUES REQUESTS SEED` sends random requests, many at once, on each queue from a thread
//! of its own, and compares what it reads with what was written. Prints the number of requests; panics at a difference.
//!
//! `vhost_user_driver serve SOCKET QUEUES` executes requests from its standard input, one after the other. It first
//! prints the bytes of the disk (u64). All numbers are little-endian. A request: operation, queue (u32), offset, length
//! (u64), and the data of a write. A reply: 0 or a negative errno (i32), and the data of a read.

use std::io::{Error, ErrorKind, Read, Result, Write};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier};

use memmap2::MmapMut;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkReqBuf, VirtioBlkTransport,
    VirtioFeatureFlags, iovec,
};

const QUEUE_SIZE: u16 = 256;
const BLOCK: usize = 4096;
/// Most blocks of a request.
const MOST: usize = 16;
/// Requests in flight for each queue of `model`.
const DEPTH: usize = 32;
/// Bytes of a request's data for `serve`.
const LONGEST: usize = 1 << 20;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |index: usize| arguments.get(index).and_then(|word| word.parse::<u64>().ok());
    match (arguments.first().map(String::as_str), arguments.get(1), number(2), number(3), number(4)) {
        (Some("model"), Some(socket), Some(queues), Some(requests), Some(seed)) => {
            model(&mut Disk::open(socket, queues as usize, DEPTH * MOST * BLOCK)?, requests, seed);
            println!("{requests}");
            Ok(())
        }
        (Some("serve"), Some(socket), Some(queues), None, None) => {
            serve(&mut Disk::open(socket, queues as usize, LONGEST)?)
        }
        _ => Err(Error::new(ErrorKind::InvalidInput, "see the comment at the top of this program")),
    }
}

/// A queue, and memory for the data of its requests.
struct Queue<C> {
    ring: VirtioBlkQueue<'static, C>,
    notifier: Box<dyn QueueNotifier>,
    completed: Arc<EventFd>,
    memory: MmapMut,
}

impl<C> Queue<C> {
    fn kick(&mut self) -> Result<()> {
        if self.ring.avail_notif_needed() { self.notifier.notify() } else { Ok(()) }
    }

    /// Waits until at least one request has completed.
    fn wait(&mut self) -> Result<Vec<(C, i32)>> {
        loop {
            let done: Vec<_> = self.ring.completions().map(|one| (one.context, one.ret)).collect();
            if !done.is_empty() {
                return Ok(done);
            }
            self.completed.read()?;
        }
    }
}

/// A connected disk.
struct Disk<C> {
    // The rings are in memory of the transport.
    queues: Vec<Queue<C>>,
    bytes: u64,
    _transport: Box<VirtioBlkTransport>,
}

impl<C> Disk<C> {
    /// memory: bytes for the data of a queue's requests.
    fn open(socket: &str, queues: usize, memory: usize) -> Result<Self> {
        let wanted = VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX;
        let of_disks = VirtioBlkFeatureFlags::FLUSH
            | VirtioBlkFeatureFlags::MQ
            | VirtioBlkFeatureFlags::DISCARD
            | VirtioBlkFeatureFlags::WRITE_ZEROES;
        type Connected = VhostUser<virtio_driver::VirtioBlkConfig, VirtioBlkReqBuf>;
        let mut transport: Box<VirtioBlkTransport> = Box::new(Connected::new(socket, wanted.bits() | of_disks.bits())?);
        let bytes = u64::from(transport.get_config()?.capacity) * 512;
        let rings = VirtioBlkQueue::<'static, C>::setup_queues(transport.as_mut(), queues, QUEUE_SIZE)?;
        let mut made = Vec::new();
        for (index, mut ring) in rings.into_iter().enumerate() {
            let file = memfd_create("data", MemfdFlags::CLOEXEC)?;
            ftruncate(&file, memory as u64)?;
            // SAFETY: no other process changes the size of the file. The device changes bytes only of requests.
            let memory = unsafe { MmapMut::map_mut(&file) }?;
            transport.map_mem_region(memory.as_ptr() as usize, memory.len(), file.as_raw_fd(), 0)?;
            ring.set_used_notif_enabled(true);
            let (notifier, completed) = (transport.get_submission_notifier(index), transport.get_completion_fd(index));
            made.push(Queue { ring, notifier, completed, memory });
        }
        Ok(Self { queues: made, bytes, _transport: transport })
    }
}

// One request at a time

fn serve(disk: &mut Disk<()>) -> Result<()> {
    let (mut input, mut output) = (std::io::stdin().lock(), std::io::stdout().lock());
    output.write_all(&disk.bytes.to_le_bytes())?;
    output.flush()?;
    let mut header = [0; 24];
    while input.read_exact(&mut header).is_ok() {
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"));
        let long = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().expect("eight bytes"));
        let (operation, offset, length) = (word(0), long(8), long(16));
        let queue = &mut disk.queues[word(4) as usize];
        match operation {
            READ => queue.ring.read(offset, &mut queue.memory[..length as usize], ())?,
            // SAFETY: there is no data.
            WRITE if length == 0 => unsafe { queue.ring.writev(offset, [].as_ptr(), 0, ())? },
            WRITE => {
                input.read_exact(&mut queue.memory[..length as usize])?;
                queue.ring.write(offset, &queue.memory[..length as usize], ())?;
            }
            FLUSH => queue.ring.flush(())?,
            DISCARD => queue.ring.discard(offset, length, ())?,
            ZERO | ZERO_AND_UNMAP => queue.ring.write_zeroes(offset, length, operation == ZERO_AND_UNMAP, ())?,
            _ => return Err(Error::new(ErrorKind::InvalidInput, "no such operation")),
        }
        queue.kick()?;
        let done = queue.wait()?;
        let ((), result) = done[0];
        output.write_all(&result.to_le_bytes())?;
        if operation == READ && result == 0 {
            output.write_all(&queue.memory[..length as usize])?;
        }
        output.flush()?;
    }
    Ok(())
}

const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 2;
const DISCARD: u32 = 3;
const ZERO: u32 = 4;
const ZERO_AND_UNMAP: u32 = 5;

// Many requests at once

/// Contents of a block.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Contents {
    Zeros,
    /// Of the write with this number.
    Written(u64),
    /// Discarded.
    Any,
}

struct Request {
    /// Place of its data, in requests.
    slot: usize,
    first: usize,
    count: usize,
    /// What a read must find; None for other requests.
    expected: Option<Vec<Contents>>,
}

/// Each thread uses each QUEUES-th group of MOST blocks.
fn model(disk: &mut Disk<Request>, requests: u64, seed: u64) {
    let (blocks, queues) = (disk.bytes as usize / BLOCK, disk.queues.len());
    let (left, all_began) = (AtomicU64::new(requests), Barrier::new(queues));
    std::thread::scope(|scope| {
        for (index, queue) in disk.queues.iter_mut().enumerate() {
            let (left, all_began) = (&left, &all_began);
            scope.spawn(move || {
                let mut driver = Driver {
                    contents: vec![Contents::Any; blocks],
                    busy: vec![false; blocks],
                    dice: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (index as u64 + 1),
                    number: (index as u64) << 32,
                    groups: (index..blocks / MOST).step_by(queues).collect(),
                    queue,
                };
                all_began.wait();
                driver.run(left).expect("the connection stays");
            });
        }
    });
}

struct Driver<'a> {
    queue: &'a mut Queue<Request>,
    contents: Vec<Contents>,
    busy: Vec<bool>,
    dice: u64,
    /// Of the last write.
    number: u64,
    /// Of MOST blocks, which no other thread uses.
    groups: Vec<usize>,
}

impl Driver<'_> {
    fn run(&mut self, left: &AtomicU64) -> Result<()> {
        let mut free: Vec<usize> = (0..DEPTH).collect();
        let mut more = true;
        while more || free.len() < DEPTH {
            while more && !free.is_empty() {
                let chosen = self.random(self.groups.len());
                let group = self.groups[chosen];
                let start = self.random(MOST);
                let (first, count) = (group * MOST + start, 1 + self.random(MOST - start));
                if self.busy[first..first + count].contains(&true) {
                    break;
                }
                more = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok();
                if more {
                    let slot = free.pop().expect("one is free");
                    self.busy[first..first + count].fill(true);
                    self.submit(slot, first, count)?;
                }
            }
            self.queue.kick()?;
            if free.len() < DEPTH {
                for (request, result) in self.queue.wait()? {
                    assert_eq!(result, 0, "blocks {}, {}", request.first, request.count);
                    self.check(&request);
                    self.busy[request.first..request.first + request.count].fill(false);
                    free.push(request.slot);
                }
            }
        }
        Ok(())
    }

    fn random(&mut self, below: usize) -> usize {
        self.dice ^= self.dice << 13;
        self.dice ^= self.dice >> 7;
        self.dice ^= self.dice << 17;
        (self.dice >> 11) as usize % below
    }

    fn submit(&mut self, slot: usize, first: usize, count: usize) -> Result<()> {
        let (offset, length) = ((first * BLOCK) as u64, (count * BLOCK) as u64);
        let kind = self.random(10);
        let mut request = Request { slot, first, count, expected: None };
        let now = match kind {
            0 => Contents::Any,
            1 | 2 => Contents::Zeros,
            3..=6 => {
                self.number += 1;
                Contents::Written(self.number)
            }
            _ => {
                request.expected = Some(self.contents[first..first + count].to_vec());
                Contents::Any
            }
        };
        if request.expected.is_none() {
            self.contents[first..first + count].fill(now);
        }
        let data = slot * MOST * BLOCK;
        let pieces = self.pieces(data, count * BLOCK);
        match kind {
            0 => self.queue.ring.discard(offset, length, request),
            1 | 2 => self.queue.ring.write_zeroes(offset, length, kind == 1, request),
            3..=6 => {
                for block in 0..count {
                    let memory = &mut self.queue.memory[data + block * BLOCK..][..BLOCK];
                    fill(memory, self.number, first + block);
                }
                // SAFETY: the pieces are in memory that lives as long as the queue, in a place of this request only.
                unsafe { self.queue.ring.writev(offset, pieces.as_ptr(), pieces.len(), request) }
            }
            // SAFETY: as above.
            _ => unsafe { self.queue.ring.readv(offset, pieces.as_ptr(), pieces.len(), request) },
        }
    }

    /// One to three parts, in sectors, of a range of the memory.
    fn pieces(&mut self, start: usize, length: usize) -> Vec<iovec> {
        let mut cuts = [0, self.random(length / 512 + 1) * 512, self.random(length / 512 + 1) * 512, length];
        cuts.sort_unstable();
        let base = self.queue.memory[start..start + length].as_mut_ptr();
        let part =
            |range: &[usize]| iovec { iov_base: base.wrapping_add(range[0]).cast(), iov_len: range[1] - range[0] };
        cuts.windows(2).filter(|range| range[0] < range[1]).map(part).collect()
    }

    fn check(&self, request: &Request) {
        for (block, expected) in request.expected.iter().flatten().enumerate() {
            let found = &self.queue.memory[(request.slot * MOST + block) * BLOCK..][..BLOCK];
            let at = request.first + block;
            let mut wanted = [0; BLOCK];
            match expected {
                Contents::Any => continue,
                Contents::Zeros => {}
                Contents::Written(number) => fill(&mut wanted, *number, at),
            }
            assert!(found == wanted, "block {at}: {expected:?} expected, {:x?}... found", &found[..16]);
        }
    }
}

/// Each sector of a block has contents of its own.
fn fill(memory: &mut [u8], number: u64, block: usize) {
    for (at, word) in memory.chunks_exact_mut(16).enumerate() {
        word[..8].copy_from_slice(&number.to_le_bytes());
        word[8..].copy_from_slice(&((block * BLOCK + at) as u64).to_le_bytes());
    }
}
