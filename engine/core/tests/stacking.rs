//! Stacked devices: the limit of levels, and no cycles, also when two threads swap maps at the same time.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use std::sync::{Arc, Barrier};

use blkloom_core::{Device, Mapping, SwapError};
use blkloom_map::Extent;
use rig::*;

const SIZE: u64 = 4096;
const MOST: usize = 32;

fn floor() -> Arc<Mapping> {
    mapping(vec![(SIZE, Extent::Zero { discard_writes: true })], vec![])
}

/// A map with one segment for each of the devices, of which several may be the same.
fn on(devices: &[&Arc<Device>]) -> Arc<Mapping> {
    let below = |device: &&Arc<Device>| (SIZE, Extent::Device { device: (*device).clone(), offset: 0, writable: true });
    mapping(devices.iter().map(below).collect(), vec![])
}

/// A stack of devices, lowest first.
fn tower(levels: usize) -> Vec<Arc<Device>> {
    let mut all = vec![device(floor())];
    while all.len() < levels {
        all.push(device(on(&[all.last().unwrap()])));
    }
    all
}

#[test]
fn a_stack_has_at_most_32_levels() {
    let all = tower(MOST);
    let top = all.last().unwrap();
    let error = Device::new("one more".into(), Some(on(&[top])), PATIENT).map(drop);
    assert_eq!(error, Err(SwapError::TooDeep(MOST + 1)));
    let (engine, mut bytes) = (engines().remove(0).1, [1; 4096]);
    assert_eq!(read(&engine, top, 0, &mut bytes), Ok(()));
    assert_eq!(bytes, [0; 4096]);
}

#[test]
fn levels_above_and_below_count() {
    let (upper, lower) = (tower(20), tower(20));
    let middle = &upper[0];
    assert_eq!(middle.swap(on(&[&lower[19]])).map(drop), Err(SwapError::TooDeep(40)));
    assert!(middle.swap(on(&[&lower[11]])).is_ok(), "20 and 12 are as many as may be");
    // The stack has 32 levels now. No level fits below, until its upper half is elsewhere.
    assert_eq!(lower[0].swap(on(&[&device(floor())])).map(drop), Err(SwapError::TooDeep(33)));
    middle.swap(floor()).unwrap();
    assert!(lower[0].swap(on(&[&device(floor())])).is_ok());
    // Closed and dropped devices do not count.
    middle.swap(on(&[&lower[10]])).unwrap();
    assert_eq!(lower[0].swap(on(&[&lower_tower(2)])).map(drop), Err(SwapError::TooDeep(33)));
    middle.close();
    assert!(lower[0].swap(on(&[&lower_tower(2)])).is_ok());
}

fn lower_tower(levels: usize) -> Arc<Device> {
    tower(levels).pop().unwrap()
}

/// Each device uses both devices of the level below, so there are too many paths to walk all.
#[test]
fn levels_are_counted_once_with_many_paths() {
    let mut levels = vec![[device(floor()), device(floor())]];
    while levels.len() < MOST {
        let [a, b] = levels.last().unwrap();
        levels.push([device(on(&[a, b])), device(on(&[b, a]))]);
    }
    let [a, _] = levels.last().unwrap();
    assert!(Device::new(String::new(), Some(on(&[a])), PATIENT).is_err());
    assert_eq!(levels[0][0].swap(on(&[a])).map(drop), Err(SwapError::Cycle));
    assert_eq!(levels[0][0].swap(on(&[&device(floor())])).map(drop), Err(SwapError::TooDeep(33)));
}

#[test]
fn two_maps_that_together_form_a_cycle_are_not_both_accepted() {
    let engine = engines().remove(0).1;
    for _ in 0..200 {
        let (a, b, start) = (device(floor()), device(floor()), Barrier::new(2));
        let swap = |one: &Arc<Device>, other: &Arc<Device>| {
            let mapping = on(&[other]);
            start.wait();
            one.swap(mapping).is_ok()
        };
        let taken = std::thread::scope(|scope| {
            let (first, second) = (scope.spawn(|| swap(&a, &b)), scope.spawn(|| swap(&b, &a)));
            [first.join().unwrap(), second.join().unwrap()]
        });
        assert_eq!(taken.iter().filter(|&&taken| taken).count(), 1);
        assert_eq!(read(&engine, &a, 0, &mut [1; 512]), Ok(()));
        assert_eq!(read(&engine, &b, 0, &mut [1; 512]), Ok(()));
    }
}
