//! Maps: immutable lists of segments, stripes and cluster tables that give the location of the bytes of a device.
//!
//! No I/O, no unsafe code, no locks for readers. A `Map` never changes. A `ClusterTable` in it may change, atomically
//! entry by entry: any number of threads look up while one installs entries. Nothing here blocks. Only functions that
//! check their arguments can fail.
#![forbid(unsafe_code)]

mod extent;
mod segments;
mod table;

pub use extent::{Extent, Filtered, Handles, Resolved};
pub use segments::{Hint, Map, MapError, Piece, Segment};
pub use table::{ClusterTable, Entry, TableError};
