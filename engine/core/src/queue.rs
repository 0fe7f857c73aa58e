//! The queue: the requests of a loop that must wait for something.
//!
//! The queue walks a request's range piece by piece. Each piece that must wait becomes a `Task`: an I/O in the ring, a
//! job in the pool, a fault at the mapper, a fault that its target deferred, an operation of a backend, requests to the
//! devices of a tee, a wait for an instant, or a wait at the gate of a suspended device. The request ends when its last
//! task ends, with the first error.
//!
//! A task that uses the result of a lookup holds a pin of every device on its path. A waiting task is counted as
//! waiting there instead, so that the mapper may wait for the pins (see `epoch`). At most `MOST_TASKS` tasks of a
//! request exist at once; the rest of its range waits in `todo`.
//!
//! One loop thread owns the queue. Other threads reach it only through the loop's mailbox (`Ports`).

mod backend;
mod bounce;
mod flush;
mod task;
mod tee;
mod wait;
mod walk;
mod withdraw;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use blkloom_io::{BounceBuffer, Busy, Completion, Errno, File, FileExtent, Ring, Syncing};
use slab::Slab;
use smallvec::{SmallVec, smallvec};

use self::bounce::Bounce;
use self::flush::must_flush;
use crate::backend::Backend;
use crate::deferred::Deferral;
use crate::device::Device;
use crate::epoch::Pin;
use crate::fault::{Answer, Answered};
use crate::filter::Counted;
use crate::io_errors;
use crate::mailbox::{Mailbox, Poster};
use crate::operation::Found;
use crate::pool::{BlockShare, JobDone, JobResult, Pool};
use crate::request::{Owner, Request};
use crate::stats::{Op, Shard};
use crate::tee::Writing;
use crate::wake::{TaskId, Wake};

const MOST_TASKS: u32 = 256;
/// Tasks for which `reserve` allocates memory, for each request.
const TASKS_EACH: usize = 3;
/// Most extents in the answer of a block status request. The answer covers a shorter range if there are more.
pub(crate) const MOST_FOUND: usize = 16384;

/// A request that has ended.
pub struct Ended {
    pub request: Request,
    pub error: Option<Errno>,
    pub found: Vec<Found>,
}

struct Active {
    request: Request,
    /// Ranges of the device that are not walked yet, last first: (offset, length, delays that the range has waited
    /// for).
    todo: SmallVec<[(u64, u64, u32); 2]>,
    tasks: u32,
    error: Option<Errno>,
    /// If storage failed: the offset in the device, and the file.
    failure: Option<(u64, Option<Arc<File>>)>,
    phase: Phase,
    found: Vec<Found>,
    /// A durable write (FUA) must be followed by a flush.
    unflushed: bool,
    /// A copy of the request's bytes, if they are in a registered buffer and an extent needs them.
    bounce: Option<Bounce>,
    /// Files use the copy, too.
    bounced: bool,
    /// It has passed a filter that sends reads elsewhere if they fail, or has gone to the devices of a tee.
    retries: bool,
    /// It has failed: such filters send it elsewhere, and tees to their backends.
    elsewhere: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Main,
    /// Data files are being synced.
    Sync,
    /// Targets that receive flushes are flushing.
    Owners,
}

/// The devices from the request's device down to the one that a task uses. Deeper stacks are in memory of their own.
type Path = SmallVec<[Inside; 4]>;

/// A device that a task is inside of.
struct Inside {
    device: Arc<Device>,
    /// None: counted as waiting.
    pin: Option<Pin>,
}

struct Task {
    active: usize,
    generation: u32,
    /// In the request's device.
    offset: u64,
    len: u64,
    path: Path,
    kind: Kind,
    attempt: Attempt,
}

/// Results of earlier attempts to execute a piece.
#[derive(Clone, Copy, Default)]
struct Attempt {
    /// Number of consecutive "retry" answers.
    retries: u32,
    /// The target deferred the piece before.
    again: bool,
    /// Storage had no space for the write. The target is asked to handle that.
    no_space: Option<Errno>,
    /// Number of filters on the path that let the piece pass already: the last of them after a wait.
    filters: u32,
}

