//! Tees: writes to all legs, failures of legs, writes that overlap, regions that are open and shut.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use std::sync::Arc;

use blkloom_core::{BackendQueue, Device, Engine, Flags, Kinds, Limits, Memory, Op, Tee};
use blkloom_io::Buffer;
use blkloom_map::Extent;
use rig::*;

const SIZE: u64 = 64 << 10;
const REGION: u64 = 8 << 10;
const REGIONS: usize = 8;
const LIMITS: Limits = Limits { longest: 1 << 20, most: 64, most_bytes: 1 << 20 };

fn queue() -> Arc<BackendQueue> {
    Arc::new(BackendQueue::new(LIMITS).unwrap())
}

fn leg(extent: Extent<Kinds>) -> Arc<Device> {
    device(mapping(vec![(SIZE, extent)], vec![]))
}

fn on_backend(backend: &Arc<BackendQueue>) -> Extent<Kinds> {
    Extent::Backend { backend: backend.clone(), offset: 0, writable: true }
}

/// A device on a tee with open regions, and its tee.
fn teed(legs: Vec<Extent<Kinds>>, backend: &Arc<BackendQueue>) -> (Arc<Device>, Arc<Tee>) {
    let tee = Tee::new(legs.into_iter().map(leg).collect(), backend.clone(), SIZE, REGION);
    tee.open(0, REGIONS);
    (leg(Extent::Tee { tee: tee.clone(), offset: 0 }), tee)
}

fn contents(engine: &Engine, device: &Arc<Device>) -> Vec<u8> {
    let mut found = vec![0xee; SIZE as usize];
    assert_eq!(read(engine, device, 0, &mut found), Ok(()));
    found
}

fn bytes(value: u8, len: u64) -> Memory {
    let mut buffer = Buffer::new(len as usize);
    buffer.bytes_mut().fill(value);
    Memory::owned(buffer)
}

#[test]
fn all_legs_get_what_is_written() {
    for (name, engine) in engines() {
        let backend = queue();
        let legs = vec![memory(&region(SIZE), 0), data(&file(SIZE, false), 0), data(&file_in_memory(SIZE), 0)];
        let (device, tee) = teed(legs, &backend);
        let (mut model, mut random) = (vec![0u8; SIZE as usize], Random::new(3));
        for turn in 1..300 {
            let offset = random.below(SIZE);
            let len = 1 + random.below(SIZE - offset).min(20_000);
            let range = offset as usize..(offset + len) as usize;
            match random.below(5) {
                0 => assert_eq!(command(&engine, &device, Op::Flush, 0, 0, Flags::default()), Ok(()), "{name}"),
                1 => {
                    let done = command(&engine, &device, Op::WriteZeroes, offset, len, Flags::default());
                    assert_eq!(done, Ok(()), "{name}");
                    model[range].fill(0);
                }
                2 => {
                    let done = by_queue(&engine, &device, Op::Write, offset, bytes(turn as u8, len), len, false);
                    assert_eq!(done, Ok(()), "{name}");
                    model[range].fill(turn as u8);
                }
                _ => {
                    let from = vec![turn as u8; len as usize];
                    assert_eq!(write(&engine, &device, offset, &from, random.one_in(4)), Ok(()), "{name}");
                    model[range].fill(turn as u8);
                }
            }
        }
        for leg in tee.legs() {
            assert!(contents(&engine, leg) == model, "{name}");
        }
        assert!(backend.take().begun.is_empty(), "{name}: the legs have done all");
    }
}

#[test]
fn a_request_that_fails_on_a_leg_goes_to_the_backend() {
    for (name, engine) in engines() {
        for whole in [true, false] {
            let backend = queue();
            let (device, tee) = teed(vec![memory(&region(SIZE), 0), Extent::Error(EIO)], &backend);
            std::thread::scope(|scope| {
                let write = scope.spawn(|| match whole {
                    true => write(&engine, &device, REGION - 512, &[7; 1024], false),
                    false => by_queue(&engine, &device, Op::Write, REGION - 512, bytes(7, 1024), 1024, true),
                });
                let mut operation = next(&backend, 1).remove(0);
                assert_eq!((operation.op, operation.offset, operation.len), (Op::Write, REGION - 512, 1024), "{name}");
                assert_eq!(operation.payload(), [7; 1024], "{name}");
                assert_eq!(tee.torn(), [(REGION - 512, 1024)], "{name}");
                assert!(!tee.shut(0, 2), "{name}: it has ended on the legs");
                backend.complete(&mut operation, Ok(None));
                assert_eq!(write.join().unwrap(), Ok(()), "{name}");
            });
            // Its regions stay shut until the range is mended.
            tee.open(0, REGIONS);
            tee.mend(REGION - 512, 512);
            assert_eq!(tee.torn(), [(REGION, 512)], "{name}");
            for offset in [REGION, 2 * REGION] {
                std::thread::scope(|scope| {
                    let write = scope.spawn(|| write(&engine, &device, offset, &[1; 512], false));
                    let mut operation = next(&backend, 1).remove(0);
                    assert!(tee.torn().contains(&(offset, 512)), "{name}");
                    backend.complete(&mut operation, Err(Errno::NOSPC));
                    assert_eq!(write.join().unwrap(), Err(Errno::NOSPC), "{name}");
                });
            }
        }
    }
}

