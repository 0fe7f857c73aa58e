//! Requests that wait for a timer: for a delay, and for the retry of a deferred request.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use std::sync::Arc;
use std::time::{Duration, Instant};

use blkloom_core::filter::Delay;
use blkloom_core::{Answer, Device, Engine, Kinds, Memory, Op};
use blkloom_io::{Buffer, Region};
use blkloom_map::{Extent, Filtered};
use rig::*;

const SIZE: u64 = 4096;
const SHORT: Duration = Duration::from_millis(20);
/// Longer than any test runs.
const LONG: Duration = Duration::from_secs(7200);

fn delayed(times: [Duration; 2], legs: [Extent<Kinds>; 2]) -> Extent<Kinds> {
    let [reads, others] = legs;
    let filter = Arc::new(Delay::new(times[0], times[1]));
    Extent::Filtered(Arc::new(Filtered { filter, legs: [reads, others, Extent::Fault] }))
}

fn slow(region: &Arc<Region>, time: Duration) -> Arc<Device> {
    device(mapping(vec![(SIZE, delayed([time; 2], [memory(region, 0), memory(region, 0)]))], vec![]))
}

fn until_asked(device: &Device, requests: u64) {
    let deadline = Instant::now() + PATIENT;
    while device.stats().totals().in_flight < requests {
        assert!(Instant::now() < deadline, "it never comes");
        std::thread::yield_now();
    }
}

fn read_by_queue(engine: &Engine, device: &Arc<Device>) -> (Result<(), Errno>, Vec<u8>) {
    let mut bytes = vec![0; SIZE as usize];
    let errno = by_queue(engine, device, Op::Read, 0, Memory::Borrowed(promised(&mut bytes)), SIZE, false);
    (errno, bytes)
}

#[test]
fn reads_and_writes_have_their_own_delay_and_their_own_leg() {
    for (name, engine) in engines() {
        let (reads, writes) = (region(SIZE), region(SIZE));
        let extent = delayed([SHORT, 2 * SHORT], [memory(&reads, 0), memory(&writes, 0)]);
        let device = device(mapping(vec![(SIZE, extent)], vec![]));
        for (op, time) in [(Op::Write, 2 * SHORT), (Op::Read, SHORT), (Op::WriteZeroes, 2 * SHORT)] {
            let began = Instant::now();
            match op {
                Op::Write => assert_eq!(write(&engine, &device, 512, &[7; 512], false), Ok(()), "{name}"),
                Op::Read => {
                    let mut found = [1; 1024];
                    assert_eq!(read(&engine, &device, 0, &mut found), Ok(()), "{name}");
                    assert_eq!(found, [0; 1024], "{name}: of the other leg");
                }
                _ => assert_eq!(command(&engine, &device, op, 0, 256, Default::default()), Ok(()), "{name}"),
            }
            assert!(began.elapsed() >= time, "{name}: {op:?}");
        }
        let mut found = [0; 1024];
        let below = rig::device(mapping(vec![(SIZE, memory(&writes, 0))], vec![]));
        assert_eq!(read(&engine, &below, 0, &mut found), Ok(()));
        assert_eq!(found[512..], [7; 512], "{name}");
    }
}

#[test]
fn each_delay_on_the_path_is_waited_for_once() {
    for (name, engine) in engines() {
        let lower = slow(&region(SIZE), SHORT);
        let on = || Extent::Device { device: lower.clone(), offset: 0, writable: true };
        let top = device(mapping(vec![(SIZE, delayed([SHORT, Duration::ZERO], [on(), on()]))], vec![]));
        for (op, time) in [(Op::Write, SHORT), (Op::Read, 2 * SHORT)] {
            let began = Instant::now();
            let memory = Memory::owned(Buffer::new(SIZE as usize));
            assert_eq!(by_queue(&engine, &top, op, 0, memory, SIZE, false), Ok(()), "{name}");
            assert!(began.elapsed() >= time, "{name}: {op:?}");
        }
    }
}

#[test]
fn no_time_is_no_delay() {
    let (_, engine) = engines().remove(0);
    let device = slow(&region(SIZE), Duration::ZERO);
    engine.close(); // what is not done at once fails
    assert_eq!(write(&engine, &device, 0, &[7; 512], false), Ok(()));
    let mut found = [0; 512];
    assert_eq!(read(&engine, &device, 0, &mut found), Ok(()));
    assert_eq!(found, [7; 512]);
}

