//! `DirtyLog`: memory of the other program in which this side marks the pages of the guest that it has written. The other
//! program takes the marks and copies the pages to another machine.
//!
//! A page is marked after the store, and before the guest learns of it: a mark that is taken before the store would be
//! lost. The log is hostile memory: its contents are never used here.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use blkloom_io::SharedMemory;
use blkloom_virtio_wire::dirty_log;

use super::call::Call;

pub struct DirtyLog {
    memory: Arc<SharedMemory>,
    event: Call,
}

impl DirtyLog {
    pub fn new(memory: Arc<SharedMemory>) -> DirtyLog {
        DirtyLog { memory, event: Call::default() }
    }

    /// The eventfd that tells the other program of changes. None: it looks by itself.
    pub fn set_event(&self, event: Option<OwnedFd>) -> std::io::Result<()> {
        self.event.replace(event)
    }

    fn length(&self) -> u64 {
        self.memory.slice().len() as u64
    }

    /// Whether it has all addresses below `end`.
    pub(super) fn covers(&self, end: u64) -> bool {
        dirty_log::length(end) <= self.length()
    }

    pub(super) fn mark(&self, address: u64, bytes: u64) {
        for (at, bits) in dirty_log::marks(address, bytes, self.length()) {
            self.memory.slice().set_bits(at as usize, bits);
        }
    }

    pub(super) fn tell(&self) {
        self.event.raise();
    }
}
