//! A transport with registered buffers that the CPU cannot access (their memory is unmapped). Files use the buffers
//! directly, all other extents use a copy.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use std::collections::{BTreeMap, VecDeque};
use std::fs::File as StdFile;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use blkloom_core::{
    Answer, Device, Ended, Engine, Export, Flags, IoChoice, LoopContext, Memory, Op, Outcome, Recipient, Request,
    Reservation, Status, Transport, TransportHandle,
};
use blkloom_io::{Buffer, Registered, Slice};
use blkloom_map::Extent;
use rig::hosts::Host;
use rig::*;
use rustix::event::epoll::EventFlags;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap, mprotect, munmap};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Size of the registered buffer.
const MEMORY: usize = 1 << 20;
const SEGMENT: u64 = 256 << 10;

/// Lock for tests that change limits of the whole process.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Layout of a request: 8 bytes for each field, over the socket. The reply has cookie and errno.
#[derive(Clone, Copy)]
struct Asked {
    cookie: u64,
    write: bool,
    fua: bool,
    offset: u64,
    /// Offset of its bytes in the registered buffer.
    at: u64,
    len: u64,
}

impl Asked {
    fn bytes(self) -> Vec<u8> {
        let fields = [self.cookie, self.write.into(), self.fua.into(), self.offset, self.at, self.len];
        fields.map(u64::to_ne_bytes).concat()
    }

    fn parse(bytes: &[u8]) -> Asked {
        let field = |number: usize| u64::from_ne_bytes(bytes[number * 8..][..8].try_into().unwrap());
        let (write, fua) = (field(1) != 0, field(2) != 0);
        Asked { cookie: field(0), write, fua, offset: field(3), at: field(4), len: field(5) }
    }
}

struct Driver {
    socket: OwnedFd,
    export: Arc<Export>,
    memory: Slice<'static>,
    registered: Option<Registered>,
    in_flight: usize,
    replies: VecDeque<Vec<u8>>,
    ended: Option<String>,
}

impl Driver {
    /// The address of the registered pages, which only the kernel can access.
    fn register(&mut self, cx: &mut LoopContext) -> Registered {
        let registered = cx.register(self.memory).unwrap();
        let other = cx.register(self.memory).unwrap();
        cx.unregister(other).unwrap();
        // SAFETY: a mapping of this test, which no code accesses (an access would raise SIGSEGV).
        unsafe { mprotect(self.memory.as_ptr().cast(), MEMORY, MprotectFlags::empty()).unwrap() };
        self.registered = Some(registered);
        registered
    }
}

impl Transport for Driver {
    fn kind(&self) -> &'static str {
        "registered"
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn status(&self) -> Status {
        let idle = self.in_flight == 0;
        Status {
            interest: self.ended.is_none().then_some(EventFlags::IN),
            ready: false,
            stall: None,
            taken: None,
            leaving: self.ended.is_some(),
            over: self.ended.is_some() && idle,
        }
    }

    fn poll(&mut self, input: &mut Buffer, cx: &mut LoopContext) -> bool {
        let mut moved = false;
        while self.ended.is_none() {
            match recv(&self.socket, &mut *input.bytes_mut(), RecvFlags::DONTWAIT) {
                Err(Errno::AGAIN) => break,
                Ok((0, _)) | Err(_) => self.abort("the peer hung up"),
                Ok((count, _)) => {
                    let asked = Asked::parse(&input.bytes()[..count]);
                    let registered = self.registered.unwrap_or_else(|| self.register(cx));
                    self.in_flight += 1;
                    cx.submit(Request {
                        device: self.export.device.clone(),
                        op: if asked.write { Op::Write } else { Op::Read },
                        offset: asked.offset,
                        len: asked.len,
                        flags: Flags { fua: asked.fua, ..Flags::default() },
                        memory: Memory::Registered(registered.part(asked.at as usize, asked.len as usize)),
                        owner: cx.owner(asked.cookie),
                        started: Instant::now(),
                        context: None,
                        done: 0,
                    });
                }
            }
            moved = true;
        }
        moved
    }

    fn complete(&mut self, token: u64, ended: Ended, _: &mut LoopContext) {
        self.in_flight -= 1;
        let errno = ended.error.map_or(0, Errno::raw_os_error) as u64;
        self.replies.push_back([token, errno].map(u64::to_ne_bytes).concat());
    }

    fn send(&mut self, _: &mut LoopContext) {
        while let Some(reply) = self.replies.pop_front() {
            if send(&self.socket, &reply, SendFlags::NOSIGNAL).is_err() {
                self.abort("the peer hung up");
            }
        }
    }

    fn granted(&mut self, _: Reservation) {
        panic!("it asks for no memory");
    }

