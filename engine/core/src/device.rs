//! `Device`: a block device with a replaceable map, a gate for suspend, a fault queue and counters.

use std::collections::{BTreeMap, HashSet};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use blkloom_io::{Errno, File, Region};
use blkloom_map::{Extent, Handles, Hint, Piece, Resolved};

use crate::backend::Backend;
use crate::bounds::{self, OutOfBounds};
use crate::clock::LONGEST_TIMEOUT;
use crate::deadline_mutex::DeadlineMutex;
use crate::deferred::Deferred;
use crate::epoch::{Epochs, Pin};
use crate::fault::{Fault, FaultQueue};
use crate::filter::Filter;
use crate::generations::Generations;
use crate::io_errors::{IoError, IoErrors};
use crate::log;
use crate::mailbox::Poster;
use crate::stacking::{self, Users};
use crate::stats::{Op, SHARDS, Shard, Stats};
use crate::sync::atomic::AtomicU8;
use crate::sync::{Mutex, lock};
use crate::tee::Tee;
use crate::wake::{TaskId, Wake};

/// The handle types in the engine's maps.
pub struct Kinds;

impl Handles for Kinds {
    type File = Arc<File>;
    type Region = Arc<Region>;
    type Device = Arc<Device>;
    type Backend = Arc<dyn Backend>;
    type Tee = Arc<Tee>;
    type Filter = Arc<dyn Filter>;
    type Error = Errno;
    const ENTRY_ERROR: Errno = Errno::IO;
}

pub type Map = blkloom_map::Map<Kinds>;

/// Maps with more segments than this keep a hint per shard: the position of the last lookup. Then the next lookup of a
/// sequential access takes 4 ns, however many segments there are. With fewer segments bisection is about as fast.
const WORTH_A_HINT: usize = 64;

/// A map, with the files, devices and backends below it that a flush must reach.
pub struct Mapping {
    pub map: Map,
    /// One per shard, or none.
    hints: Box<[Hint]>,
    /// Every file that a write may reach, once.
    pub(crate) files: Box<[Arc<File>]>,
    /// The devices directly below.
    pub(crate) lower: Box<[Arc<Device>]>,
    /// Those that a flush must reach: see `is_only_read`.
    pub(crate) flushed: Box<[Arc<Device>]>,
    /// Every backend that a write may reach, once.
    pub(crate) backends: Box<[Arc<dyn Backend>]>,
    /// Every tee, once.
    pub(crate) tees: Box<[Arc<Tee>]>,
    /// Every filter, once: they decide about flushes, too.
    pub(crate) filters: Box<[Arc<dyn Filter>]>,
    /// See `Device::copies`, without the devices below.
    copies: bool,
    /// Durable writes (FUA) end with a flush of the flush owners.
    fua_flushes: bool,
}

/// Whether the first leg of a filtered extent is a device for reads, and a backend or a tee has everything else. That one,
/// which may write to the device by another way, then has to flush it; or not, if it has given the device up.
fn is_only_read(extent: &Extent<Kinds>) -> bool {
    matches!(extent, Extent::Filtered(filtered)
        if matches!(&filtered.legs[..2], [Extent::Device { writable: false, .. }, Extent::Backend { .. } | Extent::Tee { .. }]))
}

fn add_once(devices: &mut Vec<Arc<Device>>, device: &Arc<Device>) {
    if !devices.iter().any(|known| Arc::ptr_eq(known, device)) {
        devices.push(device.clone());
    }
}

