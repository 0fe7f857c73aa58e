//! The map itself: contiguous segments from 0, found by bisection.

use crate::extent::{Extent, Handles, Place};

pub struct Segment<H: Handles> {
    pub start: u64,
    pub end: u64,
    /// The target's number; faults carry it.
    pub owner: u32,
    pub extent: Extent<H>,
}

/// One answer of a lookup.
pub struct Piece<'a, H: Handles> {
    pub owner: u32,
    /// How many bytes the place holds for; at least 1, at most what was asked.
    pub len: u64,
    pub place: Place<'a, H>,
}

pub struct Map<H: Handles> {
    /// `segments[i].start`, alone, so that bisection touches few cache lines.
    starts: Box<[u64]>,
    segments: Box<[Segment<H>]>,
    flush_owners: Box<[u32]>,
    size: u64,
}

#[derive(Debug, PartialEq, Eq)]
pub enum MapError {
    Empty,
    Gap { at: u64, start: u64 },
    Length { start: u64, length: u64 },
    TableTooShort { start: u64, length: u64, table: u64 },
    Stripes { start: u64, why: &'static str },
}

impl std::fmt::Display for MapError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            MapError::Empty => write!(f, "a map needs at least one segment"),
            MapError::Gap { at, start } => write!(f, "segments must be contiguous: expected one at {at}, got {start}"),
            MapError::Length { start, length } => {
                write!(f, "segment at {start}: length {length} is zero or reaches 2^63 bytes")
            }
            MapError::TableTooShort { start, length, table } => {
                write!(f, "segment at {start}: {length} bytes over a cluster table of {table} bytes")
            }
            MapError::Stripes { start, why } => write!(f, "segment at {start}: {why}"),
        }
    }
}

impl std::error::Error for MapError {}

impl<H: Handles> Map<H> {
    pub fn new(segments: Vec<Segment<H>>, flush_owners: Vec<u32>) -> Result<Self, MapError> {
        if segments.is_empty() {
            return Err(MapError::Empty);
        }
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
                    if legs.iter().any(|leg| matches!(leg, Extent::Stripes { .. } | Extent::Table(_) | Extent::Fault)) {
                        return Err(MapError::Stripes {
                            start,
                            why: "a leg must be data, memory, zero, error or a device",
                        });
                    }
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

    /// What is at `offset`, for `len` (> 0) bytes at most. None past the end.
    pub fn lookup(&self, offset: u64, len: u64) -> Option<Piece<'_, H>> {
        if offset >= self.size || len == 0 {
            return None;
        }
        let index = if self.starts.len() == 1 { 0 } else { self.starts.partition_point(|&start| start <= offset) - 1 };
        let segment = &self.segments[index];
        let (place, len) = segment.extent.at(offset - segment.start, len.min(segment.end - offset));
        Some(Piece { owner: segment.owner, len, place })
    }
}
