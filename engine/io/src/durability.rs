//! What syncs have said of one open file description: whether what was written through it can still become durable.
//!
//! Linux tells of a failed writeback once a description: the sync that meets the error fails, the pages count as
//! clean, the next sync succeeds, and the data is gone. So the first failure is kept here and fails every sync that
//! follows. Of syncs that run at the same time only one is told; one that succeeds therefore counts only when those
//! that ran beside it have ended, too (`wait_for_others`). Writes with RWF_DSYNC are syncs as well.
//!
//! Any thread; only `wait_for_others` waits, and only for what the kernel is doing.

use std::collections::BTreeSet;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::Errno;
use crate::file::File;

#[derive(Default)]
pub(crate) struct Durability {
    /// Of the first sync that failed; 0 while none has.
    errno: AtomicI32,
    /// The failure is known to those who must remember it when this process has ended.
    reported: AtomicBool,
    running: Mutex<Running>,
    ended: Condvar,
}

#[derive(Default)]
struct Running {
    next: u64,
    numbers: BTreeSet<u64>,
}

impl Durability {
    pub fn error(&self) -> Option<Errno> {
        match self.errno.load(Ordering::SeqCst) {
            0 => None,
            errno => Some(errno),
        }
    }

    /// The first errno stays.
    pub fn fail(&self, errno: Errno) {
        let _kept = self.errno.compare_exchange(0, errno, Ordering::SeqCst, Ordering::SeqCst);
    }

    pub fn is_unreported(&self) -> bool {
        self.error().is_some() && !self.reported.load(Ordering::SeqCst)
    }

    pub fn set_reported(&self) {
        self.reported.store(true, Ordering::SeqCst);
    }

    /// Waits until the syncs have ended that run now.
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

/// Counts as one of the file's syncs that run, until it is dropped. A failure is kept (`File::fail_syncs`) before that.
pub struct Syncing<F: Deref<Target = File>> {
    file: F,
    number: u64,
}

impl<F: Deref<Target = File>> Syncing<F> {
    pub fn new(file: F) -> Syncing<F> {
        let mut running = file.durability().running();
        let number = running.next;
        running.next += 1;
        running.numbers.insert(number);
        drop(running);
        Syncing { file, number }
    }
}

impl<F: Deref<Target = File>> Drop for Syncing<F> {
    fn drop(&mut self) {
        let durability = self.file.durability();
        durability.running().numbers.remove(&self.number);
        durability.ended.notify_all();
    }
}
