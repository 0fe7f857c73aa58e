//! Parsed requests equal the sent ones, any other message is an error, and replies have the kernel's layout.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use blkloom_fuse_wire::reply::{self, Attributes, FileSystem};
use blkloom_fuse_wire::*;
use proptest::prelude::*;

const WANTED: u64 = 1 | 1 << 5 | 1 << 15 | 1 << 21 | 1 << 22 | 1 << 30 | 1 << 36 | 1 << 39;

/// fuse_in_header and a body, as the kernel writes them.
fn message(opcode: u32, unique: u64, node: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = (40 + body.len() as u32).to_ne_bytes().to_vec();
    bytes.extend(opcode.to_ne_bytes());
    bytes.extend(unique.to_ne_bytes());
    bytes.extend(node.to_ne_bytes());
    [1000u32, 100, 4242, 0].iter().for_each(|number| bytes.extend(number.to_ne_bytes()));
    bytes.extend(body);
    bytes
}

/// Numbers of 4 and 8 bytes, one after the other.
macro_rules! body {
    ($($number:expr),* $(,)?) => {{
        let mut bytes = Vec::new();
        $(bytes.extend($number.to_ne_bytes());)*
        bytes
    }};
}

/// Parses a message about the file; panics if it is malformed.
fn operation(message: &[u8]) -> Operation<'_> {
    parse(message).unwrap().operation
}

