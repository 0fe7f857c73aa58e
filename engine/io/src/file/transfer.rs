//! Reads, writes and syncs of a file: without waiting, and blocking. Part of `file`.

use std::io::{IoSlice, IoSliceMut};
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::fdatasync;
use rustix::io::{Errno, ReadWriteFlags, preadv2, pwritev2};

use super::unaligned::Scratch;
use super::{File, Inline, InlinePolicy};
use crate::durability::Syncing;
use crate::memory::{Slice, Source};

impl File {
    pub fn read_now(&self, offset: u64, into: Slice<'_>) -> Inline {
        let flags = match self.policy {
            InlinePolicy::Always => ReadWriteFlags::empty(),
            InlinePolicy::Nowait if self.nowait_read.load(Ordering::Relaxed) => ReadWriteFlags::NOWAIT,
            _ => return Inline::Wait(0),
        };
        let mut done = 0;
        while done < into.len() {
            match self.read_once(offset + done as u64, into.part(done, into.len() - done), flags) {
                Ok(0) => return Inline::Failed(Errno::IO),
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(error) => return self.would_wait(error, &self.nowait_read, done),
            }
        }
        Inline::Done
    }

    pub fn write_now(&self, offset: u64, from: Source<'_>) -> Inline {
        let flags = match self.policy {
            InlinePolicy::Always => ReadWriteFlags::empty(),
            InlinePolicy::Nowait if self.nowait_write.load(Ordering::Relaxed) => ReadWriteFlags::NOWAIT,
            _ => return Inline::Wait(0),
        };
        let mut done = 0;
        while done < from.len() {
            match self.write_once(offset + done as u64, from.part(done, from.len() - done), flags) {
                Ok(0) => return Inline::Failed(Errno::IO),
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(error) => return self.would_wait(error, &self.nowait_write, done),
            }
        }
        Inline::Done
    }

    fn would_wait(&self, error: Errno, nowait: &AtomicBool, done: usize) -> Inline {
        match error {
            Errno::AGAIN => Inline::Wait(done),
            Errno::OPNOTSUPP if self.policy == InlinePolicy::Nowait => {
                nowait.store(false, Ordering::Relaxed);
                Inline::Wait(done)
            }
            errno => Inline::Failed(errno),
        }
    }

    /// Reads all of `into`, with any alignment. Blocks.
    pub fn read(&self, offset: u64, into: Slice<'_>, scratch: &mut Scratch) -> Result<(), Errno> {
        if self.fits(offset, into.source()) {
            return self.read_at_least(offset, into, into.len());
        }
        self.read_in_blocks(offset, into, scratch)
    }

    /// Writes all of `from`, with any alignment. durable: as if followed by fdatasync. Blocks.
    pub fn write(&self, offset: u64, from: Source<'_>, durable: bool, scratch: &mut Scratch) -> Result<(), Errno> {
        if !durable {
            return self.write_with(offset, from, ReadWriteFlags::empty(), scratch);
        }
        if let Some(errno) = self.sync_error() {
            return Err(errno);
        }
        let syncing = Syncing::new(self);
        if let Err(errno) = self.write_with(offset, from, ReadWriteFlags::DSYNC, scratch) {
            self.examine(offset, from, errno, syncing, scratch);
            return Err(errno);
        }
        self.sync_error().map_or(Ok(()), Err)
    }

    /// Finds out whether the write or the sync of a failed durable write has failed, by writing again without a sync.
    /// If that succeeds, the sync has failed.
    pub fn examine<F: Deref<Target = File>>(
        &self,
        offset: u64,
        from: Source<'_>,
        errno: Errno,
        _syncing: Syncing<F>,
        scratch: &mut Scratch,
    ) {
        match self.write_with(offset, from, ReadWriteFlags::empty(), scratch) {
            // A direct write goes to the device, so its own errors are no sync errors. A cached write can fail only
            // for lack of space and for limits: any other error came from the sync, and other dirty pages may be lost.
            Err(again) if self.direct || again == errno && errno != Errno::IO => {}
            _ => self.fail_syncs(errno),
        }
    }

    fn write_with(
        &self,
        offset: u64,
        from: Source<'_>,
        flags: ReadWriteFlags,
        scratch: &mut Scratch,
    ) -> Result<(), Errno> {
        if self.fits(offset, from) {
            let _shared = self.direct.then(|| self.blocks.lock(offset, offset + from.len() as u64, false));
            return self.write_whole(offset, from, flags);
        }
        self.write_in_blocks(offset, from, flags, scratch)
    }

    /// Reads up to `into.len()` bytes; an end of file before `least` is EIO.
    pub(super) fn read_at_least(&self, offset: u64, into: Slice<'_>, least: usize) -> Result<(), Errno> {
        let mut done = 0;
        while done < into.len() {
            match self.read_once(offset + done as u64, into.part(done, into.len() - done), ReadWriteFlags::empty()) {
                Ok(0) if done >= least => break,
                Ok(0) => return Err(Errno::IO),
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
            // A direct read stops inside a block only at the end of the file. The next read would be unaligned.
            if self.direct && !(done as u64).is_multiple_of(self.offset_alignment) {
                return if done >= least { Ok(()) } else { Err(Errno::IO) };
            }
        }
        Ok(())
    }

    pub(super) fn write_whole(&self, offset: u64, from: Source<'_>, flags: ReadWriteFlags) -> Result<(), Errno> {
        let mut done = 0;
        while done < from.len() {
            match self.write_once(offset + done as u64, from.part(done, from.len() - done), flags) {
                Ok(0) => return Err(Errno::IO),
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn read_once(&self, offset: u64, into: Slice<'_>, flags: ReadWriteFlags) -> Result<usize, Errno> {
        // SAFETY: mapped and writable while the slice is used. The borrow lasts for one system call, during which only
        // the kernel accesses the bytes through it.
        let bytes = unsafe { std::slice::from_raw_parts_mut(into.as_ptr(), into.len()) };
        preadv2(&self.fd, &mut [IoSliceMut::new(bytes)], offset, flags)
    }

    fn write_once(&self, offset: u64, from: Source<'_>, flags: ReadWriteFlags) -> Result<usize, Errno> {
        // SAFETY: mapped while the source is used. The borrow lasts for one system call, which copies.
        let bytes = unsafe { std::slice::from_raw_parts(from.as_ptr(), from.len()) };
        pwritev2(&self.fd, &[IoSlice::new(bytes)], offset, flags)
    }

    /// Syncs the data (fdatasync). After a failed sync or a failed durable write, all later calls fail.
    pub fn sync(&self) -> Result<(), Errno> {
        if let Some(errno) = self.sync_error() {
            return Err(errno);
        }
        let syncing = Syncing::new(self);
        loop {
            match fdatasync(&self.fd) {
                Ok(()) => break,
                Err(Errno::INTR) => {}
                Err(error) => {
                    self.fail_syncs(error);
                    break;
                }
            }
        }
        drop(syncing);
        self.durability.wait_for_others();
        self.sync_error().map_or(Ok(()), Err)
    }
}
