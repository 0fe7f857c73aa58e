//! `Region`, compared with a vector of bytes, and with concurrent writes and discards in one page.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::os::fd::OwnedFd;
use std::sync::Barrier;

use blkloom_io::{Ahead, Region, RegionError};
use proptest::prelude::*;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

const PAGE: u64 = 4096;
const SIZE: u64 = 150 * PAGE; // more than two words of the page bits

fn memfd(size: u64) -> OwnedFd {
    let fd = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, size).unwrap();
    fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
    fd
}

fn region(size: u64) -> Region {
    Region::new(memfd(size), size, PAGE).unwrap()
}

fn write(region: &Region, offset: u64, bytes: &[u8]) {
    region.write(offset, bytes.into());
}

fn read(region: &Region, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xaa; len];
    region.read(offset, (&mut bytes[..]).into(), Ahead::NOTHING);
    let mut again = vec![0x55; len];
    region.read(offset, (&mut again[..]).into(), region.ahead(0, len.div_ceil(2)));
    assert!(bytes == again, "what is fetched meanwhile changes nothing");
    bytes
}

#[derive(Debug, Clone)]
enum Act {
    Write(u8),
    Zero { unmap: bool },
    Read,
}

fn acts() -> impl Strategy<Value = Vec<(Act, u64, u64)>> {
    let act = prop_oneof![
        2 => any::<u8>().prop_map(Act::Write),
        2 => any::<bool>().prop_map(|unmap| Act::Zero { unmap }),
        1 => Just(Act::Read),
    ];
    // Mostly near page borders, sometimes long.
    let offset =
        prop_oneof![0..SIZE, (0..150u64, 0..3u64).prop_map(|(page, near)| (page * PAGE + near).saturating_sub(1))];
    let len = prop_oneof![1..3u64, 1..3 * PAGE, (1..100u64).prop_map(|pages| pages * PAGE), Just(SIZE)];
    prop::collection::vec((act, offset, len), 1..40)
}

proptest! {
    #[test]
    fn a_region_is_a_vector_of_bytes(acts in acts()) {
        let fd = memfd(SIZE);
        let (region, mut model) = (Region::new(fd.try_clone().unwrap(), SIZE, PAGE).unwrap(), vec![0u8; SIZE as usize]);
        for (act, offset, len) in acts {
            let len = len.min(SIZE - offset);
            let range = offset as usize..(offset + len) as usize;
            match act {
                Act::Write(byte) => {
                    let bytes: Vec<u8> = (0..len).map(|i| byte.wrapping_add(i as u8) | 1).collect();
                    write(&region, offset, &bytes);
                    model[range].copy_from_slice(&bytes);
                }
                Act::Zero { unmap } => {
                    region.zero(offset, len, unmap).unwrap();
                    model[range].fill(0);
                    if unmap {
                        for page in offset.div_ceil(PAGE)..(offset + len) / PAGE {
                            prop_assert!(!region.run(page * PAGE, PAGE).1, "a discarded page takes memory");
                        }
                    } else {
                        prop_assert_eq!(region.run(offset, len), (len, true), "zeroed memory is there");
                    }
                }
                Act::Read => prop_assert_eq!(read(&region, offset, range.len()), &model[range]),
            }
        }
        prop_assert_eq!(&read(&region, 0, SIZE as usize), &model);
        // Runs and resident size agree, and unwritten runs are zero.
        let (mut at, mut written_bytes) = (0, 0);
        while at < SIZE {
            let (len, written) = region.run(at, SIZE - at);
            prop_assert!(len > 0 && at + len <= SIZE);
            if written {
                written_bytes += len;
            } else {
                prop_assert!(model[at as usize..(at + len) as usize].iter().all(|&byte| byte == 0));
            }
            at += len;
        }
        prop_assert_eq!(region.resident(), written_bytes);
        // The next region over the same memfd has the same bytes, also after the first was dropped.
        drop(region);
        let next = Region::new(fd, SIZE, PAGE).unwrap();
        prop_assert_eq!(&read(&next, 0, SIZE as usize), &model);
        prop_assert_eq!(next.resident(), written_bytes);
        next.zero(0, SIZE, true).unwrap();
        prop_assert_eq!(next.resident(), 0);
    }
}

#[test]
fn a_huge_region_costs_what_is_written_to_it() {
    let size = 1 << 44;
    let region = region(size);
    for offset in [0, (1 << 40) - 3, size - 7] {
        write(&region, offset, b"kloomed");
        assert_eq!(read(&region, offset, 7), b"kloomed");
    }
    assert_eq!(region.resident(), 4 * PAGE, "one of the three spans two pages");
    assert_eq!(region.run(PAGE, size), ((1 << 40) - 2 * PAGE, false));
    region.zero(1, size - 1, true).unwrap();
    assert_eq!(region.resident(), PAGE);
    assert_eq!(read(&region, 0, 9), b"k\0\0\0\0\0\0\0\0");
    assert_eq!(read(&region, (1 << 40) - 3, 7), [0; 7]);
}

