//! Operations on all devices of a tee: each device gets a request of its own, in this queue. Part of `queue`, whose
//! invariants hold here.
//!
//! The operation is one task, which ends with the last of these requests. If one of them fails, the tee's backend gets
//! the whole request again, as with a read that a filter sends elsewhere.

use std::sync::Arc;

use blkloom_io::Errno;

use super::task::{leave, pinned, waiting};
use super::{Kind, Queue, Walk};
use crate::device::Device;
use crate::operation::Flags;
use crate::request::{Memory, Owner, Request};
use crate::stats::Op;
use crate::tee::{Begun, Tee, Writing};
use crate::wake::TaskId;

impl Queue {
    /// Writes (or discards, or zeroes) `len` bytes at offset `at` of a tee; their offset in the request's device is
    /// `root`.
    pub(super) fn write_legs(&mut self, walk: &Walk<'_>, tee: &Arc<Tee>, at: u64, root: u64, len: u64) {
        match tee.begin(at, len) {
            Begun::Writing(writing) => {
                let op = self.actives[walk.active].request.op;
                self.on_legs(walk, tee, Some(writing), op, (at, root, len));
            }
            Begun::Busy => {
                let id = self.task(walk, root, len, waiting(walk.path), Kind::NextIteration);
                // The filters above have let the piece pass, once.
                self.tasks[id.slot].attempt.filters = walk.filters;
                if !tee.wait_for_end(at, len, &self.ports.wakes, id) {
                    self.ports.wakes.post(crate::wake::Wake::GateOpened(id));
                }
            }
            // A region was shut since it was looked up.
            Begun::Shut => self.continue_in_next_iteration(walk, root, len),
        }
    }

    /// Flushes all legs of a tee.
    pub(super) fn flush_legs(&mut self, walk: &Walk<'_>, tee: &Arc<Tee>) {
        self.on_legs(walk, tee, None, Op::Flush, (0, 0, 0));
    }

    fn on_legs(
        &mut self,
        walk: &Walk<'_>,
        tee: &Arc<Tee>,
        writing: Option<Writing>,
        op: Op,
        (at, root, len): (u64, u64, u64),
    ) {
        self.actives[walk.active].retries = true;
        // One more than legs, so that the task does not end before all of them have their requests.
        let kind = Kind::Tee { left: tee.legs().len() + 1, error: None, writing };
        let id = self.task(walk, root, len, pinned(walk.path), kind);
        for leg in tee.legs() {
            let request = self.leg_request(walk.active, leg, op, id, (at, root, len));
            self.submit(request);
        }
        let Some(result) = self.count_leg(id, None) else { return };
        if let Some(task) = self.take(id) {
            self.actives[task.active].tasks -= 1;
            if let Err(errno) = result {
                self.fail(task.active, errno);
            }
            leave(task.path);
        }
    }

    fn leg_request(
        &self,
        active: usize,
        leg: &Arc<Device>,
        op: Op,
        task: TaskId,
        (at, root, len): (u64, u64, u64),
    ) -> Request {
        let request = &self.actives[active].request;
        let skip = root.wrapping_sub(request.offset) as usize;
        let memory = match (&request.memory, op) {
            (Memory::Registered(buffer), Op::Write) => Memory::Registered(buffer.part(skip, len as usize)),
            // SAFETY: the request is kept until the task has ended, which is after the end of the request for the leg.
            (memory, Op::Write) => Memory::Source(unsafe { memory.source(skip, len as usize) }),
            _ => Memory::None,
        };
        Request {
            device: leg.clone(),
            op,
            offset: at,
            len,
            // Discards and zero writes are followed by a flush of the whole device.
            flags: Flags { fua: request.flags.fua && op == Op::Write, through_gate: false, ..request.flags },
            memory,
            owner: Owner::Tee(task),
            started: request.started,
            context: None,
            done: 0,
        }
    }

    /// Handles the end of the request of a leg.
    pub(super) fn leg_ended(&mut self, id: TaskId, error: Option<Errno>) {
        if let Some(result) = self.count_leg(id, error) {
            self.finish(id, result);
        }
    }

    /// Counts a leg that has ended. Returns the result of the task if this was the last one.
    fn count_leg(&mut self, id: TaskId, error: Option<Errno>) -> Option<Result<(), Errno>> {
        let task = self.tasks.get_mut(id.slot).filter(|task| task.generation == id.generation)?;
        let Kind::Tee { left, error: first, writing } = &mut task.kind else { return None };
        *first = first.or(error);
        *left -= 1;
        if *left > 0 {
            return None;
        }
        if let (None, Some(writing)) = (&first, writing) {
            writing.complete();
        }
        Some(first.map_or(Ok(()), Err))
    }
}
