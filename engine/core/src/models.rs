//! loom models of a few threads. loom runs all interleavings with a limited number of preemptions
//! (`BLKLOOM_PREEMPTIONS`, default 3), and checks that all accesses to an `UnsafeCell` are ordered. The models use the
//! engine's own epochs, devices, mailboxes, deferred requests, backend queues and throttles.
//!
//! `RUSTFLAGS='--cfg loom' cargo test -p blkloom-core --lib --release models`; `make verify` does that.
#![allow(clippy::unwrap_used, reason = "tests")]

mod backend_queue;
mod throttle;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64 as Counter, Ordering as CounterOrdering};

use blkloom_map::{Extent, Segment};
use loom::cell::UnsafeCell;
use loom::thread;

use crate::clock::LONGEST_TIMEOUT;
use crate::deferred::Deferred;
use crate::device::{Device, Map, Mapping};
use crate::epoch::Epochs;
use crate::mailbox::{Mailbox, Post, Poster};
use crate::stats::Shard;
use crate::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use crate::wake::{TaskId, Wake};

/// Runs a model in every interleaving, and prints their number.
fn explore(name: &str, model: impl Fn() + Send + Sync + 'static) {
    let count = Arc::new(Counter::new(0));
    let counted = count.clone();
    let preemptions = std::env::var("BLKLOOM_PREEMPTIONS").ok();
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound =
        Some(preemptions.map_or(3, |bound| bound.parse().expect("BLKLOOM_PREEMPTIONS: a number")));
    builder.max_branches = 100_000;
    builder.check(move || {
        counted.fetch_add(1, CounterOrdering::Relaxed);
        model();
    });
    println!("model {name}: {} interleavings", count.load(CounterOrdering::Relaxed));
}

/// An object that requests use and that is freed later, such as a map. loom panics if a use and the free are not
/// ordered.
struct Thing(UnsafeCell<bool>);

// SAFETY: every access goes through loom's cell, which panics if accesses of two threads are not ordered.
unsafe impl Sync for Thing {}

impl Thing {
    fn new() -> Thing {
        Thing(UnsafeCell::new(true))
    }

    /// Panics if it was taken away.
    fn use_it(&self) {
        // SAFETY: loom's cell checks that there is no concurrent mutable access.
        assert!(self.0.with(|there| unsafe { *there }), "used after it was taken away");
    }

    fn take_away(&self) {
        // SAFETY: loom's cell checks that there is no concurrent access.
        self.0.with_mut(|there| unsafe { *there = false });
    }
}

/// Maps by number, of which one is published.
struct Published {
    epochs: Epochs,
    current: AtomicUsize,
    maps: [Thing; 3],
}

impl Published {
    fn new() -> Arc<Published> {
        let maps = [Thing::new(), Thing::new(), Thing::new()];
        Arc::new(Published { epochs: Epochs::default(), current: AtomicUsize::new(0), maps })
    }

    fn request(&self, shard: usize) {
        let pin = self.epochs.pin(Shard(shard));
        self.maps[self.current.load(SeqCst)].use_it();
        self.epochs.unpin(pin);
    }

    fn swap(&self, from: usize) {
        self.current.store(from + 1, SeqCst);
        assert!(self.epochs.synchronize(None));
        self.maps[from].take_away();
    }
}

#[test]
fn a_map_is_let_go_of_when_no_request_uses_it() {
    explore("epochs: two requests, two swaps", || {
        let published = Published::new();
        let requests = [0, 1].map(|shard| {
            let published = published.clone();
            thread::spawn(move || published.request(shard))
        });
        published.swap(0);
        published.swap(1);
        requests.into_iter().for_each(|request| request.join().unwrap());
    });
}

#[test]
fn a_request_that_pins_a_second_time_keeps_the_map_it_found() {
    explore("epochs: a second pin of the same epoch", || {
        let published = Published::new();
        let request = {
            let published = published.clone();
            thread::spawn(move || {
                let first = published.epochs.pin(Shard(0));
                let map = published.current.load(SeqCst);
                let second = published.epochs.again(first);
                published.epochs.unpin(first);
                published.maps[map].use_it();
                published.epochs.unpin(second);
            })
        };
        published.swap(0);
        published.swap(1);
        request.join().unwrap();
    });
}