#[test]
fn larger_pages_are_kept_but_zeroed() {
    let size = 8 << 20;
    let region = Region::new(memfd(size), size, 2 << 20).unwrap();
    write(&region, 3 << 20, &[7; 100]);
    assert_eq!(region.resident(), 2 << 20);
    region.zero(0, size, true).unwrap();
    assert_eq!(region.resident(), 2 << 20, "a huge page may not come back: it is kept");
    assert_eq!(read(&region, 3 << 20, 100), [0; 100]);
}

#[test]
fn a_memfd_handed_over_keeps_its_bytes() {
    let fd = memfd(SIZE + 64 * PAGE);
    let first = Region::new(fd.try_clone().unwrap(), SIZE, PAGE).unwrap();
    write(&first, 5 * PAGE + 1, &[9; 8]);
    write(&first, 149 * PAGE, &[8; 8]);
    // Data past the end of the region is ignored.
    rustix::io::pwrite(&fd, &[1; 16], SIZE + 7 * PAGE).unwrap();
    let second = Region::new(fd.try_clone().unwrap(), SIZE, PAGE).unwrap();
    assert_eq!(second.resident(), 2 * PAGE);
    assert_eq!(read(&second, 5 * PAGE, 10), [0, 9, 9, 9, 9, 9, 9, 9, 9, 0]);
    let only_past_the_end = Region::new(fd, 4 * PAGE, PAGE).unwrap();
    assert_eq!(only_past_the_end.resident(), 0);
}

#[test]
fn memory_allocated_but_not_written_is_not_taken_for_data() {
    let fd = memfd(SIZE);
    rustix::fs::fallocate(&fd, rustix::fs::FallocateFlags::empty(), 0, SIZE).unwrap();
    let first = Region::new(fd.try_clone().unwrap(), SIZE, PAGE).unwrap();
    assert_eq!(first.resident(), 0);
    write(&first, 3 * PAGE, &[1]);
    let second = Region::new(fd, SIZE, PAGE).unwrap();
    assert_eq!((second.resident(), second.run(0, SIZE)), (PAGE, (3 * PAGE, false)));
}

#[test]
fn memfds_that_might_raise_a_signal_are_refused() {
    let plain = || memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    let error = |fd, size, page| Region::new(fd, size, page).map(drop).unwrap_err();
    assert!(matches!(error(plain(), PAGE, PAGE), RegionError::NotSealed));
    assert!(matches!(error(memfd(PAGE), PAGE, 512), RegionError::PageSize(512)));
    assert!(matches!(error(memfd(PAGE), PAGE, 3 * PAGE), RegionError::PageSize(_)));
    for size in [0, PAGE + 1, 2 * PAGE, u64::MAX, u64::MAX - 2 * PAGE] {
        assert!(matches!(error(memfd(PAGE), size, PAGE), RegionError::TooSmall { .. }), "{size}");
    }
    assert!(matches!(error(memfd(PAGE), PAGE, 2 * PAGE), RegionError::TooSmall { .. }), "mapped in whole pages");
}

/// A page is filled with one generation's byte after another; discards race the writes. Whatever the
/// outcome of a race, a page that was quiet shows the last byte written or zero, not an earlier one,
/// and writing next to it does not change that.
#[test]
fn a_discard_that_races_a_write_never_brings_old_bytes_back() {
    const ROUNDS: u64 = 3000;
    let (region, turn) = (region(PAGE), Barrier::new(3));
    let writes: [(u64, u64); 2] = [(0, 1000), (2000, 1000)];
    std::thread::scope(|scope| {
        for (at, len) in writes {
            let (region, turn) = (&region, &turn);
            scope.spawn(move || {
                for now in 1..=ROUNDS {
                    turn.wait();
                    write(region, at, &vec![now as u8 | 1; len as usize]);
                    turn.wait();
                }
            });
        }
        for now in 1..=ROUNDS {
            turn.wait();
            region.zero(0, PAGE, true).unwrap();
            turn.wait();
            let found = read(&region, 0, PAGE as usize);
            for (i, &byte) in found.iter().enumerate() {
                let ours = writes.iter().any(|&(at, len)| (at..at + len).contains(&(i as u64)));
                assert!(byte == 0 || ours && byte == now as u8 | 1, "byte {i} is {byte:#x} in round {now}");
            }
            write(&region, PAGE - 1, &[0]);
            assert_eq!(read(&region, 0, PAGE as usize), found, "a neighbour's write brought bytes back");
        }
    });
}
