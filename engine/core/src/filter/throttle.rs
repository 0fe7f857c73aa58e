//! Filter that limits operations and bytes a second.
//!
//! Each limit is a leaky bucket: an operation takes its cost, at a constant rate, after those before it. While nothing is
//! taken, up to `burst` of time is saved, and what fits into it does not wait. So the rate of any interval is at most the
//! limit, plus one burst.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::{Asked, Counted, Filter, Verdict};
use crate::clock::LONGEST_TIMEOUT;
use crate::lock;
use crate::stats::Op;

/// What a limit counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Per {
    Operations,
    Bytes,
}

/// At most `rate` operations or bytes a second, of reads, of operations that change data, or of both together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limit {
    pub per: Per,
    pub reads: bool,
    pub writes: bool,
    /// At least 1.
    pub rate: u64,
    /// Time that is saved while nothing is taken.
    pub burst: Duration,
}

impl Limit {
    fn counts(&self, op: Op) -> bool {
        if op.writes() { self.writes } else { self.reads }
    }

    /// How long the operation takes at this rate.
    fn time(&self, len: u64) -> Duration {
        let amount = if self.per == Per::Bytes { len } else { 1 };
        let nanoseconds = u128::from(amount) * 1_000_000_000 / u128::from(self.rate.max(1));
        Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX)).min(LONGEST_TIMEOUT)
    }
}

#[derive(Default)]
pub struct Throttle {
    limits: Mutex<Vec<Bucket>>,
    has_limits: AtomicBool,
    waiting: Arc<AtomicUsize>,
}

impl Throttle {
    pub fn new(limits: Vec<Limit>) -> Throttle {
        let throttle = Throttle::default();
        throttle.set(limits);
        throttle
    }

    /// Replaces the limits. Pieces that wait already keep their time.
    pub fn set(&self, limits: Vec<Limit>) {
        let mut current = lock(&self.limits);
        self.has_limits.store(!limits.is_empty(), Ordering::Relaxed);
        let now = Instant::now();
        // At first, all of a burst is saved.
        let begin = |limit: &Limit| now.checked_sub(limit.burst).unwrap_or(now);
        *current = limits.into_iter().map(|limit| Bucket { taken: begin(&limit), limit }).collect();
    }

    /// The number of pieces that wait.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }
}

impl Filter for Throttle {
    fn decide(&self, op: Op, _at: u64, len: u64, asked: Asked) -> (Verdict, u64) {
        if !self.has_limits.load(Ordering::Relaxed) {
            return (Verdict::Pass, len);
        }
        let mut limits = lock(&self.limits);
        let now = Instant::now();
        let counting = limits.iter_mut().filter(|bucket| bucket.limit.counts(op));
        let wait = counting.map(|bucket| bucket.wait(now)).max().unwrap_or_default();
        if asked == Asked::Once {
            take(&mut limits, op, len, now);
        }
        let verdict = match wait.is_zero() {
            true => Verdict::Pass,
            false => Verdict::Wait(wait, (asked == Asked::Once).then(|| Counted::new(&self.waiting))),
        };
        (verdict, len)
    }

    fn passed(&self, op: Op, _at: u64, len: u64) {
        if self.has_limits.load(Ordering::Relaxed) {
            take(&mut lock(&self.limits), op, len, Instant::now());
        }
    }
}

/// A limit, and until when it is taken.
struct Bucket {
    limit: Limit,
    taken: Instant,
}

impl Bucket {
    /// When the next operation begins: not before `now`, less what was saved.
    fn begins(&self, now: Instant) -> Instant {
        self.taken.max(now.checked_sub(self.limit.burst).unwrap_or(now))
    }

    fn wait(&self, now: Instant) -> Duration {
        self.begins(now).saturating_duration_since(now)
    }
}

fn take(buckets: &mut [Bucket], op: Op, len: u64, now: Instant) {
    for bucket in buckets.iter_mut().filter(|bucket| bucket.limit.counts(op)) {
        let begins = bucket.begins(now);
        bucket.taken = begins.checked_add(bucket.limit.time(len)).unwrap_or(begins);
    }
}
