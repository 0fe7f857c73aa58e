//! Flush: the pool syncs data files, backends and tees flush, and then targets that receive flushes get a fault. Also the last
//! phase of durable (FUA) requests. Part of `queue`, whose invariants hold here.

use std::sync::Arc;

use blkloom_io::File;
use smallvec::smallvec;

use super::{Attempt, Inside, Path, Phase, Queue, Walk};
use crate::device::{Device, Mapping, Refused};
use crate::filter::Filter;
use crate::pool::Job;
use crate::request::Request;
use crate::stats::Op;

impl Queue {
    pub(super) fn sync(&mut self, index: usize, inside: bool) {
        let device = self.actives[index].request.device.clone();
        // A flush enters only the request's own device. Lower devices may be suspended: syncing their files is
        // harmless then, because a flush changes no data and no map.
        let through_gate = self.actives[index].request.flags.through_gate;
        let pin = if through_gate || inside { Ok(device.epochs.pin(self.shard)) } else { device.enter(self.shard) };
        let mut path = Path::new();
        let walk =
            Walk { active: index, path: &mut path, inside: &[], attempt: Attempt::default(), pieces: 0, filters: 0 };
        match pin {
            Err(Refused::Suspended) => {
                self.actives[index].phase = Phase::Main;
                self.wait_at_gate(&walk, &device, 0, 0);
            }
            Err(refused) => self.fail(index, refused.errno()),
            Ok(pin) => {
                walk.path.push(Inside { device: device.clone(), pin: Some(pin) });
                // The flush of a suspend is not one that a filter fails.
                let mut failure = None;
                each_mapping(&device, &mut |_, mapping| {
                    let fails = |filter: &Arc<dyn Filter>| (!through_gate).then(|| filter.fails_flush()).flatten();
                    failure = failure.or_else(|| mapping.filters.iter().find_map(fails));
                });
                if let Some(errno) = failure {
                    self.fail(index, errno);
                    device.epochs.unpin(pin);
                    return;
                }
                // The flush of a suspend skips files whose failed sync has been reported already.
                let known = |file: &File| through_gate && file.sync_error().is_some() && !file.has_unreported_failure();
                each_mapping(&device, &mut |_, mapping| {
                    for file in mapping.files.iter().filter(|file| !known(file)) {
                        self.start_job(&walk, file, Job::Sync, 0, 0);
                    }
                    for backend in &mapping.backends {
                        self.operate(&walk, backend, Op::Flush, 0, 0, 0);
                    }
                    for tee in &mapping.tees {
                        if through_gate || self.actives[index].elsewhere || !tee.is_open() {
                            self.operate(&walk, tee.backend(), Op::Flush, 0, 0, 0);
                        } else {
                            self.flush_legs(&walk, tee);
                        }
                    }
                });
                if self.actives[index].tasks == 0 && self.actives[index].error.is_none() {
                    // Now, while the device is pinned.
                    self.actives[index].phase = Phase::Owners;
                    self.flush_owners(index);
                }
                device.epochs.unpin(pin);
            }
        }
    }

    pub(super) fn flush_owners(&mut self, index: usize) {
        let device = self.actives[index].request.device.clone();
        each_mapping(&device, &mut |device, mapping| {
            for &owner in mapping.map.flush_owners() {
                let pin = device.epochs.pin(self.shard);
                let mut path = smallvec![Inside { device: device.clone(), pin: Some(pin) }];
                let walk = Walk {
                    active: index,
                    path: &mut path,
                    inside: &[],
                    attempt: Attempt::default(),
                    pieces: 0,
                    filters: 0,
                };
                self.fault(&walk, owner, Op::Flush, 0, 0, 0);
                device.epochs.unpin(pin);
            }
        });
    }
}

/// Whether a request ends with a flush. A durable write to plain files needs none.
pub(super) fn must_flush(request: &Request) -> bool {
    match request.op {
        Op::Flush => true,
        // If an earlier sync failed, the flush fails the request.
        Op::Write => request.flags.fua && (request.device.has_fua_owners() || request.device.has_failed_syncs()),
        Op::Discard | Op::WriteZeroes => request.flags.fua && request.device.needs_flush(),
        _ => false,
    }
}

/// Visits the map of the device and those of all devices below that a flush must reach, which come first.
fn each_mapping(device: &Arc<Device>, visit: &mut dyn FnMut(&Arc<Device>, &Mapping)) {
    let Some(mapping) = device.mapping.load_full() else {
        return;
    };
    mapping.flushed.iter().for_each(|lower| each_mapping(lower, visit));
    visit(device, &mapping);
}
