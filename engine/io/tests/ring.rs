//! The ring moves what it is given and says so once. Where io_uring is forbidden, the tests say so
//! and pass.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::sync::Arc;

use blkloom_io::{Buffer, Completion, File, Ring};

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
        let memory = unsafe { buffer.slice() };
        ring.write(&file, i as u64 * 5000, memory, i % 2 == 0, 1000 + i as u64).unwrap();
    }
    assert!(!ring.is_idle());
    let check = |mut all: Vec<Completion>, first: u64| {
        all.sort_by_key(|completion| completion.key);
        let found: Vec<(u64, i32)> = all.iter().map(|completion| (completion.key, completion.result)).collect();
        assert_eq!(found, (first..first + COUNT as u64).map(|key| (key, 5000)).collect::<Vec<_>>());
    };
    check(reap(&mut ring, COUNT), 1000);
    assert!(ring.is_idle() && !ring.is_unsubmitted());
    for (i, buffer) in buffers.iter_mut().enumerate() {
        buffer.bytes_mut().fill(0);
        // SAFETY: as above.
        ring.read(&file, i as u64 * 5000, unsafe { buffer.slice() }, 2000 + i as u64).unwrap();
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
        ring.read(&file, offset, unsafe { buffer.slice() }, 7).unwrap();
        assert_eq!(reap(&mut ring, 1)[0].result, moved);
    }
}

#[test]
fn a_full_ring_says_so_and_a_file_stays_open_until_its_completion() {
    let Some(mut ring) = ring(2) else { return };
    let file = file("full", 1 << 20);
    let (buffer, mut count) = (Buffer::new(512), 0);
    while !ring.is_full() {
        // SAFETY: the buffer is only read into, by all, and not looked at.
        ring.read(&file, count * 512, unsafe { buffer.slice() }, count).unwrap();
        count += 1;
    }
    assert!(count >= 8, "completions may wait in four times the entries: {count}");
    drop(file);
    let all = reap(&mut ring, count as usize);
    assert!(all.iter().all(|completion| completion.result == 512));
    assert!(ring.is_idle() && !ring.is_full());
}
