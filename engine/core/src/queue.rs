//! The queue: a loop's requests that could not be done at once.
//!
//! A request is walked piece by piece; each piece that takes time becomes a `Task`: an I/O in the
//! ring, a chore in the pool, a fault at the mapper, a fault its target holds, or a wait at a suspended
//! device's gate. The request ends when its last task has, with the first error. A task that uses what a map named
//! holds pins of every device on its path; a parked one counts as parked there instead, so that the
//! mapper may wait for the pins (see `epoch`). At most `MOST_TASKS` of a request run at once; what is
//! left of its range waits in `todo`.
//!
//! Owned by one loop thread; other threads reach it through the loop's inbox only.

mod flush;
mod task;
mod walk;
mod withdraw;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use blkloom_io::{Busy, Completion, File, Ring, Stretch, Syncing, errno::EIO, errno::ESHUTDOWN, errno::ETIMEDOUT};
use slab::Slab;

use self::flush::must_flush;
use crate::device::Device;
use crate::epoch::Pin;
use crate::fault::Answer;
use crate::held::Holding;
use crate::inbox::{Inbox, TaskId};
use crate::io_errors;
use crate::pool::{BlockShare, Pool, Work};
use crate::request::{Found, Request};
use crate::stats::{Op, Shard};

const MOST_TASKS: u32 = 256;
/// Extents a request gathers before it is cut short.
pub(crate) const MOST_FOUND: usize = 16384;

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
    /// Where in the device storage failed, and which file, if that is what the error is.
    failure: Option<(u64, Option<Arc<File>>)>,
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
    attempt: Attempt,
}

/// What became of a piece before.
#[derive(Clone, Copy, Default)]
struct Attempt {
    /// Times a fault was answered "retry" since anything else happened.
    retries: u32,
    /// Its target held it before.
    again: bool,
    /// Storage had no space for the write: the errno; the target is to see to it. Else 0.
    full: i32,
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
        sparse: bool,
    },
    Fault {
        deadline: Instant,
        /// The errno it ends with, whatever the answer is.
        outcome: Option<i32>,
    },
    Held {
        errno: i32,
        holding: Holding,
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
    attempt: Attempt,
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
            failure: None,
            phase: Phase::Main,
            found: Vec::new(),
            unflushed: false,
        });
        self.advance(active, false);
    }

    /// Fails what waits at gates or is held, now and from now on: the engine closes, and nobody may ever open them.
    pub fn stop(&mut self) {
        self.stopping = true;
        let waiting = self.tasks.iter().filter(|(_, task)| matches!(task.kind, Kind::Gate | Kind::Held { .. }));
        let ids: Vec<TaskId> = waiting.map(|(slot, task)| TaskId { slot, generation: task.generation }).collect();
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
                self.walk(index, offset, len, &[], Attempt::default());
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
        if let Some((offset, file)) = active.failure {
            active.request.device.io_failed(active.request.op, offset, active.error, file.as_deref());
        }
        self.ended.push(Ended { request: active.request, error: active.error, found: active.found });
    }

    fn fail(&mut self, index: usize, errno: i32) {
        let active = &mut self.actives[index];
        if active.error == 0 {
            active.error = errno;
        }
    }

    /// Fails a request because storage has: at `offset` of its device, in `file`, if it was one.
    fn fail_in(&mut self, index: usize, errno: i32, offset: u64, file: Option<&Arc<File>>) {
        let active = &mut self.actives[index];
        if active.error == 0 && io_errors::is_of_storage(errno) {
            active.failure = Some((offset, file.cloned()));
        }
        self.fail(index, errno);
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
            let Kind::Ring { file, done, durable, syncing, .. } = &mut task.kind else {
                continue;
            };
            let syncing = syncing.take();
            match result {
                -4 => self.push(id, true),
                // Out of requests, or a descriptor that is O_NONBLOCK: again, but not in circles.
                -11 => self.push(id, false),
                ..0 => match syncing {
                    Some(syncing) => self.examine(id, -result, syncing),
                    None => self.finish(id, Err(-result)),
                },
                // The end of the file inside the device: somebody truncated it.
                0 => self.finish(id, Err(EIO)),
                moved => {
                    *done += moved as u64;
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

    /// The kernel was too busy to take all that waits in the ring: `submit_ring` must be called again.
    pub fn is_unsubmitted(&self) -> bool {
        self.ring.as_ref().is_some_and(Ring::is_unsubmitted)
    }

    /// The ring has I/O that the kernel has not finished.
    pub fn is_in_storage(&self) -> bool {
        self.ring.as_ref().is_some_and(|ring| !ring.is_idle())
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
            Work::SyncFailed { errno, unreported } => return self.sync_failed(id, errno, unreported),
            Work::Stretches(Ok(stretches)) => {
                debug_assert!(matches!(task.kind, Kind::Pool { sparse: true, .. }));
                let mut offset = task.offset;
                let found = &mut self.actives[task.active].found;
                found.extend(stretches.iter().map(|&Stretch { len, hole }| {
                    offset += len;
                    Found { offset: offset - len, len, flags: if hole { 3 } else { 0 } }
                }));
                keep_the_first(found);
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
        if let Kind::Fault { outcome: Some(errno), .. } = task.kind {
            return self.finish(id, Err(errno));
        }
        let active = &mut self.actives[task.active];
        let op = if active.phase == Phase::Main { active.request.op } else { Op::Flush };
        let result = match answer {
            Answer::Retry if op == Op::Flush => Ok(()),
            Answer::Retry => return self.retry(id),
            Answer::Fail(errno) => Err(errno),
            Answer::Hold(errno, holding) if op != Op::Flush => return self.hold(id, errno, holding),
            Answer::Hold(errno, _) => Err(errno),
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
                keep_the_first(&mut active.found);
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
            let errno = match self.tasks.get(id.slot).map(|task| &task.kind) {
                Some(Kind::Fault { outcome: Some(errno), .. }) => *errno,
                _ => ETIMEDOUT,
            };
            self.finish(id, Err(errno));
        }
    }
}

/// Many tasks of a request may find extents at once; those that lie too far behind are not answered anyway.
fn keep_the_first(found: &mut Vec<Found>) {
    if found.len() > 2 * MOST_FOUND {
        found.sort_unstable_by_key(|found| found.offset);
        found.truncate(MOST_FOUND);
    }
}
