//! Connections that move from one engine to another while their clients continue: each request is answered exactly
//! once, by one of the engines, and no bytes are lost.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use blkloom_core::{Answer, Device, Outcome};
use blkloom_map::Extent;
use blkloom_wire::Style;
use rig::hosts::*;
use rig::*;

#[test]
fn requests_at_the_gate_are_returned_byte_for_byte_in_order() {
    for style in STYLES {
        let host = Host::new(threads(), memory_device(1 << 20));
        let (mut client, handle) = host.connect(style);
        host.engine.suspend(&host.device, true, None).unwrap();
        let mut sent = Vec::new();
        for cookie in 0..200 {
            sent.extend(match cookie % 4 {
                0 => client.send(WRITE, cookie, cookie * 512, 700, &[cookie as u8; 700]),
                1 => client.send(READ, cookie, cookie * 512, 512, &[]),
                2 => client.send(FLUSH, cookie, 0, 0, &[]),
                _ => client.send(WRITE, cookie, 0, 300_000, &vec![cookie as u8; 300_000]),
            });
        }
        host.until_in_flight(200);
        let half = client.send(WRITE, 200, 4096, 100_000, &[9; 60_000]);
        handle.detach(false);
        handle.detach(false);
        handle.close();
        let (fd, left) = host.detached();
        let mut given = left.initial;
        // Bytes that the engine has not received are still in the socket.
        let mut late = vec![0; 200_000];
        let (count, _) = rustix::net::recv(&fd, &mut *late, rustix::net::RecvFlags::DONTWAIT).unwrap_or((0, 0));
        given.extend_from_slice(&late[..count]);
        sent.extend(half);
        assert!(given == sent, "{style:?}: {} bytes were sent, {} given back", sent.len(), given.len());
        assert!(host.device.suspended());

        let next = Host::new(threads(), memory_device(1 << 20));
        let _handle = next.serve(style, fd, given, PATIENT);
        client.socket.write_all(&[9; 40_000]).unwrap();
        let mut open: Vec<u64> = (0..=200).collect();
        while !open.is_empty() {
            let (error, cookie, data) = client.reply(|cookie| if cookie % 4 == 1 { 512 } else { 0 });
            assert_eq!((error, data.len()), (0, if cookie % 4 == 1 { 512 } else { 0 }));
            let at = open.iter().position(|&other| other == cookie).expect("each is answered once");
            open.remove(at);
        }
        served([&next], 201);
        served([&host], 0);
    }
}

#[test]
fn requests_in_flight_are_answered_before_the_connection_is_detached() {
    for (_, engine) in engines() {
        let faulty = device(mapping(vec![(1 << 20, Extent::Fault)], vec![]));
        faulty.attach_mapper();
        let host = Host::new(engine, faulty);
        let (mut client, handle) = host.connect(Style::Simple);
        client.send(READ, 1, 0, 512, &[]);
        let mut faults = host.device.next_faults(Some(PATIENT)).unwrap();
        handle.detach(false);
        let after = client.send(READ, 2, 0, 512, &[]);
        assert!(host.notices.take().is_empty());
        faults[0].answer(Answer::Done(Some(vec![5; 512])));
        let (fd, left) = host.detached();
        let mut given = left.initial;
        assert_eq!(client.reply(|_| 512), (0, 1, vec![5; 512]));
        let mut rest = vec![0; after.len()];
        if given.is_empty() {
            UnixStream::from(fd).read_exact(&mut rest).unwrap();
            given = rest;
        }
        assert_eq!(given, after, "what came later is not read, or given back");
    }
}

