//! Thread pool for blocking file operations: fdatasync, fallocate, lseek, unaligned direct I/O, and all file I/O where
//! io_uring is not available.
//!
//! Threads are started as needed, up to a limit, and end when the pool is dropped. One more thread, the examiner, finds
//! out why a durable write failed: syncs in all other threads may wait for that result.
//!
//! At most one sync of a file runs at a time. Requests for a sync that arrive meanwhile share the next sync, which
//! begins after all their data was written.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use blkloom_io::{Busy, Errno, File, FileExtent, RangeGuard, Scratch, Slice, Source, Syncing};

use crate::lock;
use crate::mailbox::Poster;
use crate::wake::TaskId;

/// A blocking operation on one file.
pub enum Job {
    Read {
        offset: u64,
        into: Slice<'static>,
    },
    Write {
        offset: u64,
        from: Source<'static>,
        durable: bool,
    },
    /// Finds out why a durable write in the ring failed with `errno`: see `File::examine`.
    Examine {
        offset: u64,
        from: Source<'static>,
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
    Extents {
        offset: u64,
        len: u64,
        most: usize,
    },
    Prefetch {
        offset: u64,
        len: u64,
    },
}

/// The result of a `Job`.
#[derive(Clone)]
pub enum JobResult {
    Ended(Result<(), Errno>),
    /// A sync failed, and all later syncs of the file fail. unreported: see `File::has_unreported_failure`.
    SyncFailed {
        errno: Errno,
        unreported: bool,
    },
    Extents(Result<Vec<FileExtent>, Errno>),
}

/// The result of a task's job, as a message to its loop.
pub struct JobDone {
    pub task: TaskId,
    pub result: JobResult,
}

struct QueuedJob {
    file: Busy<Arc<File>>,
    job: Job,
    reply_to: ReplyTo,
}

/// Where the result of a job goes.
struct ReplyTo {
    results: Poster<JobDone>,
    task: TaskId,
}

impl ReplyTo {
    fn send(self, result: JobResult) {
        self.results.post(JobDone { task: self.task, result });
    }
}

/// A request that shares a sync of a file with the request in the queued job.
struct Sharing {
    /// See `number`.
    file: usize,
    /// It shares the sync after the one that is running.
    next: bool,
    reply_to: ReplyTo,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<QueuedJob>,
    /// By file (see `number`): files whose sync is queued, or has begun (true).
    syncs: HashMap<usize, bool>,
    sharing: Vec<Sharing>,
    /// Jobs that may be queued without an allocation: see `Pool::reserve`.
    reserved: usize,
    idle: usize,
    /// Threads that have begun to take jobs.
    ready: usize,
    threads: Vec<JoinHandle<()>>,
    examiner: Option<JoinHandle<()>>,
    stopping: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    arrived: Condvar,
    arrived_to_examine: Condvar,
    became_ready: Condvar,
}

pub struct Pool {
    shared: Arc<Shared>,
    limit: usize,
}

impl Pool {
    pub fn new(limit: usize) -> Pool {
        Pool { shared: Arc::default(), limit: limit.max(1) }
    }

    fn spawn(&self, body: fn(&Shared)) -> std::io::Result<JoinHandle<()>> {
        let shared = self.shared.clone();
        std::thread::Builder::new().name("blkloom-io".into()).spawn(move || body(&shared))
    }

    /// Starts all threads, and waits until their memory is allocated. Later jobs then depend on no thread that would
    /// have to be started. An error: none could be started.
    pub fn start(&self) -> std::io::Result<()> {
        let mut state = lock(&self.shared.state);
        if state.examiner.is_none() {
            state.examiner = self.spawn(examine).ok(); // `examine` tries again
        }
        while state.threads.len() < self.limit {
            match self.spawn(run) {
                Ok(thread) => state.threads.push(thread),
                Err(error) if state.threads.is_empty() => return Err(error),
                Err(_) => break,
            }
        }
        let ready = self.shared.became_ready.wait_while(state, |state| state.ready < state.threads.len());
        drop(ready.unwrap_or_else(PoisonError::into_inner));
        Ok(())
    }

