//! A connection as the engine serves it: a client's requests and garbage, in pieces, handed over between two engines
//! at any byte. Each request is answered exactly once, with the error and the data that a slow model has.
//!
//! The device is memory, zeros that swallow writes, memory, and a range that fails: all of it is served in order, so
//! the model knows every byte.
#![no_main]

use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use blkloom_core::nbd::{self, Detached, Selected, Session, Unfinished};
use blkloom_core::{Device, Engine, Export, IoChoice, Map, Mapping, Notices, Outcome, Recipient, TransportHandle};
use blkloom_fuzz::{Asked, Reply, take};
use blkloom_io::Region;
use blkloom_map::{Extent, Segment};
use blkloom_wire::{Command, Header, Request, Rules, Style, flags};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

const KIB: u64 = 1024;
/// Where the segments of the device end, in bytes: memory, zeros, memory, errors.
const ENDS: [u64; 4] = [320 * KIB, 336 * KIB, 352 * KIB, 360 * KIB];
const SIZE: u64 = ENDS[3];
const MAX_PAYLOAD: u32 = 300 << 10;
/// Of a stream; what is asked for later is short.
const ENOUGH: usize = 512 << 10;
const PATIENCE: Duration = Duration::from_secs(600);
const EIO: u32 = 5;

#[derive(Arbitrary, Debug)]
struct Ask {
    kind: u8,
    flags: u8,
    offset: u32,
    length: u16,
    /// Beyond one receive, and beyond one part of a large write.
    large: bool,
}

#[derive(Arbitrary, Debug)]
enum Ending {
    /// Everything is answered first.
    Disconnect,
    /// The server hangs up.
    Garbage([u8; 4]),
    /// The client hangs up in the middle of something.
    Cut(u16),
}

#[derive(Arbitrary, Debug)]
struct Case {
    style: u8,
    read_only: bool,
    block_status: bool,
    /// Bytes sent at a time, over and over; 0 is everything at once.
    pieces: Vec<u16>,
    /// The connection changes engines before these pieces.
    moves: Vec<u8>,
    asks: Vec<Ask>,
    ending: Ending,
}

/// A request and what is to come back.
struct Sent {
    asked: Asked,
    command: Option<Command>,
    flags: u16,
    error: u32,
    /// The bytes of a read. None: an undefined byte (a write failed half-way).
    data: Vec<Option<u8>>,
    /// What of it has come.
    got: Vec<Option<u8>>,
    answered: bool,
}

struct Model {
    style: Style,
    bytes: Vec<Option<u8>>,
    sent: Vec<Sent>,
    stream: Vec<u8>,
    /// Bytes asked for and sent.
    volume: usize,
    /// Otherwise one side hangs up, and replies that were not sent by then are lost.
    all_answered: bool,
}

impl Model {
    fn new(case: &Case, style: Style) -> Model {
        let rules = Rules {
            style,
            size: SIZE,
            read_only: case.read_only,
            block_status: case.block_status && style != Style::Simple,
            max_payload: MAX_PAYLOAD.into(),
        };
        let bytes = vec![Some(0); SIZE as usize];
        let mut model = Model { style, bytes, sent: Vec::new(), stream: Vec::new(), volume: 0, all_answered: false };
        for ask in case.asks.iter().take(40) {
            if !model.ask(ask, &rules) {
                return model;
            }
        }
        match &case.ending {
            Ending::Disconnect => {
                model.put(Header { flags: 0, kind: 2, cookie: u64::MAX, offset: 0, length: 0 });
                model.all_answered = true;
            }
            Ending::Garbage(bytes) => {
                model.stream.extend_from_slice(bytes);
                model.stream.extend_from_slice(&[0; 64]);
            }
            Ending::Cut(left) => {
                let left = usize::from(*left).min(model.stream.len());
                model.stream.truncate(left);
            }
        }
        model
    }

    fn put(&mut self, header: Header) {
        header.put(self.style, &mut self.stream);
    }

