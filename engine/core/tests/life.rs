//! Devices with requests in the queue: swap, suspend, faults with every outcome, flush, and closing of devices and
//! engines. Every request goes through an event loop, with threads and, if it is available, with io_uring.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use blkloom_core::{
    Answer, Device, Direction, Engine, Fault, Flags, Kinds, Memory, Notices, Op, Outcome, Owner, Request, SuspendError,
    SwapError, Transfer,
};
use blkloom_io::{Buffer, File, Scratch};
use blkloom_map::{ClusterTable, Entry, Extent};
use rig::*;

fn read_by_queue(engine: &Engine, device: &Arc<Device>, offset: u64, into: &mut [u8]) -> Result<(), Errno> {
    let len = into.len() as u64;
    by_queue(engine, device, Op::Read, offset, Memory::Borrowed(promised(into)), len, false)
}

fn write_by_queue(
    engine: &Engine,
    device: &Arc<Device>,
    offset: u64,
    byte: u8,
    len: u64,
    fua: bool,
) -> Result<(), Errno> {
    let mut buffer = Buffer::new(len as usize);
    buffer.bytes_mut().fill(byte);
    by_queue(engine, device, Op::Write, offset, Memory::owned(buffer), len, fua)
}

fn contents(file: &File, size: u64) -> Vec<u8> {
    let mut bytes = vec![0; size as usize];
    file.read(0, (&mut bytes[..]).into(), &mut Scratch::default()).unwrap();
    bytes
}

/// The next fault; the device must not close meanwhile.
fn next(device: &Device) -> Fault {
    let mut faults = device.next_faults(Some(PATIENT)).unwrap();
    assert_eq!(faults.len(), 1, "one fault and no other");
    faults.remove(0)
}

/// Answers every fault the same way until the device closes.
fn answer_all(device: &Device, answer: impl Fn(&Fault) -> Answer) {
    while let Some(faults) = device.next_faults(None) {
        for mut fault in faults {
            let answer = answer(&fault);
            fault.answer(answer);
        }
    }
}

fn until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENT;
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::yield_now();
    }
}

#[test]
fn after_a_swap_no_queued_request_uses_the_old_map() {
    const SIZE: u64 = 64 << 10;
    for (name, engine) in engines() {
        let files = [file(SIZE, true), file(SIZE, true)];
        let fill = |file: &File, byte| {
            let mut buffer = Buffer::new(SIZE as usize);
            buffer.bytes_mut().fill(byte);
            file.write(0, buffer.bytes().into(), false, &mut Scratch::default()).unwrap();
        };
        files.iter().for_each(|file| fill(file, 1));
        let device = device(mapping(vec![(SIZE, data(&files[0], 0))], vec![]));
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for seed in 1..4 {
                let (engine, device, stop) = (&engine, &device, &stop);
                scope.spawn(move || {
                    let mut random = Random::new(seed);
                    while !stop.load(Ordering::Relaxed) {
                        let (offset, mut bytes) = (random.below(SIZE - 5000), vec![0; 1 + random.below(5000) as usize]);
                        if random.one_in(3) {
                            assert_eq!(write_by_queue(engine, device, offset, 1, bytes.len() as u64, false), Ok(()));
                        } else {
                            assert_eq!(read_by_queue(engine, device, offset, &mut bytes), Ok(()));
                            assert!(bytes.iter().all(|&byte| byte == 1), "poison was read after the swap");
                        }
                    }
                });
            }
            let mut hit = 0;
            for turn in 1..150 {
                let (new, old) = (&files[turn % 2], &files[(turn + 1) % 2]);
                fill(new, 1);
                device.swap(mapping(vec![(SIZE, data(new, 0))], vec![])).unwrap();
                fill(old, 0xee);
                (0..5).for_each(|_| std::thread::yield_now());
                hit += contents(old, SIZE).iter().filter(|&&byte| byte != 0xee).count();
            }
            stop.store(true, Ordering::Relaxed);
            assert_eq!(hit, 0, "with {name}: written to the old file after the swap");
        });
    }
}

