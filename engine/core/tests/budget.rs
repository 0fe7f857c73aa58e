//! The memory that clients make an engine keep: bounded in all, given in the order it is asked for, and never what a
//! request inside another waits for.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use blkloom_core::{Answer, Device, Engine, Export, MemoryUse, NbdSession, Notices, Op, Outcome, Session, Unfinished};
use blkloom_map::Extent;
use blkloom_wire::Style;
use rig::hosts::{self, Client, READ, WRITE};
use rig::*;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 32 * MIB;
const LARGE: usize = 8 << 20;
const BUDGET: usize = 64 << 20;
/// Requests of so many bytes that the share of large ones has room for.
const FIT: usize = 3;

/// An engine with an export.
struct Server {
    engine: Arc<Engine>,
    export: Arc<Export>,
    notices: Arc<Notices>,
}

impl Server {
    fn new(engine: &Arc<Engine>, device: &Arc<Device>) -> Server {
        let export = Export::new(device.clone(), "test".into(), false);
        Server { engine: engine.clone(), export, notices: Arc::new(Notices::new().unwrap()) }
    }

    fn serve(&self, fd: OwnedFd, stall: Duration) {
        let session = Session {
            style: Style::Structured,
            contexts: Box::default(),
            unfinished: Unfinished::default(),
            max_payload: SIZE as u32,
            stall,
        };
        let (export, notices) = (self.export.clone(), self.notices.clone());
        let _handle = self.engine.serve_nbd(NbdSession { export, fd, session, notices, token: 1 }).unwrap();
    }

    fn connect(&self, stall: Duration) -> Client {
        let (socket, served) = UnixStream::pair().unwrap();
        socket.set_read_timeout(Some(PATIENT)).unwrap();
        socket.set_write_timeout(Some(PATIENT)).unwrap();
        self.serve(served.into(), stall);
        Client { socket, style: Style::Structured, told: 0 }
    }

    /// Waits until the memory is used as `so` says.
    fn until(&self, so: impl Fn(MemoryUse) -> bool) -> MemoryUse {
        loop {
            let used = self.engine.memory_use();
            if so(used) {
                return used;
            }
            std::thread::yield_now();
        }
    }

    fn next_end(&self) -> String {
        let fd = self.notices.fd();
        let mut polled = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
        let patience = rustix::event::Timespec { tv_sec: PATIENT.as_secs() as i64, tv_nsec: 0 };
        assert_eq!(rustix::event::poll(&mut polled, Some(&patience)).unwrap(), 1, "no connection ended");
        match self.notices.take().remove(0).outcome {
            Outcome::Closed { reason } => reason,
            _ => panic!("it did not close"),
        }
    }
}

fn with_memory(budget: usize) -> Vec<Arc<Engine>> {
    engines().into_iter().map(|(_, engine)| Arc::new(engine.with_memory(budget))).collect()
}

/// Writes to it wait for a disk, so that they need their payload whole.
fn on_disk() -> Arc<Device> {
    device(mapping(vec![(SIZE, data(&file(SIZE, false), 0))], vec![]))
}

/// Half of a large durable write; the rest is returned.
fn half_a_write(client: &mut Client, offset: u64) -> Vec<u8> {
    let mut header = hosts::request(Style::Structured, WRITE, 7, offset, LARGE as u64);
    header[5] = 1; // FUA
    client.socket.write_all(&header).unwrap();
    vec![offset as u8; LARGE]
}