fn reason(message: &[u8]) -> Reason {
    parse(message).unwrap_err().reason
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn init(major: u32, minor: u32, capabilities: u64) -> Init {
    let body = body![major, minor, 131_072u32, capabilities as u32, (capabilities >> 32) as u32];
    let whole = message(26, 2, 0, &[body, vec![0; 44]].concat());
    let Operation::Init(init) = operation(&whole) else { panic!("INIT is INIT") };
    init
}

fn settled(init: &Init, settings: &Settings) -> Negotiated {
    match init.negotiate(settings) {
        Ok(InitAnswer::Settled(negotiated)) => negotiated,
        other => panic!("{other:?}"),
    }
}

proptest! {
    #[test]
    fn a_header_is_taken_apart(unique: u64, node: u64) {
        let whole = message(99, unique, node, b"whatever");
        let expected =
            Header { unique: Unique(unique), opcode: 99, node, user: 1000, group: 100, process: 4242 };
        prop_assert_eq!(parse(&whole).unwrap(), Request { header: expected, operation: Operation::Unsupported });
    }

    #[test]
    fn reads_and_writes_say_where(fh: u64, offset: u64, size: u32, flags: u32, data: Vec<u8>, cached: bool) {
        let handle = Handle(fh);
        let read = message(15, 2, 1, &body![fh, offset, size, 7u32, 9u64, flags, 0u32]);
        prop_assert_eq!(operation(&read), Operation::Read { handle, offset, size, flags });
        let head = body![fh, offset, data.len() as u32, 2 | u32::from(cached), 9u64, flags, 0u32];
        let write = message(16, 2, 1, &[&head[..], &data].concat());
        prop_assert_eq!(operation(&write), Operation::Write { handle, offset, data: &data, flags, cached });
        prop_assert_eq!(&write[WRITE_DATA_OFFSET..], &data[..]);
    }

    #[test]
    fn a_write_has_as_much_data_as_it_says(stated: u32, data: Vec<u8>) {
        prop_assume!(stated as usize != data.len());
        let head = body![1u64, 0u64, stated, 0u32, 0u64, 0u32, 0u32];
        let write = message(16, 2, 1, &[&head[..], &data].concat());
        prop_assert_eq!(reason(&write), Reason::Data { stated, received: data.len() });
    }

    #[test]
    fn ranges_are_what_was_sent(fh: u64, offset: u64, length: u64, mode: u32) {
        let handle = Handle(fh);
        let fallocate = message(43, 2, 1, &body![fh, offset, length, mode, 0u32]);
        prop_assert_eq!(operation(&fallocate), Operation::Fallocate { handle, offset, length, mode });
        for (number, whence) in [(3u32, Whence::Data), (4, Whence::Hole)] {
            let seek = message(46, 2, 1, &body![fh, offset, number, 0u32]);
            prop_assert_eq!(operation(&seek), Operation::Seek { handle, offset, whence });
        }
    }

    #[test]
    fn attributes_that_are_not_set_are_left(bits in 0u32..1 << 12, size: u64, seconds: u64, nanoseconds in 0u32..1_000_000_000) {
        let times = body![seconds, seconds, seconds, nanoseconds, nanoseconds, nanoseconds];
        let rest = body![0o640u32, 0u32, 1u32, 2u32, 0u32];
        let whole = message(4, 2, 1, &[body![bits, 0u32, 77u64, size, 0u64], times, rest].concat());
        let Operation::SetAttributes(set) = operation(&whole) else { panic!("SETATTR is SETATTR") };
        let has = |bit: u32| bits >> bit & 1 == 1;
        let time = |to, now| match (has(now), has(to)) {
            (true, _) => Some(SetTime::Now),
            (_, true) => Some(SetTime::To(Duration::new(seconds, nanoseconds))),
            _ => None,
        };
        prop_assert_eq!(set, SetAttributes {
            handle: has(6).then_some(Handle(77)),
            size: has(3).then_some(size),
            mode: has(0).then_some(0o640),
            user: has(1).then_some(1),
            group: has(2).then_some(2),
            access_time: time(4, 7),
            modification_time: time(5, 8),
            change_time: has(10).then_some(SetTime::To(Duration::new(seconds, nanoseconds))),
        });
    }

    #[test]
    fn a_message_in_two_parts_is_what_it_is_in_one(
        opcode in prop_oneof![0u32..60, Just(16)],
        node in 0u64..3,
        body in prop::collection::vec(any::<u8>(), 0..200),
        stated in prop::option::of(0u32..300),
    ) {
        let mut whole = message(opcode, 2, node, &body);
        if let Some(stated) = stated {
            whole[..4].copy_from_slice(&stated.to_ne_bytes());
        }
        if opcode == 16 && whole.len() >= WRITE_DATA_OFFSET {
            let data = (whole.len() - WRITE_DATA_OFFSET) as u32;
            whole[56..60].copy_from_slice(&data.to_ne_bytes());
        }
        let (head, rest) = whole.split_at(whole.len().min(WRITE_DATA_OFFSET));
        let mut joined = Vec::new();
        prop_assert_eq!(parse_parts(head, rest, &mut joined), parse(&whole));
    }

    #[test]
    fn a_request_in_an_entry_is_what_it_is_as_a_message(
        opcode in prop_oneof![0u32..60, Just(16)],
        node in 0u64..3,
        body in prop::collection::vec(any::<u8>(), 0..128),
        data in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        // Names after the structure of an operation are ignored: a WRITE's data is not.
        let (mut body, data) = (body, if opcode == 16 { data } else { Vec::new() });
        if opcode == 16 {
            body.resize(40, 0);
            body[16..20].copy_from_slice(&(data.len() as u32).to_ne_bytes());
        }
        let whole = message(opcode, 77, node, &[&body[..], &data].concat());
        let header = entry(&whole[..40], &body, 99, data.len() as u32);
        let mut payload = data;
        payload.resize(4096, 0xaa);
        prop_assert_eq!(ring::parse(&header, &payload), parse(&whole));
        prop_assert_eq!(ring::commit(&header), 99);
    }

    #[test]
    fn an_entry_of_garbage_never_panics_and_can_be_answered(
        parts in prop::collection::vec(any::<u8>(), ring::HEADER_SIZE),
        stated in 0u32..500,
        length in 0u32..500,
        payload in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let mut header: ring::Header = parts.try_into().unwrap();
        header[..4].copy_from_slice(&stated.to_ne_bytes());
        header[272..276].copy_from_slice(&length.to_ne_bytes());
        if let Err(malformed) = ring::parse(&header, &payload) {
            prop_assert_eq!(malformed.unique, Some(Unique(u64_at(&header, 8))));
        }
    }

    #[test]
    fn garbage_is_an_error_or_a_request_of_its_own_length(garbage in prop::collection::vec(any::<u8>(), 0..200)) {
        match parse(&garbage) {
            Ok(_) => prop_assert_eq!(u32_at(&garbage, 0) as usize, garbage.len()),
            Err(malformed) => prop_assert_eq!(malformed.unique.is_some(), garbage.len() >= 40),
        }
    }

    #[test]
    fn a_body_of_garbage_never_panics(
        opcode in prop_oneof![0u32..60, Just(4096)],
        node in 0u64..3,
        body in prop::collection::vec(any::<u8>(), 0..120),
    ) {
        let whole = message(opcode, 0x8000_0000_0000_0002, node, &body);
        if let Err(malformed) = parse(&whole) {
            prop_assert_eq!(malformed.unique, Some(Unique(0x8000_0000_0000_0002)), "its caller can be answered");
            prop_assert_eq!(malformed.opcode, opcode);
            prop_assert!(malformed.to_string().starts_with("FUSE request "));
        }
    }

    #[test]
    fn a_request_that_is_cut_short_is_an_error(
        (opcode, size) in prop::sample::select(vec![
            (3u32, 16usize), (4, 88), (14, 8), (15, 40), (16, 40), (18, 24), (20, 16), (25, 24), (26, 16), (34, 8),
            (36, 8), (43, 32), (46, 24),
        ]),
        missing in 1usize..88,
    ) {
        prop_assume!(missing <= size);
        let received = size - missing;
        let whole = message(opcode, 2, 1, &vec![0; received]);
        prop_assert_eq!(reason(&whole), Reason::Body { needed: size, received });
    }

    #[test]
    fn what_is_negotiated_is_offered_and_survives_its_bytes(
        capabilities: u64,
        minor in 28u32..60,
        max_background: u16,
        max_transfer: u32,
        page_size in prop::sample::select(vec![0u32, 1, 4096, 16384, 65536]),
        over_ring: bool,
    ) {
        let init = init(7, minor, capabilities | 1 << 30);
        let negotiated = settled(&init, &Settings { max_background, max_transfer, page_size, over_ring });
        let ring = over_ring && init.capabilities >> 41 & 1 == 1;
        let wanted = if ring { WANTED & !(1 << 39) | 1 << 41 } else { WANTED };
        prop_assert_eq!(negotiated.capabilities, init.capabilities & wanted, "a ring knows no RESEND");
        prop_assert!(negotiated.minor <= minor && negotiated.max_background >= 1);
        prop_assert!(negotiated.congestion_threshold <= negotiated.max_background);
        prop_assert!(negotiated.max_write >= 4096 && negotiated.max_pages >= 1);
        prop_assert!(negotiated.read_buffer_size() >= WRITE_DATA_OFFSET + negotiated.max_write as usize);
        prop_assert_eq!(Negotiated::from_bytes(&negotiated.to_bytes()), Ok(negotiated));
    }

    #[test]
    fn bytes_that_nobody_negotiated_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
        // Random bytes have unknown capabilities, or another version.
        prop_assert!(Negotiated::from_bytes(&bytes).is_err());
    }

    #[test]
    fn one_wrong_byte_is_refused_or_read_as_it_is(at in 0usize..64, value: u8) {
        let mut bytes = settled(&init(7, 45, u64::MAX), &Settings::default()).to_bytes();
        bytes[at] = value;
        if let Ok(negotiated) = Negotiated::from_bytes(&bytes) {
            prop_assert_eq!(negotiated.to_bytes(), bytes);
        }
    }

    #[test]
    fn replies_say_their_length_and_whose_they_are(unique: u64, offset: u64, written: u32, number in 1i32..512) {
        let unique = Unique(unique);
        let negotiated = settled(&init(7, 45, u64::MAX), &Settings::default());
        let attributes = attributes();
        let system = FileSystem { block_size: 4096, blocks: 10, free_blocks: 3 };
        let replies: Vec<Vec<u8>> = vec![
            reply::done(unique).into(),
            reply::initialized(unique, &negotiated).into(),
            reply::other_version(unique).into(),
            reply::attributes(unique, &attributes, Duration::ZERO).into(),
            reply::opened(unique, Handle(offset)).into(),
            reply::written(unique, written).into(),
            reply::found(unique, offset).into(),
            reply::file_system(unique, &system).into(),
        ];
        for bytes in &replies {
            prop_assert_eq!((u32_at(bytes, 0) as usize, u32_at(bytes, 4), u64_at(bytes, 8)), (bytes.len(), 0, unique.0));
        }
        let error = reply::error(unique, Errno::new(number).unwrap());
        prop_assert_eq!((u32_at(&error, 0), u32_at(&error, 4) as i32, u64_at(&error, 8)), (16, -number, unique.0));
        let data = reply::data(unique, written as usize);
        prop_assert_eq!(data.map(|head| u32_at(&head, 0)), written.checked_add(16));
    }
}

