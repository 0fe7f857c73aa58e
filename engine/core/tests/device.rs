//! Devices: epochs, faults and the gate, under load from several threads.
//! (tests/conformance tests every target over every export from Python.)
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use blkloom_core::{
    Answer, Device, Direction, Engine, Fault, Flags, IoChoice, Kinds, Map, Mapping, Op, SuspendError, SwapError,
    Transfer,
};
use blkloom_io::Errno;
use blkloom_io::{Ahead, Region};
use blkloom_map::{ClusterTable, Entry, Extent, Segment};
use rig::with_longer_times;

const SIZE: u64 = 1 << 20;
const EIO: Errno = Errno::IO;
const ETIMEDOUT: Errno = Errno::TIMEDOUT;

fn engine(io: IoChoice) -> Engine {
    Engine::new(2, io, Duration::from_micros(20), 4).unwrap()
}

/// Waits for the next faults. New I/O errors end the wait of `next_faults`, too.
fn faults(device: &Device) -> Vec<Fault> {
    loop {
        let faults = device.next_faults(None).unwrap();
        if !faults.is_empty() {
            return faults;
        }
    }
}

fn region() -> Arc<Region> {
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
    let fd = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, SIZE).unwrap();
    fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
    Arc::new(Region::new(fd, SIZE, 4096).unwrap())
}

fn memory(region: &Arc<Region>) -> Extent<Kinds> {
    Extent::Memory { region: region.clone(), offset: 0 }
}

fn mapping(extent: Extent<Kinds>, flush_owners: Vec<u32>) -> Arc<Mapping> {
    let segment = Segment { start: 0, end: SIZE, owner: 7, extent };
    Arc::new(Mapping::new(Map::new(vec![segment], flush_owners).unwrap()).unwrap())
}

fn device(extent: Extent<Kinds>) -> Arc<Device> {
    Device::new("test".into(), Some(mapping(extent, vec![])), Duration::from_secs(20)).unwrap()
}

fn read(engine: &Engine, device: &Arc<Device>, offset: u64, into: &mut [u8]) -> Result<(), Errno> {
    engine.transfer(device, Transfer { direction: Direction::Read(into.into()), offset }, false)
}

fn write(engine: &Engine, device: &Arc<Device>, offset: u64, from: &[u8]) -> Result<(), Errno> {
    engine.transfer(device, Transfer { direction: Direction::Write(from.into()), offset }, false)
}

/// A cheap, seeded sequence.
fn random(seed: &mut u64) -> u64 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    *seed
}

#[test]
fn after_a_swap_no_request_reads_the_old_map() {
    let engine = engine(IoChoice::Auto);
    let regions = [region(), region()];
    let fill = |region: &Region, byte: u8| {
        region.write(0, vec![byte; SIZE as usize][..].into());
    };
    regions.iter().for_each(|region| fill(region, 1));
    let device = device(memory(&regions[0]));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for reader in 0..3u64 {
            let (engine, device, stop) = (&engine, &device, &stop);
            scope.spawn(move || {
                let (mut seed, mut buffer) = (reader + 1, [0; 4096]);
                while !stop.load(Ordering::Relaxed) {
                    let offset = random(&mut seed) % (SIZE / 4096) * 4096;
                    read(engine, device, offset, &mut buffer).unwrap();
                    assert!(buffer.iter().all(|&byte| byte == 1), "poison was read after the swap");
                }
            });
        }
        for turn in 1..400 {
            let (new, old) = (&regions[turn % 2], &regions[(turn + 1) % 2]);
            fill(new, 1);
            device.swap(mapping(memory(new), vec![])).unwrap();
            fill(old, 0xee);
        }
        stop.store(true, Ordering::Relaxed);
    });
}