enum Kind {
    Ring {
        file: Busy<Arc<File>>,
        at: u64,
        done: u64,
        write: bool,
        durable: bool,
        /// While a durable write is in the ring.
        syncing: Option<Syncing<Arc<File>>>,
        _share: BlockShare,
    },
    Pool {
        file: Arc<File>,
    },
    Fault {
        deadline: Instant,
        /// If set, the task ends with this errno, whatever the answer is.
        outcome: Option<Errno>,
    },
    Deferred {
        errno: Errno,
        deferral: Deferral,
        /// The latest time at which the target is asked again.
        until: Option<Instant>,
    },
    /// A backend has the operation.
    Backend {
        backend: Arc<dyn Backend>,
        /// None: the backend has a timeout of its own.
        deadline: Option<Instant>,
        /// The backend has completed it: there is nothing to cancel.
        answered: bool,
    },
    /// Requests to the devices of a tee.
    Tee {
        /// How many have not ended.
        left: usize,
        /// The first.
        error: Option<Errno>,
        /// None for a flush.
        writing: Option<Writing>,
    },
    /// A copy between a registered buffer and the request's bounce buffer.
    Copy {
        done: u64,
    },
    /// A wait in a filter.
    Wait {
        until: Instant,
        /// `Attempt::filters` afterwards.
        filters: u32,
        _counted: Option<Counted>,
    },
    /// A wait at a closed gate.
    Gate,
    /// Continued in the loop's next iteration.
    NextIteration,
}

impl Kind {
    /// The time of its entry in the queue's timers.
    fn timer(&self) -> Option<Instant> {
        match self {
            Kind::Fault { deadline, .. } => Some(*deadline),
            Kind::Backend { deadline, .. } => *deadline,
            Kind::Deferred { until, .. } => *until,
            Kind::Wait { until, .. } => Some(*until),
            _ => None,
        }
    }
}

/// Senders for messages to the queue's tasks, one per kind of message. All post to the loop's mailbox.
pub struct Ports {
    results: Poster<JobDone>,
    answers: Poster<Answered>,
    wakes: Poster<Wake>,
}

impl Ports {
    pub fn of<T>(mailbox: &Arc<Mailbox<T>>) -> Ports
    where
        T: From<JobDone> + From<Answered> + From<Wake> + Send + 'static,
    {
        Ports { results: mailbox.clone(), answers: mailbox.clone(), wakes: mailbox.clone() }
    }
}

pub struct Queue {
    ring: Option<Ring>,
    /// `io_uring_enter` failed: the ring accepts no more I/O. I/O submitted before still completes in the ring.
    ring_is_lost: bool,
    pool: Arc<Pool>,
    ports: Ports,
    shard: Shard,
    actives: Slab<Active>,
    tasks: Slab<Task>,
    generation: u32,
    /// Timeouts of faults and backend operations, and ends of waits.
    timers: BTreeSet<(Instant, TaskId)>,
    completions: Vec<Completion>,
    ended: Vec<Ended>,
    /// Free bounce buffers.
    bounces: Vec<BounceBuffer>,
    /// Requests in flight that need no allocation: see `reserve`.
    reserved: usize,
    /// The engine is closing: requests no longer wait at a gate.
    stopping: bool,
}

/// State of a walk from the request's device down to the current piece.
struct Walk<'a> {
    active: usize,
    path: &'a mut Path,
    /// Devices that a retried task is inside of already: their gates do not stop it.
    inside: &'a [Inside],
    attempt: Attempt,
    pieces: u32,
    /// Number of filters between the request's device and the piece.
    filters: u32,
}

