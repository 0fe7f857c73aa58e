//! The queue: a loop's requests that could not be done at once.
//!
//! A request is walked piece by piece; each piece that takes time becomes a `Task`: an I/O in the
//! ring, a chore in the pool, a fault at the mapper, or a wait at a suspended device's gate. The
//! request ends when its last task has, with the first error. A task that uses what a map named
//! holds pins of every device on its path; a parked one counts as parked there instead, so that the
//! mapper may wait for the pins (see `epoch`). At most `MOST_TASKS` of a request run at once; what is
//! left of its range waits in `todo`.
//!
//! Owned by one loop thread; other threads reach it through the loop's inbox only.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use blkloom_io::{Completion, File, Ring, Stretch, errno::EIO, errno::ESHUTDOWN, errno::ETIMEDOUT};
use blkloom_map::Place;
use slab::Slab;

use crate::device::{Device, Kinds, Mapping, Refused};
use crate::epoch::Pin;
use crate::fault::{Answer, Fault, Payload};
use crate::inbox::{Inbox, Message, TaskId};
use crate::pool::{BlockShare, Chore, Pool, Work};
use crate::request::{Found, Memory, Request};
use crate::stats::{Op, Shard};

const MOST_TASKS: u32 = 256;
/// A fault answered "retry" this often without the map helping is an error of the target.
const MOST_RETRIES: u32 = 100;
/// Memory is zeroed by so much a piece, and a piece of it counts as so many.
const ZERO_STEP: u64 = 64 << 20;
const ZERO_COST: u32 = 1024;
/// Pieces walked before the loop looks after its other requests.
const MOST_PIECES: u32 = 4096;
/// Extents a request gathers before it is cut short.
const MOST_FOUND: usize = 16384;

/// A request that has ended.
pub struct Ended {
    pub request: Request,
    pub error: i32,
    pub found: Vec<Found>,
}

struct Active {
    request: Request,
    /// Ranges of the device not walked yet, last first.
    todo: Vec<(u64, u64)>,
    tasks: u32,
    error: i32,
    phase: Phase,
    found: Vec<Found>,
    /// A durable write left something to the flush that follows it.
    unflushed: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Main,
    /// Data files are being synced.
    Sync,
    /// Targets that asked for it flush.
    Owners,
}

/// A device a task is inside of.
struct Inside {
    device: Arc<Device>,
    /// None: parked.
    pin: Option<Pin>,
}

struct Task {
    active: usize,
    generation: u32,
    /// Of the request's device.
    offset: u64,
    len: u64,
    path: Vec<Inside>,
    kind: Kind,
    retries: u32,
}

enum Kind {
    Ring {
        file: Arc<File>,
        at: u64,
        done: u64,
        write: bool,
        durable: bool,
        _share: BlockShare,
    },
    Pool {
        sparse: bool,
    },
    Fault {
        deadline: Instant,
    },
    Gate,
    /// The loop's next turn goes on with it.
    Later,
}

pub struct Queue {
    ring: Option<Ring>,
    pool: Arc<Pool>,
    inbox: Arc<Inbox>,
    shard: Shard,
    actives: Slab<Active>,
    tasks: Slab<Task>,
    generation: u32,
    deadlines: BTreeSet<(Instant, TaskId)>,
    completions: Vec<Completion>,
    ended: Vec<Ended>,
    /// The engine is closing: nobody waits at a gate any more.
    stopping: bool,
}

/// What a piece is part of, while the devices above it are walked.
struct Walk<'a> {
    active: usize,
    path: &'a mut Vec<Inside>,
    /// Devices a retried task is inside of already: their gates do not stop it.
    inside: &'a [Arc<Device>],
    retries: u32,
    pieces: u32,
}

