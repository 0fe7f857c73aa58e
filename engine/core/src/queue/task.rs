//! Tasks: pieces that take time, from their start in the ring, the pool, a fault or a gate to their
//! end. Part of `queue`, whose invariants hold here.

use std::sync::Arc;
use std::time::Instant;

use blkloom_io::{Busy, File, Syncing, errno::EDQUOT, errno::EIO, errno::ENOSPC, errno::ESHUTDOWN};

use super::{Active, Attempt, Inside, Kind, Phase, Queue, Task, Walk};
use crate::device::Device;
use crate::fault::{Fault, Payload};
use crate::held::Holding;
use crate::inbox::{Message, TaskId};
use crate::io_errors;
use crate::pool::{BlockShare, Chore};
use crate::request::{Flags, Memory};
use crate::stats::Op;

/// A fault answered "retry" this often without the map helping is an error of the target.
const MOST_RETRIES: u32 = 100;

impl Queue {
    pub(super) fn task(&mut self, walk: &Walk<'_>, offset: u64, len: u64, path: Vec<Inside>, kind: Kind) -> TaskId {
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
        let Kind::Ring { file, at, done, write, durable, .. } = &task.kind else {
            return;
        };
        let request = &self.actives[task.active].request;
        let (skip, rest) = ((task.offset - request.offset + done) as usize, (task.len - done) as usize);
        let memory = request.memory.slice().part(skip, rest);
        let (file, at, write, durable) = (Arc::clone(file), at + done, *write, *durable);
        let began = durable.then(|| Syncing::new(file.clone()));
        let pushed = match &mut self.ring {
            // What cannot become durable is refused by the pool.
            Some(_) if durable && file.sync_error().is_some() => false,
            Some(ring) if use_ring && !ring.is_full() && file.fits(at, memory) => match write {
                true => ring.write(&file, at, memory, durable, id.slot as u64).is_ok(),
                false => ring.read(&file, at, memory, id.slot as u64).is_ok(),
            },
            _ => false,
        };
        if pushed {
            if let Kind::Ring { syncing, .. } = &mut self.tasks[id.slot].kind {
                *syncing = began;
            }
        } else {
            let chore = match write {
                true => Chore::Write { offset: at, from: memory, durable },
                false => Chore::Read { offset: at, into: memory },
            };
            // The share of the blocks that the task holds would be in a write's own way.
            self.tasks[id.slot].kind = Kind::Pool { file: file.clone(), sparse: false };
            self.pool.submit(file, chore, self.inbox.clone(), id);
        }
    }

    /// A durable write in the ring failed: the pool finds out in which part.
    pub(super) fn examine(&mut self, id: TaskId, errno: i32, syncing: Syncing<Arc<File>>) {
        let task = &mut self.tasks[id.slot];
        let Kind::Ring { file, at, .. } = &task.kind else {
            return;
        };
        let (file, at) = (Arc::clone(file), *at);
        let request = &self.actives[task.active].request;
        let from = request.memory.slice().part((task.offset - request.offset) as usize, task.len as usize);
        task.kind = Kind::Pool { file: file.clone(), sparse: false };
        self.pool.submit(file, Chore::Examine { offset: at, from, errno, syncing }, self.inbox.clone(), id);
    }

    /// The file of a task cannot be synced any more, and the task fails: where that is new, when the mapper of the
    /// device has seen to it that it is not forgotten.
    pub(super) fn sync_failed(&mut self, id: TaskId, errno: i32, unreported: bool) {
        let task = &self.tasks[id.slot];
        let file = match &task.kind {
            Kind::Ring { file, .. } => Some(Arc::clone(file)),
            Kind::Pool { file, .. } => Some(Arc::clone(file)),
            _ => None,
        };
        self.fail_in(task.active, errno, task.offset, file.as_ref());
        let task = &mut self.tasks[id.slot];
        let waits = parked(&task.path);
        leave(std::mem::replace(&mut task.path, waits));
        let Some(device) = task.path.last().map(|inside| inside.device.clone()).filter(|_| unreported) else {
            task.kind = Kind::Later;
            return self.finish(id, Err(errno));
        };
        let deadline = Instant::now() + device.fault_timeout;
        task.kind = Kind::Fault { deadline, outcome: Some(errno) };
        self.deadlines.insert((deadline, id));
        device.faults.push(Fault {
            op: Op::Flush,
            owner: 0,
            offset: 0,
            len: 0,
            flags: Flags::default(),
            context: None,
            sync_failed: true,
            again: false,
            full: 0,
            held: device.held.clone(),
            payload: Payload::None,
            inbox: self.inbox.clone(),
            task: id,
            deadline,
            answered: false,
        });
    }

