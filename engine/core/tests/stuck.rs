//! Storage that does not answer: `File::in_flight` shows it, and suspend and close do not wait for it. (The test locks
//! blocks of a file, so that an unaligned direct write waits for them on a pool thread.)
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use blkloom_core::{Device, Memory, Op, SuspendError, SwapError};
use blkloom_io::{Buffer, File};
use rig::*;

const SIZE: u64 = 64 << 10;

/// A device over a file, and the file. None: the file system has no direct I/O, so no write can be made to wait.
fn stuck_on(fault_timeout: Duration) -> Option<(Arc<Device>, Arc<File>)> {
    let file = file(SIZE, true);
    file.direct().then(|| {
        let mapping = mapping(vec![(SIZE, data(&file, 0))], vec![]);
        (Device::new("test".into(), Some(mapping), fault_timeout).unwrap(), file)
    })
}

fn soon() -> Option<Instant> {
    Some(Instant::now() + Duration::from_millis(30))
}

fn until(done: impl Fn() -> bool) {
    while !done() {
        std::thread::yield_now();
    }
}

/// A map that reads as sevens.
fn in_memory() -> Arc<blkloom_core::Mapping> {
    let place = region(SIZE);
    place.write(0, vec![7; SIZE as usize][..].into());
    mapping(vec![(SIZE, memory(&place, 0))], vec![])
}

#[test]
fn a_file_counts_operations_in_flight() {
    for (_, engine) in engines() {
        let Some((device, file)) = stuck_on(PATIENT) else { return };
        let blocks = file.share_blocks(0, 4096).unwrap();
        std::thread::scope(|scope| {
            let (engine, device) = (&engine, &device);
            let queued = scope.spawn(move || {
                let buffer = Memory::owned(Buffer::new(100));
                by_queue(engine, device, Op::Write, 5, buffer, 100, false)
            });
            until(|| file.in_flight() == 1);
            let in_place = scope.spawn(move || write(engine, device, 300, &[1; 9], false));
            until(|| file.in_flight() == 2);
            assert_eq!(engine.suspend(device, true, soon()), Err(SuspendError::Timeout));
            assert!(!device.suspended());
            drop(blocks);
            assert_eq!((queued.join().unwrap(), in_place.join().unwrap()), (Ok(()), Ok(())));
        });
        assert_eq!(file.in_flight(), 0);
        for offset in (0..SIZE).step_by(4096) {
            let mut buffer = Buffer::new(4096);
            let memory = Memory::Borrowed(promised(buffer.bytes_mut()));
            assert_eq!(by_queue(&engine, &device, Op::Read, offset, memory, 4096, false), Ok(()));
        }
        assert_eq!(file.in_flight(), 0, "what the ring or a thread has ended counts no more");
    }
}

#[test]
fn suspend_and_close_do_not_wait_for_a_swap_that_waits_for_storage() {
    for (_, engine) in engines() {
        let Some((device, file)) = stuck_on(Duration::from_millis(30)) else { return };
        let blocks = file.share_blocks(0, 4096).unwrap();
        let swapped = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let buffer = Memory::owned(Buffer::new(100));
                by_queue(&engine, &device, Op::Write, 5, buffer, 100, false)
            });
            until(|| file.in_flight() == 1);
            let swap = scope.spawn(|| {
                let result = device.swap(in_memory()).map(drop);
                swapped.store(true, Ordering::SeqCst);
                result
            });
            let sevens = || {
                let mut bytes = [0; 9];
                read(&engine, &device, SIZE - 9, &mut bytes).unwrap();
                bytes == [7; 9]
            };
            until(sevens);
            assert_eq!(engine.suspend(&device, true, soon()), Err(SuspendError::Timeout));
            assert!(!device.suspended() && sevens());
            device.close();
            assert!(!swapped.load(Ordering::SeqCst), "closing waited for the swap, which waits for the file");
            assert_eq!(read(&engine, &device, 0, &mut [0; 512]), Err(ESHUTDOWN));
            drop(blocks);
            assert_eq!(writer.join().unwrap(), Ok(()));
            assert_eq!(swap.join().unwrap(), Ok(()));
        });
        assert!(device.closed() && device.size() == 0);
        assert_eq!(Arc::strong_count(&file), 1, "a closed device holds no file");
        assert_eq!(device.swap(in_memory()).map(drop), Err(SwapError::Closed));
        assert!(!device.resume());
    }
}

/// A close is final, whatever runs at the same time.
#[test]
fn nothing_opens_a_closed_device_again() {
    let engine = engines().remove(0).1;
    for _ in 0..300 {
        let device = device(in_memory());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !device.closed() {
                    let _closed = engine.suspend(&device, false, Some(Instant::now()));
                    device.resume();
                }
            });
            scope.spawn(|| while device.swap(in_memory()).is_ok() {});
            device.close();
        });
        assert!(device.closed());
        assert_eq!(device.size(), 0, "a closed device holds no map");
    }
}
