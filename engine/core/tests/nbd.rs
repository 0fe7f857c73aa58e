//! NBD connections with a raw client: many requests at once, large replies, early bytes, and all ways to end. (Python
//! tests check each kind of request.)
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blkloom_core::nbd::{self, Session};
use blkloom_core::{Answer, Device, Engine, Export, IoChoice, Notices, Op, Outcome, Recipient, TransportHandle};
use blkloom_map::Extent;
use blkloom_wire::Style;
use rig::hosts::{self, DISCONNECT, FLUSH, READ, WRITE};
use rig::*;

fn request(command: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    hosts::request(Style::Structured, command, cookie, offset, len.into())
}

struct Client {
    socket: UnixStream,
    handle: TransportHandle,
}

struct Server {
    engine: Engine,
    export: Arc<Export>,
    notices: Arc<Notices>,
}

impl Server {
    fn new(engine: Engine, device: &Arc<Device>) -> Server {
        let export = Export::new(device.clone(), "test".into(), false);
        Server { engine, export, notices: Arc::new(Notices::new().unwrap()) }
    }

    fn connect(&self, initial: Vec<u8>) -> Client {
        let (socket, served) = UnixStream::pair().unwrap();
        // Both directions have a timeout: the test fails if the server forgets a client.
        socket.set_read_timeout(Some(PATIENT)).unwrap();
        socket.set_write_timeout(Some(PATIENT)).unwrap();
        Client { socket, handle: self.serve(served.into(), initial) }
    }

    fn serve(&self, fd: OwnedFd, initial: Vec<u8>) -> TransportHandle {
        let session = Session {
            style: Style::Simple,
            contexts: Box::default(),
            unfinished: initial.into(),
            read_only: false,
            max_payload: 32 << 20,
            stall: PATIENT,
        };
        let recipient = Recipient { notices: self.notices.clone(), token: 7 };
        nbd::serve(&self.engine, &self.export, fd, session, recipient).unwrap()
    }

    /// Waits until `count` connections have ended.
    fn ends(&self, count: usize) -> Vec<String> {
        let mut reasons = Vec::new();
        while reasons.len() < count {
            let fd = self.notices.fd();
            let mut polled = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
            let patience = rustix::event::Timespec { tv_sec: PATIENT.as_secs() as i64, tv_nsec: 0 };
            assert_eq!(rustix::event::poll(&mut polled, Some(&patience)).unwrap(), 1, "a connection never ended");
            for notice in self.notices.take() {
                let Outcome::Closed { reason } = notice.outcome else { panic!("no I/O was submitted") };
                reasons.push(reason);
            }
        }
        assert!(self.export.transports().is_empty());
        reasons
    }
}

impl Client {
    /// The next reply: (error, cookie).
    fn reply(&mut self) -> (u32, u64) {
        let mut head = [0; 16];
        self.socket.read_exact(&mut head).unwrap();
        assert_eq!(head[..4], 0x6744_6698u32.to_be_bytes());
        let error = u32::from_be_bytes(head[4..8].try_into().unwrap());
        (error, u64::from_be_bytes(head[8..].try_into().unwrap()))
    }

    fn data(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.socket.read_exact(&mut bytes).unwrap();
        bytes
    }
}

/// A device whose first half is memory with its offsets as contents, and whose second half faults.
const HALF: u64 = 1 << 20;

fn speaking() -> Arc<Device> {
    let place = region(HALF);
    let bytes = expected(0, HALF as usize);
    place.write(0, bytes[..].into());
    let device = device(mapping(vec![(HALF, memory(&place, 0)), (HALF, Extent::Fault)], vec![]));
    device.attach_mapper();
    device
}

fn expected(offset: u64, len: usize) -> Vec<u8> {
    (offset..offset + len as u64).map(|at| (at / 512 % 251) as u8).collect()
}

