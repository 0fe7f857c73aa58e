//! FUSE server without storage: reads return zeros, writes are discarded.
//!
//! Its throughput is the limit of the client, the kernel's FUSE and the machine, because no server with storage can be
//! faster. It reads one request, answers it, and polls before it sleeps. Arguments: SIZE DESCRIPTOR... SIZE: bytes of
//! the file. DESCRIPTOR: numbers of the connection's descriptors, which the program inherits; each gets a thread. It
//! ends when the file is unmounted.

use std::error::Error;
use std::io::IoSlice;
use std::os::fd::{FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use blkloom_fuse_wire::reply::{self, Attributes, FileSystem};
use blkloom_fuse_wire::{Errno, Handle, InitAnswer, Operation, Settings, WRITE_DATA_OFFSET, Whence, parse};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{self, ioctl_fionbio, read, write, writev};

/// How long a thread polls after a request before it sleeps.
const POLL: Duration = Duration::from_micros(50);
const BLOCK: u32 = 4096;
/// How long the kernel may cache attributes.
const VALID: Duration = Duration::from_secs(86400);

fn main() -> Result<(), Box<dyn Error>> {
    let numbers = std::env::args().skip(1).map(|text| text.parse()).collect::<Result<Vec<i64>, _>>()?;
    let [size, descriptors @ ..] = &numbers[..] else {
        return Err("usage: fuse_null_server SIZE DESCRIPTOR...".into());
    };
    let size = u64::try_from(*size)?;
    let threads: Vec<_> = descriptors
        .iter()
        .map(|number| {
            // SAFETY: the parent process opened the descriptor for this program, and no other code here uses it.
            let device = unsafe { OwnedFd::from_raw_fd(*number as i32) };
            std::thread::spawn(move || serve(&device, size))
        })
        .collect();
    for thread in threads {
        thread.join().map_err(|_| "a thread panicked")??;
    }
    Ok(())
}

/// Serves requests until the file is unmounted.
fn serve(device: &OwnedFd, size: u64) -> io::Result<()> {
    let settings = Settings::default();
    let mut buffer = vec![0; WRITE_DATA_OFFSET + settings.max_transfer as usize];
    let zeros = vec![0; settings.max_transfer as usize];
    ioctl_fionbio(device, true)?;
    while let Some(length) = receive(device, &mut buffer)? {
        let Ok(request) = parse(&buffer[..length]) else { return Err(io::Errno::PROTO) };
        let unique = request.header.unique;
        let sent = match request.operation {
            Operation::Read { offset, size: wanted, .. } => {
                let length = size.saturating_sub(offset).min(wanted.into()) as usize;
                let head = reply::data(unique, length).ok_or(io::Errno::PROTO)?;
                writev(device, &[IoSlice::new(&head), IoSlice::new(&zeros[..length])])
            }
            Operation::Write { data, .. } => write(device, &reply::written(unique, data.len() as u32)),
            Operation::Init(init) => match init.negotiate(&settings) {
                Ok(InitAnswer::Settled(negotiated)) => write(device, &reply::initialized(unique, &negotiated)),
                Ok(InitAnswer::OtherVersion) => write(device, &reply::other_version(unique)),
                Err(_) => return Err(io::Errno::PROTO),
            },
            Operation::GetAttributes | Operation::SetAttributes(_) => {
                write(device, &reply::attributes(unique, &attributes(size), VALID))
            }
            Operation::Open { .. } => write(device, &reply::opened(unique, Handle(1))),
            Operation::StatFs => {
                let system = FileSystem { block_size: BLOCK, blocks: size / u64::from(BLOCK), free_blocks: 0 };
                write(device, &reply::file_system(unique, &system))
            }
            Operation::Seek { offset, whence: Whence::Data, .. } if offset < size => {
                write(device, &reply::found(unique, offset))
            }
            Operation::Seek { offset, whence: Whence::Hole, .. } if offset < size => {
                write(device, &reply::found(unique, size))
            }
            Operation::Seek { .. } => write(device, &reply::error(unique, Errno::NXIO)),
            Operation::Fsync { .. }
            | Operation::Flush { .. }
            | Operation::Fallocate { .. }
            | Operation::Release { .. }
            | Operation::Access { .. }
            | Operation::Destroy => write(device, &reply::done(unique)),
            Operation::Interrupt { .. } | Operation::Unsupported => write(device, &reply::error(unique, Errno::NOSYS)),
            Operation::Forget => continue,
        };
        match sent {
            Ok(_) | Err(io::Errno::NOENT) => {} // NOENT: the request was aborted
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Receives one request; polls for a while before it sleeps. None: the file is unmounted.
fn receive(device: &OwnedFd, into: &mut [u8]) -> io::Result<Option<usize>> {
    let begun = Instant::now();
    loop {
        match read(device, &mut *into) {
            Ok(length) => return Ok(Some(length)),
            Err(io::Errno::NODEV) => return Ok(None),
            Err(io::Errno::AGAIN) if begun.elapsed() < POLL => std::thread::yield_now(),
            Err(io::Errno::AGAIN) => {
                poll(&mut [PollFd::new(device, PollFlags::IN)], None)?;
            }
            Err(io::Errno::INTR | io::Errno::NOENT) => {} // NOENT: the request was aborted before it was read
            Err(error) => return Err(error),
        }
    }
}

fn attributes(size: u64) -> Attributes {
    let (user, group) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let zero = Duration::ZERO;
    Attributes {
        size,
        allocated: size,
        mode: 0o600,
        user,
        group,
        access_time: zero,
        modification_time: zero,
        change_time: zero,
        block_size: BLOCK,
    }
}
