//! Chains, requests and requests in flight against slow readings of the specification.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::cell::RefCell;
use std::collections::BTreeMap;

use blkloom_virtio_wire::block::{Kind, Request, Segment};
use blkloom_virtio_wire::split::{
    Chain, DESCRIPTOR_SIZE, MOST_PIECES, Malformed, Piece, available_length, descriptors_length, gather, length,
    must_notify, pending, used, used_length,
};
use blkloom_virtio_wire::{Memory, dirty_log, inflight};
use proptest::prelude::*;

/// Memory of a driver from address 0 on, which counts how often each byte is copied.
struct Driver {
    bytes: Vec<u8>,
    copied: RefCell<BTreeMap<u64, u32>>,
}

impl Driver {
    fn new(bytes: Vec<u8>) -> Driver {
        Driver { bytes, copied: RefCell::default() }
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }
}

impl Memory for Driver {
    fn read(&self, address: u64, into: &mut [u8]) -> bool {
        let Some(end) = address.checked_add(into.len() as u64).filter(|&end| end <= self.bytes.len() as u64) else {
            return false;
        };
        (address..end).for_each(|at| *self.copied.borrow_mut().entry(at).or_default() += 1);
        into.copy_from_slice(&self.bytes[address as usize..end as usize]);
        true
    }
}

fn descriptor(address: u64, length: u32, flags: u16, next: u16) -> [u8; DESCRIPTOR_SIZE] {
    let mut bytes = [0; DESCRIPTOR_SIZE];
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&length.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}

fn collected(table: &[[u8; 16]], head: u16, driver: &Driver) -> Result<Chain, Malformed> {
    let mut chain = Chain::default();
    chain.collect(head, (table.len() as u16, true), |index| table[usize::from(index)], driver)?;
    Ok(chain)
}

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

#[test]
fn areas_have_the_lengths_of_the_specification() {
    assert_eq!((descriptors_length(256), available_length(256), used_length(256)), (4096, 518, 2054));
    assert_eq!(used(0x102, 0x0304_0506), [2, 1, 0, 0, 6, 5, 4, 3]);
}

#[test]
fn a_direct_chain_has_its_buffers_in_order() {
    let table = [descriptor(32, 8, WRITE, 7), descriptor(0, 16, NEXT, 2), descriptor(16, 4, NEXT, 0), [0; 16]];
    let chain = collected(&table, 1, &Driver::new(vec![])).unwrap();
    let pieces = [(0, 16), (16, 4), (32, 8)].map(|(address, length)| Piece { address, length });
    assert_eq!((&chain.pieces[..], chain.readable), (&pieces[..], 2));
}

#[test]
fn an_indirect_table_may_follow_direct_buffers() {
    let mut driver = Driver::new(vec![0; 4096]);
    driver.put(1024, &[descriptor(64, 4, NEXT, 1), descriptor(96, 1, WRITE, 0)].concat());
    let table = [descriptor(0, 16, NEXT, 1), descriptor(1024, 32, INDIRECT, 0)];
    let chain = collected(&table, 0, &driver).unwrap();
    assert_eq!((length(&chain.pieces), chain.readable), (21, 2));
}

