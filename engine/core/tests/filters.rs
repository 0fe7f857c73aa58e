//! Filters: the same verdicts at once and in a queue, counted once; flushes that fail; blocks that become good.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use std::sync::Arc;
use std::time::{Duration, Instant};

use blkloom_core::filter::{
    BadBlocks, CERTAIN, Errors, Filter, Flakey, Limit, Operations, Per, Switch, Throttle, Treatment,
};
use blkloom_core::{Device, Engine, Kinds, Memory, Op};
use blkloom_io::Buffer;
use blkloom_map::{Extent, Filtered};
use rig::*;

const SIZE: u64 = 64 << 10;
const BLOCK: u64 = 4096;

fn filtered(filter: Arc<dyn Filter>, behind: &Extent<Kinds>) -> Extent<Kinds> {
    Extent::Filtered(Arc::new(Filtered { filter, legs: [behind.clone(), behind.clone(), Extent::Error(Errno::PERM)] }))
}

/// A device with a filter before memory, which is served at once, and one before a file, which waits for the ring.
fn devices(filter: &Arc<dyn Filter>) -> [Arc<Device>; 2] {
    let behind = [memory(&region(SIZE), 0), data(&file(SIZE, true), 0)];
    behind.map(|extent| device(mapping(vec![(SIZE, filtered(filter.clone(), &extent))], vec![])))
}

fn write_one(engine: &Engine, device: &Arc<Device>, at: u64, queued: bool) -> Result<(), Errno> {
    if queued {
        let memory = Memory::owned(Buffer::new(512));
        return by_queue(engine, device, Op::Write, at, memory, 512, false);
    }
    write(engine, device, at, &[7; 512], false)
}

#[test]
fn a_throttle_counts_each_request_once_however_it_is_served() {
    for (name, engine) in engines() {
        for queued in [false, true] {
            for index in 0..2 {
                // What is saved is enough for three requests. If one were counted twice, the last would wait for minutes.
                let burst = Duration::from_secs(3 * 512);
                let limit = Limit { per: Per::Bytes, reads: true, writes: true, rate: 1, burst };
                let throttle = Arc::new(Throttle::new(vec![limit]));
                let device = &devices(&(throttle.clone() as Arc<dyn Filter>))[index];
                let began = Instant::now();
                for at in 0..3 {
                    assert_eq!(write_one(&engine, device, at * 512, queued), Ok(()), "{name}");
                }
                assert!(began.elapsed() < Duration::from_secs(256), "{name}: it has waited");
                assert_eq!(throttle.waiting(), 0);
            }
        }
    }
}

#[test]
fn the_same_seed_fails_the_same_requests_at_once_and_in_a_queue() {
    let failed = |engine: &Engine, index: usize, queued: bool| -> Vec<bool> {
        let operations = Operations { write: true, ..Operations::default() };
        let filter: Arc<dyn Filter> = Arc::new(Errors::new(Errno::NOSPC, operations, CERTAIN / 4, 18));
        let device = &devices(&filter)[index];
        let results = (0..200).map(|at| write_one(engine, device, at % 100 * 512, queued));
        let failed: Vec<bool> =
            results.map(|result| result.inspect_err(|errno| assert_eq!(*errno, Errno::NOSPC)).is_err()).collect();
        assert_eq!(read(engine, device, 0, &mut [0; 512]), Ok(()), "only writes fail");
        failed
    };
    for (name, engine) in engines() {
        let first = failed(&engine, 0, false);
        assert!((20..80).contains(&first.iter().filter(|failed| **failed).count()), "{name}");
        for (index, queued) in [(0, true), (1, false), (1, true)] {
            assert_eq!(failed(&engine, index, queued), first, "{name}");
        }
    }
}

#[test]
fn bad_blocks_fail_reads_until_they_are_written() {
    for (name, engine) in engines() {
        for queued in [false, true] {
            for index in 0..2 {
                let blocks = Arc::new(BadBlocks::new(BLOCK, 512));
                let device = &devices(&(blocks.clone() as Arc<dyn Filter>))[index];
                assert!(blocks.add(1, 0) && blocks.add(2, 1) && !blocks.add(2, 0));
                assert_eq!(write_one(&engine, device, BLOCK, queued), Ok(()), "{name}: not enabled");
                assert_eq!(blocks.list(), [(1, 0), (2, 1)]);
                blocks.enable(true);
                // The range begins 512 bytes into block 0.
                assert_eq!(read(&engine, device, 0, &mut vec![0; BLOCK as usize - 512]), Ok(()), "{name}");
                assert_eq!(read(&engine, device, 0, &mut vec![0; BLOCK as usize]), Err(EIO), "{name}");
                assert_eq!(write_one(&engine, device, BLOCK - 512, queued), Ok(()), "{name}");
                assert_eq!(blocks.list(), [(2, 1)], "{name}: good, though only a part of it was written");
                assert_eq!(write_one(&engine, device, 2 * BLOCK, queued), Err(EIO), "{name}: the first write fails");
                assert_eq!(write_one(&engine, device, 2 * BLOCK, queued), Ok(()), "{name}");
                assert_eq!((blocks.list(), blocks.clear()), (vec![], 0));
                assert_eq!(read(&engine, device, 0, &mut vec![0; SIZE as usize]), Ok(()), "{name}");
            }
        }
    }
}

