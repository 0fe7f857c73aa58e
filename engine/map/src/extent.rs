//! `Extent`: where the bytes of a range are (file, memory, lower device, backend, zeros, ...). `Resolved`: one position
//! in it.

use std::sync::Arc;

use crate::table::ClusterTable;

/// The types of files, memory and devices in a map. The engine uses real ones, tests use numbers.
pub trait Handles {
    type File;
    type Region;
    type Device;
    type Backend;
    /// Several devices that get the same writes.
    type Tee;
    /// The rule of a filtered extent.
    type Filter;
    /// The error of an error extent.
    type Error: Copy + std::fmt::Debug;
    /// The error of an error entry in a cluster table.
    const ENTRY_ERROR: Self::Error;
}

/// Location of the bytes of a range. Byte i of the range is at `offset` + i.
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
    /// Reads as zeros. Writes fault, or are discarded.
    Zero {
        discard_writes: bool,
    },
    Error(H::Error),
    /// A fault: the target decides.
    Fault,
    Device {
        device: H::Device,
        offset: u64,
        /// Writes go to the device; false: they fault.
        writable: bool,
    },
    /// Chunk i of the range is chunk i / legs of leg i % legs. A leg is data, memory, zeros, an error, a device, a
    /// backend or a tee.
    Stripes {
        chunk: u64,
        legs: Box<[Extent<H>]>,
    },
    /// One leg of stripes, found in the striped range: chunk i is chunk i * stripes + stripe of `striped`.
    Unstriped {
        chunk: u64,
        stripe: u64,
        stripes: u64,
        /// As a leg of stripes.
        striped: Box<Extent<H>>,
    },
    Table(Arc<ClusterTable<H>>),
    /// Asynchronous storage that is neither a file nor memory. Writes fault if it is not writable.
    Backend {
        backend: H::Backend,
        offset: u64,
        writable: bool,
    },
    /// Writes go to all devices of the tee. Reads fault.
    Tee {
        tee: H::Tee,
        offset: u64,
    },
    /// A filter decides about each operation before it reaches the extent behind the filter.
    Filtered(Arc<Filtered<H>>),
}

/// The result of a lookup: the location of the bytes of an extent from one position on.
#[derive(Debug)]
pub enum Resolved<'a, H: Handles> {
    Data {
        file: &'a H::File,
        offset: u64,
        writable: bool,
        /// Discards and zero writes go to the file; false: they fault, because the format must update its metadata.
        punch: bool,
    },
    Memory {
        region: &'a H::Region,
        offset: u64,
    },
    Zero {
        discard_writes: bool,
    },
    Error(H::Error),
    Fault,
    Device {
        device: &'a H::Device,
        offset: u64,
        writable: bool,
    },
    Backend {
        backend: &'a H::Backend,
        offset: u64,
        writable: bool,
    },
    Tee {
        tee: &'a H::Tee,
        offset: u64,
    },
    /// `at`: offset in the filtered range.
    Filtered {
        filtered: &'a Filtered<H>,
        at: u64,
    },
}

/// A filter, and the extents behind it.
pub struct Filtered<H: Handles> {
    pub filter: H::Filter,
    /// The extent of reads, of all other operations, and of operations that the filter sends elsewhere. The same kinds
    /// are allowed as for legs of stripes; for the last one a fault, too.
    pub legs: [Extent<H>; 3],
}

impl<H: Handles> Filtered<H> {
    /// What is behind the filter, and the length of its contiguous run (`len` at most).
    pub fn behind(&self, at: u64, writes: bool, len: u64) -> (Resolved<'_, H>, u64) {
        self.legs[usize::from(writes)].at(at, len)
    }

    /// What is where the filter sends operations instead.
    pub fn elsewhere(&self, at: u64, len: u64) -> (Resolved<'_, H>, u64) {
        self.legs[2].at(at, len)
    }

    pub(crate) fn is_valid(&self) -> bool {
        let [reads, others, elsewhere] = &self.legs;
        reads.may_be_leg() && others.may_be_leg() && (elsewhere.may_be_leg() || matches!(elsewhere, Extent::Fault))
    }
}

impl<H: Handles> std::fmt::Debug for Filtered<H> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Filtered({:?})", self.legs)
    }
}

