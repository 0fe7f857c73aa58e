//! `Durability`: sync errors of one open file description. After the first failed sync, all later syncs fail.
//!
//! Linux reports a failed writeback once per open file description: the sync that meets the error fails, the pages
//! count as clean, the next sync succeeds, and the data is lost. So the first failure is stored here and fails every
//! later sync. Of several syncs that run at the same time, only one gets the error. So a sync succeeds only after all
//! syncs that ran beside it have ended (`wait_for_others`). Writes with RWF_DSYNC are syncs as well.
//!
//! Any thread may use it. Only `wait_for_others` waits, and only for system calls in progress.

use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::Errno;
use crate::file::File;

#[derive(Default)]
pub(crate) struct Durability {
    /// The errno of the first failed sync. 0: no sync has failed.
    errno: AtomicI32,
    /// The failure is stored outside of this process (by the supervisor).
    reported: AtomicBool,
    running: Mutex<Running>,
    ended: Condvar,
}

/// Syncs of one file that may run at the same time before the list of them has to grow.
const MOST: usize = 512;

struct Running {
    next: u64,
    /// Numbers of the running syncs, in order.
    numbers: Vec<u64>,
}

impl Default for Running {
    fn default() -> Running {
        Running { next: 0, numbers: Vec::with_capacity(MOST) }
    }
}

impl Durability {
    pub fn error(&self) -> Option<Errno> {
        match self.errno.load(Ordering::SeqCst) {
            0 => None,
            errno => Some(Errno::from_raw_os_error(errno)),
        }
    }

    /// Stores a failure. The first errno is kept.
    pub fn fail(&self, errno: Errno) {
        let _kept = self.errno.compare_exchange(0, errno.raw_os_error(), Ordering::SeqCst, Ordering::SeqCst);
    }

    pub fn is_unreported(&self) -> bool {
        self.error().is_some() && !self.reported.load(Ordering::SeqCst)
    }

    pub fn set_reported(&self) {
        self.reported.store(true, Ordering::SeqCst);
    }

    /// Waits until all syncs that are running now have ended.
    pub fn wait_for_others(&self) {
        let mut running = self.running();
        let end = running.next;
        while running.numbers.first().is_some_and(|&number| number < end) {
            running = self.ended.wait(running).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn running(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts one running sync of the file until it is dropped. A failure must be stored (`File::fail_syncs`) before that.
pub struct Syncing<F: Deref<Target = File>> {
    file: F,
    number: u64,
}

impl<F: Deref<Target = File>> Syncing<F> {
    pub fn new(file: F) -> Syncing<F> {
        let mut running = file.durability().running();
        let number = running.next;
        running.next += 1;
        running.numbers.push(number);
        drop(running);
        Syncing { file, number }
    }
}

impl<F: Deref<Target = File>> Drop for Syncing<F> {
    fn drop(&mut self) {
        let durability = self.file.durability();
        let mut running = durability.running();
        if let Ok(at) = running.numbers.binary_search(&self.number) {
            running.numbers.remove(at);
        }
        drop(running);
        durability.ended.notify_all();
    }
}
