//! Epoch-based reclamation: waits until no request uses an old map any more.
//!
//! A request pins the current epoch before it reads the map, and unpins when it no longer uses what the lookup
//! returned. `synchronize` starts a new epoch and waits until all pins of the old epoch are gone. Pins are counted per
//! shard, so that loops do not share cache lines. Requests that wait (for a target, a gate or a timer) are
//! counted, but hold no pin.
//!
//! Why two counters suffice: calls of `synchronize` are serialised, and each ends when the counter of the old parity is
//! zero. So all pins that exist when the next call begins have the parity that this next call ends.

use std::sync::PoisonError;
use std::time::Instant;

use crate::deadline_mutex::DeadlineMutex;
use crate::stats::Shard;
use crate::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use crate::sync::{Condvar, Mutex, lock};

#[cfg(not(loom))]
use crate::stats::SHARDS;
/// Two in a loom model: each further shard multiplies the number of interleavings.
#[cfg(loom)]
const SHARDS: usize = 2;

#[repr(align(128))]
#[derive(Default)]
struct Pins([AtomicI64; 2]);

/// Counters of the requests inside one device.
#[derive(Default)]
pub struct Epochs {
    epoch: AtomicU64,
    pins: [Pins; SHARDS],
    /// Requests inside the device without a pin: faults, and requests that wait at the gate of a lower device.
    waiting: AtomicI64,
    /// Number of `begin_wait` calls ever. `drain` uses it to detect requests that waited and left meanwhile.
    waits: AtomicU64,
    /// Serialises `synchronize`.
    synchronizing: DeadlineMutex,
    awaited: AtomicBool,
    quiet: Mutex<()>,
    changed: Condvar,
}

/// One pin: the counter that `unpin` decrements.
#[derive(Clone, Copy, Debug)]
pub struct Pin {
    shard: Shard,
    parity: usize,
}

impl Epochs {
    pub fn pin(&self, shard: Shard) -> Pin {
        loop {
            let epoch = self.epoch.load(Ordering::SeqCst);
            let pin = Pin { shard, parity: (epoch & 1) as usize };
            self.pins[shard.0].0[pin.parity].fetch_add(1, Ordering::SeqCst);
            if self.epoch.load(Ordering::SeqCst) == epoch {
                return pin;
            }
            self.unpin(pin);
        }
    }

    /// Takes a second pin of the same epoch. Allowed only while the first pin is held.
    pub fn again(&self, pin: Pin) -> Pin {
        self.pins[pin.shard.0].0[pin.parity].fetch_add(1, Ordering::SeqCst);
        pin
    }

    pub fn unpin(&self, pin: Pin) {
        self.pins[pin.shard.0].0[pin.parity].fetch_sub(1, Ordering::SeqCst);
        self.announce();
    }

    pub fn begin_wait(&self) {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        self.waits.fetch_add(1, Ordering::SeqCst);
    }

    pub fn end_wait(&self) {
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        self.announce();
    }

    fn announce(&self) {
        if self.awaited.load(Ordering::SeqCst) {
            drop(lock(&self.quiet));
            self.changed.notify_all();
        }
    }

    /// Waits until all pins taken before this call are released. False: the deadline passed first.
    pub fn synchronize(&self, deadline: Option<Instant>) -> bool {
        let Some(_serialised) = self.synchronizing.lock(deadline) else {
            return false;
        };
        // A call that timed out may have left pins of the other parity. They must be released first.
        let old = self.epoch.load(Ordering::SeqCst);
        if !self.wait(deadline, || self.pinned(((old + 1) & 1) as usize) == 0) {
            return false;
        }
        self.epoch.store(old + 1, Ordering::SeqCst);
        self.wait(deadline, || self.pinned((old & 1) as usize) == 0)
    }

