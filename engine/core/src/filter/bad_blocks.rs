//! Filter that fails reads of bad blocks, until they are written: the kernel's dm-dust.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use blkloom_io::Errno;

use super::{Asked, Filter, Verdict};
use crate::lock;
use crate::stats::Op;

pub struct BadBlocks {
    /// Bytes.
    block: u64,
    /// Offset of the filtered range: blocks are counted from an offset of 0 on.
    start: u64,
    /// Whether bad blocks fail.
    enabled: AtomicBool,
    /// Bad blocks, and the number of writes to each that still fail.
    blocks: Mutex<BTreeMap<u64, u8>>,
    has_blocks: AtomicBool,
}

impl BadBlocks {
    /// block: size in bytes, at least 1. start: the offset in the device of the filtered range.
    pub fn new(block: u64, start: u64) -> BadBlocks {
        let (enabled, has_blocks) = (AtomicBool::new(false), AtomicBool::new(false));
        BadBlocks { block: block.max(1), start, enabled, blocks: Mutex::default(), has_blocks }
    }

    pub fn is_enabled(&self) -> bool {
        self.enabled.load(Ordering::Relaxed)
    }

    pub fn enable(&self, enabled: bool) {
        self.enabled.store(enabled, Ordering::Relaxed);
    }

    /// Makes a block bad. failing_writes: that many writes to it fail, and the next makes it good. False: it was bad.
    pub fn add(&self, block: u64, failing_writes: u8) -> bool {
        self.change(|blocks| match blocks.contains_key(&block) {
            true => false,
            false => blocks.insert(block, failing_writes).is_none(),
        })
    }

    /// Makes a block good. False: it was good.
    pub fn remove(&self, block: u64) -> bool {
        self.change(|blocks| blocks.remove(&block).is_some())
    }

    /// Makes all blocks good. Returns the number of bad ones.
    pub fn clear(&self) -> usize {
        self.change(|blocks| std::mem::take(blocks).len())
    }

    /// All bad blocks, in order, and the number of writes to each that still fail.
    pub fn list(&self) -> Vec<(u64, u8)> {
        lock(&self.blocks).iter().map(|(&block, &failing)| (block, failing)).collect()
    }

    fn change<T>(&self, change: impl FnOnce(&mut BTreeMap<u64, u8>) -> T) -> T {
        let mut blocks = lock(&self.blocks);
        let result = change(&mut blocks);
        self.has_blocks.store(!blocks.is_empty(), Ordering::Relaxed);
        result
    }
}

impl Filter for BadBlocks {
    /// Splits requests at the borders of bad blocks.
    fn decide(&self, op: Op, at: u64, len: u64, asked: Asked) -> (Verdict, u64) {
        if !self.has_blocks.load(Ordering::Relaxed) || !self.is_enabled() {
            return (Verdict::Pass, len);
        }
        let from = self.start.saturating_add(at);
        let (first, past) = (from / self.block, from.saturating_add(len).div_ceil(self.block));
        self.change(|blocks| {
            let Some((&block, failing)) = blocks.range_mut(first..past).next() else {
                return (Verdict::Pass, len);
            };
            if block > first {
                return (Verdict::Pass, block * self.block - from);
            }
            let len = len.min((block + 1) * self.block - from);
            if op == Op::Read {
                return (Verdict::Fail(Errno::IO), len);
            }
            if *failing > 0 {
                *failing -= 1;
                return (Verdict::Fail(Errno::IO), len);
            }
            if asked == Asked::Once {
                blocks.remove(&block);
            }
            (Verdict::Pass, len)
        })
    }

    fn passed(&self, op: Op, at: u64, _len: u64) {
        if op.writes() && self.has_blocks.load(Ordering::Relaxed) && self.is_enabled() {
            self.remove(self.start.saturating_add(at) / self.block);
        }
    }
}
