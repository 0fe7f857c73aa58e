//! Random requests from several threads on every kind of extent at once, while the map is swapped, the device suspended
//! and resumed, and clusters installed and dropped; checked byte by byte.
//!
//! Each thread owns ranges of bytes. The ranges of different threads are in the same blocks, clusters, chunks and
//! pages, so that the test detects lost and mixed writes of a neighbour.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use blkloom_core::{Answer, Device, Direction, Engine, Fault, Flags, Kinds, Memory, Op, Transfer};
use blkloom_io::{Buffer, File, Scratch};
use blkloom_map::{ClusterTable, Entry, Extent};
use rig::*;

const CLUSTER: u64 = 4096;
const TABLE: u64 = 64 * CLUSTER;
const THREADS: u64 = 4;
const ROUNDS: u64 = 2000;

/// A cluster table on a file, like that of an image format: unwritten clusters are zeros, the others are in reverse
/// order in the file. A page has eight entries.
struct Format {
    table: Arc<ClusterTable<Kinds>>,
    file: Arc<File>,
    written: Vec<bool>,
    random: Random,
}

impl Format {
    fn new(seed: u64) -> Format {
        let file = file(TABLE, false);
        let table = Arc::new(ClusterTable::new(TABLE, CLUSTER, 8, vec![file.clone()]).unwrap());
        Format { table, file, written: vec![false; 64], random: Random::new(seed) }
    }

    fn place(cluster: u64) -> u64 {
        (63 - cluster) * CLUSTER
    }

    /// Answers faults until the device closes. start: offset of the table in the device.
    fn serve(mut self, device: &Device, start: u64) {
        while let Some(faults) = device.next_faults(None) {
            for mut fault in faults {
                let answer = self.answer(&fault, start);
                if self.random.one_in(5) {
                    // While requests wait, also this one.
                    self.table.drop_page(self.random.below(8)).unwrap();
                    device.synchronize();
                }
                fault.answer(answer);
            }
        }
    }

    fn answer(&mut self, fault: &Fault, start: u64) -> Answer {
        if fault.op == Op::Flush {
            return Answer::Done(None);
        }
        let (from, to) = (fault.offset - start, fault.offset - start + fault.len);
        for cluster in from / CLUSTER..to.div_ceil(CLUSTER) {
            let at = cluster as usize;
            self.written[at] |= fault.op == Op::Write;
            let entry = match (self.written[at], fault.op) {
                (false, _) => Entry::KIND_ZERO << 61,
                (true, Op::Read) if self.random.one_in(2) => Entry::KIND_READ_ONLY << 61 | Self::place(cluster) >> 9,
                (true, _) => Entry::KIND_DATA << 61 | Self::place(cluster) >> 9,
            };
            self.table.install(cluster, &[entry]).unwrap();
        }
        match fault.op {
            Op::Discard | Op::WriteZeroes => {
                // Unwritten clusters are zeros already. Of the others only this range is zeroed.
                let mut at = from;
                while at < to {
                    let part = (CLUSTER - at % CLUSTER).min(to - at);
                    if self.written[(at / CLUSTER) as usize] {
                        let place = Self::place(at / CLUSTER) + at % CLUSTER;
                        self.file
                            .write(place, vec![0; part as usize][..].into(), false, &mut Scratch::default())
                            .unwrap();
                    }
                    at += part;
                }
                Answer::Done(None)
            }
            // Sometimes too few: the engine must ask again for the rest.
            Op::Extents => Answer::Extents(vec![(fault.len.div_ceil(2), 0), (fault.len / 2, 0)]),
            _ => Answer::Retry,
        }
    }
}

/// The devices of the test, (device, lower device), and the segments of the upper map.
struct World {
    upper: Arc<Device>,
    lower: Arc<Device>,
    parts: Vec<(u64, Extent<Kinds>)>,
    formats: [Format; 2],
}

const VOID: Range<u64> = 0..10_000;

impl World {
    fn new() -> World {
        let (ram, plain, direct) = (region(1 << 20), file(1 << 20, false), file(1 << 20, true));
        let formats = [Format::new(1), Format::new(2)];
        let lower = device(mapping(
            vec![
                (100_352, memory(&ram, 4096)),
                (TABLE, Extent::Table(formats[1].table.clone())),
                (50_176, data(&direct, 512)),
            ],
            vec![1],
        ));
        let into_lower = |offset| Extent::Device { device: lower.clone(), offset, writable: true };
        let legs = [memory(&ram, 300_000), data(&plain, 1000), data(&direct, 200_000), into_lower(0)];
        let parts = vec![
            (VOID.end, Extent::Zero { discard_writes: true }),
            (99_999, memory(&ram, 500_000)),
            (70_001, data(&plain, 500_001)),
            (TABLE, Extent::Table(formats[0].table.clone())),
            (4 * 100_000, Extent::Stripes { chunk: 1000, legs: legs.into() }),
            (TABLE + 50_176, into_lower(100_352)),
            (131_072, data(&direct, 400_384)),
        ];
        let upper = device(mapping(parts.clone(), vec![3]));
        World { upper, lower, parts, formats }
    }
}