impl Queue {
    pub fn new(ring: Option<Ring>, pool: Arc<Pool>, ports: Ports, shard: Shard) -> Queue {
        let completions = Vec::with_capacity(ring.as_ref().map_or(0, Ring::limit));
        Queue {
            ring,
            ring_is_lost: false,
            pool,
            ports,
            shard,
            actives: Slab::new(),
            tasks: Slab::new(),
            generation: 0,
            timers: BTreeSet::new(),
            completions,
            ended: Vec::new(),
            bounces: Vec::new(),
            reserved: 0,
            stopping: false,
        }
    }

    /// Allocates memory for so many more requests in flight. They need no other while their tasks are I/O of files and
    /// waits at gates, and while a flush concerns at most `TASKS_EACH` files.
    pub fn reserve(&mut self, requests: usize) {
        self.reserved += requests;
        self.actives.reserve(self.reserved);
        self.ended.reserve(self.reserved);
        self.tasks.reserve(self.reserved_tasks());
        self.pool.reserve(requests * TASKS_EACH);
    }

    /// Undoes a `reserve`. Memory that was allocated is kept for later requests.
    pub fn release(&mut self, requests: usize) {
        self.reserved -= requests;
        self.pool.release(requests * TASKS_EACH);
    }

    /// Tasks for which memory is reserved. Each is sent one message at a time.
    pub fn reserved_tasks(&self) -> usize {
        self.reserved * TASKS_EACH
    }

    /// Whether a request must wait for the end of one of its tasks before it starts another.
    fn has_enough_tasks(&self, index: usize) -> bool {
        let tasks = self.actives[index].tasks;
        // Every request can have one task; the others share the rest.
        tasks >= MOST_TASKS
            || self.reserved > 0 && tasks > 0 && self.tasks.capacity() - self.tasks.len() <= self.reserved
    }

    pub fn is_idle(&self) -> bool {
        self.actives.is_empty() && self.ended.is_empty()
    }

    /// When `run_timers` must be called next.
    pub fn next_timer(&self) -> Option<Instant> {
        self.timers.first().map(|(at, _)| *at)
    }

    pub fn take_ended(&mut self, into: &mut Vec<Ended>) {
        into.append(&mut self.ended);
    }

    /// Starts a request. The caller has checked its range against the device's size.
    pub fn submit(&mut self, request: Request) {
        let range = (request.offset + request.done, request.len - request.done);
        let flush = request.op == Op::Flush;
        let active = self.actives.insert(Active {
            todo: if flush || range.1 == 0 { smallvec![] } else { smallvec![(range.0, range.1, 0)] },
            tasks: 0,
            error: if request.memory.fits(request.op, request.len) { None } else { Some(Errno::INVAL) },
            request,
            failure: None,
            phase: Phase::Main,
            found: Vec::new(),
            unflushed: false,
            bounce: None,
            bounced: false,
            retries: false,
            elsewhere: false,
        });
        self.advance(active, false);
    }

    /// Fails requests that wait at a gate or are deferred, now and later, because the engine closes and the gates may
    /// never open. Requests that wait for an instant continue at once.
    pub fn stop(&mut self) {
        self.stopping = true;
        let waiting = self.tasks.iter().filter(|(_, task)| matches!(task.kind, Kind::Wait { .. }));
        let ids: Vec<TaskId> = waiting.map(|(slot, task)| TaskId { slot, generation: task.generation }).collect();
        ids.into_iter().for_each(|id| self.retry(id));
        let waiting = self.tasks.iter().filter(|(_, task)| matches!(task.kind, Kind::Gate | Kind::Deferred { .. }));
        let ids: Vec<TaskId> = waiting.map(|(slot, task)| TaskId { slot, generation: task.generation }).collect();
        ids.into_iter().for_each(|id| self.finish(id, Err(Errno::SHUTDOWN)));
    }

