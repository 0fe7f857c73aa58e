//! A minimal transport: reads and writes of one block, one packet each, over a socket pair. It shows that a new
//! transport needs one file and no change elsewhere in the engine.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use blkloom_core::fast_path::{self, Besides, Patience, Progress};
use blkloom_core::{
    Answer, Device, Ended, Engine, Export, Flags, LoopContext, Memory, Op, Outcome, Recipient, Request, Reservation,
    Status, Transport, TransportHandle,
};
use blkloom_io::Buffer;
use blkloom_map::Extent;
use blkloom_wire::Style;
use rig::hosts::{self, Host, memory_device};
use rig::*;
use rustix::event::epoll::EventFlags;
use rustix::io::{Errno, retry_on_intr};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};

const BLOCK: usize = 512;
/// Operation (0 read, 1 write), cookie and block number, 8 bytes each; a write's block follows.
const HEAD: usize = 24;
const MOST_IN_FLIGHT: usize = 64;

/// A request; or a reply, with an errno in place of the operation, and the block of a read at the end.
fn packet(operation: u64, cookie: u64, number: u64, block: &[u8]) -> Vec<u8> {
    let head = [operation, cookie, number].map(u64::to_ne_bytes).concat();
    [&head, block].concat()
}

fn parse(packet: &[u8]) -> (u64, u64, u64, &[u8]) {
    let field = |at: usize| u64::from_ne_bytes(packet[at..at + 8].try_into().unwrap());
    (field(0), field(8), field(16), &packet[HEAD..])
}

enum State {
    Open,
    /// The requests that were taken back.
    Detaching(Vec<Vec<u8>>),
    Closing(String),
    Gone(String),
}

struct Blocks {
    socket: OwnedFd,
    export: Arc<Export>,
    /// Block numbers of requests in the queue, by cookie, which is the token.
    in_flight: BTreeMap<u64, u64>,
    replies: VecDeque<Vec<u8>>,
    sent: u64,
    state: State,
}

/// The state for the next engine.
struct Left {
    socket: OwnedFd,
    requests: Vec<Vec<u8>>,
    replies: VecDeque<Vec<u8>>,
}

fn serve(engine: &Engine, export: &Arc<Export>, socket: OwnedFd, recipient: Recipient) -> TransportHandle {
    let (in_flight, replies) = (BTreeMap::new(), VecDeque::new());
    let blocks = Blocks { socket, export: export.clone(), in_flight, replies, sent: 0, state: State::Open };
    engine.serve(export, Box::new(blocks), recipient).unwrap()
}

impl Blocks {
    fn reads(&self) -> bool {
        matches!(self.state, State::Open) && self.in_flight.len() + self.replies.len() < MOST_IN_FLIGHT
    }

    fn request(&mut self, bytes: &[u8], cx: &mut LoopContext) {
        let (operation, cookie, number, block) = parse(bytes);
        let (device, offset, started) = (&self.export.device, number * BLOCK as u64, Instant::now());
        let op = if operation == 0 { Op::Read } else { Op::Write };
        let mut buffer = cx.buffers.take(BLOCK);
        if op == Op::Write {
            buffer.bytes_mut().copy_from_slice(block);
        }
        let attempt = match op {
            Op::Read => fast_path::read(device, cx.shard, offset, buffer.slice(), Patience::Nowait, Besides::default()),
            _ => fast_path::write(device, cx.shard, offset, buffer.bytes().into(), Patience::Nowait),
        };
        let error = match attempt {
            Progress::Queue(done) => {
                self.export.stats.start(cx.shard, 1);
                self.in_flight.insert(cookie, number);
                return cx.submit(Request {
                    device: device.clone(),
                    op,
                    offset,
                    len: BLOCK as u64,
                    flags: Flags::default(),
                    memory: Memory::owned(buffer),
                    owner: cx.owner(cookie),
                    started,
                    context: None,
                    done,
                });
            }
            Progress::Done => None,
            Progress::Failed(errno) => Some(errno),
        };
        cx.count(&self.export, op, (1, BLOCK as u64, u64::from(error.is_some())), started);
        self.reply(op, error, cookie, number, buffer.bytes());
        cx.buffers.put(buffer);
    }

    fn reply(&mut self, op: Op, error: Option<Errno>, cookie: u64, number: u64, read: &[u8]) {
        if matches!(self.state, State::Gone(_)) {
            return;
        }
        let block = if op == Op::Read && error.is_none() { read } else { &[] };
        self.replies.push_back(packet(error.map_or(0, Errno::raw_os_error) as u64, cookie, number, block));
    }
}

impl Transport for Blocks {
    fn kind(&self) -> &'static str {
        "blocks"
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn status(&self) -> Status {
        let mut interest = EventFlags::empty();
        interest.set(EventFlags::IN, self.reads());
        interest.set(EventFlags::OUT, !self.replies.is_empty());
        let idle = self.in_flight.is_empty();
        Status {
            interest: (!matches!(self.state, State::Gone(_))).then_some(interest),
            ready: false,
            stall: (!self.replies.is_empty()).then_some(PATIENT),
            taken: (!self.replies.is_empty()).then_some(self.sent),
            leaving: matches!(self.state, State::Detaching(_) | State::Gone(_)),
            over: match self.state {
                State::Open => false,
                State::Detaching(_) | State::Gone(_) => idle,
                State::Closing(_) => idle && self.replies.is_empty(),
            },
        }
    }