impl Queue {
    pub fn new(ring: Option<Ring>, pool: Arc<Pool>, inbox: Arc<Inbox>, shard: Shard) -> Queue {
        Queue {
            ring,
            pool,
            inbox,
            shard,
            actives: Slab::new(),
            tasks: Slab::new(),
            generation: 0,
            deadlines: BTreeSet::new(),
            completions: Vec::new(),
            ended: Vec::new(),
            stopping: false,
        }
    }

    pub fn is_idle(&self) -> bool {
        self.actives.is_empty() && self.ended.is_empty()
    }

    /// When `expire` must be called next.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    pub fn take_ended(&mut self, into: &mut Vec<Ended>) {
        into.append(&mut self.ended);
    }

    /// Starts a request. Its range was checked against the device's size.
    pub fn submit(&mut self, request: Request) {
        let range = (request.offset + request.done, request.len - request.done);
        let flush = request.op == Op::Flush;
        let active = self.actives.insert(Active {
            todo: if flush || range.1 == 0 { Vec::new() } else { vec![range] },
            request,
            tasks: 0,
            error: 0,
            phase: Phase::Main,
            found: Vec::new(),
            unflushed: false,
        });
        self.advance(active, false);
    }

    /// Fails what waits at gates, now and from now on: the engine closes, and nobody may ever open them.
    pub fn stop(&mut self) {
        self.stopping = true;
        let at_gates = self.tasks.iter().filter(|(_, task)| matches!(task.kind, Kind::Gate));
        let ids: Vec<TaskId> = at_gates.map(|(slot, task)| TaskId { slot, generation: task.generation }).collect();
        ids.into_iter().for_each(|id| self.finish(id, Err(ESHUTDOWN)));
    }

    /// Walks what is left of a request, moves to its next phase, or ends it. `inside`: a task that has
    /// just ended still holds the request's device, so a closed gate does not concern what follows.
    fn advance(&mut self, index: usize, inside: bool) {
        loop {
            let active = &mut self.actives[index];
            if active.error != 0 || active.found.len() >= MOST_FOUND {
                active.todo.clear();
            }
            if active.tasks >= MOST_TASKS {
                return;
            }
            if let Some((offset, len)) = active.todo.pop() {
                self.walk(index, offset, len, &[], 0);
                continue;
            }
            if active.tasks > 0 {
                return;
            }
            let flushes = active.unflushed || must_flush(&active.request);
            match active.phase {
                Phase::Main if flushes && active.error == 0 => {
                    active.phase = Phase::Sync;
                    self.sync(index, inside);
                }
                Phase::Sync if active.error == 0 => {
                    active.phase = Phase::Owners;
                    self.flush_owners(index);
                }
                _ => return self.end(index),
            }
        }
    }

    fn end(&mut self, index: usize) {
        let mut active = self.actives.remove(index);
        active.found.sort_unstable_by_key(|found| found.offset);
        self.ended.push(Ended { request: active.request, error: active.error, found: active.found });
    }

    fn fail(&mut self, index: usize, errno: i32) {
        let active = &mut self.actives[index];
        if active.error == 0 {
            active.error = errno;
        }
    }

    // Walking

    fn walk(&mut self, active: usize, offset: u64, len: u64, inside: &[Arc<Device>], retries: u32) {
        let device = self.actives[active].request.device.clone();
        let mut path = Vec::new();
        let mut walk = Walk { active, path: &mut path, inside, retries, pieces: 0 };
        let done = self.descend(&mut walk, &device, offset, offset, len);
        if done < len {
            self.actives[active].todo.push((offset + done, len - done));
        }
    }

    /// Walks `len` bytes from `at` on of `device`, which are those from `root` on of the request's
    /// device. Returns how many were dealt with; fewer when the request has enough tasks.
    fn descend(&mut self, walk: &mut Walk<'_>, device: &Arc<Device>, root: u64, at: u64, len: u64) -> u64 {
        let through = self.actives[walk.active].request.flags.through_gate && walk.path.is_empty()
            || walk.inside.iter().any(|known| Arc::ptr_eq(known, device));
        let pin = if through { Ok(device.epochs.pin(self.shard)) } else { device.enter(self.shard) };
        let pin = match pin {
            Ok(pin) => pin,
            Err(Refused::Suspended) => {
                self.wait_at_gate(walk, device, root, len);
                return len;
            }
            Err(refused) => {
                self.fail(walk.active, refused.errno());
                return len;
            }
        };
        walk.path.push(Inside { device: device.clone(), pin: Some(pin) });
        let done = match device.mapping.load_full() {
            Some(mapping) => self.pieces(walk, &mapping, root, at, len),
            None => {
                self.fail(walk.active, Refused::Closed.errno());
                len
            }
        };
        walk.path.pop();
        device.epochs.unpin(pin);
        done
    }

    fn pieces(&mut self, walk: &mut Walk<'_>, mapping: &Mapping, root: u64, at: u64, len: u64) -> u64 {
        let mut done = 0;
        while done < len {
            let active = &self.actives[walk.active];
            let op = active.request.op;
            let enough =
                op == Op::Extents && (active.request.flags.one && done > 0 || active.found.len() >= MOST_FOUND);
            if enough || active.error != 0 {
                return len;
            }
            if active.tasks >= MOST_TASKS {
                return done;
            }
            walk.pieces += 1;
            if walk.pieces > MOST_PIECES {
                self.rest_later(walk, root + done, len - done);
                return len;
            }
            let Some(mut piece) = mapping.map.lookup(at + done, len - done) else {
                self.fail(walk.active, EIO);
                return len;
            };
            if let Place::Memory { offset, .. } = piece.place
                && matches!(op, Op::Discard | Op::WriteZeroes)
            {
                // Ends with a page, so that none stays for having been zeroed by halves.
                piece.len = piece.len.min(ZERO_STEP - offset % ZERO_STEP);
                walk.pieces += (piece.len / ZERO_STEP) as u32 * ZERO_COST;
            }
            match piece.place {
                Place::Device { device: lower, offset, writable } if writable || !op.writes() => {
                    let part = self.descend(walk, lower, root + done, offset, piece.len);
                    if part < piece.len {
                        return done + part;
                    }
                }
                place => self.piece(walk, piece.owner, place, root + done, at + done, piece.len),
            }
            done += piece.len;
        }
        done
    }

    /// One leaf: done here, or made a task.
    fn piece(&mut self, walk: &mut Walk<'_>, owner: u32, place: Place<'_, Kinds>, root: u64, at: u64, len: u64) {
        let request = &self.actives[walk.active].request;
        let (op, flags) = (request.op, request.flags);
        let memory = match op {
            Op::Read | Op::Write => request.memory.slice().part((root - request.offset) as usize, len as usize),
            _ => blkloom_io::Slice::empty(),
        };
        let owners = flags.fua && request.device.has_owners();
        let durable = flags.fua && !owners;
        // Remembered: a swap may take the owners away before the request ends.
        self.actives[walk.active].unflushed |= owners && op == Op::Write;
        match (op, place) {
            (Op::Cache, Place::Data { file, offset, .. }) => {
                self.chore(walk, file, Chore::Prefetch { offset, len }, root, len);
            }
            (Op::Cache, _) => {}
            (_, Place::Error(errno)) if op != Op::Extents => self.fail(walk.active, errno),
            (Op::Read, Place::Data { file, offset, .. }) => {
                if file.fits(offset, memory) {
                    self.transfer(walk, file, offset, root, len, false, false, None);
                } else {
                    self.chore(walk, file, Chore::Read { offset, into: memory }, root, len);
                }
            }
            (Op::Read, Place::Memory { region, offset }) => region.read(offset, memory),
            (Op::Read, Place::Zero { .. }) => memory.zero(),
            (Op::Write, Place::Data { file, offset, writable: true, .. }) => {
                let share = file.fits(offset, memory).then(|| file.share_blocks(offset, len)).flatten();
                match share {
                    Some(share) => self.transfer(walk, file, offset, root, len, true, durable, share),
                    None => self.chore(walk, file, Chore::Write { offset, from: memory, durable }, root, len),
                }
            }
            (Op::Write, Place::Memory { region, offset }) => region.write(offset, memory),
            (Op::Write | Op::Discard | Op::WriteZeroes, Place::Zero { discard_writes: true }) => {}
            (Op::Discard, Place::Data { file, offset, writable: true, punch: true }) => {
                self.chore(walk, file, Chore::Punch { offset, len }, root, len);
            }
            (Op::WriteZeroes, Place::Data { file, offset, writable: true, punch: true }) => {
                let chore = Chore::Zero { offset, len, unmap: flags.unmap, fast: flags.fast };
                self.chore(walk, file, chore, root, len);
            }
            (Op::Discard | Op::WriteZeroes, Place::Memory { region, offset }) => {
                if let Err(errno) = region.zero(offset, len, op == Op::Discard || flags.unmap) {
                    self.fail(walk.active, errno);
                }
            }
            (Op::Extents, Place::Data { file, offset, .. }) => {
                let most = if flags.one { 1 } else { MOST_FOUND };
                self.chore(walk, file, Chore::Stretches { offset, len, most }, root, len);
            }
            (Op::Extents, Place::Memory { region, offset }) => {
                let mut done = 0;
                let found = &mut self.actives[walk.active].found;
                while done < len && found.len() < MOST_FOUND {
                    let (run, written) = region.run(offset + done, len - done);
                    found.push(Found { offset: root + done, len: run, flags: if written { 0 } else { 3 } });
                    done += run;
                }
            }
            (Op::Extents, Place::Zero { .. }) => {
                self.actives[walk.active].found.push(Found { offset: root, len, flags: 3 })
            }
            (Op::Extents, Place::Error(_)) => {
                self.actives[walk.active].found.push(Found { offset: root, len, flags: 0 })
            }
            _ => self.fault(walk, owner, op, root, at, len),
        }
    }

    // Tasks

    fn task(&mut self, walk: &Walk<'_>, offset: u64, len: u64, path: Vec<Inside>, kind: Kind) -> TaskId {
        self.generation = self.generation.wrapping_add(1);
        self.actives[walk.active].tasks += 1;
        let task =
            Task { active: walk.active, generation: self.generation, offset, len, path, kind, retries: walk.retries };
        TaskId { slot: self.tasks.insert(task), generation: self.generation }
    }

    #[allow(clippy::too_many_arguments, reason = "one private call a direction; a struct would only be unpacked again")]
    fn transfer(
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
        let kind = Kind::Ring { file: file.clone(), at, done: 0, write, durable, _share: share };
        let id = self.task(walk, root, len, pinned(walk.path), kind);
        self.push(id, true);
    }

    /// Hands (the rest of) a transfer to the ring, or to the pool where the ring cannot take it.
    fn push(&mut self, id: TaskId, use_ring: bool) {
        let task = &self.tasks[id.slot];
        let Kind::Ring { file, at, done, write, durable, .. } = &task.kind else {
            return;
        };
        let request = &self.actives[task.active].request;
        let (skip, rest) = ((task.offset - request.offset + done) as usize, (task.len - done) as usize);
        let memory = request.memory.slice().part(skip, rest);
        let (file, at, write, durable) = (file.clone(), at + done, *write, *durable);
        let pushed = match &mut self.ring {
            Some(ring) if use_ring && !ring.is_full() && file.fits(at, memory) => match write {
                true => ring.write(&file, at, memory, durable, id.slot as u64).is_ok(),
                false => ring.read(&file, at, memory, id.slot as u64).is_ok(),
            },
            _ => false,
        };
        if !pushed {
            let chore = match write {
                true => Chore::Write { offset: at, from: memory, durable },
                false => Chore::Read { offset: at, into: memory },
            };
            // The share of the blocks that the task holds would be in a write's own way.
            self.tasks[id.slot].kind = Kind::Pool { sparse: false };
            self.pool.submit(file, chore, self.inbox.clone(), id);
        }
    }

    fn chore(&mut self, walk: &Walk<'_>, file: &Arc<File>, chore: Chore, root: u64, len: u64) {
        let kind = Kind::Pool { sparse: matches!(chore, Chore::Stretches { .. }) };
        let id = self.task(walk, root, len, pinned(walk.path), kind);
        self.pool.submit(file.clone(), chore, self.inbox.clone(), id);
    }

    fn fault(&mut self, walk: &Walk<'_>, owner: u32, op: Op, root: u64, at: u64, len: u64) {
        let Some(last) = walk.path.last() else { return };
        if walk.retries >= MOST_RETRIES {
            return self.fail(walk.active, EIO);
        }
        let device = last.device.clone();
        device.stats.fault(self.shard);
        let deadline = Instant::now() + device.fault_timeout;
        let id = self.task(walk, root, len, parked(walk.path), Kind::Fault { deadline });
        self.deadlines.insert((deadline, id));
        let request = &self.actives[walk.active].request;
        let skip = root.wrapping_sub(request.offset) as usize;
        let payload = match (&request.memory, op) {
            (Memory::Owned(buffer), Op::Write) => Payload::Shared { buffer: buffer.clone(), at: skip },
            (Memory::Borrowed(slice), Op::Write) => Payload::Copied(slice.part(skip, len as usize).to_vec()),
            _ => Payload::None,
        };
        let (flags, inbox) = (request.flags, self.inbox.clone());
        device.faults.push(Fault { op, owner, offset: at, len, flags, payload, inbox, task: id, answered: false });
    }

    fn wait_at_gate(&mut self, walk: &Walk<'_>, device: &Arc<Device>, root: u64, len: u64) {
        if self.stopping {
            return self.fail(walk.active, ESHUTDOWN);
        }
        let id = self.task(walk, root, len, parked(walk.path), Kind::Gate);
        if !device.wait_at_gate(&self.inbox, id) {
            self.inbox.send(Message::GateOpened(id));
        }
    }

    /// Leaves a range for the loop's next turn.
    fn rest_later(&mut self, walk: &Walk<'_>, root: u64, len: u64) {
        let id = self.task(walk, root, len, parked(walk.path), Kind::Later);
        self.inbox.send(Message::GateOpened(id));
    }

    fn take(&mut self, id: TaskId) -> Option<Task> {
        match self.tasks.get(id.slot) {
            Some(task) if task.generation == id.generation => self.tasks.try_remove(id.slot),
            _ => None,
        }
    }

    /// A task has ended: lets go of its devices and goes on with its request.
    fn finish(&mut self, id: TaskId, result: Result<(), i32>) {
        let Some(task) = self.take(id) else { return };
        if let Kind::Fault { deadline } = task.kind {
            self.deadlines.remove(&(deadline, id));
        }
        if let Err(errno) = result {
            self.fail(task.active, errno);
        }
        self.actives[task.active].tasks -= 1;
        self.advance(task.active, !task.path.is_empty());
        // Only now: a flush that belongs to the request must not find the device drained meanwhile.
        leave(task.path);
    }

    /// Walks a parked task's range again, past the gates of the devices it is inside of.
    fn retry(&mut self, id: TaskId) {
        let Some(task) = self.take(id) else { return };
        let mut retries = task.retries;
        if let Kind::Fault { deadline } = task.kind {
            self.deadlines.remove(&(deadline, id));
            retries += 1;
        }
        // First, so that a request of very many pieces has room for the one it walks again.
        self.actives[task.active].tasks -= 1;
        if self.actives[task.active].phase == Phase::Main {
            let inside: Vec<Arc<Device>> = task.path.iter().map(|inside| inside.device.clone()).collect();
            self.walk(task.active, task.offset, task.len, &inside, retries);
        }
        self.advance(task.active, !task.path.is_empty());
        // Only now: between park and pin the task must not be missing from both counts.
        leave(task.path);
    }

    // Flushing

    fn sync(&mut self, index: usize, inside: bool) {
        let device = self.actives[index].request.device.clone();
        // A flush changes no place, so it enters only the request's own device: what is below may
        // be suspended, and syncing its files then is harmless.
        let gate_open = self.actives[index].request.flags.through_gate || inside;
        let pin = if gate_open { Ok(device.epochs.pin(self.shard)) } else { device.enter(self.shard) };
        let mut path = Vec::new();
        let walk = Walk { active: index, path: &mut path, inside: &[], retries: 0, pieces: 0 };
        match pin {
            Err(Refused::Suspended) => {
                self.actives[index].phase = Phase::Main;
                self.wait_at_gate(&walk, &device, 0, 0);
            }
            Err(refused) => self.fail(index, refused.errno()),
            Ok(pin) => {
                walk.path.push(Inside { device: device.clone(), pin: Some(pin) });
                for file in files(&device) {
                    self.chore(&walk, &file, Chore::Sync, 0, 0);
                }
                if self.actives[index].tasks == 0 {
                    // Here, while the device is pinned.
                    self.actives[index].phase = Phase::Owners;
                    self.flush_owners(index);
                }
                device.epochs.unpin(pin);
            }
        }
    }

    fn flush_owners(&mut self, index: usize) {
        let device = self.actives[index].request.device.clone();
        let mut owners = Vec::new();
        collect_owners(&device, &mut owners);
        for (device, owner) in owners {
            let pin = device.epochs.pin(self.shard);
            let mut path = vec![Inside { device: device.clone(), pin: Some(pin) }];
            let walk = Walk { active: index, path: &mut path, inside: &[], retries: 0, pieces: 0 };
            self.fault(&walk, owner, Op::Flush, 0, 0, 0);
            device.epochs.unpin(pin);
        }
    }

    // What comes back

    /// Takes finished ring transfers; goes on with those that came back short.
    pub fn reap(&mut self) -> bool {
        let Some(ring) = &mut self.ring else {
            return false;
        };
        let mut completions = std::mem::take(&mut self.completions);
        ring.reap(&mut completions);
        let any = !completions.is_empty();
        for Completion { key, result } in completions.drain(..) {
            let Some(task) = self.tasks.get_mut(key as usize) else {
                continue;
            };
            let id = TaskId { slot: key as usize, generation: task.generation };
            let Kind::Ring { done, .. } = &mut task.kind else {
                continue;
            };
            match result {
                -4 => self.push(id, true),
                // Out of requests, or a descriptor that is O_NONBLOCK: again, but not in circles.
                -11 => self.push(id, false),
                ..0 => self.finish(id, Err(-result)),
                // The end of the file inside the device: somebody truncated it.
                0 => self.finish(id, Err(EIO)),
                moved => {
                    *done += moved as u64;
                    if *done < task.len { self.push(id, true) } else { self.finish(id, Ok(())) }
                }
            }
        }
        self.completions = completions;
        any
    }

    /// The kernel was too busy to take all that waits in the ring: `submit_ring` must be called again.
    pub fn is_unsubmitted(&self) -> bool {
        self.ring.as_ref().is_some_and(Ring::is_unsubmitted)
    }

    pub fn submit_ring(&mut self) {
        if let Some(ring) = &mut self.ring
            && let Err(error) = ring.submit()
        {
            // The ring is unusable; what is queued in it cannot be recalled, so it is tried again on
            // the next turn, and the error is for whoever watches the process.
            debug_assert!(false, "io_uring_enter: {error}");
        }
    }

    pub fn worked(&mut self, id: TaskId, work: Work) {
        let Some(task) = self.tasks.get(id.slot).filter(|task| task.generation == id.generation) else {
            return;
        };
        let result = match work {
            Work::Ended(result) => result,
            Work::Stretches(Ok(stretches)) => {
                debug_assert!(matches!(task.kind, Kind::Pool { sparse: true }));
                let mut offset = task.offset;
                let found = &mut self.actives[task.active].found;
                found.extend(stretches.iter().map(|&Stretch { len, hole }| {
                    offset += len;
                    Found { offset: offset - len, len, flags: if hole { 3 } else { 0 } }
                }));
                Ok(())
            }
            Work::Stretches(Err(errno)) => Err(errno),
        };
        self.finish(id, result);
    }

    pub fn answered(&mut self, id: TaskId, answer: Answer) {
        let Some(task) = self.tasks.get(id.slot).filter(|task| task.generation == id.generation) else {
            return;
        };
        let active = &mut self.actives[task.active];
        let op = if active.phase == Phase::Main { active.request.op } else { Op::Flush };
        let result = match answer {
            Answer::Retry if op == Op::Flush => Ok(()),
            Answer::Retry => return self.retry(id),
            Answer::Fail(errno) => Err(errno),
            Answer::Done(bytes) if op == Op::Read => match bytes {
                Some(bytes) if bytes.len() as u64 == task.len => {
                    let at = (task.offset - active.request.offset) as usize;
                    active.request.memory.slice().part(at, bytes.len()).copy_from(&bytes);
                    Ok(())
                }
                _ => Err(EIO),
            },
            Answer::Done(_) if op == Op::Extents => Err(EIO),
            Answer::Done(_) => Ok(()),
            Answer::Extents(_) if op != Op::Extents => Err(EIO),
            Answer::Extents(extents) => {
                let (mut offset, end) = (task.offset, task.offset + task.len);
                for (len, flags) in extents {
                    let len = len.min(end - offset);
                    if len == 0 {
                        break;
                    }
                    active.found.push(Found { offset, len, flags });
                    offset += len;
                }
                Ok(())
            }
        };
        self.finish(id, result);
    }

    pub fn gate_opened(&mut self, id: TaskId) {
        self.retry(id);
    }

    /// Fails faults whose time is over.
    pub fn expire(&mut self, now: Instant) {
        while let Some(&(deadline, id)) = self.deadlines.first()
            && deadline <= now
        {
            self.deadlines.remove(&(deadline, id));
            self.finish(id, Err(ETIMEDOUT));
        }
    }
}