#[test]
fn chains_that_break_a_rule_are_refused() {
    let mut driver = Driver::new(vec![0; 4096]);
    driver.put(0, &descriptor(64, 16, INDIRECT, 0));
    driver.put(64, &[descriptor(0, 4, NEXT, 1), descriptor(0, 4, NEXT, 0)].concat());
    driver.put(128, &descriptor(0, 4, NEXT, 9));
    let refused = |table: &[[u8; 16]]| collected(table, 0, &driver).unwrap_err();
    assert_eq!(refused(&[descriptor(0, 4, NEXT, 1), descriptor(0, 4, NEXT, 0)]), Malformed::Long);
    assert_eq!(refused(&[descriptor(0, 4, NEXT, 5)]), Malformed::Long);
    let table = [descriptor(0, 4, NEXT, 5), [0; 16]];
    assert_eq!(refused(&table), Malformed::Descriptor { index: 5, size: 2 });
    assert_eq!(refused(&[descriptor(0, 0, 0, 0)]), Malformed::Buffer { address: 0, length: 0 });
    let far = u64::MAX - 3;
    assert_eq!(refused(&[descriptor(far, 4, 0, 0)]), Malformed::Buffer { address: far, length: 4 });
    assert_eq!(refused(&[descriptor(0, 4, NEXT | WRITE, 1), descriptor(0, 4, 0, 0)]), Malformed::Order);
    assert_eq!(refused(&[descriptor(0, 16, INDIRECT, 0)]), Malformed::Indirect);
    assert_eq!(refused(&[descriptor(0, 16, INDIRECT | NEXT, 1), [0; 16]]), Malformed::Indirect);
    assert_eq!(refused(&[descriptor(64, 32, INDIRECT, 0)]), Malformed::Long);
    assert_eq!(refused(&[descriptor(128, 16, INDIRECT, 0)]), Malformed::Long);
    for (address, length) in [(0, 17), (0, 0), (4090, 16), (0, 16 * (MOST_PIECES as u32 + 1)), (far, 16)] {
        assert_eq!(refused(&[descriptor(address, length, INDIRECT, 0)]), Malformed::Table { address, length });
    }
    let mut chain = Chain::default();
    let table = descriptor(64, 16, INDIRECT, 0);
    assert_eq!(chain.collect(0, (1, false), |_| table, &driver), Err(Malformed::Indirect));
    assert_eq!(chain.collect(3, (1, false), |_| table, &driver), Err(Malformed::Descriptor { index: 3, size: 1 }));
}

#[test]
fn a_request_without_header_or_status_is_refused() {
    let driver = Driver::new(vec![0; 64]);
    let mut short = collected(&[descriptor(0, 15, NEXT, 1), descriptor(32, 1, WRITE, 0)], 0, &driver).unwrap();
    assert_eq!(Request::parse(&mut short, &driver), Err(Malformed::Missing("header of a request")));
    let mut outside = collected(&[descriptor(60, 16, NEXT, 1), descriptor(32, 1, WRITE, 0)], 0, &driver).unwrap();
    assert_eq!(Request::parse(&mut outside, &driver), Err(Malformed::Missing("header of a request")));
    let mut mute = collected(&[descriptor(0, 16, 0, 0)], 0, &driver).unwrap();
    assert_eq!(Request::parse(&mut mute, &driver), Err(Malformed::Missing("byte for the status of a request")));
}