    fn detach(&mut self, _: bool) {
        panic!("it is not handed over");
    }

    fn take_back(&mut self, _: u64, request: Request, _: &mut LoopContext) -> Option<Request> {
        Some(request)
    }

    fn close(&mut self, reason: &str) {
        self.abort(reason);
    }

    fn abort(&mut self, reason: &str) {
        self.ended = Some(reason.to_owned());
    }

    fn end(self: Box<Self>) -> Outcome {
        // SAFETY: nothing is in flight any more.
        unsafe { munmap(self.memory.as_ptr().cast(), MEMORY).unwrap() };
        Outcome::Closed { reason: self.ended.unwrap() }
    }
}

/// A client, with the buffer's bytes as a file.
struct Client {
    socket: OwnedFd,
    bytes: StdFile,
    _served: TransportHandle,
}

impl Client {
    fn new(host: &Host) -> Client {
        let memory = memfd_create("registered", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&memory, MEMORY as u64).unwrap();
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a mapping at an address of the kernel's choosing, which goes when the transport ends.
        let mapped = unsafe { mmap(std::ptr::null_mut(), MEMORY, protection, flags, &memory, 0).unwrap() };
        // SAFETY: as above: after the last request.
        let mapped = unsafe { Slice::new(mapped.cast(), MEMORY) };
        let (socket, served) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let driver = Driver {
            socket: served,
            export: host.export.clone(),
            memory: mapped,
            registered: None,
            in_flight: 0,
            replies: VecDeque::new(),
            ended: None,
        };
        let recipient = Recipient { notices: host.notices.clone(), token: 1 };
        let served = host.engine.serve(&host.export, Box::new(driver), recipient).unwrap();
        Client { socket, bytes: memory.into(), _served: served }
    }

    fn send(&self, asked: Asked) {
        send(&self.socket, &asked.bytes(), SendFlags::NOSIGNAL).unwrap();
    }

    /// (cookie, errno)
    fn reply(&self) -> (u64, u64) {
        let mut bytes = [0; 16];
        rustix::io::retry_on_intr(|| recv(&self.socket, &mut bytes[..], RecvFlags::WAITALL)).unwrap();
        (u64::from_ne_bytes(bytes[..8].try_into().unwrap()), u64::from_ne_bytes(bytes[8..].try_into().unwrap()))
    }

    fn write(&self, offset: u64, bytes: &[u8], fua: bool) -> u64 {
        self.bytes.write_all_at(bytes, 0).unwrap();
        self.send(Asked { cookie: 1, write: true, fua, offset, at: 0, len: bytes.len() as u64 });
        self.reply().1
    }

    fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>, u64> {
        self.send(Asked { cookie: 1, write: false, fua: false, offset, at: 4096, len: len as u64 });
        let errno = self.reply().1;
        let mut bytes = vec![0; len];
        self.bytes.read_exact_at(&mut bytes, 4096).unwrap();
        if errno == 0 { Ok(bytes) } else { Err(errno) }
    }
}

/// A loop with a ring.
fn host(device: Arc<Device>) -> Option<Host> {
    match Engine::new(1, IoChoice::Ring, Duration::ZERO, 2) {
        Ok(engine) => Some(Host::new(engine, device)),
        Err(error) => {
            eprintln!("SKIPPED: {error}");
            None
        }
    }
}

/// Keeps the writes to the extent that faults.
fn answer_faults(device: &Device, start: u64) {
    let mut kept = vec![0; SEGMENT as usize];
    while let Some(faults) = device.next_faults(None) {
        for mut fault in faults {
            let at = (fault.offset - start) as usize;
            let range = at..at + fault.len as usize;
            let answer = if fault.op == Op::Write {
                kept[range].copy_from_slice(fault.payload());
                None
            } else {
                Some(kept[range].to_vec())
            };
            fault.answer(Answer::Done(answer));
        }
    }
}

/// Extents of every kind that moves bytes.
fn every_kind() -> Arc<Device> {
    let below = device(mapping(vec![(SEGMENT, memory(&region(SEGMENT), 0))], vec![]));
    let device = device(mapping(
        vec![
            (SEGMENT, data(&file(SEGMENT, false), 0)),
            (SEGMENT, memory(&region(SEGMENT), 0)),
            (SEGMENT, data(&file(SEGMENT, true), 0)),
            (SEGMENT, Extent::Device { device: below, offset: 0, writable: true }),
            (SEGMENT, data(&file_in_memory(SEGMENT), 0)),
            (SEGMENT, Extent::Fault),
        ],
        vec![],
    ));
    device.attach_mapper();
    device
}