    /// False: the server hangs up on it.
    fn ask(&mut self, ask: &Ask, rules: &Rules) -> bool {
        let cookie = self.sent.len() as u64;
        let kind = u16::from(ask.kind % 10);
        let kind = if kind == 2 { 1 } else { kind };
        let length = match self.volume {
            ..ENOUGH => u64::from(ask.length) << if ask.large { 3 } else { 0 },
            _ => u64::from(ask.length >> 6),
        };
        let (offset, length) = if kind == 3 { (0, 0) } else { (u64::from(ask.offset) % (SIZE + KIB), length) };
        self.volume += length as usize;
        let header = Header { flags: ask.flags.into(), kind, cookie, offset, length };
        let request = header.request(rules);
        self.put(header);
        self.stream.extend((0..request.payload).map(|at| byte(cookie, at)));
        let (error, data) = self.outcome(&request);
        let is_read = kind == 0;
        self.sent.push(Sent {
            asked: Asked { offset, length, is_read },
            command: request.command,
            flags: header.flags,
            error,
            got: vec![None; if is_read && error == 0 { length as usize } else { 0 }],
            data,
            answered: false,
        });
        // Of extended requests no payload that is longer than agreed is skipped.
        request.refusal.is_none() || self.style != Style::Extended || request.payload <= rules.max_payload
    }

    fn outcome(&mut self, request: &Request) -> (u32, Vec<Option<u8>>) {
        if let Some(refusal) = request.refusal {
            return (refusal.code as u32, Vec::new());
        }
        let Header { cookie, offset, length, .. } = request.header;
        let fails = length > 0 && offset + length > ENDS[2];
        let range = offset as usize..(offset + length) as usize;
        match request.command {
            Some(Command::Read) if fails => (EIO, Vec::new()),
            Some(Command::Read) => (0, self.bytes[range].to_vec()),
            Some(Command::Write | Command::Trim | Command::WriteZeroes) => {
                let writes = request.command == Some(Command::Write);
                for at in range.filter(|&at| is_memory(at as u64)) {
                    let new = if writes { byte(cookie, at as u64 - offset) } else { 0 };
                    self.bytes[at] = (!fails).then_some(new);
                }
                (if fails { EIO } else { 0 }, Vec::new())
            }
            _ => (0, Vec::new()),
        }
    }

    /// What the client has received, taken apart; returns how much of it was whole replies.
    fn receive(&mut self, bytes: &[u8]) -> usize {
        let mut at = 0;
        loop {
            let asked = |cookie: u64| self.sent[usize::try_from(cookie).expect("a cookie that was sent")].asked;
            let Some((cookie, reply, taken)) = take(self.style, &bytes[at..], asked) else {
                return at;
            };
            at += taken;
            self.sent[cookie as usize].receive(reply);
        }
    }

    fn check(&self) {
        for (cookie, sent) in self.sent.iter().enumerate() {
            assert!(sent.answered || !self.all_answered, "request {cookie} was never answered: {:?}", sent.asked);
        }
    }
}

impl Sent {
    fn receive(&mut self, reply: Reply) {
        assert!(!self.answered, "{:?} was answered already, and now {reply:?}", self.asked);
        match reply {
            Reply::Success => {
                assert_eq!(self.error, 0, "{:?}", self.asked);
                assert!(self.got.is_empty() && self.command != Some(Command::BlockStatus), "success says too little");
                self.answered = true;
            }
            Reply::Error(error) => {
                // Block status of a range that fails is whatever the engine makes of it.
                assert!(error == self.error, "{:?}: {error}, not {}", self.asked, self.error);
                self.answered = true;
            }
            Reply::Data { offset, bytes, last } => {
                self.data(offset, bytes.into_iter(), last);
            }
            Reply::Hole { offset, length, last } => {
                assert!(self.flags & flags::DF == 0, "a hole, though fragments are not wanted");
                self.data(offset, std::iter::repeat_n(0, length as usize), last);
            }
            Reply::Status { context, extents, last } => {
                assert!(last && context == 1 && self.command == Some(Command::BlockStatus) && !extents.is_empty());
                assert!(extents.iter().all(|&(length, flags)| length > 0 && flags < 4));
                let sum: u64 = extents.iter().map(|(length, _)| length).sum();
                assert!(sum <= self.asked.length, "{sum} bytes of {:?}", self.asked);
                assert!(self.flags & flags::REQ_ONE == 0 || extents.len() == 1);
                self.answered = true;
            }
        }
    }

