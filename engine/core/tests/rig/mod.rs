//! Shared code of the tests: engines of every kind, storage for maps, and blocking calls.
#![allow(dead_code, reason = "every test file uses a part of it")]

pub mod fuse_kernel;
pub mod hosts;
pub mod virtio_driver;

use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use blkloom_core::{
    BackendQueue, Device, Direction, Engine, Flags, IoChoice, Kinds, Map, Mapping, Memory, Op, Operation, Owner,
    Request, Transfer, Waiter,
};
pub use blkloom_io::Errno;
use blkloom_io::{File, Region, Slice};
use blkloom_map::{Extent, Segment};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

pub const EIO: Errno = Errno::IO;
pub const ESHUTDOWN: Errno = Errno::SHUTDOWN;
pub const ETIMEDOUT: Errno = Errno::TIMEDOUT;
pub const PATIENT: Duration = Duration::from_secs(60);

/// Runs a test that returns false where this thread was too slow for its times; then again with longer times.
pub fn with_longer_times(test: impl Fn(u32) -> bool) {
    assert!([1, 10, 100].into_iter().any(test), "this machine is slow by seconds");
}

/// Engines with threads, and with io_uring if this process may use it; without and with polling.
pub fn engines() -> Vec<(&'static str, Engine)> {
    let engine = |io, spin| Engine::new(2, io, Duration::from_micros(spin), 4);
    let mut all = vec![("threads", engine(IoChoice::Threads, 20).unwrap())];
    match engine(IoChoice::Ring, 0) {
        Ok(ring) => all.push(("io_uring, sleeping at once", ring)),
        Err(error) => eprintln!("SKIPPED: {error}"),
    }
    all
}

pub fn region(size: u64) -> Arc<Region> {
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
    let fd = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, size).unwrap();
    fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
    Arc::new(Region::new(fd, size, 4096).unwrap())
}

pub fn memory(region: &Arc<Region>, offset: u64) -> Extent<Kinds> {
    Extent::Memory { region: region.clone(), offset }
}

/// A file without a name; with direct I/O if requested and supported by its file system.
pub fn file(size: u64, direct: bool) -> Arc<File> {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("blkloom-device-{}-{number}", std::process::id()));
    let mut options = std::fs::File::options();
    let plain = options.read(true).write(true).create(true).open(&path).unwrap();
    plain.set_len(size).unwrap();
    let flags = rustix::fs::OFlags::DIRECT.bits() as i32;
    let opened = if direct { options.custom_flags(flags).open(&path) } else { Ok(plain.try_clone().unwrap()) };
    std::fs::remove_file(path).unwrap();
    let (fd, direct) = match opened {
        Ok(file) => (file, direct),
        Err(error) => {
            eprintln!("SKIPPED: O_DIRECT here: {error}; buffered instead");
            (plain, false)
        }
    };
    Arc::new(File::new(fd.into(), true, direct, "test".into()).unwrap())
}

/// Breaks all rings of this process: replaces each ring's descriptor by another file.
pub fn lose_all_rings() -> usize {
    let null = std::fs::File::open("/dev/null").unwrap();
    let mut count = 0;
    for entry in std::fs::read_dir("/proc/self/fd").unwrap() {
        let path = entry.unwrap().path();
        if !std::fs::read_link(&path).is_ok_and(|target| target.to_string_lossy().contains("io_uring")) {
            continue;
        }
        let number: RawFd = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
        // SAFETY: nothing is closed here: the number stays open, and stays the ring's.
        let mut ring = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(number) });
        rustix::io::dup2(&null, &mut ring).unwrap();
        count += 1;
    }
    count
}

/// A file on tmpfs.
pub fn file_in_memory(size: u64) -> Arc<File> {
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    let fd = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, size).unwrap();
    Arc::new(File::new(fd, true, false, "test".into()).unwrap())
}

pub fn data(file: &Arc<File>, offset: u64) -> Extent<Kinds> {
    Extent::Data { file: file.clone(), offset, writable: true }
}

/// Segments one after the other; the owner is the segment's index.
pub fn mapping(parts: Vec<(u64, Extent<Kinds>)>, flush_owners: Vec<u32>) -> Arc<Mapping> {
    let (mut start, mut segments) = (0, Vec::new());
    for (owner, (len, extent)) in (0..).zip(parts) {
        segments.push(Segment { start, end: start + len, owner, extent });
        start += len;
    }
    Arc::new(Mapping::new(Map::new(segments, flush_owners).unwrap()).unwrap())
}

pub fn device(mapping: Arc<Mapping>) -> Arc<Device> {
    Device::new("test".into(), Some(mapping), PATIENT).unwrap()
}

/// Memory for a request that an event loop executes.
pub fn promised(bytes: &mut [u8]) -> Slice<'static> {
    // SAFETY: the tests keep the bytes, and do not access them, until the end of the request was reported.
    unsafe { Slice::new(bytes.as_mut_ptr(), bytes.len()) }
}

pub fn read(engine: &Engine, device: &Arc<Device>, offset: u64, into: &mut [u8]) -> Result<(), Errno> {
    engine.transfer(device, Transfer { direction: Direction::Read(into.into()), offset }, false)
}

pub fn write(engine: &Engine, device: &Arc<Device>, offset: u64, from: &[u8], fua: bool) -> Result<(), Errno> {
    engine.transfer(device, Transfer { direction: Direction::Write(from.into()), offset }, fua)
}

/// A transfer that goes directly to an event loop: the calling thread executes nothing of it.
pub fn by_queue(
    engine: &Engine,
    device: &Arc<Device>,
    op: Op,
    offset: u64,
    memory: Memory,
    len: u64,
    fua: bool,
) -> Result<(), Errno> {
    let waiter = Waiter::new(1);
    let owner = Owner::Waiter { waiter: waiter.clone(), index: 0 };
    let flags = Flags { fua, ..Flags::default() };
    let (device, started) = (device.clone(), Instant::now());
    engine.start(Request { device, op, offset, len, flags, memory, owner, started, context: None, done: 0 });
    waiter.wait().0[0].map_or(Ok(()), Err)
}

pub fn command(
    engine: &Engine,
    device: &Arc<Device>,
    op: Op,
    offset: u64,
    len: u64,
    flags: Flags,
) -> Result<(), Errno> {
    engine.command(device, op, offset, len, flags)
}

pub fn is_readable(queue: &BackendQueue, wait: Duration) -> bool {
    let wait = Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: 0 };
    poll(&mut [PollFd::new(&queue.fd().as_fd(), PollFlags::IN)], Some(&wait)).unwrap() > 0
}

/// Waits for the next `count` operations.
pub fn next(queue: &BackendQueue, count: usize) -> Vec<Operation> {
    let mut found = Vec::new();
    while found.len() < count {
        assert!(is_readable(queue, PATIENT), "no operation comes");
        found.extend(queue.take().begun);
    }
    assert_eq!(found.len(), count);
    found.sort_by_key(|operation| operation.offset);
    found
}

/// A cheap, seeded sequence.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}