/// A request with one completed part and one part that waits at a lower device is withdrawn as a whole.
#[test]
fn a_request_at_a_lower_gate_is_withdrawn_and_the_upper_device_drains() {
    let lower = memory_device(4096);
    let upper = device(mapping(
        vec![
            (4096, memory(&region(4096), 0)),
            (4096, Extent::Device { device: lower.clone(), offset: 0, writable: true }),
        ],
        vec![],
    ));
    let host = Host::new(threads(), upper);
    let (mut client, handle) = host.connect(Style::Simple);
    host.engine.suspend(&lower, true, None).unwrap();
    let sent = client.send(WRITE, 3, 0, 8192, &[4; 8192]);
    host.until_in_flight(1);
    handle.detach(false);
    assert!(host.detached().1.initial == sent);
    host.engine.suspend(&host.device, true, None).unwrap();
}

#[test]
fn a_request_is_withdrawn_only_when_all_its_tasks_wait() {
    for (_, engine) in engines() {
        let lower = memory_device(4096);
        let below = Extent::Device { device: lower.clone(), offset: 0, writable: true };
        let upper = device(mapping(vec![(4096, Extent::Fault), (4096, below)], vec![]));
        upper.attach_mapper();
        let host = Host::new(engine, upper);
        let (mut client, handle) = host.connect(Style::Structured);
        host.engine.suspend(&lower, true, None).unwrap();
        let sent = client.send(WRITE, 3, 0, 8192, &[4; 8192]);
        let mut faults = host.device.next_faults(Some(PATIENT)).unwrap();
        handle.detach(false);
        // A reply on another connection of the same loop shows that the loop has processed the message; there may be
        // two loops.
        for _ in 0..2 {
            let (mut other, handle) = host.connect(Style::Simple);
            other.send(READ, 1, 1 << 40, 1, &[]);
            assert_eq!(other.reply(|_| 0).0, 22);
            handle.close();
            assert!(matches!(host.next_end(), Outcome::Closed { .. }));
        }
        assert_eq!(faults[0].payload(), [4; 4096]);
        faults[0].answer(Answer::Done(None));
        assert!(host.detached().1.initial == sent);
    }
}

#[test]
fn the_next_engine_skips_the_rest_of_a_refused_payload_and_sends_the_same_error() {
    for style in STYLES {
        for waiting in [0, 3] {
            let host = Host::new(threads(), memory_device(1 << 20));
            let (mut client, handle) = host.connect(style);
            host.engine.suspend(&host.device, true, None).unwrap();
            (0..waiting).for_each(|cookie| drop(client.send(WRITE, cookie, cookie * 512, 512, &[cookie as u8; 512])));
            // More than the socket's buffer: when all is sent, the engine has skipped some of it.
            client.send(WRITE, 10, 1 << 30, 1 << 20, &vec![1; 900_000]);
            handle.detach(false);
            let (fd, left) = host.detached();
            let skipping = left.skipping.as_ref().map(|skipping| skipping.left);
            assert!(skipping.is_some_and(|left| left < 1 << 20), "{style:?}: {skipping:?} bytes are left to skip");

            // An engine that is asked to detach the client at once changes nothing.
            let between = Host::new(threads(), memory_device(1 << 20));
            between.engine.suspend(&between.device, true, None).unwrap();
            between.serve(style, fd, left, PATIENT).detach(false);
            let (fd, left) = between.detached();
            let next = Host::new(threads(), memory_device(1 << 20));
            let _handle = next.serve(style, fd, left, PATIENT);
            let rest = (1 << 20) - 900_000;
            client.socket.write_all(&[vec![1; rest], request(style, FLUSH, 11, 0, 0)].concat()).unwrap();
            (0..waiting).for_each(|cookie| client.done(cookie));
            let (error, cookie, _) = client.reply(|_| 0);
            assert_eq!((error, cookie), (28, 10));
            client.done(11);
            served([&next], waiting + 1);
        }
    }
}

/// Sends reads that are each larger than the socket's buffer, and waits until the first is done.
fn ask_for_much(host: &Host, client: &mut Client) {
    (0..8).for_each(|cookie| drop(client.send(READ, cookie, cookie << 20, 1 << 20, &[])));
    while host.device.stats().totals().ops[0].count == 0 {
        std::thread::yield_now(); // the later ones wait for space in the send queue
    }
}

