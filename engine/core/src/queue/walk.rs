//! The walk of a request's range: from device to device and piece by piece, down to the extents that move bytes. Part
//! of `queue`, whose invariants hold here.

use std::sync::Arc;

use blkloom_io::{Ahead, Errno, File, Inline, InlinePolicy, Region, Slice, Source};
use blkloom_map::Resolved;

use super::{Attempt, Inside, MOST_FOUND, Path, Queue, Walk};
use crate::device::{Device, Kinds, Mapping, Refused};
use crate::filter::{Asked, Verdict};
use crate::operation::{Flags, Found};
use crate::pool::Job;
use crate::request::{Memory, Request};
use crate::semantics::{self, Action, Allocation, FileAction, MemoryAction, NoSpace};
use crate::stats::Op;

/// Memory is zeroed in pieces of up to this size. A whole piece counts as `ZERO_COST` pieces of the walk.
const ZERO_STEP: u64 = 64 << 20;
const ZERO_COST: u32 = 1024;
/// Pieces that a request may walk before the loop serves its other requests.
const MOST_PIECES: u32 = 4096;

impl Queue {
    pub(super) fn walk(&mut self, active: usize, offset: u64, len: u64, inside: &[Inside], attempt: Attempt) {
        let device = self.actives[active].request.device.clone();
        let mut path = Path::new();
        let mut walk = Walk { active, path: &mut path, inside, attempt, pieces: 0, filters: 0 };
        let done = self.descend(&mut walk, &device, offset, offset, len);
        if done < len {
            self.actives[active].todo.push((offset + done, len - done, attempt.filters));
        }
    }

    /// Walks `len` bytes of `device` from offset `at` on; their offset in the request's device is `root`. Returns the
    /// number of bytes that are done or have a task; less than `len` when the request has `MOST_TASKS` tasks.
    fn descend(&mut self, walk: &mut Walk<'_>, device: &Arc<Device>, root: u64, at: u64, len: u64) -> u64 {
        let through = self.actives[walk.active].request.flags.through_gate && walk.path.is_empty()
            || walk.inside.iter().any(|known| Arc::ptr_eq(&known.device, device));
        let pin = if through { Ok(device.epochs.pin(self.shard)) } else { device.enter(self.shard) };
        let pin = match pin {
            Ok(pin) => pin,
            Err(Refused::Suspended) => {
                self.wait_at_gate(walk, device, root, len);
                return len;
            }
            Err(refused) => {
                self.fail(walk.active, refused.errno());
                return len;
            }
        };
        walk.path.push(Inside { device: device.clone(), pin: Some(pin) });
        let done = match device.mapping.load_full() {
            Some(mapping) => self.pieces(walk, &mapping, root, at, len),
            None => {
                self.fail(walk.active, Refused::Closed.errno());
                len
            }
        };
        walk.path.pop();
        device.epochs.unpin(pin);
        done
    }

