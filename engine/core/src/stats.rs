//! Request counters and latency histograms. Each update is one uncontended atomic operation.
//!
//! A `Stats` is sharded: each loop thread writes its own shard, and callers of the in-process API are spread over a few
//! more. A shard is allocated at its first write. A reader sums the shards without locks. The sum is exact when no
//! thread writes, and each counter only grows.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Loops write shards 0..8, callers 8..16.
pub const SHARDS: usize = 16;
const LOOPS: usize = 8;
pub const BUCKETS: usize = 16 + 60 * 8;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
    Extents,
    Cache,
}

impl Op {
    pub const ALL: [Op; 7] = [Op::Read, Op::Write, Op::Flush, Op::Discard, Op::WriteZeroes, Op::Extents, Op::Cache];

    pub fn name(self) -> &'static str {
        match self {
            Op::Read => "read",
            Op::Write => "write",
            Op::Flush => "flush",
            Op::Discard => "discard",
            Op::WriteZeroes => "write_zeroes",
            Op::Extents => "extents",
            Op::Cache => "cache",
        }
    }

    pub fn writes(self) -> bool {
        matches!(self, Op::Write | Op::Discard | Op::WriteZeroes)
    }
}

/// The shard of a loop thread, or of a caller's thread.
#[derive(Clone, Copy, Debug)]
pub struct Shard(pub(crate) usize);

impl Shard {
    pub fn of_loop(index: usize) -> Shard {
        Shard(index % LOOPS)
    }

    /// Chooses a shard by the address of the caller's stack: threads differ, and one thread mostly gets the same shard.
    pub fn of_caller() -> Shard {
        let here = 0u8;
        Shard(LOOPS + ((&raw const here as usize) >> 16) % (SHARDS - LOOPS))
    }
}

struct Counters {
    count: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    latency: [AtomicU64; BUCKETS],
}

struct Counts {
    ops: [Counters; Op::ALL.len()],
    started: AtomicU64,
    ended: AtomicU64,
    faults: AtomicU64,
}

#[derive(Default)]
pub struct Stats {
    shards: [OnceLock<Box<Counts>>; SHARDS],
}

/// Sums of one operation over all shards.
pub struct OpTotals {
    pub op: Op,
    pub count: u64,
    pub bytes: u64,
    pub errors: u64,
    /// Requests per latency bucket (see `bucket`).
    pub latency: Vec<u64>,
}

pub struct Totals {
    pub ops: Vec<OpTotals>,
    pub faults: u64,
    pub in_flight: u64,
}

/// The bucket of a latency. Log-linear: exact below 16 ns, then eight buckets an octave (12 % wide).
pub fn bucket(nanoseconds: u64) -> usize {
    if nanoseconds < 16 {
        return nanoseconds as usize;
    }
    let exponent = 63 - nanoseconds.leading_zeros() as usize;
    16 + (exponent - 4) * 8 + ((nanoseconds >> (exponent - 3)) & 7) as usize
}

fn zeros<const N: usize>() -> [AtomicU64; N] {
    std::array::from_fn(|_| AtomicU64::new(0))
}

impl Stats {
    fn shard(&self, shard: Shard) -> &Counts {
        self.shards[shard.0].get_or_init(|| {
            Box::new(Counts {
                ops: std::array::from_fn(|_| Counters {
                    count: AtomicU64::new(0),
                    bytes: AtomicU64::new(0),
                    errors: AtomicU64::new(0),
                    latency: zeros(),
                }),
                started: AtomicU64::new(0),
                ended: AtomicU64::new(0),
                faults: AtomicU64::new(0),
            })
        })
    }

    /// Allocates the counters of a shard. Otherwise the shard's first request does so.
    pub fn prepare(&self, shard: Shard) {
        let _counts = self.shard(shard);
    }

    pub fn start(&self, shard: Shard, count: u64) {
        self.shard(shard).started.fetch_add(count, Ordering::Relaxed);
    }

    /// Counts `count` ended requests of `op`, all with this latency.
    pub fn end(&self, shard: Shard, op: Op, count: u64, bytes: u64, errors: u64, nanoseconds: u64) {
        let shard = self.shard(shard);
        let counters = &shard.ops[op as usize];
        counters.count.fetch_add(count, Ordering::Relaxed);
        counters.bytes.fetch_add(bytes, Ordering::Relaxed);
        if errors > 0 {
            counters.errors.fetch_add(errors, Ordering::Relaxed);
        }
        counters.latency[bucket(nanoseconds)].fetch_add(count, Ordering::Relaxed);
        shard.ended.fetch_add(count, Ordering::Relaxed);
    }

    /// Uncounts a started request: another process continues it.
    pub fn withdraw(&self, shard: Shard) {
        self.shard(shard).ended.fetch_add(1, Ordering::Relaxed);
    }

    pub fn fault(&self, shard: Shard) {
        self.shard(shard).faults.fetch_add(1, Ordering::Relaxed);
    }

    pub fn totals(&self) -> Totals {
        let shards: Vec<&Counts> = self.shards.iter().filter_map(|shard| shard.get()).map(|shard| &**shard).collect();
        let sum = |pick: &dyn Fn(&Counts) -> &AtomicU64| -> u64 {
            shards.iter().map(|shard| pick(shard).load(Ordering::Relaxed)).sum()
        };
        // `ended` is read before `started`: a request that ends in between must not make the difference negative.
        let ended = sum(&|counts| &counts.ended);
        Totals {
            ops: Op::ALL
                .iter()
                .map(|&op| OpTotals {
                    op,
                    count: sum(&|counts| &counts.ops[op as usize].count),
                    bytes: sum(&|counts| &counts.ops[op as usize].bytes),
                    errors: sum(&|counts| &counts.ops[op as usize].errors),
                    latency: (0..BUCKETS).map(|i| sum(&|counts| &counts.ops[op as usize].latency[i])).collect(),
                })
                .collect(),
            faults: sum(&|counts| &counts.faults),
            in_flight: sum(&|counts| &counts.started).saturating_sub(ended),
        }
    }
}