fn take_much(client: &mut Client) {
    for wanted in 0..8 {
        let (error, cookie, data) = client.reply(|_| 1 << 20);
        assert_eq!((error, cookie), (0, wanted));
        assert!(data == vec![7; 1 << 20], "{:?}: a reply was torn", client.style);
    }
}

#[test]
fn replies_that_the_client_has_not_received_are_handed_over_without_a_wait() {
    for style in STYLES {
        let host = Host::new(threads(), memory_device(8 << 20));
        let (mut client, handle) = host.connect(style);
        ask_for_much(&host, &mut client);
        handle.detach(false);
        let (fd, left) = host.detached();
        assert!(left.unsent.len() > 1 << 19, "{style:?}: {} bytes of replies went along", left.unsent.len());
        let between = Host::new(threads(), memory_device(8 << 20));
        between.serve(style, fd, left, PATIENT).detach(false);
        let (fd, left) = between.detached();
        let next = Host::new(threads(), memory_device(8 << 20));
        let _handle = next.serve(style, fd, left, PATIENT);
        take_much(&mut client);
        client.send(FLUSH, 9, 0, 0, &[]);
        client.done(9);
    }
}

#[test]
fn a_detach_with_drain_waits_for_replies_until_a_detach_without_drain() {
    let host = Host::new(threads(), memory_device(8 << 20));
    let (mut client, handle) = host.connect(Style::Simple);
    ask_for_much(&host, &mut client);
    handle.detach(true);
    // The first reply is complete; for the others there was no space before the detach.
    assert_eq!(client.reply(|_| 1 << 20).1, 0);
    assert!(host.detached().1.unsent.is_empty());

    let host = Host::new(threads(), memory_device(8 << 20));
    let (mut client, handle) = host.connect(Style::Simple);
    ask_for_much(&host, &mut client);
    handle.detach(true);
    handle.detach(false);
    assert!(!host.detached().1.unsent.is_empty());
}

#[test]
fn a_detached_connection_with_unsent_replies_does_not_stall_the_next_one() {
    let host = Host::new(threads(), memory_device(8 << 20));
    let stall = Duration::from_secs(2);
    let connect = |stall| {
        let (socket, served) = UnixStream::pair().unwrap();
        let handle = host.serve(Style::Simple, served.into(), Vec::new(), stall);
        (Client { socket, style: Style::Simple, told: 0 }, handle)
    };
    let (mut first, handle) = connect(stall);
    ask_for_much(&host, &mut first);
    handle.detach(false);
    host.detached();
    let (mut second, _handle) = connect(PATIENT);
    second.send(FLUSH, 1, 0, 0, &[]);
    second.done(1);
    // The third client stalls later than the first: when it is dropped, the first one's timeout has passed, too.
    let (mut third, _handle) = connect(stall);
    third.socket.write_all(&[0x25]).unwrap();
    assert!(matches!(host.next_end(), Outcome::Closed { reason } if reason.contains("stalled")));
    second.send(FLUSH, 2, 0, 0, &[]);
    second.done(2);
}

#[test]
fn closing_an_engine_does_not_wait_for_a_client_that_receives_no_replies() {
    let host = Host::new(threads(), memory_device(8 << 20));
    let (mut client, _handle) = host.connect(Style::Simple);
    ask_for_much(&host, &mut client);
    host.engine.close();
    assert_eq!(host.closed(), "closed by the server");
}