#[test]
fn every_kind_of_extent_can_use_a_registered_buffer() {
    let _turn = turn();
    let Some(host) = host(every_kind()) else { return };
    let answering = std::thread::spawn({
        let device = host.device.clone();
        move || answer_faults(&device, 5 * SEGMENT)
    });
    let client = Client::new(&host);
    const LANES: u64 = 8;
    let (size, lane) = (host.device.size(), MEMORY as u64 / LANES);
    let mut model = vec![0; size as usize];
    let mut random = Random::new(7);
    for round in 0..400u64 {
        let mut asked = BTreeMap::new();
        for cookie in 0..LANES {
            let step = if random.one_in(2) { 4096 } else { 1 }; // what direct I/O takes, and what it does not
            let within = |random: &mut Random, end: u64| random.below(end / step) * step;
            let len = (within(&mut random, lane / 2)).max(step);
            let offset = cookie * (size / LANES) + within(&mut random, size / LANES - len);
            let at = cookie * lane + within(&mut random, lane - len);
            let (write, fua) = (random.one_in(2), random.one_in(8));
            let one = Asked { cookie, write, fua, offset, at, len };
            let fill: Vec<u8> = (0..len).map(|byte| (byte * 7 + round * 31 + cookie) as u8).collect();
            client.bytes.write_all_at(&fill, at).unwrap();
            if write {
                model[offset as usize..][..len as usize].copy_from_slice(&fill);
            }
            client.send(one);
            asked.insert(cookie, one);
        }
        for _ in 0..LANES {
            let (cookie, errno) = client.reply();
            let Asked { write, offset, at, len, .. } = asked.remove(&cookie).unwrap();
            assert_eq!(errno, 0, "round {round}: {len} bytes at {offset}");
            let mut found = vec![0; len as usize];
            client.bytes.read_exact_at(&mut found, at).unwrap();
            assert!(write || found == model[offset as usize..][..len as usize], "round {round}: {len} at {offset}");
        }
    }
    assert_eq!(host.device.stats().totals().in_flight, 0);
    drop(client);
    assert_eq!(host.closed(), "the peer hung up");
    host.device.close();
    answering.join().unwrap();
}

#[test]
fn a_file_uses_a_registered_buffer_without_a_copy() {
    let _turn = turn();
    let parts = vec![(SEGMENT, data(&file(SEGMENT, false), 0)), (SEGMENT, memory(&region(SEGMENT), 0))];
    let Some(host) = host(device(mapping(parts, vec![]))) else { return };
    let client = Client::new(&host);
    assert_eq!(client.write(0, &[1; 4096], true), 0);
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(0), ..limit }).unwrap();
    let straight = (client.write(4096, &[2; 4096], true), client.read(0, 8192));
    let copied = (client.write(SEGMENT, &[3; 4096], false), client.read(SEGMENT, 4096));
    setrlimit(Resource::Nofile, limit).unwrap();
    assert_eq!(straight, (0, Ok([[1; 4096], [2; 4096]].concat())));
    let no_memory = Errno::NOMEM.raw_os_error() as u64;
    assert_eq!(copied, (no_memory, Err(no_memory)));
    assert_eq!((client.write(SEGMENT, &[3; 4096], false), client.read(SEGMENT, 4096)), (0, Ok(vec![3; 4096])));
}

#[test]
fn a_range_in_a_file_and_in_memory_is_read_and_written_in_one_request() {
    let _turn = turn();
    let parts = vec![
        (4096, data(&file(4096, false), 0)),
        (4096, memory(&region(4096), 0)),
        (4096, Extent::Zero { discard_writes: true }),
        (4096, data(&file(4096, false), 0)),
    ];
    let Some(host) = host(device(mapping(parts, vec![]))) else { return };
    let client = Client::new(&host);
    let written: Vec<u8> = (0..16384).map(|byte| (byte / 7) as u8).collect();
    assert_eq!(client.write(0, &written, true), 0);
    assert_eq!(client.read(0, 16384), Ok([&written[..8192], &[0; 4096], &written[12288..]].concat()));
}

#[test]
fn without_the_ring_requests_with_registered_buffers_fail() {
    let _turn = turn();
    let parts = vec![(SEGMENT, data(&file(SEGMENT, false), 0)), (SEGMENT, memory(&region(SEGMENT), 0))];
    let Some(host) = host(device(mapping(parts, vec![]))) else { return };
    let client = Client::new(&host);
    for offset in [0, SEGMENT] {
        assert_eq!(client.write(offset, &[1; 512], false), 0);
    }
    assert!(lose_all_rings() > 0);
    let failed = EIO.raw_os_error() as u64;
    for offset in [0, SEGMENT] {
        assert_eq!(client.write(offset, &[1; 512], false), failed);
        assert_eq!(client.read(offset, 512), Err(failed));
    }
    assert_eq!(host.device.stats().totals().in_flight, 0);
}