fn serve_faults(device: &Device) {
    while let Some(faults) = device.next_faults(None) {
        for mut fault in faults {
            let bytes = expected(fault.offset, fault.len as usize);
            fault.answer(Answer::Done(Some(bytes)));
        }
    }
}

/// More clients than a loop polls. Each sends more requests than a connection may have in flight, so that received
/// requests must wait for those in flight.
#[test]
fn floods_on_many_connections_are_answered_to_the_last() {
    const CLIENTS: u64 = 14;
    const EACH: u64 = 3000;
    for (name, engine) in engines() {
        let device = speaking();
        let server = Server::new(engine, &device);
        let offset = |client: u64, i: u64| (client * 7 + i * 13) % (2 * HALF / 512) * 512;
        std::thread::scope(|scope| {
            let mapper = scope.spawn(|| serve_faults(&device));
            let clients: Vec<_> = (0..CLIENTS)
                .map(|number| {
                    let mut client = server.connect(Vec::new());
                    scope.spawn(move || {
                        let mut sender = client.socket.try_clone().unwrap();
                        let sending = std::thread::spawn(move || {
                            let all: Vec<u8> =
                                (0..EACH).flat_map(|i| request(READ, i, offset(number, i), 512)).collect();
                            sender.write_all(&all).unwrap();
                        });
                        let mut open: BTreeMap<u64, ()> = (0..EACH).map(|cookie| (cookie, ())).collect();
                        while !open.is_empty() {
                            let (error, cookie) = client.reply();
                            assert_eq!((error, open.remove(&cookie)), (0, Some(())), "each is answered once");
                            assert!(client.data(512) == expected(offset(number, cookie), 512));
                        }
                        sending.join().unwrap();
                        client.socket.write_all(&request(DISCONNECT, 0, 0, 0)).unwrap();
                        assert_eq!(client.socket.read(&mut [0]).unwrap(), 0);
                    })
                })
                .collect();
            let ended: Vec<_> = clients.into_iter().map(|client| client.join()).collect();
            device.close();
            mapper.join().unwrap();
            assert!(ended.iter().all(Result::is_ok), "with {name}");
        });
        assert!(server.ends(CLIENTS as usize).iter().all(|reason| reason == "the client disconnected"));
    }
}

/// A connection serves up to 1024 requests at a time. Received requests beyond that are served when those have ended,
/// here all together, although no new input arrives on the socket.
#[test]
fn requests_beyond_the_in_flight_limit_are_served_when_others_have_ended() {
    const CLIENTS: usize = 12;
    const MOST: usize = 1024;
    for (_, engine) in engines() {
        let device = speaking();
        let server = Server::new(engine, &device);
        let mut clients: Vec<Client> = (0..CLIENTS).map(|_| server.connect(Vec::new())).collect();
        let _idle: Vec<Client> = (0..4).map(|_| server.connect(Vec::new())).collect();
        for _ in 0..12 {
            let all: Vec<u8> = (0..MOST as u64 + 5).flat_map(|i| request(READ, i, HALF, 512)).collect();
            clients.iter_mut().for_each(|client| client.socket.write_all(&all).unwrap());
            for count in [MOST, 5] {
                let mut faults = Vec::new();
                while faults.len() < CLIENTS * count {
                    let more = device.next_faults(Some(PATIENT)).unwrap();
                    assert!(!more.is_empty(), "requests that were received are forgotten");
                    faults.extend(more);
                }
                faults.iter_mut().for_each(|fault| fault.answer(Answer::Done(Some(vec![3; 512]))));
                for client in &mut clients {
                    for reply in client.data(count * 528).chunks(528) {
                        assert_eq!((&reply[4..8], &reply[16..]), (&[0; 4][..], &[3; 512][..]));
                    }
                }
            }
        }
        device.close();
    }
}

