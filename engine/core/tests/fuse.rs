//! The FUSE transport on a socket in place of /dev/fuse: packets of the socket are whole messages, too. Python tests
//! use real mounts.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use blkloom_core::fuse::{self, Detached, FuseFile, InitError, Owner, Record, RecordError, answer_init};
use blkloom_core::{Answer, Device, Export, Op, Outcome};
use blkloom_fuse_wire::{Negotiated, capability};
use blkloom_map::Extent;
use rig::fuse_kernel::*;
use rig::hosts::{self, Host, memory_device};
use rig::{PATIENT, data, device, engines, file, mapping, memory, region};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{RecvFlags, recv};

const PAGE: u64 = 4096;

const EPERM: i32 = 1;
const EIO: i32 = 5;
const ENXIO: i32 = 6;
const ENOSPC: i32 = 28;
const EROFS: i32 = 30;
const ENOSYS: i32 = 38;
const EPROTO: i32 = 71;
const EOPNOTSUPP: i32 = 95;

/// A device with memory, followed by a range of the same size that faults: each byte of a read is the page's number.
fn half_faults(pages: u64) -> Arc<Device> {
    let half = pages / 2 * PAGE;
    let device = device(mapping(vec![(half, memory(&region(half), 0)), (half, Extent::Fault)], vec![1]));
    device.attach_mapper();
    device
}

/// The operations of the answered faults.
fn answer_faults(device: &Device) -> Vec<Op> {
    let mut seen = Vec::new();
    while let Some(faults) = device.next_faults(None) {
        for mut fault in faults {
            seen.push(fault.op);
            let bytes = vec![(fault.offset / PAGE) as u8; fault.len as usize];
            fault.answer(if fault.op == Op::Read { Answer::Done(Some(bytes)) } else { Answer::Done(None) });
        }
    }
    seen
}

#[test]
fn what_is_served_at_once_and_what_goes_through_the_queue_is_answered_once_each() {
    const PAGES: u64 = 64;
    for (name, engine) in engines() {
        let host = Host::new(engine, half_faults(PAGES));
        let device = host.device.clone();
        let answering = std::thread::spawn(move || answer_faults(&device));
        let (kernel, _handle) = Kernel::new(&host, &file_of(&host));
        assert_eq!(host.export.transports(), BTreeMap::from([("fuse", 1)]));
        for number in 0..PAGES / 2 {
            assert_eq!(kernel.write(number * PAGE, &[number as u8; PAGE as usize]), Ok(PAGE as u32), "with {name}");
        }
        // As many together as a socket has room for; /dev/fuse takes every reply.
        let count = 20 * PAGES;
        let mut answered = vec![0; count as usize];
        for first in (0..count).step_by(16) {
            let uniques = first..first + 16;
            uniques.clone().for_each(|unique| kernel.send(&read_message(unique, unique * 7 % PAGES * PAGE, PAGE)));
            for _ in uniques {
                let (errno, unique, body) = kernel.reply();
                assert_eq!((errno, body), (0, vec![(unique * 7 % PAGES) as u8; PAGE as usize]), "{unique} with {name}");
                answered[unique as usize] += 1;
            }
        }
        assert!(answered.iter().all(|&times| times == 1), "with {name}");
        let totals = host.export.stats.totals();
        assert_eq!((totals.ops[Op::Read as usize].count, totals.ops[Op::Read as usize].bytes), (count, count * PAGE));
        end(&host, kernel);
        host.device.close();
        answering.join().unwrap();
    }
}

#[test]
fn large_transfers_through_the_queue_are_whole() {
    const LARGE: usize = 128 << 10;
    let contents: Vec<u8> = (0..LARGE).map(|at| (at / 7) as u8).collect();
    for direct in [false, true] {
        let (host, kernel, _handle) =
            connected(device(mapping(vec![(1 << 20, data(&file(1 << 20, direct), 0))], vec![])));
        for flags in [0, O_DSYNC] {
            let written = kernel.ask(&write_message(2, 65_536, &contents, flags)).unwrap();
            assert_eq!(u32_at(&written, 0) as usize, LARGE);
            assert!(kernel.read(65_536, LARGE as u64) == contents, "direct {direct}");
        }
        assert_eq!(kernel.write(5, &contents[..100]), Ok(100));
        assert_eq!(kernel.read(0, 200)[5..105], contents[..100]);
        end(&host, kernel);
    }
}

