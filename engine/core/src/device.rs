//! A device: a map that can be swapped, a gate that can be closed, counters and faults.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use blkloom_io::{File, Region, errno::ESHUTDOWN};
use blkloom_map::{Extent, Handles};

use crate::epoch::{Epochs, Pin};
use crate::fault::{Fault, FaultQueue};
use crate::inbox::{Inbox, Message, TaskId};
use crate::lock;
use crate::stats::{Shard, Stats};

/// What the engine's maps name.
pub struct Kinds;

impl Handles for Kinds {
    type File = Arc<File>;
    type Region = Arc<Region>;
    type Device = Arc<Device>;
}

pub type Map = blkloom_map::Map<Kinds>;

/// A map and what a flush must know of it.
pub struct Mapping {
    pub map: Map,
    /// Every file a write may have reached, once.
    pub(crate) files: Box<[Arc<File>]>,
    pub(crate) lower: Box<[Arc<Device>]>,
}

impl Mapping {
    pub fn new(map: Map) -> Mapping {
        let (mut files, mut lower): (Vec<Arc<File>>, Vec<Arc<Device>>) = (Vec::new(), Vec::new());
        let mut seen = std::collections::HashSet::new();
        let mut add = |file: &Arc<File>| {
            if file.needs_sync() && seen.insert(Arc::as_ptr(file)) {
                files.push(file.clone());
            }
        };
        for leaf in map.segments().iter().flat_map(|segment| segment.extent.leaves()) {
            match leaf {
                Extent::Data { file, .. } => add(file),
                Extent::Table(table) => table.files().iter().for_each(&mut add),
                Extent::Device { device, .. } if !lower.iter().any(|known| Arc::ptr_eq(known, device)) => {
                    lower.push(device.clone());
                }
                _ => {}
            }
        }
        Mapping { map, files: files.into(), lower: lower.into() }
    }

    /// Whether this map, or one below it, reaches `device`.
    fn reaches(&self, device: &Device) -> bool {
        self.lower.iter().any(|lower| {
            std::ptr::eq(&**lower, device)
                || lower.mapping.load().as_ref().is_some_and(|mapping| mapping.reaches(device))
        })
    }
}

/// As good as for ever, and still a time the clock can tell.
pub(crate) const LONGEST_TIMEOUT: Duration = Duration::from_secs(10 * 365 * 86400);

const LIVE: u8 = 0;
const SUSPENDED: u8 = 1;
const CLOSED: u8 = 2;

pub struct Device {
    name: String,
    pub(crate) mapping: ArcSwapOption<Mapping>,
    gate: AtomicU8,
    pub(crate) epochs: Epochs,
    pub(crate) stats: Stats,
    pub(crate) faults: FaultQueue,
    at_gate: Mutex<Vec<(Arc<Inbox>, TaskId)>>,
    /// One suspend, swap, resume or close at a time.
    control: Mutex<()>,
    pub(crate) fault_timeout: Duration,
    /// A flush was asked for before the map knew of flush owners: see `needs_flush`.
    has_flush_owners: AtomicBool,
}

/// The gate was not open.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refused {
    Suspended,
    Closed,
}

#[derive(Debug, PartialEq, Eq)]
pub enum SuspendError {
    /// What was in flight did not finish in time; the device is live again.
    Timeout,
    Closed,
    /// The last flush failed; the device stays suspended.
    Flush(i32),
    /// The new map reaches the device itself.
    Cycle,
}

