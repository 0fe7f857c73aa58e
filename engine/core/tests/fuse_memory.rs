//! No thread of the engine allocates memory after a FUSE file is exported.
//!
//! The kernel may need a write to a FUSE file in order to have memory. So no thread of the engine may need memory for
//! the write. One test only: it watches all threads of engines in this process.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use std::alloc::{GlobalAlloc, Layout, System};
use std::backtrace::Backtrace;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use blkloom_core::Device;
use blkloom_io::File;
use blkloom_map::Extent;
use rig::fuse_kernel::*;
use rig::hosts::Host;
use rig::*;

/// The allocator: counts what watched threads allocate while it is armed.
struct Watch;

#[global_allocator]
static WATCH: Watch = Watch;
static ARMED: AtomicBool = AtomicBool::new(false);
static THREADS: [AtomicI32; 64] = [const { AtomicI32::new(0) }; 64];
static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);
static FIRST: Mutex<Option<String>> = Mutex::new(None);

// SAFETY: it only counts; all memory is the system allocator's.
unsafe impl GlobalAlloc for Watch {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note(layout);
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note(layout);
        // SAFETY: as the caller promises.
        unsafe { System.realloc(at, layout, size) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(at, layout) }
    }
}

fn note(layout: Layout) {
    if !ARMED.load(SeqCst) {
        return;
    }
    let thread = rustix::thread::gettid().as_raw_nonzero().get();
    if THREADS.iter().any(|watched| watched.load(SeqCst) == thread) && ALLOCATIONS.fetch_add(1, SeqCst) == 0 {
        ARMED.store(false, SeqCst); // this allocates, too
        let whence = format!("{} bytes at\n{}", layout.size(), Backtrace::force_capture());
        *FIRST.lock().unwrap() = Some(whence);
        ARMED.store(true, SeqCst);
    }
}

/// Watches all threads of engines while `act` runs, which must not make them allocate.
fn without_allocations(what: &str, act: impl FnOnce()) {
    let mut watched = THREADS.iter();
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        let task = task.unwrap();
        let name = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        if name.starts_with("blkloom-") {
            watched.next().unwrap().store(task.file_name().to_str().unwrap().parse().unwrap(), SeqCst);
        }
    }
    assert!(THREADS[0].load(SeqCst) != 0, "no thread of an engine");
    ARMED.store(true, SeqCst);
    act();
    ARMED.store(false, SeqCst);
    THREADS.iter().for_each(|thread| thread.store(0, SeqCst));
    let first = FIRST.lock().unwrap().take();
    let count = ALLOCATIONS.swap(0, SeqCst);
    assert!(count == 0, "{what}: {count} allocations, first {}", first.unwrap_or_default());
}

const SIZE: u64 = 2 << 20;
const LONGEST: usize = 128 << 10;

/// Two files in turns, in pieces of this size.
fn striped(piece: u64, files: &[Arc<File>]) -> Arc<Device> {
    let parts = (0..SIZE / piece).map(|number| (piece, data(&files[number as usize % files.len()], number * piece)));
    device(mapping(parts.collect(), vec![]))
}

fn devices() -> Vec<(&'static str, Arc<Device>)> {
    let whole = |extent| device(mapping(vec![(SIZE, extent)], vec![]));
    let direct = || file(SIZE, true);
    let lower = whole(data(&direct(), 0));
    vec![
        ("memory", whole(memory(&region(SIZE), 0))),
        ("a file on tmpfs", whole(data(&file_in_memory(SIZE), 0))),
        ("a buffered file with holes", whole(data(&file(SIZE, false), 0))),
        ("a direct file", whole(data(&direct(), 0))),
        ("another device", whole(Extent::Device { device: lower, offset: 0, writable: true })),
        ("stripes", striped(4096, &[direct(), direct()])),
        ("very small stripes", striped(512, &[file(SIZE, false), file(SIZE, false)])),
    ]
}

/// Sends messages, at most `depth` of them without a reply, and checks the replies.
fn exchange(kernel: &Kernel, messages: &[Vec<u8>], depth: usize, expected: &dyn Fn(u64) -> Vec<u8>) {
    for together in messages.chunks(depth) {
        std::thread::scope(|scope| {
            scope.spawn(|| together.iter().for_each(|message| kernel.send(message)));
            for _ in together {
                let (errno, unique, body) = kernel.reply();
                assert_eq!(errno, 0, "{unique}");
                assert!(body == expected(unique), "{unique}");
            }
        });
    }
}

fn contents(offset: u64, length: usize, round: u64) -> Vec<u8> {
    (offset..offset + length as u64).map(|at| (at / 512 * 7 + at + round) as u8).collect()
}

/// Writes, reads and flushes: aligned and not, small and large, as many together as a socket has room for.
fn load(kernel: &Kernel, round: u64) {
    let count = |body: usize| (body as u64).to_ne_bytes().to_vec();
    for (length, step, flags, requests) in [
        (4096, 4096, 0, 192),
        (4096, 4096, O_DSYNC, 24),
        (LONGEST, LONGEST, 0, 48),
        (32 << 10, 32 << 10, O_DSYNC, 12),
        (777, 4099, 0, 96),
    ] {
        let offset = |unique: u64| unique % (SIZE / step as u64 - 1) * step as u64;
        let writes: Vec<_> = (0..requests)
            .map(|unique| write_message(unique, offset(unique), &contents(offset(unique), length, round), flags))
            .collect();
        exchange(kernel, &writes, 48, &|_| count(length));
        exchange(kernel, &[message(FSYNC, 2, &[1, 0], &[])], 1, &|_| vec![]);
        let reads: Vec<_> = (0..requests).map(|unique| read_message(unique, offset(unique), length as u64)).collect();
        exchange(kernel, &reads, (64 << 10 >> length.ilog2()).clamp(1, 16), &|unique| {
            contents(offset(unique), length, round)
        });
    }
    let flushes: Vec<_> = (0..48).map(|unique| message(FSYNC, unique, &[1, 0], &[])).collect();
    exchange(kernel, &flushes, 48, &|_| vec![]);
    let zeroed =
        [PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE].map(|mode| message(FALLOCATE, mode, &[1, 100, 70_000, mode], &[]));
    exchange(kernel, &zeroed, 2, &|_| vec![]);
}

#[test]
fn no_thread_allocates_once_a_file_is_served() {
    for (what, device) in devices() {
        for (name, engine) in engines() {
            let host = Host::new(engine, device.clone());
            let (kernel, _handle) = Kernel::new(&host, &file_of(&host));
            kernel.ask(&message(GETATTR, 2, &[0, 0], &[])).unwrap(); // it is served
            without_allocations(&format!("{what} with {name}"), || load(&kernel, name.len() as u64));
            end(&host, kernel);
        }
    }
}