/// Threads write and read their own interleaved bytes of clusters. A mapper installs the clusters on demand, drops them
/// at random, and calls `synchronize` while requests are deferred.
#[test]
fn no_write_is_lost_while_clusters_are_installed_and_dropped() {
    const CLUSTER: u64 = 4096;
    for io in [IoChoice::Auto, IoChoice::Threads] {
        let engine = engine(io);
        let path = std::env::temp_dir().join(format!("blkloom-clusters-{}-{io:?}", std::process::id()));
        let file = std::fs::File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        file.set_len(SIZE).unwrap();
        let file = Arc::new(blkloom_io::File::new(file.into(), true, false, "clusters".into()).unwrap());
        let table = Arc::new(ClusterTable::new(SIZE, CLUSTER, 16, vec![file]).unwrap());
        let device = device(Extent::Table(table.clone()));
        device.attach_mapper();
        let faults = AtomicU64::new(0);
        std::thread::scope(|scope| {
            let (device, engine, faults) = (&device, &engine, &faults);
            scope.spawn(move || {
                let mut seed = 99;
                while let Some(batch) = device.next_faults(None) {
                    for mut fault in batch {
                        assert_eq!(fault.owner, 7);
                        let (first, last) = (fault.offset / CLUSTER, (fault.offset + fault.len - 1) / CLUSTER);
                        for cluster in first..=last {
                            // Clusters lie in reverse order in the file.
                            let sector = (SIZE / CLUSTER - 1 - cluster) * CLUSTER / 512;
                            table.install(cluster, &[Entry::KIND_DATA << 61 | sector]).unwrap();
                        }
                        fault.answer(Answer::Retry);
                        faults.fetch_add(1, Ordering::Relaxed);
                        if random(&mut seed).is_multiple_of(4) {
                            table.drop_page(random(&mut seed) % (SIZE / CLUSTER / 16)).unwrap();
                            device.synchronize();
                        }
                    }
                }
            });
            let workers: Vec<_> = (0..4u64)
                .map(|mine| {
                    scope.spawn(move || {
                        let (mut seed, mut model) = (mine + 1, vec![0u8; SIZE as usize / 4]);
                        for _ in 0..3000 {
                            let (slot, count) = (random(&mut seed) % (SIZE / 1024), random(&mut seed) % 8 + 1);
                            // 256 bytes of every 1024 are this thread's.
                            for slot in slot..(slot + count).min(SIZE / 1024) {
                                let (at, own) =
                                    (slot * 1024 + mine * 256, slot as usize * 256..slot as usize * 256 + 256);
                                let mut buffer = [0u8; 256];
                                if random(&mut seed).is_multiple_of(2) {
                                    buffer.fill(random(&mut seed) as u8);
                                    write(engine, device, at, &buffer).unwrap();
                                    model[own].copy_from_slice(&buffer);
                                } else {
                                    read(engine, device, at, &mut buffer).unwrap();
                                    assert_eq!(buffer, model[own]);
                                }
                            }
                        }
                    })
                })
                .collect();
            workers.into_iter().for_each(|worker| worker.join().unwrap());
            device.close();
        });
        assert!(faults.load(Ordering::Relaxed) > 100, "the mapper was hardly needed");
        std::fs::remove_file(path).unwrap();
    }
}

