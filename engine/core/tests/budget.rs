//! The memory budget for clients: it is bounded, memory is granted in order, and nested requests never deadlock.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blkloom_core::nbd::{self, Session, Unfinished};
use blkloom_core::{Answer, Device, Engine, Export, MemoryUse, Notices, Op, Outcome, Recipient};
use blkloom_map::Extent;
use blkloom_wire::Style;
use rig::hosts::{self, Client, READ, WRITE};
use rig::*;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 32 * MIB;
const LARGE: usize = 8 << 20;
const BUDGET: usize = 64 << 20;
/// Number of large requests that fit their share of the budget.
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
            read_only: false,
            max_payload: SIZE as u32,
            stall,
        };
        let recipient = Recipient { notices: self.notices.clone(), token: 1 };
        let _handle = nbd::serve(&self.engine, &self.export, fd, session, recipient).unwrap();
    }

    fn connect(&self, stall: Duration) -> Client {
        let (socket, served) = UnixStream::pair().unwrap();
        socket.set_read_timeout(Some(PATIENT)).unwrap();
        socket.set_write_timeout(Some(PATIENT)).unwrap();
        self.serve(served.into(), stall);
        Client { socket, style: Style::Structured, told: 0 }
    }

    /// Waits until the memory use fulfils the condition `so`.
    fn until(&self, so: impl Fn(MemoryUse) -> bool) -> MemoryUse {
        let deadline = Instant::now() + PATIENT;
        loop {
            let used = self.engine.memory_use();
            if so(used) {
                return used;
            }
            assert!(Instant::now() < deadline, "{used:?}");
            std::thread::yield_now();
        }
    }

    /// Waits until more than so much is reserved. False: a client was dropped before this was seen.
    fn until_reserved(&self, bytes: usize) -> bool {
        loop {
            if self.engine.memory_use().reserved > bytes {
                return true;
            }
            if !self.notices.take().is_empty() {
                return false;
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

/// A device on disk. Its writes wait for storage, so they need their whole payload.
fn on_disk() -> Arc<Device> {
    device(mapping(vec![(SIZE, data(&file(SIZE, false), 0))], vec![]))
}

/// Runs a test with short stall timeouts. If it returns false, because a slow client was taken for a stalled one, runs
/// it again with longer timeouts.
fn with_longer_stalls(server: impl Fn() -> Server, test: impl Fn(Server, u32) -> bool) {
    with_longer_times(|times| {
        let server = server();
        server.until(|used| (used.reserved, used.waiting) == (0, 0));
        test(server, times)
    });
}

/// Sends half of a large durable write. Returns the rest.
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
        // All of them come before the first reader: a read may need twice its length.
        server.until(|used| used.waiting == 16 - FIT);
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

        // Each client sends its rest, or receives its reply, in turn.
        let writers = writers.into_iter().zip(payloads).map(|(mut client, payload)| {
            std::thread::spawn(move || {
                client.socket.write_all(&payload).unwrap();
                client.done(7);
            })
        });
        let readers = readers.into_iter().map(|mut client| {
            std::thread::spawn(move || {
                // A hole is a chunk of its own.
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

/// Replies that the socket does not accept are counted, and a client that receives no replies gets only few.
#[test]
fn replies_that_are_not_received_stay_within_the_budget() {
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
        // The wait has lost nothing.
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
        // Also large, and it fits the budget.
        let mut third = server.connect(PATIENT);
        third.send(READ, 3, 0, 2 * MIB, &[]);
        server.until(|used| used.waiting == 2);
        assert!(server.engine.memory_use().reserved < 2 * LARGE);
        // It is served when it is the first in line.
        drop(second);
        assert_eq!(server.next_end(), "the client hung up");
        let head = third.exactly(20);
        assert_eq!(u64::from_be_bytes(head[8..16].try_into().unwrap()), 3);
        first.socket.write_all(&payload).unwrap();
        first.done(7);
    }
}

#[test]
fn a_client_that_stalls_with_memory_is_dropped_and_the_next_one_served() {
    for engine in with_memory(BUDGET / 4) {
        let device = on_disk();
        with_longer_stalls(
            || Server::new(&engine, &device),
            |server, times| {
                let mut stalled = server.connect(times * Duration::from_millis(50));
                half_a_write(&mut stalled, 0);
                if !server.until_reserved(LARGE) {
                    return false;
                }
                // It waits longer than the stall timeout.
                let mut next = server.connect(times * Duration::from_millis(20));
                let mut request = hosts::request(Style::Structured, WRITE, 9, 0, LARGE as u64);
                request.extend(vec![9; LARGE]);
                let mut reply = [0; 20];
                if next.socket.write_all(&request).is_err() || next.socket.read_exact(&mut reply).is_err() {
                    return false;
                }
                assert_eq!(
                    reply,
                    [[0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 0].as_slice(), &[0; 7], &[9], &[0; 4]].concat()[..]
                );
                assert!(server.next_end().contains("stalled"));
                true
            },
        );
    }
}

#[test]
fn a_client_that_receives_no_replies_is_dropped_and_the_next_one_served() {
    for engine in with_memory(BUDGET / 16) {
        let device = hosts::memory_device(SIZE);
        with_longer_stalls(
            || Server::new(&engine, &device),
            |server, times| {
                let mut stalled = server.connect(times * Duration::from_millis(200));
                stalled.send(READ, 1, 0, 2 * MIB, &[]);
                if !server.until_reserved(2 * MIB as usize) {
                    return false;
                }
                let mut next = server.connect(PATIENT);
                next.send(READ, 2, 0, 2 * MIB, &[]);
                // Sends refused requests, which need no memory, until it is dropped; so slowly that the waiting replies
                // never stop the engine from receiving.
                let refused = hosts::request(Style::Structured, READ, 3, 1 << 40, 1);
                while stalled.socket.write_all(&refused).is_ok() {
                    std::thread::sleep(Duration::from_millis(5));
                }
                assert_eq!(next.reply(|_| 2 * MIB as usize), (0, 2, vec![7; 2 * MIB as usize]));
                assert!(server.next_end().contains("stalled"));
                true
            },
        );
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

/// Devices stacked in a way that the engine does not see: each device's target is a client of the next device's export
/// in the same engine, and no memory is left.
#[test]
fn an_engine_that_is_its_own_client_goes_on_when_all_memory_is_reserved() {
    const EACH: u64 = 100;
    // Small requests that fill the budget, and a large request that exceeds it.
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