impl<H: Handles> Extent<H> {
    /// What is `at` bytes into this extent, and the length of its contiguous run (`len` at most).
    pub(crate) fn at(&self, at: u64, len: u64) -> (Resolved<'_, H>, u64) {
        match self {
            Extent::Data { file, offset, writable } => {
                (Resolved::Data { file, offset: offset + at, writable: *writable, punch: true }, len)
            }
            Extent::Memory { region, offset } => (Resolved::Memory { region, offset: offset + at }, len),
            Extent::Zero { discard_writes } => (Resolved::Zero { discard_writes: *discard_writes }, len),
            Extent::Error(error) => (Resolved::Error(*error), len),
            Extent::Fault => (Resolved::Fault, len),
            Extent::Device { device, offset, writable } => {
                (Resolved::Device { device, offset: offset + at, writable: *writable }, len)
            }
            Extent::Stripes { chunk, legs } => {
                let (index, within) = (at / chunk, at % chunk);
                let count = legs.len() as u64;
                let leg = &legs[(index % count) as usize];
                leg.at(index / count * chunk + within, len.min(chunk - within))
            }
            Extent::Unstriped { chunk, stripe, stripes, striped } => {
                let (index, within) = (at / chunk, at % chunk);
                striped.at((index * stripes + stripe) * chunk + within, len.min(chunk - within))
            }
            Extent::Table(table) => table.at(at, len),
            Extent::Backend { backend, offset, writable } => {
                (Resolved::Backend { backend, offset: offset + at, writable: *writable }, len)
            }
            Extent::Tee { tee, offset } => (Resolved::Tee { tee, offset: offset + at }, len),
            Extent::Filtered(filtered) => (Resolved::Filtered { filtered, at }, len),
        }
    }

    /// Whether the extent can be a leg of stripes or be behind a filter.
    pub(crate) fn may_be_leg(&self) -> bool {
        matches!(
            self,
            Extent::Data { .. }
                | Extent::Memory { .. }
                | Extent::Zero { .. }
                | Extent::Error(_)
                | Extent::Device { .. }
                | Extent::Backend { .. }
                | Extent::Tee { .. }
        )
    }

    /// The extents that this one consists of, or the extent itself.
    pub fn leaves(&self) -> &[Extent<H>] {
        match self {
            Extent::Stripes { legs, .. } => legs,
            Extent::Filtered(filtered) => &filtered.legs,
            Extent::Unstriped { striped, .. } => std::slice::from_ref(striped),
            other => std::slice::from_ref(other),
        }
    }
}

impl<H: Handles> Clone for Extent<H>
where
    H::File: Clone,
    H::Region: Clone,
    H::Device: Clone,
    H::Backend: Clone,
    H::Tee: Clone,
{
    fn clone(&self) -> Self {
        match self {
            Extent::Data { file, offset, writable } => {
                Extent::Data { file: file.clone(), offset: *offset, writable: *writable }
            }
            Extent::Memory { region, offset } => Extent::Memory { region: region.clone(), offset: *offset },
            Extent::Zero { discard_writes } => Extent::Zero { discard_writes: *discard_writes },
            Extent::Error(error) => Extent::Error(*error),
            Extent::Fault => Extent::Fault,
            Extent::Device { device, offset, writable } => {
                Extent::Device { device: device.clone(), offset: *offset, writable: *writable }
            }
            Extent::Stripes { chunk, legs } => Extent::Stripes { chunk: *chunk, legs: legs.clone() },
            Extent::Unstriped { chunk, stripe, stripes, striped } => {
                Extent::Unstriped { chunk: *chunk, stripe: *stripe, stripes: *stripes, striped: striped.clone() }
            }
            Extent::Table(table) => Extent::Table(table.clone()),
            Extent::Backend { backend, offset, writable } => {
                Extent::Backend { backend: backend.clone(), offset: *offset, writable: *writable }
            }
            Extent::Tee { tee, offset } => Extent::Tee { tee: tee.clone(), offset: *offset },
            Extent::Filtered(filtered) => Extent::Filtered(filtered.clone()),
        }
    }
}

impl<H: Handles> std::fmt::Debug for Extent<H> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Extent::Data { offset, writable, .. } => write!(f, "Data({offset}, writable {writable})"),
            Extent::Memory { offset, .. } => write!(f, "Memory({offset})"),
            Extent::Zero { discard_writes } => write!(f, "Zero(discard_writes {discard_writes})"),
            Extent::Error(error) => write!(f, "Error({error:?})"),
            Extent::Fault => write!(f, "Fault"),
            Extent::Device { offset, .. } => write!(f, "Device({offset})"),
            Extent::Stripes { chunk, legs } => write!(f, "Stripes({chunk}, {legs:?})"),
            Extent::Unstriped { chunk, stripe, stripes, striped } => {
                write!(f, "Unstriped({chunk}, {stripe} of {stripes}, {striped:?})")
            }
            Extent::Table(table) => write!(f, "Table({} bytes)", table.size()),
            Extent::Backend { offset, .. } => write!(f, "Backend({offset})"),
            Extent::Tee { offset, .. } => write!(f, "Tee({offset})"),
            Extent::Filtered(filtered) => filtered.fmt(f),
        }
    }
}