#[test]
fn clients_that_stall_stay_within_the_budget_and_others_are_served() {
    for engine in with_memory(BUDGET) {
        let server = Server::new(&engine, &on_disk());
        let mut writers: Vec<Client> = (0..16).map(|_| server.connect(PATIENT)).collect();
        let payloads: Vec<Vec<u8>> = writers.iter_mut().map(|client| half_a_write(client, 0)).collect();
        let mut readers: Vec<Client> = (0..16).map(|_| server.connect(PATIENT)).collect();
        for reader in &mut readers {
            reader.send(READ, 8, 0, LARGE as u64, &[]);
        }
        let used = server.until(|used| used.waiting == 32 - FIT);
        assert!(used.reserved > FIT * LARGE && used.reserved <= used.budget, "{used:?}");

        let mut other = server.connect(PATIENT);
        for cookie in 0..50 {
            other.send(WRITE, cookie, cookie * 4096, 4096, &[cookie as u8; 4096]);
            other.done(cookie);
            other.send(READ, cookie, cookie * 4096, 4096, &[]);
            assert_eq!(other.reply(|_| 4096), (0, cookie, vec![cookie as u8; 4096]));
        }
        assert_eq!(engine.memory_use().waiting, 32 - FIT);

        // Each sends its rest, or takes its reply, when its turn has come.
        let writers = writers.into_iter().zip(payloads).map(|(mut client, payload)| {
            std::thread::spawn(move || {
                client.socket.write_all(&payload).unwrap();
                client.done(7);
            })
        });
        let readers = readers.into_iter().map(|mut client| {
            std::thread::spawn(move || {
                // Holes come as chunks of their own.
                let mut left = LARGE;
                while left > 0 {
                    let head = client.exactly(20);
                    let rest = client.exactly(u32::from_be_bytes(head[16..20].try_into().unwrap()) as usize);
                    left -= match u16::from_be_bytes([head[6], head[7]]) {
                        1 => rest.len() - 8,
                        2 => u32::from_be_bytes(rest[8..12].try_into().unwrap()) as usize,
                        kind => panic!("chunk of kind {kind:#x}"),
                    };
                }
            })
        });
        let all: Vec<_> = writers.chain(readers).collect();
        all.into_iter().for_each(|client| client.join().unwrap());
        drop(other);
        server.until(|used| (used.reserved, used.waiting) == (0, 0));
    }
}

/// Replies that fit no socket are counted when they are left over, and clients that take none get few of them.
#[test]
fn replies_that_nobody_takes_stay_within_the_budget() {
    const CLIENTS: u64 = 64;
    for engine in with_memory(BUDGET) {
        let server = Server::new(&engine, &hosts::memory_device(SIZE));
        let mut clients: Vec<Client> = (0..CLIENTS).map(|_| server.connect(PATIENT)).collect();
        for client in &mut clients {
            let all: Vec<u8> =
                (0..400).flat_map(|i| hosts::request(Style::Structured, READ, i, i * 65536, 65536)).collect();
            client.socket.write_all(&all).unwrap();
        }
        let sent = |client: &Client| rustix::io::ioctl_fionread(&client.socket).unwrap();
        while clients.iter().any(|client| sent(client) == 0) {
            std::thread::yield_now();
        }
        let used = engine.memory_use();
        assert!(used.reserved <= used.budget, "{used:?}");
        let mut other = server.connect(PATIENT);
        other.send(READ, 1, 0, 4096, &[]);
        assert_eq!(other.reply(|_| 4096), (0, 1, vec![7; 4096]));
        // Nothing was lost by waiting.
        for client in &mut clients {
            for cookie in 0..400 {
                assert_eq!(client.reply(|_| 65536), (0, cookie, vec![7; 65536]));
            }
        }
        server.until(|used| (used.reserved, used.waiting) == (0, 0));
    }
}

#[test]
fn memory_is_given_in_the_order_it_was_asked_for() {
    for engine in with_memory(BUDGET / 2) {
        let server = Server::new(&engine, &on_disk());
        let mut first = server.connect(PATIENT);
        let payload = half_a_write(&mut first, 0);
        server.until(|used| used.reserved > LARGE);
        let mut second = server.connect(PATIENT);
        half_a_write(&mut second, SIZE / 2);
        server.until(|used| used.waiting == 1);
        // Large, too, and there is room for it.
        let mut third = server.connect(PATIENT);
        third.send(READ, 3, 0, 2 * MIB, &[]);
        server.until(|used| used.waiting == 2);
        assert!(server.engine.memory_use().reserved < 2 * LARGE);
        // Once nobody is before it, it is served.
        drop(second);
        assert_eq!(server.next_end(), "the client hung up");
        let head = third.exactly(20);
        assert_eq!(u64::from_be_bytes(head[8..16].try_into().unwrap()), 3);
        first.socket.write_all(&payload).unwrap();
        first.done(7);
    }
}

#[test]
fn a_client_that_stalls_with_memory_is_cut_and_the_next_one_served() {
    for engine in with_memory(BUDGET / 4) {
        let server = Server::new(&engine, &on_disk());
        let mut stalled = server.connect(Duration::from_millis(50));
        half_a_write(&mut stalled, 0);
        server.until(|used| used.reserved > LARGE);
        // It waits for longer than it would be allowed to stall.
        let mut next = server.connect(Duration::from_millis(20));
        let mut header = hosts::request(Style::Structured, WRITE, 9, 0, LARGE as u64);
        header.extend(vec![9; LARGE]);
        next.socket.write_all(&header).unwrap();
        next.done(9);
        assert!(server.next_end().contains("stalled"));
    }
}

