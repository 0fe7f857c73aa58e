//! `Node`: state of a ublk block device that all of its queues share. Any thread may use it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::device::Export;

pub struct Node {
    pub export: Arc<Export>,
    leaves: AtomicBool,
}

impl Node {
    pub fn new(export: Arc<Export>) -> Arc<Node> {
        Arc::new(Node { export, leaves: AtomicBool::new(false) })
    }

    /// Whether requests that cannot be served here are left for the next server, when the queues or the device are
    /// closed. Otherwise they fail.
    pub fn leave_unanswered(&self, leaves: bool) {
        self.leaves.store(leaves, Ordering::SeqCst);
    }

    pub(super) fn leaves(&self) -> bool {
        self.leaves.load(Ordering::SeqCst)
    }
}
