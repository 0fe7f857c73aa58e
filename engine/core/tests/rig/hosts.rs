//! `Host`: an engine that serves its own device over NBD, as a separate process would. `Client`: speaks every NBD
//! style.

use std::any::Any;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use blkloom_core::nbd::{self, Detached, Session, Unfinished};
use blkloom_core::{Device, Engine, Export, IoChoice, Notices, Outcome, Recipient, TransportHandle};
use blkloom_wire::{Header, Style};

use super::{PATIENT, device, mapping, memory, region};

pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const DISCONNECT: u16 = 2;
pub const FLUSH: u16 = 3;
pub const STYLES: [Style; 3] = [Style::Simple, Style::Structured, Style::Extended];
pub const MOST_PAYLOAD: u32 = 1 << 20;

pub fn request(style: Style, kind: u16, cookie: u64, offset: u64, length: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    let flags = if style == Style::Extended && kind == WRITE { 1 << 5 } else { 0 };
    Header { flags, kind, cookie, offset, length }.put(style, &mut bytes);
    bytes
}

/// An engine with its own device, as a process has them.
pub struct Host {
    pub engine: Engine,
    pub device: Arc<Device>,
    pub export: Arc<Export>,
    pub notices: Arc<Notices>,
}

impl Host {
    pub fn new(engine: Engine, device: Arc<Device>) -> Host {
        let export = Export::new(device.clone(), "test".into(), false);
        Host { engine, device, export, notices: Arc::new(Notices::new().unwrap()) }
    }

    /// Serves a client that continues a connection of a former engine, with its unfinished state (at least received
    /// bytes).
    pub fn serve(
        &self,
        style: Style,
        fd: OwnedFd,
        unfinished: impl Into<Unfinished>,
        stall: Duration,
    ) -> TransportHandle {
        let unfinished = unfinished.into();
        let session =
            Session { style, contexts: Box::default(), unfinished, read_only: false, max_payload: MOST_PAYLOAD, stall };
        let recipient = Recipient { notices: self.notices.clone(), token: 1 };
        nbd::serve(&self.engine, &self.export, fd, session, recipient).unwrap()
    }

    /// A client of this host.
    pub fn connect(&self, style: Style) -> (Client, TransportHandle) {
        let (socket, served) = UnixStream::pair().unwrap();
        socket.set_read_timeout(Some(PATIENT)).unwrap();
        socket.set_write_timeout(Some(PATIENT)).unwrap();
        (Client { socket, style, told: 0 }, self.serve(style, served.into(), Vec::new(), PATIENT))
    }

    /// The outcome of the next connection that ends.
    pub fn next_end(&self) -> Outcome {
        let fd = self.notices.fd();
        loop {
            let mut polled = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
            let patience = rustix::event::Timespec { tv_sec: PATIENT.as_secs() as i64, tv_nsec: 0 };
            assert_eq!(rustix::event::poll(&mut polled, Some(&patience)).unwrap(), 1, "no notice of its end");
            let mut all = self.notices.take();
            all.retain(|notice| !matches!(notice.outcome, Outcome::Users(_)));
            if let Some(end) = all.pop() {
                assert!(all.is_empty(), "one connection ends once");
                return end.outcome;
            }
        }
    }

    /// The outcome of the only connection.
    pub fn end(&self) -> Outcome {
        let outcome = self.next_end();
        assert!(self.export.transports().is_empty());
        outcome
    }

    pub fn detached(&self) -> (OwnedFd, Unfinished) {
        match self.end() {
            Outcome::Detached(left) => {
                for stats in [self.device.stats(), &self.export.stats] {
                    assert_eq!(stats.totals().in_flight, 0, "nothing is left behind");
                }
                unfinished(left)
            }
            Outcome::Closed { reason } => panic!("closed: {reason}"),
            Outcome::Io { .. } | Outcome::Users(_) => panic!("no I/O was submitted"),
        }
    }

