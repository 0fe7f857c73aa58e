//! Commands to /dev/ublk-control, one at a time. A command may wait for I/O of the device that it is about: it is sent by
//! a thread that serves nothing.

use std::os::fd::OwnedFd;
use std::time::Duration;

use blkloom_io::{Arrival, CommandRing};
use blkloom_ublk_wire::control::{Command, command};
use rustix::io::Errno;

#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The driver has refused the command.
    #[error("{0}")]
    Refused(Errno),
    /// The command has not ended. The driver goes on with it.
    #[error("the ublk driver has not answered for {0:?}")]
    Timeout(Duration),
    #[error("io_uring: {0}")]
    Os(#[from] std::io::Error),
}

/// Sends a command and waits for its end. device: number of the device, u32::MAX for one that the driver chooses. data:
/// the command's argument. buffer: what the driver reads; what it has written there replaces that.
pub fn control(
    fd: &OwnedFd,
    what: Command,
    (device, data): (u32, u64),
    buffer: &mut [u8],
    timeout: Duration,
) -> Result<(), ControlError> {
    const ENTRY: usize = 0;
    let length = u16::try_from(buffer.len()).map_err(|_| std::io::Error::from(std::io::ErrorKind::InvalidInput))?;
    let mut ring = CommandRing::new(fd, 1, 0, buffer.len().max(1))?;
    ring.payload_mut(ENTRY)[..buffer.len()].copy_from_slice(buffer);
    let bytes = |address| command(device, (if length == 0 { 0 } else { address }, length), data);
    ring.command_with_payload(ENTRY, what.opcode(), bytes)?;
    ring.submit()?;
    let mut answer = None;
    ring.reap(|arrival| answer = Some(arrival));
    if answer.is_none() {
        if !ring.wait(timeout)? {
            return Err(ControlError::Timeout(timeout));
        }
        ring.reap(|arrival| answer = Some(arrival));
    }
    match answer {
        Some(Arrival::Completed(_, Ok(()))) => {
            buffer.copy_from_slice(&ring.payload(ENTRY)[..buffer.len()]);
            Ok(())
        }
        Some(Arrival::Completed(_, Err(errno))) => Err(ControlError::Refused(errno)),
        Some(Arrival::Readable) | None => Err(ControlError::Timeout(timeout)),
    }
}
