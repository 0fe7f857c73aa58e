//! Walking a request's range: from device to device, piece by piece, down to what moves bytes. Part of
//! `queue`, whose invariants hold here.

use std::sync::Arc;

use blkloom_io::{File, Inline, InlinePolicy, Slice, errno::EDQUOT, errno::EIO, errno::ENOSPC};
use blkloom_map::Place;

use super::{Attempt, Inside, MOST_FOUND, MOST_TASKS, Queue, Walk};
use crate::device::{Device, Kinds, Mapping, Refused};
use crate::pool::Chore;
use crate::request::Found;
use crate::stats::Op;

/// Memory is zeroed by so much a piece, and a piece of it counts as so many.
const ZERO_STEP: u64 = 64 << 20;
const ZERO_COST: u32 = 1024;
/// Pieces walked before the loop looks after its other requests.
const MOST_PIECES: u32 = 4096;

impl Queue {
    pub(super) fn walk(&mut self, active: usize, offset: u64, len: u64, inside: &[Arc<Device>], attempt: Attempt) {
        let device = self.actives[active].request.device.clone();
        let mut path = Vec::new();
        let mut walk = Walk { active, path: &mut path, inside, attempt, pieces: 0 };
        let done = self.descend(&mut walk, &device, offset, offset, len);
        if done < len {
            self.actives[active].todo.push((offset + done, len - done));
        }
    }

    /// Walks `len` bytes from `at` on of `device`, which are those from `root` on of the request's
    /// device. Returns how many were dealt with; fewer when the request has enough tasks.
    fn descend(&mut self, walk: &mut Walk<'_>, device: &Arc<Device>, root: u64, at: u64, len: u64) -> u64 {
        let through = self.actives[walk.active].request.flags.through_gate && walk.path.is_empty()
            || walk.inside.iter().any(|known| Arc::ptr_eq(known, device));
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
        while done < len {
            let active = &self.actives[walk.active];
            let op = active.request.op;
            let enough =
                op == Op::Extents && (active.request.flags.one && done > 0 || active.found.len() >= MOST_FOUND);
            if enough || active.error != 0 {
                return len;
            }
            if active.tasks >= MOST_TASKS {
                return done;
            }
            walk.pieces += 1;
            if walk.pieces > MOST_PIECES {
                self.rest_later(walk, root + done, len - done);
                return len;
            }
            let found = match active.request.context {
                // What only targets know, and of their segments as a whole.
                Some(_) => mapping.owned(at + done, len - done),
                None => mapping.lookup(self.shard, at + done, len - done),
            };
            let Some(mut piece) = found else {
                self.fail(walk.active, EIO);
                return len;
            };
            if let Place::Memory { offset, .. } = piece.place
                && matches!(op, Op::Discard | Op::WriteZeroes)
            {
                // Ends with a page, so that none stays for having been zeroed by halves.
                piece.len = piece.len.min(ZERO_STEP - offset % ZERO_STEP);
                walk.pieces += (piece.len / ZERO_STEP) as u32 * ZERO_COST;
            }
            match piece.place {
                Place::Device { device: lower, offset, writable } if writable || !op.writes() => {
                    let part = self.descend(walk, lower, root + done, offset, piece.len);
                    if part < piece.len {
                        return done + part;
                    }
                }
                place => self.piece(walk, piece.owner, place, root + done, at + done, piece.len),
            }
            done += piece.len;
        }
        done
    }

