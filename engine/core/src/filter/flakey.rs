//! Filter that is up for some seconds and down for some, in turn: the arithmetic of the kernel's dm-flakey.

use std::time::{Duration, Instant};

use blkloom_io::Errno;

use super::{Asked, Filter, Treatment, Verdict};
use crate::stats::Op;

pub struct Flakey {
    began: Instant,
    up: u64,
    period: u64,
    /// For reads, and for operations that change data.
    when_down: [Treatment; 2],
}

impl Flakey {
    /// up, down: seconds. elapsed: how long ago it began. None: up and down are both 0.
    pub fn new(up: u32, down: u32, when_down: [Treatment; 2], elapsed: Duration) -> Option<Flakey> {
        let (up, down) = (u64::from(up), u64::from(down));
        let now = Instant::now();
        let began = now.checked_sub(elapsed).unwrap_or(now);
        (up + down > 0).then(|| Flakey { began, up, period: up + down, when_down })
    }

    /// Whether it is down now: the whole seconds since the start, modulo the period, have reached the up interval.
    pub fn is_down(&self) -> bool {
        // A filter that is never down, or never up, needs no clock.
        self.up == 0 || self.up < self.period && self.began.elapsed().as_secs() % self.period >= self.up
    }
}

impl Filter for Flakey {
    fn decide(&self, op: Op, _at: u64, len: u64, _asked: Asked) -> (Verdict, u64) {
        let treatment = self.when_down[usize::from(op.writes())];
        let verdict = match treatment == Treatment::Pass || !self.is_down() {
            true => Verdict::Pass,
            false => treatment.verdict(op),
        };
        (verdict, len)
    }

    fn fails_flush(&self) -> Option<Errno> {
        (self.when_down[1] == Treatment::Fail && self.is_down()).then_some(Errno::IO)
    }
}