#[test]
fn many_pieces_behind_a_delay_wait_together() {
    const PIECES: u64 = 600;
    for (name, engine) in engines() {
        let file = file(PIECES * 512, false);
        let pieces = (0..PIECES).rev().map(|piece| (512, data(&file, piece * 512))).collect();
        let lower = device(mapping(pieces, vec![]));
        let on = || Extent::Device { device: lower.clone(), offset: 0, writable: true };
        let top = device(mapping(vec![(PIECES * 512, delayed([SHORT; 2], [on(), on()]))], vec![]));
        let buffer = Buffer::new(PIECES as usize * 512);
        assert_eq!(by_queue(&engine, &top, Op::Write, 0, Memory::owned(buffer), PIECES * 512, false), Ok(()), "{name}");
    }
}

#[test]
fn a_suspend_does_not_wait_for_a_delay_that_the_new_map_may_not_have() {
    for (name, engine) in engines() {
        let memory = region(SIZE);
        let below = slow(&memory, LONG);
        let on = Extent::Device { device: below.clone(), offset: 0, writable: true };
        let top = device(mapping(vec![(SIZE, on)], vec![]));
        std::thread::scope(|scope| {
            let ended = scope.spawn(|| read_by_queue(&engine, &top));
            until_asked(&top, 1);
            for device in [&top, &below, &top, &below] {
                device.suspend(Some(Instant::now() + PATIENT), || Ok(())).unwrap();
                assert!(device.resume());
            }
            assert!(!ended.is_finished(), "{name}");
            below.suspend(Some(Instant::now() + PATIENT), || Ok(())).unwrap();
            below.swap(mapping(vec![(SIZE, rig::memory(&memory, 0))], vec![])).unwrap();
            assert!(below.resume());
            assert_eq!(ended.join().unwrap(), (Ok(()), vec![0; SIZE as usize]), "{name}");
        });
    }
}

#[test]
fn delayed_requests_continue_when_their_device_or_the_engine_ends() {
    for (name, engine) in engines() {
        for ends_engine in [false, true] {
            let device = slow(&region(SIZE), LONG);
            std::thread::scope(|scope| {
                let ended = scope.spawn(|| read_by_queue(&engine, &device));
                until_asked(&device, 1);
                let allowed = if ends_engine {
                    // So that it waits, mostly: the engine fails what it gets only now.
                    device.suspend(Some(Instant::now() + PATIENT), || Ok(())).unwrap();
                    assert!(device.resume());
                    engine.close();
                    vec![Ok(()), Err(ESHUTDOWN)]
                } else {
                    device.fail_deferred();
                    vec![Ok(())]
                };
                assert!(allowed.contains(&ended.join().unwrap().0), "{name}");
            });
        }
    }
}

#[test]
fn a_target_that_defers_for_a_time_is_asked_again_after_that_time() {
    for (name, engine) in engines() {
        with_longer_times(|times| {
            let short = times * SHORT;
            let device =
                Device::new("faulty".into(), Some(mapping(vec![(SIZE, Extent::Fault)], vec![])), short).unwrap();
            device.attach_mapper();
            std::thread::scope(|scope| {
                let ended = scope.spawn(|| read_by_queue(&engine, &device));
                // None: the request has timed out, because this thread answered too late.
                let next = || loop {
                    match device.next_faults(Some(short)).unwrap().pop() {
                        None if !ended.is_finished() => {}
                        next => break next,
                    }
                };
                let mut before = None;
                for turn in 0..3 {
                    let Some(mut fault) = next() else { return false };
                    assert_eq!(fault.again, turn > 0, "{name}");
                    assert!(before.is_none_or(|before: Instant| before.elapsed() >= 2 * short), "{name}");
                    before = Some(Instant::now());
                    fault.defer_for(EIO, 2 * short);
                }
                let Some(mut fault) = next() else { return false };
                fault.answer(Answer::Done(Some(vec![7; SIZE as usize])));
                let (result, bytes) = ended.join().unwrap();
                assert!(matches!(result, Ok(()) | Err(ETIMEDOUT)), "{name}: {result:?}");
                assert!(result.is_err() || bytes == vec![7; SIZE as usize], "{name}");
                result.is_ok()
            })
        });
    }
}
