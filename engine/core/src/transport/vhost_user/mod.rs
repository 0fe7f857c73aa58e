//! vhost-user transport: serves a device as the virtio block device of a virtual machine, from its memory.
//!
//! `disk`: what the queues of a device share. `call`: the eventfd by which the driver learns of used buffers. `dirty_log`:
//! marks written pages during a live migration. `vring`: the rings of a queue in the memory of the guest, and its requests
//! in flight. `queue`: serves the requests of one queue. The control protocol is Python's.
//!
//! One transport serves one queue. The bytes of a request are in the memory of the guest, also in the queue of the loop:
//! nothing copies them on their way to a file.
//!
//! Another engine, of this process or another, continues with a queue by the region of its requests in flight: it serves
//! again all that were taken and not answered. So the former engine must have ended all I/O of the queue.

mod call;
mod dirty_log;
mod disk;
mod queue;
mod vring;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use blkloom_io::{GuestMemory, SharedMemory};

pub use self::call::Call;
pub use self::dirty_log::DirtyLog;
pub use self::disk::Disk;
use self::queue::Queue;
pub use self::queue::{Detached, KIND};
use self::vring::Vring;
use crate::engine::{Engine, EngineError, TransportHandle};
use crate::notice::Recipient;

/// A queue of a virtio device, as the driver has set it up.
#[derive(Clone, Copy, Debug)]
pub struct QueueSettings {
    /// Number of descriptors.
    pub size: u16,
    /// User addresses of the three areas.
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
    /// Index in the available ring of the first chain to serve, if none is in flight.
    pub next: u16,
    /// VIRTIO_F_EVENT_IDX and VIRTIO_F_INDIRECT_DESC were negotiated.
    pub event_idx: bool,
    pub indirect: bool,
    /// Each write must be durable before it is answered: the driver does not flush.
    pub write_through: bool,
    /// Guest address by which stores to the used ring are marked in the log. None: they are not.
    pub used_log: Option<u64>,
}

/// Memory of a queue. inflight: the region of its requests in flight is there, at this offset. log: pages of the guest
/// that are written are marked there.
#[derive(Clone)]
pub struct QueueMemory {
    pub guest: Arc<GuestMemory>,
    pub inflight: (Arc<SharedMemory>, usize),
    pub log: Option<Arc<DirtyLog>>,
}

#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The driver or the other program has set the queue up in a way that cannot be served.
    #[error("{0}")]
    Settings(String),
    #[error("{0}")]
    Engine(#[from] EngineError),
}

/// Serves a queue. One that the driver has broken before ends at once, as one that it breaks later. kick: an eventfd, to which the driver writes when buffers are available; it is never read.
pub fn serve(
    engine: &Engine,
    disk: &Arc<Disk>,
    memory: QueueMemory,
    settings: QueueSettings,
    (kick, call): (OwnedFd, Arc<Call>),
    recipient: Recipient,
) -> Result<TransportHandle, ServeError> {
    let (vring, recovered) = Vring::new(memory, settings)?;
    let mut queue = Queue::new(disk.clone(), vring, settings.write_through, (kick, call), engine.budget().clone());
    if let Err(malformed) = recovered {
        queue.break_off(malformed);
    }
    Ok(engine.serve(&disk.export, Box::new(queue), recipient)?)
}