/// Offsets of the tables in the upper and in the lower device.
const TABLES: [u64; 2] = [VOID.end + 99_999 + 70_001, 100_352];

/// The ranges of one thread, with its model of their bytes.
struct Owned {
    ranges: Vec<Range<u64>>,
    model: Vec<Vec<u8>>,
}

/// Divides the device into ranges of all sizes and distributes them to the threads.
fn deal(size: u64, random: &mut Random) -> Vec<Owned> {
    let mut all: Vec<Owned> = (0..THREADS).map(|_| Owned { ranges: Vec::new(), model: Vec::new() }).collect();
    let (mut at, mut last) = (VOID.end, 0);
    while at < size {
        let longest = *[64, 600, 5000, 60_000].get(random.below(4) as usize).unwrap();
        let end = (at + 1 + random.below(longest)).min(size);
        last = (last + 1 + random.below(THREADS - 1)) % THREADS;
        let owned = &mut all[last as usize];
        owned.ranges.push(at..end);
        owned.model.push(vec![0; (end - at) as usize]);
        at = end;
    }
    all
}

impl Owned {
    fn work(&mut self, engine: &Engine, device: &Arc<Device>, mut random: Random) {
        for _ in 0..ROUNDS {
            let index = random.below(self.ranges.len() as u64) as usize;
            let (range, model) = (self.ranges[index].clone(), &mut self.model[index]);
            let len = range.end - range.start;
            let (from, to) = (random.below(len), random.below(len) + 1);
            let (from, to) = if from < to { (from, to) } else { (to - 1, from + 1) };
            let (offset, mine) = (range.start + from, from as usize..to as usize);
            let (count, byte) = (mine.len(), random.next() as u8 | 1);
            let flags = Flags { fua: random.one_in(10), unmap: random.one_in(2), ..Flags::default() };
            match random.below(12) {
                0..=4 => {
                    let mut bytes: Vec<u8> = (0..count).map(|i| byte.wrapping_add(i as u8)).collect();
                    match random.below(4) {
                        0 => write(engine, device, offset, &bytes, flags.fua).unwrap(),
                        1 => {
                            let memory = Memory::Borrowed(promised(&mut bytes));
                            assert_eq!(
                                by_queue(engine, device, Op::Write, offset, memory, count as u64, flags.fua),
                                Ok(())
                            );
                        }
                        2 => {
                            let memory = scattered(&mut bytes, &mut random);
                            assert_eq!(
                                by_queue(engine, device, Op::Write, offset, memory, count as u64, flags.fua),
                                Ok(())
                            );
                        }
                        // In a buffer that faults may share.
                        _ => {
                            let mut buffer = Buffer::new(count);
                            buffer.bytes_mut().copy_from_slice(&bytes);
                            let memory = Memory::owned(buffer);
                            assert_eq!(
                                by_queue(engine, device, Op::Write, offset, memory, count as u64, flags.fua),
                                Ok(())
                            );
                        }
                    }
                    model[mine].copy_from_slice(&bytes);
                }
                5..=8 => {
                    let mut bytes = vec![0xaa; count];
                    if random.one_in(3) {
                        read(engine, device, offset, &mut bytes).unwrap();
                    } else {
                        let memory = match random.one_in(2) {
                            true => Memory::Borrowed(promised(&mut bytes)),
                            false => scattered(&mut bytes, &mut random),
                        };
                        assert_eq!(by_queue(engine, device, Op::Read, offset, memory, count as u64, false), Ok(()));
                    }
                    assert_eq!(first_difference(&bytes, &model[mine]), None, "{count} bytes at {offset}");
                }
                9 => {
                    command(engine, device, Op::WriteZeroes, offset, count as u64, flags).unwrap();
                    model[mine].fill(0);
                }
                10 => {
                    // The contents of a discarded range are undefined, but other ranges must not change.
                    command(engine, device, Op::Discard, offset, count as u64, flags).unwrap();
                    write(engine, device, offset, &vec![byte; count], false).unwrap();
                    model[mine].fill(byte);
                }
                _ if random.one_in(2) => command(engine, device, Op::Flush, 0, 0, Flags::default()).unwrap(),
                _ => {
                    let found = engine.extents(device, offset, count as u64, None).unwrap();
                    let mut at = offset;
                    for extent in found {
                        assert_eq!(extent.offset, at, "extents are in order and without gaps");
                        at += extent.len;
                    }
                    assert!(at > offset && at <= offset + count as u64);
                }
            }
        }
    }

