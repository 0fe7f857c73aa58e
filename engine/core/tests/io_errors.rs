//! Which failures count as I/O errors of a device, on the fast path and in the queue.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use std::sync::Arc;
use std::time::Duration;

use blkloom_core::{Device, Flags, IoError, News, Op};
use blkloom_io::File;
use blkloom_map::Extent;
use rustix::fs::ftruncate;

use rig::{EIO, Errno, command, data, device, engines, file, file_in_memory, mapping, read, write};

const LEN: u64 = 1 << 20;

fn error(op: Op, offset: u64, errno: Errno) -> IoError {
    IoError { op, offset, errno, file: "test".into() }
}

/// Truncated files that a map uses beyond their end, and a device on each, after a megabyte of zeros.
fn cut_off() -> Vec<(Arc<File>, Arc<Device>)> {
    let files = [file(LEN, false), file(LEN, true), file_in_memory(LEN)];
    files
        .into_iter()
        .map(|file| {
            ftruncate(file.fd(), 4096).unwrap();
            let zeros = (LEN, Extent::Zero { discard_writes: true });
            let made = device(mapping(vec![zeros, (LEN, data(&file, 0))], vec![]));
            (file, made)
        })
        .collect()
}

#[test]
fn a_failure_of_storage_is_counted_with_its_offset_and_file() {
    for (kind, engine) in engines() {
        for (_file, device) in cut_off() {
            let mut bytes = [0; 8192];
            assert_eq!(read(&engine, &device, LEN + 65536, &mut bytes), Err(EIO), "{kind}");
            assert_eq!(device.io_errors().last(), Some(error(Op::Read, LEN + 65536, EIO)), "{kind}");
            assert_eq!(read(&engine, &device, LEN, &mut bytes[..4096]), Ok(()), "{kind}");
            assert_eq!(device.io_errors().count(), 1, "{kind}");
            let upper = rig::device(mapping(
                vec![(LEN, Extent::Device { device: device.clone(), offset: LEN, writable: true })],
                vec![],
            ));
            assert_eq!(read(&engine, &upper, 131072, &mut bytes), Err(EIO), "{kind}");
            assert_eq!(upper.io_errors().last(), Some(error(Op::Read, 131072, EIO)), "{kind}");
            assert_eq!(device.io_errors().count(), 1, "{kind}: it was not asked by a client");
        }
        engine.close();
    }
}

#[test]
fn invalid_requests_and_error_extents_are_not_counted() {
    for (kind, engine) in engines() {
        let read_only = Extent::Data { file: file(LEN, false), offset: 0, writable: false };
        let made = device(mapping(vec![(LEN, read_only), (LEN, Extent::Error(EIO))], vec![]));
        assert!(read(&engine, &made, 2 * LEN, &mut [0; 512]).is_err(), "{kind}");
        assert!(read(&engine, &made, LEN, &mut [0; 512]).is_err(), "{kind}");
        assert!(command(&engine, &made, Op::Discard, LEN, 512, Flags::default()).is_err(), "{kind}");
        made.attach_mapper();
        let answering = std::thread::spawn({
            let made = made.clone();
            move || {
                for mut fault in made.next_faults(None).unwrap() {
                    fault.answer(blkloom_core::Answer::Fail(Errno::ROFS));
                }
            }
        });
        assert_eq!(write(&engine, &made, 0, &[1; 512], false), Err(Errno::ROFS), "{kind}");
        answering.join().unwrap();
        assert_eq!((made.io_errors().count(), made.io_errors().last()), (0, None), "{kind}");
        engine.close();
    }
}

#[test]
fn a_failure_of_a_target_is_counted_without_a_file() {
    let (_, engine) = engines().remove(0);
    let made = device(mapping(vec![(LEN, Extent::Fault)], vec![]));
    assert_eq!(read(&engine, &made, 512, &mut [0; 512]), Err(EIO), "nothing answers");
    let last = IoError { op: Op::Read, offset: 512, errno: EIO, file: String::new() };
    assert_eq!(made.io_errors().last(), Some(last));
}

#[test]
fn new_errors_are_bounded_and_wake_the_mapper_once() {
    let (_, engine) = engines().remove(0);
    let (_file, made) = cut_off().remove(0);
    made.attach_mapper();
    let woken = |made: &Device| made.next_faults(Some(Duration::ZERO)).unwrap().is_empty();
    let waiting = std::thread::spawn({
        let made = made.clone();
        move || made.next_faults(None).unwrap().len()
    });
    for time in 0..100 {
        let _failed = read(&engine, &made, LEN + 65536 + time * 512, &mut [0; 512]);
    }
    assert_eq!(waiting.join().unwrap(), 0);
    assert!(made.io_errors().waiting());
    let kinds = vec![(error(Op::Read, LEN + 65536 + 99 * 512, EIO), 100)];
    assert_eq!(made.io_errors().take(), News { kinds, others: 0 });
    assert!(!made.io_errors().waiting());
    assert_eq!((made.io_errors().take(), made.io_errors().count()), (News::default(), 100));
    assert!(woken(&made));
}

#[test]
fn of_many_kinds_of_errors_some_are_kept_and_the_others_counted() {
    let (_, engine) = engines().remove(0);
    let files: Vec<Arc<File>> = (0..12)
        .map(|number| {
            let whole = file(4096, false);
            ftruncate(whole.fd(), 0).unwrap();
            let fd = whole.fd().try_clone_to_owned().unwrap();
            Arc::new(File::new(fd, true, false, format!("file {number}")).unwrap())
        })
        .collect();
    let made = device(mapping(files.iter().map(|file| (4096, data(file, 0))).collect(), vec![]));
    for number in 0..12 {
        assert_eq!(read(&engine, &made, number * 4096, &mut [0; 512]), Err(EIO));
    }
    let News { kinds, others } = made.io_errors().take();
    assert_eq!((kinds.len(), others), (8, 4));
    assert_eq!(made.io_errors().last().unwrap().file, "file 11");
}
