//! `Ring`: each operation transfers its bytes and completes once. Where io_uring is forbidden, the tests print a
//! message and pass.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use blkloom_io::{Buffer, Completion, Errno, File, Ring, Slice};

fn ring(entries: u32) -> Option<Ring> {
    match Ring::new(entries) {
        Ok(ring) => Some(ring),
        Err(error) => {
            eprintln!("SKIPPED: io_uring: {error}");
            None
        }
    }
}

fn file(name: &str, size: u64) -> Arc<File> {
    let path = std::env::temp_dir().join(format!("blkloom-ring-{}-{name}", std::process::id()));
    let file = std::fs::File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    file.set_len(size).unwrap();
    Arc::new(File::new(file.into(), true, false, name.into()).unwrap())
}

fn reap(ring: &mut Ring, count: usize) -> Vec<Completion> {
    let mut all = Vec::new();
    while all.len() < count {
        ring.submit().unwrap();
        let fd = ring.fd();
        let mut polled = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut polled, None).unwrap();
        ring.reap(&mut all);
    }
    all
}

#[test]
fn what_was_written_is_read_back_under_the_keys_that_were_given() {
    let Some(mut ring) = ring(8) else { return };
    const COUNT: usize = 24; // more than the ring has entries
    let file = file("keys", 1 << 20);
    let mut buffers: Vec<Buffer> = (0..COUNT).map(|_| Buffer::new(5000)).collect();
    for (i, buffer) in buffers.iter_mut().enumerate() {
        buffer.bytes_mut().fill(i as u8 + 1);
        // SAFETY: the buffer is not touched until all were reaped.
        let memory = unsafe { Slice::new(buffer.as_ptr(), buffer.len()) };
        ring.write(&file, i as u64 * 5000, memory.source(), i % 2 == 0, 1000 + i as u64).unwrap();
    }
    assert!(!ring.is_idle());
    let check = |mut all: Vec<Completion>, first: u64| {
        all.sort_by_key(|completion| completion.key);
        let found: Vec<(u64, Result<u64, Errno>)> =
            all.iter().map(|completion| (completion.key, completion.result)).collect();
        assert_eq!(found, (first..first + COUNT as u64).map(|key| (key, Ok(5000))).collect::<Vec<_>>());
    };
    check(reap(&mut ring, COUNT), 1000);
    assert!(ring.is_idle() && !ring.is_unsubmitted());
    for (i, buffer) in buffers.iter_mut().enumerate() {
        buffer.bytes_mut().fill(0);
        // SAFETY: as above.
        ring.read(&file, i as u64 * 5000, unsafe { Slice::new(buffer.as_ptr(), buffer.len()) }, 2000 + i as u64)
            .unwrap();
    }
    check(reap(&mut ring, COUNT), 2000);
    for (i, buffer) in buffers.iter().enumerate() {
        assert!(buffer.bytes().iter().all(|&byte| byte == i as u8 + 1));
    }
}

#[test]
fn a_read_past_the_end_comes_back_short() {
    let Some(mut ring) = ring(8) else { return };
    let file = file("short", 100);
    let buffer = Buffer::new(4096);
    for (offset, moved) in [(0, 100), (60, 40), (100, 0), (1 << 40, 0)] {
        // SAFETY: the buffer is not touched until the read was reaped.
        ring.read(&file, offset, unsafe { Slice::new(buffer.as_ptr(), buffer.len()) }, 7).unwrap();
        assert_eq!(reap(&mut ring, 1)[0].result, Ok(moved));
    }
}

#[test]
fn a_full_ring_says_so_and_a_file_stays_open_until_its_completion() {
    let Some(mut ring) = ring(2) else { return };
    let file = file("full", 1 << 20);
    let (buffer, mut count) = (Buffer::new(512), 0);
    while !ring.is_full() {
        // SAFETY: the buffer is only read into, by all, and not looked at.
        ring.read(&file, count * 512, unsafe { Slice::new(buffer.as_ptr(), buffer.len()) }, count).unwrap();
        count += 1;
    }
    assert!(count >= 8, "completions may wait in four times the entries: {count}");
    drop(file);
    let all = reap(&mut ring, count as usize);
    assert!(all.iter().all(|completion| completion.result == Ok(512)));
    assert!(ring.is_idle() && !ring.is_full());
}