/// The client sends all requests before it receives a reply: the replies exceed the buffer for a client.
#[test]
fn clients_that_read_late_get_everything_in_the_end() {
    const LEN: u32 = 100_000;
    const EACH: u64 = 80;
    for (_, engine) in engines() {
        let device = speaking();
        let server = Server::new(engine, &device);
        let mut clients: Vec<Client> = (0..12).map(|_| server.connect(Vec::new())).collect();
        for client in &mut clients {
            let all: Vec<u8> = (0..EACH).flat_map(|i| request(READ, i, i * 512, LEN)).collect();
            client.socket.write_all(&all).unwrap();
        }
        for client in &mut clients {
            for i in 0..EACH {
                assert_eq!(client.reply(), (0, i), "what is done at once is answered in order");
                assert!(client.data(LEN as usize) == expected(i * 512, LEN as usize));
            }
        }
        drop(clients);
        assert!(server.ends(12).iter().all(|reason| reason == "the client hung up"));
        device.close();
    }
}

#[test]
fn what_the_handshake_received_too_early_is_served_however_much_it_is() {
    let engine = engines().remove(0).1;
    let device = speaking();
    let server = Server::new(engine, &device);
    const COUNT: u64 = 30_000; // three times the size of one receive
    let mut early: Vec<u8> = (0..COUNT).flat_map(|i| request(FLUSH, i, 0, 0)).collect();
    let late = early.split_off(early.len() - 13);
    let mut client = server.connect(early);
    client.socket.write_all(&late).unwrap();
    (0..COUNT).for_each(|i| assert_eq!(client.reply(), (0, i)));
    device.close();
}

#[test]
fn writes_arrive_whole_however_they_are_cut() {
    const COUNT: u64 = 40;
    // A direct file gets a large write whole; memory and files on tmpfs get it in parts.
    let places = [
        (data(&file(1 << 20, true), 0), 25_000),
        (memory(&region(1 << 24), 0), 400_000),
        (data(&file_in_memory(1 << 24), 0), 400_000),
    ];
    for ((place, most), (_, engine)) in places.iter().flat_map(|place| engines().into_iter().map(move |e| (place, e))) {
        let size = COUNT * most;
        let device = device(mapping(vec![(size, place.clone())], vec![]));
        let server = Server::new(engine, &device);
        let mut client = server.connect(Vec::new());
        let (mut random, mut model, mut all) = (Random::new(3), vec![0u8; size as usize], Vec::new());
        for cookie in 0..COUNT {
            // Disjoint, because requests in flight have no order.
            let (offset, len) = (cookie * most, 1 + random.below(*most));
            all.extend(request(WRITE, cookie, offset, len as u32));
            let bytes = random_bytes(cookie, len as usize);
            model[offset as usize..(offset + len) as usize].copy_from_slice(&bytes);
            all.extend(bytes);
        }
        let mut rest = &all[..];
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(1 + random.below(most / 3) as usize));
            client.socket.write_all(now).unwrap();
            rest = later;
        }
        let mut open: Vec<u64> = (0..COUNT)
            .map(|_| client.reply())
            .map(|(error, cookie)| {
                assert_eq!(error, 0);
                cookie
            })
            .collect();
        open.sort_unstable();
        assert!(open.into_iter().eq(0..COUNT));
        client.socket.write_all(&request(READ, 9, 0, size as u32)).unwrap();
        assert_eq!(client.reply(), (0, 9));
        assert!(client.data(size as usize) == model);
    }
}

/// A device of memory with a range that faults, and the payload of a large write.
const LARGE: usize = 1 << 20;

fn gapped(faults: std::ops::Range<u64>) -> Arc<Device> {
    let place = region(4 << 20);
    let parts = vec![
        (faults.start, memory(&place, 0)),
        (faults.end - faults.start, Extent::Fault),
        ((4 << 20) - faults.end, memory(&place, faults.end)),
    ];
    let device = device(mapping(parts, vec![]));
    device.attach_mapper();
    device
}

fn random_bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random::new(seed);
    (0..len).map(|_| random.next() as u8).collect()
}

