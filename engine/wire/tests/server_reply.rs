//! What `reply` builds, `server_reply` parses; it needs exactly the bytes that it says; other bytes never panic.
#![allow(clippy::unwrap_used, reason = "tests")]

use blkloom_wire::{
    Content, Coverage, ErrorCode, Framing, Parsed, Reply, Style, block_status, error, hole, read_data, server_reply,
    success,
};
use proptest::prelude::*;

fn style() -> impl Strategy<Value = Style> {
    prop_oneof![Just(Style::Simple), Just(Style::Structured), Just(Style::Extended)]
}

/// A reply as bytes, without data that follows, and as a value.
fn built() -> impl Strategy<Value = (Style, Vec<u8>, Reply)> {
    let numbers = (any::<u64>(), any::<u64>(), 1..1u64 << 32, any::<bool>());
    let runs = prop::collection::vec((1..=0xffff_f000u64, 0..4u32), 1..9);
    (style(), 0..5u8, numbers, runs).prop_map(|(style, kind, (cookie, offset, len, last), runs)| {
        let framing = Framing { style, cookie, offset };
        let mut bytes = Vec::new();
        let simple = style == Style::Simple;
        let (done, content) = match kind {
            0 if !simple => {
                read_data(&framing, &mut bytes, offset, len.min(0xffff_fff7), last);
                (last, Content::Data { offset, len: len.min(0xffff_fff7) })
            }
            1 if !simple => {
                hole(&framing, &mut bytes, offset, len, last);
                (last, Content::Hole { offset, len })
            }
            2 if !simple => {
                block_status(&framing, &mut bytes, [(7, runs.clone())]);
                let runs = runs.iter().map(|&(len, status)| (len, status.into())).collect();
                (true, Content::Status { context: 7, runs })
            }
            3 => {
                error(&framing, &mut bytes, ErrorCode::NoSpace, "no space");
                (true, if simple { Content::Simple { error: 28 } } else { Content::Error { code: 28 } })
            }
            _ => {
                success(&framing, &mut bytes);
                (true, if simple { Content::Simple { error: 0 } } else { Content::None })
            }
        };
        (style, bytes, Reply { cookie, done, content })
    })
}

proptest! {
    #[test]
    fn a_reply_comes_out_as_it_was_built((style, bytes, reply) in built(), more in prop::collection::vec(any::<u8>(), 0..40)) {
        let mut longer = bytes.clone();
        longer.extend(more);
        prop_assert_eq!(server_reply(style, &longer), Ok(Parsed::Reply(reply, bytes.len())));
    }

    #[test]
    fn a_reply_asks_for_its_missing_bytes((style, bytes, reply) in built()) {
        let mut have = 0;
        loop {
            match server_reply(style, &bytes[..have]).unwrap() {
                Parsed::Needs(needs) => {
                    prop_assert!(have < needs && needs <= bytes.len());
                    // Fewer bytes are not enough.
                    let fewer = matches!(server_reply(style, &bytes[..needs - 1]), Ok(Parsed::Needs(_)));
                    prop_assert!(fewer);
                    have = needs;
                }
                Parsed::Reply(found, used) => {
                    prop_assert_eq!((found, used), (reply, bytes.len()));
                    break;
                }
            }
        }
    }

    #[test]
    fn any_bytes_give_a_reply_a_violation_or_a_need(style in style(), mut bytes in prop::collection::vec(any::<u8>(), 0..80), magic in 0..4usize) {
        let magics = [0x6744_6698u32, 0x668e_33ef, 0x6e8a_278c];
        if let (Some(magic), true) = (magics.get(magic), bytes.len() >= 4) {
            bytes[..4].copy_from_slice(&magic.to_be_bytes());
        }
        match server_reply(style, &bytes) {
            Ok(Parsed::Reply(_, used)) => prop_assert!(used <= bytes.len()),
            Ok(Parsed::Needs(needs)) => prop_assert!(needs > bytes.len() && needs <= 32 + (2 << 20)),
            Err(_) => {}
        }
    }

    #[test]
    fn coverage_is_that_of_a_list_of_bytes(chunks in prop::collection::vec((0..40u64, 1..12u64), 0..12)) {
        const SIZE: u64 = 32;
        let (mut coverage, mut bytes) = (Coverage::default(), [false; SIZE as usize]);
        for (at, len) in chunks {
            let range = at as usize..(at + len) as usize;
            let fits = at + len <= SIZE && bytes[range.clone()].iter().all(|&covered| !covered);
            prop_assert_eq!(coverage.add(at, len, SIZE).is_ok(), fits);
            if !fits {
                break;
            }
            bytes[range].fill(true);
            prop_assert_eq!(coverage.is_whole(SIZE), bytes.iter().all(|&covered| covered));
        }
    }
}

#[test]
fn pieces_of_a_read_are_limited() {
    let (mut coverage, of) = (Coverage::default(), 1 << 20);
    let refused = (0..of / 2).find(|&at| coverage.add(2 * at, 1, of).is_err());
    assert_eq!(refused, Some(Coverage::MOST as u64));
}