#[test]
fn a_disconnect_after_waiting_requests_is_handed_over_after_them() {
    let host = Host::new(threads(), memory_device(1 << 20));
    let (mut client, handle) = host.connect(Style::Extended);
    host.engine.suspend(&host.device, true, None).unwrap();
    let mut sent = client.send(WRITE, 1, 0, 5, &[1; 5]);
    host.until_in_flight(1);
    sent.extend(client.send(DISCONNECT, 2, 0, 0, &[]));
    // A second connection is served on the same loop: the first one's bytes were received before.
    let (mut other, other_handle) = host.connect(Style::Extended);
    other.send(READ, 9, 1 << 40, 1, &[]);
    assert_eq!(other.reply(|_| 0).0, 22);
    other_handle.close();
    assert!(matches!(host.next_end(), Outcome::Closed { .. }));
    handle.detach(false);
    let (fd, left) = host.detached();
    let mut given = left.initial;
    let mut late = [0; 64];
    let (count, _) = rustix::net::recv(&fd, &mut late, rustix::net::RecvFlags::DONTWAIT).unwrap_or((0, 0));
    given.extend_from_slice(&late[..count]);
    assert_eq!(given, sent);
    let next = Host::new(threads(), memory_device(1 << 20));
    next.serve(Style::Extended, fd, given, PATIENT);
    client.done(1);
    client.hung_up();
    assert_eq!(next.closed(), "the client disconnected");
}

#[test]
fn withdrawn_requests_are_served_although_their_client_has_disconnected() {
    let host = Host::new(threads(), memory_device(1 << 20));
    let (client, served) = UnixStream::pair().unwrap();
    drop(client);
    let mut initial = Vec::new();
    for i in 0..3 {
        initial.extend(request(Style::Simple, WRITE, i, i * 512, 512));
        initial.extend([i as u8; 512]);
    }
    host.serve(Style::Simple, served.into(), initial, PATIENT);
    host.closed();
    for i in 0..3 {
        let mut back = [9; 512];
        read(&host.engine, &host.device, i * 512, &mut back).unwrap();
        assert_eq!(back, [i as u8; 512]);
    }
}

#[test]
fn a_detach_does_not_wait_for_requests_of_a_client_that_is_gone() {
    for (_, engine) in engines() {
        let host = Host::new(engine, memory_device(1 << 20));
        let (mut client, handle) = host.connect(Style::Simple);
        host.engine.suspend(&host.device, true, None).unwrap();
        client.send(READ, 1, 0, 512, &[]);
        host.until_in_flight(1);
        client.socket.write_all(b"garbage after a request").unwrap();
        client.hung_up();
        handle.detach(false);
        assert!(host.closed().starts_with("garbage"));
        assert_eq!(host.device.stats().totals().in_flight, 0);
    }
}

#[test]
fn a_client_that_receives_no_replies_is_dropped_after_the_stall_timeout() {
    let host = Host::new(threads(), memory_device(8 << 20));
    let (mut socket, served) = UnixStream::pair().unwrap();
    let handle = host.serve(Style::Simple, served.into(), Vec::new(), Duration::from_millis(50));
    for cookie in 0..3 {
        socket.write_all(&request(Style::Simple, READ, cookie, 0, 1 << 20)).unwrap();
    }
    while host.device.stats().totals().ops[0].count == 0 {
        std::thread::yield_now();
    }
    handle.detach(true);
    assert!(host.closed().contains("stalled"));
}

#[test]
fn closing_an_engine_still_returns_withdrawn_requests() {
    for (_, engine) in engines() {
        let host = Host::new(engine, memory_device(1 << 20));
        let (mut client, handle) = host.connect(Style::Simple);
        host.engine.suspend(&host.device, true, None).unwrap();
        let sent = client.send(READ, 1, 0, 512, &[]);
        host.until_in_flight(1);
        handle.detach(false);
        host.engine.close();
        assert!(host.detached().1.initial == sent);
    }
}