/// Waits until the device has these bytes.
fn until_there(engine: &Engine, device: &Arc<Device>, offset: u64, bytes: &[u8]) {
    let (mut there, since) = (vec![0; bytes.len()], Instant::now());
    while there != bytes {
        assert!(since.elapsed() < PATIENT, "{} bytes at {offset} never came", bytes.len());
        std::thread::yield_now();
        read(engine, device, offset, &mut there).unwrap();
    }
}

/// Sends the first half of a large write, and waits until some of it is on the device.
fn half_a_write(client: &mut Client, server: &Server, device: &Arc<Device>, offset: u64, payload: &[u8]) {
    client.socket.write_all(&request(WRITE, 1, offset, LARGE as u32)).unwrap();
    client.socket.write_all(&payload[..LARGE / 2]).unwrap();
    until_there(&server.engine, device, offset, &payload[..LARGE / 4]);
}

#[test]
fn a_large_write_to_memory_is_done_while_it_comes() {
    for (_, engine) in engines() {
        let device = gapped((2 << 20)..(3 << 20));
        let server = Server::new(engine, &device);
        let mut client = server.connect(Vec::new());
        let (offset, payload) = (12_345, random_bytes(1, LARGE));
        half_a_write(&mut client, &server, &device, offset, &payload);
        client.socket.write_all(&payload[LARGE / 2..]).unwrap();
        assert_eq!(client.reply(), (0, 1));
        until_there(&server.engine, &device, offset, &payload);
        let totals = || server.export.stats.totals().ops.into_iter().find(|op| op.op == Op::Write).unwrap();
        while totals().count == 0 {
            std::thread::yield_now(); // requests are counted after they are answered
        }
        assert_eq!((totals().count, totals().bytes), (1, LARGE as u64));
    }
}

#[test]
fn the_rest_of_a_large_write_that_faults_waits_for_its_whole_payload() {
    for (_, engine) in engines() {
        let gap = 500_000..600_000;
        let device = gapped(gap.clone());
        let server = Server::new(engine, &device);
        let mut client = server.connect(Vec::new());
        let payload = random_bytes(2, LARGE);
        client.socket.write_all(&request(WRITE, 1, 0, LARGE as u32)).unwrap();
        let (most, last) = payload.split_at(LARGE - 1);
        client.socket.write_all(most).unwrap();
        until_there(&server.engine, &device, 0, &payload[..128 << 10]);
        assert_eq!(device.next_faults(Some(Duration::ZERO)).unwrap().len(), 0);
        client.socket.write_all(last).unwrap();
        let mut faults = device.next_faults(Some(PATIENT)).unwrap();
        assert_eq!((faults[0].offset, faults[0].len), (gap.start, gap.end - gap.start));
        assert!(faults[0].payload() == &payload[gap.start as usize..gap.end as usize]);
        faults[0].answer(Answer::Done(None));
        assert_eq!(client.reply(), (0, 1));
        until_there(&server.engine, &device, 0, &payload[..gap.start as usize]);
        until_there(&server.engine, &device, gap.end, &payload[gap.end as usize..]);
    }
}

#[test]
fn the_reply_to_a_large_write_has_its_original_offset() {
    for style in hosts::STYLES {
        let host = hosts::Host::new(hosts::threads(), hosts::memory_device(4 << 20));
        let (mut client, _handle) = host.connect(style);
        let payload = vec![5; hosts::MOST_PAYLOAD as usize];
        client.send(WRITE, 1, 8192, payload.len() as u64, &payload);
        client.done(1);
        assert!(style != Style::Extended || client.told == 8192, "an extended reply names the wrong place");
    }
}

