//! Replies of a server, of all three styles: what a reply needs is what it takes, and its contents agree with a slow
//! parser that is written from the protocol's text. The data of a read is covered as a list of bytes says.
#![no_main]

use blkloom_wire::{Content, Coverage, MOST_PAYLOAD, Parsed, Reply, Style, server_reply};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Case<'a> {
    style: u8,
    /// Which magic is put in front of `bytes`, if any.
    magic: u8,
    chunks: Vec<(u8, u8)>,
    bytes: &'a [u8],
}

const SIMPLE: u32 = 0x6744_6698;
const STRUCTURED: u32 = 0x668e_33ef;
const EXTENDED: u32 = 0x6e8a_278c;

fuzz_target!(|case: Case<'_>| {
    let style = [Style::Simple, Style::Structured, Style::Extended][usize::from(case.style % 3)];
    let mut stream = match case.magic % 4 {
        0 => SIMPLE.to_be_bytes().to_vec(),
        1 => STRUCTURED.to_be_bytes().to_vec(),
        2 => EXTENDED.to_be_bytes().to_vec(),
        _ => Vec::new(),
    };
    stream.extend_from_slice(case.bytes);
    let whole = server_reply(style, &stream);
    match &whole {
        Ok(Parsed::Reply(reply, used)) => {
            assert_eq!(slow(style, &stream), Some((reply.clone(), *used)));
            // All that it needs is what it takes, and each step says so.
            let mut have = 0;
            while have < *used {
                match server_reply(style, &stream[..have]) {
                    Ok(Parsed::Needs(needs)) => {
                        assert!(have < needs && needs <= *used);
                        have = needs;
                    }
                    other => panic!("{have} of {used} bytes give {other:?}"),
                }
            }
            assert_eq!(server_reply(style, &stream[..*used]), whole);
        }
        Ok(Parsed::Needs(needs)) => {
            assert!(*needs > stream.len() && *needs as u64 <= 32 + MOST_PAYLOAD);
            assert_eq!(slow(style, &stream), None);
        }
        Err(_) => assert_eq!(slow(style, &stream), None),
    }
    covered(&case.chunks);
});

fn covered(chunks: &[(u8, u8)]) {
    const SIZE: u64 = 200;
    let (mut coverage, mut bytes) = (Coverage::default(), [false; SIZE as usize]);
    for &(at, len) in chunks.iter().filter(|(_, len)| *len > 0) {
        let (from, to) = (usize::from(at), usize::from(at) + usize::from(len));
        let fits = to <= bytes.len() && bytes[from..to].iter().all(|&covered| !covered);
        assert_eq!(coverage.add(at.into(), len.into(), SIZE).is_ok(), fits);
        if !fits {
            return;
        }
        bytes[from..to].fill(true);
        assert_eq!(coverage.is_whole(SIZE), bytes.iter().all(|&covered| covered));
    }
}

/// A number of `width` bytes. None: it is not there.
fn number(bytes: &[u8], at: usize, width: usize) -> Option<u64> {
    Some(bytes.get(at..at.checked_add(width)?)?.iter().fold(0, |sum, &byte| sum << 8 | u64::from(byte)))
}

/// The whole, valid reply at the start of `bytes`, and its length without data. Source: doc/proto.md, "Simple reply
/// message", "Structured reply chunk message", "Structured reply types".
fn slow(style: Style, bytes: &[u8]) -> Option<(Reply, usize)> {
    let magic = number(bytes, 0, 4)? as u32;
    if magic == SIMPLE && style != Style::Extended {
        let content = Content::Simple { error: number(bytes, 4, 4)? as u32 };
        return Some((Reply { cookie: number(bytes, 8, 8)?, done: true, content }, 16));
    }
    let (head, length) = match (style, magic) {
        (Style::Structured, STRUCTURED) => (20, number(bytes, 16, 4)?),
        (Style::Extended, EXTENDED) => (32, number(bytes, 24, 8)?),
        _ => return None,
    };
    let (done, kind, cookie) = (number(bytes, 4, 2)? & 1 == 1, number(bytes, 6, 2)?, number(bytes, 8, 8)?);
    if kind == 1 {
        let content = Content::Data { offset: number(bytes, head, 8)?, len: length.checked_sub(8)? };
        return (length > 8).then_some((Reply { cookie, done, content }, head + 8));
    }
    let payload = bytes.get(head..head.checked_add(usize::try_from(length).ok()?)?)?;
    if length > MOST_PAYLOAD {
        return None;
    }
    let content = match kind {
        0 => (done && length == 0).then_some(Content::None)?,
        2 => {
            let len = number(payload, 8, 4)?;
            (length == 12 && len != 0).then_some(Content::Hole { offset: number(payload, 0, 8)?, len })?
        }
        5 if style == Style::Structured => runs(payload, 4, 4)?,
        6 if style == Style::Extended => {
            let found = runs(payload, 8, 8)?;
            let Content::Status { runs, .. } = &found else { return None };
            let said = number(payload, 4, 4)?;
            (said == 0 || said == runs.len() as u64).then_some(found)?
        }
        _ if kind >= 0x8000 => {
            let (code, message) = (number(payload, 0, 4)? as u32, number(payload, 4, 2)?);
            let fits = match kind {
                0x8001 => length == 6 + message,
                0x8002 => length == 14 + message,
                _ => length >= 6 + message,
            };
            (fits && code != 0).then_some(Content::Error { code })?
        }
        _ => return None,
    };
    Some((Reply { cookie, done, content }, head + payload.len()))
}

fn runs(payload: &[u8], head: usize, width: usize) -> Option<Content> {
    let (context, mut runs, mut at) = (number(payload, 0, 4)? as u32, Vec::new(), head);
    while at < payload.len() {
        let run = (number(payload, at, width)?, number(payload, at + width, width)?);
        if run.0 == 0 {
            return None;
        }
        runs.push(run);
        at += 2 * width;
    }
    (!runs.is_empty()).then_some(Content::Status { context, runs })
}