    pub fn closed(&self) -> String {
        match self.end() {
            Outcome::Closed { reason } => reason,
            _ => panic!("it did not close"),
        }
    }

    /// Waits until the engine has `count` requests in flight.
    pub fn until_in_flight(&self, count: u64) {
        while self.device.stats().totals().in_flight != count {
            std::thread::yield_now();
        }
    }
}

/// The unfinished state of a detached connection.
pub fn unfinished(left: Box<dyn Any + Send>) -> (OwnedFd, Unfinished) {
    let Detached { fd, unfinished } = *left.downcast().unwrap();
    (fd, unfinished)
}

pub struct Client {
    pub socket: UnixStream,
    pub style: Style,
    /// The offset in the last reply; only extended replies have one.
    pub told: u64,
}

impl Client {
    pub fn send(&mut self, kind: u16, cookie: u64, offset: u64, length: u64, payload: &[u8]) -> Vec<u8> {
        let bytes = [request(self.style, kind, cookie, offset, length), payload.to_vec()].concat();
        self.socket.write_all(&bytes).unwrap();
        bytes
    }

    pub fn exactly(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.socket.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// The next reply: (error, cookie, data). length: returns the length of the read with a cookie.
    pub fn reply(&mut self, length: impl Fn(u64) -> usize) -> (u32, u64, Vec<u8>) {
        let u16_at = |bytes: &[u8], at: usize| u16::from_be_bytes(bytes[at..at + 2].try_into().unwrap());
        let u32_at = |bytes: &[u8], at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
        let u64_at = |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
        let head = self.exactly(match self.style {
            Style::Simple => 16,
            Style::Structured => 20,
            Style::Extended => 32,
        });
        let magic = match self.style {
            Style::Simple => 0x6744_6698,
            Style::Structured => 0x668e_33ef,
            Style::Extended => 0x6e8a_278c,
        };
        assert_eq!(u32_at(&head, 0), magic, "the stream of replies is out of step");
        let cookie = u64_at(&head, 8);
        if self.style == Style::Simple {
            let error = u32_at(&head, 4);
            let data = self.exactly(if error == 0 { length(cookie) } else { 0 });
            return (error, cookie, data);
        }
        assert_eq!(u16_at(&head, 4), 1, "reads of these places are answered in one piece");
        let rest = match self.style {
            Style::Extended => {
                self.told = u64_at(&head, 16);
                u64_at(&head, 24) as usize
            }
            _ => u32_at(&head, 16) as usize,
        };
        let rest = self.exactly(rest);
        match u16_at(&head, 6) {
            0 => (0, cookie, Vec::new()),
            1 => (0, cookie, rest[8..].to_vec()),
            0x8001 => (u32_at(&rest, 0), cookie, Vec::new()),
            kind => panic!("chunk of kind {kind}"),
        }
    }

    /// Checks that the server closes the connection without another reply.
    pub fn hung_up(&mut self) {
        assert_eq!(self.socket.read_to_end(&mut Vec::new()).unwrap(), 0);
    }

    pub fn done(&mut self, cookie: u64) {
        assert_eq!(self.reply(|_| 0), (0, cookie, Vec::new()));
    }
}

/// Waits until the hosts together have served this many requests. (A request is counted after its reply.)
pub fn served<'a>(hosts: impl IntoIterator<Item = &'a Host> + Clone, count: u64) {
    let sum = || -> u64 {
        let all = hosts.clone().into_iter().map(|host| host.export.stats.totals());
        all.flat_map(|totals| totals.ops).map(|op| op.count).sum()
    };
    while sum() < count {
        std::thread::yield_now();
    }
    assert_eq!(sum(), count, "a request was served twice");
}

pub fn memory_device(size: u64) -> Arc<Device> {
    let place = region(size);
    place.write(0, vec![7; size as usize][..].into());
    device(mapping(vec![(size, memory(&place, 0))], vec![]))
}

pub fn threads() -> Engine {
    Engine::new(1, IoChoice::Threads, Duration::ZERO, 2).unwrap()
}
