//! Epochs: knowing when nobody uses what was just unpublished.
//!
//! A request pins the current epoch before it looks at a map and unpins when it no longer uses what
//! it found. `synchronize` starts a new epoch and waits until the pins of the old one are gone.
//! Pins are counted per shard, so that loops do not share cache lines. Parked requests hold no pin.
//!
//! Why one turn is enough: turns are serialised, and each ends with the counter of the parity it
//! left at zero; so at the next turn every pin alive is of the parity being left.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Instant;

use crate::stats::{SHARDS, Shard};
use crate::turn::Turn;

#[repr(align(128))]
#[derive(Default)]
struct Pins([AtomicI64; 2]);

#[derive(Default)]
pub struct Epochs {
    epoch: AtomicU64,
    pins: [Pins; SHARDS],
    /// Requests that are in the device but hold no pin: faults, and those waiting at a lower gate.
    parked: AtomicI64,
    /// How often anything was ever parked: tells `drain` what came and went while it looked elsewhere.
    parks: AtomicU64,
    turn: Turn,
    waiting: AtomicBool,
    quiet: Mutex<()>,
    changed: Condvar,
}

/// What `unpin` needs to know.
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

    /// A second pin of the same epoch, allowed while the first is held.
    pub fn again(&self, pin: Pin) -> Pin {
        self.pins[pin.shard.0].0[pin.parity].fetch_add(1, Ordering::SeqCst);
        pin
    }

    pub fn unpin(&self, pin: Pin) {
        self.pins[pin.shard.0].0[pin.parity].fetch_sub(1, Ordering::SeqCst);
        self.announce();
    }

    pub fn park(&self) {
        self.parked.fetch_add(1, Ordering::SeqCst);
        self.parks.fetch_add(1, Ordering::SeqCst);
    }

    pub fn unpark(&self) {
        self.parked.fetch_sub(1, Ordering::SeqCst);
        self.announce();
    }

    fn announce(&self) {
        if self.waiting.load(Ordering::SeqCst) {
            drop(self.quiet.lock().unwrap_or_else(PoisonError::into_inner));
            self.changed.notify_all();
        }
    }

    /// Waits until no pin taken before this call is held. False: the deadline passed first.
    pub fn synchronize(&self, deadline: Option<Instant>) -> bool {
        let Some(_turn) = self.turn.take(deadline) else {
            return false;
        };
        // A turn that timed out left pins of the other parity behind; they must go first.
        let old = self.epoch.load(Ordering::SeqCst);
        if !self.wait(deadline, || self.pinned(((old + 1) & 1) as usize) == 0) {
            return false;
        }
        self.epoch.store(old + 1, Ordering::SeqCst);
        self.wait(deadline, || self.pinned((old & 1) as usize) == 0)
    }

    /// Waits until nothing is in flight, pinned or parked. The caller has closed the gate, so that
    /// only what is inside already can move between the two.
    pub fn drain(&self, deadline: Option<Instant>) -> bool {
        loop {
            let before = self.parks.load(Ordering::SeqCst);
            if !self.wait(deadline, || self.parked.load(Ordering::SeqCst) == 0) || !self.synchronize(deadline) {
                return false;
            }
            // Nothing parked when the turn began, and nothing was parked since: then nothing came back
            // with a pin of the new epoch either, and the old ones are gone. (That nothing is parked
            // *now* would not be enough: a request may park, be answered and pin again in between.)
            if self.parks.load(Ordering::SeqCst) == before {
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
        let mut quiet = self.quiet.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            // The flag is set under the lock again each time: another waiter may have cleared it.
            self.waiting.store(true, Ordering::SeqCst);
            if done() {
                break;
            }
            match deadline {
                None => quiet = self.changed.wait(quiet).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                        self.waiting.store(false, Ordering::SeqCst);
                        self.changed.notify_all();
                        return done();
                    };
                    quiet = self.changed.wait_timeout(quiet, left).unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        }
        self.waiting.store(false, Ordering::SeqCst);
        // Whoever else waits must set the flag anew.
        self.changed.notify_all();
        true
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize};
    use std::time::Duration;

    use super::*;

    /// Requests that enter, park, are answered and pin again, over and over, as fast as they can.
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
                                epochs.park();
                                epochs.unpin(pin);
                                pin = epochs.pin(shard);
                                epochs.unpark();
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
                assert!(drained, "nobody may keep a device from draining for ever");
                shut.store(false, Ordering::SeqCst);
                std::thread::yield_now();
            }
            stop.store(true, Ordering::SeqCst);
            assert_eq!(busy, 0, "requests were inside of a drained device");
        });
    }

    #[test]
    fn a_turn_waits_for_those_before_it_and_for_nobody_else() {
        let epochs = Epochs::default();
        let past = Some(Instant::now());
        assert!(epochs.synchronize(past), "nobody is inside");
        let old = epochs.pin(Shard(3));
        let again = epochs.again(old);
        assert!(!epochs.synchronize(past));
        // The turn that gave up left a pin behind: later turns wait for it, too.
        let young = epochs.pin(Shard(4));
        epochs.unpin(old);
        assert!(!epochs.synchronize(past));
        epochs.unpin(again);
        epochs.unpin(young);
        epochs.park();
        assert!(epochs.synchronize(past), "parked requests hold nothing");
        assert!(!epochs.drain(past), "but they are inside");
        epochs.unpark();
        assert!(epochs.drain(past));
    }
}
