//! INIT: receives and answers the kernel's first request of a FUSE connection, before the connection is served.
//!
//! The kernel does not repeat INIT. So the process that mounts answers it, and keeps the negotiated values for all
//! servers of the connection. If that process dies first, the connection's only descriptor closes, and the mount is
//! dead.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use blkloom_fuse_wire::{
    INIT_BUFFER_SIZE, Incompatible, InitAnswer, Malformed, Negotiated, Operation, Settings, parse, reply,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, read, write};

#[derive(Debug, thiserror::Error)]
pub enum InitError {
    #[error("the kernel sent no INIT within {0:?}")]
    Timeout(Duration),
    #[error("reading and answering INIT: {0}")]
    Os(#[from] Errno),
    #[error("{0}")]
    Malformed(#[from] Malformed),
    #[error("FUSE request {0} came before INIT")]
    NotInit(u32),
    #[error("{0}")]
    Incompatible(#[from] Incompatible),
}

/// Waits for INIT, which a mount sends at once, and answers it.
pub fn answer_init(fd: impl AsFd, settings: &Settings, timeout: Duration) -> Result<Negotiated, InitError> {
    let fd = fd.as_fd();
    let deadline = Instant::now() + timeout;
    let mut buffer = vec![0; INIT_BUFFER_SIZE];
    loop {
        wait(fd, deadline).map_err(|errno| match errno {
            Errno::TIMEDOUT => InitError::Timeout(timeout),
            errno => InitError::Os(errno),
        })?;
        let length = match read(fd, &mut buffer) {
            Ok(length) => length,
            // NOENT: the caller was killed before its request was read.
            Err(Errno::AGAIN | Errno::INTR | Errno::NOENT) => continue,
            Err(errno) => return Err(errno.into()),
        };
        let message = &buffer[..length];
        let request = parse(message)?;
        let Operation::Init(init) = request.operation else {
            return Err(InitError::NotInit(request.header.opcode));
        };
        let unique = request.header.unique;
        match init.negotiate(settings) {
            Ok(InitAnswer::Settled(negotiated)) => {
                write(fd, &reply::initialized(unique, &negotiated))?;
                return Ok(negotiated);
            }
            Ok(InitAnswer::OtherVersion) => drop(write(fd, &reply::other_version(unique))?),
            Err(incompatible) => {
                write(fd, &reply::error(unique, blkloom_fuse_wire::Errno::PROTO))?;
                return Err(incompatible.into());
            }
        }
    }
}

/// Waits until the descriptor is readable.
fn wait(fd: BorrowedFd<'_>, deadline: Instant) -> Result<(), Errno> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)) {
            Ok(0) if left.is_zero() => return Err(Errno::TIMEDOUT),
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(()),
            Err(errno) => return Err(errno),
        }
    }
}
