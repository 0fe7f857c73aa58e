//! Parsed requests equal the sent ones, and every refusal is an error that the protocol specifies.
#![allow(clippy::unwrap_used, reason = "tests")]

use blkloom_wire::{Command, ErrorCode, Framing, Rules, Style, block_status, error, flags, hole, read_data, success};
use proptest::prelude::*;

fn rules(style: Style) -> Rules {
    Rules { style, size: 1 << 20, read_only: false, block_status: true, max_payload: 1 << 16 }
}

fn compact(flags: u16, kind: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

fn extended(flags: u16, kind: u16, cookie: u64, offset: u64, length: u64) -> Vec<u8> {
    let mut bytes = compact(flags, kind, cookie, offset, 0);
    bytes[..4].copy_from_slice(&0x21e4_1c71u32.to_be_bytes());
    bytes.truncate(24);
    bytes.extend(length.to_be_bytes());
    bytes
}

fn refusal(style: Style, flags: u16, kind: u16, offset: u64, length: u64) -> Option<ErrorCode> {
    let bytes = match style {
        Style::Extended => extended(flags, kind, 1, offset, length),
        _ => compact(flags, kind, 1, offset, length as u32),
    };
    style.header(&bytes).unwrap().unwrap().request(&rules(style)).refusal.map(|refusal| refusal.code)
}

proptest! {
    #[test]
    fn a_header_comes_out_as_it_went_in(f: u16, k: u16, c: u64, o: u64, l: u32, cut in 0usize..28) {
        let bytes = compact(f, k, c, o, l);
        let header = Style::Simple.header(&bytes).unwrap().unwrap();
        prop_assert_eq!((header.flags, header.kind, header.cookie, header.offset, header.length), (f, k, c, o, l.into()));
        let mut again = Vec::new();
        header.put(Style::Simple, &mut again);
        prop_assert_eq!(&again, &bytes);
        prop_assert_eq!(Style::Structured.header(&bytes[..cut]), Ok(None));
        let bytes = extended(f, k, c, o, u64::from(l) << 20);
        let header = Style::Extended.header(&bytes).unwrap().unwrap();
        prop_assert_eq!((header.offset, header.length), (o, u64::from(l) << 20));
        again.clear();
        header.put(Style::Extended, &mut again);
        prop_assert_eq!(&again, &bytes);
    }

    #[test]
    fn any_bytes_are_judged_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..40), f: u16, k in 0u16..10, o: u64, l: u64) {
        for style in [Style::Simple, Style::Structured, Style::Extended] {
            let _anything = style.header(&bytes);
            let raw = if style == Style::Extended { extended(f, k, 0, o, l) } else { compact(f, k, 0, o, l as u32) };
            let header = style.header(&raw).unwrap().unwrap();
            let request = header.request(&rules(style));
            // Every accepted request is inside the export.
            if request.refusal.is_none() && request.command != Some(Command::Disconnect) {
                prop_assert!(header.offset.checked_add(header.length).unwrap() <= 1 << 20);
            }
        }
    }
}

/// One parsed chunk of block status: (flags, context, descriptors), and the bytes after it.
type Status = (u16, u32, Vec<(u64, u64)>);

fn take_status(style: Style, bytes: &[u8], (cookie, offset): (u64, u64)) -> (Status, &[u8]) {
    let number = |at: usize, width: usize| bytes[at..at + width].iter().fold(0u64, |n, b| n << 8 | u64::from(*b));
    let extended = style == Style::Extended;
    assert_eq!((number(0, 4), number(6, 2)), if extended { (0x6e8a_278c, 6) } else { (0x668e_33ef, 5) });
    assert_eq!(number(8, 8), cookie);
    let (mut at, length) = if extended {
        assert_eq!(number(16, 8), offset);
        assert_eq!(number(24, 8), 8 + 16 * number(36, 4), "the count is what the length says");
        (40, 32 + number(24, 8) as usize)
    } else {
        (24, 20 + number(16, 4) as usize)
    };
    let (context, width) = (number(if extended { 32 } else { 20 }, 4) as u32, if extended { 8 } else { 4 });
    let mut descriptors = Vec::new();
    while at < length {
        descriptors.push((number(at, width), number(at + width, width)));
        at += 2 * width;
    }
    assert_eq!(at, length);
    ((number(4, 2) as u16, context, descriptors), &bytes[length..])
}

proptest! {
    #[test]
    fn every_context_gets_a_chunk_of_its_own_and_the_last_is_the_end(
        cookie: u64,
        offset: u64,
        told in prop::collection::vec((any::<u32>(), prop::collection::vec((1u64..1 << 40, any::<u32>()), 1..5)), 1..6),
    ) {
        for style in [Style::Structured, Style::Extended] {
            let mut out = Vec::new();
            block_status(&Framing { style, cookie, offset }, &mut out, told.iter().map(|(id, runs)| (*id, runs)));
            let mut rest = &out[..];
            for (index, (id, runs)) in told.iter().enumerate() {
                let ((flags, context, found), behind) = take_status(style, rest, (cookie, offset));
                prop_assert_eq!((flags, context), (u16::from(index + 1 == told.len()), *id));
                // The first descriptors are true; a length that does not fit 32 bits is cut, and nothing follows it.
                prop_assert!(!found.is_empty());
                for (&(length, status), &(wanted, flags)) in found.iter().zip(runs) {
                    prop_assert_eq!(status, u64::from(flags));
                    prop_assert!(length > 0 && length <= wanted);
                }
                let whole = found.iter().zip(runs).take_while(|((length, _), (wanted, _))| length == wanted).count();
                prop_assert!(whole == runs.len() || style == Style::Structured && whole + 1 == found.len());
                prop_assert!(whole == runs.len() || runs[whole].0 > u64::from(u32::MAX) - 4095);
                rest = behind;
            }
            prop_assert!(rest.is_empty());
        }
    }
}