#[test]
fn a_file_ends_where_its_device_does() {
    const SIZE: u64 = 10 * PAGE;
    let (host, kernel, _handle) = connected(memory_device(SIZE));
    assert_eq!(kernel.read(SIZE - 10, PAGE), [7; 10]);
    assert_eq!((kernel.read(SIZE, PAGE), kernel.read(u64::MAX, PAGE)), (vec![], vec![]));
    assert_eq!(kernel.write(SIZE - 10, &[1; 100]), Ok(10), "what fits is written");
    assert_eq!((kernel.write(SIZE, &[1]), kernel.write(u64::MAX, &[1])), (Err(ENOSPC), Err(ENOSPC)));
    assert_eq!(kernel.write(SIZE, &[]), Ok(0));
    assert_eq!((kernel.seek(SIZE, SEEK_DATA), kernel.seek(u64::MAX, SEEK_HOLE)), (Err(ENXIO), Err(ENXIO)));
    end(&host, kernel);
}

#[test]
fn ranges_are_zeroed_and_nothing_is_reserved() {
    const SIZE: u64 = 10 * PAGE;
    for device in [memory_device(SIZE), device(mapping(vec![(SIZE, data(&file(SIZE, false), 0))], vec![]))] {
        let (host, kernel, _handle) = connected(device);
        for mode in [PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE] {
            assert_eq!(kernel.write(0, &[1; SIZE as usize]), Ok(SIZE as u32));
            assert_eq!(kernel.fallocate(100, 2 * PAGE, mode), Ok(()));
            let zeroed = kernel.read(0, 3 * PAGE);
            assert!(zeroed[..100].iter().chain(&zeroed[100 + 2 * PAGE as usize..]).all(|&byte| byte == 1));
            assert!(zeroed[100..100 + 2 * PAGE as usize].iter().all(|&byte| byte == 0));
        }
        assert_eq!(kernel.fallocate(SIZE - PAGE, 2 * PAGE, ZERO_RANGE), Err(ENOSPC), "the file would have to grow");
        assert_eq!(kernel.fallocate(SIZE - PAGE, 2 * PAGE, ZERO_RANGE | KEEP_SIZE), Ok(()));
        assert_eq!(kernel.read(SIZE - PAGE, PAGE), [0; PAGE as usize]);
        assert_eq!(kernel.fallocate(2 * SIZE, PAGE, PUNCH_HOLE | KEEP_SIZE), Ok(()), "behind the end there is nothing");
        for mode in [0, KEEP_SIZE, 8, 32, 64] {
            assert_eq!(kernel.fallocate(0, PAGE, mode), Err(EOPNOTSUPP), "{mode}");
        }
        end(&host, kernel);
    }
}

#[test]
fn data_and_holes_are_found() {
    const SIZE: u64 = 64 * PAGE;
    let whole = |extent| device(mapping(vec![(SIZE, extent)], vec![]));
    for device in [whole(memory(&region(SIZE), 0)), whole(data(&file(SIZE, false), 0))] {
        let (host, kernel, _handle) = connected(device);
        assert_eq!((kernel.seek(5, SEEK_DATA), kernel.seek(5, SEEK_HOLE)), (Err(ENXIO), Ok(5)));
        kernel.write(8 * PAGE, &[1; 2 * PAGE as usize]).unwrap();
        kernel.write(20 * PAGE, &[1; PAGE as usize]).unwrap();
        assert_eq!((kernel.seek(0, SEEK_DATA), kernel.seek(0, SEEK_HOLE)), (Ok(8 * PAGE), Ok(0)));
        assert_eq!((kernel.seek(9 * PAGE, SEEK_DATA), kernel.seek(9 * PAGE, SEEK_HOLE)), (Ok(9 * PAGE), Ok(10 * PAGE)));
        assert_eq!((kernel.seek(10 * PAGE, SEEK_DATA), kernel.seek(21 * PAGE, SEEK_DATA)), (Ok(20 * PAGE), Err(ENXIO)));
        kernel.write(SIZE - PAGE, &[1; PAGE as usize]).unwrap();
        assert_eq!(kernel.seek(SIZE - 1, SEEK_HOLE), Ok(SIZE), "there is a hole behind the end");
        end(&host, kernel);
    }
}

