//! Virtqueues and requests of a virtio block device as bytes: the device's side of VIRTIO 1.2, and the memory in which
//! vhost-user tracks requests in flight and written pages.
//!
//! Pure: no I/O, no unsafe. The driver is another program and hostile: it may change its memory at any time, and every
//! address, length and index in it may be wrong. So each value is copied out of its memory once and then checked
//! (`Memory`), chains have at most `split::MOST_PIECES` pieces, and whatever breaks a rule of the specification is an
//! error and never a panic.
//!
//! `split`: rings and chains of descriptors. `block`: requests. `inflight`: requests in flight, kept over the death of
//! the device's process. `dirty_log`: pages that were written, for a live migration.

#![forbid(unsafe_code)]

pub mod block;
pub mod dirty_log;
pub mod inflight;
pub mod split;

/// Memory of the driver.
pub trait Memory {
    /// Copies the bytes from `address` on. False: not all of them are memory of the driver.
    fn read(&self, address: u64, into: &mut [u8]) -> bool;
}