#[test]
fn requests_to_a_suspended_device_wait_and_finish_after_the_resume() {
    let engine = engine(IoChoice::Auto);
    let region = region();
    let device = device(memory(&region));
    let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
    let contents = || {
        let mut bytes = vec![0u8; 3 * 512];
        region.read(0, (&mut bytes[..]).into(), Ahead::NOTHING);
        bytes
    };
    std::thread::scope(|scope| {
        for writer in 0..3u64 {
            let (engine, device, stop, done) = (&engine, &device, &stop, &done);
            scope.spawn(move || {
                let mut turn = 0u8;
                while !stop.load(Ordering::SeqCst) {
                    turn = turn.wrapping_add(1);
                    write(engine, device, writer * 512, &[turn; 512]).unwrap();
                    done.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        let mut passed = false;
        for _ in 0..100 {
            engine.suspend(&device, true, None).unwrap();
            let before = contents();
            (0..20).for_each(|_| std::thread::yield_now());
            passed |= !device.suspended() || contents() != before;
            assert!(device.resume());
            let seen = done.load(Ordering::SeqCst);
            while done.load(Ordering::SeqCst) < seen + 3 {
                std::thread::yield_now();
            }
        }
        stop.store(true, Ordering::SeqCst);
        assert!(!passed, "a write passed the closed gate");
    });
}

#[test]
fn a_suspend_that_takes_too_long_leaves_the_device_live() {
    let engine = engine(IoChoice::Auto);
    let device = device(Extent::Fault);
    device.attach_mapper();
    std::thread::scope(|scope| {
        let (engine, device) = (&engine, &device);
        let reader = scope.spawn(move || read(engine, device, 0, &mut [0; 512]));
        let mut faults = faults(device);
        let deadline = Instant::now() + Duration::from_millis(50);
        assert_eq!(engine.suspend(device, true, Some(deadline)), Err(SuspendError::Timeout));
        assert!(!device.suspended());
        faults[0].answer(Answer::Done(Some(vec![9; 512])));
        assert_eq!(reader.join().unwrap(), Ok(()));
    });
}

#[test]
fn faults_end_with_the_answer_of_the_target_or_with_an_error() {
    let engine = engine(IoChoice::Auto);
    let device = device(Extent::Fault);
    let mut buffer = [0; 1024];
    assert_eq!(read(&engine, &device, 0, &mut buffer), Err(EIO), "there is no mapper");
    device.attach_mapper();
    std::thread::scope(|scope| {
        let device = &device;
        scope.spawn(move || {
            let answers = [
                Some(Answer::Done(Some((0..=255).cycle().take(1024).collect()))),
                Some(Answer::Done(Some(vec![1; 1023]))),
                Some(Answer::Done(None)),
                Some(Answer::Fail(Errno::NOSPC)),
                None,
            ];
            for answer in answers {
                let mut batch = faults(device);
                assert_eq!((batch.len(), batch[0].op, batch[0].offset, batch[0].len), (1, Op::Read, 4096, 1024));
                if let Some(answer) = answer {
                    batch[0].answer(answer);
                }
            }
            let mut batch = faults(device);
            assert_eq!(batch[0].payload(), [3; 512]);
            batch[0].answer(Answer::Done(None));
            while let Some(batch) = device.next_faults(None) {
                batch.into_iter().for_each(|mut fault| fault.answer(Answer::Retry));
            }
        });
        assert_eq!(read(&engine, device, 4096, &mut buffer), Ok(()));
        assert!(buffer.iter().enumerate().all(|(i, &byte)| byte == i as u8));
        for why in ["too few bytes", "no bytes"] {
            assert_eq!(read(&engine, device, 4096, &mut buffer), Err(EIO), "{why}");
        }
        assert_eq!(read(&engine, device, 4096, &mut buffer), Err(Errno::NOSPC));
        assert_eq!(read(&engine, device, 4096, &mut buffer), Err(EIO), "dropped without an answer");
        assert_eq!(write(&engine, device, 0, &[3; 512]), Ok(()));
        assert_eq!(read(&engine, device, 0, &mut buffer), Err(EIO), "retried for ever without a map");
        device.close();
    });
}

#[test]
fn an_unanswered_fault_fails_and_its_late_answer_is_ignored() {
    let engine = engine(IoChoice::Auto);
    with_longer_times(|times| {
        let timeout = times * Duration::from_millis(50);
        let device = Device::new(String::new(), Some(mapping(Extent::Fault, vec![])), timeout).unwrap();
        device.attach_mapper();
        assert_eq!(read(&engine, &device, 0, &mut [0; 512]), Err(ETIMEDOUT));
        let mut late = faults(&device);
        std::thread::scope(|scope| {
            let (engine, device) = (&engine, &device);
            let asked = Instant::now();
            let next = scope.spawn(move || read(engine, device, 512, &mut [0; 512]));
            let mut fresh = faults(device);
            late[0].answer(Answer::Fail(Errno::PERM));
            fresh[0].answer(Answer::Done(Some(vec![0; 512])));
            let next = next.join().unwrap();
            if asked.elapsed() >= timeout && next == Err(ETIMEDOUT) {
                return false;
            }
            assert_eq!(next, Ok(()), "the late answer went to another request");
            true
        })
    });
}

#[test]
fn a_flush_reaches_flush_owners() {
    let engine = engine(IoChoice::Auto);
    let mapping = mapping(memory(&region()), vec![3, 9]);
    let device = Device::new(String::new(), Some(mapping), Duration::from_secs(20)).unwrap();
    device.attach_mapper();
    std::thread::scope(|scope| {
        let device = &device;
        let mapper = scope.spawn(move || {
            let mut owners = Vec::new();
            while owners.len() < 2 {
                for mut fault in device.next_faults(None).unwrap() {
                    assert_eq!(fault.op, Op::Flush);
                    owners.push(fault.owner);
                    fault.answer(Answer::Done(None));
                }
            }
            owners
        });
        assert_eq!(engine.command(device, Op::Flush, 0, 0, Flags::default()), Ok(()));
        assert_eq!(mapper.join().unwrap(), [3, 9]);
    });
}

#[test]
fn a_request_of_thousands_of_pieces_is_one_request() {
    let engine = engine(IoChoice::Auto);
    let legs = [region(), region(), region()];
    let stripes = Extent::Stripes { chunk: 512, legs: legs.iter().map(memory).collect() };
    let upper = device(Extent::Device { device: device(stripes), offset: 0, writable: true });
    let mut data: Vec<u8> = (0..SIZE).map(|i| (i % 251) as u8).collect();
    write(&engine, &upper, 0, &data).unwrap();
    let mut back = vec![0; SIZE as usize];
    read(&engine, &upper, 0, &mut back).unwrap();
    assert_eq!(back, data);
    let flags = Flags { unmap: true, ..Flags::default() };
    engine.command(&upper, Op::WriteZeroes, 513, SIZE - 1024, flags).unwrap();
    data[513..SIZE as usize - 511].fill(0);
    read(&engine, &upper, 0, &mut back).unwrap();
    assert_eq!(back, data);
    assert_eq!(upper.stats().totals().ops[Op::WriteZeroes as usize].count, 1);
}

#[test]
fn a_map_that_would_reach_its_own_device_is_refused() {
    let lower = device(memory(&region()));
    let upper = device(Extent::Device { device: lower.clone(), offset: 0, writable: true });
    let cycle = mapping(Extent::Device { device: upper, offset: 0, writable: true }, vec![]);
    assert_eq!(lower.swap(cycle).map(drop), Err(SwapError::Cycle));
}