#[test]
fn a_search_goes_on_beyond_what_is_looked_at_at_once() {
    const HALF: u64 = 6 << 30;
    let parts = vec![(HALF, Extent::Zero { discard_writes: true }), (PAGE, memory(&region(PAGE), 0))];
    let (host, kernel, _handle) = connected(device(mapping(parts, vec![])));
    assert_eq!(kernel.seek(PAGE, SEEK_DATA), Err(ENXIO));
    kernel.write(HALF, &[1]).unwrap();
    assert_eq!(kernel.seek(PAGE, SEEK_DATA), Ok(HALF));
    end(&host, kernel);
}

#[test]
fn attributes_are_the_devices_and_the_owners() {
    const SIZE: u64 = 1 << 20;
    let (host, kernel, _handle) = connected(memory_device(SIZE));
    let attributes = |kernel: &Kernel| kernel.ask(&message(GETATTR, 2, &[0, 0], &[])).unwrap();
    // fuse_attr_out: mode at 76, user at 84, group at 88, size at 24, blocks at 32, time of modification at 48
    let first = attributes(&kernel);
    assert_eq!((u64_at(&first, 0), u32_at(&first, 8)), (0, 0), "the kernel is to ask each time");
    assert_eq!((u64_at(&first, 24), u32_at(&first, 76)), (SIZE, 0o100_640));
    assert_eq!((u32_at(&first, 84), u32_at(&first, 88)), (1000, 100));
    assert!((1..SIZE / 512).contains(&u64_at(&first, 32)), "programs look for holes in it, and read it");
    // SETATTR: valid bits, handle, size, owner, 3 times, nanoseconds, mode, user, group
    let set = |valid: u64, size: u64, mode: u64, user: u64| {
        message(SETATTR, 2, &[valid, 0, size, 0, 0, 5, 0, 0, mode << 32, user << 32, 0], &[])
    };
    for (size, result) in [(0, Err(EPERM)), (SIZE - 1, Err(EPERM)), (SIZE + 1, Err(EPERM)), (SIZE, Ok(()))] {
        assert_eq!(kernel.ask(&set(8, size, 0, 0)).map(drop), result, "{size}");
    }
    kernel.ask(&set(1 | 2 | 32, 0, 0o104_600, 42)).unwrap();
    let changed = attributes(&kernel);
    assert_eq!((u32_at(&changed, 76), u32_at(&changed, 84), u32_at(&changed, 88)), (0o100_600, 42, 100));
    assert_eq!(u64_at(&changed, 48), 5);
    kernel.write(0, &[1]).unwrap();
    assert!(u64_at(&attributes(&kernel), 48) > 5, "what is written modifies it");
    let system = kernel.ask(&message(STATFS, 2, &[], &[])).unwrap();
    assert_eq!((u64_at(&system, 0), u32_at(&system, 40)), (SIZE / PAGE, PAGE as u32));
    end(&host, kernel);
}

#[test]
fn owner_and_mode_are_those_of_the_process_before() {
    let host = Host::new(hosts::threads(), memory_device(1 << 20));
    let memory = memfd_create("record", MemfdFlags::CLOEXEC).unwrap();
    let file = || {
        let record = Record::new(memory.try_clone().unwrap());
        FuseFile::new(host.export.clone(), negotiated(u64::MAX), OWNER, Some(record))
    };
    let first = file().unwrap();
    let (kernel, _handle) = Kernel::new(&host, &first);
    kernel.ask(&message(SETATTR, 2, &[1 | 4, 0, 0, 0, 0, 0, 0, 0, 0o100_604 << 32, 0, 42], &[])).unwrap();
    let changed = Owner { user: 1000, group: 42, mode: 0o604 };
    assert_eq!((first.owner(), file().unwrap().owner()), (changed, changed));
    rustix::io::pwrite(&memory, b"?", 0).unwrap();
    assert!(matches!(file(), Err(RecordError::Unknown(bytes)) if bytes.len() == 16));
    end(&host, kernel);
}

