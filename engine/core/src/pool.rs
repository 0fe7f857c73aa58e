//! Threads for what would block: fdatasync, fallocate, lseek, unaligned direct I/O, and all file I/O
//! where io_uring is forbidden. Started as needed up to a limit, they end when the pool is dropped. One more thread
//! finds out why durable writes failed, which syncs in all others may wait for.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use blkloom_io::{Busy, Errno, File, RangeGuard, Slice, Stretch, Syncing};

use crate::inbox::{Inbox, Message, TaskId};
use crate::lock;

/// One piece of work on one file.
pub enum Chore {
    Read {
        offset: u64,
        into: Slice,
    },
    Write {
        offset: u64,
        from: Slice,
        durable: bool,
    },
    /// See `File::examine`: a durable write in the ring failed with that errno.
    Examine {
        offset: u64,
        from: Slice,
        errno: Errno,
        syncing: Syncing<Arc<File>>,
    },
    Sync,
    Punch {
        offset: u64,
        len: u64,
    },
    Zero {
        offset: u64,
        len: u64,
        unmap: bool,
        fast: bool,
    },
    Stretches {
        offset: u64,
        len: u64,
        most: usize,
    },
    Prefetch {
        offset: u64,
        len: u64,
    },
}

/// What came of it.
pub enum Work {
    Ended(Result<(), Errno>),
    /// The file's syncs fail from now on. unreported: see `File::has_unreported_failure`.
    SyncFailed {
        errno: Errno,
        unreported: bool,
    },
    Stretches(Result<Vec<Stretch>, Errno>),
}

struct Job {
    file: Busy<Arc<File>>,
    chore: Chore,
    inbox: Arc<Inbox>,
    task: TaskId,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    idle: usize,
    threads: Vec<JoinHandle<()>>,
    examiner: Option<JoinHandle<()>>,
    stopping: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    arrived: Condvar,
    arrived_to_examine: Condvar,
}

pub struct Pool {
    shared: Arc<Shared>,
    limit: usize,
}

impl Pool {
    pub fn new(limit: usize) -> Pool {
        Pool { shared: Arc::default(), limit: limit.max(1) }
    }

    /// Does the chore and sends `Message::Worked`. What the chore's memory needs is kept by the task.
    pub fn submit(&self, file: Arc<File>, chore: Chore, inbox: Arc<Inbox>, task: TaskId) {
        let mut state = lock(&self.shared.state);
        let job = Job { file: Busy::new(file), chore, inbox, task };
        if matches!(job.chore, Chore::Examine { .. }) {
            return self.examine(state, job);
        }
        state.jobs.push_back(job);
        if state.idle < state.jobs.len() && state.threads.len() < self.limit {
            let shared = self.shared.clone();
            match std::thread::Builder::new().name("blkloom-io".into()).spawn(move || run(&shared)) {
                Ok(thread) => state.threads.push(thread),
                Err(_) if !state.threads.is_empty() => {} // those there are will get to it
                Err(error) => {
                    let errno = error.raw_os_error().unwrap_or(blkloom_io::errno::EIO);
                    if let Some(job) = state.jobs.pop_back() {
                        job.inbox.send(Message::Worked(job.task, Work::Ended(Err(errno))));
                    }
                }
            }
        }
        drop(state);
        self.shared.arrived.notify_one();
    }

    /// Syncs wait for it, and they may be all that the threads do: it goes first, and one more thread does only that.
    fn examine(&self, mut state: MutexGuard<'_, State>, job: Job) {
        if state.examiner.is_none() {
            let shared = self.shared.clone();
            match std::thread::Builder::new().name("blkloom-io".into()).spawn(move || examine(&shared)) {
                Ok(thread) => state.examiner = Some(thread),
                Err(_) => {
                    drop(state);
                    return finish(job, |file, chore| chore.condemn(file));
                }
            }
        }
        state.jobs.push_front(job);
        drop(state);
        self.shared.arrived.notify_one();
        self.shared.arrived_to_examine.notify_one();
    }
}

/// Does the chore and tells of it.
fn finish(job: Job, work: impl FnOnce(&File, Chore) -> Work) {
    let syncs = job.chore.syncs();
    let work = match work(&job.file, job.chore) {
        Work::Ended(Err(errno)) if syncs && job.file.sync_error().is_some() => {
            Work::SyncFailed { errno, unreported: job.file.has_unreported_failure() }
        }
        work => work,
    };
    drop(job.file);
    job.inbox.send(Message::Worked(job.task, work));
}

