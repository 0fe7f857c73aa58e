//! Filter that fails operations of certain kinds with a probability.

use std::sync::atomic::{AtomicU64, Ordering};

use blkloom_io::Errno;

use super::{Asked, Filter, Verdict};
use crate::stats::Op;

/// Kinds of operations.
#[derive(Clone, Copy, Debug, Default)]
pub struct Operations {
    pub read: bool,
    pub write: bool,
    pub discard: bool,
    pub write_zeroes: bool,
    pub flush: bool,
}

impl Operations {
    fn has(self, op: Op) -> bool {
        match op {
            Op::Read => self.read,
            Op::Write => self.write,
            Op::Discard => self.discard,
            Op::WriteZeroes => self.write_zeroes,
            Op::Flush => self.flush,
            Op::Extents | Op::Cache => false,
        }
    }
}

/// Probabilities are in billionths, as those of the kernel's dm-flakey.
pub const CERTAIN: u32 = 1_000_000_000;

const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

pub struct Errors {
    errno: Errno,
    operations: Operations,
    probability: u32,
    /// Of the random numbers: the state of SplitMix64, which is a counter.
    state: AtomicU64,
}

impl Errors {
    /// probability: in billionths; `CERTAIN` or more fails all. seed: the same seed fails the same pieces of a sequence.
    pub fn new(errno: Errno, operations: Operations, probability: u32, seed: u64) -> Errors {
        Errors { errno, operations, probability, state: AtomicU64::new(seed) }
    }

    fn fails_next(&self) -> bool {
        self.probability >= CERTAIN || self.next() % u64::from(CERTAIN) < u64::from(self.probability)
    }

    fn advance(&self) {
        self.state.fetch_add(STEP, Ordering::Relaxed);
    }

    /// The next random number. The same until `advance` (SplitMix64: Steele, Lea, Flood 2014).
    fn next(&self) -> u64 {
        let mut bits = self.state.load(Ordering::Relaxed).wrapping_add(STEP);
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }
}

impl Filter for Errors {
    fn decide(&self, op: Op, _at: u64, len: u64, asked: Asked) -> (Verdict, u64) {
        if !self.operations.has(op) {
            return (Verdict::Pass, len);
        }
        let fails = self.fails_next();
        if fails || asked == Asked::Once {
            self.advance();
        }
        (if fails { Verdict::Fail(self.errno) } else { Verdict::Pass }, len)
    }

    fn fails_flush(&self) -> Option<Errno> {
        if !self.operations.flush {
            return None;
        }
        let fails = self.fails_next();
        self.advance();
        fails.then_some(self.errno)
    }

    fn passed(&self, op: Op, _at: u64, _len: u64) {
        if self.operations.has(op) {
            self.advance();
        }
    }
}