/// The number of its descriptor names something else from now on.
fn lose(ring: &Ring) {
    let null = std::fs::File::open("/dev/null").unwrap();
    // SAFETY: nothing is closed here: the number stays open, and stays the ring's.
    let mut number = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(ring.fd().as_raw_fd()) });
    rustix::io::dup2(&null, &mut number).unwrap();
}

#[test]
fn operations_that_the_kernel_does_not_accept_are_returned_in_order() {
    let Some(mut ring) = ring(8) else { return };
    let (file, buffer) = (file("lost", 4096), Buffer::new(512));
    // SAFETY: the buffer is only read into, by all, and not looked at.
    let memory = || unsafe { Slice::new(buffer.as_ptr(), buffer.len()) };
    ring.read(&file, 0, memory(), 1).unwrap();
    ring.submit().unwrap();
    lose(&ring);
    for key in [5, 3, 4] {
        ring.read(&file, 512, memory(), key).unwrap();
    }
    assert!(ring.is_unsubmitted());
    assert!(ring.submit().is_err());
    assert_eq!(ring.take_back(), [5, 3, 4]);
    assert!(!ring.is_unsubmitted());
    assert!(ring.read(&file, 512, memory(), 6).is_err(), "it takes nothing any more");
    let mut all = Vec::new();
    while all.is_empty() {
        ring.reap(&mut all);
    }
    assert_eq!(all.iter().map(|completion| (completion.key, completion.result)).collect::<Vec<_>>(), [(1, Ok(512))]);
    assert!(ring.is_idle());
}

#[test]
fn a_registered_buffer_is_moved_by_its_own_ring_until_it_is_unregistered() {
    let (Some(mut ring), Some(mut other)) = (ring(8), ring(8)) else { return };
    let file = file("registered", 8192);
    let mut buffer = Buffer::new(8192);
    buffer.bytes_mut()[..4096].fill(7);
    // SAFETY: the buffer is looked at only when all were reaped.
    let memory = unsafe { Slice::new(buffer.as_ptr(), buffer.len()) };
    let (first, registered) = (ring.register(memory).unwrap(), ring.register(memory).unwrap());
    ring.unregister(first).unwrap();
    assert_eq!(registered.part(4096, 100).len(), 100);
    ring.write_registered(&file, 4000, registered.part(0, 4096), 1).unwrap();
    assert_eq!(reap(&mut ring, 1)[0].result, Ok(4096));
    ring.read_registered(&file, 3999, registered.part(4096, 4096), 2).unwrap();
    assert_eq!(reap(&mut ring, 1)[0].result, Ok(4096));
    assert!(buffer.bytes()[4096] == 0 && buffer.bytes()[4097..] == [7; 4095]);
    // Another ring's slot of that number may be another's memory.
    let refused = other.read_registered(&file, 0, registered, 3).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::InvalidInput);
    assert!(other.unregister(registered).is_err());
    for gone in [first, registered] {
        ring.unregister(gone).unwrap();
        ring.read_registered(&file, 0, gone, 4).unwrap();
        assert_eq!(reap(&mut ring, 1)[0].result, Err(Errno::FAULT));
    }
}

#[test]
fn no_more_buffers_are_registered_than_a_table_has() {
    let Some(mut ring) = ring(8) else { return };
    let buffer = Buffer::new(4096);
    // SAFETY: there is no I/O on it.
    let memory = unsafe { Slice::new(buffer.as_ptr(), buffer.len()) };
    let all: Vec<_> = std::iter::from_fn(|| ring.register(memory).ok()).collect();
    assert_eq!(all.len(), 1024);
    ring.unregister(all[5]).unwrap();
    assert!(ring.register(memory).is_ok() && ring.register(memory).is_err());
}