#[test]
fn threads_that_synchronize_together_take_turns() {
    explore("epochs: two threads synchronize", || {
        let published = Published::new();
        let used = Arc::new(Thing::new());
        let request = {
            let (published, used) = (published.clone(), used.clone());
            thread::spawn(move || {
                let pin = published.epochs.pin(Shard(1));
                if published.current.load(SeqCst) == 0 {
                    used.use_it();
                }
                published.epochs.unpin(pin);
            })
        };
        let other = {
            let published = published.clone();
            thread::spawn(move || assert!(published.epochs.synchronize(None)))
        };
        published.current.store(1, SeqCst);
        assert!(published.epochs.synchronize(None));
        used.take_away();
        other.join().unwrap();
        request.join().unwrap();
    });
}

/// Like a fault: the request waits without a pin, then retried with a new pin.
#[test]
fn a_device_is_drained_when_no_request_is_inside_pinned_or_waiting() {
    explore("epochs: drain while a request waits and comes back", || {
        let (epochs, shut, inside) =
            (Arc::new(Epochs::default()), Arc::new(AtomicBool::new(false)), Arc::new(Thing::new()));
        let request = {
            let (epochs, shut, inside) = (epochs.clone(), shut.clone(), inside.clone());
            thread::spawn(move || {
                let mut pin = epochs.pin(Shard(0));
                if !shut.load(SeqCst) {
                    for _ in 0..2 {
                        inside.use_it();
                        epochs.begin_wait();
                        epochs.unpin(pin);
                        pin = epochs.pin(Shard(0));
                        epochs.end_wait();
                    }
                    inside.use_it();
                }
                epochs.unpin(pin);
            })
        };
        shut.store(true, SeqCst);
        assert!(epochs.drain(None));
        inside.take_away();
        request.join().unwrap();
    });
}

#[test]
fn a_fault_handler_may_synchronize_while_its_request_waits() {
    explore("epochs: synchronize for a waiting request", || {
        let published = Published::new();
        let pin = published.epochs.pin(Shard(0));
        published.epochs.begin_wait();
        let mapper = {
            let published = published.clone();
            thread::spawn(move || published.swap(0))
        };
        published.epochs.unpin(pin);
        // The answer. The request is walked again only after it.
        mapper.join().unwrap();
        let pin = published.epochs.pin(Shard(0));
        published.epochs.end_wait();
        published.maps[published.current.load(SeqCst)].use_it();
        published.epochs.unpin(pin);
    });
}

#[test]
fn a_reader_that_sleeps_is_woken_by_whatever_comes() {
    explore("mailbox: two senders, a reader that sleeps", || {
        let mailbox = Arc::new(Mailbox::<u32>::new().unwrap());
        let senders = [1, 2].map(|message| {
            let mailbox = mailbox.clone();
            thread::spawn(move || mailbox.send(message))
        });
        let (mut sum, mut taken) = (0, Vec::new());
        while sum < 3 {
            mailbox.take(&mut taken);
            sum += taken.drain(..).sum::<u32>();
            // A loop does this when it has no work. A lost wakeup would be a deadlock here.
            if sum < 3 && mailbox.doze() {
                mailbox.event.wait();
                mailbox.clear();
                mailbox.woke();
            }
        }
        senders.into_iter().for_each(|sender| sender.join().unwrap());
        assert_eq!(sum, 3, "each message comes once");
    });
}

/// A loop woken for another reason (its epoll has other descriptors) misses no message either.
#[test]
fn a_reader_that_wakes_for_another_reason_misses_nothing() {
    explore("mailbox: a reader that wakes early", || {
        let mailbox = Arc::new(Mailbox::<u32>::new().unwrap());
        let sender = {
            let mailbox = mailbox.clone();
            thread::spawn(move || {
                mailbox.send(1);
                mailbox.send(2);
            })
        };
        let (mut got, mut taken) = (Vec::new(), Vec::new());
        if mailbox.doze() {
            mailbox.woke();
        }
        while got.len() < 2 {
            mailbox.take(&mut taken);
            got.append(&mut taken);
            if got.len() < 2 && mailbox.doze() {
                mailbox.event.wait();
                mailbox.clear();
                mailbox.woke();
            }
        }
        sender.join().unwrap();
        assert_eq!(got, [1, 2], "in order");
    });
}

/// Counts the wakes that a loop was sent.
struct Loop(AtomicUsize);

