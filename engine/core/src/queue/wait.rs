//! Timers of the queue: waits in a filter or for the retry of a deferred request, and timeouts of faults. Part of
//! `queue`, whose invariants hold here.
//!
//! A waiting task has no pin. When a gate on its path closes, the task waits at that gate instead. So no suspend and no
//! hand-over has to wait for a timer.

use std::sync::Arc;
use std::time::{Duration, Instant};

use blkloom_io::Errno;

use super::task::{Past, waiting};
use super::{Attempt, Kind, Queue, Task, Walk};
use crate::clock::LONGEST_TIMEOUT;
use crate::deferred::Deferral;
use crate::device::Device;
use crate::filter::Counted;
use crate::wake::{TaskId, Wake};

impl Queue {
    /// Makes a range wait in the last filter that was visited, before it is walked further.
    pub(super) fn wait(&mut self, walk: &Walk<'_>, root: u64, len: u64, time: Duration, counted: Option<Counted>) {
        let until = Instant::now() + time.min(LONGEST_TIMEOUT);
        let kind = Kind::Wait { until, filters: walk.filters, _counted: counted };
        let id = self.task(walk, root, len, waiting(walk.path), kind);
        self.timers.insert((until, id));
        self.wait_no_longer_than_gates(id);
    }

    /// Registers a waiting task with the devices on its path, so that a gate that closes ends the wait. A gate that is
    /// closed already ends it by a message to this loop's mailbox, because a walk is in progress.
    pub(super) fn wait_no_longer_than_gates(&mut self, id: TaskId) {
        if !self.register_waiting(id) {
            self.ports.wakes.post(Wake::Refused(id));
        } else if devices(&self.tasks[id.slot]).any(|device| !device.is_live()) {
            self.ports.wakes.post(Wake::Released(id));
        }
    }

    /// Defers a task: the target is asked again when the device retries, or after `time`.
    pub(super) fn defer(&mut self, id: TaskId, errno: Errno, deferral: Deferral, time: Option<Duration>) {
        let until = time.map(|time| Instant::now() + time.min(LONGEST_TIMEOUT));
        let kind = Kind::Deferred { errno, deferral, until };
        let before = std::mem::replace(&mut self.tasks[id.slot].kind, kind);
        if let Some(at) = before.timer() {
            self.timers.remove(&(at, id));
        }
        self.timers.extend(until.map(|until| (until, id)));
        if !self.register_waiting(id) || self.stopping {
            self.finish(id, Err(errno));
        } else if self.is_released(id) {
            self.released(id);
        }
    }

    /// Registers a waiting task with all devices on its path, so that a thread that closes one of their gates finds it.
    /// False: the task must not wait.
    fn register_waiting(&mut self, id: TaskId) -> bool {
        let task = &self.tasks[id.slot];
        let timed = !matches!(task.kind, Kind::Deferred { .. });
        devices(task).filter(|device| !device.deferred.enter(&self.ports.wakes, id, timed)).count() == 0
    }

    /// Whether a deferred task must continue, because of an event before it was registered with its devices.
    fn is_released(&self, id: TaskId) -> bool {
        let task = &self.tasks[id.slot];
        devices(task).any(|device| !device.is_live())
            || matches!(&task.kind, Kind::Deferred { deferral, .. } if deferral.is_over())
    }

    /// Walks a waiting task's range again, from the request's device. Closed gates stop it.
    pub(super) fn released(&mut self, id: TaskId) {
        let seen = match self.tasks.get(id.slot).map(|task| &task.kind) {
            Some(Kind::Deferred { deferral, .. }) => deferral.seen,
            _ => false,
        };
        let again =
            |before: Attempt| Attempt { again: before.again || seen, filters: before.filters, ..Attempt::default() };
        self.walk_again(id, Past::Nothing, again);
    }

    /// A device on a waiting task's path is about to end: a deferred task fails, a task that waits in a filter
    /// continues.
    pub(super) fn refused(&mut self, id: TaskId) {
        match self.tasks.get(id.slot).filter(|task| task.generation == id.generation).map(|task| &task.kind) {
            Some(&Kind::Deferred { errno, .. }) => self.finish(id, Err(errno)),
            Some(Kind::Wait { .. }) => self.retry(id),
            Some(Kind::Backend { .. }) => self.finish(id, Err(Errno::SHUTDOWN)),
            _ => {}
        }
    }

    /// Handles expired timers: faults fail, waits end.
    pub fn run_timers(&mut self, now: Instant) {
        while let Some(&(at, id)) = self.timers.first()
            && at <= now
        {
            self.timers.remove(&(at, id));
            match self.tasks.get(id.slot).map(|task| &task.kind) {
                Some(Kind::Wait { .. }) => self.retry(id),
                Some(Kind::Deferred { .. }) => self.released(id),
                Some(&Kind::Fault { outcome: Some(errno), .. }) => self.finish(id, Err(errno)),
                _ => self.finish(id, Err(Errno::TIMEDOUT)),
            }
        }
    }
}

fn devices(task: &Task) -> impl Iterator<Item = &Arc<Device>> {
    task.path.iter().map(|inside| &inside.device)
}
