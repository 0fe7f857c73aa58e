//! Benchmark of map lookups: nanoseconds per lookup, by bisection and with a hint, sequential and random, for maps of
//! several sizes. `cargo run --release -p blkloom-map --example lookups`
#![allow(clippy::print_stdout, reason = "a program")]

use std::hint::black_box;
use std::time::Instant;

use blkloom_map::{Extent, Handles, Hint, Map, Segment};

struct Numbers;

impl Handles for Numbers {
    type File = u32;
    type Region = u32;
    type Device = u32;
    type Backend = u32;
    type Tee = u32;
    type Filter = ();
    type Error = i32;
    const ENTRY_ERROR: i32 = 5;
}

const LOOKUPS: usize = 1 << 20;
const SEGMENT: u64 = 64 << 10;
const BLOCK: u64 = 4096;
const ROUNDS: usize = 7;

fn map(segments: u64) -> Map<Numbers> {
    let segment = |i| {
        let extent = Extent::Data { file: 0, offset: (i * 7919 % segments) * SEGMENT, writable: true };
        Segment { start: i * SEGMENT, end: (i + 1) * SEGMENT, owner: 0, extent }
    };
    Map::new((0..segments).map(segment).collect(), Vec::new()).expect("the segments are contiguous")
}

/// The best round, in nanoseconds per lookup.
fn time(offsets: &[u64], mut lookup: impl FnMut(u64) -> u64) -> f64 {
    let mut best = f64::INFINITY;
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        let sum = offsets.iter().fold(0u64, |sum, &offset| sum.wrapping_add(lookup(black_box(offset))));
        black_box(sum);
        best = best.min(begun.elapsed().as_nanos() as f64 / offsets.len() as f64);
    }
    best
}

fn main() {
    println!("{:>9}  {:12} {:>9} {:>9}   ns a lookup", "segments", "offsets", "bisection", "hint");
    for segments in [1, 2, 4, 8, 16, 1000, 100_000] {
        let map = map(segments);
        let blocks = map.size() / BLOCK;
        let mut seed = 1u64;
        let mut random = || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed % blocks * BLOCK
        };
        let in_order: Vec<u64> = (0..LOOKUPS as u64).map(|i| i % blocks * BLOCK).collect();
        let at_random: Vec<u64> = (0..LOOKUPS).map(|_| random()).collect();
        for (name, offsets) in [("in order", in_order), ("at random", at_random)] {
            let hint = Hint::default();
            let bisected = time(&offsets, |offset| map.lookup(offset, BLOCK).map_or(0, |piece| piece.len));
            let hinted = time(&offsets, |offset| map.lookup_near(&hint, offset, BLOCK).map_or(0, |piece| piece.len));
            println!("{segments:>9}  {name:12} {bisected:>9.1} {hinted:>9.1}");
        }
    }
}
