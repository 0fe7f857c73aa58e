//! The descriptors of backends that a loop drives.

use std::time::Instant;

use rustix::event::epoll::{self, EventFlags};

use super::{DRIVEN, Loop};
use crate::driven::Driven;

pub(super) struct Drive {
    driven: Box<dyn Driven>,
    /// Unique in the engine.
    number: u64,
    interest: Option<EventFlags>,
    active: bool,
}

impl Loop {
    pub(super) fn drive(&mut self, driven: Box<dyn Driven>, number: u64) {
        let slot = self.drives.insert(Drive { driven, number, interest: None, active: false });
        self.poll_driven(slot);
    }

    pub(super) fn kick(&mut self, number: u64) {
        if let Some((slot, _)) = self.drives.iter().find(|(_, drive)| drive.number == number) {
            self.poll_driven(slot);
        }
    }

    pub(super) fn activate_driven(&mut self, slot: usize) {
        if let Some(drive) = self.drives.get_mut(slot).filter(|drive| !drive.active) {
            drive.active = true;
            self.active_drives.push(slot);
        }
    }

    /// Polls all active descriptors once. Returns whether there was any work.
    pub(super) fn poll_drives(&mut self) -> bool {
        let (mut moved, mut at) = (false, 0);
        while at < self.active_drives.len() {
            let slot = self.active_drives[at];
            moved |= self.poll_driven(slot);
            // It was removed if it is over.
            if self.active_drives.get(at) == Some(&slot) {
                at += 1;
            }
        }
        moved
    }

    /// Leaves all descriptors to epoll, which reports those with input.
    pub(super) fn rest_drives(&mut self) {
        for slot in self.active_drives.drain(..) {
            if let Some(drive) = self.drives.get_mut(slot) {
                drive.active = false;
            }
        }
    }

    pub(super) fn expire_drives(&mut self) {
        let next = self.next_drive_deadline();
        if next.is_none_or(|at| at > Instant::now()) {
            return;
        }
        let now = Instant::now();
        let late = self.drives.iter().filter(|(_, drive)| drive.driven.deadline().is_some_and(|at| at <= now));
        let late: Vec<usize> = late.map(|(slot, _)| slot).collect();
        for slot in late {
            self.drives[slot].driven.expire(now);
            self.settle_driven(slot);
        }
    }

    pub(super) fn next_drive_deadline(&self) -> Option<Instant> {
        self.drives.iter().filter_map(|(_, drive)| drive.driven.deadline()).min()
    }

    fn poll_driven(&mut self, slot: usize) -> bool {
        let moved = self.drives[slot].driven.poll(&mut self.input);
        self.activate_driven(slot);
        self.settle_driven(slot);
        moved
    }

    fn settle_driven(&mut self, slot: usize) {
        let drive = &mut self.drives[slot];
        let wanted = (!drive.driven.is_over()).then(|| drive.driven.interest());
        if wanted != drive.interest {
            let fd = drive.driven.descriptor();
            let data = epoll::EventData::new_u64(DRIVEN | slot as u64);
            let changed = match (drive.interest, wanted) {
                (None, Some(flags)) => epoll::add(&self.epoll, fd, data, flags),
                (Some(_), Some(flags)) => epoll::modify(&self.epoll, fd, data, flags),
                (_, None) => epoll::delete(&self.epoll, fd),
            };
            drive.interest = wanted;
            if let Err(error) = changed {
                // Dropping it tells its backend.
                tracing::error!(%error, "epoll refuses a backend's descriptor");
                drive.interest = None;
                self.remove_driven(slot);
                return;
            }
        }
        if wanted.is_none() {
            self.remove_driven(slot);
        }
    }

    fn remove_driven(&mut self, slot: usize) {
        drop(self.drives.remove(slot));
        self.active_drives.retain(|&other| other != slot);
    }
}
