//! Filter that limits operations and bytes a second.
//!
//! Each limit is a leaky bucket: an operation takes its cost, at a constant rate, after those before it. While nothing is
//! taken, up to `burst` of time is saved, and what fits into it does not wait. So the rate of any interval is at most the
//! limit, plus one burst.
//!
//! An operation far from the limit takes no lock and reads only the coarse clock, which is up to `TICK` behind. A long
//! burst is filled as if the clock were that much ahead, so up to `TICK` less than a burst is saved, and never more.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::time::Duration;

use super::{Asked, Counted, Filter, Verdict};
use crate::clock::{self, LONGEST_TIMEOUT};
use crate::stats::Op;
use crate::sync::atomic::{AtomicI64, AtomicU64, Ordering};

/// Nanoseconds. The longest period of the kernel's timer interrupt, which sets the coarse clock.
const TICK: i64 = 10_000_000;
/// Nanoseconds. Shorter bursts are filled by the exact clock.
const LONG_BURST: i64 = 10 * TICK;

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

#[derive(Default)]
pub struct Throttle {
    /// Of operations and of bytes.
    buckets: [Buckets; 2],
    has_limits: AtomicBool,
    waiting: Arc<AtomicUsize>,
}

#[derive(Default)]
struct Buckets {
    all: Bucket,
    /// Of reads, and of operations that change data.
    classes: [Bucket; 2],
}

impl Throttle {
    pub fn new(limits: Vec<Limit>) -> Throttle {
        let throttle = Throttle::default();
        throttle.set(limits);
        throttle
    }

    /// Replaces the limits. Of several for the same operations, the last counts. Pieces that wait already keep their
    /// time.
    pub fn set(&self, limits: Vec<Limit>) {
        for buckets in &self.buckets {
            for bucket in [&buckets.all, &buckets.classes[0], &buckets.classes[1]] {
                bucket.rate.store(0, Ordering::Relaxed);
            }
        }
        for limit in &limits {
            let buckets = &self.buckets[usize::from(limit.per == Per::Bytes)];
            match (limit.reads, limit.writes) {
                (true, true) => buckets.all.set(limit),
                (true, false) => buckets.classes[0].set(limit),
                (false, true) => buckets.classes[1].set(limit),
                (false, false) => {}
            }
        }
        self.has_limits.store(!limits.is_empty(), Ordering::Relaxed);
    }

    /// The number of pieces that wait.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// The buckets with a limit that count an operation, and how much each counts.
    fn counting(&self, op: Op, len: u64) -> impl Iterator<Item = (&Bucket, u64)> {
        let class = usize::from(op.writes());
        self.buckets
            .iter()
            .zip([1, len])
            .flat_map(move |(buckets, amount)| [(&buckets.all, amount), (&buckets.classes[class], amount)])
            .filter(|(bucket, _)| bucket.rate.load(Ordering::Relaxed) != 0)
    }
}

impl Filter for Throttle {
    fn decide(&self, op: Op, _at: u64, len: u64, asked: Asked) -> (Verdict, u64) {
        if !self.has_limits.load(Ordering::Relaxed) {
            return (Verdict::Pass, len);
        }
        let coarse = clock::coarse();
        let mut begins = i64::MIN;
        for (bucket, amount) in self.counting(op, len) {
            let filled = bucket.fill(coarse);
            begins = begins.max(if asked == Asked::Once { bucket.take(amount) } else { filled });
        }
        // The exact time is later than the coarse one, so it matters only if that is not enough.
        let wait = if begins <= coarse { 0 } else { begins - clock::exact() };
        let verdict = match u64::try_from(wait) {
            Ok(1..) => {
                let counted = (asked == Asked::Once).then(|| Counted::new(&self.waiting));
                Verdict::Wait(Duration::from_nanos(wait.unsigned_abs()), counted)
            }
            _ => Verdict::Pass,
        };
        (verdict, len)
    }

    fn passed(&self, op: Op, _at: u64, len: u64) {
        if self.has_limits.load(Ordering::Relaxed) {
            for (bucket, amount) in self.counting(op, len) {
                bucket.take(amount);
            }
        }
    }
}

/// A limit, and until when it is taken. Times are those of the monotonic clock, in nanoseconds.
#[derive(Default)]
pub(crate) struct Bucket {
    /// Operations or bytes a second; 0: no limit.
    rate: AtomicU64,
    burst: AtomicI64,
    taken: AtomicI64,
}

impl Bucket {
    fn set(&self, limit: &Limit) {
        let burst = limit.burst.min(LONGEST_TIMEOUT).as_nanos() as i64;
        self.begin(limit.rate.max(1), burst, clock::exact());
    }

    /// At first, all of a burst is saved.
    pub(crate) fn begin(&self, rate: u64, burst: i64, now: i64) {
        self.burst.store(burst, Ordering::Relaxed);
        self.taken.store(now - burst, Ordering::Relaxed);
        self.rate.store(rate, Ordering::Relaxed);
    }

    /// Forgets what was saved beyond a burst. Returns when the next operation begins, or a time in the past.
    pub(crate) fn fill(&self, coarse: i64) -> i64 {
        let burst = self.burst.load(Ordering::Relaxed);
        let now = if burst >= LONG_BURST { coarse + TICK } else { clock::exact() };
        let taken = self.taken.load(Ordering::Relaxed);
        if taken >= now - burst {
            return taken;
        }
        self.taken.fetch_max(now - burst, Ordering::Relaxed).max(now - burst)
    }

    /// Takes operations or bytes. Returns when they begin.
    pub(crate) fn take(&self, amount: u64) -> i64 {
        let rate = self.rate.load(Ordering::Relaxed);
        if rate == 0 {
            return i64::MIN; // the limit has just been removed
        }
        let time = nanoseconds(amount, rate);
        let later = |taken: i64| Some(taken.saturating_add(time));
        self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, later).unwrap_or_else(|unchanged| unchanged)
    }

    #[cfg(all(loom, test))]
    pub(crate) fn taken(&self) -> i64 {
        self.taken.load(Ordering::SeqCst)
    }
}

/// How long an amount takes at a rate.
fn nanoseconds(amount: u64, rate: u64) -> i64 {
    let time = match amount.checked_mul(1_000_000_000) {
        Some(product) => product / rate,
        None => u64::try_from(u128::from(amount) * 1_000_000_000 / u128::from(rate)).unwrap_or(u64::MAX),
    };
    time.min(LONGEST_TIMEOUT.as_nanos() as u64) as i64
}