/// fuse_uring_req_header.
fn entry(head: &[u8], body: &[u8], commit: u64, length: u32) -> ring::Header {
    let mut bytes = [0; ring::HEADER_SIZE];
    bytes[..40].copy_from_slice(head);
    bytes[128..128 + body.len()].copy_from_slice(body);
    bytes[264..272].copy_from_slice(&commit.to_ne_bytes());
    bytes[272..276].copy_from_slice(&length.to_ne_bytes());
    bytes
}

fn attributes() -> Attributes {
    Attributes {
        size: 1 << 40,
        allocated: 513,
        mode: 0o100_640,
        user: 1000,
        group: 100,
        access_time: Duration::new(1, 10),
        modification_time: Duration::new(2, 20),
        change_time: Duration::new(3, 30),
        block_size: 512,
    }
}

#[test]
fn requests_without_numbers_of_interest_are_known() {
    assert_eq!(operation(&message(3, 2, 1, &[0; 16])), Operation::GetAttributes);
    assert_eq!(operation(&message(14, 2, 1, &body![2u32, 0u32])), Operation::Open { flags: 2 });
    assert_eq!(operation(&message(17, 2, 1, &[])), Operation::StatFs);
    let release = message(18, 2, 1, &body![5u64, 2u32, 0u32, 0u64]);
    assert_eq!(operation(&release), Operation::Release { handle: Handle(5), flags: 2 });
    for (flags, data_only) in [(0u32, false), (1, true)] {
        let fsync = message(20, 2, 1, &body![5u64, flags, 0u32]);
        assert_eq!(operation(&fsync), Operation::Fsync { handle: Handle(5), data_only });
    }
    assert_eq!(operation(&message(25, 2, 1, &body![5u64, 0u64, 0u64])), Operation::Flush { handle: Handle(5) });
    assert_eq!(operation(&message(34, 2, 1, &body![4u32, 0u32])), Operation::Access { mask: 4 });
    assert_eq!(operation(&message(36, 3, 0, &body![2u64])), Operation::Interrupt { interrupted: Unique(2) });
    assert_eq!(operation(&message(38, 2, 0, &[])), Operation::Destroy);
    assert_eq!(operation(&message(2, 2, 1, &body![1u64])), Operation::Forget);
    assert_eq!(operation(&message(42, 2, 0, &body![1u32, 0u32, 1u64, 1u64])), Operation::Forget);
}

