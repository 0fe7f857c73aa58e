//! The effect of each operation on each kind of extent, compared with a slow model; on the caller's thread, and through
//! a queue.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use blkloom_core::filter::Delay;
use blkloom_core::{
    Answer, Backend, Device, Direction, Engine, Flags, Kinds, Limits, Memory, Op, Operation, OperationId, Transfer,
};
use blkloom_map::{Extent, Filtered};
use rig::*;

const LEN: u64 = 16_384;
const ROUNDS: u64 = 2200;
/// The errno with which the test's target answers faults.
const REFUSED: Errno = Errno::PERM;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    File,
    ReadOnlyFile,
    Memory,
    ForgetfulZeros,
    Zeros,
    Error,
    Fault,
    Device,
    ReadOnlyDevice,
    Backend,
    ReadOnlyBackend,
    /// The same memory for both legs.
    Delay,
    /// Zeros for reads, errors for everything else.
    DelayOfTwo,
}

const KINDS: [Kind; 13] = [
    Kind::File,
    Kind::ReadOnlyFile,
    Kind::Memory,
    Kind::ForgetfulZeros,
    Kind::Zeros,
    Kind::Error,
    Kind::Fault,
    Kind::Device,
    Kind::ReadOnlyDevice,
    Kind::Backend,
    Kind::ReadOnlyBackend,
    Kind::Delay,
    Kind::DelayOfTwo,
];

const OPS: [Op; 6] = [Op::Read, Op::Write, Op::WriteZeroes, Op::Discard, Op::Cache, Op::Extents];

impl Kind {
    fn extent(self, in_memory: bool) -> Extent<Kinds> {
        let file = || if in_memory { file_in_memory(LEN) } else { file(LEN, true) };
        let below = || device(mapping(vec![(LEN, memory(&region(LEN), 0))], vec![]));
        match self {
            Kind::File => data(&file(), 0),
            Kind::ReadOnlyFile => Extent::Data { file: file(), offset: 0, writable: false },
            Kind::Memory => memory(&region(LEN), 0),
            Kind::ForgetfulZeros => Extent::Zero { discard_writes: true },
            Kind::Zeros => Extent::Zero { discard_writes: false },
            Kind::Error => Extent::Error(EIO),
            Kind::Fault => Extent::Fault,
            Kind::Device => Extent::Device { device: below(), offset: 0, writable: true },
            Kind::ReadOnlyDevice => Extent::Device { device: below(), offset: 0, writable: false },
            Kind::Backend => Extent::Backend { backend: Bytes::new(), offset: 0, writable: true },
            Kind::ReadOnlyBackend => Extent::Backend { backend: Bytes::new(), offset: 0, writable: false },
            Kind::Delay => {
                let region = region(LEN);
                delay([memory(&region, 0), memory(&region, 0)])
            }
            Kind::DelayOfTwo => delay([Kind::ForgetfulZeros.extent(in_memory), Kind::Error.extent(in_memory)]),
        }
    }

    /// The model: how an operation ends, and whether it changes bytes.
    fn expects(self, op: Op) -> (Result<(), Errno>, bool) {
        match (op, self) {
            (Op::Cache | Op::Extents, Kind::Error) | (Op::Cache, _) => (Ok(()), false),
            (_, Kind::Error) => (Err(EIO), false),
            (_, Kind::DelayOfTwo) if op.writes() => (Err(EIO), false),
            (_, Kind::Fault) => (Err(REFUSED), false),
            (Op::Read | Op::Extents, _) => (Ok(()), false),
            (_, Kind::File | Kind::Memory | Kind::Device | Kind::Backend | Kind::Delay) => (Ok(()), true),
            (_, Kind::ForgetfulZeros | Kind::DelayOfTwo) => (Ok(()), false),
            (_, Kind::ReadOnlyFile | Kind::ReadOnlyDevice | Kind::ReadOnlyBackend | Kind::Zeros) => {
                (Err(REFUSED), false)
            }
        }
    }
}

fn delay(legs: [Extent<Kinds>; 2]) -> Extent<Kinds> {
    let filter = Arc::new(Delay::new(Duration::from_micros(50), Duration::ZERO));
    let [reads, others] = legs;
    Extent::Filtered(Arc::new(Filtered { filter, legs: [reads, others, Extent::Fault] }))
}

/// A backend with its bytes in memory. It gets requests in pieces.
struct Bytes(Mutex<Vec<u8>>);

impl Bytes {
    fn new() -> Arc<Bytes> {
        Arc::new(Bytes(Mutex::new(vec![0; LEN as usize])))
    }
}

impl Backend for Bytes {
    fn limits(&self) -> Limits {
        Limits { longest: 5000, most: 4, most_bytes: 1 << 20 }
    }