    fn data(&mut self, offset: u64, bytes: impl ExactSizeIterator<Item = u8>, last: bool) {
        assert!(self.command == Some(Command::Read) && self.error == 0, "data for {:?}", self.asked);
        assert!(offset >= self.asked.offset, "data in front of {:?}", self.asked);
        let start = (offset - self.asked.offset) as usize;
        assert!(bytes.len() <= self.got.len() - start.min(self.got.len()), "data behind {:?}", self.asked);
        for (at, byte) in (start..).zip(bytes) {
            assert_eq!(self.got[at].replace(byte), None, "byte {at} of {:?} comes twice", self.asked);
            assert!(self.data[at].is_none_or(|wanted| wanted == byte), "byte {at} of {:?} is {byte}", self.asked);
        }
        if last {
            assert!(self.got.iter().all(Option::is_some), "{:?} came in part", self.asked);
            self.answered = true;
        }
    }
}

/// A byte of what request `cookie` writes.
fn byte(cookie: u64, at: u64) -> u8 {
    (cookie as u8).wrapping_mul(31).wrapping_add((at / 5) as u8) | 1
}

fn is_memory(at: u64) -> bool {
    at < ENDS[0] || (ENDS[1]..ENDS[2]).contains(&at)
}

fn device() -> Arc<Device> {
    let region = |size| {
        let fd = memfd_create("fuzz", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).expect("memfd");
        ftruncate(&fd, size).expect("a size");
        fcntl_add_seals(&fd, SealFlags::SHRINK).expect("seals");
        Arc::new(Region::new(fd, size, 4096).expect("a region"))
    };
    let extents = [
        Extent::Memory { region: region(ENDS[0]), offset: 0 },
        Extent::Zero { discard_writes: true },
        Extent::Memory { region: region(ENDS[2] - ENDS[1]), offset: 0 },
        Extent::Error(blkloom_io::Errno::IO),
    ];
    let starts = [0, ENDS[0], ENDS[1], ENDS[2]];
    let parts = starts.into_iter().zip(ENDS).zip(extents).zip(0..);
    let segments = parts.map(|(((start, end), extent), owner)| Segment { start, end, owner, extent }).collect();
    let map = Map::new(segments, vec![]).expect("a map");
    Device::new("fuzz".into(), Some(Arc::new(Mapping::new(map).expect("in bounds"))), PATIENCE).expect("a device")
}

/// Two engines, as an old and a new process have them.
fn engines() -> &'static [Engine; 2] {
    static ENGINES: OnceLock<[Engine; 2]> = OnceLock::new();
    let engine = || Engine::new(1, IoChoice::Threads, Duration::from_micros(20), 1).expect("an engine");
    ENGINES.get_or_init(|| [engine(), engine()])
}

/// The client's side, and who serves it.
struct Connection {
    style: Style,
    block_status: bool,
    export: Arc<Export>,
    notices: Arc<Notices>,
    handle: Option<TransportHandle>,
    moves: usize,
    socket: UnixStream,
    received: Vec<u8>,
    hung_up: bool,
}

impl Connection {
    fn serve(&mut self, fd: OwnedFd, unfinished: Unfinished) {
        let selected = if self.block_status { vec![Selected { id: 1, context: None }] } else { Vec::new() };
        let (style, contexts, max_payload, stall) = (self.style, selected.into(), MAX_PAYLOAD, PATIENCE);
        let session = Session { style, contexts, unfinished, read_only: false, max_payload, stall };
        let recipient = Recipient { notices: self.notices.clone(), token: 1 };
        let served = nbd::serve(&engines()[self.moves % 2], &self.export, fd, session, recipient);
        self.handle = Some(served.expect("an engine that runs"));
    }