#[test]
fn what_a_file_has_not_is_unsupported() {
    // LOOKUP, SETXATTR, GETXATTR, LISTXATTR, REMOVEXATTR, OPENDIR, GETLK, CREATE, BMAP, IOCTL, POLL, COPY_FILE_RANGE,
    // SYNCFS, STATX, and one of the future
    for opcode in [1, 21, 22, 23, 24, 27, 31, 35, 37, 39, 40, 47, 50, 52, 9999] {
        assert_eq!(operation(&message(opcode, 2, 1, b"name\0")), Operation::Unsupported, "{opcode}");
    }
}

#[test]
fn a_message_that_is_no_request_is_refused() {
    assert_eq!(reason(&[0; 39]), Reason::NoHeader { received: 39 });
    let mut longer = message(17, 2, 1, &[]);
    longer.push(0);
    assert_eq!(reason(&longer), Reason::Length { stated: 40, received: 41 });
    assert_eq!(reason(&message(17, 2, 2, &[])), Reason::Node { node: 2 });
    let seek = message(46, 2, 1, &body![1u64, 0u64, 2u32, 0u32]);
    assert_eq!(reason(&seek), Reason::Whence { whence: 2 });
    let late = [body![1u32 << 4, 0u32], vec![0; 48], body![1_000_000_000u32], vec![0; 28]].concat();
    assert_eq!(reason(&message(4, 2, 1, &late)), Reason::Time { nanoseconds: 1_000_000_000 });
}

