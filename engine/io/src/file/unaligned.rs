//! Unaligned direct I/O: reads, modifies and writes whole blocks, in memory of the caller (`Scratch`). Part of `file`.

use rustix::fs;
use rustix::io::{Errno, ReadWriteFlags};

use super::File;
use crate::buffer::Buffer;
use crate::memory::{Slice, Source};
use crate::range_lock::RangeGuard;

/// Bytes that are moved at once. A power of two, and no smaller than any block.
const SIZE: usize = 128 << 10;

/// Memory for the blocks of unaligned direct I/O. `default` allocates it when it is first needed.
#[derive(Default)]
pub struct Scratch(Option<Buffer>);

/// The part of a range that is moved at once.
struct Part<'m> {
    /// Offset of the first block.
    start: u64,
    /// Memory for all blocks.
    blocks: Slice<'m>,
    /// The part in `blocks`.
    bytes: Slice<'m>,
    skip: usize,
}

impl Scratch {
    /// Allocates the memory now: see `Buffer::present`.
    pub fn present() -> Result<Scratch, Errno> {
        Buffer::present(SIZE).map(|buffer| Scratch(Some(buffer)))
    }

    /// The next part of `len` bytes from `offset` on.
    fn part(&mut self, offset: u64, len: usize, block: u64) -> Part<'_> {
        let memory = self.0.get_or_insert_with(|| Buffer::new(SIZE)).slice();
        let start = offset / block * block;
        let skip = (offset - start) as usize;
        let len = len.min(memory.len() - skip);
        let blocks = memory.part(0, (skip + len).next_multiple_of(block as usize));
        Part { start, blocks, bytes: blocks.part(skip, len), skip }
    }
}

impl File {
    /// Reads bytes that are not aligned.
    pub(super) fn read_in_blocks(&self, offset: u64, into: Slice<'_>, scratch: &mut Scratch) -> Result<(), Errno> {
        let mut done = 0;
        while done < into.len() {
            let Part { start, blocks, bytes, skip } =
                scratch.part(offset + done as u64, into.len() - done, self.offset_alignment);
            self.read_at_least(start, blocks, skip + bytes.len())?;
            into.part(done, bytes.len()).copy_from(bytes.source());
            done += bytes.len();
        }
        Ok(())
    }

    /// Writes bytes that are not aligned.
    pub(super) fn write_in_blocks(
        &self,
        offset: u64,
        from: Source<'_>,
        flags: ReadWriteFlags,
        scratch: &mut Scratch,
    ) -> Result<(), Errno> {
        let _alone = self.alone(self.hull(offset, from.len() as u64))?;
        let mut done = 0;
        while done < from.len() {
            let part = scratch.part(offset + done as u64, from.len() - done, self.offset_alignment);
            self.read_edges(&part)?;
            part.bytes.copy_from(from.part(done, part.bytes.len()));
            self.write_part(&part, flags)?;
            done += part.bytes.len();
        }
        Ok(())
    }

    /// Writes zeros from `start` to `end`, which are in one block. The caller has locked it exclusively.
    pub(super) fn zero_in_blocks(&self, start: u64, end: u64, scratch: &mut Scratch) -> Result<(), Errno> {
        if start == end {
            return Ok(());
        }
        let part = scratch.part(start, (end - start) as usize, self.offset_alignment);
        self.read_edges(&part)?;
        part.bytes.zero();
        self.write_part(&part, ReadWriteFlags::empty())
    }

    /// Reads the blocks that keep old bytes: the first and the last. Past the end of the file there are zeros.
    fn read_edges(&self, Part { start, blocks, bytes, skip }: &Part<'_>) -> Result<(), Errno> {
        let block = self.offset_alignment as usize;
        let read = |at: usize| {
            let memory = blocks.part(at, block);
            memory.zero();
            self.read_at_least(start + at as u64, memory, 0)
        };
        let last = blocks.len() - block;
        let whole_end = skip + bytes.len() == blocks.len();
        if *skip > 0 || last == 0 && !whole_end {
            read(0)?;
        }
        if last > 0 && !whole_end { read(last) } else { Ok(()) }
    }

    fn write_part(&self, Part { start, blocks, bytes, skip }: &Part<'_>, flags: ReadWriteFlags) -> Result<(), Errno> {
        let end = start + (skip + bytes.len()) as u64;
        self.write_hull((*start, start + blocks.len() as u64), end, blocks.source(), flags)
    }

    /// Writes whole blocks. Only the bytes before `end` are new: a file that ends inside the last block is truncated to
    /// `end`, or to its size before if that is larger.
    fn write_hull(&self, hull: (u64, u64), end: u64, memory: Source<'_>, flags: ReadWriteFlags) -> Result<(), Errno> {
        let size = if self.block_device { u64::MAX } else { self.size()?.max(end) };
        self.write_whole(hull.0, memory, flags)?;
        if size < hull.1 {
            return fs::ftruncate(&self.fd, size);
        }
        Ok(())
    }

    /// Locks blocks exclusively. If the file ends inside them, also locks everything after them: `write_hull` truncates
    /// the file there, and must not remove bytes that others append meanwhile.
    pub(super) fn alone(&self, hull: (u64, u64)) -> Result<RangeGuard, Errno> {
        let guard = self.blocks.lock(hull.0, hull.1, true);
        if self.block_device || self.size()? >= hull.1 {
            return Ok(guard);
        }
        drop(guard);
        Ok(self.blocks.lock(hull.0, u64::MAX, true))
    }

    pub(super) fn hull(&self, offset: u64, len: u64) -> (u64, u64) {
        let block = self.offset_alignment;
        (offset / block * block, (offset + len).div_ceil(block) * block)
    }
}
