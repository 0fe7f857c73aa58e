//! Fast path: executes the part of a request that needs no wait, on the current thread.
//!
//! The thread is a loop or a caller of the in-process API. No queue is involved. Execution stops at the first piece
//! that would wait or fault, and returns how many bytes are done. The queue executes the rest.

use std::sync::Arc;

use blkloom_io::{Ahead, Busy, Errno, File, FileExtent, Inline, InlinePolicy, Scratch, Slice, Source};
use blkloom_map::Resolved;

use crate::device::{Device, Kinds, Refused};
use crate::filter::{Asked, Verdict};
use crate::io_errors;
use crate::operation::Flags;
use crate::semantics::{self, Action, FileAction, MemoryAction, NoSpace};
use crate::stats::{Op, Shard};
use crate::tee::{Begun, Tee};

/// How far the fast path came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Progress {
    Done,
    Failed(Errno),
    /// This many bytes are done. The rest must go through a queue.
    Queue(u64),
}

/// Whether the calling thread may wait for files.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Patience {
    /// Never wait for storage (a loop).
    Nowait,
    /// Wait for files (a caller of the in-process API that has nothing else to do).
    Wait,
}

/// Why pieces are visited.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Execute,
    /// Only the kind of the pieces is wanted. Filters are not asked: the visit stops there.
    Look,
}

/// Most bytes that the fast path zeroes: about as expensive as a large write.
const ZERO_AT_ONCE: u64 = 1 << 20;

