//! Extent kinds: what the engine does for a range.

use std::sync::Arc;

use crate::table::ClusterTable;

/// What stands behind an extent. The engine names real files, memory and devices; tests name numbers.
pub trait Handles {
    type File;
    type Region;
    type Device;
}

/// Where the bytes of a range are. Offsets in it grow with the range.
pub enum Extent<H: Handles> {
    Data {
        file: H::File,
        offset: u64,
        writable: bool,
    },
    Memory {
        region: H::Region,
        offset: u64,
    },
    /// Reads as zeros; writes fault, or vanish.
    Zero {
        discard_writes: bool,
    },
    Error(i32),
    Fault,
    Device {
        device: H::Device,
        offset: u64,
        /// Whether writes may enter it; otherwise they fault.
        writable: bool,
    },
    /// Chunk i is chunk i / legs of leg i % legs. Legs are never stripes or tables.
    Stripes {
        chunk: u64,
        legs: Box<[Extent<H>]>,
    },
    Table(Arc<ClusterTable<H>>),
}

/// What a lookup answers: an extent's kind, at one position.
#[derive(Debug)]
pub enum Place<'a, H: Handles> {
    Data {
        file: &'a H::File,
        offset: u64,
        writable: bool,
        /// Discards and zero writes go to the file; false: they fault (the format keeps accounts).
        punch: bool,
    },
    Memory {
        region: &'a H::Region,
        offset: u64,
    },
    Zero {
        discard_writes: bool,
    },
    Error(i32),
    Fault,
    Device {
        device: &'a H::Device,
        offset: u64,
        writable: bool,
    },
}

impl<H: Handles> Extent<H> {
    /// The place `at` bytes into this extent and how far it goes on unbroken (`len` at most).
    pub(crate) fn at(&self, at: u64, len: u64) -> (Place<'_, H>, u64) {
        match self {
            Extent::Data { file, offset, writable } => {
                (Place::Data { file, offset: offset + at, writable: *writable, punch: true }, len)
            }
            Extent::Memory { region, offset } => (Place::Memory { region, offset: offset + at }, len),
            Extent::Zero { discard_writes } => (Place::Zero { discard_writes: *discard_writes }, len),
            Extent::Error(errno) => (Place::Error(*errno), len),
            Extent::Fault => (Place::Fault, len),
            Extent::Device { device, offset, writable } => {
                (Place::Device { device, offset: offset + at, writable: *writable }, len)
            }
            Extent::Stripes { chunk, legs } => {
                let (index, within) = (at / chunk, at % chunk);
                let count = legs.len() as u64;
                let leg = &legs[(index % count) as usize];
                leg.at(index / count * chunk + within, len.min(chunk - within))
            }
            Extent::Table(table) => table.at(at, len),
        }
    }

    /// Every leaf below: stripes' legs, or the extent itself.
    pub fn leaves(&self) -> &[Extent<H>] {
        match self {
            Extent::Stripes { legs, .. } => legs,
            other => std::slice::from_ref(other),
        }
    }
}

impl<H: Handles> Clone for Extent<H>
where
    H::File: Clone,
    H::Region: Clone,
    H::Device: Clone,
{
    fn clone(&self) -> Self {
        match self {
            Extent::Data { file, offset, writable } => {
                Extent::Data { file: file.clone(), offset: *offset, writable: *writable }
            }
            Extent::Memory { region, offset } => Extent::Memory { region: region.clone(), offset: *offset },
            Extent::Zero { discard_writes } => Extent::Zero { discard_writes: *discard_writes },
            Extent::Error(errno) => Extent::Error(*errno),
            Extent::Fault => Extent::Fault,
            Extent::Device { device, offset, writable } => {
                Extent::Device { device: device.clone(), offset: *offset, writable: *writable }
            }
            Extent::Stripes { chunk, legs } => Extent::Stripes { chunk: *chunk, legs: legs.clone() },
            Extent::Table(table) => Extent::Table(table.clone()),
        }
    }
}

impl<H: Handles> std::fmt::Debug for Extent<H> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Extent::Data { offset, writable, .. } => write!(f, "Data({offset}, writable {writable})"),
            Extent::Memory { offset, .. } => write!(f, "Memory({offset})"),
            Extent::Zero { discard_writes } => write!(f, "Zero(discard_writes {discard_writes})"),
            Extent::Error(errno) => write!(f, "Error({errno})"),
            Extent::Fault => write!(f, "Fault"),
            Extent::Device { offset, .. } => write!(f, "Device({offset})"),
            Extent::Stripes { chunk, legs } => write!(f, "Stripes({chunk}, {legs:?})"),
            Extent::Table(table) => write!(f, "Table({} bytes)", table.size()),
        }
    }
}
