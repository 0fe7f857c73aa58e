//! Where the bytes of a device are: immutable lists of segments, stripes and cluster tables.
//!
//! Pure: no I/O, no unsafe, no locks on the read side. A `Map` never changes once built; a
//! `ClusterTable` inside it may, entry by entry, atomically. Any number of threads look up while
//! one installs. Nothing here blocks or fails except constructors, which check what they are given.
#![forbid(unsafe_code)]

mod extent;
mod segments;
mod table;

pub use extent::{Extent, Handles, Place};
pub use segments::{Hint, Map, MapError, Piece, Segment};
pub use table::{ClusterTable, Entry, TableError};