#[test]
fn any_amount_of_unserved_bytes_is_served() {
    let host = Host::new(threads(), memory_device(1 << 20));
    for style in STYLES {
        let (socket, served) = UnixStream::pair().unwrap();
        let mut client = Client { socket, style, told: 0 };
        let payload = vec![3; MOST_PAYLOAD as usize];
        let mut initial = Vec::new();
        (0..3000).for_each(|cookie| initial.extend(request(style, FLUSH, cookie, 0, 0)));
        for cookie in 3000..3040 {
            initial.extend(request(style, WRITE, cookie, 0, payload.len() as u64));
            initial.extend_from_slice(&payload);
        }
        let late = initial.split_off(initial.len() - 1);
        host.serve(style, served.into(), initial, PATIENT);
        client.socket.write_all(&late).unwrap();
        (0..3040).for_each(|cookie| client.done(cookie));
        drop(client);
        host.closed();
    }
}

/// The client's model of its device, and its requests in flight: (offset, length, a write, data).
#[derive(Default)]
struct Model {
    bytes: Vec<u8>,
    open: BTreeMap<u64, (u64, usize, bool, Vec<u8>)>,
    answered: u64,
}

const SIZE: u64 = 3 << 20;
const COUNT: u64 = 1500;
const WINDOW: usize = 48;

/// Sends `COUNT` requests in pieces of any size. No write overlaps another request in flight.
fn ask(mut socket: UnixStream, style: Style, model: &Mutex<Model>, over: &AtomicBool, seed: u64) {
    let mut random = Random::new(seed);
    for cookie in 0..COUNT {
        let bytes = loop {
            let mut model = model.lock().unwrap();
            let longest = if random.one_in(20) { 300_000 } else { 9_000 };
            let (offset, length) = (random.below(SIZE - longest), 1 + random.below(longest) as usize);
            let write = random.one_in(2);
            let meets = |&(o, l, w, _): &(u64, usize, bool, Vec<u8>)| {
                (w || write) && o < offset + length as u64 && offset < o + l as u64
            };
            if model.open.len() >= WINDOW || model.open.values().any(meets) {
                drop(model);
                assert!(!over.load(Ordering::SeqCst), "the answers are not received");
                std::thread::yield_now();
                continue;
            }
            let range = offset as usize..offset as usize + length;
            if write {
                let data: Vec<u8> = (0..length).map(|_| random.next() as u8).collect();
                model.bytes[range].copy_from_slice(&data);
                model.open.insert(cookie, (offset, length, true, Vec::new()));
                break [request(style, WRITE, cookie, offset, length as u64), data].concat();
            }
            let data = model.bytes[range].to_vec();
            model.open.insert(cookie, (offset, length, false, data));
            break request(style, READ, cookie, offset, length as u64);
        };
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let most = if random.one_in(3) { 40 } else { 100_000 };
            let (now, later) = rest.split_at(rest.len().min(1 + random.below(most) as usize));
            socket.write_all(now).unwrap();
            rest = later;
        }
    }
}

fn listen(mut client: Client, model: &Mutex<Model>) {
    for _ in 0..COUNT {
        let length = |cookie| model.lock().unwrap().open.get(&cookie).map_or(0, |open| if open.2 { 0 } else { open.1 });
        let (error, cookie, data) = client.reply(length);
        let mut model = model.lock().unwrap();
        let (offset, length, _, expected) = model.open.remove(&cookie).expect("each is answered once");
        assert_eq!(error, 0, "{length} bytes at {offset}");
        assert!(client.style != Style::Extended || client.told == offset, "an extended reply names the wrong place");
        assert!(data == expected, "{length} bytes at {offset} are not what was written there");
        model.answered += 1;
    }
}

/// Sets a flag when the listener ends, also by a panic.
struct Tell<'a>(&'a AtomicBool);

impl Drop for Tell<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// A device on shared storage: a direct file, a buffered one, and memory behind a lower device.
fn stack(parts: &[Extent<blkloom_core::Kinds>; 3]) -> (Arc<Device>, Arc<Device>) {
    let [first, second, third] = parts.clone();
    let lower = device(mapping(vec![(1 << 20, third)], vec![]));
    let below = Extent::Device { device: lower.clone(), offset: 0, writable: true };
    (device(mapping(vec![(1 << 20, first), (1 << 20, second), (1 << 20, below)], vec![])), lower)
}

