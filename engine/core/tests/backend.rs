//! Backends: operations, answers, cancellations and timeouts.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use blkloom_core::{Backend, BackendQueue, Device, Engine, Kinds, Limits, Memory, Op, Operation};
use blkloom_io::Buffer;
use blkloom_map::Extent;
use rig::*;

const SIZE: u64 = 64 << 10;
const ENOSPC: Errno = Errno::NOSPC;
const LIMITS: Limits = Limits { longest: 4096, most: 8, most_bytes: 1 << 20 };

fn queue(limits: Limits) -> Arc<BackendQueue> {
    Arc::new(BackendQueue::new(limits).unwrap())
}

fn on(backend: &Arc<BackendQueue>, offset: u64, writable: bool) -> Extent<Kinds> {
    Extent::Backend { backend: backend.clone(), offset, writable }
}

fn backed(backend: &Arc<BackendQueue>, timeout: Duration) -> Arc<Device> {
    Device::new("backed".into(), Some(mapping(vec![(SIZE, on(backend, 0, true))], vec![])), timeout).unwrap()
}

fn above(device: &Arc<Device>) -> Arc<Device> {
    let on = Extent::Device { device: device.clone(), offset: 0, writable: true };
    rig::device(mapping(vec![(SIZE, on)], vec![]))
}

fn cancelled(queue: &BackendQueue, of: &Operation) {
    loop {
        assert!(is_readable(queue, PATIENT), "it is not cancelled");
        let taken = queue.take();
        assert!(taken.begun.is_empty());
        if !taken.cancelled.is_empty() {
            return assert_eq!(taken.cancelled, [of.id]);
        }
    }
}

fn ask(engine: &Engine, device: &Arc<Device>, op: Op, len: u64) -> Result<(), Errno> {
    let memory = if matches!(op, Op::Read | Op::Write) { buffer(len) } else { Memory::None };
    by_queue(engine, device, op, 0, memory, len, false)
}

fn buffer(len: u64) -> Memory {
    Memory::owned(Buffer::new(len as usize))
}

/// Serves a queue from memory, on a thread, until it is told to stop.
fn serve(queue: &BackendQueue, bytes: &Mutex<Vec<u8>>, stop: &Mutex<bool>) {
    loop {
        let begun = queue.take().begun;
        if begun.is_empty() && *stop.lock().unwrap() {
            return;
        }
        for mut operation in begun {
            let mut bytes = bytes.lock().unwrap();
            let range = operation.offset as usize..(operation.offset + operation.len) as usize;
            let answer = match operation.op {
                Op::Read => Some(bytes[range].to_vec()),
                Op::Write => {
                    bytes[range].copy_from_slice(operation.payload());
                    None
                }
                Op::WriteZeroes => {
                    bytes[range].fill(0);
                    None
                }
                _ => None,
            };
            queue.complete(&mut operation, Ok(answer));
        }
        std::thread::yield_now();
    }
}

#[test]
fn bytes_are_read_back_however_requests_are_split() {
    for (name, engine) in engines() {
        let queue = queue(Limits { longest: 1000, ..LIMITS });
        let device = device(mapping(vec![(512, memory(&region(4096), 0)), (SIZE, on(&queue, 100, true))], vec![]));
        let (bytes, stop) = (Mutex::new(vec![0; SIZE as usize + 100]), Mutex::new(false));
        let mut model = vec![0u8; (SIZE + 512) as usize];
        std::thread::scope(|scope| {
            scope.spawn(|| serve(&queue, &bytes, &stop));
            let mut random = Random::new(7);
            for turn in 0..200 {
                let offset = random.below(SIZE);
                let len = 1 + random.below(SIZE + 512 - offset).min(9000);
                let range = offset as usize..(offset + len) as usize;
                match random.below(4) {
                    0 => {
                        let from = vec![turn as u8; len as usize];
                        assert_eq!(write(&engine, &device, offset, &from, random.one_in(3)), Ok(()), "{name}");
                        model[range].fill(turn as u8);
                    }
                    1 => {
                        let done = command(&engine, &device, Op::WriteZeroes, offset, len, Default::default());
                        assert_eq!(done, Ok(()), "{name}");
                        model[range].fill(0);
                    }
                    2 => assert_eq!(command(&engine, &device, Op::Flush, 0, 0, Default::default()), Ok(()), "{name}"),
                    _ => {
                        let mut found = vec![1; len as usize];
                        assert_eq!(read(&engine, &device, offset, &mut found), Ok(()), "{name}");
                        assert_eq!(found, model[range], "{name}");
                    }
                }
            }
            *stop.lock().unwrap() = true;
        });
        assert_eq!(bytes.lock().unwrap()[100..], model[512..], "{name}");
    }
}

#[test]
fn the_limits_bound_the_operations_taken_at_once() {
    for (limits, most) in [(Limits { most: 3, ..LIMITS }, 3), (Limits { most_bytes: 2 * 4096 + 1, ..LIMITS }, 2)] {
        for (name, engine) in engines() {
            let queue = queue(limits);
            let device = backed(&queue, PATIENT);
            std::thread::scope(|scope| {
                let ended = scope.spawn(|| ask(&engine, &device, Op::Write, 10 * 4096));
                let mut taken = next(&queue, most);
                for left in (0..10 - most).rev() {
                    assert!(queue.take().begun.is_empty(), "{name}");
                    queue.complete(&mut taken.remove(0), Ok(None));
                    taken.extend(next(&queue, 1));
                    assert!(!ended.is_finished(), "{name}: {left} more wait");
                }
                taken.iter_mut().for_each(|operation| queue.complete(operation, Ok(None)));
                assert_eq!(ended.join().unwrap(), Ok(()), "{name}");
            });
        }
    }
}