#[test]
fn a_flush_goes_to_the_legs_while_all_regions_are_open_and_to_the_backend_if_one_fails() {
    for (name, engine) in engines() {
        let (backend, first, second) = (queue(), queue(), queue());
        let (device, tee) = teed(vec![on_backend(&first), on_backend(&second)], &backend);
        let flush = || command(&engine, &device, Op::Flush, 0, 0, Flags::default());
        std::thread::scope(|scope| {
            let flushed = scope.spawn(flush);
            for leg in [&first, &second] {
                leg.complete(&mut next(leg, 1)[0], Ok(None));
            }
            assert_eq!(flushed.join().unwrap(), Ok(()), "{name}");
            let flushed = scope.spawn(flush);
            first.complete(&mut next(&first, 1)[0], Err(EIO));
            second.complete(&mut next(&second, 1)[0], Ok(None));
            backend.complete(&mut next(&backend, 1)[0], Ok(None));
            assert_eq!(flushed.join().unwrap(), Ok(()), "{name}");
            tee.shut(3, 1);
            let flushed = scope.spawn(flush);
            backend.complete(&mut next(&backend, 1)[0], Err(Errno::NXIO));
            assert_eq!(flushed.join().unwrap(), Err(Errno::NXIO), "{name}");
        });
        assert!(first.take().begun.is_empty() && second.take().begun.is_empty(), "{name}");
    }
}

#[test]
fn a_write_waits_for_another_that_overlaps_and_shut_waits_for_both() {
    for (name, engine) in engines() {
        let (backend, slow) = (queue(), queue());
        let region = region(SIZE);
        let (device, tee) = teed(vec![memory(&region, 0), on_backend(&slow)], &backend);
        std::thread::scope(|scope| {
            let by_queue = |value, at| by_queue(&engine, &device, Op::Write, at, bytes(value, 1024), 1024, false);
            let first = scope.spawn(move || by_queue(1, 0));
            let mut one = next(&slow, 1).remove(0);
            let second = scope.spawn(move || by_queue(2, 512));
            let apart = scope.spawn(move || by_queue(3, 4096));
            let mut other = next(&slow, 1).remove(0);
            assert_eq!(other.offset, 4096, "{name}: the second write waits for the first");
            assert!(tee.shut(0, 1), "{name}");
            let drained = scope.spawn(|| tee.wait(0, 1));
            slow.complete(&mut one, Ok(None));
            assert_eq!(first.join().unwrap(), Ok(()), "{name}");
            // It was shut meanwhile.
            let mut left = next(&backend, 1).remove(0);
            assert_eq!((left.offset, left.len), (512, 1024), "{name}");
            backend.complete(&mut left, Ok(None));
            assert_eq!(second.join().unwrap(), Ok(()), "{name}");
            slow.complete(&mut other, Ok(None));
            assert_eq!(apart.join().unwrap(), Ok(()), "{name}");
            assert!(drained.join().unwrap(), "{name}");
        });
        assert!(slow.take().begun.is_empty(), "{name}");
        tee.open(0, REGIONS);
        std::thread::scope(|scope| {
            let write = scope.spawn(|| write(&engine, &device, 0, &[4; 512], false));
            let mut one = next(&slow, 1).remove(0);
            let drained = scope.spawn(|| tee.wait(0, 1));
            tee.end();
            assert!(!drained.join().unwrap(), "{name}");
            slow.complete(&mut one, Ok(None));
            assert_eq!(write.join().unwrap(), Ok(()), "{name}");
        });
    }
}

#[test]
fn concurrent_writes_of_the_same_bytes_leave_the_same_on_all_legs() {
    for (name, engine) in engines() {
        let backend = queue();
        let (device, tee) = teed(vec![data(&file(SIZE, false), 0), data(&file(SIZE, false), 0)], &backend);
        std::thread::scope(|scope| {
            for thread in 1..=4u8 {
                let (engine, device) = (&engine, &device);
                scope.spawn(move || {
                    let mut random = Random::new(u64::from(thread));
                    for turn in 0..100u8 {
                        let offset = random.below(8) * 512;
                        let value = thread.wrapping_mul(turn);
                        assert_eq!(write(engine, device, offset, &[value; 2048], false), Ok(()));
                    }
                });
            }
        });
        let [first, second] = tee.legs() else { panic!("{name}: two legs") };
        assert!(contents(&engine, first) == contents(&engine, second), "{name}");
        assert!(backend.take().begun.is_empty(), "{name}");
    }
}
