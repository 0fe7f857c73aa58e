//! FUSE transport: serves a device as one regular file.
//!
//! `file`: state of the file that all descriptors of a mount share. `connection`: serves the requests of one `link`.
//! `buffers`: the memory for them, which is allocated before the first is received.
//! `init`: answers the kernel's first request. `record`: stores the owner and mode that chown(2) and chmod(2) set.
//!
//! A link is a descriptor of /dev/fuse (`device_link`), or an io_uring if INIT negotiated that (`ring_link`). One
//! transport serves one link. Other loops may serve further descriptors (clones); each answers the requests that it has
//! read. On /dev/fuse each request needs one system call to read it and one to answer it. The requests and replies of a
//! ring share system calls, but another engine cannot take over a ring.
//!
//! An engine that takes over a connection needs the parameters that INIT negotiated. After `resend`, which must come
//! before the first `serve`, the kernel sends again all requests that the engine before has read and not answered.
//! Kernels before Linux 6.9 do not support that: then these requests are handed over as `Detached::unserved`.

mod buffers;
mod connection;
mod device_link;
mod file;
mod init;
mod link;
mod record;
mod ring_link;
mod ring_size;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use blkloom_fuse_wire::{capability, reply, ring};
use rustix::io::Errno;
use rustix::param::page_size;

use self::buffers::Buffers;
use self::connection::Connection;
pub use self::connection::{Detached, KIND};
use self::device_link::DeviceLink;
pub use self::file::{FuseFile, Owner, SPARSE};
pub use self::init::{InitError, answer_init};
pub use self::record::{Record, RecordError};
use self::ring_link::RingLink;
pub use self::ring_size::settings as ring_settings;
use crate::engine::{Engine, EngineError, TransportHandle};
use crate::notice::Recipient;

/// Serves a descriptor of a connection. No other code may read from that descriptor. unserved: messages that the engine
/// before has read from it and not answered, one after the other.
pub fn serve(
    engine: &Engine,
    file: &Arc<FuseFile>,
    fd: OwnedFd,
    unserved: Vec<u8>,
    recipient: Recipient,
) -> Result<TransportHandle, EngineError> {
    rustix::io::ioctl_fionbio(&fd, true).map_err(|errno| EngineError::Os("FIONBIO", errno.into()))?;
    let budget = engine.budget().clone();
    if file.negotiated.has(capability::OVER_IO_URING) {
        let ring = RingLink::new(fd, &file.negotiated).map_err(|error| EngineError::Os("FUSE over io_uring", error))?;
        let connection = Connection::new(file.clone(), ring, recipient.clone(), budget);
        return engine.serve(&file.export, Box::new(connection), recipient);
    }
    let largest = ring::payload_size(&file.negotiated, page_size());
    let buffers = Buffers::new(largest, file.negotiated.max_background.into())
        .map_err(|errno| EngineError::Os("memory for a FUSE file", errno.into()))?;
    let link = DeviceLink::new(fd, unserved, buffers);
    let connection = Connection::new(file.clone(), link, recipient.clone(), budget);
    engine.serve(&file.export, Box::new(connection), recipient)
}

/// Makes the kernel send again all requests of the connection that were read and not answered. The new servers must not
/// have read anything before. EINVAL: the kernel does not support it (before Linux 6.9).
pub fn resend(fd: impl AsFd) -> Result<(), Errno> {
    rustix::io::write(fd, &reply::resend()).map(drop)
}

/// Makes the kernel drop cached attributes and pages of mappings, because the device's contents or size have changed.
/// The kernel first writes back dirty pages, and the call waits for that: a thread that serves must not call it.
pub fn invalidate(fd: impl AsFd) -> Result<(), Errno> {
    match rustix::io::write(fd, &reply::invalidate(0, 0)) {
        // NOENT: the kernel has nothing cached of the file.
        Ok(_) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(errno),
    }
}