    /// Allocates memory for so many more jobs that wait.
    pub fn reserve(&self, jobs: usize) {
        let mut state = lock(&self.shared.state);
        state.reserved += jobs;
        let reserved = state.reserved;
        state.jobs.reserve(reserved);
        state.sharing.reserve(reserved);
        state.syncs.reserve(reserved);
    }

    /// Undoes a `reserve`. Memory that was allocated is kept.
    pub fn release(&self, jobs: usize) {
        lock(&self.shared.state).reserved -= jobs;
    }

    /// Queues a job. Its result is posted to `results`. The task keeps the job's memory alive until then.
    pub fn submit(&self, file: Arc<File>, job: Job, results: Poster<JobDone>, task: TaskId) {
        let mut state = lock(&self.shared.state);
        let reply_to = ReplyTo { results, task };
        if matches!(job, Job::Sync) {
            if let Some(&next) = state.syncs.get(&number(&file)) {
                state.sharing.push(Sharing { file: number(&file), next, reply_to });
                return;
            }
            state.syncs.insert(number(&file), false);
        }
        let queued = QueuedJob { file: Busy::new(file), job, reply_to };
        if matches!(queued.job, Job::Examine { .. }) {
            return self.examine(state, queued);
        }
        state.jobs.push_back(queued);
        if state.idle < state.jobs.len() && state.threads.len() < self.limit {
            match self.spawn(run) {
                Ok(thread) => state.threads.push(thread),
                Err(_) if !state.threads.is_empty() => {} // the existing threads will execute it
                Err(error) => {
                    let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
                    if let Some(queued) = state.jobs.pop_back() {
                        if matches!(queued.job, Job::Sync) {
                            state.syncs.remove(&number(&queued.file));
                        }
                        queued.reply_to.send(JobResult::Ended(Err(errno)));
                    }
                }
            }
        }
        drop(state);
        self.shared.arrived.notify_one();
    }

    /// Queues an `Examine` at the front. Syncs wait for it and may occupy all threads, so the examiner thread executes
    /// nothing else.
    fn examine(&self, mut state: MutexGuard<'_, State>, queued: QueuedJob) {
        if state.examiner.is_none() {
            match self.spawn(examine) {
                Ok(thread) => state.examiner = Some(thread),
                Err(_) => {
                    drop(state);
                    let result = execute(&queued.file, queued.job, |file, job| job.fail_all_syncs(file));
                    return queued.reply_to.send(result);
                }
            }
        }
        state.jobs.push_front(queued);
        drop(state);
        self.shared.arrived.notify_one();
        self.shared.arrived_to_examine.notify_one();
    }
}

/// Identifies an open file while a reference to it exists.
fn number(file: &Arc<File>) -> usize {
    Arc::as_ptr(file) as usize
}

/// Executes the job with `by`, and detects failed syncs.
fn execute(file: &Arc<File>, job: Job, by: impl FnOnce(&File, Job) -> JobResult) -> JobResult {
    let syncs = job.syncs();
    match by(file, job) {
        JobResult::Ended(Err(errno)) if syncs && file.sync_error().is_some() => {
            JobResult::SyncFailed { errno, unreported: file.has_unreported_failure() }
        }
        result => result,
    }
}

/// Executes a queued job with the state unlocked, and posts its result.
fn finish<'a>(
    shared: &'a Shared,
    mut state: MutexGuard<'a, State>,
    queued: QueuedJob,
    scratch: &mut Scratch,
) -> MutexGuard<'a, State> {
    let QueuedJob { file, job, reply_to } = queued;
    let syncs = matches!(job, Job::Sync);
    if syncs {
        state.syncs.insert(number(&file), true);
    }
    drop(state);
    let result = execute(&file, job, |file, job| job.execute(file, scratch));
    let mut state = lock(&shared.state);
    if syncs {
        let again = state.end_sync(&file, &result);
        if again {
            shared.arrived.notify_one();
        }
    }
    drop(file);
    reply_to.send(result);
    state
}