#[test]
fn a_resent_request_is_told_by_its_unique() {
    let unique = Unique(1 << 63 | 42);
    assert!(unique.is_resent() && !unique.origin().is_resent());
    assert_eq!(unique.origin(), Unique(42));
    assert_eq!(u64_at(&reply::done(unique), 8), 1 << 63 | 42, "the reply repeats all of it");
}

#[test]
fn init_of_linux_6_18_is_settled_at_one_mebibyte() {
    // Received from Linux 6.18.44.
    let init = init(7, 45, 0x5fd_73ff_fffb);
    let negotiated = settled(&init, &Settings::default());
    assert_eq!(negotiated.capabilities, WANTED);
    assert_eq!((negotiated.max_write, negotiated.max_pages), (1 << 20, 256));
    assert_eq!((negotiated.max_background, negotiated.congestion_threshold), (256, 192));
    assert_eq!((negotiated.minor, negotiated.max_readahead), (40, 131_072));
    assert!(negotiated.has(capability::HAS_RESEND | capability::DIRECT_IO_ALLOW_MMAP));
    assert_eq!(negotiated.read_buffer_size(), (1 << 20) + 80);
}

#[test]
fn init_of_an_older_kernel_has_less() {
    // Linux 6.1: 7.37, without bits 36 to 39.
    let negotiated = settled(&init(7, 37, 0xb_73ff_fffb), &Settings::default());
    assert!(!negotiated.has(capability::HAS_RESEND) && negotiated.minor == 37);
    // INIT had 16 bytes before 7.36.
    let short = message(26, 2, 0, &body![7u32, 31u32, 65_536u32, 0x3u32]);
    let Operation::Init(short) = operation(&short) else { panic!("INIT is INIT") };
    assert_eq!(short, Init { major: 7, minor: 31, max_readahead: 65_536, capabilities: 3 });
    let negotiated = settled(&short, &Settings::default());
    assert_eq!((negotiated.max_write, negotiated.max_pages), (128 << 10, 32), "without MAX_PAGES: 32 pages");
}

#[test]
fn other_versions_are_answered_as_the_protocol_says() {
    assert_eq!(init(8, 0, 0).negotiate(&Settings::default()), Ok(InitAnswer::OtherVersion));
    assert_eq!(init(7, 27, 0).negotiate(&Settings::default()), Err(Incompatible { major: 7, minor: 27 }));
    assert_eq!(init(6, 99, 0).negotiate(&Settings::default()), Err(Incompatible { major: 6, minor: 99 }));
    let reply = reply::other_version(Unique(2));
    assert_eq!((u32_at(&reply, 0), u32_at(&reply, 16)), (80, 7));
}