impl Mapping {
    pub fn new(map: Map) -> Result<Mapping, OutOfBounds> {
        map.segments().iter().try_for_each(bounds::check)?;
        let (mut files, mut lower): (Vec<Arc<File>>, Vec<Arc<Device>>) = (Vec::new(), Vec::new());
        let mut backends: Vec<Arc<dyn Backend>> = Vec::new();
        let mut tees: Vec<Arc<Tee>> = Vec::new();
        let mut seen = HashSet::new();
        let mut add = |file: &Arc<File>| {
            if file.needs_sync() && seen.insert(Arc::as_ptr(file)) {
                files.push(file.clone());
            }
        };
        let (mut copies, mut flushed) = (false, Vec::<Arc<Device>>::new());
        let leaves = map.segments().iter().flat_map(|segment| {
            let leaves = segment.extent.leaves();
            leaves.iter().enumerate().map(move |(index, leaf)| (leaf, index == 0 && is_only_read(&segment.extent)))
        });
        for (leaf, only_read) in leaves {
            copies |= !matches!(
                leaf,
                Extent::Data { writable: true, .. }
                    | Extent::Device { writable: true, .. }
                    | Extent::Zero { discard_writes: true }
                    | Extent::Memory { .. }
                    | Extent::Error(_)
            );
            match leaf {
                Extent::Data { file, .. } => add(file),
                Extent::Table(table) => {
                    table.files().iter().for_each(&mut add);
                    for device in table.devices() {
                        add_once(&mut lower, device);
                        add_once(&mut flushed, device);
                    }
                }
                Extent::Device { device, .. } => {
                    add_once(&mut lower, device);
                    if !only_read {
                        add_once(&mut flushed, device);
                    }
                }
                Extent::Backend { backend, writable: true, .. }
                    if !backends.iter().any(|known| Arc::ptr_eq(known, backend)) =>
                {
                    backends.push(backend.clone());
                }
                // A flush of the tee, or of its backend, flushes its devices.
                Extent::Tee { tee, .. } if !tees.iter().any(|known| Arc::ptr_eq(known, tee)) => {
                    tees.push(tee.clone());
                    tee.legs().iter().for_each(|leg| add_once(&mut lower, leg));
                }
                _ => {}
            }
        }
        let mut filters: Vec<Arc<dyn Filter>> = Vec::new();
        for segment in map.segments() {
            if let Extent::Filtered(filtered) = &segment.extent
                && !filters.iter().any(|known| Arc::ptr_eq(known, &filtered.filter))
            {
                filters.push(filtered.filter.clone());
            }
        }
        let hints = if map.segments().len() > WORTH_A_HINT { SHARDS } else { 0 };
        let hints = std::iter::repeat_with(Hint::default).take(hints).collect();
        Ok(Mapping {
            map,
            hints,
            files: files.into(),
            lower: lower.into(),
            flushed: flushed.into(),
            backends: backends.into(),
            tees: tees.into(),
            filters: filters.into(),
            copies,
            fua_flushes: true,
        })
    }

    /// Its flush owners have nothing to do after a durable write (FUA).
    #[must_use]
    pub fn without_fua_flushes(self) -> Mapping {
        Mapping { fua_flushes: false, ..self }
    }

    /// `Map::lookup` with the hint of a shard.
    pub(crate) fn lookup(&self, shard: Shard, offset: u64, len: u64) -> Option<Piece<'_, Kinds>> {
        match self.hints.get(shard.0) {
            Some(hint) => self.map.lookup_near(hint, offset, len),
            None => self.map.lookup(offset, len),
        }
    }

    /// The owner of a range, as a piece that faults.
    pub(crate) fn owned(&self, offset: u64, len: u64) -> Option<Piece<'_, Kinds>> {
        self.map.owner(offset, len).map(|(owner, len)| Piece { owner, len, resolved: Resolved::Fault })
    }

    /// Whether `device` is directly below this map.
    pub(crate) fn names(&self, device: &Device) -> bool {
        self.lower.iter().any(|lower| std::ptr::eq(&**lower, device))
    }
}

const LIVE: u8 = 0;
const SUSPENDED: u8 = 1;
const CLOSED: u8 = 2;

/// A block device. It is live, suspended or closed.
pub struct Device {
    name: String,
    pub(crate) mapping: ArcSwapOption<Mapping>,
    pub(crate) users: Users,
    gate: AtomicU8,
    gate_changes: AtomicU64,
    pub(crate) epochs: Epochs,
    pub(crate) stats: Stats,
    io_errors: IoErrors,
    pub(crate) faults: FaultQueue,
    pub(crate) deferred: Arc<Deferred>,
    at_gate: Mutex<Vec<(Poster<Wake>, TaskId)>>,
    /// Serialises suspend, swap, resume and close.
    control: DeadlineMutex,
    pub(crate) fault_timeout: Duration,
    /// Number of memory reservations of small and of large requests: see `budget`.
    pub(crate) reservations: [AtomicUsize; 2],
    /// The map, or one that is just being replaced, has targets that receive flushes: see `needs_flush`.
    has_flush_owners: AtomicBool,
    /// Likewise, also after durable writes: see `has_fua_owners`.
    has_fua_owners: AtomicBool,
}

/// Why a request could not enter: the gate was not open.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refused {
    Suspended,
    Closed,
}

/// Why a suspend failed.
#[derive(Debug, PartialEq, Eq)]
pub enum SuspendError {
    /// Requests in flight did not finish in time. The device is live again.
    Timeout,
    Closed,
    /// The last flush failed; the device stays suspended.
    Flush(Errno),
}

/// Why a map was not accepted. The device keeps its old map.
#[derive(Debug, PartialEq, Eq)]
pub enum SwapError {
    Closed,
    /// The new map reaches the device itself.
    Cycle,
    /// The stack would have this many levels of devices.
    TooDeep(usize),
}