    /// Walks the rest of a request, starts its next phase, or ends it. `inside`: a task that has just ended still keeps
    /// the request inside its device, so the device's gate does not stop the next phase.
    fn advance(&mut self, index: usize, inside: bool) {
        loop {
            let active = &mut self.actives[index];
            if active.error.is_some() || active.found.len() >= MOST_FOUND {
                active.todo.clear();
            }
            if self.has_enough_tasks(index) {
                return;
            }
            let active = &mut self.actives[index];
            if let Some((offset, len, filters)) = active.todo.pop() {
                self.walk(index, offset, len, &[], Attempt { filters, ..Attempt::default() });
                continue;
            }
            if active.tasks > 0 || active.error.is_none() && self.copy_back(index) {
                return;
            }
            let active = &mut self.actives[index];
            let flushes = active.unflushed || must_flush(&active.request);
            match active.phase {
                Phase::Main if flushes && active.error.is_none() => {
                    active.phase = Phase::Sync;
                    self.sync(index, inside);
                }
                Phase::Sync if active.error.is_none() => {
                    active.phase = Phase::Owners;
                    self.flush_owners(index);
                }
                Phase::Main | Phase::Sync if active.error.is_some() && active.retries && !active.elsewhere => {
                    let Request { offset, len, done, .. } = active.request;
                    (active.elsewhere, active.error, active.failure) = (true, None, None);
                    if active.phase == Phase::Main && len > done {
                        active.todo.push((offset + done, len - done, 0));
                    }
                    active.phase = Phase::Main;
                }
                _ => return self.end(index),
            }
        }
    }

    fn end(&mut self, index: usize) {
        let mut active = self.actives.remove(index);
        self.keep_bounce(active.bounce.take());
        if let Owner::Tee(task) = active.request.owner {
            return self.leg_ended(task, active.error);
        }
        active.found.sort_unstable_by_key(|found| found.offset);
        if let (Some(errno), Some((offset, file))) = (active.error, active.failure) {
            active.request.device.io_failed(active.request.op, offset, errno, file.as_deref());
        }
        self.ended.push(Ended { request: active.request, error: active.error, found: active.found });
    }

    fn fail(&mut self, index: usize, errno: Errno) {
        let active = &mut self.actives[index];
        if active.error.is_none() {
            active.error = Some(errno);
        }
    }

    /// Fails a request because of an error of storage at `offset` of its device, in `file` if storage is a file.
    fn fail_in(&mut self, index: usize, errno: Errno, offset: u64, file: Option<&Arc<File>>) {
        let active = &mut self.actives[index];
        if active.error.is_none() && io_errors::is_of_storage(errno) {
            active.failure = Some((offset, file.cloned()));
        }
        self.fail(index, errno);
    }

    // Completions of tasks

