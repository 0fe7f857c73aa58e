//! Descriptors and commands against the places of ublk_cmd.h.
#![allow(clippy::unwrap_used, reason = "tests")]

use blkloom_ublk_wire::control::{self, Command};
use blkloom_ublk_wire::{
    COMMIT_AND_FETCH, DESCRIPTOR_SIZE, FETCH, Malformed, Operation, Request, command, descriptors_length,
    descriptors_offset,
};
use proptest::prelude::*;

fn descriptor(op_flags: u32, sectors: u32, start: u64) -> [u8; DESCRIPTOR_SIZE] {
    let mut bytes = [0xee; DESCRIPTOR_SIZE];
    bytes[0..4].copy_from_slice(&op_flags.to_ne_bytes());
    bytes[4..8].copy_from_slice(&sectors.to_ne_bytes());
    bytes[8..16].copy_from_slice(&start.to_ne_bytes());
    bytes
}

/// `_IOC` of the header, as a C compiler works it out for x86-64.
#[test]
fn opcodes_are_those_of_the_header() {
    assert_eq!((FETCH, COMMIT_AND_FETCH), (0xc010_7520, 0xc010_7521));
    let expected = [
        ("get-info", 0x8020_7502),
        ("add", 0xc020_7504),
        ("delete", 0xc020_7505),
        ("start", 0xc020_7506),
        ("stop", 0xc020_7507),
        ("set-parameters", 0xc020_7508),
        ("get-parameters", 0x8020_7509),
        ("start-recovery", 0xc020_7510),
        ("end-recovery", 0xc020_7511),
        ("get-features", 0x8020_7513),
        ("update-size", 0xc020_7515),
        ("quiesce", 0xc020_7516),
    ];
    assert_eq!(Command::ALL.map(|command| (command.name(), command.opcode())), expected);
    for command in Command::ALL {
        assert_eq!(Command::named(command.name()), Some(command));
    }
    assert_eq!(Command::named("reformat"), None);
}

#[test]
fn descriptors_of_queues_are_a_whole_queue_of_4096_tags_apart() {
    assert_eq!(descriptors_offset(0, 4096), 0);
    assert_eq!(descriptors_offset(3, 4096), 3 * 98304);
    assert_eq!(descriptors_length(128, 4096), 4096);
    assert_eq!(descriptors_length(171, 4096), 8192);
    assert_eq!(descriptors_length(128, 65536), 65536);
}

proptest! {
    #[test]
    fn a_descriptor_is_read_as_it_was_written(
        code: u8, fua: bool, keeps: bool, noise in 0u32..32, sectors: u32, start in 0u64..1 << 40,
    ) {
        let flags = u32::from(code) | noise << 8 | u32::from(fua) << 13 | u32::from(keeps) << 15;
        let range = (start * 512, u64::from(sectors) * 512);
        let operation = match code {
            0 => Some(Operation::Read),
            1 => Some(Operation::Write { fua }),
            2 => Some(Operation::Flush),
            3 => Some(Operation::Discard),
            5 => Some(Operation::WriteZeroes { unmap: !keeps, fua }),
            _ => None,
        };
        let found = Request::parse(&descriptor(flags, sectors, start));
        match operation {
            None => prop_assert_eq!(found, Err(Malformed::Operation(code))),
            Some(operation) => {
                let (offset, length) = if operation == Operation::Flush { (0, 0) } else { range };
                prop_assert_eq!(found, Ok(Request { operation, offset, length }));
            }
        }
    }

    #[test]
    fn a_range_past_all_bytes_is_refused(sectors: u32, beyond in 0u64..1 << 20) {
        let start = (1u64 << 55) + beyond;
        let refused = Err(Malformed::Range { start, sectors });
        prop_assert_eq!(Request::parse(&descriptor(0, sectors, start)), refused);
    }

    #[test]
    fn commands_have_their_fields_at_the_places_of_the_header(
        queue: u16, tag: u16, result: i32, buffer: u64, device: u32, length: u16, data: u64,
    ) {
        let bytes = command(queue, tag, result, buffer);
        let expected: Vec<u8> =
            [&queue.to_ne_bytes()[..], &tag.to_ne_bytes(), &result.to_ne_bytes(), &buffer.to_ne_bytes()].concat();
        prop_assert_eq!(&bytes[..], &expected);
        let bytes = control::command(device, (buffer, length), data);
        let expected: Vec<u8> = [
            &device.to_ne_bytes()[..], &u16::MAX.to_ne_bytes(), &length.to_ne_bytes(), &buffer.to_ne_bytes(),
            &data.to_ne_bytes(), &[0; 8],
        ]
        .concat();
        prop_assert_eq!(&bytes[..], &expected);
    }
}
