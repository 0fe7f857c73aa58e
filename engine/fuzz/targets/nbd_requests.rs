//! Request headers of all three styles: any bytes parse the same however they arrive, what was parsed prints as it
//! came, and the judgement agrees with a slow one that is written rule by rule from the protocol's text.
#![no_main]

use blkloom_wire::{Command, ErrorCode, Header, Rules, Style, flags};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Case<'a> {
    style: u8,
    size: u64,
    read_only: bool,
    block_status: bool,
    max_payload: u32,
    /// Put in front of `bytes`, so that the first guess gets past the magic.
    magic: bool,
    bytes: &'a [u8],
}

fuzz_target!(|case: Case<'_>| {
    let style = [Style::Simple, Style::Structured, Style::Extended][usize::from(case.style % 3)];
    let rules = Rules {
        style,
        size: case.size >> 1,
        read_only: case.read_only,
        block_status: case.block_status,
        max_payload: case.max_payload.into(),
    };
    let magic = if style == Style::Extended { 0x21e4_1c71u32 } else { 0x2560_9513 };
    let mut stream = if case.magic { magic.to_be_bytes().to_vec() } else { Vec::new() };
    stream.extend_from_slice(case.bytes);
    let mut rest = &stream[..];
    while let Some((header, taken)) = one_header(style, magic, rest) {
        rest = &rest[taken..];
        let request = header.request(&rules);
        assert_eq!(request.header, header);
        assert_eq!(request.refusal.map(|refusal| refusal.code), judge(&header, &rules), "{header:?} under {rules:?}");
        let carries = header.kind == 1 || style == Style::Extended && header.flags & flags::PAYLOAD_LEN != 0;
        assert_eq!(request.payload, if carries { header.length } else { 0 });
        assert_eq!(request.command.is_none(), header.kind > 7);
        assert!(request.command.is_some() || request.refusal.is_some(), "an unknown command is refused");
        if request.refusal.is_none() && request.command != Some(Command::Disconnect) {
            assert!(u128::from(header.offset) + u128::from(header.length) <= u128::from(rules.size));
        }
        let skipped = usize::try_from(request.payload).unwrap_or(usize::MAX).min(rest.len());
        rest = &rest[skipped..];
    }
});

/// The header at the beginning of a stream and its length; None: more is needed, or the stream is out of step.
fn one_header(style: Style, magic: u32, bytes: &[u8]) -> Option<(Header, usize)> {
    let size = style.header_size();
    let whole = style.header(bytes);
    // Beginnings of it are too short or out of step, and say the same as the whole as soon as they say anything.
    for cut in 0..bytes.len().min(size) {
        match style.header(&bytes[..cut]) {
            Ok(None) => assert!(cut < 4 || bytes[..4] == magic.to_be_bytes(), "garbage is known by its first 4 bytes"),
            found => assert_eq!(found, whole, "{cut} bytes"),
        }
    }
    match whole {
        Ok(Some(header)) => {
            let mut again = Vec::new();
            header.put(style, &mut again);
            assert_eq!(again, bytes[..size], "{header:?} prints as it came");
            Some((header, size))
        }
        Ok(None) => {
            assert!(bytes.len() < size);
            None
        }
        Err(malformed) => {
            assert_eq!(malformed.magic.to_be_bytes(), bytes[..4]);
            assert_ne!(malformed.magic, magic);
            None
        }
    }
}

/// Why a request is refused, rule by rule. Source: doc/proto.md, "Request types", "Command flags", "Error values".
fn judge(header: &Header, rules: &Rules) -> Option<ErrorCode> {
    const READ: u16 = 0;
    const WRITE: u16 = 1;
    const DISCONNECT: u16 = 2;
    const FLUSH: u16 = 3;
    const TRIM: u16 = 4;
    const CACHE: u16 = 5;
    const ZEROES: u16 = 6;
    const STATUS: u16 = 7;
    let Header { flags: set, kind, offset, length, .. } = *header;
    if kind > STATUS {
        return Some(ErrorCode::Invalid);
    }
    if kind == DISCONNECT {
        return None;
    }
    for bit in (0..16).map(|bit| 1u16 << bit).filter(|bit| set & bit != 0) {
        let allowed = match bit {
            flags::FUA => true,
            flags::NO_HOLE | flags::FAST_ZERO => kind == ZEROES,
            flags::DF => kind == READ && rules.style != Style::Simple,
            flags::REQ_ONE => kind == STATUS,
            flags::PAYLOAD_LEN => kind == WRITE && rules.style == Style::Extended,
            _ => false,
        };
        if !allowed {
            return Some(ErrorCode::Invalid);
        }
    }
    if rules.read_only && [WRITE, TRIM, ZEROES].contains(&kind) {
        return Some(ErrorCode::NotPermitted);
    }
    if kind == FLUSH {
        return (offset != 0 || length != 0).then_some(ErrorCode::Invalid);
    }
    if kind == STATUS && (!rules.block_status || length == 0) {
        return Some(ErrorCode::Invalid);
    }
    if u128::from(offset) + u128::from(length) > u128::from(rules.size) {
        return Some(if [WRITE, ZEROES].contains(&kind) { ErrorCode::NoSpace } else { ErrorCode::Invalid });
    }
    match kind {
        READ if length > rules.max_payload => Some(ErrorCode::Overflow),
        WRITE if length > rules.max_payload => Some(ErrorCode::Invalid),
        READ | WRITE | TRIM | CACHE | ZEROES | STATUS => None,
        other => unreachable!("kind {other} was answered above"),
    }
}