    /// Processes completions of the ring. Short transfers are continued.
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
            if let Kind::Copy { .. } = task.kind {
                self.copied(id, result);
                continue;
            }
            let Kind::Ring { file, done, durable, syncing, .. } = &mut task.kind else {
                continue;
            };
            let syncing = syncing.take();
            match result {
                Err(Errno::INTR) => self.push(id, true),
                // The kernel is out of requests, or the descriptor is O_NONBLOCK: try another way, not the ring again.
                Err(Errno::AGAIN) if self.actives[task.active].is_registered() => {
                    self.actives[task.active].bounced = true;
                    self.retry(id);
                }
                Err(Errno::AGAIN) => self.push(id, false),
                Err(errno) => match syncing {
                    Some(syncing) => self.examine(id, errno, syncing),
                    None => self.finish(id, Err(errno)),
                },
                // End of file inside the device: the file was truncated.
                Ok(0) => self.finish(id, Err(Errno::IO)),
                Ok(moved) => {
                    *done += moved;
                    let failed = durable.then(|| file.sync_error()).flatten();
                    if let Some(errno) = failed {
                        let unreported = file.has_unreported_failure();
                        self.sync_failed(id, errno, unreported);
                    } else if *done < task.len {
                        self.push(id, true);
                    } else {
                        self.finish(id, Ok(()));
                    }
                }
            }
        }
        self.completions = completions;
        any
    }

    /// The kernel was too busy to accept all submissions: `submit_ring` must be called again.
    pub fn is_unsubmitted(&self) -> bool {
        self.ring.as_ref().is_some_and(Ring::is_unsubmitted)
    }

    /// Whether the kernel is executing I/O of the ring.
    pub fn is_in_storage(&self) -> bool {
        self.ring.as_ref().is_some_and(|ring| !ring.is_idle())
    }

    pub fn submit_ring(&mut self) {
        let Some(ring) = &mut self.ring else {
            return;
        };
        let Err(error) = ring.submit() else {
            return;
        };
        let left = ring.take_back();
        if !std::mem::replace(&mut self.ring_is_lost, true) {
            tracing::warn!(%error, "io_uring_enter failed; this loop goes on with threads");
        }
        for key in left {
            let slot = key as usize;
            if let Some(task) = self.tasks.get(slot) {
                self.push(TaskId { slot, generation: task.generation }, false);
            }
        }
    }

    pub fn job_done(&mut self, JobDone { task: id, result }: JobDone) {
        let Some(task) = self.tasks.get(id.slot).filter(|task| task.generation == id.generation) else {
            return;
        };
        let result = match result {
            JobResult::Ended(result) => result,
            JobResult::SyncFailed { errno, unreported } => return self.sync_failed(id, errno, unreported),
            JobResult::Extents(Ok(extents)) => {
                let mut offset = task.offset;
                let found = &mut self.actives[task.active].found;
                found.extend(extents.iter().map(|&FileExtent { len, hole }| {
                    offset += len;
                    Found { offset: offset - len, len, flags: if hole { 3 } else { 0 } }
                }));
                keep_the_first(found);
                Ok(())
            }
            JobResult::Extents(Err(errno)) => Err(errno),
        };
        self.finish(id, result);
    }

    pub fn answered(&mut self, Answered { task: id, answer }: Answered) {
        let Some(task) = self.tasks.get_mut(id.slot).filter(|task| task.generation == id.generation) else {
            return;
        };
        if let Kind::Fault { outcome: Some(errno), .. } = task.kind {
            return self.finish(id, Err(errno));
        }
        if let Kind::Backend { answered, .. } = &mut task.kind {
            *answered = true;
        }
        let active = &mut self.actives[task.active];
        let op = if active.phase == Phase::Main { active.request.op } else { Op::Flush };
        let result = match answer {
            Answer::Retry if op == Op::Flush => Ok(()),
            Answer::Retry => return self.retry(id),
            Answer::Fail(errno) => Err(errno),
            Answer::Defer { errno, deferral, time } if op != Op::Flush => return self.defer(id, errno, deferral, time),
            Answer::Defer { errno, .. } => Err(errno),
            Answer::Done(bytes) if op == Op::Read => match bytes {
                Some(bytes) if bytes.len() as u64 == task.len => {
                    let at = (task.offset - active.request.offset) as usize;
                    // SAFETY: a read that has not ended.
                    unsafe { active.memory().copy_from(at, &bytes) };
                    active.found_bytes(task.offset, task.len);
                    Ok(())
                }
                _ => Err(Errno::IO),
            },
            Answer::Done(_) if op == Op::Extents => Err(Errno::IO),
            Answer::Done(_) => Ok(()),
            Answer::Extents(_) if op != Op::Extents => Err(Errno::IO),
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
                keep_the_first(&mut active.found);
                Ok(())
            }
        };
        self.finish(id, result);
    }

    pub fn woken(&mut self, wake: Wake) {
        match wake {
            Wake::GateOpened(id) => self.retry(id),
            Wake::Released(id) => self.released(id),
            Wake::Refused(id) => self.refused(id),
        }
    }
}

/// Drops extents beyond `MOST_FOUND`, which the answer cannot contain. Many tasks of a request may find extents at
/// once.
fn keep_the_first(found: &mut Vec<Found>) {
    if found.len() > 2 * MOST_FOUND {
        found.sort_unstable_by_key(|found| found.offset);
        found.truncate(MOST_FOUND);
    }
}
