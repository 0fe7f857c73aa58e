//! Descriptors of the ublk driver: any bytes are a request whose every field is where ublk_cmd.h has it, or malformed;
//! and no range ends beyond 64 bits.
#![no_main]

use blkloom_ublk_wire::{DESCRIPTOR_SIZE, Malformed, Operation, Request};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: [u8; DESCRIPTOR_SIZE]| {
    let field = |at: usize, length: usize| -> u128 {
        bytes[at..at + length].iter().rev().fold(0, |sum, &byte| sum << 8 | u128::from(byte))
    };
    // Numbers are little-endian wherever this runs.
    let (code, flags, sectors, start) = (bytes[0], field(0, 4), field(4, 4), field(8, 8));
    let (fua, keeps) = (flags >> 13 & 1 == 1, flags >> 15 & 1 == 1);
    let expected = match code {
        0 => Some(Operation::Read),
        1 => Some(Operation::Write { fua }),
        2 => Some(Operation::Flush),
        3 => Some(Operation::Discard),
        5 => Some(Operation::WriteZeroes { unmap: !keeps, fua }),
        _ => None,
    };
    match Request::parse(&bytes) {
        Ok(Request { operation, offset, length }) => {
            assert_eq!(Some(operation), expected);
            let (start, sectors) = if operation == Operation::Flush { (0, 0) } else { (start, sectors) };
            assert_eq!((u128::from(offset), u128::from(length)), (start * 512, sectors * 512));
            assert!(offset.checked_add(length).is_some());
        }
        Err(Malformed::Operation(other)) => assert!(other == code && expected.is_none()),
        Err(Malformed::Range { .. }) => assert!((start + sectors) * 512 > u128::from(u64::MAX)),
    }
});