#[test]
fn errors_and_missing_answers_fail_the_request() {
    for (name, engine) in engines() {
        let queue = queue(LIMITS);
        let device = backed(&queue, PATIENT);
        let answers = [(Err(ENOSPC), ENOSPC), (Ok(Some(vec![0; 100])), EIO), (Ok(None), EIO)];
        for (answer, errno) in answers {
            std::thread::scope(|scope| {
                let ended = scope.spawn(|| ask(&engine, &device, Op::Read, 512));
                queue.complete(&mut next(&queue, 1).remove(0), answer);
                assert_eq!(ended.join().unwrap(), Err(errno), "{name}");
            });
        }
        std::thread::scope(|scope| {
            let ended = scope.spawn(|| ask(&engine, &device, Op::Flush, 0));
            drop(next(&queue, 1));
            assert_eq!(ended.join().unwrap(), Err(EIO), "{name}: dropped without an answer");
        });
    }
}

#[test]
fn a_gate_that_closes_cancels_reads_and_waits_for_writes() {
    for (name, engine) in engines() {
        let queue = queue(LIMITS);
        let below = backed(&queue, PATIENT);
        let top = above(&below);
        for device in [&top, &below] {
            std::thread::scope(|scope| {
                let read = scope.spawn(|| ask(&engine, &top, Op::Read, 512));
                let mut before = next(&queue, 1).remove(0);
                let write = scope.spawn(|| ask(&engine, &top, Op::Write, 512));
                let mut writing = next(&queue, 1).remove(0);
                let suspended = scope.spawn(|| device.suspend(Some(Instant::now() + PATIENT), || Ok(())));
                cancelled(&queue, &before);
                assert!(!suspended.is_finished(), "{name}: it waits for the write");
                queue.complete(&mut before, Ok(Some(vec![1; 512])));
                queue.complete(&mut writing, Ok(None));
                assert_eq!(write.join().unwrap(), Ok(()), "{name}");
                assert_eq!(suspended.join().unwrap(), Ok(()), "{name}");
                assert!(!read.is_finished(), "{name}: a late answer does not count");
                let late = queue.take().begun;
                assert!(late.is_empty(), "{name}");
                assert!(device.resume());
                queue.complete(&mut next(&queue, 1).remove(0), Ok(Some(vec![2; 512])));
                assert_eq!(read.join().unwrap(), Ok(()), "{name}");
            });
        }
    }
}

#[test]
fn a_flush_reaches_backends_below_after_what_was_written() {
    for (name, engine) in engines() {
        let (queue, read_only) = (queue(LIMITS), queue(LIMITS));
        let half = SIZE / 2;
        let parts = vec![(half, on(&queue, 0, true)), (half, on(&read_only, 0, false))];
        let top = above(&device(mapping(parts, vec![])));
        std::thread::scope(|scope| {
            let ended = scope.spawn(|| command(&engine, &top, Op::Flush, 0, 0, Default::default()));
            let mut flush = next(&queue, 1).remove(0);
            assert_eq!(flush.op, Op::Flush);
            assert!(!ended.is_finished(), "{name}");
            queue.complete(&mut flush, Ok(None));
            assert_eq!(ended.join().unwrap(), Ok(()), "{name}");
        });
        assert!(read_only.take().begun.is_empty());
    }
}

#[test]
fn an_operation_that_times_out_is_cancelled() {
    for (name, engine) in engines() {
        for op in [Op::Read, Op::Write, Op::Flush] {
            with_longer_times(|times| {
                let queue = queue(LIMITS);
                let device = backed(&queue, times * Duration::from_millis(20));
                let length = if op == Op::Flush { 0 } else { 512 };
                assert_eq!(ask(&engine, &device, op, length), Err(ETIMEDOUT), "{name}");
                assert!(queue.take().begun.is_empty(), "{name}: an operation that was not taken is never started");
                std::thread::scope(|scope| {
                    let ended = scope.spawn(|| ask(&engine, &device, op, length));
                    let mut begun = queue.take().begun;
                    while begun.is_empty() && !ended.is_finished() {
                        begun = queue.take().begun;
                    }
                    if let [begun] = &begun[..] {
                        cancelled(&queue, begun);
                    }
                    assert_eq!(ended.join().unwrap(), Err(ETIMEDOUT), "{name}");
                    !begun.is_empty()
                })
            });
        }
    }
}

#[test]
fn fail_held_does_not_wait_for_reads_and_a_closed_backend_fails_all() {
    for (name, engine) in engines() {
        let queue = queue(LIMITS);
        let device = backed(&queue, PATIENT);
        std::thread::scope(|scope| {
            let ended = scope.spawn(|| ask(&engine, &device, Op::Read, 512));
            let begun = next(&queue, 1).remove(0);
            device.fail_deferred();
            cancelled(&queue, &begun);
            assert_eq!(ended.join().unwrap(), Err(ESHUTDOWN), "{name}");
            let waits = scope.spawn(|| ask(&engine, &device, Op::Write, 512));
            assert!(is_readable(&queue, PATIENT));
            queue.close();
            assert_eq!(waits.join().unwrap(), Err(ESHUTDOWN), "{name}");
            assert_eq!(ask(&engine, &device, Op::Flush, 0), Err(ESHUTDOWN), "{name}");
        });
        assert_eq!(queue.limits(), LIMITS);
    }
}
