//! FUSE messages: any bytes are a request whose every field is where the kernel's structures have it, or malformed in a
//! way that can be answered; and what INIT settles survives being stored.
#![no_main]

use blkloom_fuse_wire::{
    Handle, Init, InitAnswer, Malformed, Negotiated, Operation, Request, SetAttributes, SetTime, Settings, Unique,
    WRITE_DATA_OFFSET, Whence, capability, parse, ring,
};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;

const HEADER: usize = 40;

#[derive(Arbitrary, Debug)]
struct Case<'a> {
    opcode: u8,
    /// Otherwise another, which no request about the file may name.
    root: bool,
    unique: u64,
    /// Bytes that the header counts too many or too few.
    wrong: i8,
    /// Of the data of a WRITE, which says how long it is.
    stated: bool,
    max_background: u16,
    max_transfer: u32,
    page_shift: u8,
    over_ring: bool,
    body: &'a [u8],
}

fuzz_target!(|case: Case<'_>| {
    let _anything = parse(case.body);
    let mut entry: ring::Header = [0; ring::HEADER_SIZE];
    entry.iter_mut().zip(case.body).for_each(|(at, byte)| *at = *byte);
    let _anything = ring::parse(&entry, case.body);
    let mut message = Vec::new();
    let length = (HEADER + case.body.len()) as u32;
    message.extend(length.wrapping_add_signed(case.wrong.into()).to_ne_bytes());
    message.extend(u32::from(case.opcode % 64).to_ne_bytes());
    message.extend(case.unique.to_ne_bytes());
    message.extend((if case.root { 1u64 } else { case.unique }).to_ne_bytes());
    message.extend([1u32, 2, 3, 4].into_iter().flat_map(u32::to_ne_bytes));
    message.extend(case.body);
    if case.stated && message.len() >= WRITE_DATA_OFFSET {
        let data = (message.len() - WRITE_DATA_OFFSET) as u32;
        message[HEADER + 16..HEADER + 20].copy_from_slice(&data.to_ne_bytes());
    }
    in_an_entry(&message, case.wrong == 0);
    match parse(&message) {
        Ok(request) => {
            assert!(case.wrong == 0);
            check(&request, &message);
            if let Operation::Init(init) = request.operation {
                let page_size = 4096 << (case.page_shift % 5);
                let (max_background, max_transfer) = (case.max_background, case.max_transfer);
                negotiate(&init, &Settings { max_background, max_transfer, page_size, over_ring: case.over_ring });
            }
        }
        Err(Malformed { unique, opcode, .. }) => {
            assert_eq!(unique, Some(Unique(case.unique)), "its caller must be told");
            assert_eq!(opcode, u32::from(case.opcode % 64));
        }
    }
    if let Ok(negotiated) = Negotiated::from_bytes(case.body) {
        assert_eq!(negotiated.to_bytes(), case.body);
    }
});

/// A message is the same request where it lies in an entry of a ring, if it fits one.
fn in_an_entry(message: &[u8], whole: bool) {
    let write = message.len() >= WRITE_DATA_OFFSET && message[4] == 16;
    let (head, payload) = message.split_at(if write { WRITE_DATA_OFFSET } else { message.len() });
    let body = &head[HEADER..];
    if !whole || body.len() > 128 {
        return;
    }
    let mut entry: ring::Header = [0; ring::HEADER_SIZE];
    entry[..HEADER].copy_from_slice(&head[..HEADER]);
    entry[128..128 + body.len()].copy_from_slice(body);
    entry[272..276].copy_from_slice(&(payload.len() as u32).to_ne_bytes());
    assert_eq!(ring::parse(&entry, payload), parse(message));
}