    fn pieces(&mut self, walk: &mut Walk<'_>, mapping: &Mapping, root: u64, at: u64, len: u64) -> u64 {
        let mut done = 0;
        let filters = walk.filters;
        while done < len {
            walk.filters = filters;
            let active = &self.actives[walk.active];
            let op = active.request.op;
            let enough =
                op == Op::Extents && (active.request.flags.one && done > 0 || active.found.len() >= MOST_FOUND);
            if enough || active.error.is_some() {
                return len;
            }
            if self.has_enough_tasks(walk.active) {
                return done;
            }
            walk.pieces += 1;
            if walk.pieces > MOST_PIECES {
                self.continue_in_next_iteration(walk, root + done, len - done);
                return len;
            }
            let found = match active.request.context {
                // Only targets know this metadata context, and they answer for whole segments.
                Some(_) => mapping.owned(at + done, len - done),
                None => mapping.lookup(self.shard, at + done, len - done),
            };
            let Some(mut piece) = found else {
                self.fail(walk.active, Errno::IO);
                return len;
            };
            if let Resolved::Filtered { filtered, at: behind } = piece.resolved {
                walk.filters += 1;
                let tries = op == Op::Read && filtered.filter.retries_elsewhere();
                let active = &mut self.actives[walk.active];
                active.retries |= tries;
                let verdict = if tries && active.elsewhere {
                    Verdict::Elsewhere
                } else if walk.filters > walk.attempt.filters && (op == Op::Read || op.writes()) {
                    let (verdict, reach) = filtered.filter.decide(op, behind, piece.len, Asked::Once);
                    piece.len = reach;
                    verdict
                } else {
                    Verdict::Pass
                };
                match verdict {
                    Verdict::Wait(time, counted) if !self.stopping => {
                        self.wait(walk, root + done, piece.len, time, counted);
                        done += piece.len;
                        continue;
                    }
                    // The engine is closing: it must not wait.
                    Verdict::Pass | Verdict::Wait(..) => {
                        (piece.resolved, piece.len) = filtered.behind(behind, op.writes(), piece.len);
                    }
                    Verdict::Fail(errno) => piece.resolved = Resolved::Error(errno),
                    Verdict::Drop => piece.resolved = Resolved::Zero { discard_writes: true },
                    Verdict::Elsewhere => (piece.resolved, piece.len) = filtered.elsewhere(behind, piece.len),
                }
            }
            if let Resolved::Tee { tee, offset } = piece.resolved
                && op.writes()
            {
                let (open, reach) = tee.run(offset, piece.len);
                if self.actives[walk.active].elsewhere || !open {
                    piece.resolved = Resolved::Backend { backend: tee.backend(), offset, writable: true };
                }
                piece.len = reach;
            }
            if let Resolved::Backend { backend, offset, .. } = piece.resolved {
                let moves = matches!(op, Op::Read | Op::Write);
                let longest = if moves { backend.limits().longest } else { backend.longest_range() };
                piece.len = piece.len.min(longest - offset % backend.block());
            }
            let action = match self.action(walk.active, &piece.resolved) {
                Action::Backend { backend, .. } if op == Op::Extents && !backend.reports_extents() => {
                    Action::Report(Allocation::Data)
                }
                action => action,
            };
            if let Action::Memory { offset, action: MemoryAction::Zero { .. }, .. } = action {
                // Pieces end at page boundaries: only whole pages are deallocated.
                piece.len = piece.len.min(ZERO_STEP - offset % ZERO_STEP);
                walk.pieces += (piece.len / ZERO_STEP) as u32 * ZERO_COST;
            }
            if action.moves_bytes() {
                // Limited to one piece of the request's memory.
                let request = &self.actives[walk.active].request;
                let skip = (root + done - request.offset) as usize;
                piece.len = request.memory.run(skip, piece.len as usize) as u64;
            }
            match action {
                Action::Enter { device: lower, offset } => {
                    let part = self.descend(walk, lower, root + done, offset, piece.len);
                    if part < piece.len {
                        return done + part;
                    }
                }
                action => self.piece(walk, piece.owner, action, root + done, at + done, piece.len),
            }
            done += piece.len;
        }
        done
    }