impl Device {
    /// Creates a device: live if it has a map, suspended if not.
    pub fn new(name: String, mapping: Option<Arc<Mapping>>, fault_timeout: Duration) -> Result<Arc<Device>, SwapError> {
        let device = Arc::new(Device {
            name,
            mapping: ArcSwapOption::empty(),
            users: Users::default(),
            gate: AtomicU8::new(SUSPENDED),
            gate_changes: AtomicU64::new(0),
            epochs: Epochs::default(),
            stats: Stats::default(),
            io_errors: IoErrors::default(),
            faults: FaultQueue::default(),
            deferred: Arc::default(),
            at_gate: Mutex::new(Vec::new()),
            control: DeadlineMutex::default(),
            fault_timeout: fault_timeout.min(LONGEST_TIMEOUT),
            reservations: Default::default(),
            has_flush_owners: AtomicBool::new(false),
            has_fua_owners: AtomicBool::new(false),
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

    /// Size in bytes. 0 before the first map.
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

    /// Number of deferred requests: their target answered "retry later".
    pub fn deferred(&self) -> usize {
        self.deferred.count()
    }

    /// Retries all deferred requests: their targets are asked again.
    pub fn retry_deferred(&self) {
        self.deferred.release();
    }

    /// Fails all deferred requests, and those that a target defers from now on: the device is about to end.
    pub fn fail_deferred(&self) {
        self.deferred.refuse();
    }

    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    pub fn io_errors(&self) -> &IoErrors {
        &self.io_errors
    }

    /// Counts an error of storage with which a request to the device ends, and wakes the mapper, which reports the
    /// error.
    pub(crate) fn io_failed(&self, op: Op, offset: u64, errno: Errno, file: Option<&File>) {
        let file = file.map_or("", File::label).to_owned();
        if self.io_errors.record(IoError { op, offset, errno, file }) {
            self.faults.wake();
        }
    }

    /// Enters the device: pins its epoch, so that the map that the caller looks up stays valid until it unpins.
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

    /// Queues a task at the closed gate. False: the gate has opened meanwhile.
    pub(crate) fn wait_at_gate(&self, wakes: &Poster<Wake>, task: TaskId) -> bool {
        let mut waiting = lock(&self.at_gate);
        if self.gate.load(Ordering::SeqCst) != SUSPENDED {
            return false;
        }
        waiting.push((wakes.clone(), task));
        true
    }

    /// Changes the gate and wakes the requests that this concerns. False: the device is closed, for good.
    fn set_gate(&self, state: u8) -> bool {
        let mut waiting = lock(&self.at_gate);
        if self.closed() {
            return state == CLOSED;
        }
        self.gate.store(state, Ordering::SeqCst);
        if state != SUSPENDED {
            for (wakes, task) in waiting.drain(..) {
                wakes.post(Wake::GateOpened(task));
            }
        }
        drop(waiting);
        if state != LIVE {
            self.deferred.release_all();
        }
        self.announce_gate_change();
        true
    }

    /// Makes the mappers of this device and of those below check whether their running handlers block a suspend.
    fn announce_gate_change(&self) {
        self.note_gate_change();
        stacking::visit_below(self, &mut HashSet::new(), &|lower| lower.note_gate_change());
    }

    fn note_gate_change(&self) {
        self.gate_changes.fetch_add(1, Ordering::SeqCst);
        self.faults.wake_by_event();
    }

    /// Number of times that the gate of this device, or of one above, has opened or closed.
    pub fn gate_changes(&self) -> u64 {
        self.gate_changes.load(Ordering::SeqCst)
    }

    /// Whether a flush has anything to do.
    pub(crate) fn needs_flush(&self) -> bool {
        self.has_flush_owners.load(Ordering::Relaxed)
            || self.mapping.load().as_ref().is_some_and(|mapping| {
                !mapping.files.is_empty()
                    || !mapping.backends.is_empty()
                    || !mapping.tees.is_empty()
                    || !mapping.filters.is_empty()
                    || mapping.flushed.iter().any(|lower| lower.needs_flush())
            })
    }

    /// Whether a durable write (FUA) must end with a flush: targets, of this device or below, get it as a fault.
    pub(crate) fn has_fua_owners(&self) -> bool {
        self.has_fua_owners.load(Ordering::Relaxed)
            || self
                .mapping
                .load()
                .as_ref()
                .is_some_and(|mapping| mapping.flushed.iter().any(|lower| lower.has_fua_owners()))
    }

    /// Whether the syncs of a writable file, of this device or below, have failed for good.
    pub(crate) fn has_failed_syncs(&self) -> bool {
        self.mapping.load().as_ref().is_some_and(|mapping| {
            mapping.files.iter().any(|file| file.sync_error().is_some())
                || mapping.flushed.iter().any(|lower| lower.has_failed_syncs())
        })
    }

    /// Whether a target may need a copy of a request's bytes.
    pub(crate) fn copies(&self) -> bool {
        let below = |mapping: &Mapping| mapping.lower.iter().any(|lower| lower.copies());
        self.mapping.load().as_ref().is_none_or(|mapping| mapping.copies || below(mapping))
    }

    /// Closes the gate, waits until the requests in flight have finished, then runs `flush`.
    pub fn suspend(
        &self,
        deadline: Option<Instant>,
        flush: impl FnOnce() -> Result<(), SuspendError>,
    ) -> Result<(), SuspendError> {
        let Some(_control) = self.control.lock(deadline) else {
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
    pub fn swap(self: &Arc<Self>, mapping: Arc<Mapping>) -> Result<Option<Arc<Mapping>>, SwapError> {
        let _control = self.control.lock(None);
        if self.closed() {
            return Err(SwapError::Closed);
        }
        let flush = !mapping.map.flush_owners().is_empty();
        let flags = [(&self.has_flush_owners, flush), (&self.has_fua_owners, flush && mapping.fua_flushes)];
        let before = flags.map(|(flag, owners)| flag.fetch_or(owners, Ordering::SeqCst));
        let old = stacking::publish(self, mapping).inspect_err(|_| {
            flags.iter().zip(before).for_each(|((flag, _), before)| flag.store(before, Ordering::SeqCst));
        })?;
        if self.closed() {
            // `close` did not wait for the control lock, and may have dropped the map before this one.
            self.mapping.store(None);
            return Err(SwapError::Closed);
        }
        self.epochs.synchronize(None);
        flags.iter().for_each(|(flag, owners)| flag.store(*owners, Ordering::SeqCst));
        Ok(old)
    }

    /// Opens the gate. False: the device has no map, or is closed.
    pub fn resume(&self) -> bool {
        let _control = self.control.lock(None);
        self.mapping.load().is_some() && self.set_gate(LIVE)
    }

    /// Waits until no request uses anything that was looked up before this call.
    pub fn synchronize(&self) {
        self.epochs.synchronize(None);
    }

    /// Declares that a mapper thread answers this device's faults.
    pub fn attach_mapper(self: &Arc<Device>) {
        self.faults.attach();
        log::attach(self);
    }

    /// Waits for faults: see `FaultQueue::next`.
    pub fn next_faults(&self, timeout: Option<Duration>) -> Option<Vec<Fault>> {
        self.faults.next(timeout)
    }

    /// A descriptor that is readable while `next_faults` would not wait.
    pub fn fault_event(&self) -> std::io::Result<BorrowedFd<'_>> {
        self.faults.event()
    }

    /// Makes `next_faults` return.
    pub fn wake_mapper(&self) {
        self.faults.wake();
    }

    /// Closes the gate for good, waits for the requests in flight (for a bounded time), and drops the map.
    pub fn close(&self) {
        // Bounded: a request may wait at the gate of a suspended device below, or for storage that does not answer,
        // and so may the holder of the control lock. Dropping the map is safe: a request keeps references to all that
        // it uses, and only its answer comes late.
        let deadline = Instant::now() + self.fault_timeout;
        self.set_gate(CLOSED);
        let _control = self.control.lock(Some(deadline));
        self.epochs.drain(Some(deadline));
        self.faults.close();
        self.mapping.store(None);
    }
}

impl Refused {
    pub(crate) fn errno(self) -> Errno {
        Errno::SHUTDOWN
    }
}

/// One export of a device, with counters of its own.
pub struct Export {
    pub device: Arc<Device>,
    pub name: String,
    pub read_only: bool,
    pub stats: Stats,
    /// Requests in flight of transports that count them (NBD: those that went to the queue).
    pub generations: Generations,
    served: Mutex<BTreeMap<&'static str, usize>>,
}

impl Export {
    pub fn new(device: Arc<Device>, name: String, read_only: bool) -> Arc<Export> {
        let (stats, generations, served) = (Stats::default(), Generations::default(), Mutex::default());
        Arc::new(Export { device, name, read_only, stats, generations, served })
    }

    /// Number of transports that serve the export now, by kind.
    pub fn transports(&self) -> BTreeMap<&'static str, usize> {
        lock(&self.served).clone()
    }

    pub(crate) fn begin(&self, kind: &'static str) {
        *lock(&self.served).entry(kind).or_default() += 1;
    }

    pub(crate) fn end(&self, kind: &'static str) {
        let mut served = lock(&self.served);
        if let Some(count) = served.get_mut(kind) {
            *count -= 1;
            served.retain(|_, count| *count > 0);
        }
    }
}
