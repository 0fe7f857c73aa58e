//! `Backend`: asynchronous storage that is neither a local file nor memory, for example an NBD server or an object
//! store.
//!
//! A queue submits an operation and does not wait for it. The backend completes each operation once, at any time and
//! from any thread. The backend never accesses a client's memory: a read's bytes come with its completion, and a
//! write's bytes belong to the operation. So a completion after the timeout, or after a cancellation, does no harm.

use blkloom_io::Errno;

use crate::fault::{Answer, Answered, Payload};
use crate::mailbox::Poster;
use crate::operation::Flags;
use crate::stats::Op;
use crate::wake::TaskId;

/// Limits of a backend: operation size, number of operations and memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Most bytes in one operation, at least 1. The queue splits longer requests.
    pub longest: u64,
    /// Operations that the backend executes at the same time. Further operations wait in the backend.
    pub most: usize,
    /// Bytes of these operations and their answers together. A single operation may take more.
    pub most_bytes: u64,
}

/// Asynchronous storage below a map.
pub trait Backend: Send + Sync {
    fn limits(&self) -> Limits;
    /// Most bytes of an operation that moves none (discard, write zeroes, extents).
    fn longest_range(&self) -> u64 {
        self.limits().longest
    }
    /// A power of two. An operation that does not begin at a multiple of it is executed from the multiple before it on, and
    /// is not longer than the others then.
    fn block(&self) -> u64 {
        1
    }
    /// Whether it answers block status (`Op::Extents`). If not, all of it is reported as data.
    fn reports_extents(&self) -> bool {
        false
    }
    /// Whether it completes every operation within a time of its own. If not, an operation fails after the
    /// `fault_timeout` of its device.
    fn has_own_timeout(&self) -> bool {
        false
    }
    /// Submits an operation (read, write, discard, write zeroes, flush or extents) and never blocks. A flush makes durable all
    /// operations that were completed before the flush was submitted. A write with `Flags::fua` is durable when it is
    /// completed.
    fn submit(&self, operation: Operation);
    /// Cancels an operation whose result is no longer needed. The operation may be complete already, or may never have
    /// been submitted to this backend.
    fn cancel(&self, id: OperationId);
}

/// Identifies one operation among all that are not complete.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct OperationId {
    /// The submitting queue: the address of its mailbox.
    pub queue: usize,
    pub slot: usize,
    pub generation: u32,
}

impl OperationId {
    pub(crate) fn of(answers: &Poster<Answered>, task: TaskId) -> OperationId {
        let queue = std::sync::Arc::as_ptr(answers).cast::<()>() as usize;
        OperationId { queue, slot: task.slot, generation: task.generation }
    }
}

/// One operation that a backend executes. An operation that is dropped without completion fails with EIO.
pub struct Operation {
    pub id: OperationId,
    pub op: Op,
    /// Bytes from the start of the backend.
    pub offset: u64,
    pub len: u64,
    pub flags: Flags,
    payload: Payload,
    /// Where the answer goes. None once the operation is completed.
    answers: Option<(Poster<Answered>, TaskId)>,
}

impl Operation {
    pub(crate) fn new(
        id: OperationId,
        op: Op,
        offset: u64,
        len: u64,
        flags: Flags,
        payload: Payload,
        answers: (Poster<Answered>, TaskId),
    ) -> Operation {
        Operation { id, op, offset, len, flags, payload, answers: Some(answers) }
    }

    /// The bytes to write.
    pub fn payload(&self) -> &[u8] {
        self.payload.bytes(self.len as usize)
    }

    /// Completes the operation: with the bytes of a read, with None for other operations, or with an errno. Only the
    /// first completion counts.
    pub fn complete(&mut self, result: Result<Option<Vec<u8>>, Errno>) {
        self.answer(match result {
            Ok(bytes) => Answer::Done(bytes),
            Err(errno) => Answer::Fail(errno),
        });
    }

    /// Completes a block status with (length, flags) of runs from the offset on, at least one.
    pub fn complete_extents(&mut self, runs: Vec<(u64, u32)>) {
        self.answer(Answer::Extents(runs));
    }

    fn answer(&mut self, answer: Answer) {
        if let Some((answers, task)) = self.answers.take() {
            self.payload = Payload::None;
            answers.post(Answered { task, answer });
        }
    }
}

impl Drop for Operation {
    /// Fails the request of an operation that was never completed. The request must not hang.
    fn drop(&mut self) {
        self.complete(Err(Errno::IO));
    }
}
