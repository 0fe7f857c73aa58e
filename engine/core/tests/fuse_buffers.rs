//! A FUSE file whose buffers are all in use: what is sent meanwhile waits, and is served when requests have ended.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use blkloom_core::{Answer, Device, Op};
use blkloom_map::Extent;
use rig::fuse_kernel::*;
use rig::hosts::{self, Host};
use rig::{device, mapping};

const SIZE: u64 = 2 << 20;
const LONGEST: usize = 128 << 10;

/// Answers the faults of a device when there are `together` of them, or at once after `all` were seen. Returns how many
/// waited at most.
fn answer_together(device: &Device, together: usize, all: usize) -> usize {
    let (mut waiting, mut seen, mut most) = (Vec::new(), 0, 0);
    while let Some(faults) = device.next_faults(None) {
        seen += faults.len();
        waiting.extend(faults);
        most = most.max(waiting.len());
        if waiting.len() >= together || seen >= all {
            waiting.drain(..).for_each(|mut fault| {
                assert_eq!(fault.op, Op::Write);
                assert!(fault.payload().iter().all(|byte| *byte == fault.payload()[0]));
                fault.answer(Answer::Done(None));
            });
        }
    }
    most
}

#[test]
fn requests_for_which_there_is_no_memory_wait_until_others_have_ended() {
    // With `SETTINGS` there are 9 buffers of the largest size.
    const BUFFERS: usize = 9;
    const REQUESTS: u64 = 60;
    let host = Host::new(hosts::threads(), device(mapping(vec![(SIZE, Extent::Fault)], vec![])));
    host.device.attach_mapper();
    let device = host.device.clone();
    let answering = std::thread::spawn(move || answer_together(&device, BUFFERS, REQUESTS as usize));
    let (kernel, _handle) = Kernel::new(&host, &file_of(&host));
    let mut uniques = std::thread::scope(|scope| {
        scope.spawn(|| {
            for unique in 0..REQUESTS {
                kernel.send(&write_message(unique, 0, &[unique as u8; LONGEST], 0));
            }
            kernel.send(&message(GETATTR, REQUESTS, &[0, 0], &[]));
        });
        let replies = (0..=REQUESTS).map(|_| kernel.reply());
        replies.map(|(errno, unique, _)| (errno == 0).then_some(unique).unwrap()).collect::<Vec<_>>()
    });
    uniques.sort_unstable();
    assert_eq!(uniques, (0..=REQUESTS).collect::<Vec<_>>());
    end(&host, kernel);
    host.device.close();
    assert_eq!(answering.join().unwrap(), BUFFERS, "most requests at a time");
}

#[test]
fn small_requests_use_larger_buffers_when_theirs_are_taken() {
    // 32, 16, 16 and 9 buffers.
    const ALL: usize = 73;
    let host = Host::new(hosts::threads(), device(mapping(vec![(SIZE, Extent::Fault)], vec![])));
    host.device.attach_mapper();
    let device = host.device.clone();
    let answering = std::thread::spawn(move || answer_together(&device, ALL, ALL));
    let (kernel, _handle) = Kernel::new(&host, &file_of(&host));
    let writes: Vec<_> = (0..ALL as u64).map(|unique| write_message(unique, 0, &[unique as u8; 100], 0)).collect();
    std::thread::scope(|scope| {
        scope.spawn(|| writes.iter().for_each(|message| kernel.send(message)));
        (0..ALL).for_each(|_| assert_eq!(kernel.reply().0, 0));
    });
    end(&host, kernel);
    host.device.close();
    assert_eq!(answering.join().unwrap(), ALL);
}

#[test]
fn a_file_that_is_unmounted_while_all_memory_is_in_use_has_ended() {
    let host = Host::new(hosts::threads(), hosts::memory_device(SIZE));
    let (kernel, _handle) = Kernel::new(&host, &file_of(&host));
    host.engine.suspend(&host.device, true, None).unwrap();
    (0..9).for_each(|unique| kernel.send(&write_message(unique, 0, &[1; LONGEST], 0)));
    host.until_in_flight(9);
    kernel.send(&message(GETATTR, 6, &[0, 0], &[]));
    drop(kernel);
    host.device.resume();
    assert_eq!(host.closed(), "unmounted");
}
