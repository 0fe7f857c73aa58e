//! FUSE server of one file in memory: one thread answers one request at a time.
//!
//! The tests mount it to test this crate with the kernel. Arguments: SIZE DESCRIPTOR. SIZE: bytes of the file.
//! DESCRIPTOR: number of the connection's descriptor, which the program inherits. It ends when the file is unmounted.

use std::error::Error;
use std::io::IoSlice;
use std::os::fd::{FromRawFd, OwnedFd};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use blkloom_fuse_wire::reply::{self, Attributes, FileSystem};
use blkloom_fuse_wire::{
    Errno, Handle, INIT_BUFFER_SIZE, InitAnswer, Negotiated, Operation, Request, SetAttributes, SetTime, Settings,
    Unique, Whence, parse,
};
use rustix::io::{self, read, writev};

const PAGE: u64 = 4096;

/// FALLOC_FL_* flags of fallocate(2).
mod allocate {
    pub const KEEP_SIZE: u32 = 1;
    pub const PUNCH_HOLE: u32 = 2;
    pub const ZERO_RANGE: u32 = 16;
}

fn main() -> Result<(), Box<dyn Error>> {
    let numbers = std::env::args().skip(1).map(|text| text.parse()).collect::<Result<Vec<i64>, _>>()?;
    let [size, descriptor] = numbers[..] else { return Err("usage: fuse_memory_server SIZE DESCRIPTOR".into()) };
    // SAFETY: the parent process opened the descriptor for this program, and no other code here uses it.
    let device = unsafe { OwnedFd::from_raw_fd(descriptor as i32) };
    let mut file = File::new(size.try_into()?, device);
    let mut buffer = vec![0; INIT_BUFFER_SIZE];
    loop {
        let length = match read(&file.device, &mut buffer) {
            Ok(length) => length,
            Err(io::Errno::NODEV) => return Ok(()),              // unmounted
            Err(io::Errno::INTR | io::Errno::NOENT) => continue, // NOENT: the request was aborted before it was read
            Err(error) => return Err(error.into()),
        };
        let request = match parse(&buffer[..length]) {
            Ok(request) => request,
            Err(malformed) => {
                eprintln!("{malformed}");
                let unique = malformed.unique.ok_or(malformed)?;
                file.send(&[&reply::error(unique, Errno::PROTO)])?;
                continue;
            }
        };
        if let Some(negotiated) = file.serve(&request)? {
            buffer.resize(negotiated.read_buffer_size(), 0);
        }
    }
}

struct File {
    device: OwnedFd,
    data: Vec<u8>,
    /// One bit per page: whether it was written.
    stored: Vec<bool>,
    handles: u64,
    mode: u32,
    user: u32,
    group: u32,
    times: [Duration; 3],
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

impl File {
    fn new(size: u64, device: OwnedFd) -> File {
        let (user, group) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let stored = vec![false; size.div_ceil(PAGE) as usize];
        File { device, data: vec![0; size as usize], stored, handles: 0, mode: 0o600, user, group, times: [now(); 3] }
    }

    /// Sends one reply that consists of several parts.
    fn send(&self, pieces: &[&[u8]]) -> io::Result<()> {
        let pieces: Vec<_> = pieces.iter().map(|piece| IoSlice::new(piece)).collect();
        match writev(&self.device, &pieces) {
            Err(io::Errno::NOENT) => Ok(()), // the request was aborted
            written => written.map(drop),
        }
    }

    fn size(&self) -> u64 {
        self.data.len() as u64
    }

