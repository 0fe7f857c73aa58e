//! `Driver`: a virtio block driver in memory that it shares with an engine. It does as the specification says, or stores
//! anything.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use blkloom_core::vhost_user::{self, Call, DirtyLog, Disk, QueueMemory, QueueSettings, ServeError};
use blkloom_core::{Recipient, TransportHandle};
use blkloom_io::{GuestMemory, GuestRegion, SharedMemory, Sharer};
use blkloom_virtio_wire::{inflight, split};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use super::PATIENT;
use super::hosts::Host;

pub const SIZE: u16 = 64;
pub const READ: u32 = 0;
pub const WRITE: u32 = 1;
pub const FLUSH: u32 = 4;
pub const IDENTIFY: u32 = 8;
pub const DISCARD: u32 = 11;
pub const WRITE_ZEROES: u32 = 13;

/// Where the memory is for the guest, and in the program that shares it.
pub const GUEST: u64 = 0x10_0000;
pub const USER: u64 = 0x7000_0000;
const AVAILABLE: usize = 0x2000;
pub const USED: usize = 0x3000;
const REQUESTS: usize = 0x4000;
const TABLES: usize = 0x8000;
pub const DATA: usize = 0x10000;
const DATA_EACH: usize = 16 << 10;
pub const LENGTH: usize = 2 << 20;
/// Length of a log of the pages up to the end of the memory.
pub const LOG: usize = (GUEST as usize + LENGTH) / 4096 / 8;

pub fn sealed(length: usize) -> OwnedFd {
    let file = memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&file, length as u64).unwrap();
    fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
    file
}

pub struct Driver {
    file: OwnedFd,
    memory: SharedMemory,
    region: OwnedFd,
    pub kick: OwnedFd,
    event: OwnedFd,
    pub call: Arc<Call>,
    pub event_idx: bool,
    pub indirect: bool,
    pub write_through: bool,
    log_file: OwnedFd,
    /// Where the device marks pages that it writes, if it does.
    pub log: Option<SharedMemory>,
    next: u16,
    seen: u16,
    free: Vec<u16>,
    /// Number of kicks that the device has asked for.
    pub kicks: u64,
}

impl Driver {
    pub fn new(event_idx: bool, indirect: bool) -> Driver {
        let file = sealed(LENGTH);
        let memory = SharedMemory::new(file.as_fd(), 0, LENGTH as u64, Sharer::Other).unwrap();
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        let (kick, event, call) = (event(), event(), Arc::new(Call::default()));
        call.replace(Some(event.try_clone().unwrap())).unwrap();
        let free = (0..SIZE / 4).map(|slot| slot * 4).rev().collect();
        let region = sealed(inflight::region_length(SIZE));
        let (next, seen, write_through, kicks) = (0, 0, false, 0);
        let (log_file, log) = (sealed(LOG), None);
        Driver {
            file,
            memory,
            region,
            kick,
            event,
            call,
            event_idx,
            indirect,
            write_through,
            log_file,
            log,
            next,
            seen,
            free,
            kicks,
        }
    }

    /// Lets the device mark the pages that it writes from the next start on. length: of the log.
    pub fn keep_log(&mut self, length: usize) {
        self.log = Some(SharedMemory::new(self.log_file.as_fd(), 0, length as u64, Sharer::Other).unwrap());
    }

    /// Takes the marks: pages of the memory.
    pub fn take_marks(&self) -> Vec<usize> {
        let log = self.log.as_ref().unwrap().slice();
        let bytes = log.to_vec();
        log.zero();
        let pages = (0..bytes.len() * 8).filter(|page| bytes[page / 8] >> (page % 8) & 1 == 1);
        pages.map(|page| page.checked_sub(GUEST as usize / 4096).expect("no page below the memory is marked")).collect()
    }

    pub fn status_at(slot: u16) -> usize {
        REQUESTS + usize::from(slot) * 64 + 16
    }

    pub fn settings(&self) -> QueueSettings {
        QueueSettings {
            size: SIZE,
            descriptors: USER,
            available: USER + AVAILABLE as u64,
            used: USER + USED as u64,
            next: 0,
            event_idx: self.event_idx,
            indirect: self.indirect,
            write_through: self.write_through,
            used_log: self.log.as_ref().map(|_| GUEST + USED as u64),
        }
    }

    pub fn try_serve(&self, host: &Host, settings: QueueSettings) -> Result<TransportHandle, ServeError> {
        let region = GuestRegion { file: self.file.as_fd(), offset: 0, size: LENGTH as u64, guest: GUEST, user: USER };
        let guest = Arc::new(GuestMemory::new([region], Sharer::Other).unwrap());
        let length = inflight::region_length(SIZE) as u64;
        let inflight = (Arc::new(SharedMemory::new(self.region.as_fd(), 0, length, Sharer::Other).unwrap()), 0);
        let disk = Disk::new(host.export.clone(), b"serial");
        let recipient = Recipient { notices: host.notices.clone(), token: 1 };
        let log = self.log.as_ref().map(|log| {
            let length = log.slice().len() as u64;
            let memory = SharedMemory::new(self.log_file.as_fd(), 0, length, Sharer::Other).unwrap();
            Arc::new(DirtyLog::new(Arc::new(memory)))
        });
        let memory = QueueMemory { guest, inflight, log };
        let events = (self.kick.try_clone().unwrap(), self.call.clone());
        vhost_user::serve(&host.engine, &disk, memory, settings, events, recipient)
    }

    pub fn serve(&self, host: &Host) -> TransportHandle {
        self.try_serve(host, self.settings()).unwrap()
    }

    pub fn put(&self, at: usize, bytes: &[u8]) {
        self.memory.slice().part(at, bytes.len()).copy_from(bytes.into());
    }

