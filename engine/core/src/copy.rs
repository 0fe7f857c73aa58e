//! Copy on write: what a cluster table says is somewhere, put somewhere else.
//!
//! Called by the mapper's thread, so it may wait for storage. Nobody writes to the place meanwhile that it
//! copies to: no request is led there yet.

use std::cell::RefCell;

use blkloom_io::{BufferPool, File, Slice};
use blkloom_map::{ClusterTable, Place};

use crate::device::Kinds;

/// What a thread keeps for the next copy.
const KEPT: usize = 4 << 20;

thread_local! {
    static BUFFERS: RefCell<BufferPool> = RefCell::new(BufferPool::new(KEPT));
}

/// Bytes [at, at + len) of the table, with `patch` over them from byte `patch_at` of the copy on, go to `offset` of
/// `to`. False, and nothing done, where the table does not know all of them. An errno of the files.
pub fn copy(
    table: &ClusterTable<Kinds>,
    (at, len): (u64, u64),
    (to, offset): (&File, u64),
    (patch, patch_at): (Slice, usize),
) -> Result<bool, i32> {
    let buffer = BUFFERS.with(|buffers| buffers.borrow_mut().take(len as usize));
    // SAFETY: the buffer is borrowed by nobody and goes back to its pool only below.
    let memory = unsafe { buffer.slice() };
    let copied = match fill(table, at, memory) {
        Ok(true) => {
            memory.part(patch_at, patch.len()).copy_from_slice(patch);
            to.write(offset, memory, false).map(|()| true)
        }
        other => other,
    };
    BUFFERS.with(|buffers| buffers.borrow_mut().put(buffer));
    copied
}

/// Reads what the table has at `at`; false where it faults.
fn fill(table: &ClusterTable<Kinds>, at: u64, memory: Slice) -> Result<bool, i32> {
    let mut done = 0;
    while done < memory.len() {
        let (place, len) = table.at(at + done as u64, (memory.len() - done) as u64);
        let part = memory.part(done, len as usize);
        match place {
            Place::Data { file, offset, .. } => file.read(offset, part)?,
            Place::Zero { .. } => part.zero(),
            Place::Error(errno) => return Err(errno),
            _ => return Ok(false),
        }
        done += len as usize;
    }
    Ok(true)
}