    /// Waits until no request is in flight, pinned or waiting. The caller has closed the gate, so no new request can
    /// enter; those inside may change between pinned and waiting.
    pub fn drain(&self, deadline: Option<Instant>) -> bool {
        loop {
            let before = self.waits.load(Ordering::SeqCst);
            if !self.wait(deadline, || self.waiting.load(Ordering::SeqCst) == 0) || !self.synchronize(deadline) {
                return false;
            }
            // No request was waiting when `synchronize` began, and none has begun to wait since. So none came back with
            // a pin of the new epoch, and the pins of the old epoch are gone. (It would not be enough that no request
            // waits *now*: a request may begin to wait, be answered and pin again in between.)
            if self.waits.load(Ordering::SeqCst) == before {
                return true;
            }
        }
    }

    fn pinned(&self, parity: usize) -> i64 {
        self.pins.iter().map(|pins| pins.0[parity].load(Ordering::SeqCst)).sum()
    }

    fn wait(&self, deadline: Option<Instant>, done: impl Fn() -> bool) -> bool {
        if done() {
            return true;
        }
        let mut quiet = lock(&self.quiet);
        loop {
            // The flag is set under the lock again each time: another waiter may have cleared it.
            self.awaited.store(true, Ordering::SeqCst);
            if done() {
                break;
            }
            match deadline {
                None => quiet = self.changed.wait(quiet).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                        self.awaited.store(false, Ordering::SeqCst);
                        self.changed.notify_all();
                        return done();
                    };
                    quiet = self.changed.wait_timeout(quiet, left).unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        }
        self.awaited.store(false, Ordering::SeqCst);
        // Other waiters must set the flag again.
        self.changed.notify_all();
        true
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize};
    use std::time::Duration;

    use super::*;

    /// Threads enter, wait, are answered and pin again in a tight loop.
    #[test]
    fn nothing_is_inside_once_drained() {
        let (epochs, shut, stop, inside) =
            (Epochs::default(), AtomicBool::new(false), AtomicBool::new(false), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for shard in 0..3 {
                let (epochs, shut, stop, inside) = (&epochs, &shut, &stop, &inside);
                scope.spawn(move || {
                    let shard = Shard(shard);
                    while !stop.load(Ordering::SeqCst) {
                        let mut pin = epochs.pin(shard);
                        if !shut.load(Ordering::SeqCst) {
                            inside.fetch_add(1, Ordering::SeqCst);
                            for _ in 0..4 {
                                epochs.begin_wait();
                                epochs.unpin(pin);
                                pin = epochs.pin(shard);
                                epochs.end_wait();
                                std::thread::yield_now();
                            }
                            inside.fetch_sub(1, Ordering::SeqCst);
                        }
                        epochs.unpin(pin);
                    }
                });
            }
            let mut busy = 0;
            for _ in 0..2000 {
                shut.store(true, Ordering::SeqCst);
                let drained = epochs.drain(Some(Instant::now() + Duration::from_secs(60)));
                busy += inside.load(Ordering::SeqCst);
                assert!(drained, "requests kept a device from draining for ever");
                shut.store(false, Ordering::SeqCst);
                std::thread::yield_now();
            }
            stop.store(true, Ordering::SeqCst);
            assert_eq!(busy, 0, "requests were inside of a drained device");
        });
    }

    #[test]
    fn synchronize_waits_for_earlier_pins_only() {
        let epochs = Epochs::default();
        let past = Some(Instant::now());
        assert!(epochs.synchronize(past), "no request is inside");
        let old = epochs.pin(Shard(3));
        let again = epochs.again(old);
        assert!(!epochs.synchronize(past));
        // The call that timed out left a pin: later calls wait for it, too.
        let young = epochs.pin(Shard(4));
        epochs.unpin(old);
        assert!(!epochs.synchronize(past));
        epochs.unpin(again);
        epochs.unpin(young);
        epochs.begin_wait();
        assert!(epochs.synchronize(past), "waiting requests hold no pin");
        assert!(!epochs.drain(past), "waiting requests are inside the device");
        epochs.end_wait();
        assert!(epochs.drain(past));
    }
}