#[test]
fn a_large_write_waits_for_the_resume_and_does_not_block_a_suspend() {
    for (_, engine) in engines() {
        let device = gapped((2 << 20)..(3 << 20));
        let server = Server::new(engine, &device);
        let mut client = server.connect(Vec::new());
        let (first, second) = (random_bytes(3, LARGE), random_bytes(4, LARGE));
        half_a_write(&mut client, &server, &device, 0, &first);
        server.engine.suspend(&device, false, Some(Instant::now() + PATIENT)).unwrap();
        client.socket.write_all(&first[LARGE / 2..]).unwrap();
        while device.stats().totals().in_flight == 0 {
            std::thread::yield_now(); // until the rest waits at the gate
        }
        device.resume();
        assert_eq!(client.reply(), (0, 1));
        until_there(&server.engine, &device, 0, &first);
        // Of a write that is never complete, only the received parts are written.
        half_a_write(&mut client, &server, &device, 0, &second);
        drop(client);
        server.ends(1);
        let mut there = vec![0; LARGE];
        read(&server.engine, &device, 0, &mut there).unwrap();
        assert!(there[LARGE / 2..] == first[LARGE / 2..]);
    }
}

#[test]
fn a_client_that_vanishes_leaves_nothing_behind_once_its_requests_have_ended() {
    for (_, engine) in engines() {
        let device = speaking();
        let server = Server::new(engine, &device);
        let mut client = server.connect(Vec::new());
        client.socket.write_all(&request(READ, 1, HALF, 512)).unwrap();
        let mut faults = device.next_faults(Some(PATIENT)).unwrap();
        client.socket.write_all(&request(WRITE, 2, 0, 1 << 20)).unwrap();
        client.socket.write_all(&[1; 5000]).unwrap();
        drop(client);
        // In the middle of a payload, and with a fault at the mapper that keeps the connection alive.
        assert!(server.notices.take().is_empty());
        faults[0].answer(Answer::Done(Some(vec![0; 512])));
        server.ends(1); // the reason is the end of input or the broken pipe, whichever is detected first
        assert_eq!(device.stats().totals().in_flight, 0);
    }
}

/// A write of nines that waits at the gate of its suspended device.
fn waiting_write(server: &Server, device: &Device) -> Client {
    let mut client = server.connect(Vec::new());
    client.socket.write_all(&[request(WRITE, 1, 0, 512), vec![9; 512]].concat()).unwrap();
    while device.stats().totals().in_flight == 0 {
        std::thread::yield_now();
    }
    client
}

#[test]
fn waiting_requests_of_a_vanished_client_are_never_executed() {
    for (_, engine) in engines() {
        let device = speaking();
        let server = Server::new(engine, &device);
        server.engine.suspend(&device, false, Some(Instant::now() + PATIENT)).unwrap();
        drop(waiting_write(&server, &device));
        server.ends(1);
        assert_eq!(device.stats().totals().in_flight, 0);
        device.resume();
        let mut there = vec![0; 512];
        read(&server.engine, &device, 0, &mut there).unwrap();
        assert_eq!(there, expected(0, 512));
        // The same for a deferred write, whether the client vanishes before or after the target's answer.
        for vanishes_first in [false, true] {
            let mut client = server.connect(Vec::new());
            client.socket.write_all(&request(READ, 2, HALF, 512)).unwrap();
            let mut faults = device.next_faults(Some(PATIENT)).unwrap();
            if vanishes_first {
                drop(client);
                faults[0].defer(Errno::NOSPC);
            } else {
                faults[0].defer(Errno::NOSPC);
                drop(client);
            }
            server.ends(1);
            assert_eq!((device.deferred(), device.stats().totals().in_flight), (0, 0));
        }
    }
}

#[test]
fn requests_before_a_disconnect_are_executed() {
    for (_, engine) in engines() {
        let device = speaking();
        let server = Server::new(engine, &device);
        server.engine.suspend(&device, false, Some(Instant::now() + PATIENT)).unwrap();
        let mut client = waiting_write(&server, &device);
        client.socket.write_all(&request(DISCONNECT, 2, 0, 0)).unwrap();
        drop(client);
        device.resume();
        server.ends(1);
        let mut there = vec![0; 512];
        read(&server.engine, &device, 0, &mut there).unwrap();
        assert_eq!(there, [9; 512]);
    }
}

