//! What can be done at once: the fast path of every request.
//!
//! Runs on the thread that has the request (a loop, or a caller of the in-process API) and touches no
//! queue. It stops at the first piece that would wait, fault or park, and says how far it came; the
//! queue takes the request from there.

use blkloom_io::{Busy, File, Inline, InlinePolicy, Slice, Stretch, errno::EDQUOT, errno::EIO, errno::ENOSPC};
use blkloom_map::Place;

use crate::device::{Device, Kinds, Refused};
use crate::io_errors;
use crate::request::Flags;
use crate::stats::{Op, Shard};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Now {
    Done,
    Failed(i32),
    /// So many bytes are done; the rest must go through a queue.
    Later(u64),
}

/// Who asks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Patience {
    /// A loop: never wait for storage.
    Nowait,
    /// A caller that has nothing else to do: wait for files in place.
    Wait,
}

/// Zeroing at once is limited to what takes about as long as a large write.
const ZERO_AT_ONCE: u64 = 1 << 20;

/// Visits the pieces of a range in order, entering stacked devices. The visitor returns how much of
/// its piece it did and whether to go on.
fn visit(
    device: &Device,
    shard: Shard,
    (offset, len): (u64, u64),
    writes: bool,
    visitor: &mut dyn FnMut(&Place<'_, Kinds>, u64) -> Now,
) -> Now {
    let pin = match device.enter(shard) {
        Ok(pin) => pin,
        Err(Refused::Suspended) => return Now::Later(0),
        Err(refused) => return Now::Failed(refused.errno()),
    };
    let outcome = visit_entered(device, shard, (offset, len), writes, visitor);
    device.epochs.unpin(pin);
    outcome
}

fn visit_entered(
    device: &Device,
    shard: Shard,
    (offset, len): (u64, u64),
    writes: bool,
    visitor: &mut dyn FnMut(&Place<'_, Kinds>, u64) -> Now,
) -> Now {
    let guard = device.mapping.load();
    let Some(mapping) = guard.as_ref() else {
        return Now::Later(0);
    };
    let mut done = 0;
    while done < len {
        let Some(piece) = mapping.lookup(shard, offset + done, len - done) else {
            return Now::Failed(EIO);
        };
        let outcome = match piece.place {
            Place::Device { device: lower, offset, writable } if writable || !writes => {
                visit(lower, shard, (offset, piece.len), writes, visitor)
            }
            place => visitor(&place, piece.len),
        };
        match outcome {
            Now::Done => done += piece.len,
            Now::Later(part) => return Now::Later(done + part),
            failed => return failed,
        }
    }
    Now::Done
}

/// What else a read is to do.
#[derive(Default)]
pub struct Besides<'a> {
    /// Collects the ranges (relative to the read) known to be zeros.
    pub zeros: Option<&'a mut Vec<(u64, u64)>>,
    /// Memory that will be read soon.
    pub next: Option<Slice>,
}

/// Reads all of `into`.
pub fn read(
    device: &Device,
    shard: Shard,
    offset: u64,
    into: Slice,
    patience: Patience,
    Besides { mut zeros, next }: Besides<'_>,
) -> Now {
    let mut at = 0usize;
    let next = next.unwrap_or(Slice::empty());
    visit(device, shard, (offset, into.len() as u64), false, &mut |place, len| {
        let part = into.part(at, len as usize);
        at += len as usize;
        match place {
            Place::Data { file, offset: place, .. } => {
                let failed = |errno| failed(device, Op::Read, offset + at as u64 - len, errno, file);
                match read_data(file, *place, part, at as u64 - len, &mut zeros) {
                    Inline::Done => Now::Done,
                    Inline::Failed(errno) => failed(errno),
                    Inline::Wait(done) if patience == Patience::Nowait => Now::Later(done as u64),
                    Inline::Wait(done) => {
                        let (place, part) = (*place + done as u64, part.part(done, part.len() - done));
                        Busy::new(&***file).read(place, part).map_or_else(failed, |()| Now::Done)
                    }
                }
            }
            Place::Memory { region, offset } => {
                if let Some(zeros) = &mut zeros {
                    note_unwritten(region, *offset, len, (at - len as usize) as u64, zeros);
                }
                region.read(*offset, part, next);
                Now::Done
            }
            Place::Zero { .. } => {
                part.zero();
                if let Some(zeros) = &mut zeros {
                    zeros.push(((at - len as usize) as u64, len));
                }
                Now::Done
            }
            Place::Error(errno) => Now::Failed(*errno),
            Place::Fault | Place::Device { .. } => Now::Later(0),
        }
    })
}

/// The memory that a read of this range would copy from, if it is in one piece.
pub fn source(device: &Device, shard: Shard, offset: u64, len: u64) -> Slice {
    let mut found = Slice::empty();
    let _looked_up = visit(device, shard, (offset, len), false, &mut |place, piece| match place {
        Place::Memory { region, offset } if piece == len => {
            found = region.memory(*offset, len as usize);
            Now::Done
        }
        _ => Now::Later(0),
    });
    found
}

/// Reads a file; a large read of a file with holes says where they are. Not of one in memory: tmpfs walks all of its
/// pages to find the next hole.
fn read_data(file: &File, offset: u64, part: Slice, at: u64, zeros: &mut Option<&mut Vec<(u64, u64)>>) -> Inline {
    let worth_looking = part.len() >= WORTH_LOOKING && file.may_have_holes() && file.policy() != InlinePolicy::Always;
    let Some(zeros) = zeros.as_deref_mut().filter(|_| worth_looking) else {
        return file.read_now(offset, part);
    };
    // What lies past the end of a truncated file looks like a hole, but must be an error.
    let whole = |file: &File| file.size().is_ok_and(|size| size >= offset + part.len() as u64);
    let stretches = match file.stretches(offset, part.len() as u64, MOST_STRETCHES) {
        Ok(stretches) if stretches.iter().any(|stretch| stretch.hole) && whole(file) => stretches,
        _ => return file.read_now(offset, part),
    };
    let mut done = 0usize;
    for Stretch { len, hole } in stretches {
        let piece = part.part(done, len as usize);
        if hole && len >= WORTH_A_HOLE {
            piece.zero();
            zeros.push((at + done as u64, len));
        } else {
            match file.read_now(offset + done as u64, piece) {
                Inline::Done => {}
                Inline::Wait(more) => return Inline::Wait(done + more),
                failed => return failed,
            }
        }
        done += len as usize;
    }
    if done < part.len() {
        file.read_now(offset + done as u64, part.part(done, part.len() - done))
    } else {
        Inline::Done
    }
}

/// Reads from this size on are worth asking the file system for holes.
const WORTH_LOOKING: usize = 32 << 10;
const MOST_STRETCHES: usize = 64;
/// Holes shorter than this are not worth a chunk of their own.
const WORTH_A_HOLE: u64 = 4096;

fn note_unwritten(region: &blkloom_io::Region, offset: u64, len: u64, at: u64, zeros: &mut Vec<(u64, u64)>) {
    let mut done = 0;
    while done < len {
        let (run, written) = region.run(offset + done, len - done);
        if !written && run >= WORTH_A_HOLE.min(len) {
            zeros.push((at + done, run));
        }
        done += run;
    }
}

/// Whether a write there would be no more than a copy, to memory or to a file in memory, or forgotten.
pub fn would_copy(device: &Device, shard: Shard, range: (u64, u64)) -> bool {
    let copied = visit(device, shard, range, true, &mut |place, _| match place {
        Place::Data { file, writable: true, .. } if file.policy() == InlinePolicy::Always => Now::Done,
        Place::Memory { .. } | Place::Zero { discard_writes: true } => Now::Done,
        _ => Now::Later(0),
    });
    copied == Now::Done
}

pub fn write(device: &Device, shard: Shard, offset: u64, from: Slice, patience: Patience) -> Now {
    let mut at = 0usize;
    visit(device, shard, (offset, from.len() as u64), true, &mut |place, len| {
        let part = from.part(at, len as usize);
        at += len as usize;
        match place {
            Place::Data { file, offset: place, writable: true, punch } => {
                let refused = |errno| {
                    // Where a table sent it, its target may know what to do for want of space.
                    if !punch && matches!(errno, ENOSPC | EDQUOT) {
                        return Now::Later(0);
                    }
                    failed(device, Op::Write, offset + at as u64 - len, errno, file)
                };
                match file.write_now(*place, part) {
                    Inline::Done => Now::Done,
                    Inline::Failed(errno) => refused(errno),
                    Inline::Wait(done) if patience == Patience::Nowait => Now::Later(done as u64),
                    Inline::Wait(done) => {
                        let (place, part) = (*place + done as u64, part.part(done, part.len() - done));
                        Busy::new(&***file).write(place, part, false).map_or_else(refused, |()| Now::Done)
                    }
                }
            }
            Place::Memory { region, offset } => {
                region.write(*offset, part);
                Now::Done
            }
            Place::Zero { discard_writes: true } => Now::Done,
            Place::Error(errno) => Now::Failed(*errno),
            _ => Now::Later(0),
        }
    })
}

/// A request that the file has failed.
fn failed(device: &Device, op: Op, offset: u64, errno: i32, file: &File) -> Now {
    if io_errors::is_of_storage(errno) {
        device.io_failed(op, offset, errno, Some(file));
    }
    Now::Failed(errno)
}

/// Discards or zeroes a range where that is quick: memory, and files on file systems that are.
pub fn clear(device: &Device, shard: Shard, op: Op, offset: u64, len: u64, flags: Flags) -> Now {
    if len > ZERO_AT_ONCE || flags.fua && device.needs_flush() {
        return Now::Later(0);
    }
    let unmap = op == Op::Discard || flags.unmap;
    visit(device, shard, (offset, len), true, &mut |place, len| match place {
        Place::Data { file, offset: place, writable: true, punch: true } if file.policy() == InlinePolicy::Always => {
            let result = match op {
                Op::Discard => file.punch(*place, len),
                _ => file.zero(*place, len, unmap, flags.fast),
            };
            result.map_or_else(|errno| failed(device, op, offset, errno, file), |()| Now::Done)
        }
        Place::Memory { region, offset } => region.zero(*offset, len, unmap).map_or_else(Now::Failed, |()| Now::Done),
        Place::Zero { discard_writes: true } => Now::Done,
        Place::Error(errno) => Now::Failed(*errno),
        _ => Now::Later(0),
    })
}

pub fn flush(device: &Device, shard: Shard) -> Now {
    if device.needs_flush() {
        return Now::Later(0);
    }
    visit(device, shard, (0, 0), false, &mut |_, _| Now::Done)
}
