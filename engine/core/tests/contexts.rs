//! Metadata contexts other than base:allocation: targets answer them one after the other, in one reply.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use blkloom_core::nbd::{self, Selected, Session};
use blkloom_core::{
    Answer, Device, Engine, Export, Fault, IoChoice, Notices, Outcome, Recipient, TransportHandle, context,
};
use blkloom_map::Extent;
use blkloom_wire::{Header, Style};
use rig::*;

const BLOCK_STATUS: u16 = 7;
const REQ_ONE: u16 = 1 << 3;
const EINVAL: Errno = Errno::INVAL;
const HALF: u64 = 1 << 20;

/// Two segments: memory in many small pieces, and one that faults.
fn two_segments() -> Arc<Device> {
    let place = region(HALF);
    let legs: Vec<_> = (0..2).map(|leg| memory(&place, leg * HALF / 2)).collect();
    let striped = Extent::Stripes { chunk: 512, legs: legs.into() };
    let device = device(mapping(vec![(HALF, striped), (HALF, Extent::Fault)], vec![]));
    device.attach_mapper();
    device
}

struct Client {
    socket: UnixStream,
    style: Style,
    engine: Engine,
    device: Arc<Device>,
    export: Arc<Export>,
    notices: Arc<Notices>,
    handle: TransportHandle,
}

fn selected() -> Box<[Selected]> {
    let names = [(9, "x-test:a"), (1, "base:allocation"), (3, "x-test:b")];
    names.into_iter().map(|(id, name)| Selected { id, context: context(name) }).collect()
}

fn serve(
    engine: &Engine,
    export: &Arc<Export>,
    notices: &Arc<Notices>,
    style: Style,
    fd: OwnedFd,
    initial: Vec<u8>,
) -> TransportHandle {
    let session = Session {
        style,
        contexts: selected(),
        unfinished: initial.into(),
        read_only: false,
        max_payload: 1 << 20,
        stall: PATIENT,
    };
    let recipient = Recipient { notices: notices.clone(), token: 1 };
    nbd::serve(engine, export, fd, session, recipient).unwrap()
}

impl Client {
    fn new(engine: Engine, device: Arc<Device>, style: Style) -> Client {
        let (socket, served) = UnixStream::pair().unwrap();
        socket.set_read_timeout(Some(PATIENT)).unwrap();
        let (export, notices) = (Export::new(device.clone(), "test".into(), false), Arc::new(Notices::new().unwrap()));
        let handle = serve(&engine, &export, &notices, style, served.into(), Vec::new());
        Client { socket, style, engine, device, export, notices, handle }
    }

    fn ask(&mut self, flags: u16, offset: u64, length: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        Header { flags, kind: BLOCK_STATUS, cookie: 77, offset, length }.put(self.style, &mut bytes);
        self.socket.write_all(&bytes).unwrap();
        bytes
    }

    /// The next chunk: (flags, kind, payload).
    fn chunk(&mut self) -> (u16, u16, Vec<u8>) {
        let mut head = vec![0; if self.style == Style::Extended { 32 } else { 20 }];
        self.socket.read_exact(&mut head).unwrap();
        let length = head[head.len() - 4..].iter().fold(0, |length, byte| length << 8 | usize::from(*byte));
        let mut payload = vec![0; length];
        self.socket.read_exact(&mut payload).unwrap();
        let u16_at = |at: usize| u16::from_be_bytes([head[at], head[at + 1]]);
        (u16_at(4), u16_at(6), payload)
    }

    /// A whole successful answer: each context's id and (length, status) descriptors.
    fn answer(&mut self) -> Vec<(u64, Vec<(u64, u64)>)> {
        let mut all = Vec::new();
        loop {
            let (flags, kind, payload) = self.chunk();
            assert_eq!(kind, if self.style == Style::Extended { 6 } else { 5 });
            let number = |bytes: &[u8]| bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte));
            let (skip, width) = if self.style == Style::Extended { (8, 8) } else { (4, 4) };
            let descriptors = payload[skip..].chunks(2 * width);
            let descriptors = descriptors.map(|pair| (number(&pair[..width]), number(&pair[width..]))).collect();
            all.push((number(&payload[..4]), descriptors));
            if flags & 1 != 0 {
                return all;
            }
        }
    }

    /// Answers the next `count` faults.
    fn faults(&self, count: usize, mut answer: impl FnMut(&Fault) -> Answer) {
        let mut left = count;
        while left > 0 {
            for mut fault in self.device.next_faults(Some(PATIENT)).unwrap() {
                left -= 1;
                let answer = answer(&fault);
                fault.answer(answer);
            }
        }
    }

    fn idle(&self) {
        assert_eq!(self.export.stats.totals().in_flight, 0);
        assert_eq!(self.device.stats().totals().in_flight, 0);
        assert_eq!(self.export.stats.totals().ops.iter().map(|op| op.count).sum::<u64>(), 1, "one request, one count");
    }
}

fn engine() -> Engine {
    Engine::new(1, IoChoice::Threads, Duration::ZERO, 2).unwrap()
}

fn named(fault: &Fault) -> (u32, Option<&str>) {
    (fault.owner, fault.context.as_deref())
}

