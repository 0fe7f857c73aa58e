//! ublk transport: serves a device as the kernel's block device /dev/ublkbN.
//!
//! `node`: state of the block device that its queues share. `queue`: serves the requests of one of the driver's queues
//! on a ring of its own. `control`: commands to /dev/ublk-control. `unprivileged`: keeps the driver from reading a partition
//! table.
//!
//! One transport serves one queue, and the thread of its loop sends all commands of that queue. The kernel copies the
//! data of a request between its own pages and the buffer of the request's tag, which is the memory of the request in the
//! engine, also in the queue of the loop.
//!
//! The driver gives requests again to the next server that a server has not answered, once the process of the former has
//! ended. So a server that is to be replaced leaves requests unanswered (`Node::leave_unanswered`). Otherwise every request
//! is answered: one that is not holds up the removal of the block device until the process ends.

mod control;
mod node;
mod queue;
mod unprivileged;

use std::os::fd::BorrowedFd;
use std::sync::Arc;

pub use self::control::{ControlError, control};
pub use self::node::Node;
pub use self::queue::KIND;
use self::queue::Queue;
use crate::engine::{Engine, EngineError, TransportHandle};
use crate::notice::Recipient;

/// Which of the driver's queues to serve. depth: its number of tags. payload: most bytes of a read or write. privileged:
/// the driver may read the partition table when it starts the block device (`unprivileged`).
#[derive(Clone, Copy, Debug)]
pub struct QueueSettings {
    pub number: u16,
    pub depth: u16,
    pub payload: usize,
    pub privileged: bool,
}

/// Serves a queue of /dev/ublkcN, which `device` is. The queue keeps the device open until it has ended. The block device
/// appears when all queues are served and the driver is told to start it.
pub fn serve(
    engine: &Engine,
    node: &Arc<Node>,
    device: BorrowedFd<'_>,
    settings: QueueSettings,
    recipient: Recipient,
) -> Result<TransportHandle, EngineError> {
    let queue = Queue::new(node.clone(), device, settings, engine.budget().clone());
    let queue = queue.map_err(|error| EngineError::Os("a queue of ublk", error))?;
    engine.serve(&node.export, Box::new(queue), recipient)
}