    fn poll(&mut self, input: &mut Buffer, cx: &mut LoopContext) -> bool {
        let mut moved = !self.replies.is_empty();
        while self.reads() {
            match recv(&self.socket, &mut *input.bytes_mut(), RecvFlags::DONTWAIT) {
                Ok((0, _)) | Err(Errno::CONNRESET) => self.abort("the peer hung up"),
                Ok((count, _)) => self.request(&input.bytes()[..count], cx),
                Err(Errno::AGAIN) => break,
                Err(error) => self.abort(&format!("receive: {error}")),
            }
            moved = true;
        }
        self.send(cx);
        moved
    }

    fn complete(&mut self, token: u64, ended: Ended, cx: &mut LoopContext) {
        let Ended { request, error, .. } = ended;
        let number = self.in_flight.remove(&token).unwrap();
        let nanoseconds = request.started.elapsed().as_nanos() as u64;
        self.export.stats.end(cx.shard, request.op, 1, BLOCK as u64, u64::from(error.is_some()), nanoseconds);
        let Memory::Owned(buffer) = request.memory else { panic!("it was given a buffer") };
        self.reply(request.op, error, token, number, buffer.bytes());
    }

    fn send(&mut self, _: &mut LoopContext) {
        while let Some(reply) = self.replies.front() {
            match send(&self.socket, reply, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(_) => self.sent += self.replies.pop_front().unwrap().len() as u64,
                Err(Errno::AGAIN) => return,
                Err(error) => return self.abort(&format!("send: {error}")),
            }
        }
    }

    fn granted(&mut self, _: Reservation) {
        panic!("it asks for no memory");
    }

    fn detach(&mut self, _: bool) {
        if matches!(self.state, State::Open) {
            self.state = State::Detaching(Vec::new());
        }
    }

    fn take_back(&mut self, token: u64, request: Request, cx: &mut LoopContext) -> Option<Request> {
        let State::Detaching(requests) = &mut self.state else { return Some(request) };
        let number = self.in_flight.remove(&token).unwrap();
        self.export.stats.withdraw(cx.shard);
        let Memory::Owned(buffer) = &request.memory else { panic!("it was given a buffer") };
        requests.push(match request.op {
            Op::Write => packet(1, token, number, buffer.bytes()),
            _ => packet(0, token, number, &[]),
        });
        None
    }

    fn close(&mut self, reason: &str) {
        if matches!(self.state, State::Open) {
            self.state = State::Closing(reason.to_owned());
        }
    }

    fn abort(&mut self, reason: &str) {
        self.replies.clear();
        self.state = State::Gone(reason.to_owned());
    }

    fn end(self: Box<Self>) -> Outcome {
        match self.state {
            State::Detaching(requests) => {
                Outcome::Detached(Box::new(Left { socket: self.socket, requests, replies: self.replies }))
            }
            State::Closing(reason) | State::Gone(reason) => Outcome::Closed { reason },
            State::Open => panic!("an open transport is not over"),
        }
    }
}

struct Client(OwnedFd);

impl Client {
    /// A client of the host.
    fn new(host: &Host) -> (Client, TransportHandle) {
        let (client, served) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        for direction in [Timeout::Recv, Timeout::Send] {
            set_socket_timeout(&client, direction, Some(PATIENT)).unwrap();
        }
        (Client(client), serve(&host.engine, &host.export, served, recipient(host)))
    }

    fn send(&self, operation: u64, cookie: u64, number: u64, block: &[u8]) -> Vec<u8> {
        let bytes = packet(operation, cookie, number, block);
        self.put(&bytes);
        bytes
    }

    fn put(&self, bytes: &[u8]) {
        assert_eq!(retry_on_intr(|| send(&self.0, bytes, SendFlags::NOSIGNAL)).unwrap(), bytes.len());
    }

    /// (errno, cookie, block)
    fn reply(&self) -> (u64, u64, Vec<u8>) {
        let mut bytes = [0; HEAD + BLOCK];
        let count = retry_on_intr(|| recv(&self.0, &mut bytes[..], RecvFlags::empty())).unwrap().0;
        let (errno, cookie, _, block) = parse(&bytes[..count]);
        (errno, cookie, block.to_vec())
    }
}

fn recipient(host: &Host) -> Recipient {
    Recipient { notices: host.notices.clone(), token: 1 }
}

/// A device with memory, followed by a range of the same size that faults: each byte is the block's number.
fn half_faults(blocks: u64) -> Arc<Device> {
    let half = blocks / 2 * BLOCK as u64;
    let device = device(mapping(vec![(half, memory(&region(half), 0)), (half, Extent::Fault)], vec![]));
    device.attach_mapper();
    device
}