    pub fn get(&self, at: usize, length: usize) -> Vec<u8> {
        self.memory.slice().part(at, length).to_vec()
    }

    pub fn data_at(slot: u16) -> usize {
        DATA + usize::from(slot / 4) * DATA_EACH
    }

    pub fn descriptor(address: u64, length: u32, flags: u16, next: u16) -> [u8; 16] {
        let whole = u128::from(address) | u128::from(length) << 64 | u128::from(flags) << 96 | u128::from(next) << 112;
        whole.to_le_bytes()
    }

    /// Makes a request available, without a kick. Its data is in two buffers.
    pub fn submit(&mut self, kind: u32, sector: u64, data: &[u8]) -> u16 {
        let slot = self.free.pop().expect("fewer requests than slots");
        let (request, at) = (REQUESTS + usize::from(slot) * 64, Driver::data_at(slot));
        let mut header = [kind.to_le_bytes(), [0; 4]].concat();
        header.extend(sector.to_le_bytes());
        self.put(request, &header);
        self.put(request + 16, &[0xff]);
        let to_device = !matches!(kind, READ | IDENTIFY);
        if to_device {
            self.put(at, data);
        }
        let guest = |at: usize| GUEST + at as u64;
        let half = data.len() / 2;
        let mut pieces = vec![(guest(request), 16, 0)];
        for (from, length) in [(0, half), (half, data.len() - half)] {
            if length > 0 {
                pieces.push((guest(at + from), length as u32, if to_device { 0 } else { 2 }));
            }
        }
        pieces.push((guest(request + 16), 1, 2));
        let first = if self.indirect { 0 } else { slot };
        let table: Vec<u8> = (first..)
            .zip(&pieces)
            .flat_map(|(index, &(address, length, flags))| {
                let is_last = usize::from(index - first) + 1 == pieces.len();
                Driver::descriptor(address, length, if is_last { flags } else { flags | 1 }, index + 1)
            })
            .collect();
        if self.indirect {
            let at = TABLES + usize::from(slot) * 64;
            self.put(at, &table);
            self.put(usize::from(slot) * 16, &Driver::descriptor(guest(at), table.len() as u32, 4, 0));
        } else {
            self.put(usize::from(slot) * 16, &table);
        }
        self.offer(slot);
        slot
    }

    /// Puts a head into the available ring.
    pub fn offer(&mut self, head: u16) {
        let ring = self.memory.slice().part(AVAILABLE, split::available_length(SIZE));
        ring.store_u16(split::available_offset(self.next, SIZE), head);
        self.next = self.next.wrapping_add(1);
        ring.store_u16(split::INDEX, self.next);
    }

    /// Stores any index for the available ring.
    pub fn claim(&self, index: u16) {
        self.memory.slice().part(AVAILABLE, 4).store_u16(split::INDEX, index);
    }

    /// Kicks if the device wants that. count: number of requests since the last call.
    pub fn notify(&mut self, count: u16) {
        fence(Ordering::SeqCst);
        let used = self.memory.slice().part(USED, split::used_length(SIZE));
        let wanted = if self.event_idx {
            let event = used.load_u16(split::available_event_offset(SIZE));
            split::must_notify(event, self.next, self.next.wrapping_sub(count))
        } else {
            used.load_u16(split::FLAGS) & 1 == 0
        };
        if wanted {
            self.kicks += 1;
            self.kick_now();
        }
    }

    pub fn kick_now(&self) {
        rustix::io::write(&self.kick, &1u64.to_ne_bytes()).unwrap();
    }

    /// Takes all used requests: (slot, status, bytes written).
    pub fn taken(&mut self) -> Vec<(u16, u8, u32)> {
        let mut all = Vec::new();
        let used = self.memory.slice().part(USED, split::used_length(SIZE));
        while used.load_u16(split::INDEX) != self.seen {
            let element = used.part(split::used_offset(self.seen, SIZE), 8).to_vec();
            let number = |at: usize| u32::from_le_bytes(element[at..at + 4].try_into().unwrap());
            let slot = number(0) as u16;
            all.push((slot, self.get(REQUESTS + usize::from(slot) * 64 + 16, 1)[0], number(4)));
            self.free.push(slot);
            self.seen = self.seen.wrapping_add(1);
        }
        all
    }

    /// Waits for so many requests: sleeps until it is called.
    pub fn wait(&mut self, count: usize) -> Vec<(u16, u8, u32)> {
        let mut all = Vec::new();
        loop {
            all.extend(self.taken());
            if all.len() >= count {
                return all;
            }
            let event = split::used_event_offset(SIZE);
            self.memory.slice().part(AVAILABLE, split::available_length(SIZE)).store_u16(event, self.seen);
            fence(Ordering::SeqCst);
            all.extend(self.taken());
            if all.len() >= count {
                return all;
            }
            let mut polled = [PollFd::new(&self.event, PollFlags::IN)];
            let patience = Timespec { tv_sec: PATIENT.as_secs() as i64, tv_nsec: 0 };
            assert_eq!(poll(&mut polled, Some(&patience)).unwrap(), 1, "called for used buffers");
            let _was_readable = rustix::io::read(&self.event, &mut [0u8; 8]);
        }
    }

    /// One request: its status and the bytes that it has written.
    pub fn execute(&mut self, kind: u32, sector: u64, data: &[u8]) -> (u8, Vec<u8>) {
        let slot = self.submit(kind, sector, data);
        self.notify(1);
        let answers = self.wait(1);
        assert_eq!((answers.len(), answers[0].0), (1, slot));
        let (_, status, written) = answers[0];
        (status, self.get(Driver::data_at(slot), written as usize - 1))
    }
}
