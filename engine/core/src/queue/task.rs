//! Tasks: start, retry and end of the parts of a request that wait (ring, pool, fault, gate). Part of `queue`, whose
//! invariants hold here.

use std::sync::Arc;
use std::time::Instant;

use blkloom_io::{Busy, Errno, File, Slice, Source, Syncing};

use super::backend::payload;
use super::{Active, Attempt, Inside, Kind, Path, Phase, Queue, Task, Walk};
use crate::backend::OperationId;
use crate::device::Device;
use crate::fault::{Fault, Payload};
use crate::io_errors;
use crate::operation::Flags;
use crate::pool::{BlockShare, Job};
use crate::request::Owner;
use crate::stats::Op;
use crate::wake::{TaskId, Wake};

/// After this many consecutive "retry" answers the request fails: the target's map is wrong.
const MOST_RETRIES: u32 = 100;

impl Queue {
    pub(super) fn task(&mut self, walk: &Walk<'_>, offset: u64, len: u64, path: Path, kind: Kind) -> TaskId {
        self.generation = self.generation.wrapping_add(1);
        self.actives[walk.active].tasks += 1;
        let task =
            Task { active: walk.active, generation: self.generation, offset, len, path, kind, attempt: walk.attempt };
        TaskId { slot: self.tasks.insert(task), generation: self.generation }
    }

    #[allow(clippy::too_many_arguments, reason = "one private call a direction; a struct would only be unpacked again")]
    pub(super) fn transfer(
        &mut self,
        walk: &Walk<'_>,
        file: &Arc<File>,
        at: u64,
        root: u64,
        len: u64,
        write: bool,
        durable: bool,
        share: BlockShare,
    ) {
        let file = Busy::new(file.clone());
        let kind = Kind::Ring { file, at, done: 0, write, durable, syncing: None, _share: share };
        let id = self.task(walk, root, len, pinned(walk.path), kind);
        self.push(id, true);
    }

    /// Hands (the rest of) a transfer to the ring, or to the pool where the ring cannot take it.
    pub(super) fn push(&mut self, id: TaskId, use_ring: bool) {
        let task = &self.tasks[id.slot];
        if self.actives[task.active].is_registered() {
            return self.push_registered(id);
        }
        let Kind::Ring { file, at, done, write, durable, .. } = &task.kind else {
            return;
        };
        let request = &self.actives[task.active].request;
        let (skip, rest) = ((task.offset - request.offset + done) as usize, (task.len - done) as usize);
        // SAFETY: the request is kept until this task has ended, in the ring or in the pool. The destination of a read
        // is not accessed otherwise before that.
        let (into, from) = unsafe {
            match write {
                true => (Slice::empty(), request.memory.source(skip, rest)),
                false => (request.memory.destination(skip, rest), Source::empty()),
            }
        };
        let memory = if *write { from } else { into.source() };
        let (file, at, write, durable) = (Arc::clone(file), at + done, *write, *durable);
        let began = durable.then(|| Syncing::new(file.clone()));
        let pushed = match &mut self.ring {
            // The syncs of the file have failed: the pool fails the write.
            Some(_) if durable && file.sync_error().is_some() => false,
            Some(ring) if use_ring && !self.ring_is_lost && !ring.is_full() && file.fits(at, memory) => match write {
                true => ring.write(&file, at, from, durable, id.slot as u64).is_ok(),
                false => ring.read(&file, at, into, id.slot as u64).is_ok(),
            },
            _ => false,
        };
        if pushed {
            if let Kind::Ring { syncing, .. } = &mut self.tasks[id.slot].kind {
                *syncing = began;
            }
        } else {
            let job = match write {
                true => Job::Write { offset: at, from, durable },
                false => Job::Read { offset: at, into },
            };
            // Drops the task's share of the block lock, which would block this write's own read-modify-write.
            self.tasks[id.slot].kind = Kind::Pool { file: file.clone() };
            self.pool.submit(file, job, self.ports.results.clone(), id);
        }
    }

    /// A durable write in the ring failed. The pool finds out whether the write or the sync failed.
    pub(super) fn examine(&mut self, id: TaskId, errno: Errno, syncing: Syncing<Arc<File>>) {
        let task = &mut self.tasks[id.slot];
        let Kind::Ring { file, at, .. } = &task.kind else {
            return;
        };
        let (file, at) = (Arc::clone(file), *at);
        let request = &self.actives[task.active].request;
        // SAFETY: the request is kept until this task has ended.
        let from = unsafe { request.memory.source((task.offset - request.offset) as usize, task.len as usize) };
        task.kind = Kind::Pool { file: file.clone() };
        self.pool.submit(file, Job::Examine { offset: at, from, errno, syncing }, self.ports.results.clone(), id);
    }

