//! `Disk`: state of a virtio block device that all of its queues share.

use std::sync::Arc;

use blkloom_virtio_wire::block::ID_SIZE;

use crate::device::Export;

pub struct Disk {
    pub export: Arc<Export>,
    /// Answer to a request for the serial, filled up with zeros.
    pub(super) serial: [u8; ID_SIZE],
}

impl Disk {
    /// serial: its first 20 bytes are used.
    pub fn new(export: Arc<Export>, serial: &[u8]) -> Arc<Disk> {
        let mut padded = [0; ID_SIZE];
        padded.iter_mut().zip(serial).for_each(|(to, from)| *to = *from);
        Arc::new(Disk { export, serial: padded })
    }
}
