//! Filter that delays reads by one time, and operations that change data by another.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::{Asked, Counted, Filter, Verdict};
use crate::stats::Op;

pub struct Delay {
    /// Of reads, and of operations that change data.
    times: [Duration; 2],
    waiting: [Arc<AtomicUsize>; 2],
}

impl Delay {
    pub fn new(reads: Duration, others: Duration) -> Delay {
        Delay { times: [reads, others], waiting: Default::default() }
    }

    /// The number of pieces that wait: reads, and operations that change data.
    pub fn waiting(&self) -> [usize; 2] {
        [0, 1].map(|class: usize| self.waiting[class].load(Ordering::Relaxed))
    }
}

impl Filter for Delay {
    fn decide(&self, op: Op, _at: u64, len: u64, asked: Asked) -> (Verdict, u64) {
        let class = usize::from(op.writes());
        let time = self.times[class];
        let verdict = match time.is_zero() {
            true => Verdict::Pass,
            false => Verdict::Wait(time, (asked == Asked::Once).then(|| Counted::new(&self.waiting[class]))),
        };
        (verdict, len)
    }
}