    pub(super) fn chore(&mut self, walk: &Walk<'_>, file: &Arc<File>, chore: Chore, root: u64, len: u64) {
        let kind = Kind::Pool { file: file.clone(), sparse: matches!(chore, Chore::Stretches { .. }) };
        let id = self.task(walk, root, len, pinned(walk.path), kind);
        self.pool.submit(file.clone(), chore, self.inbox.clone(), id);
    }

    pub(super) fn fault(&mut self, walk: &Walk<'_>, owner: u32, op: Op, root: u64, at: u64, len: u64) {
        let Some(last) = walk.path.last() else { return };
        if walk.attempt.retries >= MOST_RETRIES {
            return self.fail_in(walk.active, EIO, root, None);
        }
        let device = last.device.clone();
        device.stats.fault(self.shard);
        let deadline = Instant::now() + device.fault_timeout;
        let id = self.task(walk, root, len, parked(walk.path), Kind::Fault { deadline, outcome: None });
        self.deadlines.insert((deadline, id));
        let request = &self.actives[walk.active].request;
        let skip = root.wrapping_sub(request.offset) as usize;
        let payload = match (&request.memory, op) {
            (Memory::Owned(buffer), Op::Write) => Payload::Shared { buffer: buffer.clone(), at: skip },
            (Memory::Borrowed(slice), Op::Write) => Payload::Copied(slice.part(skip, len as usize).to_vec()),
            _ => Payload::None,
        };
        let (flags, context, inbox) = (request.flags, request.context.clone(), self.inbox.clone());
        let Attempt { again, full, .. } = walk.attempt;
        let held = device.held.clone();
        device.faults.push(Fault {
            op,
            owner,
            offset: at,
            len,
            flags,
            context,
            sync_failed: false,
            again,
            full,
            held,
            payload,
            inbox,
            task: id,
            deadline,
            answered: false,
        });
    }

    pub(super) fn wait_at_gate(&mut self, walk: &Walk<'_>, device: &Arc<Device>, root: u64, len: u64) {
        if self.stopping {
            return self.fail(walk.active, ESHUTDOWN);
        }
        let id = self.task(walk, root, len, parked(walk.path), Kind::Gate);
        if !device.wait_at_gate(&self.inbox, id) {
            self.inbox.send(Message::GateOpened(id));
        }
    }

    /// Leaves a range for the loop's next turn.
    pub(super) fn rest_later(&mut self, walk: &Walk<'_>, root: u64, len: u64) {
        let id = self.task(walk, root, len, parked(walk.path), Kind::Later);
        self.inbox.send(Message::GateOpened(id));
    }

    pub(super) fn take(&mut self, id: TaskId) -> Option<Task> {
        match self.tasks.get(id.slot) {
            Some(task) if task.generation == id.generation => {
                if let Kind::Held { .. } = task.kind {
                    task.path.iter().for_each(|inside| inside.device.held.leave(&self.inbox, id));
                }
                self.tasks.try_remove(id.slot)
            }
            _ => None,
        }
    }

    /// Its target wants to be asked again, later.
    pub(super) fn hold(&mut self, id: TaskId, errno: i32, holding: Holding) {
        let task = &mut self.tasks[id.slot];
        if let Kind::Fault { deadline, .. } = task.kind {
            self.deadlines.remove(&(deadline, id));
        }
        task.kind = Kind::Held { errno, holding };
        let devices = || task.path.iter().map(|inside| &inside.device);
        // All of them: whoever closes one of their gates must find it.
        let refused = devices().filter(|device| !device.held.enter(&self.inbox, id)).count() > 0;
        if refused || self.stopping {
            self.finish(id, Err(errno));
        } else if devices().any(|device| !device.is_live())
            || matches!(&task.kind, Kind::Held { holding, .. } if holding.is_over())
        {
            self.released(id);
        }
    }