#[test]
fn a_read_only_export_refuses_writers() {
    let mut host = Host::new(hosts::threads(), memory_device(1 << 20));
    host.export = Export::new(host.device.clone(), "test".into(), true);
    let (kernel, _handle) = Kernel::new(&host, &file_of(&host));
    for (flags, result) in [(0, Ok(())), (1, Err(EROFS)), (2, Err(EROFS))] {
        assert_eq!(kernel.ask(&message(OPEN, 2, &[flags], &[])).map(drop), result);
    }
    assert_eq!((kernel.write(0, &[1]), kernel.fallocate(0, PAGE, ZERO_RANGE)), (Err(EROFS), Err(EROFS)));
    assert_eq!(kernel.read(0, 3), [7; 3]);
    end(&host, kernel);
}

#[test]
fn what_a_file_does_not_need_is_answered_so_that_the_kernel_does_without() {
    let (host, kernel, _handle) = connected(memory_device(1 << 20));
    let opened = kernel.ask(&message(OPEN, 2, &[2], &[])).unwrap();
    assert_eq!(u32_at(&opened, 8), 0x41, "direct, and with parallel writes");
    assert_eq!(kernel.ask(&message(RELEASE, 2, &[1, 0, 0], &[])), Ok(vec![]));
    assert_eq!(kernel.ask(&message(FLUSH, 2, &[1, 0, 0], &[])), Err(ENOSYS), "the kernel sends no other");
    assert_eq!(kernel.ask(&message(FSYNC, 2, &[1, 1], &[])), Ok(vec![]));
    assert_eq!(
        kernel.ask(&message(GETXATTR, 2, &[0], b"user.name-that-is-longer-than-a-head-has-room-for\0")),
        Err(ENOSYS)
    );
    assert_eq!(kernel.ask(&message(INTERRUPT, 3, &[2], &[])), Err(ENOSYS));
    kernel.send(&message(FORGET, 2, &[1], &[]));
    assert_eq!(kernel.ask(&message(STATFS, 4, &[], &[])).map(drop), Ok(()), "a FORGET has no reply");
    end(&host, kernel);
}

#[test]
fn a_message_that_breaks_the_protocol_fails_alone_and_one_without_a_header_ends_the_connection() {
    let (host, kernel, _handle) = connected(memory_device(1 << 20));
    assert_eq!(kernel.ask(&message(READ, 2, &[1], &[])), Err(EPROTO));
    assert_eq!(kernel.ask(&message(WRITE, 4, &[1, 0, 99, 0, 0], b"not 99 bytes")), Err(EPROTO));
    assert_eq!(kernel.read(0, 1), [7]);
    kernel.send(b"what is this?");
    assert_eq!(host.closed(), "FUSE request 0: 13 bytes are no header, which has 40");
}

#[test]
fn a_durable_write_and_an_fsync_are_flushes_that_targets_see() {
    let host = Host::new(hosts::threads(), half_faults(4));
    let device = host.device.clone();
    let answering = std::thread::spawn(move || answer_faults(&device));
    let (kernel, _handle) = Kernel::new(&host, &file_of(&host));
    kernel.write(0, &[1; 10]).unwrap();
    kernel.ask(&write_message(2, 0, &[2; 10], O_DSYNC)).unwrap();
    kernel.ask(&message(FSYNC, 2, &[1, 0], &[])).unwrap();
    assert_eq!(kernel.ask(&message(FLUSH, 2, &[1, 0, 0], &[])), Err(ENOSYS));
    assert_eq!(kernel.read(0, 10), [2; 10]);
    end(&host, kernel);
    host.device.close();
    assert_eq!(answering.join().unwrap(), [Op::Flush, Op::Flush], "closing a file is none");
}

