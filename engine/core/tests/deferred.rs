//! Deferred requests: they have no timeout, wait at gates of stacked devices, and fail when the device is about to end.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use std::sync::Arc;
use std::time::{Duration, Instant};

use blkloom_core::{Answer, Device, Engine, Fault, Memory, Op};
use blkloom_io::Buffer;
use blkloom_map::Extent;
use rig::*;

const SIZE: u64 = 4096;
const ENOSPC: Errno = Errno::NOSPC;
const ESHUTDOWN: Errno = Errno::SHUTDOWN;

fn write_by_queue(engine: &Engine, device: &Arc<Device>) -> Result<(), Errno> {
    let memory = Memory::owned(Buffer::new(SIZE as usize));
    by_queue(engine, device, Op::Write, 0, memory, SIZE, false)
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

/// A device that faults, with a fault timeout that is shorter than the time of a deferred request.
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
fn a_deferred_request_is_retried_and_does_not_time_out() {
    for (name, engine) in engines() {
        with_longer_times(|times| {
            let timeout = times * Duration::from_millis(200);
            let device = faulty(timeout);
            std::thread::scope(|scope| {
                let mut asked = Instant::now();
                let ended = scope.spawn(|| write_by_queue(&engine, &device));
                for turn in 0..3 {
                    let mut fault = next(&device);
                    assert_eq!(fault.again, turn > 0, "{name}");
                    fault.defer(ENOSPC);
                    if asked.elapsed() >= timeout {
                        device.fail_deferred();
                        return false;
                    }
                    assert!(device.deferred() > 0, "{name}: as soon as the target has answered");
                    until(|| device.deferred() == 1);
                    assert!(device.next_faults(Some(2 * timeout)).unwrap().is_empty());
                    assert!(!ended.is_finished(), "{name}: its time does not end");
                    asked = Instant::now();
                    device.retry_deferred();
                }
                next(&device).answer(Answer::Done(None));
                let ended = ended.join().unwrap();
                if asked.elapsed() >= timeout && ended == Err(ETIMEDOUT) {
                    return false;
                }
                assert_eq!(ended, Ok(()), "{name}");
                until(|| device.deferred() == 0);
                true
            })
        });
    }
}

#[test]
fn an_interrupted_request_faults_again_as_if_for_the_first_time() {
    for (name, engine) in engines() {
        let device = faulty(PATIENT);
        std::thread::scope(|scope| {
            let ended = scope.spawn(|| write_by_queue(&engine, &device));
            next(&device).interrupt(ESHUTDOWN);
            until(|| device.deferred() == 1);
            device.retry_deferred();
            let mut fault = next(&device);
            assert!(!fault.again, "{name}");
            fault.defer(ENOSPC);
            until(|| device.deferred() == 1);
            device.retry_deferred();
            next(&device).interrupt(ESHUTDOWN);
            device.retry_deferred();
            let mut fault = next(&device);
            assert!(fault.again, "{name}: it was deferred before it was interrupted");
            fault.interrupt(ESHUTDOWN);
            device.fail_deferred();
            assert_eq!(ended.join().unwrap(), Err(ESHUTDOWN), "{name}");
        });
    }
}

#[test]
fn a_closing_gate_on_any_level_takes_deferred_requests() {
    for (name, engine) in engines() {
        let below = faulty(PATIENT);
        let top = above(&below);
        std::thread::scope(|scope| {
            let ended = scope.spawn(|| write_by_queue(&engine, &top));
            next(&below).defer(ENOSPC);
            for device in [&top, &below] {
                device.suspend(deadline(), || Ok(())).unwrap();
                until(|| below.deferred() == 0);
                assert!(device.resume());
                let mut fault = next(&below);
                assert!(!fault.again, "{name}: it is looked up from the beginning");
                fault.defer(ENOSPC);
            }
            // Suspended before the answer.
            below.retry_deferred();
            let mut fault = next(&below);
            std::thread::scope(|scope| {
                let suspended = scope.spawn(|| top.suspend(deadline(), || Ok(())));
                until(|| top.suspended());
                fault.defer(ENOSPC);
                assert_eq!(suspended.join().unwrap(), Ok(()), "{name}");
            });
            assert!(top.resume());
            next(&below).answer(Answer::Done(None));
            assert_eq!(ended.join().unwrap(), Ok(()), "{name}");
        });
    }
}

#[test]
fn a_deferred_request_fails_with_its_own_errno_when_the_device_is_to_end() {
    for (name, engine) in engines() {
        let below = faulty(PATIENT);
        let top = above(&below);
        std::thread::scope(|scope| {
            let first = scope.spawn(|| write_by_queue(&engine, &top));
            next(&below).defer(ENOSPC);
            let second = scope.spawn(|| write_by_queue(&engine, &top));
            let mut late = next(&below);
            top.fail_deferred();
            late.defer(ENOSPC);
            for ended in [first, second] {
                assert_eq!(ended.join().unwrap(), Err(ENOSPC), "{name}");
            }
            until(|| below.deferred() == 0);
            top.suspend(deadline(), || Ok(())).unwrap();
        });
    }
}

#[test]
fn a_closing_engine_does_not_wait_for_deferred_requests() {
    for (name, engine) in engines() {
        let device = faulty(PATIENT);
        std::thread::scope(|scope| {
            let ended = scope.spawn(|| write_by_queue(&engine, &device));
            next(&device).defer(ENOSPC);
            until(|| device.deferred() == 1);
            engine.close();
            assert_eq!(ended.join().unwrap(), Err(ESHUTDOWN), "{name}");
        });
    }
}

#[test]
fn a_flush_is_not_deferred() {
    for (name, engine) in engines() {
        let device = faulty(PATIENT);
        device.swap(mapping(vec![(SIZE, Extent::Fault)], vec![0])).unwrap();
        std::thread::scope(|scope| {
            let ended = scope.spawn(|| by_queue(&engine, &device, Op::Flush, 0, Memory::None, 0, false));
            next(&device).defer(ENOSPC);
            assert_eq!(ended.join().unwrap(), Err(ENOSPC), "{name}");
        });
    }
}

/// The next fault; wake-ups of the mapper without a fault are ignored.
fn next_after_wakes(device: &Device) -> Fault {
    loop {
        if let Some(fault) = device.next_faults(Some(PATIENT)).unwrap().pop() {
            return fault;
        }
    }
}

#[test]
fn a_fault_knows_that_a_suspend_waits_for_it_on_whatever_level() {
    for (name, engine) in engines() {
        let below = faulty(PATIENT);
        let middle = above(&below);
        let top = above(&middle);
        below.fault_event().unwrap();
        std::thread::scope(|scope| {
            let ended = scope.spawn(|| write_by_queue(&engine, &top));
            for device in [&top, &middle, &below] {
                let mut fault = next_after_wakes(&below);
                assert!(!fault.blocks_suspend() && !fault.from_client, "{name}");
                let before = below.gate_changes();
                std::thread::scope(|scope| {
                    let suspended = scope.spawn(|| device.suspend(deadline(), || Ok(())));
                    while !fault.blocks_suspend() {
                        assert!(below.next_faults(Some(PATIENT)).unwrap().is_empty(), "{name}: the mapper is woken");
                    }
                    until(|| below.gate_changes() > before);
                    fault.interrupt(ESHUTDOWN);
                    assert_eq!(suspended.join().unwrap(), Ok(()), "{name}");
                });
                assert!(device.resume());
            }
            next_after_wakes(&below).answer(Answer::Done(None));
            assert_eq!(ended.join().unwrap(), Ok(()), "{name}");
        });
    }
}
