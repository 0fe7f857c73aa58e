//! A device: a map that can be swapped, a gate that can be closed, counters and faults.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use blkloom_io::{File, Region, errno::ESHUTDOWN};
use blkloom_map::{Extent, Handles, Hint, Piece, Place};

use crate::epoch::{Epochs, Pin};
use crate::fault::{Fault, FaultQueue};
use crate::held::Held;
use crate::inbox::{Inbox, Message, TaskId};
use crate::io_errors::{IoError, IoErrors};
use crate::lock;
use crate::stacking::{self, Users};
use crate::stats::{Op, SHARDS, Shard, Stats};
use crate::turn::Turn;

/// What the engine's maps name.
pub struct Kinds;

impl Handles for Kinds {
    type File = Arc<File>;
    type Region = Arc<Region>;
    type Device = Arc<Device>;
}

pub type Map = blkloom_map::Map<Kinds>;

/// Maps of more segments than this keep in mind, a shard, where it looked last: then the next lookup of a
/// sequence takes 4 ns, however many segments there are; with fewer, bisection is about as quick.
const WORTH_A_HINT: usize = 64;

/// A map and what a flush must know of it.
pub struct Mapping {
    pub map: Map,
    /// One a shard, or none.
    hints: Box<[Hint]>,
    /// Every file a write may have reached, once.
    pub(crate) files: Box<[Arc<File>]>,
    pub(crate) lower: Box<[Arc<Device>]>,
    /// See `Device::copies`; but for the devices below.
    copies: Copies,
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
        let mut copies = Copies::None;
        for leaf in map.segments().iter().flat_map(|segment| segment.extent.leaves()) {
            copies = copies.max(match leaf {
                Extent::Data { file, .. } if file.direct() => Copies::Blocks,
                Extent::Table(table) if table.files().iter().any(|file| file.direct()) => Copies::Blocks,
                Extent::Data { writable: true, .. } | Extent::Device { writable: true, .. } => Copies::None,
                Extent::Zero { discard_writes: true } | Extent::Memory { .. } | Extent::Error(_) => Copies::None,
                _ => Copies::Bytes,
            });
            match leaf {
                Extent::Data { file, .. } => add(file),
                Extent::Table(table) => table.files().iter().for_each(&mut add),
                Extent::Device { device, .. } if !lower.iter().any(|known| Arc::ptr_eq(known, device)) => {
                    lower.push(device.clone());
                }
                _ => {}
            }
        }
        let hints = if map.segments().len() > WORTH_A_HINT { SHARDS } else { 0 };
        let hints = std::iter::repeat_with(Hint::default).take(hints).collect();
        Mapping { map, hints, files: files.into(), lower: lower.into(), copies }
    }

    /// `Map::lookup`, for requests of one shard.
    pub(crate) fn lookup(&self, shard: Shard, offset: u64, len: u64) -> Option<Piece<'_, Kinds>> {
        match self.hints.get(shard.0) {
            Some(hint) => self.map.lookup_near(hint, offset, len),
            None => self.map.lookup(offset, len),
        }
    }

    /// Whose range it is, as a piece that faults.
    pub(crate) fn owned(&self, offset: u64, len: u64) -> Option<Piece<'_, Kinds>> {
        self.map.owner(offset, len).map(|(owner, len)| Piece { owner, len, place: Place::Fault })
    }

    /// Whether `device` stands directly below this map.
    pub(crate) fn names(&self, device: &Device) -> bool {
        self.lower.iter().any(|lower| std::ptr::eq(&**lower, device))
    }
}

/// What is made of the bytes of a request on their way, at most.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Copies {
    None,
    /// A copy for a target.
    Bytes,
    /// One that whole blocks of direct I/O surround.
    Blocks,
}

/// As good as for ever, and still a time the clock can tell.
pub(crate) const LONGEST_TIMEOUT: Duration = Duration::from_secs(10 * 365 * 86400);

const LIVE: u8 = 0;
const SUSPENDED: u8 = 1;
const CLOSED: u8 = 2;

pub struct Device {
    name: String,
    pub(crate) mapping: ArcSwapOption<Mapping>,
    pub(crate) users: Users,
    gate: AtomicU8,
    pub(crate) epochs: Epochs,
    pub(crate) stats: Stats,
    io_errors: IoErrors,
    pub(crate) faults: FaultQueue,
    pub(crate) held: Arc<Held>,
    at_gate: Mutex<Vec<(Arc<Inbox>, TaskId)>>,
    /// One suspend, swap, resume or close at a time.
    control: Turn,
    pub(crate) fault_timeout: Duration,
    /// Of clients' memory, of small and of large requests: see `budget`.
    pub(crate) reservations: [AtomicUsize; 2],
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
    /// With the new map so many devices would stand on one another.
    TooDeep(usize),
}