/// Writes that fault, are retried and then wait for a file. None may be in progress when `suspend` has returned.
#[test]
fn a_suspend_drains_requests_that_fault() {
    const CLUSTERS: u64 = 32;
    const SIZE: u64 = CLUSTERS * 4096;
    for (name, engine) in engines() {
        let file = file(SIZE, false);
        let table = Arc::new(ClusterTable::new(SIZE, 4096, 1, vec![file.clone()]).unwrap());
        let device = device(mapping(vec![(SIZE, Extent::Table(table.clone()))], vec![]));
        device.attach_mapper();
        let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
        std::thread::scope(|scope| {
            let (engine, device, stop, done) = (&engine, &device, &stop, &done);
            scope.spawn(move || {
                answer_all(device, |fault| {
                    let first = fault.offset / 4096;
                    for cluster in first..(fault.offset + fault.len).div_ceil(4096) {
                        table.install(cluster, &[(Entry::KIND_DATA << 61) | (cluster * 8)]).unwrap();
                    }
                    table.drop_page((first + 7) % CLUSTERS).unwrap();
                    Answer::Retry
                });
            });
            for seed in 1..4 {
                scope.spawn(move || {
                    let mut random = Random::new(seed);
                    while !stop.load(Ordering::Relaxed) {
                        let (offset, len) = (random.below(SIZE - 9000), 1 + random.below(9000));
                        assert_eq!(write_by_queue(engine, device, offset, random.next() as u8, len, false), Ok(()));
                        done.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            let mut moved = 0;
            for _ in 0..150 {
                engine.suspend(device, false, Some(Instant::now() + PATIENT)).unwrap();
                let before = contents(&file, SIZE);
                (0..10).for_each(|_| std::thread::yield_now());
                moved += usize::from(contents(&file, SIZE) != before);
                assert!(device.resume());
                let seen = done.load(Ordering::Relaxed);
                until("waiting requests finish on resume", || done.load(Ordering::Relaxed) > seen + 3);
            }
            stop.store(true, Ordering::Relaxed);
            until("all end", || device.stats().totals().in_flight == 0);
            device.close();
            assert_eq!(moved, 0, "with {name}: a write passed the closed gate");
        });
    }
}

#[test]
fn a_durable_write_in_flight_ends_before_the_suspend_that_waits_for_it() {
    for (_, engine) in engines() {
        let device = device(mapping(vec![(4096, Extent::Fault)], vec![0]));
        device.attach_mapper();
        std::thread::scope(|scope| {
            let (engine, device) = (&engine, &device);
            let writer = scope.spawn(move || write(engine, device, 0, &[5; 100], true));
            let mut fault = next(device);
            assert_eq!((fault.op, fault.len, fault.flags.fua), (Op::Write, 100, true));
            let suspender = scope.spawn(move || engine.suspend(device, true, None));
            until("the gate closes", || device.suspended());
            fault.answer(Answer::Done(None));
            let mut flush = next(device);
            assert_eq!(flush.op, Op::Flush, "what makes the write durable");
            flush.answer(Answer::Done(None));
            assert_eq!(writer.join().unwrap(), Ok(()), "though the gate is closed");
            let mut flush = next(device);
            assert_eq!(flush.op, Op::Flush, "the suspend's own");
            flush.answer(Answer::Done(None));
            assert_eq!(suspender.join().unwrap(), Ok(()));
        });
    }
}

#[test]
fn a_failed_last_flush_leaves_the_device_suspended() {
    let engine = engines().remove(0).1;
    let device = device(mapping(vec![(4096, Extent::Fault)], vec![0]));
    device.attach_mapper();
    std::thread::scope(|scope| {
        let (engine, device) = (&engine, &device);
        let suspender = scope.spawn(move || engine.suspend(device, true, None));
        next(device).answer(Answer::Fail(Errno::NOSPC));
        assert_eq!(suspender.join().unwrap(), Err(SuspendError::Flush(Errno::NOSPC)));
        assert!(device.suspended() && device.resume() && !device.suspended());
    });
}

#[test]
fn requests_wait_at_the_gate_of_a_device_below() {
    for (_, engine) in engines() {
        let lower = device(mapping(vec![(4096, memory(&region(4096), 0))], vec![]));
        let below = Extent::Device { device: lower.clone(), offset: 0, writable: true };
        let upper = device(mapping(vec![(4096, below)], vec![]));
        engine.suspend(&lower, true, None).unwrap();
        std::thread::scope(|scope| {
            let (engine, upper, lower) = (&engine, &upper, &lower);
            let writer = scope.spawn(move || write(engine, upper, 100, &[1; 100], false));
            until("the write begins", || upper.stats().totals().in_flight == 1);
            // The request is inside the upper device, which therefore cannot drain; or it is not there yet, and then
            // it waits at the upper gate until the suspend times out.
            let soon = Instant::now() + Duration::from_millis(20);
            let result = engine.suspend(upper, true, Some(soon));
            assert!(matches!(result, Err(SuspendError::Timeout) | Ok(())), "{result:?}");
            assert!(upper.resume());
            assert!(!writer.is_finished());
            assert!(lower.resume());
            assert_eq!(writer.join().unwrap(), Ok(()));
            let mut bytes = [0; 102];
            assert_eq!(read(engine, upper, 99, &mut bytes), Ok(()));
            assert_eq!(bytes.to_vec(), [&[0][..], &[1; 100], &[0]].concat());
        });
    }
}

#[test]
fn unanswered_faults_time_out_however_soon_the_loop_sleeps() {
    for (name, engine) in engines() {
        let place = mapping(vec![(1 << 20, Extent::Fault)], vec![0]);
        let device = Device::new(String::new(), Some(place), Duration::from_millis(30)).unwrap();
        device.attach_mapper();
        for _ in 0..3 {
            assert_eq!(read_by_queue(&engine, &device, 0, &mut [0; 512]), Err(ETIMEDOUT), "with {name}");
            assert_eq!(command(&engine, &device, Op::Flush, 0, 0, Flags::default()), Err(ETIMEDOUT), "with {name}");
        }
        let late = device.next_faults(None).unwrap();
        assert_eq!(late.len(), 6);
        std::thread::scope(|scope| {
            let (engine, device) = (&engine, &device);
            let reader = scope.spawn(move || {
                let mut bytes = [0; 512];
                (read_by_queue(engine, device, 4096, &mut bytes), bytes)
            });
            let mut fault = next(device);
            for mut late in late {
                late.answer(Answer::Done(Some(vec![0xbb; 512])));
            }
            fault.answer(Answer::Done(Some(vec![7; 512])));
            // If this request timed out as well, the machine is too slow for this check.
            let (error, bytes) = reader.join().unwrap();
            assert!(
                error == Err(ETIMEDOUT) || (error, bytes) == (Ok(()), [7; 512]),
                "a late answer went astray: {error:?}"
            );
        });
    }
}

#[test]
fn timeouts_beyond_the_range_of_the_clock_never_end() {
    let engine = engines().remove(0).1;
    let device = Device::new(String::new(), Some(mapping(vec![(512, Extent::Fault)], vec![])), Duration::MAX).unwrap();
    device.attach_mapper();
    std::thread::scope(|scope| {
        let (engine, device) = (&engine, &device);
        let reader = scope.spawn(move || read(engine, device, 0, &mut [0; 512]));
        let mut faults = device.next_faults(Some(Duration::MAX)).unwrap();
        faults[0].answer(Answer::Done(Some(vec![1; 512])));
        assert_eq!(reader.join().unwrap(), Ok(()));
    });
}

#[test]
fn a_request_of_very_many_faults_keeps_few_of_them_waiting() {
    const CLUSTERS: u64 = 1000;
    const SIZE: u64 = CLUSTERS * 512;
    for (name, engine) in engines() {
        let place = file(SIZE, false);
        let table = Arc::new(ClusterTable::new(SIZE, 512, 1, vec![place]).unwrap());
        let device = device(mapping(vec![(SIZE, Extent::Table(table.clone()))], vec![]));
        device.attach_mapper();
        std::thread::scope(|scope| {
            let (engine, device) = (&engine, &device);
            let writer = scope.spawn(move || {
                let written = write_by_queue(engine, device, 0, 9, SIZE, false);
                let mut bytes = vec![0; SIZE as usize];
                (written, read_by_queue(engine, device, 0, &mut bytes), bytes)
            });
            let mut answered = 0;
            while answered < CLUSTERS {
                let mut faults = Vec::new();
                while faults.is_empty() {
                    faults = device.next_faults(Some(PATIENT)).unwrap();
                    assert!(!faults.is_empty(), "with {name}: faults stopped coming after {answered}");
                }
                assert!(faults.len() <= 256, "with {name}: {} faults of one request at once", faults.len());
                for mut fault in faults {
                    assert_eq!((fault.len, fault.payload()), (512, &[9; 512][..]));
                    let cluster = fault.offset / 512;
                    table.install(cluster, &[Entry::KIND_DATA << 61 | (CLUSTERS - 1 - cluster)]).unwrap();
                    fault.answer(Answer::Retry);
                    answered += 1;
                }
            }
            let (written, read, bytes) = writer.join().unwrap();
            assert_eq!((written, read), (Ok(()), Ok(())), "with {name}");
            assert!(bytes.iter().all(|&byte| byte == 9));
        });
    }
}

#[test]
fn endless_retry_answers_fail_a_request_of_many_pieces() {
    for (name, engine) in engines() {
        let table = Arc::new(ClusterTable::<Kinds>::new(512 * 512, 512, 1, vec![]).unwrap());
        let device = device(mapping(vec![(512 * 512, Extent::Table(table))], vec![]));
        device.attach_mapper();
        std::thread::scope(|scope| {
            let device = &device;
            scope.spawn(move || answer_all(device, |_| Answer::Retry));
            let result = read_by_queue(&engine, device, 0, &mut vec![0; 512 * 512]);
            device.close();
            assert_eq!(result, Err(EIO), "with {name}");
        });
    }
}

#[test]
fn a_request_of_thousands_of_stripes_in_files_is_one_request() {
    const SIZE: u64 = 3 << 20;
    for (name, engine) in engines() {
        let legs = [data(&file(SIZE, false), 0), data(&file(SIZE, true), 512), memory(&region(SIZE), 0)];
        let device = device(mapping(vec![(SIZE, Extent::Stripes { chunk: 1024, legs: legs.into() })], vec![]));
        let mut written: Vec<u8> = (0..SIZE).map(|i| (i / 7 % 251) as u8).collect();
        let memory = Memory::Borrowed(promised(&mut written));
        assert_eq!(by_queue(&engine, &device, Op::Write, 0, memory, SIZE, true), Ok(()), "with {name}");
        let mut bytes = vec![0; SIZE as usize];
        assert_eq!(read_by_queue(&engine, &device, 0, &mut bytes), Ok(()));
        assert!(bytes == written);
        let flags = Flags { unmap: true, fua: true, ..Flags::default() };
        command(&engine, &device, Op::WriteZeroes, 1000, SIZE - 2000, flags).unwrap();
        written[1000..SIZE as usize - 1000].fill(0);
        assert_eq!(read_by_queue(&engine, &device, 0, &mut bytes), Ok(()));
        assert!(bytes == written);
        assert_eq!(device.stats().totals().in_flight, 0);
    }
}

#[test]
fn zeroing_a_huge_region_is_one_request_too() {
    for (_, engine) in engines() {
        let (size, place) = (1 << 38, region(1 << 38));
        let device = device(mapping(vec![(size, memory(&place, 0))], vec![]));
        for offset in [0, 1 << 30, size - 9] {
            write(&engine, &device, offset, b"something", false).unwrap();
        }
        command(&engine, &device, Op::Discard, 4, size - 8, Flags::default()).unwrap();
        let mut bytes = [0; 9];
        for (offset, expected) in [(0, b"some\0\0\0\0\0"), (1 << 30, &[0; 9]), (size - 9, b"\0\0\0\0\0hing")] {
            read(&engine, &device, offset, &mut bytes).unwrap();
            assert_eq!(&bytes, expected);
        }
        assert_eq!(place.resident(), 2 * 4096);
    }
}

#[test]
fn a_flush_reaches_the_targets_below_first_and_fails_with_the_first_that_fails() {
    for (_, engine) in engines() {
        let lower = device(mapping(vec![(4096, data(&file(4096, false), 0))], vec![4]));
        let below = Extent::Device { device: lower.clone(), offset: 0, writable: true };
        let upper = device(mapping(vec![(4096, below)], vec![8, 9]));
        [&lower, &upper].iter().for_each(|device| device.attach_mapper());
        std::thread::scope(|scope| {
            let (engine, upper) = (&engine, &upper);
            for (fua, fail) in [(false, None), (true, None), (false, Some(Errno::NOSPC)), (true, Some(Errno::NOSPC))] {
                let asker = scope.spawn(move || match fua {
                    false => command(engine, upper, Op::Flush, 0, 0, Flags::default()),
                    true => write(engine, upper, 7, &[1; 9], true),
                });
                let (mut below, mut above) = (next(&lower), Vec::new());
                until("both owners are asked", || !asker.is_finished());
                while above.len() < 2 {
                    above.append(&mut upper.next_faults(Some(PATIENT)).unwrap());
                }
                let owners: Vec<u32> = above.iter().map(|fault| fault.owner).collect();
                assert_eq!((below.owner, owners), (4, vec![8, 9]));
                below.answer(Answer::Done(None));
                above[0].answer(fail.map_or(Answer::Done(None), Answer::Fail));
                assert!(!asker.is_finished(), "a flush ends when all its owners have answered");
                above[1].answer(Answer::Retry);
                assert_eq!(asker.join().unwrap(), fail.map_or(Ok(()), Err));
            }
        });
    }
}

#[test]
fn closing_a_device_ends_what_waits_at_its_gate() {
    for (_, engine) in engines() {
        let device = device(mapping(vec![(4096, memory(&region(4096), 0))], vec![]));
        engine.suspend(&device, true, None).unwrap();
        std::thread::scope(|scope| {
            let (engine, device) = (&engine, &device);
            let waiting: Vec<_> = (0..5).map(|_| scope.spawn(move || read(engine, device, 0, &mut [0; 512]))).collect();
            until("they begin", || device.stats().totals().in_flight == 5);
            device.close();
            for waiting in waiting {
                assert_eq!(waiting.join().unwrap(), Err(ESHUTDOWN));
            }
        });
        assert_eq!(read(&engine, &device, 0, &mut [0; 512]), Err(ESHUTDOWN));
        assert!(!device.resume());
        let place = mapping(vec![(4096, memory(&region(4096), 0))], vec![]);
        assert_eq!(device.swap(place).map(drop), Err(SwapError::Closed));
        assert!(device.next_faults(None).is_none());
        assert_eq!(device.stats().totals().in_flight, 0);
    }
}

#[test]
fn closing_an_engine_fails_requests_at_a_gate_and_later_ones() {
    for (_, engine) in engines() {
        let device = device(mapping(vec![(4096, memory(&region(4096), 0))], vec![]));
        engine.suspend(&device, true, None).unwrap();
        std::thread::scope(|scope| {
            let (engine, device) = (&engine, &device);
            let waiting: Vec<_> = (0..5).map(|_| scope.spawn(move || read(engine, device, 0, &mut [0; 512]))).collect();
            until("they begin", || device.stats().totals().in_flight == 5);
            engine.close();
            for waiting in waiting {
                assert_eq!(waiting.join().unwrap(), Err(ESHUTDOWN));
            }
        });
        assert_eq!(read_by_queue(&engine, &device, 0, &mut [0; 512]), Err(ESHUTDOWN));
        assert_eq!(device.stats().totals().in_flight, 0);
        // The gate still opens.
        assert!(device.resume());
    }
}

#[test]
fn io_that_was_submitted_comes_back_as_notices() {
    for (_, engine) in engines() {
        let device = device(mapping(vec![(1 << 20, data(&file(1 << 20, true), 0))], vec![]));
        let notices = Arc::new(Notices::new().unwrap());
        let submit = |token: u64, op, offset, len: u64| {
            let buffer = Buffer::new(len as usize);
            engine.start(Request {
                device: device.clone(),
                op,
                offset,
                len,
                flags: Flags::default(),
                memory: Memory::owned(buffer),
                owner: Owner::Notice { notices: notices.clone(), token },
                started: Instant::now(),
                context: None,
                done: 0,
            });
        };
        for token in 0..50 {
            submit(token, if token % 2 == 0 { Op::Write } else { Op::Read }, token * 1000, 777);
        }
        submit(50, Op::Read, 1 << 20, 1);
        submit(51, Op::Write, u64::MAX, 2);
        let mut all = Vec::new();
        while all.len() < 52 {
            let fd = notices.fd();
            let mut polled = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
            rustix::event::poll(&mut polled, None).unwrap();
            for notice in notices.take() {
                let Outcome::Io { error, .. } = notice.outcome else { panic!("nothing was closed") };
                all.push((notice.token, error));
            }
        }
        all.sort_unstable_by_key(|(token, _)| *token);
        let refused = [(50, Some(Errno::INVAL)), (51, Some(Errno::NOSPC))];
        let expected: Vec<(u64, Option<Errno>)> = (0..50).map(|token| (token, None)).chain(refused).collect();
        assert_eq!(all, expected);
        assert!(notices.take().is_empty());
    }
}

#[test]
fn a_batch_answers_each_of_its_transfers() {
    for (_, engine) in engines() {
        let parts = vec![
            (8192, memory(&region(8192), 0)),
            (8192, data(&file(8192, true), 0)),
            (4096, Extent::Error(Errno::BADMSG)),
            (4096, Extent::Fault),
        ];
        let device = device(mapping(parts, vec![]));
        let buffers = [[1; 4096]; 6];
        let offsets = [0, 6000, 16_384, 20_480, 24_576, 20_481];
        let each = buffers.iter().zip(offsets);
        let batch: Vec<_> =
            each.map(|(from, offset)| Transfer { direction: Direction::Write(from[..].into()), offset }).collect();
        assert_eq!(
            engine.batch(&device, &batch),
            [None, None, Some(Errno::BADMSG), Some(EIO), Some(Errno::NOSPC), Some(Errno::NOSPC)]
        );
        let mut back = [[0; 4096]; 6];
        let each = back.iter_mut().zip(offsets);
        let batch: Vec<_> = each
            .map(|(into, offset)| Transfer { direction: Direction::Read((&mut into[..]).into()), offset })
            .collect();
        assert_eq!(
            engine.batch(&device, &batch),
            [None, None, Some(Errno::BADMSG), Some(EIO), Some(Errno::INVAL), Some(Errno::INVAL)]
        );
        assert_eq!(back[..2], buffers[..2]);
        let totals = device.stats().totals();
        assert_eq!((totals.ops[Op::Write as usize].count, totals.ops[Op::Write as usize].errors), (6, 4));
        assert_eq!(totals.in_flight, 0);
        assert!(engine.batch(&device, &[]).is_empty());
    }
}