    /// Fails a task because the syncs of its file have failed. If the failure is `unreported`, the task ends only after
    /// the device's mapper has stored it.
    pub(super) fn sync_failed(&mut self, id: TaskId, errno: Errno, unreported: bool) {
        let task = &self.tasks[id.slot];
        let file = match &task.kind {
            Kind::Ring { file, .. } => Some(Arc::clone(file)),
            Kind::Pool { file, .. } => Some(Arc::clone(file)),
            _ => None,
        };
        self.fail_in(task.active, errno, task.offset, file.as_ref());
        let task = &mut self.tasks[id.slot];
        let waits = waiting(&task.path);
        leave(std::mem::replace(&mut task.path, waits));
        let Some(device) = task.path.last().map(|inside| inside.device.clone()).filter(|_| unreported) else {
            task.kind = Kind::NextIteration;
            return self.finish(id, Err(errno));
        };
        let deadline = Instant::now() + device.fault_timeout;
        task.kind = Kind::Fault { deadline, outcome: Some(errno) };
        self.timers.insert((deadline, id));
        device.faults.push(Fault {
            op: Op::Flush,
            owner: 0,
            offset: 0,
            len: 0,
            flags: Flags::default(),
            context: None,
            sync_failed: true,
            again: false,
            no_space: None,
            from_client: false,
            device: device.clone(),
            above: None,
            payload: Payload::None,
            answers: self.ports.answers.clone(),
            task: id,
            deadline,
            answered: false,
        });
    }

    pub(super) fn start_job(&mut self, walk: &Walk<'_>, file: &Arc<File>, job: Job, root: u64, len: u64) {
        let kind = Kind::Pool { file: file.clone() };
        let id = self.task(walk, root, len, pinned(walk.path), kind);
        self.pool.submit(file.clone(), job, self.ports.results.clone(), id);
    }

    pub(super) fn fault(&mut self, walk: &Walk<'_>, owner: u32, op: Op, root: u64, at: u64, len: u64) {
        let Some(last) = walk.path.last() else { return };
        if walk.attempt.retries >= MOST_RETRIES {
            return self.fail_in(walk.active, Errno::IO, root, None);
        }
        let device = last.device.clone();
        device.stats.fault(self.shard);
        let deadline = Instant::now() + device.fault_timeout;
        let id = self.task(walk, root, len, waiting(walk.path), Kind::Fault { deadline, outcome: None });
        self.timers.insert((deadline, id));
        let active = &self.actives[walk.active];
        let request = &active.request;
        let skip = root.wrapping_sub(request.offset) as usize;
        let payload = if op == Op::Write { payload(active.memory(), skip, len as usize) } else { Payload::None };
        let (flags, context, answers) = (request.flags, request.context.clone(), self.ports.answers.clone());
        let Attempt { again, no_space, .. } = walk.attempt;
        let from_client = matches!(request.owner, Owner::Transport { .. });
        let above = &walk.path[..walk.path.len() - 1];
        let above = (!above.is_empty()).then(|| above.iter().map(|inside| inside.device.clone()).collect());
        device.faults.push(Fault {
            op,
            owner,
            offset: at,
            len,
            flags,
            context,
            sync_failed: false,
            again,
            no_space,
            from_client,
            device: device.clone(),
            above,
            payload,
            answers,
            task: id,
            deadline,
            answered: false,
        });
    }

    pub(super) fn wait_at_gate(&mut self, walk: &Walk<'_>, device: &Arc<Device>, root: u64, len: u64) {
        if self.stopping {
            return self.fail(walk.active, Errno::SHUTDOWN);
        }
        let id = self.task(walk, root, len, waiting(walk.path), Kind::Gate);
        if !device.wait_at_gate(&self.ports.wakes, id) {
            self.ports.wakes.post(Wake::GateOpened(id));
        }
    }

    /// Leaves a range to the loop's next iteration.
    pub(super) fn continue_in_next_iteration(&mut self, walk: &Walk<'_>, root: u64, len: u64) {
        let id = self.task(walk, root, len, waiting(walk.path), Kind::NextIteration);
        self.ports.wakes.post(Wake::GateOpened(id));
    }