impl Post<Wake> for Loop {
    fn post(&self, _wake: Wake) {
        self.0.fetch_add(1, SeqCst);
    }
}

const TASK: TaskId = TaskId { slot: 1, generation: 1 };

fn a_loop() -> (Arc<Loop>, Poster<Wake>) {
    let posts = Arc::new(Loop(AtomicUsize::new(0)));
    (posts.clone(), posts)
}

fn device() -> Arc<Device> {
    let segment = Segment { start: 0, end: 4096, owner: 0, extent: Extent::Fault };
    let map = Map::new(vec![segment], vec![]).unwrap();
    Device::new("model".into(), Some(Arc::new(Mapping::new(map).unwrap())), LONGEST_TIMEOUT).unwrap()
}

/// What a queue does with a fault whose target defers it (`Queue::defer`).
fn defer(device: &Device, wakes: &Poster<Wake>, is_over: impl Fn() -> bool) -> bool {
    device.deferred.enter(wakes, TASK, false) && device.is_live() && !is_over()
}

#[test]
fn a_deferred_fault_is_walked_again_when_its_gate_closes() {
    explore("deferred: a deferred fault and a gate that closes", || {
        let (device, (posted, wakes)) = (device(), a_loop());
        let suspending = {
            let device = device.clone();
            thread::spawn(move || device.suspend(None, || Ok(())).unwrap())
        };
        let deferral = device.deferred.defer();
        let waits = defer(&device, &wakes, || deferral.is_over());
        suspending.join().unwrap();
        assert!(!waits || posted.0.load(SeqCst) == 1, "it waits and is never woken");
    });
}

#[test]
fn a_deferred_fault_is_asked_again_when_its_target_says_so() {
    explore("deferred: a deferred fault and retry_deferred", || {
        let (device, (posted, wakes)) = (device(), a_loop());
        let deferral = device.deferred.defer();
        let again = {
            let device = device.clone();
            thread::spawn(move || device.retry_deferred())
        };
        let waits = defer(&device, &wakes, || deferral.is_over());
        again.join().unwrap();
        assert!(!waits || posted.0.load(SeqCst) == 1, "it waits and is never woken");
        drop(deferral);
        assert_eq!(device.deferred(), 0);
    });
}

#[test]
fn a_deferred_fault_fails_when_deferred_faults_are_to_fail() {
    explore("deferred: a deferred fault and fail_deferred", || {
        let (deferred, (posted, wakes)) = (Arc::new(Deferred::default()), a_loop());
        let refusing = {
            let deferred = deferred.clone();
            thread::spawn(move || deferred.refuse())
        };
        let waits = deferred.enter(&wakes, TASK, false);
        refusing.join().unwrap();
        assert_eq!(posted.0.load(SeqCst), usize::from(waits), "it is refused, once");
    });
}

#[test]
fn a_request_that_waits_at_a_gate_hears_that_it_opens() {
    explore("gate: a request waits, the gate opens", || {
        let (device, (posted, wakes)) = (device(), a_loop());
        device.suspend(None, || Ok(())).unwrap();
        let resuming = {
            let device = device.clone();
            thread::spawn(move || assert!(device.resume()))
        };
        let waits =
            device.enter(Shard(0)).map(|pin| device.epochs.unpin(pin)).is_err() && device.wait_at_gate(&wakes, TASK);
        resuming.join().unwrap();
        assert_eq!(posted.0.load(SeqCst), usize::from(waits), "it is woken, once");
    });
}

#[test]
fn a_suspended_device_has_nothing_inside_and_lets_nothing_in() {
    explore("gate: two requests enter, the device suspends and resumes", || {
        let (device, inside) = (device(), Arc::new([Thing::new(), Thing::new()]));
        let gone = Arc::new(AtomicUsize::new(0));
        let requests = [0, 1].map(|shard| {
            let (device, inside, gone) = (device.clone(), inside.clone(), gone.clone());
            thread::spawn(move || {
                if let Ok(pin) = device.enter(Shard(shard)) {
                    inside[gone.load(SeqCst)].use_it();
                    device.epochs.unpin(pin);
                }
            })
        });
        device.suspend(None, || Ok(())).unwrap();
        inside[0].take_away();
        gone.store(1, SeqCst);
        assert!(device.resume());
        requests.into_iter().for_each(|request| request.join().unwrap());
    });
}