#[test]
fn a_connection_that_is_closed_answers_what_is_in_flight_first() {
    for (_, engine) in engines() {
        let device = speaking();
        let server = Server::new(engine, &device);
        let mut client = server.connect(Vec::new());
        client.socket.write_all(&request(READ, 1, HALF, 512)).unwrap();
        let mut faults = device.next_faults(Some(PATIENT)).unwrap();
        client.handle.close();
        client.handle.close();
        faults[0].answer(Answer::Done(Some(vec![5; 512])));
        assert_eq!((client.reply(), client.data(512)), ((0, 1), vec![5; 512]));
        assert_eq!(client.socket.read(&mut [0]).unwrap(), 0);
        assert_eq!(server.ends(1), ["closed by the server"]);
    }
}

#[test]
fn after_its_device_has_closed_a_client_is_told_of_the_shutdown() {
    let engine = engines().remove(0).1;
    let device = speaking();
    let server = Server::new(engine, &device);
    let mut client = server.connect(Vec::new());
    device.close();
    client.socket.write_all(&request(READ, 1, 0, 512)).unwrap();
    client.socket.write_all(&[request(WRITE, 2, 0, 512), vec![0; 512]].concat()).unwrap();
    client.socket.write_all(&request(FLUSH, 3, 0, 0)).unwrap();
    for cookie in 1..4 {
        assert_eq!(client.reply(), (ESHUTDOWN.raw_os_error() as u32, cookie));
    }
}

#[test]
fn closing_the_engine_closes_its_connections_though_requests_wait_at_a_gate() {
    for (_, engine) in engines() {
        let device = speaking();
        let server = Server::new(engine, &device);
        let mut client = server.connect(Vec::new());
        server.engine.suspend(&device, true, None).unwrap();
        client.socket.write_all(&request(READ, 1, 0, 512)).unwrap();
        while device.stats().totals().in_flight == 0 {
            std::thread::yield_now();
        }
        server.engine.close();
        assert_eq!(client.reply(), (ESHUTDOWN.raw_os_error() as u32, 1));
        assert_eq!(client.socket.read(&mut [0]).unwrap(), 0);
        assert_eq!(server.ends(1), ["closed by the server"]);
    }
}

/// A client of an idle loop receives the first data before all of its requests have been served.
#[test]
fn an_idle_loop_sends_the_first_replies_before_it_serves_the_last_requests() {
    use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};
    const REQUESTS: u64 = 15;
    const REPLY: usize = 16 + 4096;
    let server = Server::new(Engine::new(1, IoChoice::Threads, Duration::ZERO, 1).unwrap(), &speaking());
    // A socket that preserves the boundaries of the sends.
    let (client, served) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    let _handle = server.serve(served, Vec::new());
    let since = Instant::now();
    loop {
        let together: Vec<u8> = (0..REQUESTS).flat_map(|cookie| request(READ, cookie, cookie * 4096, 4096)).collect();
        send(&client, &together, SendFlags::empty()).unwrap();
        let (mut replies, mut sends) = (Vec::new(), Vec::new());
        while replies.len() < REQUESTS as usize * REPLY {
            let mut message = vec![0; REQUESTS as usize * REPLY];
            let (length, _) = recv(&client, &mut message[..], RecvFlags::empty()).unwrap();
            replies.extend_from_slice(&message[..length]);
            sends.push(length / REPLY);
        }
        for (cookie, reply) in (0..REQUESTS).zip(replies.chunks(REPLY)) {
            assert_eq!(reply[8..16], cookie.to_be_bytes());
            assert!(reply[16..] == expected(cookie * 4096, 4096));
        }
        if sends == [4, 8, 3] {
            break;
        }
        // The loop was not idle yet.
        assert_eq!(sends, [REQUESTS as usize]);
        assert!(since.elapsed() < PATIENT, "the loop never waits");
    }
    drop(client);
    assert_eq!(server.ends(1).len(), 1);
}