    fn check(&self, engine: &Engine, device: &Arc<Device>) {
        let mut found: Vec<Vec<u8>> = self.model.iter().map(|model| vec![0xaa; model.len()]).collect();
        let reads = found.iter_mut().zip(&self.ranges);
        let batch: Vec<Transfer<'_>> = reads
            .map(|(bytes, range)| Transfer { direction: Direction::Read((&mut bytes[..]).into()), offset: range.start })
            .collect();
        assert!(engine.batch(device, &batch).iter().all(Option::is_none));
        for ((found, model), range) in found.iter().zip(&self.model).zip(&self.ranges) {
            assert_eq!(first_difference(found, model), None, "in {range:?}");
        }
    }
}

/// The bytes in pieces of all sizes, also empty ones.
fn scattered(bytes: &mut [u8], random: &mut Random) -> Memory {
    let (whole, mut pieces, mut at) = (promised(bytes), Vec::new(), 0);
    while at < whole.len() {
        let longest = *[1, 512, 4096, 20_000].get(random.below(4) as usize).unwrap();
        let len = (random.below(longest + 1) as usize).min(whole.len() - at);
        pieces.push(whole.part(at, len));
        at += len;
    }
    Memory::Pieces(pieces)
}

fn first_difference(found: &[u8], model: &[u8]) -> Option<(usize, u8, u8)> {
    let at = found.iter().zip(model).position(|(found, model)| found != model)?;
    Some((at, found[at], model[at]))
}

#[test]
fn many_threads_on_every_kind_of_extent_lose_no_byte() {
    for (name, engine) in engines() {
        eprintln!("with {name}");
        let World { upper, lower, parts, formats: [first, second] } = World::new();
        let mut random = Random::new(7);
        let mut owners = deal(upper.size(), &mut random);
        let stop = AtomicBool::new(false);
        upper.attach_mapper();
        lower.attach_mapper();
        std::thread::scope(|scope| {
            let (engine, upper, lower, stop) = (&engine, &upper, &lower, &stop);
            scope.spawn(|| first.serve(upper, TABLES[0]));
            scope.spawn(|| second.serve(lower, TABLES[1]));
            // The same bytes in other segments, and gates of both devices that close and open.
            let disturber = scope.spawn(move || {
                let mut random = Random::new(99);
                while !stop.load(Ordering::Relaxed) {
                    let device = if random.one_in(2) { upper } else { lower };
                    if random.one_in(2) {
                        // Up to 165 segments: with hints and without.
                        let times = random.below(6);
                        let parts = (0..times).fold(parts.clone(), |parts, _| cut(&parts, &mut random));
                        upper.swap(mapping(parts, vec![3])).unwrap();
                    }
                    engine.suspend(device, random.one_in(4), Some(Instant::now() + PATIENT)).unwrap();
                    assert!(device.resume());
                    std::thread::yield_now();
                }
            });
            let workers: Vec<_> = owners
                .iter_mut()
                .zip(1..)
                .map(|(owned, seed)| {
                    scope.spawn(move || {
                        owned.work(engine, upper, Random::new(seed));
                        owned.check(engine, upper);
                    })
                })
                .collect();
            // The mappers must always end, or the scope would wait for them for ever.
            let ended: Vec<_> = workers.into_iter().map(|worker| worker.join()).collect();
            stop.store(true, Ordering::Relaxed);
            let disturbed = disturber.join();
            let totals = upper.stats().totals();
            upper.close();
            lower.close();
            ended.into_iter().chain([disturbed]).for_each(|ended| ended.unwrap());
            assert_eq!(totals.in_flight, 0);
            assert!(totals.ops[Op::Write as usize].count > ROUNDS && totals.ops[Op::Write as usize].errors == 0);
        });
    }
}

/// The same segments, each split in two (except tables and stripes, whose mapping begins at their start).
fn cut(parts: &[(u64, Extent<Kinds>)], random: &mut Random) -> Vec<(u64, Extent<Kinds>)> {
    let mut all = Vec::new();
    for (len, extent) in parts {
        // A single byte cannot be split.
        let at = if *len > 1 { 1 + random.below(len - 1) } else { 0 };
        let rest = match extent.clone() {
            Extent::Memory { region, offset } => Extent::Memory { region, offset: offset + at },
            Extent::Data { file, offset, writable } => Extent::Data { file, offset: offset + at, writable },
            Extent::Device { device, offset, writable } => Extent::Device { device, offset: offset + at, writable },
            Extent::Zero { discard_writes } => Extent::Zero { discard_writes },
            _ => {
                all.push((*len, extent.clone()));
                continue;
            }
        };
        if at > 0 {
            all.push((at, extent.clone()));
        }
        all.push((len - at, rest));
    }
    all
}