#[test]
fn a_switch_treats_reads_and_writes_each_in_its_way() {
    for (name, engine) in engines() {
        let switch = Arc::new(Switch::new(Treatment::Pass, Treatment::Pass));
        for device in devices(&(switch.clone() as Arc<dyn Filter>)) {
            switch.set(Treatment::Pass, Treatment::Pass);
            assert_eq!(write(&engine, &device, 0, &[1; 512], false), Ok(()), "{name}");
            switch.set(Treatment::Pass, Treatment::Drop);
            for queued in [false, true] {
                assert_eq!(write_one(&engine, &device, 0, queued), Ok(()), "{name}");
            }
            assert_eq!(command(&engine, &device, Op::Flush, 0, 0, Default::default()), Ok(()), "{name}");
            let mut found = [0; 512];
            assert_eq!(read(&engine, &device, 0, &mut found), Ok(()), "{name}");
            assert_eq!(found, [1; 512], "{name}: the writes were dropped");
            switch.set(Treatment::Elsewhere, Treatment::Fail);
            assert_eq!(read(&engine, &device, 0, &mut found), Err(Errno::PERM), "{name}");
            assert_eq!(write_one(&engine, &device, 0, false), Err(EIO), "{name}");
            assert_eq!(command(&engine, &device, Op::Flush, 0, 0, Default::default()), Err(EIO), "{name}");
            assert_eq!(engine.suspend(&device, true, None), Ok(()), "{name}: its flush does not fail");
            device.resume();
        }
    }
}

#[test]
fn a_read_that_fails_is_read_again_elsewhere() {
    for (name, engine) in engines() {
        let good = memory(&region(SIZE), 0);
        let source = device(mapping(vec![(SIZE, good.clone())], vec![]));
        assert_eq!(write(&engine, &source, 0, &[9; SIZE as usize], false), Ok(()), "{name}");
        let switch = Arc::new(Switch::new(Treatment::Try, Treatment::Pass));
        let reads = Operations { read: true, ..Operations::default() };
        let errors: Arc<dyn Filter> = Arc::new(Errors::new(EIO, reads, CERTAIN, 18));
        for lower in devices(&errors) {
            let tried = Extent::Device { device: lower, offset: 0, writable: false };
            let legs = [tried, good.clone(), good.clone()];
            let filtered = Extent::Filtered(Arc::new(Filtered { filter: switch.clone() as Arc<dyn Filter>, legs }));
            let before = memory(&region(BLOCK), 0);
            let top = device(mapping(vec![(BLOCK, before), (SIZE, filtered)], vec![]));
            let on = Extent::Device { device: top.clone(), offset: 0, writable: true };
            let above = device(mapping(vec![(BLOCK + SIZE, on)], vec![]));
            for device in [&top, &above] {
                switch.set(Treatment::Try, Treatment::Pass);
                let mut found = [7; 1024];
                assert_eq!(read(&engine, device, BLOCK - 512, &mut found), Ok(()), "{name}");
                assert_eq!(found.to_vec(), [[0; 512], [9; 512]].concat(), "{name}");
                let memory = Memory::owned(Buffer::new(1024));
                assert_eq!(by_queue(&engine, device, Op::Read, BLOCK, memory, 1024, false), Ok(()), "{name}");
                switch.set(Treatment::Pass, Treatment::Pass);
                assert_eq!(read(&engine, device, BLOCK, &mut found), Err(EIO), "{name}: without a second try");
            }
        }
    }
}

#[test]
fn a_flush_fails_at_a_filter_of_a_lower_device() {
    for (name, engine) in engines() {
        let flakey: Arc<dyn Filter> =
            Arc::new(Flakey::new(0, 1, [Treatment::Pass, Treatment::Fail], Duration::ZERO).unwrap());
        for lower in devices(&flakey) {
            let on = Extent::Device { device: lower, offset: 0, writable: true };
            let top = device(mapping(vec![(SIZE, on)], vec![]));
            assert_eq!(command(&engine, &top, Op::Flush, 0, 0, Default::default()), Err(EIO), "{name}");
            assert_eq!(read(&engine, &top, 0, &mut [0; 512]), Ok(()), "{name}");
        }
    }
    assert!(Flakey::new(0, 0, [Treatment::Pass; 2], Duration::ZERO).is_none());
    assert!(!Flakey::new(1, 0, [Treatment::Pass; 2], Duration::ZERO).unwrap().is_down());
}

#[test]
fn a_flakey_filter_goes_on_where_another_was_in_its_intervals() {
    let day = 86400;
    let is_down =
        |elapsed| Flakey::new(day, day, [Treatment::Fail; 2], Duration::from_secs(elapsed)).unwrap().is_down();
    assert_eq!([0, day / 2, day + day / 2, 2 * day + day / 2].map(u64::from).map(is_down), [false, false, true, false]);
}