/// Visits the pieces of a range in order, also those in stacked devices. The visitor executes the action of each piece
/// and returns how far it came.
fn visit(
    device: &Device,
    shard: Shard,
    (offset, len): (u64, u64),
    (op, flags): (Op, Flags),
    purpose: Purpose,
    visitor: &mut dyn FnMut(Action<'_, Kinds>, u64) -> Progress,
) -> Progress {
    let pin = match device.enter(shard) {
        Ok(pin) => pin,
        Err(Refused::Suspended) => return Progress::Queue(0),
        Err(refused) => return Progress::Failed(refused.errno()),
    };
    let outcome = visit_entered(device, shard, (offset, len), (op, flags), purpose, visitor);
    device.epochs.unpin(pin);
    outcome
}

fn visit_entered(
    device: &Device,
    shard: Shard,
    (offset, len): (u64, u64),
    (op, flags): (Op, Flags),
    purpose: Purpose,
    visitor: &mut dyn FnMut(Action<'_, Kinds>, u64) -> Progress,
) -> Progress {
    let guard = device.mapping.load();
    let Some(mapping) = guard.as_ref() else {
        return Progress::Queue(0);
    };
    let mut done = 0;
    while done < len {
        let Some(piece) = mapping.lookup(shard, offset + done, len - done) else {
            return Progress::Failed(Errno::IO);
        };
        let mut passed = None;
        let (resolved, reach) = match piece.resolved {
            Resolved::Filtered { .. } if purpose == Purpose::Look => return Progress::Queue(done),
            Resolved::Filtered { filtered, at } => {
                match filtered.filter.decide(op, at, piece.len, Asked::Tentatively) {
                    (Verdict::Pass, reach) => {
                        passed = Some((&filtered.filter, at));
                        filtered.behind(at, op.writes(), reach)
                    }
                    (Verdict::Fail(errno), reach) => (Resolved::Error(errno), reach),
                    (Verdict::Drop, reach) => (Resolved::Zero { discard_writes: true }, reach),
                    (Verdict::Wait(..), _) => return Progress::Queue(done),
                    (Verdict::Elsewhere, reach) => filtered.elsewhere(at, reach),
                }
            }
            resolved => (resolved, piece.len),
        };
        let outcome = match semantics::action(op, flags, &resolved) {
            Action::Enter { device: lower, offset } => {
                visit(lower, shard, (offset, reach), (op, flags), purpose, visitor)
            }
            action => visitor(action, reach),
        };
        match outcome {
            Progress::Done => {
                if let Some((filter, at)) = passed {
                    filter.passed(op, at, reach);
                }
                done += reach;
            }
            Progress::Queue(part) => return Progress::Queue(done + part),
            // The queue tries again, and then sends it elsewhere.
            Progress::Failed(_) if op == Op::Read && passed.is_some_and(|(filter, _)| filter.retries_elsewhere()) => {
                return Progress::Queue(done);
            }
            failed => return failed,
        }
    }
    Progress::Done
}

/// Additional tasks of a read.
#[derive(Default)]
pub struct Besides<'a> {
    /// Receives the ranges known to be zeros: (offset from the start of the read, length).
    pub zeros: Option<&'a mut Vec<(u64, u64)>>,
    /// Memory that a later read needs: it is prefetched into the CPU cache.
    pub next: Option<Ahead>,
}

/// Reads all of `into`.
pub fn read(
    device: &Device,
    shard: Shard,
    offset: u64,
    into: Slice<'_>,
    patience: Patience,
    Besides { mut zeros, next }: Besides<'_>,
) -> Progress {
    let mut at = 0usize;
    let next = next.unwrap_or(Ahead::NOTHING);
    visit(
        device,
        shard,
        (offset, into.len() as u64),
        (Op::Read, Flags::default()),
        Purpose::Execute,
        &mut |action, len| {
            let part = into.part(at, len as usize);
            at += len as usize;
            match action {
                Action::File { file, offset: in_file, action: FileAction::Read } => {
                    let failed = |errno| failed(device, Op::Read, offset + at as u64 - len, errno, file);
                    match read_data(file, in_file, part, at as u64 - len, &mut zeros) {
                        Inline::Done => Progress::Done,
                        Inline::Failed(errno) => failed(errno),
                        Inline::Wait(done) if patience == Patience::Nowait => Progress::Queue(done as u64),
                        Inline::Wait(done) => {
                            let (in_file, part) = (in_file + done as u64, part.part(done, part.len() - done));
                            Busy::new(&**file)
                                .read(in_file, part, &mut Scratch::default())
                                .map_or_else(failed, |()| Progress::Done)
                        }
                    }
                }
                Action::Memory { region, offset, action: MemoryAction::Read } => {
                    if let Some(zeros) = &mut zeros {
                        note_unwritten(region, offset, len, (at - len as usize) as u64, zeros);
                    }
                    region.read(offset, part, next);
                    Progress::Done
                }
                Action::ReadZeros => {
                    part.zero();
                    if let Some(zeros) = &mut zeros {
                        zeros.push(((at - len as usize) as u64, len));
                    }
                    Progress::Done
                }
                Action::Fail(errno) => Progress::Failed(errno),
                _ => Progress::Queue(0),
            }
        },
    )
}

/// The memory that a read of this range would copy from, if it is contiguous.
pub fn source(device: &Device, shard: Shard, offset: u64, len: u64) -> Ahead {
    let mut found = Ahead::NOTHING;
    let _looked_up =
        visit(device, shard, (offset, len), (Op::Read, Flags::default()), Purpose::Look, &mut |action, piece| {
            match action {
                Action::Memory { region, offset, .. } if piece == len => {
                    found = region.ahead(offset, len as usize);
                    Progress::Done
                }
                _ => Progress::Queue(0),
            }
        });
    found
}

/// Reads a file. A large read of a file with holes also reports the holes, except on tmpfs, which walks all pages of
/// the file to find the next hole.
fn read_data(file: &File, offset: u64, part: Slice<'_>, at: u64, zeros: &mut Option<&mut Vec<(u64, u64)>>) -> Inline {
    let worth_looking = part.len() >= WORTH_LOOKING && file.may_have_holes() && file.policy() != InlinePolicy::Always;
    let Some(zeros) = zeros.as_deref_mut().filter(|_| worth_looking) else {
        return file.read_now(offset, part);
    };
    // A range past the end of a truncated file looks like a hole, but must be an error.
    let whole = |file: &File| file.size().is_ok_and(|size| size >= offset + part.len() as u64);
    let extents = match file.extents(offset, part.len() as u64, MOST_FILE_EXTENTS) {
        Ok(extents) if extents.iter().any(|extent| extent.hole) && whole(file) => extents,
        _ => return file.read_now(offset, part),
    };
    let mut done = 0usize;
    for FileExtent { len, hole } in extents {
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

/// Smallest read for which the file system is asked for holes.
const WORTH_LOOKING: usize = 32 << 10;
const MOST_FILE_EXTENTS: usize = 64;
/// Smallest hole that is reported as a chunk of its own.
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

/// Whether a write to this range is only a copy to memory or to a file on tmpfs, or is discarded.
pub fn would_copy(device: &Device, shard: Shard, range: (u64, u64)) -> bool {
    let copied =
        visit(device, shard, range, (Op::Write, Flags::default()), Purpose::Look, &mut |action, _| match action {
            Action::File { file, .. } if file.policy() == InlinePolicy::Always => Progress::Done,
            Action::Memory { .. } | Action::Nothing => Progress::Done,
            _ => Progress::Queue(0),
        });
    copied == Progress::Done
}

pub fn write(device: &Device, shard: Shard, offset: u64, from: Source<'_>, patience: Patience) -> Progress {
    let mut at = 0usize;
    visit(
        device,
        shard,
        (offset, from.len() as u64),
        (Op::Write, Flags::default()),
        Purpose::Execute,
        &mut |action, len| {
            let part = from.part(at, len as usize);
            at += len as usize;
            match action {
                Action::File { file, offset: in_file, action: FileAction::Write { on_no_space, .. } } => {
                    let refused = |errno| {
                        // If a cluster table sent the write here, its target handles the lack of space.
                        if on_no_space == NoSpace::Faults && matches!(errno, Errno::NOSPC | Errno::DQUOT) {
                            return Progress::Queue(0);
                        }
                        failed(device, Op::Write, offset + at as u64 - len, errno, file)
                    };
                    match file.write_now(in_file, part) {
                        Inline::Done => Progress::Done,
                        Inline::Failed(errno) => refused(errno),
                        Inline::Wait(done) if patience == Patience::Nowait => Progress::Queue(done as u64),
                        Inline::Wait(done) => {
                            let (in_file, part) = (in_file + done as u64, part.part(done, part.len() - done));
                            Busy::new(&**file)
                                .write(in_file, part, false, &mut Scratch::default())
                                .map_or_else(refused, |()| Progress::Done)
                        }
                    }
                }
                Action::Memory { region, offset, action: MemoryAction::Write } => {
                    region.write(offset, part);
                    Progress::Done
                }
                Action::Tee { tee, offset } if would_copy_to(tee, shard, (offset, len)) => {
                    on_legs(tee, (offset, len), |leg| write(leg, shard, offset, part, Patience::Nowait))
                }
                Action::Nothing => Progress::Done,
                Action::Fail(errno) => Progress::Failed(errno),
                _ => Progress::Queue(0),
            }
        },
    )
}

/// Whether all legs of a tee only copy a write.
fn would_copy_to(tee: &Tee, shard: Shard, range: (u64, u64)) -> bool {
    tee.legs().iter().all(|leg| would_copy(leg, shard, range))
}

/// Executes an operation on all legs of a tee. If one fails, the queue tries again.
fn on_legs(tee: &Arc<Tee>, (at, len): (u64, u64), mut execute: impl FnMut(&Device) -> Progress) -> Progress {
    let Begun::Writing(mut writing) = tee.begin(at, len) else { return Progress::Queue(0) };
    if !tee.legs().iter().all(|leg| execute(leg) == Progress::Done) {
        return Progress::Queue(0);
    }
    writing.complete();
    Progress::Done
}

/// Counts an I/O error of a file, and returns it as progress.
fn failed(device: &Device, op: Op, offset: u64, errno: Errno, file: &File) -> Progress {
    if io_errors::is_of_storage(errno) {
        device.io_failed(op, offset, errno, Some(file));
    }
    Progress::Failed(errno)
}

/// Discards or zeroes a range where that is fast: in memory, and in files on tmpfs.
pub fn clear(device: &Device, shard: Shard, op: Op, offset: u64, len: u64, flags: Flags) -> Progress {
    if len > ZERO_AT_ONCE || flags.fua && device.needs_flush() {
        return Progress::Queue(0);
    }
    visit(device, shard, (offset, len), (op, flags), Purpose::Execute, &mut |action, len| match action {
        Action::File { file, offset: in_file, action } if file.policy() == InlinePolicy::Always => {
            let result = match action {
                FileAction::Punch => file.punch(in_file, len),
                FileAction::Zero { unmap, fast } => file.zero(in_file, len, unmap, fast, &mut Scratch::default()),
                _ => return Progress::Queue(0),
            };
            result.map_or_else(|errno| failed(device, op, offset, errno, file), |()| Progress::Done)
        }
        Action::Memory { region, offset, action: MemoryAction::Zero { unmap } } => {
            region.zero(offset, len, unmap).map_or_else(Progress::Failed, |()| Progress::Done)
        }
        Action::Tee { tee, offset } if would_copy_to(tee, shard, (offset, len)) => {
            on_legs(tee, (offset, len), |leg| clear(leg, shard, op, offset, len, flags))
        }
        Action::Nothing => Progress::Done,
        Action::Fail(errno) => Progress::Failed(errno),
        _ => Progress::Queue(0),
    })
}

pub fn flush(device: &Device, shard: Shard) -> Progress {
    if device.needs_flush() {
        return Progress::Queue(0);
    }
    visit(device, shard, (0, 0), (Op::Flush, Flags::default()), Purpose::Execute, &mut |_, _| Progress::Done)
}