impl Device {
    /// Live with a map, or suspended with none.
    pub fn new(
        name: String,
        mapping: Option<Arc<Mapping>>,
        fault_timeout: Duration,
    ) -> Result<Arc<Device>, SuspendError> {
        let device = Arc::new(Device {
            name,
            mapping: ArcSwapOption::empty(),
            users: Users::default(),
            gate: AtomicU8::new(SUSPENDED),
            epochs: Epochs::default(),
            stats: Stats::default(),
            io_errors: IoErrors::default(),
            faults: FaultQueue::default(),
            held: Arc::default(),
            at_gate: Mutex::new(Vec::new()),
            control: Turn::default(),
            fault_timeout: fault_timeout.min(LONGEST_TIMEOUT),
            reservations: Default::default(),
            has_flush_owners: AtomicBool::new(false),
        });
        if let Some(mapping) = mapping {
            device.swap(mapping)?;
            device.resume();
        }
        Ok(device)
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

    pub(crate) fn is_live(&self) -> bool {
        self.gate.load(Ordering::SeqCst) == LIVE
    }

    /// Requests whose target has them wait.
    pub fn held(&self) -> usize {
        self.held.count()
    }

    /// Has the targets asked again for them.
    pub fn retry_held(&self) {
        self.held.release();
    }

    /// They fail, and what a target has wait from now on: the device is about to end.
    pub fn fail_held(&self) {
        self.held.refuse();
    }

    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    pub fn io_errors(&self) -> &IoErrors {
        &self.io_errors
    }

    /// A request to the device ends with this error of storage: counts it, and wakes the mapper, which tells of it.
    pub(crate) fn io_failed(&self, op: Op, offset: u64, errno: i32, file: Option<&File>) {
        let file = file.map_or("", File::label).to_owned();
        if self.io_errors.record(IoError { op, offset, errno, file }) {
            self.faults.wake();
        }
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

    /// False: the device has closed, for good.
    fn set_gate(&self, state: u8) -> bool {
        let mut waiting = lock(&self.at_gate);
        if self.closed() {
            return state == CLOSED;
        }
        self.gate.store(state, Ordering::SeqCst);
        if state != SUSPENDED {
            for (inbox, task) in waiting.drain(..) {
                inbox.send(Message::GateOpened(task));
            }
        }
        drop(waiting);
        if state != LIVE {
            self.held.release();
        }
        true
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

    /// Whether a file that a write may have reached, here or below, cannot be synced any more.
    pub(crate) fn has_failed_syncs(&self) -> bool {
        self.mapping.load().as_ref().is_some_and(|mapping| {
            mapping.files.iter().any(|file| file.sync_error().is_some())
                || mapping.lower.iter().any(|lower| lower.has_failed_syncs())
        })
    }

    pub(crate) fn copies(&self) -> Copies {
        self.mapping.load().as_ref().map_or(Copies::Blocks, |mapping| {
            let below = mapping.lower.iter().map(|lower| lower.copies());
            below.fold(mapping.copies, Copies::max)
        })
    }

    /// Stops new requests, finishes those in flight, then runs `flush`.
    pub fn suspend(
        &self,
        deadline: Option<Instant>,
        flush: impl FnOnce() -> Result<(), SuspendError>,
    ) -> Result<(), SuspendError> {
        let Some(_control) = self.control.take(deadline) else {
            return Err(SuspendError::Timeout);
        };
        if self.suspended() {
            return Ok(());
        }
        if !self.set_gate(SUSPENDED) {
            return Err(SuspendError::Closed);
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
    pub fn swap(self: &Arc<Self>, mapping: Arc<Mapping>) -> Result<Option<Arc<Mapping>>, SuspendError> {
        let _control = self.control.take(None);
        if self.closed() {
            return Err(SuspendError::Closed);
        }
        let owners = !mapping.map.flush_owners().is_empty();
        let before = self.has_flush_owners.load(Ordering::SeqCst);
        self.has_flush_owners.store(before || owners, Ordering::SeqCst);
        let old = stacking::publish(self, mapping).inspect_err(|_| {
            self.has_flush_owners.store(before, Ordering::SeqCst);
        })?;
        if self.closed() {
            // `close` did not wait for its turn, and may have let go of the map before this one.
            self.mapping.store(None);
            return Err(SuspendError::Closed);
        }
        self.epochs.synchronize(None);
        self.has_flush_owners.store(owners, Ordering::SeqCst);
        Ok(old)
    }

    /// Opens the gate. False: there is no map to be live with, or the device has closed.
    pub fn resume(&self) -> bool {
        let _control = self.control.take(None);
        self.mapping.load().is_some() && self.set_gate(LIVE)
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

    pub fn wake_mapper(&self) {
        self.faults.wake();
    }

    /// Refuses what comes, lets what is in flight end, and lets the map go.
    pub fn close(&self) {
        // Bounded: a request may be waiting at the gate of a suspended device below, or for storage that
        // does not answer, and then so may whoever has the turn. What a request uses it holds; only its
        // answer comes late.
        let deadline = Instant::now() + self.fault_timeout;
        self.set_gate(CLOSED);
        let _control = self.control.take(Some(deadline));
        self.epochs.drain(Some(deadline));
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
