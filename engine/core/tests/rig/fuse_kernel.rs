//! The kernel's end of a FUSE connection, over a socket whose packets are whole messages, too.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use blkloom_core::fuse::{self, FuseFile, Owner};
use blkloom_core::{Device, Recipient, TransportHandle};
use blkloom_fuse_wire::{Init, InitAnswer, Negotiated, Settings};
use rustix::io::retry_on_intr;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};

use super::PATIENT;
use super::hosts::{self, Host};

pub const SETTINGS: Settings =
    Settings { max_background: 64, max_transfer: 128 << 10, page_size: 4096, over_ring: false };
pub const OWNER: Owner = Owner { user: 1000, group: 100, mode: 0o640 };

pub const GETATTR: u32 = 3;
pub const SETATTR: u32 = 4;
pub const OPEN: u32 = 14;
pub const READ: u32 = 15;
pub const WRITE: u32 = 16;
pub const STATFS: u32 = 17;
pub const RELEASE: u32 = 18;
pub const FSYNC: u32 = 20;
pub const GETXATTR: u32 = 22;
pub const FLUSH: u32 = 25;
pub const INIT: u32 = 26;
pub const INTERRUPT: u32 = 36;
pub const FORGET: u32 = 2;
pub const FALLOCATE: u32 = 43;
pub const LSEEK: u32 = 46;

pub const O_DSYNC: u64 = 0o10000;
pub const KEEP_SIZE: u64 = 1;
pub const PUNCH_HOLE: u64 = 2;
pub const ZERO_RANGE: u64 = 16;
pub const SEEK_DATA: u64 = 3;
pub const SEEK_HOLE: u64 = 4;

pub fn negotiated(capabilities: u64) -> Negotiated {
    let init = Init { major: 7, minor: 45, max_readahead: 131_072, capabilities };
    match init.negotiate(&SETTINGS).unwrap() {
        InitAnswer::Settled(negotiated) => negotiated,
        other => panic!("{other:?}"),
    }
}

pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap())
}

pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// A message about the file. words: its body, 8 bytes each.
pub fn message(opcode: u32, unique: u64, words: &[u64], data: &[u8]) -> Vec<u8> {
    let length = 40 + 8 * words.len() + data.len();
    let head = [(length as u64) | u64::from(opcode) << 32, unique, 1, 0, 0];
    let mut bytes: Vec<u8> = head.iter().chain(words).flat_map(|word| word.to_ne_bytes()).collect();
    bytes.extend(data);
    bytes
}

pub fn read_message(unique: u64, offset: u64, size: u64) -> Vec<u8> {
    message(READ, unique, &[1, offset, size, 0, 0], &[])
}

pub fn write_message(unique: u64, offset: u64, data: &[u8], flags: u64) -> Vec<u8> {
    message(WRITE, unique, &[1, offset, data.len() as u64, 0, flags], data)
}

/// The kernel's end of the connection.
pub struct Kernel(pub OwnedFd);

impl Kernel {
    pub fn pair() -> (Kernel, OwnedFd) {
        let (kernel, served) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        for direction in [Timeout::Recv, Timeout::Send] {
            set_socket_timeout(&kernel, direction, Some(PATIENT)).unwrap();
        }
        (Kernel(kernel), served)
    }

    /// The kernel's end of a connection that the host serves.
    pub fn new(host: &Host, file: &Arc<FuseFile>) -> (Kernel, TransportHandle) {
        let (kernel, served) = Kernel::pair();
        (kernel, serve(host, file, served, Vec::new()))
    }

    pub fn send(&self, message: &[u8]) {
        assert_eq!(retry_on_intr(|| send(&self.0, message, SendFlags::NOSIGNAL)).unwrap(), message.len());
    }

    /// The next reply: (errno, unique, body).
    pub fn reply(&self) -> (i32, u64, Vec<u8>) {
        let mut bytes = vec![0; 1 << 18];
        let count = retry_on_intr(|| recv(&self.0, &mut bytes[..], RecvFlags::empty())).unwrap().0;
        bytes.truncate(count);
        assert_eq!(u32_at(&bytes, 0) as usize, count, "a reply says its length");
        (-(u32_at(&bytes, 4) as i32), u64_at(&bytes, 8), bytes.split_off(16))
    }

    /// Sends one request and returns its reply, while no other is in flight.
    pub fn ask(&self, message: &[u8]) -> Result<Vec<u8>, i32> {
        self.send(message);
        let (errno, unique, body) = self.reply();
        assert_eq!(unique, u64_at(message, 8));
        if errno == 0 { Ok(body) } else { Err(errno) }
    }

    pub fn read(&self, offset: u64, size: u64) -> Vec<u8> {
        self.ask(&read_message(2, offset, size)).unwrap()
    }

    pub fn write(&self, offset: u64, data: &[u8]) -> Result<u32, i32> {
        self.ask(&write_message(2, offset, data, 0)).map(|body| u32_at(&body, 0))
    }

    pub fn fallocate(&self, offset: u64, length: u64, mode: u64) -> Result<(), i32> {
        self.ask(&message(FALLOCATE, 2, &[1, offset, length, mode], &[])).map(|body| assert!(body.is_empty()))
    }

    pub fn seek(&self, offset: u64, whence: u64) -> Result<u64, i32> {
        self.ask(&message(LSEEK, 2, &[1, offset, whence], &[])).map(|body| u64_at(&body, 0))
    }
}

pub fn recipient(host: &Host) -> Recipient {
    Recipient { notices: host.notices.clone(), token: 1 }
}

pub fn file_of(host: &Host) -> Arc<FuseFile> {
    FuseFile::new(host.export.clone(), negotiated(u64::MAX), OWNER, None).unwrap()
}

pub fn serve(host: &Host, file: &Arc<FuseFile>, fd: OwnedFd, unserved: Vec<u8>) -> TransportHandle {
    fuse::serve(&host.engine, file, fd, unserved, recipient(host)).unwrap()
}

/// A host with a connection to it.
pub fn connected(device: Arc<Device>) -> (Host, Kernel, TransportHandle) {
    let host = Host::new(hosts::threads(), device);
    let (kernel, handle) = Kernel::new(&host, &file_of(&host));
    (host, kernel, handle)
}

pub fn end(host: &Host, kernel: Kernel) {
    drop(kernel);
    assert_eq!(host.closed(), "unmounted");
    assert_eq!((host.device.stats().totals().in_flight, host.export.stats.totals().in_flight), (0, 0));
}