    fn submit(&self, mut operation: Operation) {
        let mut bytes = self.0.lock().unwrap();
        let found = &mut bytes[operation.offset as usize..(operation.offset + operation.len) as usize];
        let answer = match operation.op {
            Op::Read => Ok(Some(found.to_vec())),
            Op::Write => {
                found.copy_from_slice(operation.payload());
                Ok(None)
            }
            Op::Discard | Op::WriteZeroes => {
                found.fill(0);
                Ok(None)
            }
            Op::Flush => Ok(None),
            other => panic!("a backend is asked for {other:?}"),
        };
        operation.complete(answer);
    }

    fn cancel(&self, _id: OperationId) {}
}

/// Closes its device when dropped, so that the target's thread ends even if the test fails.
struct Closing<'a>(&'a Device);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.0.close();
    }
}

struct Disk<'a> {
    engine: &'a Engine,
    device: &'a Arc<Device>,
    model: Vec<Vec<u8>>,
}

impl Disk<'_> {
    /// One operation on a part of one extent.
    fn ask(&mut self, random: &mut Random, name: &str) {
        let index = random.below(KINDS.len() as u64) as usize;
        let (kind, op) = (KINDS[index], OPS[random.below(OPS.len() as u64) as usize]);
        let from = random.below(LEN);
        let len = random.below(LEN - from) + 1;
        let (offset, range) = (index as u64 * LEN + from, from as usize..(from + len) as usize);
        let flags = Flags { fua: random.one_in(4), unmap: random.one_in(2), ..Flags::default() };
        let (expected, changes) = kind.expects(op);
        let queued = random.one_in(2);
        let what = format!("{op:?} of {len} at {from} of {kind:?}, {flags:?}, queued {queued}, {name}");
        let mut bytes = vec![if op == Op::Write { random.next() as u8 } else { 0xaa }; len as usize];
        let transfer = |direction| self.engine.transfer(self.device, Transfer { direction, offset }, flags.fua);
        let result = match op {
            Op::Extents => return self.check_extents(kind, expected, index, (offset, len), &what),
            Op::Read | Op::Write if queued => {
                let memory = Memory::Borrowed(promised(&mut bytes));
                by_queue(self.engine, self.device, op, offset, memory, len, flags.fua)
            }
            Op::Read => transfer(Direction::Read((&mut bytes[..]).into())),
            Op::Write => transfer(Direction::Write(bytes[..].into())),
            _ if queued => by_queue(self.engine, self.device, op, offset, Memory::None, len, flags.fua),
            _ => command(self.engine, self.device, op, offset, len, flags),
        };
        assert_eq!(result, expected, "{what}");
        let model = &mut self.model[index][range];
        if op == Op::Read && expected.is_ok() {
            assert!(bytes == model, "{what}");
        }
        if changes {
            match op {
                Op::Write => model.copy_from_slice(&bytes),
                _ => model.fill(0),
            }
        }
    }

    /// The runs cover the beginning of the range without gaps, and the ones called zeros contain zeros.
    fn check_extents(
        &self,
        kind: Kind,
        expected: Result<(), Errno>,
        index: usize,
        (offset, len): (u64, u64),
        what: &str,
    ) {
        let found = self.engine.extents(self.device, offset, len, None);
        assert_eq!(found.as_ref().map(|_| ()).map_err(|errno| *errno), expected, "{what}");
        let mut at = offset;
        for extent in found.unwrap_or_default() {
            assert_eq!(extent.offset, at, "{what}");
            at += extent.len;
            let from = (extent.offset - index as u64 * LEN) as usize;
            let bytes = &self.model[index][from..from + extent.len as usize];
            match kind {
                Kind::Zeros | Kind::ForgetfulZeros | Kind::DelayOfTwo => assert_eq!(extent.flags, 3, "{what}"),
                Kind::Error => assert_eq!(extent.flags, 0, "{what}"),
                _ => assert!(extent.flags == 0 || extent.flags == 3 && bytes.iter().all(|byte| *byte == 0), "{what}"),
            }
        }
        assert!(at <= offset + len && (expected.is_err() || at > offset), "{what}");
    }
}

#[test]
fn every_operation_on_every_extent_does_the_same_at_once_and_in_a_queue() {
    for (name, engine) in engines() {
        for (seed, in_memory) in [(1, true), (2, false)] {
            let extents = KINDS.iter().map(|kind| (LEN, kind.extent(in_memory))).collect();
            let device = device(mapping(extents, vec![]));
            device.attach_mapper();
            std::thread::scope(|scope| {
                let _closing = Closing(&device);
                scope.spawn(|| {
                    while let Some(faults) = device.next_faults(None) {
                        faults.into_iter().for_each(|mut fault| fault.answer(Answer::Fail(REFUSED)));
                    }
                });
                let mut random = Random::new(seed);
                let model = vec![vec![0; LEN as usize]; KINDS.len()];
                let mut disk = Disk { engine: &engine, device: &device, model };
                for _ in 0..ROUNDS {
                    disk.ask(&mut random, name);
                }
            });
        }
    }
}
