//! The vhost-user transport with a driver in shared memory: requests, suspend, hand-over, death, and hostile drivers.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use std::sync::Arc;

use blkloom_core::vhost_user::Detached;
use blkloom_core::{Answer, Export, Op, Outcome};
use blkloom_map::Extent;
use rig::hosts::Host;
use rig::virtio_driver::*;
use rig::{Random, data, device, engines, file, mapping, memory, region};

const SECTORS: u64 = 1024;
const BYTES: u64 = SECTORS * 512;
const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// Memory, then a file of the same size.
fn half_a_file() -> Arc<blkloom_core::Device> {
    let half = BYTES / 2;
    device(mapping(vec![(half, memory(&region(half), 0)), (half, data(&file(half, false), 0))], vec![]))
}

fn next(end: Outcome) -> u16 {
    match end {
        Outcome::Detached(left) => {
            let Detached { next, failure } = *left.downcast().unwrap();
            assert_eq!(failure, None);
            next
        }
        _ => panic!("a queue ends"),
    }
}

/// Why a queue has ended, and the index of its next request.
fn failed(end: Outcome) -> (String, u16) {
    match end {
        Outcome::Detached(left) => {
            let Detached { next, failure } = *left.downcast().unwrap();
            (failure.expect("it was not detached"), next)
        }
        _ => panic!("a queue ends"),
    }
}

