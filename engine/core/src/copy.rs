//! Copy on write: copies a range of a cluster table to another location in a file.
//!
//! Called on the mapper thread, so it may wait for storage. No request writes to the destination meanwhile: the table
//! does not point to it yet.

use std::cell::RefCell;

use blkloom_io::{BufferPool, Errno, File, Scratch, Slice, Source};
use blkloom_map::{ClusterTable, Resolved};

use crate::device::Kinds;

/// Bytes of buffers that a thread keeps for its next copy.
const KEPT: usize = 4 << 20;

thread_local! {
    static BUFFERS: RefCell<BufferPool> = RefCell::new(BufferPool::new(KEPT));
}

/// Copies bytes [at, at + len) of the table to `offset` of the file `to`. `patch` replaces the bytes of the copy from
/// `patch_at` on. Returns false and writes nothing if the table cannot resolve the whole range. Errors are those of the
/// files.
pub fn copy(
    table: &ClusterTable<Kinds>,
    (at, len): (u64, u64),
    (to, offset): (&File, u64),
    (patch, patch_at): (Source<'_>, usize),
) -> Result<bool, Errno> {
    let mut buffer = BUFFERS.with(|buffers| buffers.borrow_mut().take(len as usize));
    let memory = buffer.slice();
    let copied = match fill(table, at, memory) {
        Ok(true) => {
            memory.part(patch_at, patch.len()).copy_from(patch);
            to.write(offset, memory.source(), false, &mut Scratch::default()).map(|()| true)
        }
        other => other,
    };
    BUFFERS.with(|buffers| buffers.borrow_mut().put(buffer));
    copied
}

/// Reads the table's bytes from `at` on. Returns false where the table faults.
fn fill(table: &ClusterTable<Kinds>, at: u64, memory: Slice<'_>) -> Result<bool, Errno> {
    let mut done = 0;
    while done < memory.len() {
        let (resolved, len) = table.at(at + done as u64, (memory.len() - done) as u64);
        let part = memory.part(done, len as usize);
        match resolved {
            Resolved::Data { file, offset, .. } => file.read(offset, part, &mut Scratch::default())?,
            Resolved::Zero { .. } => part.zero(),
            Resolved::Error(errno) => return Err(errno),
            _ => return Ok(false),
        }
        done += len as usize;
    }
    Ok(true)
}
