//! The event of a fault queue: it is readable exactly while `next_faults` would not wait.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use std::os::fd::BorrowedFd;
use std::time::Duration;

use blkloom_core::{Answer, Device, Memory, Op};
use blkloom_io::Buffer;
use blkloom_map::Extent;
use rig::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

const SIZE: u64 = 4096;

fn is_readable(event: BorrowedFd<'_>, wait: Duration) -> bool {
    let wait = Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: 0 };
    poll(&mut [PollFd::new(&event, PollFlags::IN)], Some(&wait)).unwrap() > 0
}

#[test]
fn it_tells_of_faults_of_a_wake_and_of_the_end() {
    let device = Device::new("faulty".into(), Some(mapping(vec![(SIZE, Extent::Fault)], vec![])), PATIENT).unwrap();
    device.attach_mapper();
    for (name, engine) in engines() {
        let read = || by_queue(&engine, &device, Op::Read, 0, Memory::owned(Buffer::new(512)), 512, false);
        let event = device.fault_event().unwrap();
        assert!(!is_readable(event, Duration::ZERO), "{name}");
        for round in 0..3 {
            std::thread::scope(|scope| {
                let ended = scope.spawn(read);
                assert!(is_readable(event, PATIENT), "{name} {round}");
                for mut fault in device.next_faults(Some(Duration::ZERO)).unwrap() {
                    fault.answer(Answer::Done(Some(vec![7; 512])));
                }
                assert!(!is_readable(event, Duration::ZERO), "{name} {round}");
                assert_eq!(ended.join().unwrap(), Ok(()));
            });
        }
        device.wake_mapper();
        device.wake_mapper();
        assert!(is_readable(event, Duration::ZERO), "{name}");
        assert!(device.next_faults(Some(Duration::ZERO)).unwrap().is_empty());
        assert!(!is_readable(event, Duration::ZERO), "{name}: a wake is told once");
    }
    device.close();
    let event = device.fault_event().unwrap();
    assert!(is_readable(event, Duration::ZERO));
    // The gate has closed, which is told first.
    assert!(device.next_faults(Some(Duration::ZERO)).unwrap().is_empty());
    for _ in 0..2 {
        assert!(is_readable(event, Duration::ZERO), "the end is told again and again");
        assert!(device.next_faults(Some(Duration::ZERO)).is_none());
    }
}

#[test]
fn one_that_is_made_late_knows_what_came_before_it() {
    let device = Device::new("faulty".into(), None, PATIENT).unwrap();
    device.wake_mapper();
    assert!(is_readable(device.fault_event().unwrap(), Duration::ZERO));
}
