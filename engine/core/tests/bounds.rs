//! Bounds checks: maps that reach past a region, and requests with unsuitable memory, are refused.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use std::sync::Arc;
use std::time::Instant;

use blkloom_core::{Device, Engine, Flags, Kinds, Map, Mapping, Memory, Op, OutOfBounds, Owner, Request};
use blkloom_io::{Buffer, Slice, Source};
use blkloom_map::{Extent, Segment};
use rig::*;

const EINVAL: Errno = Errno::INVAL;

/// Attempts a transfer of 4096 bytes on the fast path.
fn attempt(engine: &Engine, device: &Arc<Device>, op: Op, offset: u64, memory: Memory) -> Option<Result<(), Errno>> {
    let (device, flags, owner, started) = (device.clone(), Flags::default(), Owner::None, Instant::now());
    engine.attempt(&mut Request {
        device,
        op,
        offset,
        len: 4096,
        flags,
        memory,
        owner,
        started,
        context: None,
        done: 0,
    })
}

fn map(len: u64, extent: Extent<Kinds>) -> Result<(), OutOfBounds> {
    let segments = vec![Segment { start: 0, end: len, owner: 0, extent }];
    Mapping::new(Map::new(segments, vec![]).unwrap()).map(drop)
}

#[test]
fn a_map_stays_inside_of_what_it_names() {
    let place = region(8192);
    assert_eq!(map(4096, memory(&place, 4096)), Ok(()));
    let refused = |offset| Err(OutOfBounds::Region { start: 0, len: 4096, offset, size: 8192 });
    for offset in [4097, 8192, 1 << 62, u64::MAX] {
        assert_eq!(map(4096, memory(&place, offset)), refused(offset));
    }
    let striped =
        |offset| Extent::Stripes { chunk: 4096, legs: vec![memory(&place, 0), memory(&place, offset)].into() };
    assert_eq!(map(16_384, striped(0)), Ok(()));
    assert!(map(16_384, striped(1)).is_err(), "each leg has half of it");
    assert!(map(20_480, striped(0)).is_err(), "one leg has the last chunk, too");
    let file = file_in_memory(4096);
    let largest = (1 << 63) - 4096;
    assert_eq!(map(4095, data(&file, largest)), Ok(()), "a file may grow");
    assert_eq!(map(4096, data(&file, largest)), Err(OutOfBounds::Offset { start: 0, len: 4096, offset: largest }));
}

#[test]
fn memory_that_does_not_fit_its_request_is_refused() {
    for (_, engine) in engines() {
        let device = device(mapping(vec![(8192, memory(&region(8192), 0))], vec![]));
        let mut bytes = [0; 4095];
        let whole = promised(&mut bytes);
        let wrong: [(Op, &dyn Fn() -> Memory); 8] = [
            (Op::Read, &|| Memory::None),
            (Op::Read, &|| Memory::owned(Buffer::new(4095))),
            (Op::Read, &|| Memory::Source(Source::from(&[0; 4096][..]))),
            (Op::Write, &|| Memory::Source(Source::from(&[0; 4095][..]))),
            (Op::Write, &|| Memory::Borrowed(Slice::empty())),
            (Op::Read, &|| Memory::Pieces(vec![])),
            (Op::Read, &|| Memory::Pieces(vec![whole.part(95, 4000), whole.part(0, 95)])),
            (Op::Write, &|| Memory::Pieces(vec![whole, Slice::empty()])),
        ];
        for (op, memory) in wrong {
            assert_eq!(by_queue(&engine, &device, op, 0, memory(), 4096, false), Err(EINVAL), "{op:?}");
            assert_eq!(attempt(&engine, &device, op, 0, memory()), Some(Err(EINVAL)), "{op:?}");
        }
        let write = Memory::Source(Source::from(&[7; 4096][..]));
        assert_eq!(by_queue(&engine, &device, Op::Write, 4096, write, 4096, false), Ok(()));
        let mut bytes = [0; 4096];
        read(&engine, &device, 4096, &mut bytes).unwrap();
        assert_eq!(bytes, [7; 4096]);
        assert_eq!(device.stats().totals().in_flight, 0);
    }
}

/// If memory is longer, only the length of the request is used.
#[test]
fn memory_may_be_longer_than_its_request_and_in_pieces() {
    for (_, engine) in engines() {
        let device = device(mapping(vec![(8192, memory(&region(8192), 0))], vec![]));
        write(&engine, &device, 0, &[7; 8192], false).unwrap();
        let mut bytes = vec![0; 12_288];
        let whole = promised(&mut bytes);
        assert_eq!(attempt(&engine, &device, Op::Read, 4096, Memory::Borrowed(whole)), Some(Ok(())));
        assert_eq!(whole.to_vec(), [[7; 4096], [0; 4096], [0; 4096]].concat());
        whole.zero();
        let pieces = [(8192, 1), (0, 0), (0, 4095), (4096, 4096)].map(|(at, len)| whole.part(at, len));
        assert_eq!(attempt(&engine, &device, Op::Read, 4096, Memory::Pieces(pieces.to_vec())), None, "not at once");
        assert_eq!(by_queue(&engine, &device, Op::Read, 4096, Memory::Pieces(pieces.to_vec()), 4096, false), Ok(()));
        assert_eq!(pieces.map(|piece| piece.to_vec()), [vec![7], vec![], vec![7; 4095], vec![0; 4096]]);
        whole.zero();
        let pieces = [whole.part(0, 4095), whole.part(8000, 1), whole];
        assert_eq!(by_queue(&engine, &device, Op::Write, 0, Memory::Pieces(pieces.to_vec()), 4096, false), Ok(()));
        let mut bytes = vec![1; 8192];
        read(&engine, &device, 0, &mut bytes).unwrap();
        assert_eq!(bytes, [[0; 4096], [7; 4096]].concat());
    }
}
