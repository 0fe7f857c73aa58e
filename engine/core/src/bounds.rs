//! Bounds check of a map: every segment lies inside its region, and no offset reaches 2^63.
//!
//! The check runs once, when a `Mapping` is created. Requests rely on it and check nothing more.

use blkloom_map::{Extent, Segment};

use crate::device::Kinds;

/// Offsets in files and devices are below this.
const LARGEST_OFFSET: u64 = 1 << 63;

/// A segment reaches past the end of its region, or past the largest offset.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum OutOfBounds {
    #[error("segment at {start}: {len} bytes at {offset} of a region of {size}")]
    Region { start: u64, len: u64, offset: u64, size: u64 },
    #[error("segment at {start}: {len} bytes at {offset} pass 2^63")]
    Offset { start: u64, len: u64, offset: u64 },
}

pub(crate) fn check(segment: &Segment<Kinds>) -> Result<(), OutOfBounds> {
    check_extent(&segment.extent, segment.start, segment.end - segment.start)
}

/// Checks `len` bytes of an extent that belongs to the segment at `start`.
fn check_extent(extent: &Extent<Kinds>, start: u64, len: u64) -> Result<(), OutOfBounds> {
    match extent {
        Extent::Memory { region, offset } => match offset.checked_add(len) {
            Some(end) if end <= region.size() => Ok(()),
            _ => Err(OutOfBounds::Region { start, len, offset: *offset, size: region.size() }),
        },
        Extent::Tee { tee, offset } => match offset.checked_add(len) {
            Some(end) if end <= tee.size() => Ok(()),
            _ => Err(OutOfBounds::Region { start, len, offset: *offset, size: tee.size() }),
        },
        // A striped segment spreads its length over its legs. A leg is checked for its share, rounded up to a chunk.
        Extent::Stripes { chunk, legs } if *chunk > 0 && !legs.is_empty() => {
            let share = len.div_ceil(*chunk).div_ceil(legs.len() as u64).saturating_mul(*chunk);
            legs.iter().try_for_each(|leg| check_extent(leg, start, share))
        }
        Extent::Data { offset, .. } | Extent::Device { offset, .. } | Extent::Backend { offset, .. } => {
            match offset.checked_add(len) {
                Some(end) if end < LARGEST_OFFSET => Ok(()),
                _ => Err(OutOfBounds::Offset { start, len, offset: *offset }),
            }
        }
        // The last chunk of the segment is the farthest one in the striped range.
        Extent::Unstriped { chunk, stripe, stripes, striped } if *chunk > 0 && stripe < stripes => {
            let last = len.div_ceil(*chunk).saturating_sub(1).saturating_mul(*stripes).saturating_add(*stripe);
            check_extent(striped, start, last.saturating_add(1).saturating_mul(*chunk))
        }
        Extent::Filtered(filtered) => filtered.legs.iter().try_for_each(|leg| check_extent(leg, start, len)),
        // A table's entries are checked when they are installed.
        Extent::Stripes { .. }
        | Extent::Unstriped { .. }
        | Extent::Table(_)
        | Extent::Zero { .. }
        | Extent::Error(_)
        | Extent::Fault => Ok(()),
    }
}