#[test]
fn another_magic_is_malformed() {
    assert_eq!(Style::Simple.header(&[1; 28]).unwrap_err().magic, 0x0101_0101);
    assert!(Style::Extended.header(&compact(0, 0, 0, 0, 0)).is_err());
    assert!(Style::Structured.header(&extended(0, 0, 0, 0, 0)).is_err());
}

#[test]
fn refusals_are_those_the_protocol_names() {
    use ErrorCode::{Invalid, NoSpace, Overflow};
    let s = Style::Structured;
    assert_eq!(refusal(s, 0, 0, 1 << 20, 1), Some(Invalid), "read beyond the end");
    assert_eq!(refusal(s, 0, 1, 1 << 20, 1), Some(NoSpace), "write beyond the end");
    assert_eq!(refusal(s, 0, 6, (1 << 20) - 1, 2), Some(NoSpace), "zeroes beyond the end");
    assert_eq!(refusal(s, 0, 4, u64::MAX, 2), Some(Invalid), "trim that wraps around");
    assert_eq!(refusal(s, 0, 99, 0, 0), Some(Invalid), "unknown command");
    assert_eq!(refusal(s, 0x8000, 0, 0, 1), Some(Invalid), "unknown flag");
    assert_eq!(refusal(s, 0, 0, 0, (1 << 16) + 1), Some(Overflow), "read larger than the maximum payload");
    assert_eq!(refusal(s, 0, 1, 0, (1 << 16) + 1), Some(Invalid), "write larger than the maximum payload");
    assert_eq!(refusal(s, 0, 3, 1, 0), Some(Invalid), "flush with an offset");
    assert_eq!(refusal(s, flags::DF, 0, 0, 1), None);
    assert_eq!(refusal(Style::Simple, flags::DF, 0, 0, 1), Some(Invalid), "DF without structured replies");
    assert_eq!(refusal(s, flags::REQ_ONE, 7, 0, 1), None);
    assert_eq!(refusal(s, flags::PAYLOAD_LEN, 1, 0, 1), Some(Invalid), "PAYLOAD_LEN in a compact request");
    assert_eq!(refusal(Style::Extended, 0, 1, 0, 1), None, "an extended write without PAYLOAD_LEN, as QEMU sends it");
    assert_eq!(refusal(Style::Extended, flags::PAYLOAD_LEN, 1, 0, 1), None);
    assert_eq!(refusal(Style::Extended, flags::PAYLOAD_LEN, 7, 0, 12), Some(Invalid), "status payload not offered");
}

#[test]
fn a_refused_write_still_has_its_payload() {
    let header = Style::Simple.header(&compact(0, 1, 0, 1 << 20, 5)).unwrap().unwrap();
    assert_eq!(header.request(&rules(Style::Simple)).payload, 5);
    let header = Style::Extended.header(&extended(0, 1, 0, 0, 7)).unwrap().unwrap();
    assert_eq!(header.request(&rules(Style::Extended)).payload, 7, "QEMU's writes lack PAYLOAD_LEN");
    let header = Style::Extended.header(&extended(flags::PAYLOAD_LEN, 99, 0, 0, 7)).unwrap().unwrap();
    assert_eq!(header.request(&rules(Style::Extended)).payload, 7);
}

#[test]
fn read_only_exports_refuse_what_writes() {
    for kind in [1, 4, 6] {
        let header = Style::Simple.header(&compact(0, kind, 0, 0, 1)).unwrap().unwrap();
        let refused = header.request(&Rules { read_only: true, ..rules(Style::Simple) }).refusal.unwrap();
        assert_eq!(refused.code, ErrorCode::NotPermitted);
    }
}

#[test]
fn replies_are_laid_out_as_specified() {
    let framing = |style| Framing { style, cookie: 0x0102_0304_0506_0708, offset: 0x1000 };
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let built = |build: &dyn Fn(&mut Vec<u8>)| {
        let mut out = Vec::new();
        build(&mut out);
        hex(&out)
    };
    assert_eq!(built(&|out| success(&framing(Style::Simple), out)), "67446698000000000102030405060708");
    assert_eq!(
        built(&|out| error(&framing(Style::Simple), out, ErrorCode::NoSpace, "ignored")),
        "674466980000001c0102030405060708"
    );
    assert_eq!(
        built(&|out| error(&framing(Style::Structured), out, ErrorCode::Io, "hi")),
        "668e33ef000180010102030405060708000000080000000500026869"
    );
    assert_eq!(
        built(&|out| read_data(&framing(Style::Structured), out, 0x1200, 512, true)),
        "668e33ef000100010102030405060708000002080000000000001200"
    );
    assert_eq!(
        built(&|out| hole(&framing(Style::Extended), out, 0x1200, 512, false)),
        "6e8a278c0000000201020304050607080000000000001000000000000000000c000000000000120000000200"
    );
    assert_eq!(
        built(&|out| {
            block_status(&framing(Style::Structured), out, [(1, [(512, 3), (u64::MAX >> 1, 0), (1, 1)])]);
        }),
        "668e33ef00010005010203040506070800000014000000010000020000000003fffff00000000000"
    );
    assert_eq!(
        built(&|out| block_status(&framing(Style::Extended), out, [(1, [(1 << 40, 3)])])),
        "6e8a278c000100060102030405060708000000000000100000000000000000180000000100000001\
         00000100000000000000000000000003"
    );
}
