//! `Map`: contiguous segments from offset 0, found by bisection or from the position of the last lookup.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::extent::{Extent, Handles, Resolved};

/// A range of a device with one extent. start, end: bytes.
pub struct Segment<H: Handles> {
    pub start: u64,
    pub end: u64,
    /// The target's number, which its faults contain.
    pub owner: u32,
    pub extent: Extent<H>,
}

/// The result of a lookup.
pub struct Piece<'a, H: Handles> {
    pub owner: u32,
    /// Length of the contiguous run: at least 1 byte, at most the length asked for.
    pub len: u64,
    pub resolved: Resolved<'a, H>,
}

/// The segment of the last lookup, where a sequential access continues. It is only a hint: threads may share it, it may
/// come from another map, and the result of a lookup is the same.
#[derive(Default, Debug)]
#[repr(align(128))]
pub struct Hint(AtomicUsize);

/// An immutable map of a device.
pub struct Map<H: Handles> {
    /// Copies of `segments[i].start`, so that bisection reads few cache lines.
    starts: Box<[u64]>,
    segments: Box<[Segment<H>]>,
    flush_owners: Box<[u32]>,
    size: u64,
}

#[derive(Debug, PartialEq, Eq)]
pub enum MapError {
    Gap { at: u64, start: u64 },
    Length { start: u64, length: u64 },
    TableTooShort { start: u64, length: u64, table: u64 },
    Stripes { start: u64, why: &'static str },
    Filtered { start: u64 },
}

impl std::fmt::Display for MapError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            MapError::Gap { at, start } => write!(f, "segments must be contiguous: expected one at {at}, got {start}"),
            MapError::Length { start, length } => {
                write!(f, "segment at {start}: length {length} is zero or reaches 2^63 bytes")
            }
            MapError::TableTooShort { start, length, table } => {
                write!(f, "segment at {start}: {length} bytes over a cluster table of {table} bytes")
            }
            MapError::Stripes { start, why } => write!(f, "segment at {start}: {why}"),
            MapError::Filtered { start } => {
                write!(
                    f,
                    "segment at {start}: only data, memory, zero, error, a device, a backend or a tee can be behind a filter"
                )
            }
        }
    }
}

impl std::error::Error for MapError {}

impl<H: Handles> Map<H> {
    pub fn new(segments: Vec<Segment<H>>, flush_owners: Vec<u32>) -> Result<Self, MapError> {
        let mut at = 0;
        for segment in &segments {
            let start = segment.start;
            if start != at {
                return Err(MapError::Gap { at, start });
            }
            if segment.end <= start || segment.end >= 1 << 63 {
                return Err(MapError::Length { start, length: segment.end.wrapping_sub(start) });
            }
            match &segment.extent {
                Extent::Table(table) if table.size() < segment.end - start => {
                    return Err(MapError::TableTooShort { start, length: segment.end - start, table: table.size() });
                }
                Extent::Stripes { chunk, legs } => {
                    if *chunk == 0 || legs.is_empty() {
                        return Err(MapError::Stripes { start, why: "stripes need a chunk size and legs" });
                    }
                    if legs.iter().any(|leg| !leg.may_be_leg()) {
                        return Err(MapError::Stripes {
                            start,
                            why: "a leg must be data, memory, zero, error, a device, a backend or a tee",
                        });
                    }
                }
                Extent::Unstriped { chunk, stripe, stripes, striped } => {
                    if *chunk == 0 || stripe >= stripes {
                        return Err(MapError::Stripes {
                            start,
                            why: "a stripe needs a chunk size and a number below theirs",
                        });
                    }
                    if !striped.may_be_leg() {
                        return Err(MapError::Stripes {
                            start,
                            why: "the striped range must be data, memory, zero, error, a device, a backend or a tee",
                        });
                    }
                }
                Extent::Filtered(filtered) if !filtered.is_valid() => {
                    return Err(MapError::Filtered { start });
                }
                _ => {}
            }
            at = segment.end;
        }
        Ok(Map {
            starts: segments.iter().map(|segment| segment.start).collect(),
            segments: segments.into(),
            flush_owners: flush_owners.into(),
            size: at,
        })
    }

    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn segments(&self) -> &[Segment<H>] {
        &self.segments
    }

    pub fn flush_owners(&self) -> &[u32] {
        &self.flush_owners
    }

    /// Looks up `offset`, for at most `len` (> 0) bytes. None past the end.
    pub fn lookup(&self, offset: u64, len: u64) -> Option<Piece<'_, H>> {
        (offset < self.size && len > 0).then(|| self.piece(self.bisect(offset), offset, len))
    }

    /// Like `lookup`, but first tries the segment of the hint and the one after it.
    pub fn lookup_near(&self, hint: &Hint, offset: u64, len: u64) -> Option<Piece<'_, H>> {
        if offset >= self.size || len == 0 {
            return None;
        }
        let last = hint.0.load(Ordering::Relaxed);
        // One comparison, because the CPU would mispredict two for random offsets.
        let within = |start: u64, end: u64| offset.wrapping_sub(start) < end.wrapping_sub(start);
        let index = match self.segments.get(last) {
            Some(segment) if within(segment.start, segment.end) => last,
            Some(segment) if within(segment.end, self.starts.get(last + 2).copied().unwrap_or(self.size)) => last + 1,
            _ => self.bisect(offset),
        };
        if index != last {
            hint.0.store(index, Ordering::Relaxed);
        }
        Some(self.piece(index, offset, len))
    }

    /// The owner of the segment at `offset`, and the number of bytes up to the segment's end (`len` (> 0) at most). The
    /// segment's extent is ignored. None past the end.
    pub fn owner(&self, offset: u64, len: u64) -> Option<(u32, u64)> {
        (offset < self.size && len > 0).then(|| {
            let segment = &self.segments[self.bisect(offset)];
            (segment.owner, len.min(segment.end - offset))
        })
    }

    /// The index of the segment at `offset`, which must not be past the end.
    fn bisect(&self, offset: u64) -> usize {
        if self.starts.len() == 1 { 0 } else { self.starts.partition_point(|&start| start <= offset) - 1 }
    }

    fn piece(&self, index: usize, offset: u64, len: u64) -> Piece<'_, H> {
        let segment = &self.segments[index];
        let (resolved, len) = segment.extent.at(offset - segment.start, len.min(segment.end - offset));
        Piece { owner: segment.owner, len, resolved }
    }
}