    /// The action of the request on an extent. A durable write need not be durable itself if a flush of targets
    /// follows.
    fn action<'m>(&mut self, active: usize, resolved: &Resolved<'m, Kinds>) -> Action<'m, Kinds> {
        let active = &mut self.actives[active];
        let Request { device, op, flags, memory, .. } = &active.request;
        // A durable write from a registered buffer is flushed, too: the pool could not examine a failed write.
        let registered = matches!(memory, Memory::Registered(_));
        let owners = flags.fua && (registered || device.has_fua_owners());
        // Stored, because a swap may remove the flush owners before the request ends.
        active.unflushed |= owners && *op == Op::Write;
        semantics::action(*op, Flags { fua: flags.fua && !owners, ..*flags }, resolved)
    }

    /// Executes one action, or starts a task for it.
    fn piece(&mut self, walk: &mut Walk<'_>, owner: u32, action: Action<'_, Kinds>, root: u64, at: u64, len: u64) {
        let op = self.actives[walk.active].request.op;
        if action.needs_bytes(op) && !self.has_bytes(walk, root, len) {
            return;
        }
        match action {
            Action::File { file, offset, action } => self.in_file(walk, owner, file, (offset, action), root, at, len),
            Action::Memory { region, offset, action } => self.in_memory(walk, region, (offset, action), root, len),
            Action::Tee { tee, offset } => self.write_legs(walk, tee, offset, root, len),
            Action::Backend { backend, offset } => self.operate(walk, backend, op, root, offset, len),
            Action::ReadZeros => self.read_into(walk, root, len).zero(),
            Action::Nothing => {}
            Action::Report(allocation) => {
                self.actives[walk.active].found.push(Found { offset: root, len, flags: allocation as u32 });
            }
            Action::Fail(errno) => self.fail(walk.active, errno),
            Action::Fault | Action::Enter { .. } => self.fault(walk, owner, op, root, at, len),
        }
    }

    /// The destination of a read: `len` bytes from `root` on, an offset in the request's device.
    fn read_into(&mut self, walk: &Walk<'_>, root: u64, len: u64) -> Slice<'static> {
        let active = &mut self.actives[walk.active];
        active.found_bytes(root, len);
        // SAFETY: the request is kept until the last of its tasks has ended, so the memory exists while it is used: by
        // the walk, and by the tasks that the walk starts. The destination is not accessed otherwise before that.
        unsafe { active.memory().destination(root.wrapping_sub(active.request.offset) as usize, len as usize) }
    }

    /// The source of a write, as in `read_into`.
    fn write_from(&self, walk: &Walk<'_>, root: u64, len: u64) -> Source<'static> {
        let active = &self.actives[walk.active];
        // SAFETY: as in `read_into`.
        unsafe { active.memory().source(root.wrapping_sub(active.request.offset) as usize, len as usize) }
    }

    #[allow(clippy::too_many_arguments, reason = "one private call; a struct would only be unpacked again")]
    fn in_file(
        &mut self,
        walk: &mut Walk<'_>,
        owner: u32,
        file: &Arc<File>,
        (offset, action): (u64, FileAction),
        root: u64,
        at: u64,
        len: u64,
    ) {
        let registered = self.actives[walk.active].is_registered();
        if registered && let FileAction::Read | FileAction::Write { .. } = action {
            let share = self.takes_registered(walk.active, file, offset, root, len);
            if let Some(share) = share.filter(|_| walk.attempt.no_space.is_none()) {
                return self.transfer(walk, file, offset, root, len, action != FileAction::Read, false, share);
            }
            if !self.has_bytes(walk, root, len) {
                return;
            }
        }
        let job = match action {
            FileAction::Read => {
                let into = self.read_into(walk, root, len);
                match read_in_place(file, offset, into) {
                    Inline::Failed(errno) => return self.fail_in(walk.active, errno, root, Some(file)),
                    Inline::Done => return,
                    Inline::Wait(_) if !registered && file.fits(offset, into.source()) => {
                        return self.transfer(walk, file, offset, root, len, false, false, None);
                    }
                    Inline::Wait(_) => Job::Read { offset, into },
                }
            }
            FileAction::Write { durable, on_no_space } => {
                if let Some(errno) = walk.attempt.no_space {
                    return match on_no_space {
                        NoSpace::Fails => self.fail_in(walk.active, errno, root, Some(file)),
                        NoSpace::Faults => self.fault(walk, owner, Op::Write, root, at, len),
                    };
                }
                let from = self.write_from(walk, root, len);
                match if durable { Inline::Wait(0) } else { write_in_place(file, offset, from) } {
                    Inline::Failed(errno @ (Errno::NOSPC | Errno::DQUOT)) if on_no_space == NoSpace::Faults => {
                        walk.attempt.no_space = Some(errno);
                        self.fault(walk, owner, Op::Write, root, at, len);
                        walk.attempt.no_space = None;
                        return;
                    }
                    Inline::Failed(errno) => return self.fail_in(walk.active, errno, root, Some(file)),
                    Inline::Done => return,
                    Inline::Wait(_) => {}
                }
                match (!registered && file.fits(offset, from)).then(|| file.share_blocks(offset, len)).flatten() {
                    Some(share) => return self.transfer(walk, file, offset, root, len, true, durable, share),
                    None => Job::Write { offset, from, durable },
                }
            }
            FileAction::Punch => Job::Punch { offset, len },
            FileAction::Zero { unmap, fast } => Job::Zero { offset, len, unmap, fast },
            FileAction::Prefetch => Job::Prefetch { offset, len },
            FileAction::Report => {
                let most = if self.actives[walk.active].request.flags.one { 1 } else { MOST_FOUND };
                Job::Extents { offset, len, most }
            }
        };
        self.start_job(walk, file, job, root, len);
    }

    fn in_memory(
        &mut self,
        walk: &Walk<'_>,
        region: &Region,
        (offset, action): (u64, MemoryAction),
        root: u64,
        len: u64,
    ) {
        match action {
            MemoryAction::Read => region.read(offset, self.read_into(walk, root, len), Ahead::NOTHING),
            MemoryAction::Write => region.write(offset, self.write_from(walk, root, len)),
            MemoryAction::Zero { unmap } => {
                if let Err(errno) = region.zero(offset, len, unmap) {
                    self.fail_in(walk.active, errno, root, None);
                }
            }
            MemoryAction::Report => {
                let mut done = 0;
                let found = &mut self.actives[walk.active].found;
                while done < len && found.len() < MOST_FOUND {
                    let (run, written) = region.run(offset + done, len - done);
                    let allocation = if written { Allocation::Data } else { Allocation::ZeroHole };
                    found.push(Found { offset: root + done, len: run, flags: allocation as u32 });
                    done += run;
                }
            }
        }
    }
}

/// Reads a file on tmpfs on this thread, which is faster than the ring.
fn read_in_place(file: &File, offset: u64, into: Slice<'_>) -> Inline {
    match file.policy() {
        InlinePolicy::Always => file.read_now(offset, into),
        _ => Inline::Wait(0),
    }
}

/// Writes to a file on tmpfs on this thread. In the ring, kernel threads would contend with the loop's own writes.
fn write_in_place(file: &File, offset: u64, from: Source<'_>) -> Inline {
    match file.policy() {
        InlinePolicy::Always => file.write_now(offset, from),
        _ => Inline::Wait(0),
    }
}