    pub(super) fn take(&mut self, id: TaskId) -> Option<Task> {
        match self.tasks.get(id.slot) {
            Some(task) if task.generation == id.generation => {
                if let Kind::Deferred { .. } | Kind::Wait { .. } | Kind::Backend { .. } = task.kind {
                    task.path.iter().for_each(|inside| inside.device.deferred.leave(&self.ports.wakes, id));
                }
                if let Kind::Backend { backend, answered: false, .. } = &task.kind {
                    backend.cancel(OperationId::of(&self.ports.answers, id));
                }
                if let Some(at) = task.kind.timer() {
                    self.timers.remove(&(at, id));
                }
                self.tasks.try_remove(id.slot)
            }
            _ => None,
        }
    }

    /// Ends a task: leaves its devices and advances its request.
    pub(super) fn finish(&mut self, id: TaskId, result: Result<(), Errno>) {
        if let Err(errno @ (Errno::NOSPC | Errno::DQUOT)) = result
            && self.is_write_in_storage(id)
        {
            let no_space =
                |attempt: Attempt| Attempt { no_space: Some(errno), retries: attempt.retries + 1, ..attempt };
            return self.walk_again(id, Past::Gates, no_space);
        }
        let Some(task) = self.take(id) else { return };
        if let Err(errno) = result {
            match &task.kind {
                Kind::Ring { file, .. } => self.fail_in(task.active, errno, task.offset, Some(file)),
                Kind::Pool { file, .. } => self.fail_in(task.active, errno, task.offset, Some(file)),
                Kind::Fault { .. } | Kind::Backend { .. } if io_errors::is_of_target(errno) => {
                    self.fail_in(task.active, errno, task.offset, None);
                }
                _ => self.fail(task.active, errno),
            }
        }
        self.actives[task.active].tasks -= 1;
        self.advance(task.active, !task.path.is_empty());
        // Last: the device must not become drained before the request's flush has started.
        leave(task.path);
    }

    fn is_write_in_storage(&self, id: TaskId) -> bool {
        self.tasks.get(id.slot).is_some_and(|task| {
            let Active { request, phase, .. } = &self.actives[task.active];
            task.generation == id.generation
                && request.op == Op::Write
                && *phase == Phase::Main
                && matches!(task.kind, Kind::Ring { .. } | Kind::Pool { .. })
        })
    }

    /// Walks a waiting task's range again. The gates of devices that it is inside of do not stop it.
    pub(super) fn retry(&mut self, id: TaskId) {
        let attempt = match self.tasks.get(id.slot).map(|task| &task.kind) {
            Some(Kind::Copy { .. }) => return self.push_registered(id),
            Some(Kind::Fault { .. }) => {
                |before: Attempt| Attempt { retries: before.retries + 1, no_space: None, ..before }
            }
            Some(&Kind::Wait { filters, .. }) => {
                return self.walk_again(id, Past::Gates, |before| Attempt { filters, ..before });
            }
            // The map may have changed while the device was suspended.
            Some(Kind::Gate) => |before: Attempt| Attempt { retries: before.retries, ..Attempt::default() },
            _ => |before: Attempt| before,
        };
        self.walk_again(id, Past::Gates, attempt);
    }

    pub(super) fn walk_again(&mut self, id: TaskId, past: Past, attempt: impl FnOnce(Attempt) -> Attempt) {
        let Some(task) = self.take(id) else { return };
        // First: a request with `MOST_TASKS` tasks must be able to start this one again.
        self.actives[task.active].tasks -= 1;
        if self.actives[task.active].phase == Phase::Main {
            let path = if past == Past::Gates { &task.path[..] } else { &[] };
            self.walk(task.active, task.offset, task.len, path, attempt(task.attempt));
        }
        self.advance(task.active, !task.path.is_empty());
        // Last: the task must always be counted as waiting or as pinned.
        leave(task.path);
    }
}

/// The gates that do not stop a task that is walked again.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Past {
    /// The gates of the devices that it is inside of.
    Gates,
    Nothing,
}

/// The path for a task that uses the result of a lookup: every device is pinned once more.
pub(super) fn pinned(path: &[Inside]) -> Path {
    let again = |inside: &Inside| Inside {
        device: inside.device.clone(),
        pin: inside.pin.map(|pin| inside.device.epochs.again(pin)),
    };
    path.iter().map(again).collect()
}

/// The path for a waiting task: it is counted as waiting in every device.
pub(super) fn waiting(path: &[Inside]) -> Path {
    path.iter().for_each(|inside| inside.device.epochs.begin_wait());
    path.iter().map(|inside| Inside { device: inside.device.clone(), pin: None }).collect()
}

pub(super) fn leave(path: Path) {
    for Inside { device, pin } in path {
        match pin {
            Some(pin) => device.epochs.unpin(pin),
            None => device.epochs.end_wait(),
        }
    }
}