    /// Answers a request. Returns the negotiated parameters if it was INIT.
    fn serve(&mut self, request: &Request<'_>) -> io::Result<Option<Negotiated>> {
        let unique = request.header.unique;
        match request.operation {
            Operation::Init(init) => match init.negotiate(&Settings::default()) {
                Ok(InitAnswer::Settled(negotiated)) => {
                    self.send(&[&reply::initialized(unique, &negotiated)])?;
                    return Ok(Some(negotiated));
                }
                Ok(InitAnswer::OtherVersion) => self.send(&[&reply::other_version(unique)])?,
                Err(error) => {
                    eprintln!("{error}");
                    self.send(&[&reply::error(unique, Errno::PROTO)])?;
                }
            },
            Operation::Read { offset, size, .. } => {
                let from = offset.min(self.size());
                let data = &self.data[from as usize..offset.saturating_add(size.into()).min(self.size()) as usize];
                if let Some(head) = reply::data(unique, data.len()) {
                    self.send(&[&head, data])?;
                }
            }
            Operation::Write { offset, data, .. } => match self.write(offset, data) {
                Ok(written) => self.send(&[&reply::written(unique, written)])?,
                Err(errno) => self.send(&[&reply::error(unique, errno)])?,
            },
            Operation::GetAttributes => self.send_attributes(unique)?,
            Operation::SetAttributes(set) => match self.set_attributes(&set) {
                Ok(()) => self.send_attributes(unique)?,
                Err(errno) => self.send(&[&reply::error(unique, errno)])?,
            },
            Operation::Open { .. } => {
                self.handles += 1;
                self.send(&[&reply::opened(unique, Handle(self.handles))])?;
            }
            Operation::Fallocate { offset, length, mode, .. } => match self.allocate(offset, length, mode) {
                Ok(()) => self.send(&[&reply::done(unique)])?,
                Err(errno) => self.send(&[&reply::error(unique, errno)])?,
            },
            Operation::Seek { offset, whence, .. } => match self.seek(offset, whence) {
                Some(found) => self.send(&[&reply::found(unique, found)])?,
                None => self.send(&[&reply::error(unique, Errno::NXIO)])?,
            },
            Operation::StatFs => {
                let free_blocks = self.stored.iter().filter(|stored| !**stored).count() as u64;
                let system = FileSystem { block_size: PAGE as u32, blocks: self.stored.len() as u64, free_blocks };
                self.send(&[&reply::file_system(unique, &system)])?;
            }
            Operation::Fsync { .. }
            | Operation::Flush { .. }
            | Operation::Release { .. }
            | Operation::Access { .. } => {
                self.send(&[&reply::done(unique)])?;
            }
            Operation::Destroy => self.send(&[&reply::done(unique)])?,
            Operation::Interrupt { .. } | Operation::Unsupported => {
                self.send(&[&reply::error(unique, Errno::NOSYS)])?
            }
            Operation::Forget => {}
        }
        Ok(None)
    }

    fn send_attributes(&self, unique: Unique) -> io::Result<()> {
        let [access_time, modification_time, change_time] = self.times;
        let attributes = Attributes {
            size: self.size(),
            allocated: self.stored.iter().filter(|stored| **stored).count() as u64 * PAGE,
            mode: self.mode,
            user: self.user,
            group: self.group,
            access_time,
            modification_time,
            change_time,
            block_size: PAGE as u32,
        };
        self.send(&[&reply::attributes(unique, &attributes, Duration::ZERO)])
    }

    fn set_attributes(&mut self, set: &SetAttributes) -> Result<(), Errno> {
        if set.size.is_some_and(|size| size != self.size()) {
            return Err(Errno::PERM);
        }
        self.mode = set.mode.unwrap_or(self.mode);
        self.user = set.user.unwrap_or(self.user);
        self.group = set.group.unwrap_or(self.group);
        for (time, set) in self.times.iter_mut().zip([set.access_time, set.modification_time, set.change_time]) {
            match set {
                Some(SetTime::Now) => *time = now(),
                Some(SetTime::To(to)) => *time = to,
                None => {}
            }
        }
        Ok(())
    }

    /// Writes as much of the data as fits.
    fn write(&mut self, offset: u64, data: &[u8]) -> Result<u32, Errno> {
        let room = self.size().checked_sub(offset).filter(|room| *room > 0).ok_or(Errno::NOSPC)?;
        let data = &data[..data.len().min(room as usize)];
        self.data[offset as usize..][..data.len()].copy_from_slice(data);
        self.mark(offset, data.len() as u64, true);
        Ok(data.len() as u32)
    }

    fn allocate(&mut self, offset: u64, length: u64, mode: u32) -> Result<(), Errno> {
        let end = offset.checked_add(length).filter(|end| *end <= self.size()).ok_or(Errno::NOSPC)?;
        match mode & !allocate::KEEP_SIZE {
            0 => self.mark(offset, length, true),
            allocate::ZERO_RANGE => {
                self.data[offset as usize..end as usize].fill(0);
                self.mark(offset, length, true);
            }
            allocate::PUNCH_HOLE => {
                self.data[offset as usize..end as usize].fill(0);
                let whole = offset.next_multiple_of(PAGE)..end / PAGE * PAGE;
                self.mark(whole.start, whole.end.saturating_sub(whole.start), false);
            }
            _ => return Err(Errno::OPNOTSUPP),
        }
        Ok(())
    }

    fn mark(&mut self, offset: u64, length: u64, stored: bool) {
        if length > 0 {
            self.stored[(offset / PAGE) as usize..offset.saturating_add(length).div_ceil(PAGE) as usize].fill(stored);
        }
    }

    fn seek(&self, offset: u64, whence: Whence) -> Option<u64> {
        if offset >= self.size() {
            return None;
        }
        let first = (offset / PAGE) as usize;
        let found = self.stored[first..].iter().position(|stored| *stored == (whence == Whence::Data));
        match (found, whence) {
            (Some(pages), _) => Some(((first + pages) as u64 * PAGE).max(offset)),
            (None, Whence::Hole) => Some(self.size()),
            (None, Whence::Data) => None,
        }
    }
}