impl Device {
    pub fn new(name: String, mapping: Option<Arc<Mapping>>, fault_timeout: Duration) -> Arc<Device> {
        let gate = if mapping.is_some() { LIVE } else { SUSPENDED };
        let owners = mapping.as_ref().is_some_and(|mapping| !mapping.map.flush_owners().is_empty());
        Arc::new(Device {
            name,
            mapping: ArcSwapOption::new(mapping),
            gate: AtomicU8::new(gate),
            epochs: Epochs::default(),
            stats: Stats::default(),
            faults: FaultQueue::default(),
            at_gate: Mutex::new(Vec::new()),
            control: Mutex::new(()),
            fault_timeout: fault_timeout.min(LONGEST_TIMEOUT),
            has_flush_owners: AtomicBool::new(owners),
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes; 0 before the first map.
    pub fn size(&self) -> u64 {
        self.mapping.load().as_ref().map_or(0, |mapping| mapping.map.size())
    }

    pub fn suspended(&self) -> bool {
        self.gate.load(Ordering::SeqCst) == SUSPENDED
    }

    pub fn closed(&self) -> bool {
        self.gate.load(Ordering::SeqCst) == CLOSED
    }

    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Enters the device: what is looked up after this stays in use until `leave`.
    pub(crate) fn enter(&self, shard: Shard) -> Result<Pin, Refused> {
        let pin = self.epochs.pin(shard);
        let refused = match self.gate.load(Ordering::SeqCst) {
            LIVE => return Ok(pin),
            SUSPENDED => Refused::Suspended,
            _ => Refused::Closed,
        };
        self.epochs.unpin(pin);
        Err(refused)
    }

    /// Waits at a closed gate. False: it has opened meanwhile.
    pub(crate) fn wait_at_gate(&self, inbox: &Arc<Inbox>, task: TaskId) -> bool {
        let mut waiting = lock(&self.at_gate);
        if self.gate.load(Ordering::SeqCst) != SUSPENDED {
            return false;
        }
        waiting.push((inbox.clone(), task));
        true
    }

    fn set_gate(&self, state: u8) {
        let mut waiting = lock(&self.at_gate);
        self.gate.store(state, Ordering::SeqCst);
        if state != SUSPENDED {
            for (inbox, task) in waiting.drain(..) {
                inbox.send(Message::GateOpened(task));
            }
        }
    }

    /// Whether a flush must do anything but answer.
    pub(crate) fn needs_flush(&self) -> bool {
        self.has_flush_owners.load(Ordering::Relaxed)
            || self.mapping.load().as_ref().is_some_and(|mapping| {
                !mapping.files.is_empty() || mapping.lower.iter().any(|lower| lower.needs_flush())
            })
    }

    /// Whether targets, here or below, want flushes as faults.
    pub(crate) fn has_owners(&self) -> bool {
        self.has_flush_owners.load(Ordering::Relaxed)
            || self.mapping.load().as_ref().is_some_and(|mapping| mapping.lower.iter().any(|lower| lower.has_owners()))
    }

    /// Stops new requests, finishes those in flight, then runs `flush`.
    pub fn suspend(
        &self,
        deadline: Option<Instant>,
        flush: impl FnOnce() -> Result<(), SuspendError>,
    ) -> Result<(), SuspendError> {
        let _control = lock(&self.control);
        match self.gate.load(Ordering::SeqCst) {
            SUSPENDED => return Ok(()),
            CLOSED => return Err(SuspendError::Closed),
            _ => self.set_gate(SUSPENDED),
        }
        if !self.epochs.drain(deadline) {
            self.set_gate(LIVE);
            return Err(SuspendError::Timeout);
        }
        match flush() {
            Err(SuspendError::Timeout) => {
                self.set_gate(LIVE);
                Err(SuspendError::Timeout)
            }
            other => other,
        }
    }

    /// Replaces the map; returns once no request uses the old one.
    pub fn swap(&self, mapping: Arc<Mapping>) -> Result<Option<Arc<Mapping>>, SuspendError> {
        let _control = lock(&self.control);
        if self.gate.load(Ordering::SeqCst) == CLOSED {
            return Err(SuspendError::Closed);
        }
        if mapping.reaches(self) {
            return Err(SuspendError::Cycle);
        }
        let owners = !mapping.map.flush_owners().is_empty();
        if owners {
            self.has_flush_owners.store(true, Ordering::SeqCst);
        }
        let old = self.mapping.swap(Some(mapping));
        self.epochs.synchronize(None);
        self.has_flush_owners.store(owners, Ordering::SeqCst);
        Ok(old)
    }

    /// Opens the gate. False: there is no map to be live with, or the device has closed.
    pub fn resume(&self) -> bool {
        let _control = lock(&self.control);
        if self.mapping.load().is_none() || self.gate.load(Ordering::SeqCst) == CLOSED {
            return false;
        }
        self.set_gate(LIVE);
        true
    }

    pub fn synchronize(&self) {
        self.epochs.synchronize(None);
    }

    pub fn attach_mapper(&self) {
        self.faults.attach();
    }

    pub fn next_faults(&self, timeout: Option<Duration>) -> Option<Vec<Fault>> {
        self.faults.next(timeout)
    }

    /// Refuses what comes, lets what is in flight end, and lets the map go.
    pub fn close(&self) {
        let _control = lock(&self.control);
        self.set_gate(CLOSED);
        // Bounded: a request may be waiting at the gate of a suspended device below. What it uses it
        // holds; only its answer comes late.
        self.epochs.drain(Some(Instant::now() + self.fault_timeout));
        self.faults.close();
        self.mapping.store(None);
    }
}

impl Refused {
    pub(crate) fn errno(self) -> i32 {
        ESHUTDOWN
    }
}

/// One way in to a device, with counters of its own.
pub struct Export {
    pub device: Arc<Device>,
    pub name: String,
    pub read_only: bool,
    pub stats: Stats,
    pub connections: AtomicUsize,
}

impl Export {
    pub fn new(device: Arc<Device>, name: String, read_only: bool) -> Arc<Export> {
        Arc::new(Export { device, name, read_only, stats: Stats::default(), connections: AtomicUsize::new(0) })
    }
}