#[test]
fn replies_are_laid_out_as_the_kernel_reads_them() {
    let bytes = reply::attributes(Unique(2), &attributes(), Duration::new(5, 6));
    assert_eq!((u64_at(&bytes, 16), u32_at(&bytes, 24)), (5, 6), "how long they are valid");
    assert_eq!((u64_at(&bytes, 32), u64_at(&bytes, 40), u64_at(&bytes, 48)), (1, 1 << 40, 2), "inode, size, blocks");
    assert_eq!([56, 64, 72].map(|at| u64_at(&bytes, at)), [1, 2, 3]);
    assert_eq!([80, 84, 88].map(|at| u32_at(&bytes, at)), [10, 20, 30]);
    assert_eq!([92, 96, 100, 104, 108, 112, 116].map(|at| u32_at(&bytes, at)), [0o100_640, 1, 1000, 100, 0, 512, 0]);
    let bytes = reply::opened(Unique(2), Handle(9));
    assert_eq!((u64_at(&bytes, 16), u32_at(&bytes, 24), u32_at(&bytes, 28)), (9, 0x41, 0));
    let bytes = reply::file_system(Unique(2), &FileSystem { block_size: 4096, blocks: 10, free_blocks: 3 });
    assert_eq!([16, 24, 32, 40, 48].map(|at| u64_at(&bytes, at)), [10, 3, 3, 1, 0]);
    assert_eq!([56, 60, 64].map(|at| u32_at(&bytes, at)), [4096, 255, 4096]);
    let bytes = reply::initialized(Unique(2), &settled(&init(7, 45, u64::MAX), &Settings::default()));
    assert_eq!([16, 20, 24].map(|at| u32_at(&bytes, at)), [7, 40, 131_072]);
    assert_eq!((u32_at(&bytes, 28), u32_at(&bytes, 48)), (WANTED as u32, (WANTED >> 32) as u32));
    assert_eq!((u32_at(&bytes, 32), u32_at(&bytes, 36), u32_at(&bytes, 40)), (192 << 16 | 256, 1 << 20, 1));
    assert_eq!(u32_at(&bytes, 44), 256, "pages");
}

#[test]
fn a_reply_in_an_entry_and_its_command_are_laid_out_as_the_kernel_reads_them() {
    let mut header = [0xaa; ring::HEADER_SIZE];
    ring::answer(&mut header, &reply::data(Unique(7), 4096).unwrap(), 4096);
    assert_eq!((u32_at(&header, 0), u32_at(&header, 4), u64_at(&header, 8)), (4112, 0, 7));
    assert_eq!((u32_at(&header, 272), u64_at(&header, 264)), (4096, 0xaaaa_aaaa_aaaa_aaaa));
    let command = ring::command(3, 99);
    assert_eq!((u64_at(&command, 0), u64_at(&command, 8), u64_at(&command, 16)), (0, 99, 3));
    let negotiated = settled(&init(7, 45, u64::MAX), &Settings { over_ring: true, ..Settings::default() });
    assert_eq!((negotiated.minor, ring::payload_size(&negotiated, 4096)), (42, 1 << 20));
    let small = Settings { max_transfer: 4096, over_ring: true, ..Settings::default() };
    assert_eq!(ring::payload_size(&settled(&init(7, 45, u64::MAX), &small), 4096), 8192);
}

#[test]
fn notifications_have_a_code_for_an_error_and_no_unique() {
    let bytes = reply::resend();
    assert_eq!((u32_at(&bytes, 0), u32_at(&bytes, 4), u64_at(&bytes, 8)), (16, 7, 0));
    let bytes = reply::invalidate(-1, 4096);
    assert_eq!((u32_at(&bytes, 0), u32_at(&bytes, 4), u64_at(&bytes, 8)), (40, 2, 0));
    assert_eq!([16, 24, 32].map(|at| u64_at(&bytes, at)), [1, u64::MAX, 4096]);
}

#[test]
fn an_errno_is_one_that_the_kernel_takes() {
    assert_eq!([0, -5, 512, i32::MAX].map(Errno::new), [None; 4]);
    assert_eq!((Errno::new(5), Errno::new(511).map(Errno::number)), (Some(Errno::IO), Some(511)));
}