    /// Walks a held task's range again, from its beginning and past no closed gate.
    pub fn released(&mut self, id: TaskId) {
        self.walk_again(id, Past::Nothing, |_| Attempt { again: true, ..Attempt::default() });
    }

    pub fn hold_refused(&mut self, id: TaskId) {
        if let Some(Task { kind: Kind::Held { errno, .. }, generation, .. }) = self.tasks.get(id.slot)
            && *generation == id.generation
        {
            let errno = *errno;
            self.finish(id, Err(errno));
        }
    }

    /// A task has ended: lets go of its devices and goes on with its request.
    pub(super) fn finish(&mut self, id: TaskId, result: Result<(), i32>) {
        if let Err(errno @ (ENOSPC | EDQUOT)) = result
            && self.is_write_in_storage(id)
        {
            let full = |attempt: Attempt| Attempt { full: errno, retries: attempt.retries + 1, ..attempt };
            return self.walk_again(id, Past::Gates, full);
        }
        let Some(task) = self.take(id) else { return };
        if let Kind::Fault { deadline, .. } = task.kind {
            self.deadlines.remove(&(deadline, id));
        }
        if let Err(errno) = result {
            match &task.kind {
                Kind::Ring { file, .. } => self.fail_in(task.active, errno, task.offset, Some(file)),
                Kind::Pool { file, .. } => self.fail_in(task.active, errno, task.offset, Some(file)),
                Kind::Fault { .. } if io_errors::is_of_target(errno) => {
                    self.fail_in(task.active, errno, task.offset, None);
                }
                _ => self.fail(task.active, errno),
            }
        }
        self.actives[task.active].tasks -= 1;
        self.advance(task.active, !task.path.is_empty());
        // Only now: a flush that belongs to the request must not find the device drained meanwhile.
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

    /// Walks a parked task's range again, past the gates of the devices it is inside of.
    pub(super) fn retry(&mut self, id: TaskId) {
        let attempt = match self.tasks.get(id.slot).map(|task| &task.kind) {
            Some(Kind::Fault { .. }) => |before: Attempt| Attempt { retries: before.retries + 1, full: 0, ..before },
            // What was so before a device was suspended need not be so now.
            Some(Kind::Gate) => |before: Attempt| Attempt { retries: before.retries, ..Attempt::default() },
            _ => |before: Attempt| before,
        };
        self.walk_again(id, Past::Gates, attempt);
    }

    fn walk_again(&mut self, id: TaskId, past: Past, attempt: impl FnOnce(Attempt) -> Attempt) {
        let Some(task) = self.take(id) else { return };
        if let Kind::Fault { deadline, .. } = task.kind {
            self.deadlines.remove(&(deadline, id));
        }
        // First, so that a request of very many pieces has room for the one it walks again.
        self.actives[task.active].tasks -= 1;
        if self.actives[task.active].phase == Phase::Main {
            let path = if past == Past::Gates { &task.path[..] } else { &[] };
            let inside: Vec<Arc<Device>> = path.iter().map(|inside| inside.device.clone()).collect();
            self.walk(task.active, task.offset, task.len, &inside, attempt(task.attempt));
        }
        self.advance(task.active, !task.path.is_empty());
        // Only now: between park and pin the task must not be missing from both counts.
        leave(task.path);
    }
}

/// What may not stop a task that is walked again.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Past {
    /// The gates of devices it is inside of.
    Gates,
    Nothing,
}

/// The path for a task that uses what the map named: pinned once more.
fn pinned(path: &[Inside]) -> Vec<Inside> {
    let again = |inside: &Inside| Inside {
        device: inside.device.clone(),
        pin: inside.pin.map(|pin| inside.device.epochs.again(pin)),
    };
    path.iter().map(again).collect()
}

/// The path for a task that waits: counted as parked.
fn parked(path: &[Inside]) -> Vec<Inside> {
    path.iter().for_each(|inside| inside.device.epochs.park());
    path.iter().map(|inside| Inside { device: inside.device.clone(), pin: None }).collect()
}

pub(super) fn leave(path: Vec<Inside>) {
    for Inside { device, pin } in path {
        match pin {
            Some(pin) => device.epochs.unpin(pin),
            None => device.epochs.unpark(),
        }
    }
}