/// Each field of a request, against the bytes at its place in fuse.h.
fn check(request: &Request<'_>, message: &[u8]) {
    let u32_at = |at: usize| u32::from_ne_bytes(message[at..at + 4].try_into().expect("4 bytes"));
    let u64_at = |at: usize| u64::from_ne_bytes(message[at..at + 8].try_into().expect("8 bytes"));
    let handle_at = |at| Handle(u64_at(at));
    let header = request.header;
    assert_eq!((header.opcode, header.unique, header.node), (u32_at(4), Unique(u64_at(8)), u64_at(16)));
    assert_eq!((header.user, header.group, header.process), (1, 2, 3));
    let expected = match header.opcode {
        2 | 42 => Operation::Forget,
        3 => Operation::GetAttributes,
        4 => Operation::SetAttributes(set_attributes(message)),
        14 => Operation::Open { flags: u32_at(40) },
        15 => Operation::Read { handle: handle_at(40), offset: u64_at(48), size: u32_at(56), flags: u32_at(72) },
        16 => {
            assert_eq!(u32_at(56) as usize, message.len() - WRITE_DATA_OFFSET);
            Operation::Write {
                handle: handle_at(40),
                offset: u64_at(48),
                data: &message[WRITE_DATA_OFFSET..],
                flags: u32_at(72),
                cached: u32_at(60) & 1 == 1,
            }
        }
        17 => Operation::StatFs,
        18 => Operation::Release { handle: handle_at(40), flags: u32_at(48) },
        20 => Operation::Fsync { handle: handle_at(40), data_only: u32_at(48) & 1 == 1 },
        25 => Operation::Flush { handle: handle_at(40) },
        26 => {
            let high = if u32_at(52) >> 30 & 1 == 1 { u32_at(56) } else { 0 };
            let capabilities = u64::from(high) << 32 | u64::from(u32_at(52));
            Operation::Init(Init { major: u32_at(40), minor: u32_at(44), max_readahead: u32_at(48), capabilities })
        }
        34 => Operation::Access { mask: u32_at(40) },
        36 => Operation::Interrupt { interrupted: Unique(u64_at(40)) },
        38 => Operation::Destroy,
        43 => Operation::Fallocate { handle: handle_at(40), offset: u64_at(48), length: u64_at(56), mode: u32_at(64) },
        46 => {
            let whence = if u32_at(56) == 3 { Whence::Data } else { Whence::Hole };
            assert!(matches!(u32_at(56), 3 | 4));
            Operation::Seek { handle: handle_at(40), offset: u64_at(48), whence }
        }
        _ => Operation::Unsupported,
    };
    assert_eq!(request.operation, expected);
    let about_the_file = [3, 4, 14, 15, 16, 17, 18, 20, 25, 34, 43, 46].contains(&header.opcode);
    assert!(header.node == 1 || !about_the_file, "node {} is not the file", header.node);
}

fn set_attributes(message: &[u8]) -> SetAttributes {
    let u32_at = |at: usize| u32::from_ne_bytes(message[at..at + 4].try_into().expect("4 bytes"));
    let u64_at = |at: usize| u64::from_ne_bytes(message[at..at + 8].try_into().expect("8 bytes"));
    let has = |bit: u32| u32_at(40) >> bit & 1 == 1;
    let time = |index: usize, to: u32, now: Option<u32>| {
        let (seconds, nanoseconds) = (u64_at(72 + 8 * index), u32_at(96 + 4 * index));
        match now.is_some_and(has) {
            true => Some(SetTime::Now),
            false => has(to).then(|| SetTime::To(std::time::Duration::new(seconds, nanoseconds))),
        }
    };
    SetAttributes {
        handle: has(6).then(|| Handle(u64_at(48))),
        size: has(3).then(|| u64_at(56)),
        mode: has(0).then(|| u32_at(108)),
        user: has(1).then(|| u32_at(116)),
        group: has(2).then(|| u32_at(120)),
        access_time: time(0, 4, Some(7)),
        modification_time: time(1, 5, Some(8)),
        change_time: time(2, 10, None),
    }
}

/// What is settled is in bounds, no more than was offered, and the same for who takes the connection over.
fn negotiate(init: &Init, settings: &Settings) {
    let Ok(InitAnswer::Settled(negotiated)) = init.negotiate(settings) else {
        assert!(init.major != 7 || init.minor < 28);
        return;
    };
    assert_eq!(negotiated.capabilities & !init.capabilities, 0, "more than the kernel offers");
    let ring = negotiated.has(capability::OVER_IO_URING);
    assert!(negotiated.minor <= init.minor.min(if ring { 42 } else { 40 }));
    assert!(!ring || settings.over_ring && !negotiated.has(capability::HAS_RESEND));
    let room = u64::from(negotiated.max_pages) * u64::from(settings.page_size);
    assert!(u64::from(negotiated.max_write) <= room, "a write of {} fits {room} bytes", negotiated.max_write);
    assert!(negotiated.read_buffer_size() >= WRITE_DATA_OFFSET + negotiated.max_write as usize);
    assert!((1..=negotiated.max_background).contains(&negotiated.congestion_threshold));
    assert_eq!(Negotiated::from_bytes(&negotiated.to_bytes()), Ok(negotiated));
}