#[test]
fn storage_that_fails_is_an_error_of_the_request() {
    let (host, kernel, _handle) = connected(device(mapping(
        vec![(PAGE, Extent::Error(blkloom_io::Errno::NOSPC)), (PAGE, Extent::Error(blkloom_io::Errno::IO))],
        vec![],
    )));
    assert_eq!(kernel.ask(&read_message(2, 0, PAGE)), Err(ENOSPC));
    assert_eq!(kernel.write(PAGE, &[1; 10]), Err(EIO));
    host.device.close();
    assert_eq!((kernel.ask(&read_message(2, 0, PAGE)), kernel.write(0, &[1])), (Err(EIO), Err(EIO)), "it has closed");
    end(&host, kernel);
}

#[test]
fn init_is_answered_before_anything_is_served() {
    let (kernel, served) = Kernel::pair();
    let init = |major: u64, minor: u64| {
        message(INIT, 2, &[major | minor << 32, 131_072 | 0x73ff_fffb << 32, 0x5fd, 0, 0, 0, 0, 0], &[])
    };
    kernel.send(&init(8, 1));
    kernel.send(&init(7, 45));
    let negotiated = answer_init(&served, &SETTINGS, PATIENT).unwrap();
    let (errno, unique, body) = kernel.reply();
    assert_eq!((errno, unique, u32_at(&body, 0)), (0, 2, 7), "of a later protocol: its version is all that counts");
    let (errno, unique, body) = kernel.reply();
    assert_eq!((errno, unique), (0, 2));
    assert_eq!(Negotiated::from_bytes(&body), Ok(negotiated));
    assert!(negotiated.has(capability::HAS_RESEND));
}

#[test]
fn a_connection_that_does_not_begin_with_init_is_refused() {
    let (kernel, served) = Kernel::pair();
    let wait = |timeout| answer_init(&served, &SETTINGS, timeout);
    assert!(matches!(wait(Duration::ZERO), Err(InitError::Timeout(_))));
    kernel.send(&read_message(2, 0, 1));
    assert!(matches!(wait(PATIENT), Err(InitError::NotInit(READ))));
    kernel.send(b"what is this?");
    assert!(matches!(wait(PATIENT), Err(InitError::Malformed(_))));
    kernel.send(&message(INIT, 2, &[7 | 12 << 32, 0], &[]));
    assert!(matches!(wait(PATIENT), Err(InitError::Incompatible(_))));
    assert_eq!(kernel.reply().0, EPROTO, "the mount fails");
}

/// Two requests that wait at a closed gate, and one that does not pass that gate.
fn at_a_gate(host: &Host, kernel: &Kernel) -> [Vec<u8>; 2] {
    host.engine.suspend(&host.device, true, None).unwrap();
    let waiting = [write_message(2, PAGE, &[1; 100], 0), read_message(4, PAGE, 3)];
    waiting.iter().for_each(|message| kernel.send(message));
    host.until_in_flight(2);
    assert_eq!(kernel.ask(&message(GETATTR, 6, &[0, 0], &[])).map(drop), Ok(()));
    waiting
}

#[test]
fn what_waits_at_a_gate_is_left_to_the_kernel_which_sends_it_again() {
    let host = Host::new(hosts::threads(), memory_device(1 << 20));
    let (kernel, handle) = Kernel::new(&host, &file_of(&host));
    let waiting = at_a_gate(&host, &kernel);
    handle.detach(false);
    let Outcome::Detached(left) = host.end() else { panic!("it was to leave") };
    let Detached { fd, unserved } = *left.downcast().unwrap();
    assert_eq!(unserved, [], "RESEND brings it");
    assert_eq!((host.device.stats().totals().in_flight, host.export.stats.totals().in_flight), (0, 0));
    fuse::resend(&fd).unwrap();
    let mut notification = [0; 16];
    recv(&kernel.0, &mut notification[..], RecvFlags::empty()).unwrap();
    assert_eq!((u32_at(&notification, 4), u64_at(&notification, 8)), (7, 0));
    host.device.resume();
    let _handle = serve(&host, &file_of(&host), fd, Vec::new());
    waiting.iter().for_each(|message| kernel.send(message));
    assert_eq!(kernel.reply(), (0, 2, 100u64.to_ne_bytes().to_vec()));
    assert_eq!(kernel.reply(), (0, 4, vec![1; 3]));
    end(&host, kernel);
}