impl State {
    /// Posts the result of a file's sync to the requests that share it. Returns whether the next sync was queued.
    fn end_sync(&mut self, file: &Arc<File>, result: &JobResult) -> bool {
        let (number, mut at, mut again) = (number(file), 0, None);
        while let Some(sharing) = self.sharing.get_mut(at) {
            if sharing.file != number || sharing.next && again.is_some() {
                sharing.next &= sharing.file != number;
                at += 1;
                continue;
            }
            let Sharing { next, reply_to, .. } = self.sharing.swap_remove(at);
            match next {
                true => again = Some(reply_to),
                false => reply_to.send(result.clone()),
            }
        }
        let Some(reply_to) = again else {
            self.syncs.remove(&number);
            return false;
        };
        self.syncs.insert(number, false);
        self.jobs.push_back(QueuedJob { file: Busy::new(Arc::clone(file)), job: Job::Sync, reply_to });
        true
    }
}

/// Scratch memory of a thread. If there is none now, it is allocated when it is needed.
fn scratch() -> Scratch {
    Scratch::present().unwrap_or_default()
}

fn examine(shared: &Shared) {
    let mut scratch = scratch();
    let mut state = lock(&shared.state);
    loop {
        let waits = state.jobs.front().is_some_and(|queued| matches!(queued.job, Job::Examine { .. }));
        if let Some(queued) = waits.then(|| state.jobs.pop_front()).flatten() {
            state = finish(shared, state, queued, &mut scratch);
        } else if state.stopping {
            return;
        } else {
            state = shared.arrived_to_examine.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

fn run(shared: &Shared) {
    let mut scratch = scratch();
    let mut state = lock(&shared.state);
    state.ready += 1;
    shared.became_ready.notify_all();
    loop {
        if let Some(queued) = state.jobs.pop_front() {
            state = finish(shared, state, queued, &mut scratch);
        } else if state.stopping {
            return;
        } else {
            state.idle += 1;
            state = shared.arrived.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.idle -= 1;
        }
    }
}

impl Job {
    /// Whether a failed sync makes the job fail. (Zeroing a block device includes a sync, see `File::zero`.)
    fn syncs(&self) -> bool {
        match self {
            Job::Write { durable, .. } => *durable,
            Job::Examine { .. } | Job::Sync | Job::Punch { .. } | Job::Zero { .. } => true,
            Job::Read { .. } | Job::Extents { .. } | Job::Prefetch { .. } => false,
        }
    }

    /// Fails all syncs of the file, because no thread could be started to examine the write.
    fn fail_all_syncs(self, file: &File) -> JobResult {
        let Job::Examine { errno, .. } = self else { return self.execute(file, &mut Scratch::default()) };
        file.fail_syncs(errno);
        JobResult::Ended(Err(errno))
    }

    fn execute(self, file: &File, scratch: &mut Scratch) -> JobResult {
        match self {
            Job::Read { offset, into } => JobResult::Ended(file.read(offset, into, scratch)),
            Job::Write { offset, from, durable } => JobResult::Ended(file.write(offset, from, durable, scratch)),
            Job::Examine { offset, from, errno, syncing } => {
                file.examine(offset, from, errno, syncing, scratch);
                JobResult::Ended(Err(errno))
            }
            Job::Sync => JobResult::Ended(file.sync()),
            Job::Punch { offset, len } => JobResult::Ended(file.punch(offset, len)),
            Job::Zero { offset, len, unmap, fast } => JobResult::Ended(file.zero(offset, len, unmap, fast, scratch)),
            Job::Extents { offset, len, most } => JobResult::Extents(file.extents(offset, len, most)),
            Job::Prefetch { offset, len } => JobResult::Ended(file.prefetch(offset, len)),
        }
    }
}

/// A share of the block lock of a write in the ring: excludes read-modify-write of these blocks.
pub type BlockShare = Option<RangeGuard>;

impl Pool {
    /// Executes all queued jobs and joins the threads. `submit` must not be called after this.
    pub fn stop(&self) {
        let threads = {
            let mut state = lock(&self.shared.state);
            state.stopping = true;
            (std::mem::take(&mut state.threads), state.examiner.take())
        };
        self.shared.arrived.notify_all();
        self.shared.arrived_to_examine.notify_all();
        for thread in threads.0.into_iter().chain(threads.1) {
            // A pool thread does not panic; if one did, the panic hook of the process has reported it.
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
    use crate::mailbox::Mailbox;

    #[test]
    fn concurrent_syncs_of_a_file_each_get_one_result() -> std::io::Result<()> {
        const EACH: usize = 500;
        let file = temporary("shared")?;
        let pool = Arc::new(Pool::new(4));
        let asking: Vec<_> = (0..4)
            .map(|_| {
                let (pool, file) = (pool.clone(), file.clone());
                std::thread::spawn(move || -> std::io::Result<()> {
                    let results = Arc::new(Mailbox::<JobDone>::new()?);
                    for slot in 0..EACH {
                        pool.submit(file.clone(), Job::Sync, results.clone(), TaskId { slot, generation: 0 });
                    }
                    let (mut told, mut taken) = (Vec::new(), Vec::new());
                    let since = std::time::Instant::now();
                    while told.len() < EACH {
                        assert!(since.elapsed() < Duration::from_secs(60), "{} of {EACH} were told", told.len());
                        results.take(&mut taken);
                        told.extend(taken.drain(..).filter_map(|done| match done {
                            JobDone { task, result: JobResult::Ended(Ok(())) } => Some(task.slot),
                            _ => None,
                        }));
                        std::thread::yield_now();
                    }
                    told.sort_unstable();
                    assert!(told.into_iter().eq(0..EACH));
                    Ok(())
                })
            })
            .collect();
        for thread in asking {
            thread.join().expect("an assertion failed")?;
        }
        let state = lock(&pool.shared.state);
        assert!(state.syncs.is_empty() && state.sharing.is_empty());
        Ok(())
    }

    fn temporary(name: &str) -> std::io::Result<Arc<File>> {
        let path = std::env::temp_dir().join(format!("blkloom-pool-{name}-{}", std::process::id()));
        let opened = std::fs::File::options().read(true).write(true).create_new(true).open(&path)?;
        std::fs::remove_file(&path)?;
        File::new(opened.into(), true, false, "test".into()).map(Arc::new).map_err(std::io::Error::other)
    }

    #[test]
    fn a_failed_write_is_examined_while_syncs_occupy_all_threads() -> std::io::Result<()> {
        let file = temporary("waiting")?;
        let (pool, results, task) =
            (Pool::new(2), Arc::new(Mailbox::<JobDone>::new()?), TaskId { slot: 0, generation: 0 });
        let syncing = Syncing::new(file.clone()); // a durable write in a ring
        for _ in 0..8 {
            pool.submit(file.clone(), Job::Sync, results.clone(), task);
        }
        let failed = Job::Examine { offset: 0, from: Source::empty(), errno: Errno::IO, syncing };
        pool.submit(file, failed, results.clone(), task);
        let (ended, end) = mpsc::channel();
        std::thread::spawn(move || {
            pool.stop();
            ended.send(())
        });
        assert!(end.recv_timeout(Duration::from_secs(60)).is_ok(), "all threads wait for each other");
        let mut told = Vec::new();
        results.take(&mut told);
        assert_eq!(told.len(), 9);
        assert!(told.iter().all(|told| matches!(told.result, JobResult::SyncFailed { errno: Errno::IO, .. })));
        Ok(())
    }
}
