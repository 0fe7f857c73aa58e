//! The end of a flush, or of a durable request: data files are synced by the pool, then the targets
//! that asked for it flush as faults. Part of `queue`, whose invariants hold here.

use std::sync::Arc;

use blkloom_io::File;

use super::{Attempt, Inside, Phase, Queue, Walk};
use crate::device::{Device, Refused};
use crate::pool::Chore;
use crate::request::Request;
use crate::stats::Op;

impl Queue {
    pub(super) fn sync(&mut self, index: usize, inside: bool) {
        let device = self.actives[index].request.device.clone();
        // A flush changes no place, so it enters only the request's own device: what is below may
        // be suspended, and syncing its files then is harmless.
        let through_gate = self.actives[index].request.flags.through_gate;
        let pin = if through_gate || inside { Ok(device.epochs.pin(self.shard)) } else { device.enter(self.shard) };
        let mut path = Vec::new();
        let walk = Walk { active: index, path: &mut path, inside: &[], attempt: Attempt::default(), pieces: 0 };
        match pin {
            Err(Refused::Suspended) => {
                self.actives[index].phase = Phase::Main;
                self.wait_at_gate(&walk, &device, 0, 0);
            }
            Err(refused) => self.fail(index, refused.errno()),
            Ok(pin) => {
                walk.path.push(Inside { device: device.clone(), pin: Some(pin) });
                // The last flush of a suspend is about what is not known to be lost.
                let known = |file: &File| through_gate && file.sync_error().is_some() && !file.has_unreported_failure();
                for file in files(&device).into_iter().filter(|file| !known(file)) {
                    self.chore(&walk, &file, Chore::Sync, 0, 0);
                }
                if self.actives[index].tasks == 0 {
                    // Here, while the device is pinned.
                    self.actives[index].phase = Phase::Owners;
                    self.flush_owners(index);
                }
                device.epochs.unpin(pin);
            }
        }
    }

    pub(super) fn flush_owners(&mut self, index: usize) {
        let device = self.actives[index].request.device.clone();
        let mut owners = Vec::new();
        collect_owners(&device, &mut owners);
        for (device, owner) in owners {
            let pin = device.epochs.pin(self.shard);
            let mut path = vec![Inside { device: device.clone(), pin: Some(pin) }];
            let walk = Walk { active: index, path: &mut path, inside: &[], attempt: Attempt::default(), pieces: 0 };
            self.fault(&walk, owner, Op::Flush, 0, 0, 0);
            device.epochs.unpin(pin);
        }
    }
}

/// Whether a request ends with a flush. A durable write of plain files is durable by itself.
pub(super) fn must_flush(request: &Request) -> bool {
    match request.op {
        Op::Flush => true,
        // Where something written before is lost, it fails with the flush.
        Op::Write => request.flags.fua && (request.device.has_owners() || request.device.has_failed_syncs()),
        Op::Discard | Op::WriteZeroes => request.flags.fua && request.device.needs_flush(),
        _ => false,
    }
}

/// Every file a write to `device` may have reached.
fn files(device: &Device) -> Vec<Arc<File>> {
    let Some(mapping) = device.mapping.load_full() else {
        return Vec::new();
    };
    let below = mapping.lower.iter().flat_map(|lower| files(lower));
    mapping.files.iter().cloned().chain(below).collect()
}

/// Targets to flush, those of lower devices first.
fn collect_owners(device: &Arc<Device>, into: &mut Vec<(Arc<Device>, u32)>) {
    let Some(mapping) = device.mapping.load_full() else {
        return;
    };
    mapping.lower.iter().for_each(|lower| collect_owners(lower, into));
    into.extend(mapping.map.flush_owners().iter().map(|&owner| (device.clone(), owner)));
}
