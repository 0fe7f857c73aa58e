//! Requests that their target holds: they outlast their time, pass gates and towers of devices, and fail when
//! that is said.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use std::sync::Arc;
use std::time::{Duration, Instant};

use blkloom_core::{Answer, Device, Engine, Fault, Memory, Op};
use blkloom_io::Buffer;
use blkloom_map::Extent;
use rig::*;

const SIZE: u64 = 4096;
const ENOSPC: i32 = 28;
const ESHUTDOWN: i32 = 108;

fn write_later(engine: &Engine, device: &Arc<Device>) -> i32 {
    let memory = Memory::Owned(Arc::new(Buffer::new(SIZE as usize)));
    later(engine, device, Op::Write, 0, memory, SIZE, false)
}

fn next(device: &Device) -> Fault {
    let mut faults = device.next_faults(Some(PATIENT)).unwrap();
    assert_eq!(faults.len(), 1, "one fault and no other");
    faults.remove(0)
}

fn until(done: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENT;
    while !done() {
        assert!(Instant::now() < deadline, "it never happens");
        std::thread::yield_now();
    }
}

/// A device that faults, with so little time for faults that what is held outlasts it.
fn faulty(timeout: Duration) -> Arc<Device> {
    let device = Device::new("faulty".into(), Some(mapping(vec![(SIZE, Extent::Fault)], vec![])), timeout).unwrap();
    device.attach_mapper();
    device
}

fn above(device: &Arc<Device>) -> Arc<Device> {
    let on = Extent::Device { device: device.clone(), offset: 0, writable: true };
    rig::device(mapping(vec![(SIZE, on)], vec![]))
}

fn deadline() -> Option<Instant> {
    Some(Instant::now() + PATIENT)
}

#[test]
fn what_is_held_is_asked_for_again_and_never_too_late() {
    const TIME: Duration = Duration::from_millis(200);
    for (name, engine) in engines() {
        let device = faulty(TIME);
        std::thread::scope(|scope| {
            let ended = scope.spawn(|| write_later(&engine, &device));
            for turn in 0..3 {
                let mut fault = next(&device);
                assert_eq!(fault.again, turn > 0, "{name}");
                fault.hold(ENOSPC);
                assert!(device.held() > 0, "{name}: from the word on");
                until(|| device.held() == 1);
                assert!(device.next_faults(Some(2 * TIME)).unwrap().is_empty());
                assert!(!ended.is_finished(), "{name}: its time does not end");
                device.retry_held();
            }
            next(&device).answer(Answer::Done(None));
            assert_eq!(ended.join().unwrap(), 0, "{name}");
            until(|| device.held() == 0);
        });
    }
}

#[test]
fn a_gate_that_closes_takes_what_is_held_on_whatever_level() {
    for (name, engine) in engines() {
        let below = faulty(PATIENT);
        let top = above(&below);
        std::thread::scope(|scope| {
            let ended = scope.spawn(|| write_later(&engine, &top));
            next(&below).hold(ENOSPC);
            for device in [&top, &below] {
                device.suspend(deadline(), || Ok(())).unwrap();
                until(|| below.held() == 0);
                assert!(device.resume());
                let mut fault = next(&below);
                assert!(!fault.again, "{name}: it begins anew");
                fault.hold(ENOSPC);
            }
            // Suspended before the answer.
            below.retry_held();
            let mut fault = next(&below);
            std::thread::scope(|scope| {
                let suspended = scope.spawn(|| top.suspend(deadline(), || Ok(())));
                until(|| top.suspended());
                fault.hold(ENOSPC);
                assert_eq!(suspended.join().unwrap(), Ok(()), "{name}");
            });
            assert!(top.resume());
            next(&below).answer(Answer::Done(None));
            assert_eq!(ended.join().unwrap(), 0, "{name}");
        });
    }
}

#[test]
fn what_is_held_fails_with_its_own_errno_when_the_device_is_to_end() {
    for (name, engine) in engines() {
        let below = faulty(PATIENT);
        let top = above(&below);
        std::thread::scope(|scope| {
            let first = scope.spawn(|| write_later(&engine, &top));
            next(&below).hold(ENOSPC);
            let second = scope.spawn(|| write_later(&engine, &top));
            let mut late = next(&below);
            top.fail_held();
            late.hold(ENOSPC);
            for ended in [first, second] {
                assert_eq!(ended.join().unwrap(), ENOSPC, "{name}");
            }
            until(|| below.held() == 0);
            top.suspend(deadline(), || Ok(())).unwrap();
        });
    }
}

#[test]
fn a_closing_engine_waits_for_nothing_that_is_held() {
    for (name, engine) in engines() {
        let device = faulty(PATIENT);
        std::thread::scope(|scope| {
            let ended = scope.spawn(|| write_later(&engine, &device));
            next(&device).hold(ENOSPC);
            until(|| device.held() == 1);
            engine.close();
            assert_eq!(ended.join().unwrap(), ESHUTDOWN, "{name}");
        });
    }
}

#[test]
fn a_flush_is_not_held() {
    for (name, engine) in engines() {
        let device = faulty(PATIENT);
        device.swap(mapping(vec![(SIZE, Extent::Fault)], vec![0])).unwrap();
        std::thread::scope(|scope| {
            let ended = scope.spawn(|| later(&engine, &device, Op::Flush, 0, Memory::None, 0, false));
            next(&device).hold(ENOSPC);
            assert_eq!(ended.join().unwrap(), ENOSPC, "{name}");
        });
    }
}