    /// From one engine to the other, unless it has ended.
    fn hand_over(&mut self) {
        let Some(handle) = self.handle.take() else {
            return;
        };
        handle.detach(false);
        if let Outcome::Detached(left) = self.outcome() {
            let Detached { fd, unfinished } = *left.downcast().expect("what an NBD connection leaves");
            self.moves += 1;
            self.serve(fd, unfinished);
        }
    }

    fn outcome(&self) -> Outcome {
        let fd = self.notices.fd();
        poll(&mut [PollFd::new(&fd, PollFlags::IN)], None).expect("poll");
        let mut all = self.notices.take();
        assert_eq!(all.len(), 1, "a connection ends once");
        all.remove(0).outcome
    }

    /// Receives what there is; true if it was anything.
    fn receive(&mut self, model: &mut Model) -> bool {
        let mut bytes = [0; 64 << 10];
        match self.socket.read(&mut bytes) {
            Ok(0) => self.hung_up = true,
            Ok(count) => {
                self.received.extend_from_slice(&bytes[..count]);
                let whole = model.receive(&self.received);
                self.received.drain(..whole);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return false,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => self.hung_up = true,
            Err(error) => panic!("receive: {error}"),
        }
        true
    }

    fn send(&mut self, mut bytes: &[u8], model: &mut Model) {
        while !bytes.is_empty() && !self.hung_up {
            match self.socket.write(bytes) {
                Ok(count) => bytes = &bytes[count..],
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if !self.receive(model) {
                        self.wait(PollFlags::IN | PollFlags::OUT);
                    }
                }
                // It ended; what it said before can still be received.
                Err(_) => return,
            }
        }
    }

    fn wait(&self, wanted: PollFlags) {
        poll(&mut [PollFd::new(&self.socket, wanted)], None).expect("poll");
    }
}

fuzz_target!(|case: Case| {
    let style = [Style::Simple, Style::Structured, Style::Extended][usize::from(case.style % 3)];
    let mut model = Model::new(&case, style);
    let (socket, served) = UnixStream::pair().expect("sockets");
    socket.set_nonblocking(true).expect("a mode");
    let export = Export::new(device(), "fuzz".into(), case.read_only);
    let mut connection = Connection {
        style,
        block_status: case.block_status && style != Style::Simple,
        export,
        notices: Arc::new(Notices::new().expect("eventfd")),
        handle: None,
        moves: 0,
        socket,
        received: Vec::new(),
        hung_up: false,
    };
    connection.serve(served.into(), Unfinished::default());

    let stream = std::mem::take(&mut model.stream);
    let mut pieces = case.pieces.iter().map(|&piece| usize::from(piece)).cycle();
    let (mut at, mut number) = (0, 0u8);
    while at < stream.len() {
        // The last piece number stands for all that follow: a stream has no more moves than a byte can tell.
        if case.moves.iter().take(6).any(|&before| before == number) {
            connection.hand_over();
        }
        number = number.saturating_add(1);
        let piece = pieces.next().filter(|&piece| piece > 0 && number < u8::MAX).unwrap_or(stream.len());
        let end = stream.len().min(at + piece);
        connection.send(&stream[at..end], &mut model);
        at = end;
    }
    if matches!(case.ending, Ending::Cut(_)) {
        connection.socket.shutdown(std::net::Shutdown::Write).expect("a socket");
    }
    while !connection.hung_up {
        if !connection.receive(&mut model) {
            connection.wait(PollFlags::IN);
        }
    }
    if connection.handle.take().is_some() {
        assert!(matches!(connection.outcome(), Outcome::Closed { .. }));
    }
    model.check();
});
