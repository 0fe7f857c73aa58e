//! Tasks that wait for an operation of a backend. Part of `queue`, whose invariants hold here.
//!
//! Such a task holds pins, like a task of a file. When a gate on the path of a read or a block
//! status closes, its operation is cancelled and it waits at the gate. Operations that change data are waited for instead.

use std::sync::Arc;
use std::time::Instant;

use super::task::pinned;
use super::{Kind, Queue, Walk};
use crate::backend::{Backend, Operation, OperationId};
use crate::fault::Payload;
use crate::request::Memory;
use crate::stats::Op;

impl Queue {
    /// Submits an operation on `len` bytes of the backend from offset `at` on; their offset in the request's device is
    /// `root`.
    pub(super) fn operate(
        &mut self,
        walk: &Walk<'_>,
        backend: &Arc<dyn Backend>,
        op: Op,
        root: u64,
        at: u64,
        len: u64,
    ) {
        let Some(last) = walk.path.last() else { return };
        let deadline = (!backend.has_own_timeout()).then(|| Instant::now() + last.device.fault_timeout);
        let kind = Kind::Backend { backend: backend.clone(), deadline, answered: false };
        let id = self.task(walk, root, len, pinned(walk.path), kind);
        if let Some(deadline) = deadline {
            self.timers.insert((deadline, id));
        }
        let active = &self.actives[walk.active];
        let request = &active.request;
        let skip = root.wrapping_sub(request.offset) as usize;
        let payload = if op == Op::Write { payload(active.memory(), skip, len as usize) } else { Payload::None };
        let answers = self.ports.answers.clone();
        let operation = OperationId::of(&answers, id);
        backend.submit(Operation::new(operation, op, at, len, request.flags, payload, (answers, id)));
        if matches!(op, Op::Read | Op::Extents) {
            self.wait_no_longer_than_gates(id);
        }
    }
}

/// The bytes of a write, shared or copied for a fault or a backend.
pub(super) fn payload(memory: &Memory, at: usize, len: usize) -> Payload {
    match memory {
        Memory::Owned(buffer) => Payload::Shared { buffer: buffer.share(), at },
        // SAFETY: the request has not ended.
        memory => Payload::Copied(unsafe { memory.to_vec(at, len) }),
    }
}