    /// One leaf: done here, or made a task.
    fn piece(&mut self, walk: &mut Walk<'_>, owner: u32, place: Place<'_, Kinds>, root: u64, at: u64, len: u64) {
        let request = &self.actives[walk.active].request;
        let (op, flags) = (request.op, request.flags);
        let memory = match op {
            Op::Read | Op::Write => request.memory.slice().part((root - request.offset) as usize, len as usize),
            _ => blkloom_io::Slice::empty(),
        };
        let owners = flags.fua && request.device.has_owners();
        let durable = flags.fua && !owners;
        // Remembered: a swap may take the owners away before the request ends.
        self.actives[walk.active].unflushed |= owners && op == Op::Write;
        match (op, place) {
            (Op::Cache, Place::Data { file, offset, .. }) => {
                self.chore(walk, file, Chore::Prefetch { offset, len }, root, len);
            }
            (Op::Cache, _) => {}
            (_, Place::Error(errno)) if op != Op::Extents => self.fail(walk.active, errno),
            (Op::Read, Place::Data { file, offset, .. }) => match read_in_place(file, offset, memory) {
                Inline::Failed(errno) => self.fail_in(walk.active, errno, root, Some(file)),
                Inline::Done => {}
                Inline::Wait(_) if file.fits(offset, memory) => {
                    self.transfer(walk, file, offset, root, len, false, false, None);
                }
                Inline::Wait(_) => self.chore(walk, file, Chore::Read { offset, into: memory }, root, len),
            },
            (Op::Read, Place::Memory { region, offset }) => region.read(offset, memory, Slice::empty()),
            (Op::Read, Place::Zero { .. }) => memory.zero(),
            // Only where a table sent it, which its target changes, can the target do anything.
            (Op::Write, Place::Data { file, writable: true, punch: true, .. }) if walk.attempt.full != 0 => {
                self.fail_in(walk.active, walk.attempt.full, root, Some(file));
            }
            (Op::Write, Place::Data { file, offset, writable: true, punch }) if walk.attempt.full == 0 => {
                match if durable { Inline::Wait(0) } else { write_in_place(file, offset, memory) } {
                    Inline::Failed(errno @ (ENOSPC | EDQUOT)) if !punch => {
                        walk.attempt.full = errno;
                        self.fault(walk, owner, op, root, at, len);
                        walk.attempt.full = 0;
                        return;
                    }
                    Inline::Failed(errno) => return self.fail_in(walk.active, errno, root, Some(file)),
                    Inline::Done => return,
                    Inline::Wait(_) => {}
                }
                let share = file.fits(offset, memory).then(|| file.share_blocks(offset, len)).flatten();
                match share {
                    Some(share) => self.transfer(walk, file, offset, root, len, true, durable, share),
                    None => self.chore(walk, file, Chore::Write { offset, from: memory, durable }, root, len),
                }
            }
            (Op::Write, Place::Memory { region, offset }) => region.write(offset, memory),
            (Op::Write | Op::Discard | Op::WriteZeroes, Place::Zero { discard_writes: true }) => {}
            (Op::Discard, Place::Data { file, offset, writable: true, punch: true }) => {
                self.chore(walk, file, Chore::Punch { offset, len }, root, len);
            }
            (Op::WriteZeroes, Place::Data { file, offset, writable: true, punch: true }) => {
                let chore = Chore::Zero { offset, len, unmap: flags.unmap, fast: flags.fast };
                self.chore(walk, file, chore, root, len);
            }
            (Op::Discard | Op::WriteZeroes, Place::Memory { region, offset }) => {
                if let Err(errno) = region.zero(offset, len, op == Op::Discard || flags.unmap) {
                    self.fail_in(walk.active, errno, root, None);
                }
            }
            (Op::Extents, Place::Data { file, offset, .. }) => {
                let most = if flags.one { 1 } else { MOST_FOUND };
                self.chore(walk, file, Chore::Stretches { offset, len, most }, root, len);
            }
            (Op::Extents, Place::Memory { region, offset }) => {
                let mut done = 0;
                let found = &mut self.actives[walk.active].found;
                while done < len && found.len() < MOST_FOUND {
                    let (run, written) = region.run(offset + done, len - done);
                    found.push(Found { offset: root + done, len: run, flags: if written { 0 } else { 3 } });
                    done += run;
                }
            }
            (Op::Extents, Place::Zero { .. }) => {
                self.actives[walk.active].found.push(Found { offset: root, len, flags: 3 })
            }
            (Op::Extents, Place::Error(_)) => {
                self.actives[walk.active].found.push(Found { offset: root, len, flags: 0 })
            }
            _ => self.fault(walk, owner, op, root, at, len),
        }
    }
}

/// A file in memory is quicker read on the spot, after a fault too, than by way of the ring.
fn read_in_place(file: &File, offset: u64, into: Slice) -> Inline {
    match file.policy() {
        InlinePolicy::Always => file.read_now(offset, into),
        _ => Inline::Wait(0),
    }
}

/// Likewise; and the ring's threads would be in the way of the loop's own writes to that file.
fn write_in_place(file: &File, offset: u64, from: Slice) -> Inline {
    match file.policy() {
        InlinePolicy::Always => file.write_now(offset, from),
        _ => Inline::Wait(0),
    }
}
