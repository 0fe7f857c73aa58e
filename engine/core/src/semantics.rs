//! The action of an operation on an extent: one pure function. The fast path and the queue execute the actions.
//!
//! Flushes are not handled here: a flush concerns all files and targets of a device (`queue/flush`). Filters are asked
//! before: the extent here is the one behind the filter.

use blkloom_map::{Handles, Resolved};

use crate::operation::Flags;
use crate::stats::Op;

/// The action for one piece of a request. The piece lies in one extent.
#[derive(Debug)]
pub(crate) enum Action<'m, H: Handles> {
    /// Continue in the lower device, at this offset.
    Enter {
        device: &'m H::Device,
        offset: u64,
    },
    File {
        file: &'m H::File,
        offset: u64,
        action: FileAction,
    },
    Memory {
        region: &'m H::Region,
        offset: u64,
        action: MemoryAction,
    },
    /// Submit the operation to the backend.
    Backend {
        backend: &'m H::Backend,
        offset: u64,
    },
    /// Execute the operation on all devices of the tee.
    Tee {
        tee: &'m H::Tee,
        offset: u64,
    },
    /// Return zeros for a read.
    ReadZeros,
    /// Succeed without an effect: written bytes are discarded, and there is nothing to prefetch.
    Nothing,
    /// Report this block status for the whole piece.
    Report(Allocation),
    Fail(H::Error),
    /// Ask the target.
    Fault,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum FileAction {
    Read,
    /// durable: the write is durable before the request completes. on_no_space: the reaction to ENOSPC and EDQUOT.
    Write {
        durable: bool,
        on_no_space: NoSpace,
    },
    Punch,
    Zero {
        unmap: bool,
        fast: bool,
    },
    Prefetch,
    /// Report the file's holes.
    Report,
}

/// The reaction when the file system has no space for a write. Only a write that a cluster table sent faults: its
/// target can change the table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum NoSpace {
    Fails,
    Faults,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum MemoryAction {
    Read,
    Write,
    Zero {
        unmap: bool,
    },
    /// Report which pages were written.
    Report,
}

/// Block status, with the numbers of NBD's base:allocation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Allocation {
    Data = 0,
    ZeroHole = 3,
}

/// The action for an operation on an extent. flags.fua: the write itself must be durable. It is false if a flush of the
/// device's targets follows and covers the write.
pub(crate) fn action<'m, H: Handles>(op: Op, flags: Flags, resolved: &Resolved<'m, H>) -> Action<'m, H> {
    match *resolved {
        Resolved::Device { device, offset, writable } if writable || !op.writes() => Action::Enter { device, offset },
        Resolved::Data { file, offset, writable, punch } => match file_action(op, flags, writable, punch) {
            Some(action) => Action::File { file, offset, action },
            None => otherwise(op),
        },
        Resolved::Memory { region, offset } => match memory_action(op, flags) {
            Some(action) => Action::Memory { region, offset, action },
            None => otherwise(op),
        },
        Resolved::Zero { discard_writes } => match op {
            Op::Read => Action::ReadZeros,
            Op::Write | Op::Discard | Op::WriteZeroes if discard_writes => Action::Nothing,
            Op::Extents => Action::Report(Allocation::ZeroHole),
            _ => otherwise(op),
        },
        Resolved::Error(error) => match op {
            Op::Cache => Action::Nothing,
            Op::Extents => Action::Report(Allocation::Data),
            _ => Action::Fail(error),
        },
        Resolved::Backend { backend, offset, writable } => match op {
            Op::Read | Op::Extents => Action::Backend { backend, offset },
            Op::Write | Op::Discard | Op::WriteZeroes if writable => Action::Backend { backend, offset },
            _ => otherwise(op),
        },
        Resolved::Tee { tee, offset } => match op {
            Op::Write | Op::Discard | Op::WriteZeroes => Action::Tee { tee, offset },
            Op::Extents => Action::Report(Allocation::Data),
            _ => otherwise(op),
        },
        Resolved::Fault | Resolved::Device { .. } | Resolved::Filtered { .. } => otherwise(op),
    }
}

/// The action where the extent does not support the operation: a prefetch succeeds, all others ask the target.
fn otherwise<'m, H: Handles>(op: Op) -> Action<'m, H> {
    if op == Op::Cache { Action::Nothing } else { Action::Fault }
}

fn file_action(op: Op, flags: Flags, writable: bool, punch: bool) -> Option<FileAction> {
    match op {
        Op::Read => Some(FileAction::Read),
        Op::Write if writable => {
            let on_no_space = if punch { NoSpace::Fails } else { NoSpace::Faults };
            Some(FileAction::Write { durable: flags.fua, on_no_space })
        }
        Op::Discard if writable && punch => Some(FileAction::Punch),
        Op::WriteZeroes if writable && punch => Some(FileAction::Zero { unmap: flags.unmap, fast: flags.fast }),
        Op::Cache => Some(FileAction::Prefetch),
        Op::Extents => Some(FileAction::Report),
        _ => None,
    }
}

fn memory_action(op: Op, flags: Flags) -> Option<MemoryAction> {
    match op {
        Op::Read => Some(MemoryAction::Read),
        Op::Write => Some(MemoryAction::Write),
        Op::Discard => Some(MemoryAction::Zero { unmap: true }),
        Op::WriteZeroes => Some(MemoryAction::Zero { unmap: flags.unmap }),
        Op::Extents => Some(MemoryAction::Report),
        _ => None,
    }
}

impl<H: Handles> Action<'_, H> {
    /// Whether the action reads or writes the request's memory.
    pub fn moves_bytes(&self) -> bool {
        matches!(
            self,
            Action::File { action: FileAction::Read | FileAction::Write { .. }, .. }
                | Action::Memory { action: MemoryAction::Read | MemoryAction::Write, .. }
                | Action::Tee { .. }
                | Action::ReadZeros
        )
    }

    /// Whether the CPU, a target or a backend needs the request's bytes. Files do not: the kernel moves the bytes. The
    /// devices of a tee say so themselves.
    pub fn needs_bytes(&self, op: Op) -> bool {
        match self {
            Action::Memory { action: MemoryAction::Read | MemoryAction::Write, .. } | Action::ReadZeros => true,
            Action::Backend { .. } | Action::Fault => matches!(op, Op::Read | Op::Write),
            _ => false,
        }
    }
}