/// Whether a request ends with a flush. A durable write of plain files is durable by itself.
fn must_flush(request: &Request) -> bool {
    match request.op {
        Op::Flush => true,
        Op::Write => request.flags.fua && request.device.has_owners(),
        Op::Discard | Op::WriteZeroes => request.flags.fua && request.device.needs_flush(),
        _ => false,
    }
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

fn leave(path: Vec<Inside>) {
    for Inside { device, pin } in path {
        match pin {
            Some(pin) => device.epochs.unpin(pin),
            None => device.epochs.unpark(),
        }
    }
}

/// Every file a write to `device` may have reached.
fn files(device: &Device) -> Vec<Arc<File>> {
    let Some(mapping) = device.mapping.load_full() else {
        return Vec::new();
    };
    let below = mapping.lower.iter().flat_map(|lower| files(lower));
    mapping.files.iter().cloned().chain(below).collect()
}

/// Targets to flush, those of lower devices first.
fn collect_owners(device: &Arc<Device>, into: &mut Vec<(Arc<Device>, u32)>) {
    let Some(mapping) = device.mapping.load_full() else {
        return;
    };
    mapping.lower.iter().for_each(|lower| collect_owners(lower, into));
    into.extend(mapping.map.flush_owners().iter().map(|&owner| (device.clone(), owner)));
}