proptest! {
    /// However header, data and status are divided into buffers, they are found, and no byte is copied twice.
    #[test]
    fn a_request_is_found_in_buffers_of_any_size(
        code in 0u32..16, sector: u64, data in 0usize..200, output in 0usize..200,
        readable in prop::collection::vec(1usize..40, 0..20), writable in prop::collection::vec(1usize..40, 0..20),
    ) {
        let mut stream = [code.to_le_bytes(), [9; 4]].concat();
        stream.extend(sector.to_le_bytes());
        stream.extend((0..data).map(|at| at as u8));
        let mut driver = Driver::new(vec![0; 2 * 4096]);
        let (mut table, mut at) = (Vec::new(), 0);
        // Buffers are 4096 apart modulo their number, in the order of the chain.
        for (total, sizes, flags) in [(stream.len(), &readable, 0), (output + 1, &writable, WRITE)] {
            let mut left = total;
            let mut sizes = sizes.iter().copied();
            while left > 0 {
                let size = sizes.next().unwrap_or(left).min(left);
                if flags == 0 {
                    let from = total - left;
                    driver.put(at + 1, &stream[from..from + size]);
                }
                table.push((at as u64 + 1, size as u32, flags));
                (at, left) = (at + size + 1, left - size);
            }
        }
        let last = table.len() - 1;
        let table: Vec<_> = table.iter().enumerate().map(|(index, &(address, length, flags))| {
            descriptor(address, length, flags | if index < last { NEXT } else { 0 }, index as u16 + 1)
        }).collect();
        let mut chain = collected(&table, 0, &driver).unwrap();
        let request = Request::parse(&mut chain, &driver).unwrap();
        let kind = match code {
            0 => Kind::Read,
            1 => Kind::Write,
            4 => Kind::Flush,
            8 => Kind::Identify,
            11 => Kind::Discard,
            13 => Kind::WriteZeroes,
            other => Kind::Other(other),
        };
        prop_assert_eq!((request.kind, request.sector), (kind, sector));
        prop_assert_eq!(request.status, at as u64 - 1);
        let (from, to) = (&chain.pieces[request.readable.clone()], &chain.pieces[request.writable.clone()]);
        prop_assert_eq!((length(from), length(to)), (data as u64, output as u64));
        let mut found = vec![0; data];
        prop_assert!(gather(from, &driver, &mut found));
        prop_assert_eq!(&found[..], &stream[16..]);
        prop_assert!(driver.copied.borrow().values().all(|&times| times == 1));
    }

    #[test]
    fn any_table_is_a_bounded_chain_or_refused(
        bytes in prop::collection::vec((0u64..600, 0u32..70, 0u16..8, 0u16..10), 1..9), head in 0u16..10,
        noise in prop::collection::vec(any::<u8>(), 512),
    ) {
        let table: Vec<_> = bytes.iter().map(|&(address, length, flags, next)| {
            descriptor(address, length, flags, next)
        }).collect();
        let driver = Driver::new(noise);
        if let Ok(mut chain) = collected(&table, head, &driver) {
            prop_assert!(chain.pieces.len() <= MOST_PIECES && chain.readable <= chain.pieces.len());
            prop_assert!(chain.pieces.iter().all(|piece| piece.address.checked_add(piece.length.into()).is_some()));
            if let Ok(Request { readable, writable, .. }) = Request::parse(&mut chain, &driver) {
                prop_assert!(readable.end <= chain.readable && writable.end <= chain.pieces.len());
            }
        }
    }

    #[test]
    fn a_segment_is_read_as_it_was_written(sector: u64, sectors: u32, flags: u32) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&sector.to_le_bytes());
        bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
        bytes[12..].copy_from_slice(&flags.to_le_bytes());
        let expected = Segment { sector, sectors, unmap: flags & 1 == 1, other_flags: flags > 1 };
        prop_assert_eq!(Segment::parse(bytes), expected);
    }

    #[test]
    fn indices_wrap(next: u16, ahead: u16, size in 1u16..1024) {
        let found = pending(next.wrapping_add(ahead), next, size);
        prop_assert_eq!(found.ok(), (ahead <= size).then_some(ahead));
    }

    /// The event is passed by one of the steps from the old index to the new one.
    #[test]
    fn the_other_side_is_notified_where_the_index_passes_its_event(event: u16, old: u16, steps in 0u16..2000) {
        let passes = (0..steps).any(|step| old.wrapping_add(step) == event);
        prop_assert_eq!(must_notify(event, old.wrapping_add(steps), old), passes);
    }

    /// A device that dies between any two stores has every head that was taken and not used among those to serve again,
    /// in order, and no other.
    #[test]
    fn what_was_in_flight_is_found_wherever_the_device_died(
        steps in prop::collection::vec((any::<bool>(), 0usize..8, 1usize..4), 0..40), stores in 0usize..400, start: u16,
    ) {
        const SIZE: u16 = 8;
        let mut region = vec![0; inflight::region_length(SIZE)];
        let mut budget = stores;
        let mut store = |region: &mut Vec<u8>, at: usize, bytes: &[u8]| {
            if budget > 0 {
                region[at..at + bytes.len()].copy_from_slice(bytes);
                budget -= 1;
            }
            budget > 0
        };
        let half = u16::to_le_bytes;
        region[inflight::VERSION..][..2].copy_from_slice(&half(inflight::USED));
        region[inflight::COUNT..][..2].copy_from_slice(&half(SIZE));
        region[inflight::USED_INDEX..][..2].copy_from_slice(&half(start));
        let (mut index, mut counter, mut flying): (u16, u64, Vec<u16>) = (start, 5, Vec::new());
        let mut link = 0u16;
        'life: for (takes, choice, count) in steps {
            if takes {
                let Some(head) = (0..SIZE).cycle().skip(choice).take(8).find(|head| !flying.contains(head)) else {
                    continue;
                };
                if !store(&mut region, inflight::counter_offset(head), &counter.to_le_bytes()) { break; }
                counter += 1;
                if budget_is_left(&mut region, &mut store, head, 1) { flying.push(head); } else {
                    if region[inflight::mark_offset(head)] == 1 { flying.push(head); }
                    break;
                }
            } else {
                let batch: Vec<u16> = (0..count.min(flying.len())).map(|at| flying[(choice + at) % flying.len()]).collect();
                for &head in &batch {
                    if !store(&mut region, inflight::link_offset(head), &half(link)) { break 'life; }
                    link = head;
                    if !store(&mut region, inflight::LAST_BATCH, &half(head)) { break 'life; }
                }
                index = index.wrapping_add(batch.len() as u16); // the used ring
                flying.retain(|head| !batch.contains(head));
                for &head in &batch {
                    if !budget_is_left(&mut region, &mut store, head, 0) { break 'life; }
                }
                if !store(&mut region, inflight::USED_INDEX, &half(index)) { break; }
            }
        }
        let left = inflight::left(&region, SIZE, index).unwrap().unwrap();
        prop_assert_eq!(left.unanswered, flying);
    }

    #[test]
    fn any_region_is_understood_or_refused(noise in prop::collection::vec(any::<u8>(), 192), index: u16, batch: u8) {
        let mut region = noise;
        region[inflight::VERSION..][..2].copy_from_slice(&1u16.to_le_bytes());
        region[inflight::COUNT..][..2].copy_from_slice(&8u16.to_le_bytes());
        region[inflight::USED_INDEX..][..2].copy_from_slice(&index.wrapping_sub(batch.into()).to_le_bytes());
        if let Ok(Some(left)) = inflight::left(&region, 8, index) {
            prop_assert!(left.used.len() <= 8 && left.unanswered.len() <= 8);
            prop_assert!(left.used.iter().chain(&left.unanswered).all(|&head| head < 8));
        }
    }
}

fn budget_is_left(
    region: &mut Vec<u8>,
    store: &mut impl FnMut(&mut Vec<u8>, usize, &[u8]) -> bool,
    head: u16,
    mark: u8,
) -> bool {
    store(region, inflight::mark_offset(head), &[mark])
}

#[test]
fn a_region_that_was_never_used_has_nothing() {
    assert_eq!(inflight::left(&[0; 192], 8, 77), Ok(None));
    let mut other = [0; 192];
    other[inflight::VERSION] = 1;
    other[inflight::COUNT] = 9;
    assert_eq!(inflight::left(&other, 8, 0), Err(Malformed::Inflight(9)));
}

proptest! {
    #[test]
    fn every_page_of_a_range_is_marked_and_no_other(
        address in prop_oneof![0..1_u64 << 20, (u64::MAX - (1 << 18))..=u64::MAX],
        bytes in prop_oneof![0..3_u64, 0..1_u64 << 19],
        log in 0..40_u64,
        base in any::<bool>(),
    ) {
        // The log ends near the range, or near address 0.
        let first_byte = if base { 0 } else { address / dirty_log::PAGE / 8 };
        let log = first_byte.saturating_add(log);
        let mut marked = std::collections::BTreeSet::new();
        for (at, bits) in dirty_log::marks(address, bytes, log) {
            prop_assert!(at < log && bits != 0);
            for bit in 0..8 {
                if bits >> bit & 1 == 1 {
                    prop_assert!(marked.insert(u128::from(at) * 8 + bit), "a page twice");
                }
            }
        }
        let expected: std::collections::BTreeSet<u128> = (0..u128::from(bytes))
            .step_by(512)
            .chain(bytes.checked_sub(1).map(u128::from))
            .map(|more| u128::from(address) + more)
            .filter(|&at| at <= u64::MAX.into())
            .map(|at| at / u128::from(dirty_log::PAGE))
            .filter(|page| page / 8 < log.into())
            .collect();
        prop_assert_eq!(marked, expected);
    }

    #[test]
    fn a_log_is_as_long_as_the_last_address_needs(end in 1..=u64::MAX) {
        let length = dirty_log::length(end);
        prop_assert_eq!(dirty_log::marks(end - 1, 1, length).map(|(at, _)| at).collect::<Vec<_>>(), [length - 1]);
        prop_assert_eq!(dirty_log::marks(end - 1, 1, length - 1).next(), None);
    }
}
