//! Entries of a `CommandRing`: whose they are, and that commands come back. A file takes no commands, and says so; what a
//! driver does with them is tested with the kernel's FUSE, from Python.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};

use blkloom_io::{Arrival, CommandRing, Errno};
use rustix::fs::{MemfdFlags, memfd_create};

const ENTRIES: usize = 3;

/// None: the kernel has no rings for this process.
fn ring() -> Option<(CommandRing, OwnedFd)> {
    let file = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
    match CommandRing::new(&file, ENTRIES, 288, 5000) {
        Ok(ring) => Some((ring, file)),
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            eprintln!("skipped: io_uring is not permitted ({error})");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn arrivals(ring: &mut CommandRing, count: usize) -> Vec<Arrival> {
    let mut arrived = Vec::new();
    while arrived.len() < count {
        let fd = rustix::event::PollFd::from_borrowed_fd(ring.fd(), rustix::event::PollFlags::IN);
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut [fd.clone()], None)).unwrap();
        ring.reap(|arrival| arrived.push(arrival));
    }
    arrived
}

#[test]
fn an_entry_is_the_drivers_until_its_command_has_completed() {
    let Some((mut ring, _file)) = ring() else { return };
    ring.payload_mut(1)[..5].copy_from_slice(b"hello");
    ring.head_mut(1)[0] = 7;
    ring.register(1, 1, &[0; 24]).unwrap();
    assert_eq!(ring.outstanding(), 1);
    assert!(catch_unwind(AssertUnwindSafe(|| ring.payload(1)[0])).is_err(), "it is not this program's");
    assert!(catch_unwind(AssertUnwindSafe(|| ring.head(1)[0])).is_err());
    assert!(ring.is_unsubmitted());
    ring.submit().unwrap();
    assert!(!ring.is_unsubmitted());
    assert_eq!(arrivals(&mut ring, 1), [Arrival::Completed(1, Err(Errno::OPNOTSUPP))]);
    assert_eq!((ring.outstanding(), &ring.payload(1)[..5], ring.head(1)[0]), (0, &b"hello"[..], 7));
}

#[test]
fn entries_have_memory_of_their_own() {
    let Some((mut ring, _file)) = ring() else { return };
    for entry in 0..ENTRIES {
        ring.head_mut(entry).fill(entry as u8 + 1);
        ring.payload_mut(entry).fill(entry as u8 + 101);
    }
    for entry in 0..ENTRIES {
        assert!(ring.head(entry).len() >= 288 && ring.payload(entry).len() >= 5000);
        assert!(ring.head(entry).iter().all(|&byte| byte == entry as u8 + 1));
        assert!(ring.payload(entry).iter().all(|&byte| byte == entry as u8 + 101));
        assert_eq!(ring.payload(entry).as_ptr() as usize % 4096, 0, "aligned for direct I/O");
    }
}

#[test]
fn a_readable_descriptor_is_told_of() {
    let Some((mut ring, _file)) = ring() else { return };
    ring.watch().unwrap();
    ring.submit().unwrap();
    assert_eq!(arrivals(&mut ring, 1), [Arrival::Readable]);
}

#[test]
fn a_ring_may_go_with_commands_outstanding() {
    let Some((mut ring, _file)) = ring() else { return };
    ring.register(0, 1, &[0; 24]).unwrap();
    drop(ring);
}