#[test]
fn requests_of_every_kind_are_served_with_every_feature() {
    for (name, engine) in engines() {
        let host = Host::new(engine, half_a_file());
        for (event_idx, indirect) in [(false, false), (true, false), (false, true), (true, true)] {
            let mut driver = Driver::new(event_idx, indirect);
            let handle = driver.serve(&host);
            for sector in [0, 500, SECTORS / 2 - 4, SECTORS - 8] {
                let bytes: Vec<u8> = (0..4096u32).map(|at| (at / 7) as u8 ^ sector as u8).collect();
                assert_eq!(driver.execute(WRITE, sector, &bytes), (OK, vec![]), "{name}");
                assert_eq!(driver.execute(FLUSH, 0, &[]), (OK, vec![]));
                assert_eq!(driver.execute(READ, sector, &bytes), (OK, bytes));
            }
            let segment = |sector: u64, sectors: u32, flags: u32| {
                [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
            };
            let two = [segment(0, 2, 0), segment(SECTORS - 8, 1, 0)].concat();
            assert_eq!(driver.execute(DISCARD, 0, &two), (OK, vec![]));
            assert_eq!(driver.execute(READ, SECTORS - 8, &[1; 512]), (OK, vec![0; 512]));
            assert_eq!(driver.execute(WRITE_ZEROES, 0, &segment(500, 8, 1)), (OK, vec![]));
            assert_eq!(driver.execute(READ, 500, &[1; 4096]), (OK, vec![0; 4096]));
            assert_eq!(driver.execute(IDENTIFY, 0, &[1; 20]), (OK, b"serial\0\0\0\0\0\0\0\0\0\0\0\0\0\0".to_vec()));
            handle.detach(true);
            next(host.next_end());
        }
    }
}

#[test]
fn requests_that_are_not_for_this_device_get_an_error() {
    let host = Host::new(engines().remove(0).1, half_a_file());
    let mut driver = Driver::new(true, true);
    let _handle = driver.serve(&host);
    let segment = |sector: u64, sectors: u32, flags: u32| {
        [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
    };
    for (kind, sector, bytes, status) in [
        (READ, SECTORS, vec![0; 512], IO_ERROR),
        (READ, SECTORS - 1, vec![0; 1024], IO_ERROR),
        (READ, u64::MAX, vec![0; 512], IO_ERROR),
        (READ, u64::MAX / 512, vec![0; 512], IO_ERROR),
        (WRITE, 0, vec![0; 513], IO_ERROR),
        (WRITE, 0, vec![0; 0], OK),
        (DISCARD, 0, segment(SECTORS, 1, 0), IO_ERROR),
        (DISCARD, 0, segment(0, 1, 1), UNSUPPORTED),
        (WRITE_ZEROES, 0, segment(0, 1, 2), UNSUPPORTED),
        (WRITE_ZEROES, 0, vec![0; 15], IO_ERROR),
        (WRITE_ZEROES, 0, vec![], IO_ERROR),
        (WRITE_ZEROES, 0, segment(0, 1, 0).repeat(33), IO_ERROR),
        (3, 0, vec![], UNSUPPORTED),
        (0x8000_0000, 0, vec![], UNSUPPORTED),
    ] {
        assert_eq!(driver.execute(kind, sector, &bytes).0, status, "request {kind} at {sector}");
    }
    let read_only = Host { export: Export::new(host.device.clone(), "ro".into(), true), ..host };
    let mut driver = Driver::new(true, true);
    let _handle = driver.serve(&read_only);
    assert_eq!(driver.execute(WRITE, 0, &[0; 512]).0, IO_ERROR);
    assert_eq!(driver.execute(DISCARD, 0, &segment(0, 1, 0)).0, IO_ERROR);
    assert_eq!(driver.execute(READ, 0, &[0; 512]).0, OK);
}

#[test]
fn many_requests_at_once_are_answered_once_each() {
    for event_idx in [false, true] {
        for (name, engine) in engines() {
            let host = Host::new(engine, half_a_file());
            let mut driver = Driver::new(event_idx, true);
            let _handle = driver.serve(&host);
            let mut random = Random::new(7);
            let mut model = vec![0u8; BYTES as usize];
            // Each slot has sectors of its own, so that requests in flight have an order.
            let mut expected = std::collections::BTreeMap::new();
            for round in 0..400u32 {
                let count = 1 + random.below(12) as u16;
                for _ in 0..count {
                    let sector = u64::from(round % 2) * SECTORS / 2 + random.below(SECTORS / 2 - 8);
                    let clash =
                        expected.values().any(|&(_, other, _): &(u32, u64, Vec<u8>)| sector.abs_diff(other) < 8);
                    let kind = if random.one_in(2) { READ } else { WRITE };
                    if clash {
                        continue;
                    }
                    let at = sector as usize * 512;
                    let bytes =
                        if kind == WRITE { vec![random.next() as u8; 4096] } else { model[at..at + 4096].to_vec() };
                    if kind == WRITE {
                        model[at..at + 4096].copy_from_slice(&bytes);
                    }
                    let slot = driver.submit(kind, sector, &bytes);
                    expected.insert(slot, (kind, sector, bytes));
                }
                driver.notify(count);
                while !expected.is_empty() {
                    for (slot, status, _) in driver.wait(1) {
                        let (kind, _, bytes) = expected.remove(&slot).expect("answered once");
                        assert_eq!(status, OK, "{name}");
                        if kind == READ {
                            assert!(driver.get(Driver::data_at(slot), 4096) == bytes, "{name}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_driver_need_not_kick_a_queue_that_is_polled() {
    use blkloom_core::{Engine, IoChoice};
    let engine = Engine::new(1, IoChoice::Threads, std::time::Duration::from_secs(3600), 1).unwrap();
    let host = Host::new(engine, half_a_file());
    for event_idx in [false, true] {
        let mut driver = Driver::new(event_idx, true);
        let handle = driver.serve(&host);
        driver.execute(FLUSH, 0, &[]);
        let kicks = driver.kicks;
        for _ in 0..100 {
            driver.execute(READ, 0, &[0; 512]);
        }
        assert_eq!(driver.kicks, kicks);
        handle.detach(true);
        next(host.next_end());
    }
}

#[test]
fn requests_of_a_suspended_device_wait_and_another_engine_serves_them() {
    for (name, engine) in engines() {
        let host = Host::new(engine, half_a_file());
        let mut driver = Driver::new(true, true);
        let handle = driver.serve(&host);
        assert_eq!(driver.execute(WRITE, 0, &[1; 512]).0, OK);
        host.device.suspend(None, || Ok(())).unwrap();
        for sector in [0, 8, 1000] {
            driver.submit(WRITE, sector, &[5; 1024]);
        }
        driver.notify(3);
        handle.detach(false);
        // Detached while the requests wait: they are not answered.
        let at = next(host.next_end());
        assert_eq!(driver.taken(), []);
        let other = Host::new(engines().remove(0).1, host.device.clone());
        // The former may or may not have taken them from the available ring.
        let settings = blkloom_core::vhost_user::QueueSettings { next: at, ..driver.settings() };
        let _handle = driver.try_serve(&other, settings).unwrap();
        host.device.resume();
        let answers = driver.wait(3);
        assert!(answers.len() == 3 && answers.iter().all(|answer| answer.1 == OK), "{name}: {answers:?}");
        assert_eq!(driver.execute(READ, 1000, &[0; 1024]), (OK, vec![5; 1024]));
    }
}

#[test]
fn a_queue_that_is_drained_serves_what_it_has_taken() {
    let half = BYTES / 2;
    let faulty = device(mapping(vec![(half, memory(&region(half), 0)), (half, Extent::Fault)], vec![1]));
    faulty.attach_mapper();
    let host = Host::new(engines().remove(0).1, faulty);
    let mut driver = Driver::new(true, true);
    let handle = driver.serve(&host);
    driver.submit(WRITE, SECTORS / 2, &[3; 512]);
    driver.notify(1);
    let mut faults = host.device.next_faults(None).unwrap();
    handle.detach(true);
    driver.submit(WRITE, 0, &[4; 512]);
    driver.kick_now();
    assert_eq!(faults[0].op, Op::Write);
    faults[0].answer(Answer::Done(None));
    // The second request was taken before the queue knew that it is to be drained, or it was not.
    let next = next(host.next_end());
    let mut answers = driver.taken();
    assert_eq!(answers.len(), usize::from(next));
    let settings = blkloom_core::vhost_user::QueueSettings { next, ..driver.settings() };
    let _handle = driver.try_serve(&host, settings).unwrap();
    answers.extend(driver.wait(2 - answers.len()));
    assert!(answers.len() == 2 && answers.iter().all(|answer| answer.1 == OK));
}

#[test]
fn nothing_is_stored_for_a_peer_that_was_given_up_and_the_next_engine_serves_its_requests() {
    let half = BYTES / 2;
    let faulty = device(mapping(vec![(half, memory(&region(half), 0)), (half, Extent::Fault)], vec![1]));
    faulty.attach_mapper();
    let host = Host::new(engines().remove(0).1, faulty);
    let mut driver = Driver::new(false, false);
    let handle = driver.serve(&host);
    driver.submit(READ, SECTORS / 2, &[0; 512]);
    driver.notify(1);
    let mut faults = host.device.next_faults(None).unwrap();
    driver.claim(1000); // breaks the queue
    driver.kick_now();
    faults[0].answer(Answer::Done(Some(vec![9; 512])));
    let (reason, next) = failed(host.next_end());
    assert!(reason.contains("available index 1000") && next == 1, "{reason}, {next}");
    assert_eq!(driver.taken(), []);
    handle.close();
    driver.claim(1);
    let _handle = driver.serve(&host);
    host.device.next_faults(None).unwrap()[0].answer(Answer::Done(Some(vec![9; 512])));
    assert_eq!(driver.wait(1)[0].1, OK);
}

#[test]
fn a_driver_that_breaks_the_rules_ends_its_queue_only() {
    let host = Host::new(engines().remove(0).1, half_a_file());
    let mut good = Driver::new(true, true);
    let _handle = good.serve(&host);
    let broken = |store: &dyn Fn(&mut Driver), expected: &str| {
        // The notices of both queues have the same token: only the broken one ends.
        let mut driver = Driver::new(true, true);
        let _handle = driver.serve(&host);
        store(&mut driver);
        driver.kick_now();
        let (reason, _) = failed(host.next_end());
        assert!(reason.contains(expected), "{reason}");
        assert_eq!(driver.taken(), []);
    };
    broken(&|driver| driver.claim(SIZE + 1), "available index");
    broken(&|driver| driver.offer(SIZE), "descriptor 64");
    broken(&|driver| driver.offer(3), "a buffer of 0 bytes");
    let header = GUEST + DATA as u64;
    broken(
        &|driver| {
            driver.put(0, &[Driver::descriptor(header, 16, 1, 1), Driver::descriptor(7, 1, 2, 0)].concat());
            driver.offer(0);
        },
        "a buffer of 1 bytes at 0x7",
    );
    broken(
        &|driver| {
            driver.put(0, &Driver::descriptor(GUEST + LENGTH as u64 - 8, 16, 1, 1));
            driver.offer(0);
        },
        "a buffer of 0 bytes",
    );
    broken(
        &|driver| {
            driver.put(0, &Driver::descriptor(header, 16, 0, 0));
            driver.offer(0);
        },
        "no byte for the status",
    );
    let mut driver = Driver::new(true, true);
    for settings in [
        blkloom_core::vhost_user::QueueSettings { size: 48, ..driver.settings() },
        blkloom_core::vhost_user::QueueSettings { size: 2048, ..driver.settings() },
        blkloom_core::vhost_user::QueueSettings { size: 0, ..driver.settings() },
        blkloom_core::vhost_user::QueueSettings { descriptors: USER + 8, ..driver.settings() },
        blkloom_core::vhost_user::QueueSettings { used: USER + LENGTH as u64 - 8, ..driver.settings() },
        blkloom_core::vhost_user::QueueSettings { available: 0, ..driver.settings() },
    ] {
        assert!(driver.try_serve(&host, settings).is_err(), "{settings:?}");
    }
    // A buffer for data that is no memory is an error of this request.
    let status = GUEST + DATA as u64 + 16;
    driver.put(DATA, &[0; 16]);
    let chain = [
        Driver::descriptor(header, 16, 1, 1),
        Driver::descriptor(GUEST + LENGTH as u64 - 8, 512, 3, 2),
        Driver::descriptor(status, 1, 2, 0),
    ];
    driver.put(0, &chain.concat());
    let _other = driver.serve(&host);
    driver.offer(0);
    driver.kick_now();
    driver.wait(1);
    assert_eq!(driver.get(DATA + 16, 1), [IO_ERROR]);
    assert_eq!(good.execute(READ, 0, &[0; 512]).0, OK);
}

#[test]
fn rings_full_of_noise_hurt_no_other_device() {
    let host = Host::new(engines().remove(0).1, half_a_file());
    let mut good = Driver::new(true, false);
    let _handle = good.serve(&host);
    assert_eq!(good.execute(WRITE, 8, &[8; 512]).0, OK);
    let victim = Host::new(engines().remove(0).1, half_a_file());
    let mut random = Random::new(23);
    for round in 0..300 {
        let mut driver = Driver::new(round % 2 == 0, true);
        if round % 3 == 0 {
            driver.keep_log(LOG);
        }
        let handle = driver.serve(&victim);
        for _ in 0..random.below(6) {
            driver.submit([READ, WRITE, FLUSH, DISCARD][random.below(4) as usize], random.below(SECTORS), &[1; 1024]);
        }
        // Descriptors, indirect tables, rings and headers, but mostly with addresses in the memory.
        for _ in 0..random.below(200) {
            let (at, value) = (random.below(0xc000) as usize, random.next());
            driver.put(at, &value.to_le_bytes()[..1 + random.below(8) as usize]);
        }
        if random.one_in(3) {
            driver.claim(random.below(u64::from(SIZE)) as u16);
        }
        driver.kick_now();
        for _ in 0..random.below(50) {
            driver.put(random.below(0xc000) as usize, &[random.next() as u8]);
        }
        handle.detach(random.one_in(2));
        victim.next_end();
        if driver.log.is_some() {
            assert!(driver.take_marks().iter().all(|&page| page < LENGTH / 4096));
        }
    }
    assert_eq!(good.execute(READ, 8, &[0; 512]), (OK, vec![8; 512]));
    let mut fresh = Driver::new(true, true);
    let _handle = fresh.serve(&victim);
    assert_eq!(fresh.execute(READ, 0, &[0; 512]).0, OK);
}

#[test]
fn the_pages_that_are_written_are_marked_in_the_log_and_no_others() {
    for (name, engine) in engines() {
        let host = Host::new(engine, half_a_file());
        let mut driver = Driver::new(true, true);
        driver.keep_log(LOG);
        let handle = driver.serve(&host);
        assert_eq!(driver.execute(FLUSH, 0, &[]).0, OK);
        driver.take_marks();
        let mut random = Random::new(7);
        for round in 0..300 {
            let kind = [READ, READ, WRITE, FLUSH, IDENTIFY][(random.next() % 5) as usize];
            let length = match kind {
                FLUSH => 0,
                IDENTIFY => 20,
                _ => 512 * (1 + random.next() % 30) as usize,
            };
            let sector = random.next() % (SECTORS - 30);
            let slot = driver.submit(kind, sector, &vec![round as u8; length]);
            driver.notify(1);
            assert_eq!(driver.wait(1)[0].1, OK, "{name}");
            let mut expected = vec![USED / 4096, Driver::status_at(slot) / 4096];
            if matches!(kind, READ | IDENTIFY) {
                let at = Driver::data_at(slot);
                expected.extend(at / 4096..=(at + length - 1) / 4096);
            }
            expected.sort_unstable();
            assert_eq!(driver.take_marks(), expected, "{name}: request {kind} of {length} bytes at {sector}");
        }
        handle.detach(true);
        let next = next(host.next_end());
        driver.take_marks();
        // A former engine may have died between a store to the used ring and its mark.
        let settings = blkloom_core::vhost_user::QueueSettings { next, ..driver.settings() };
        let _handle = driver.try_serve(&host, settings).unwrap();
        assert_eq!(driver.execute(READ, 0, &[]).0, OK);
        assert!(driver.take_marks().contains(&(USED / 4096)));
    }
}

#[test]
fn a_log_that_is_too_small_is_refused() {
    let host = Host::new(engines().remove(0).1, half_a_file());
    let mut driver = Driver::new(true, true);
    driver.keep_log(LOG - 1);
    assert!(driver.try_serve(&host, driver.settings()).is_err());
    driver.keep_log(LOG);
    let end = LOG as u64 * 8 * 4096;
    for used_log in [end - 8, end, u64::MAX - 8, u64::MAX] {
        let settings = blkloom_core::vhost_user::QueueSettings { used_log: Some(used_log), ..driver.settings() };
        let error = driver.try_serve(&host, settings).err().expect("it is refused").to_string();
        assert!(error.contains("does not cover"), "{error}");
    }
    let _handle = driver.serve(&host);
    assert_eq!(driver.execute(READ, 0, &[0; 512]).0, OK);
}
