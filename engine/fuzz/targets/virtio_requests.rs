//! Requests of a virtio block device: whatever is in the memory of a driver, a chain is what a slow walk through the
//! descriptors finds, or refused; header, data and status are the bytes that follow one another in it; and no byte
//! outside of the memory is copied.
#![no_main]

use blkloom_virtio_wire::block::Request;
use blkloom_virtio_wire::split::{Chain, MOST_PIECES, Piece};
use blkloom_virtio_wire::{Memory, dirty_log, inflight};
use libfuzzer_sys::fuzz_target;

const SIZE: u16 = 8;

struct Driver<'a>(&'a [u8]);

impl Memory for Driver<'_> {
    fn read(&self, address: u64, into: &mut [u8]) -> bool {
        let end = u128::from(address) + into.len() as u128;
        if end > self.0.len() as u128 {
            return false;
        }
        into.copy_from_slice(&self.0[address as usize..end as usize]);
        true
    }
}

impl Driver<'_> {
    fn number(&self, at: u64, length: u64) -> Option<u64> {
        let bytes = self.0.get(at as usize..(at + length) as usize)?;
        Some(bytes.iter().rev().fold(0, |sum, &byte| sum << 8 | u64::from(byte)))
    }
}

/// The buffers of a chain: (address, length, whether the device writes it). None: it breaks a rule.
fn walked(driver: &Driver<'_>, head: u64) -> Option<Vec<(u64, u64, bool)>> {
    let (mut found, mut seen) = (Vec::<(u64, u64, bool)>::new(), Vec::new());
    let (mut table, mut size, mut index, mut inside) = (0, u64::from(SIZE), head, false);
    loop {
        if index >= size || seen.contains(&(inside, index)) {
            return None;
        }
        seen.push((inside, index));
        let at = table + 16 * index;
        let (address, length) = (driver.number(at, 8)?, driver.number(at + 8, 4)?);
        let (flags, next) = (driver.number(at + 12, 2)?, driver.number(at + 14, 2)?);
        address.checked_add(length)?;
        if flags & 4 != 0 {
            let count = length / 16;
            if inside || flags & 1 != 0 || length % 16 != 0 || count == 0 || count > MOST_PIECES as u64 {
                return None;
            }
            (table, size, index, inside) = (address, count, 0, true);
            driver.0.get(usize::try_from(table).ok()?..)?;
            continue;
        }
        let writes = flags & 2 != 0;
        if length == 0 || found.len() == MOST_PIECES || !writes && found.last().is_some_and(|&(.., before)| before) {
            return None;
        }
        found.push((address, length, writes));
        if flags & 1 == 0 {
            return Some(found);
        }
        index = next;
    }
}

/// (address, length) without the first and the last bytes.
fn cut(pieces: &[(u64, u64)], first: u64, last: u64) -> Vec<(u64, u64)> {
    let total: u64 = pieces.iter().map(|(_, length)| length).sum();
    let (mut at, mut left) = (0, Vec::new());
    for &(address, length) in pieces {
        let (from, to) = (first.max(at), (total - last).min(at + length));
        if from < to {
            left.push((address + (from - at), to - from));
        }
        at += length;
    }
    left
}

fuzz_target!(|input: (u16, u16, &[u8])| {
    let (head, index, bytes) = input;
    if bytes.len() >= inflight::region_length(SIZE)
        && let Ok(Some(left)) = inflight::left(bytes, SIZE, index)
    {
        assert!(left.used.iter().chain(&left.unanswered).all(|&head| head < SIZE));
        assert!(left.used.len() + left.unanswered.len() <= usize::from(SIZE));
    }
    if bytes.len() < 16 * usize::from(SIZE) {
        return;
    }
    let driver = Driver(bytes);
    let table = |index: u16| bytes[16 * usize::from(index)..][..16].try_into().expect("16 bytes");
    let mut chain = Chain::default();
    let collected = chain.collect(head, (SIZE, true), table, &driver);
    let expected = walked(&driver, head.into());
    assert_eq!(collected.is_ok(), expected.is_some());
    let Some(expected) = expected else { return };
    let of = |writes: bool| -> Vec<(u64, u64)> {
        expected.iter().filter(|piece| piece.2 == writes).map(|&(address, length, _)| (address, length)).collect()
    };
    let plain = |pieces: &[Piece]| -> Vec<(u64, u64)> {
        pieces.iter().map(|piece| (piece.address, piece.length.into())).collect()
    };
    let (readable, writable) = (of(false), of(true));
    assert_eq!(
        (plain(&chain.pieces[..chain.readable]), plain(&chain.pieces[chain.readable..])),
        (readable.clone(), writable.clone())
    );
    let Ok(request) = Request::parse(&mut chain, &driver) else {
        let mut header = 0;
        for &(address, length) in &readable {
            let wanted = length.min(16 - header);
            let end = u128::from(address) + u128::from(wanted);
            header += if end > bytes.len() as u128 { break } else { wanted };
        }
        assert!(header < 16 || writable.is_empty());
        return;
    };
    assert_eq!(plain(&chain.pieces[request.readable]), cut(&readable, 16, 0));
    assert_eq!(plain(&chain.pieces[request.writable]), cut(&writable, 0, 1));
    const LOG: u64 = 64;
    for &(address, length) in &writable {
        let mut marks = dirty_log::marks(address, length, LOG).fold([0; LOG as usize], |mut marks, (at, bits)| {
            marks[at as usize] |= bits;
            marks
        });
        for page in 0..LOG * 8 {
            let (start, end) = (page * 4096, (page + 1) * 4096);
            if address < end && start < address + length {
                marks[page as usize / 8] ^= 1 << (page % 8);
            }
        }
        assert_eq!(marks, [0; LOG as usize]);
    }
    let (address, length) = writable[writable.len() - 1];
    assert_eq!(request.status, address + length - 1);
});