#[test]
fn a_kernel_that_does_not_send_again_has_what_waits_handed_over_in_order() {
    let host = Host::new(hosts::threads(), memory_device(1 << 20));
    let negotiated = negotiated(!capability::HAS_RESEND);
    let file = FuseFile::new(host.export.clone(), negotiated, OWNER, None).unwrap();
    let (kernel, handle) = Kernel::new(&host, &file);
    let waiting = at_a_gate(&host, &kernel);
    handle.detach(false);
    let Outcome::Detached(left) = host.end() else { panic!("it was to leave") };
    let Detached { fd, unserved } = *left.downcast().unwrap();
    assert!(unserved == waiting.concat());
    assert_eq!((host.device.stats().totals().in_flight, host.export.stats.totals().in_flight), (0, 0));
    host.device.resume();
    let _handle = serve(&host, &file, fd, unserved);
    assert_eq!(kernel.reply(), (0, 2, 100u64.to_ne_bytes().to_vec()));
    assert_eq!(kernel.reply(), (0, 4, vec![1; 3]));
    end(&host, kernel);
}

#[test]
fn what_waits_fails_where_it_was_unmounted() {
    let host = Host::new(hosts::threads(), memory_device(1 << 20));
    let (kernel, _handle) = Kernel::new(&host, &file_of(&host));
    at_a_gate(&host, &kernel);
    drop(kernel);
    assert_eq!(host.closed(), "unmounted");
    assert_eq!((host.device.stats().totals().in_flight, host.export.stats.totals().in_flight), (0, 0));
    host.device.resume();
}

#[test]
fn a_connection_that_is_closed_answers_what_was_begun() {
    let host = Host::new(hosts::threads(), memory_device(1 << 20));
    let (kernel, handle) = Kernel::new(&host, &file_of(&host));
    at_a_gate(&host, &kernel);
    handle.close();
    host.device.resume();
    assert_eq!(kernel.reply(), (0, 2, 100u64.to_ne_bytes().to_vec()));
    assert_eq!(kernel.reply(), (0, 4, vec![1; 3]));
    assert_eq!(host.closed(), "closed by the server");
}

#[test]
fn requests_wait_for_memory_in_order_and_each_is_served() {
    // Room for one of the copies at a time that a target may need.
    let engine = hosts::threads().with_memory(512 << 10);
    let host = Host::new(engine, device(mapping(vec![(1 << 20, Extent::Fault)], vec![])));
    host.device.attach_mapper();
    let device = host.device.clone();
    let answering = std::thread::spawn(move || answer_faults(&device));
    let (kernel, _handle) = Kernel::new(&host, &file_of(&host));
    const LARGE: usize = 100 << 10;
    let count = 40;
    let answers = std::thread::scope(|scope| {
        scope.spawn(|| {
            for unique in 0..count {
                kernel.send(&write_message(unique, unique % 8 * LARGE as u64, &[unique as u8; LARGE], 0));
            }
        });
        (0..count).map(|_| kernel.reply()).collect::<Vec<_>>()
    });
    let mut uniques: Vec<u64> =
        answers.iter().map(|(errno, unique, _)| (*errno == 0).then_some(*unique).unwrap()).collect();
    uniques.sort_unstable();
    assert_eq!(uniques, (0..count).collect::<Vec<_>>());
    assert_eq!(host.engine.memory_use().waiting, 0);
    end(&host, kernel);
    assert_eq!(host.engine.memory_use().reserved, 0);
    host.device.close();
    assert_eq!(answering.join().unwrap(), [Op::Write; 40]);
}

#[test]
fn two_descriptors_of_a_connection_answer_what_they_have_read() {
    let host = Host::new(hosts::threads(), memory_device(1 << 20));
    let file = file_of(&host);
    let (first, _one) = Kernel::new(&host, &file);
    let (second, _two) = Kernel::new(&host, &file);
    assert_eq!(host.export.transports(), BTreeMap::from([("fuse", 2)]));
    first.write(0, &[1; 10]).unwrap();
    assert_eq!(second.read(0, 10), [1; 10]);
    drop(first);
    assert!(matches!(host.next_end(), Outcome::Closed { reason } if reason == "unmounted"));
    end(&host, second);
}