fn answer_faults(device: &Device) {
    while let Some(faults) = device.next_faults(None) {
        for mut fault in faults {
            let bytes = vec![(fault.offset / BLOCK as u64) as u8; fault.len as usize];
            fault.answer(if fault.op == Op::Read { Answer::Done(Some(bytes)) } else { Answer::Done(None) });
        }
    }
}

#[test]
fn each_request_is_answered_once_on_the_fast_path_and_through_the_queue() {
    const BLOCKS: u64 = 128;
    for (name, engine) in engines() {
        let host = Host::new(engine, half_faults(BLOCKS));
        let device = host.device.clone();
        let answering = std::thread::spawn(move || answer_faults(&device));
        let (client, handle) = Client::new(&host);
        assert_eq!(host.export.transports(), BTreeMap::from([("blocks", 1)]));
        for number in 0..BLOCKS / 2 {
            client.send(1, number, number, &[number as u8; BLOCK]);
            assert_eq!(client.reply(), (0, number, vec![]), "with {name}");
        }
        // Several rounds together, more than may be in flight; replies are taken by another thread.
        let count = 20 * BLOCKS;
        let mut answered = vec![0; count as usize];
        std::thread::scope(|scope| {
            scope.spawn(|| (0..count).for_each(|cookie| drop(client.send(0, cookie, cookie % BLOCKS, &[]))));
            for _ in 0..count {
                let (errno, cookie, block) = client.reply();
                assert_eq!((errno, block), (0, vec![(cookie % BLOCKS) as u8; BLOCK]), "{cookie} with {name}");
                answered[cookie as usize] += 1;
            }
        });
        assert!(answered.iter().all(|&times| times == 1), "with {name}");
        client.send(0, count, BLOCKS, &[]);
        assert_eq!(client.reply().0, EIO.raw_os_error() as u64, "past the end");
        handle.close();
        assert_eq!(host.closed(), "closed by the server");
        let totals = host.export.stats.totals();
        assert_eq!(totals.ops[Op::Read as usize].count, count + 1);
        assert_eq!((totals.in_flight, host.device.stats().totals().in_flight), (0, 0));
        host.device.close();
        answering.join().unwrap();
    }
}

#[test]
fn requests_at_a_gate_go_to_the_next_engine_and_are_answered_there() {
    let (old, new) =
        (Host::new(hosts::threads(), memory_device(1 << 20)), Host::new(hosts::threads(), memory_device(1 << 20)));
    let (client, handle) = Client::new(&old);
    client.send(0, 7, 0, &[]);
    assert_eq!(client.reply(), (0, 7, vec![7; BLOCK]));
    old.engine.suspend(&old.device, true, None).unwrap();
    let sent = [client.send(1, 8, 3, &[1; BLOCK]), client.send(0, 9, 4, &[])];
    old.until_in_flight(2);
    handle.detach(false);
    let Outcome::Detached(left) = old.end() else { panic!("it was to leave") };
    let Left { socket, mut requests, replies } = *left.downcast().unwrap();
    requests.sort();
    assert!(replies.is_empty() && requests.iter().eq([&sent[1], &sent[0]]), "reads sort before writes");
    assert_eq!((old.device.stats().totals().in_flight, old.export.stats.totals().in_flight), (0, 0));
    let handle = serve(&new.engine, &new.export, socket, recipient(&new));
    // As the requests were: through the socket.
    requests.iter().for_each(|request| client.put(request));
    assert_eq!(client.reply(), (0, 9, vec![7; BLOCK]));
    assert_eq!(client.reply(), (0, 8, vec![]));
    handle.close();
    assert_eq!(new.closed(), "closed by the server");
}

#[test]
fn one_export_serves_transports_of_several_kinds_side_by_side() {
    let host = Host::new(hosts::threads(), memory_device(1 << 20));
    let (client, blocks) = Client::new(&host);
    let (mut other, nbd) = host.connect(Style::Simple);
    assert_eq!(host.export.transports(), BTreeMap::from([("blocks", 1), ("nbd", 1)]));
    client.send(1, 1, 2, &[5; BLOCK]);
    assert_eq!(client.reply(), (0, 1, vec![]));
    other.send(hosts::READ, 2, 2 * BLOCK as u64, BLOCK as u64, &[]);
    assert_eq!(other.reply(|_| BLOCK), (0, 2, vec![5; BLOCK]));
    nbd.close();
    assert!(matches!(host.next_end(), Outcome::Closed { reason } if reason == "closed by the server"));
    assert_eq!(host.export.transports(), BTreeMap::from([("blocks", 1)]));
    drop(client);
    assert_eq!(host.closed(), "the peer hung up");
    blocks.close();
}

#[test]
fn waiting_requests_fail_if_the_peer_is_gone_and_no_engine_takes_over() {
    let host = Host::new(hosts::threads(), memory_device(1 << 20));
    let (client, _handle) = Client::new(&host);
    host.engine.suspend(&host.device, true, None).unwrap();
    client.send(0, 1, 0, &[]);
    host.until_in_flight(1);
    drop(client);
    assert_eq!(host.closed(), "the peer hung up");
    assert_eq!(host.device.stats().totals().in_flight, 0);
}