fn examine(shared: &Shared) {
    let mut state = lock(&shared.state);
    loop {
        let waits = state.jobs.front().is_some_and(|job| matches!(job.chore, Chore::Examine { .. }));
        if let Some(job) = waits.then(|| state.jobs.pop_front()).flatten() {
            drop(state);
            finish(job, |file, chore| chore.work(file));
            state = lock(&shared.state);
        } else if state.stopping {
            return;
        } else {
            state = shared.arrived_to_examine.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

fn run(shared: &Shared) {
    let mut state = lock(&shared.state);
    loop {
        if let Some(job) = state.jobs.pop_front() {
            drop(state);
            finish(job, |file, chore| chore.work(file));
            state = lock(&shared.state);
        } else if state.stopping {
            return;
        } else {
            state.idle += 1;
            state = shared.arrived.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.idle -= 1;
        }
    }
}

impl Chore {
    /// Whether it fails where a sync does. (Block devices are synced to be zeroed, see `File::zero`.)
    fn syncs(&self) -> bool {
        match self {
            Chore::Write { durable, .. } => *durable,
            Chore::Examine { .. } | Chore::Sync | Chore::Punch { .. } | Chore::Zero { .. } => true,
            Chore::Read { .. } | Chore::Stretches { .. } | Chore::Prefetch { .. } => false,
        }
    }

    /// There is no thread that could find out.
    fn condemn(self, file: &File) -> Work {
        let Chore::Examine { errno, .. } = self else { return self.work(file) };
        file.fail_syncs(errno);
        Work::Ended(Err(errno))
    }

    fn work(self, file: &File) -> Work {
        match self {
            Chore::Read { offset, into } => Work::Ended(file.read(offset, into)),
            Chore::Write { offset, from, durable } => Work::Ended(file.write(offset, from, durable)),
            Chore::Examine { offset, from, errno, syncing } => {
                file.examine(offset, from, errno, syncing);
                Work::Ended(Err(errno))
            }
            Chore::Sync => Work::Ended(file.sync()),
            Chore::Punch { offset, len } => Work::Ended(file.punch(offset, len)),
            Chore::Zero { offset, len, unmap, fast } => Work::Ended(file.zero(offset, len, unmap, fast)),
            Chore::Stretches { offset, len, most } => Work::Stretches(file.stretches(offset, len, most)),
            Chore::Prefetch { offset, len } => Work::Ended(file.prefetch(offset, len)),
        }
    }
}

/// A write handed to the ring keeps its blocks from read-modify-writers.
pub type BlockShare = Option<RangeGuard>;

impl Pool {
    /// Does what is queued and joins the threads. Nothing may be submitted after.
    pub fn stop(&self) {
        let threads = {
            let mut state = lock(&self.shared.state);
            state.stopping = true;
            (std::mem::take(&mut state.threads), state.examiner.take())
        };
        self.shared.arrived.notify_all();
        self.shared.arrived_to_examine.notify_all();
        for thread in threads.0.into_iter().chain(threads.1) {
            // A pool thread cannot panic on its own account; if it did, the process's hook has said so.
            let _joined = thread.join();
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn syncs_in_all_threads_keep_nobody_from_finding_out_what_they_wait_for() -> std::io::Result<()> {
        let path = std::env::temp_dir().join(format!("blkloom-pool-{}", std::process::id()));
        let opened = std::fs::File::options().read(true).write(true).create_new(true).open(&path)?;
        std::fs::remove_file(&path)?;
        let file = File::new(opened.into(), true, false, "test".into()).map(Arc::new).map_err(std::io::Error::other)?;
        let (pool, inbox, task) = (Pool::new(2), Arc::new(Inbox::new()?), TaskId { slot: 0, generation: 0 });
        let syncing = Syncing::new(file.clone()); // a durable write in a ring
        for _ in 0..8 {
            pool.submit(file.clone(), Chore::Sync, inbox.clone(), task);
        }
        let failed = Chore::Examine { offset: 0, from: Slice::empty(), errno: 5, syncing };
        pool.submit(file, failed, inbox.clone(), task);
        let (ended, end) = mpsc::channel();
        std::thread::spawn(move || {
            pool.stop();
            ended.send(())
        });
        assert!(end.recv_timeout(Duration::from_secs(60)).is_ok(), "all threads wait for each other");
        let told = inbox.take();
        assert_eq!(told.len(), 9);
        assert!(told.iter().all(|told| matches!(told, Message::Worked(_, Work::SyncFailed { errno: 5, .. }))));
        Ok(())
    }
}