#[test]
fn a_client_sees_one_device_while_its_connection_moves_between_engines() {
    for (number, style) in STYLES.into_iter().enumerate() {
        // How often it moves, and with how much, depends on the scheduler.
        let tested = (0..10).any(|attempt| {
            let (turns, carried) = moves_between_engines(style, 10 * number as u64 + attempt);
            turns > 10 && carried > 0
        });
        assert!(tested, "the connection never moved ten times, or never with bytes: this tested nothing");
    }
}

/// How often the connection has moved, and with how many bytes that had arrived.
fn moves_between_engines(style: Style, seed: u64) -> (usize, usize) {
    let mut random = Random::new(77 + seed);
    let parts = [data(&file(1 << 20, true), 0), data(&file(1 << 20, false), 0), memory(&region(1 << 20), 0)];
    let hosts: Vec<(Host, Arc<Device>)> = engines()
        .into_iter()
        .chain(engines())
        .map(|(_, engine)| {
            let (upper, lower) = stack(&parts);
            (Host::new(engine, upper), lower)
        })
        .collect();
    // Holes are not reported: reads are answered in one chunk.
    let mut start = vec![0xa5u8; SIZE as usize];
    write(&hosts[0].0.engine, &hosts[0].0.device, 0, &start, false).unwrap();
    let model = Mutex::new(Model { bytes: std::mem::take(&mut start), ..Model::default() });
    let (client, mut handle) = hosts[0].0.connect(style);
    let over = AtomicBool::new(false);
    let (mut at, mut turns, mut carried) = (0, 0, 0);
    std::thread::scope(|scope| {
        let (model, over) = (&model, &over);
        let sender = client.socket.try_clone().unwrap();
        let asking = scope.spawn(move || ask(sender, style, model, over, 5 + seed));
        let listening = scope.spawn(move || {
            let _tell = Tell(over);
            listen(client, model);
        });
        let finished = || over.load(Ordering::SeqCst);
        while !finished() {
            let (host, lower) = &hosts[at];
            let before = model.lock().unwrap().answered;
            // Some connections move on at once, most after they have served requests.
            let enough = before + random.below(60);
            while model.lock().unwrap().answered < enough && !finished() {
                std::thread::yield_now();
            }
            let suspended = match random.below(3) {
                0 => Some(&host.device),
                1 => Some(lower),
                _ => None,
            };
            if let Some(device) = suspended {
                host.engine.suspend(device, false, None).unwrap();
                (0..random.below(200)).for_each(|_| std::thread::yield_now());
            }
            handle.detach(false);
            let end = host.end();
            host.device.resume();
            lower.resume();
            let (fd, unfinished) = match end {
                Outcome::Detached(left) => unfinished(left),
                Outcome::Closed { reason } => {
                    assert!(finished(), "closed: {reason}");
                    break;
                }
                Outcome::Io { .. } | Outcome::Users(_) => panic!("no I/O was submitted"),
            };
            assert_eq!(host.device.stats().totals().in_flight, 0);
            carried += unfinished.initial.len();
            turns += 1;
            at = (at + 1 + random.below(hosts.len() as u64 - 1) as usize) % hosts.len();
            handle = hosts[at].0.serve(style, fd, unfinished, PATIENT);
        }
        asking.join().unwrap();
        listening.join().unwrap();
    });
    let model = model.into_inner().unwrap();
    assert_eq!((model.answered, model.open.len()), (COUNT, 0));
    let mut back = vec![0; SIZE as usize];
    read(&hosts[0].0.engine, &hosts[0].0.device, 0, &mut back).unwrap();
    assert!(back == model.bytes, "the device is not what its client wrote");
    served(hosts.iter().map(|(host, _)| host), COUNT);
    (turns, carried)
}