#[test]
fn a_block_status_reply_has_one_chunk_per_context() {
    for style in [Style::Structured, Style::Extended] {
        let mut client = Client::new(engine(), two_segments(), style);
        client.ask(0, 512, 2 * HALF - 512);
        let mut asked = Vec::new();
        // Each segment is asked once, however many pieces its map has. The engine knows the allocation of memory.
        client.faults(5, |fault| {
            asked.push((fault.owner, fault.context.as_deref().unwrap_or("").to_owned(), fault.offset, fault.len));
            match named(fault) {
                (0, Some("x-test:a")) => Answer::Extents(vec![(fault.len, 4)]),
                (1, Some("x-test:a")) => Answer::Extents(vec![(4096, 4), (HALF, 5), (1, 6)]),
                (_, Some("x-test:b")) => Answer::Extents(vec![(fault.len / 2, 7), (fault.len / 2, 7)]),
                _ => Answer::Extents(vec![(HALF, 0)]),
            }
        });
        let wanted =
            [(0, "x-test:a"), (1, "x-test:a"), (1, ""), (0, "x-test:b"), (1, "x-test:b")].map(|(owner, name)| {
                let range = if owner == 0 { (512, HALF - 512) } else { (HALF, HALF) };
                (owner, name.to_owned(), range.0, range.1)
            });
        assert_eq!(asked, wanted);
        let told = [
            (9, vec![(HALF - 512 + 4096, 4), (HALF - 4096, 5)]),
            (1, vec![(HALF - 512, 3), (HALF, 0)]),
            (3, vec![(2 * HALF - 512, 7)]),
        ];
        assert_eq!(client.answer(), told);
        client.idle();
    }
}

#[test]
fn with_req_one_there_is_one_descriptor_per_context() {
    let mut client = Client::new(engine(), two_segments(), Style::Structured);
    client.ask(REQ_ONE, HALF - 512, 1024);
    client.faults(2, |fault| {
        assert!(fault.flags.one);
        Answer::Extents(vec![(256, 1), (256, 2)])
    });
    assert_eq!(client.answer(), [(9, vec![(256, 1)]), (1, vec![(512, 3)]), (3, vec![(256, 1)])]);
    client.idle();
}

#[test]
fn a_context_that_is_gone_or_does_not_answer_fails_only_that_request() {
    for (said, errno) in [(Answer::Fail(EINVAL), EINVAL), (Answer::Fail(EIO), EIO), (Answer::Extents(vec![]), EIO)] {
        let mut client = Client::new(engine(), two_segments(), Style::Structured);
        client.ask(0, HALF, HALF);
        let mut said = Some(said);
        client.faults(3, |fault| match named(fault) {
            (_, Some("x-test:b")) => said.take().unwrap(),
            _ => Answer::Extents(vec![(HALF, 0)]),
        });
        let (flags, kind, payload) = client.chunk();
        assert_eq!((flags, kind, payload[..4].to_vec()), (1, 0x8001, errno.raw_os_error().to_be_bytes().to_vec()));
        let message = String::from_utf8(payload[6..].to_vec()).unwrap();
        assert_eq!(message.contains("x-test:b"), errno == EINVAL, "{message}");
        client.idle();
        client.ask(REQ_ONE, 0, 512);
        client.faults(2, |_| Answer::Extents(vec![(512, 1)]));
        assert_eq!(client.answer().len(), 3);
    }
}

#[test]
fn a_lower_device_is_not_asked_for_contexts_unknown_to_the_upper_one() {
    let lower = two_segments();
    let above =
        device(mapping(vec![(2 * HALF, Extent::Device { device: lower.clone(), offset: 0, writable: true })], vec![]));
    above.attach_mapper();
    let mut client = Client::new(engine(), above, Style::Structured);
    client.ask(0, 0, 512);
    client.faults(1, |fault| {
        assert_eq!((fault.owner, fault.offset, fault.len), (0, 0, 512));
        Answer::Fail(EINVAL)
    });
    assert_eq!(client.chunk().1, 0x8001);
}

#[test]
fn a_partly_answered_block_status_is_withdrawn_whole() {
    for style in [Style::Structured, Style::Extended] {
        let mut client = Client::new(engine(), two_segments(), style);
        let sent = client.ask(0, 0, HALF);
        let mut first = client.device.next_faults(Some(PATIENT)).unwrap();
        assert_eq!(named(&first[0]), (0, Some("x-test:a")));
        std::thread::scope(|scope| {
            let suspending = scope.spawn(|| client.engine.suspend(&client.device, false, None));
            while !client.device.suspended() {
                std::thread::yield_now();
            }
            first[0].answer(Answer::Extents(vec![(HALF, 1)]));
            suspending.join().unwrap().unwrap();
        });
        client.handle.detach(false);
        let fd = client.notices.fd();
        let mut polled = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
        let patience = rustix::event::Timespec { tv_sec: PATIENT.as_secs() as i64, tv_nsec: 0 };
        assert_eq!(rustix::event::poll(&mut polled, Some(&patience)).unwrap(), 1);
        let Outcome::Detached(left) = client.notices.take().remove(0).outcome else { panic!("it did not leave") };
        let (fd, unfinished) = rig::hosts::unfinished(left);
        assert_eq!(unfinished.initial, sent);
        assert!(client.export.transports().is_empty());
        assert_eq!(client.export.stats.totals().in_flight, 0);
        assert_eq!(client.device.stats().totals().in_flight, 0);

        client.device.resume();
        client.handle = serve(&client.engine, &client.export, &client.notices, style, fd, unfinished.initial);
        client.faults(2, |_| Answer::Extents(vec![(HALF, 2)]));
        assert_eq!(client.answer(), [(9, vec![(HALF, 2)]), (1, vec![(HALF, 3)]), (3, vec![(HALF, 2)])]);
    }
}