#[test]
fn a_client_that_sends_requests_and_takes_no_replies_is_cut_and_the_next_one_served() {
    for engine in with_memory(BUDGET / 16) {
        let server = Server::new(&engine, &hosts::memory_device(SIZE));
        let mut stalled = server.connect(Duration::from_millis(200));
        stalled.send(READ, 1, 0, 2 * MIB, &[]);
        server.until(|used| used.reserved > 2 * MIB as usize);
        let mut next = server.connect(PATIENT);
        next.send(READ, 2, 0, 2 * MIB, &[]);
        // Refused ones, which need no memory, until it is cut; so slowly that there are never enough replies waiting
        // for it to be left unread.
        let refused = hosts::request(Style::Structured, READ, 3, 1 << 40, 1);
        while stalled.socket.write_all(&refused).is_ok() {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(next.reply(|_| 2 * MIB as usize), (0, 2, vec![7; 2 * MIB as usize]));
        assert!(server.next_end().contains("stalled"));
    }
}

#[test]
fn a_request_larger_than_the_whole_budget_is_served_alone() {
    for engine in with_memory(2 << 20) {
        let server = Server::new(&engine, &on_disk());
        let clients: Vec<_> = (0..4u8)
            .map(|number| {
                let mut client = server.connect(PATIENT);
                std::thread::spawn(move || {
                    client.send(WRITE, 1, 0, LARGE as u64, &vec![number; LARGE]);
                    client.done(1);
                })
            })
            .collect();
        clients.into_iter().for_each(|client| client.join().unwrap());
        server.until(|used| (used.reserved, used.waiting) == (0, 0));
    }
}

/// Devices on one another by ways the engine does not see: what one is asked for, its target asks of the next, as a
/// client of the same engine, when no memory is left.
#[test]
fn an_engine_that_is_its_own_client_goes_on_when_all_memory_is_reserved() {
    const EACH: u64 = 100;
    // Small ones that fill the budget, and a large one that is larger.
    for (length, count) in [(256 << 10, EACH), (20 << 20, 2)] {
        for engine in with_memory(BUDGET) {
            let bottom = hosts::memory_device(SIZE);
            let middle = device(mapping(vec![(SIZE, Extent::Fault)], vec![]));
            let top = device(mapping(vec![(SIZE, Extent::Fault)], vec![]));
            let server = Server::new(&engine, &top);
            std::thread::scope(|scope| {
                for (upper, lower) in [(&top, &middle), (&middle, &bottom)] {
                    let mut client = Server::new(&engine, lower).connect(PATIENT);
                    let engine = engine.clone();
                    upper.attach_mapper();
                    let mut until_full = Arc::ptr_eq(upper, &top);
                    scope.spawn(move || {
                        while let Some(faults) = upper.next_faults(None) {
                            while std::mem::take(&mut until_full) && engine.memory_use().waiting == 0 {
                                until_full = true;
                                std::thread::yield_now();
                            }
                            for mut fault in faults {
                                assert_eq!(fault.op, Op::Write);
                                client.send(WRITE, 5, fault.offset, fault.len, fault.payload());
                                client.done(5);
                                fault.answer(Answer::Done(None));
                            }
                        }
                    });
                }
                let clients: Vec<_> = (0..2)
                    .map(|_| {
                        let mut client = server.connect(PATIENT);
                        let mut sender =
                            Client { socket: client.socket.try_clone().unwrap(), style: client.style, told: 0 };
                        scope.spawn(move || {
                            for cookie in 0..count {
                                sender.send(WRITE, cookie, 0, length, &vec![3; length as usize]);
                            }
                        });
                        scope.spawn(move || {
                            let mut left: Vec<u64> = (0..count).collect();
                            while !left.is_empty() {
                                let (error, cookie, _) = client.reply(|_| 0);
                                assert_eq!(error, 0);
                                left.retain(|other| *other != cookie);
                            }
                        })
                    })
                    .collect();
                clients.into_iter().for_each(|client| client.join().unwrap());
                top.close();
                middle.close();
            });
            let mut written = [0; 512];
            read(&engine, &bottom, length - 512, &mut written).unwrap();
            assert_eq!(written, [3; 512]);
        }
    }
}
