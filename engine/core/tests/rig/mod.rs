//! What the tests of devices stand on: engines of every kind, places to map, and plain calls.
#![allow(dead_code, reason = "every test file uses a part of it")]

pub mod hosts;

use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use blkloom_core::{
    Device, Direction, Engine, Flags, IoChoice, Kinds, Map, Mapping, Memory, Op, Owner, Request, Transfer, Waiter,
};
use blkloom_io::{File, Region, Slice};
use blkloom_map::{Extent, Segment};

pub const EIO: i32 = 5;
pub const ESHUTDOWN: i32 = 108;
pub const ETIMEDOUT: i32 = 110;
pub const PATIENT: Duration = Duration::from_secs(60);

/// Engines with threads, and with io_uring where this process may have one; without and with polling.
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

/// A file without a name; direct where asked for and where its file system can.
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
    Arc::new(Mapping::new(Map::new(segments, flush_owners).unwrap()))
}

pub fn device(mapping: Arc<Mapping>) -> Arc<Device> {
    Device::new("test".into(), Some(mapping), PATIENT).unwrap()
}

pub fn slice(bytes: &mut [u8]) -> Slice {
    // SAFETY: the tests keep the bytes until the call that uses the slice has returned.
    unsafe { Slice::new(bytes.as_mut_ptr(), bytes.len()) }
}

pub fn read(engine: &Engine, device: &Arc<Device>, offset: u64, into: &mut [u8]) -> Result<(), i32> {
    let memory = slice(into);
    engine.transfer(device, Transfer { direction: Direction::Read, memory, offset }, false)
}

pub fn write(engine: &Engine, device: &Arc<Device>, offset: u64, from: &[u8], fua: bool) -> Result<(), i32> {
    // SAFETY: the borrow outlives the call, and writes only read.
    let memory = unsafe { Slice::new(from.as_ptr().cast_mut(), from.len()) };
    engine.transfer(device, Transfer { direction: Direction::Write, memory, offset }, fua)
}

/// A transfer that goes to a loop at once, so that nothing is done in place by this thread.
pub fn later(engine: &Engine, device: &Arc<Device>, op: Op, offset: u64, memory: Memory, len: u64, fua: bool) -> i32 {
    let waiter = Waiter::new(1);
    let owner = Owner::Waiter { waiter: waiter.clone(), index: 0 };
    let flags = Flags { fua, ..Flags::default() };
    let (device, started) = (device.clone(), Instant::now());
    engine.start(Request { device, op, offset, len, flags, memory, owner, started, context: None, done: 0 });
    waiter.wait().0[0]
}

pub fn command(engine: &Engine, device: &Arc<Device>, op: Op, offset: u64, len: u64, flags: Flags) -> Result<(), i32> {
    engine.command(device, op, offset, len, flags)
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
