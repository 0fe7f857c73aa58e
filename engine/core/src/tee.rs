//! `Tee`: several devices (legs) that get the same writes, as the legs of a mirror do.
//!
//! A range is divided into regions. Writes to *open* regions go to all legs at once, and end when all legs have ended
//! them. Writes to other regions go to a backend, which opens and shuts regions. Two writes that overlap are not in
//! flight together, because their order could differ between the legs: the later one waits. A write that ends without
//! having reached all legs shuts its regions and is recorded as *torn*, until the backend has written the range again.
//!
//! Any thread may call any method. Only `wait` waits.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

use crate::backend::Backend;
use crate::device::Device;
use crate::lock;
use crate::mailbox::Poster;
use crate::wake::{TaskId, Wake};

/// Bytes: start and end.
type Range = (u64, u64);

pub struct Tee {
    legs: Box<[Arc<Device>]>,
    backend: Arc<dyn Backend>,
    size: u64,
    region: u64,
    state: Mutex<State>,
    /// A write has ended, or the tee has.
    ended: Condvar,
}

struct State {
    /// One per region.
    open: Box<[bool]>,
    shut: usize,
    in_flight: Vec<Range>,
    /// Tasks that wait for the end of a write that overlaps theirs.
    waiting: Vec<(Range, Poster<Wake>, TaskId)>,
    torn: Vec<Range>,
    over: bool,
}

/// How a write to all legs begins.
pub(crate) enum Begun {
    /// It has begun, and lasts until this is dropped.
    Writing(Writing),
    /// Another one overlaps it.
    Busy,
    /// Not all of its regions are open.
    Shut,
}

/// A write to all legs, in flight.
pub(crate) struct Writing {
    tee: Arc<Tee>,
    range: Range,
    /// All legs have it.
    whole: bool,
}

fn overlap(a: Range, b: Range) -> bool {
    a.0 < b.1 && b.0 < a.1
}

impl Tee {
    /// `size` bytes in regions of `region` (> 0) bytes, all of them shut. The legs have that size.
    pub fn new(legs: Vec<Arc<Device>>, backend: Arc<dyn Backend>, size: u64, region: u64) -> Arc<Tee> {
        let regions = size.div_ceil(region) as usize;
        let state = State {
            open: vec![false; regions].into(),
            shut: regions,
            in_flight: Vec::new(),
            waiting: Vec::new(),
            torn: Vec::new(),
            over: false,
        };
        let (state, ended) = (Mutex::new(state), Condvar::new());
        Arc::new(Tee { legs: legs.into(), backend, size, region, state, ended })
    }

    pub fn legs(&self) -> &[Arc<Device>] {
        &self.legs
    }

    pub(crate) fn backend(&self) -> &Arc<dyn Backend> {
        &self.backend
    }

    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes of `count` regions from `first` on.
    fn range(&self, first: usize, count: usize) -> Range {
        let start = (first as u64).saturating_mul(self.region);
        (start, start.saturating_add((count as u64).saturating_mul(self.region)))
    }

    /// The regions of a range, of those that exist.
    fn regions(&self, range: Range) -> std::ops::Range<usize> {
        let most = self.size.div_ceil(self.region);
        let (first, end) = (range.0 / self.region, range.1.div_ceil(self.region));
        first.min(most) as usize..end.min(most) as usize
    }

    /// Opens regions, except those where a write is torn.
    pub fn open(&self, first: usize, count: usize) {
        let mut state = lock(&self.state);
        for region in self.regions(self.range(first, count)) {
            let range = self.range(region, 1);
            if !state.open[region] && !state.torn.iter().any(|&torn| overlap(torn, range)) {
                state.open[region] = true;
                state.shut -= 1;
            }
        }
    }

    /// Shuts regions: from now on, no write to them begins here. Returns whether one is in flight.
    pub fn shut(&self, first: usize, count: usize) -> bool {
        let range = self.range(first, count);
        let mut state = lock(&self.state);
        state.shut(self.regions(range));
        state.in_flight.iter().any(|&other| overlap(other, range))
    }

    /// Waits until no write to these regions is in flight. False: `end` was called meanwhile.
    pub fn wait(&self, first: usize, count: usize) -> bool {
        let range = self.range(first, count);
        let busy = |state: &mut State| !state.over && state.in_flight.iter().any(|&other| overlap(other, range));
        let state = self.ended.wait_while(lock(&self.state), busy).unwrap_or_else(PoisonError::into_inner);
        !state.over
    }

    /// Makes `wait` return, now and later.
    pub fn end(&self) {
        lock(&self.state).over = true;
        self.ended.notify_all();
    }

    /// The ranges of torn writes: (offset, length).
    pub fn torn(&self) -> Vec<(u64, u64)> {
        lock(&self.state).torn.iter().map(|&(start, end)| (start, end - start)).collect()
    }

    /// A range is not torn any more: it was written again, or its regions are known to differ between the legs.
    pub fn mend(&self, offset: u64, len: u64) {
        let (start, end) = (offset, offset.saturating_add(len));
        let mut state = lock(&self.state);
        let before = std::mem::take(&mut state.torn);
        let left = before.into_iter().flat_map(|torn| [(torn.0, torn.1.min(start)), (torn.0.max(end), torn.1)]);
        state.torn = left.filter(|left| left.0 < left.1).collect();
    }

    /// Whether all regions are open.
    pub(crate) fn is_open(&self) -> bool {
        lock(&self.state).shut == 0
    }

    /// Whether the region at offset `at` is open, and the number of bytes (`len` at most) for which that is so.
    pub(crate) fn run(&self, at: u64, len: u64) -> (bool, u64) {
        let state = lock(&self.state);
        let mut regions = self.regions((at, at.saturating_add(len)));
        let Some(open) = state.open.get(regions.start).copied() else { return (false, len) };
        let end = regions.find(|&region| state.open[region] != open);
        (open, end.map_or(len, |region| region as u64 * self.region - at))
    }

    /// Begins a write of `len` bytes at `at`.
    pub(crate) fn begin(self: &Arc<Tee>, at: u64, len: u64) -> Begun {
        let range = (at, at.saturating_add(len));
        let mut state = lock(&self.state);
        if !state.open[self.regions(range)].iter().all(|open| *open) {
            return Begun::Shut;
        }
        if state.in_flight.iter().any(|&other| overlap(other, range)) {
            return Begun::Busy;
        }
        state.in_flight.push(range);
        Begun::Writing(Writing { tee: self.clone(), range, whole: false })
    }

    /// Wakes a task when no write that overlaps `len` bytes at `at` is in flight. False: none is.
    pub(crate) fn wait_for_end(&self, at: u64, len: u64, wakes: &Poster<Wake>, task: TaskId) -> bool {
        let range = (at, at.saturating_add(len));
        let mut state = lock(&self.state);
        let busy = state.in_flight.iter().any(|&other| overlap(other, range));
        if busy {
            state.waiting.push((range, wakes.clone(), task));
        }
        busy
    }
}

impl State {
    fn shut(&mut self, regions: std::ops::Range<usize>) {
        for open in &mut self.open[regions] {
            self.shut += usize::from(std::mem::replace(open, false));
        }
    }
}

impl Writing {
    /// All legs have the write.
    pub fn complete(&mut self) {
        self.whole = true;
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        let Writing { tee, range, whole } = self;
        let mut state = lock(&tee.state);
        if let Some(at) = state.in_flight.iter().position(|other| other == range) {
            state.in_flight.swap_remove(at);
        }
        if !*whole {
            state.shut(tee.regions(*range));
            state.torn.push(*range);
        }
        // A task that still overlaps another write is woken in vain, and waits again.
        for (_, wakes, task) in state.waiting.extract_if(.., |(other, ..)| overlap(*other, *range)) {
            wakes.post(Wake::GateOpened(task));
        }
        drop(state);
        tee.ended.notify_all();
    }
}

impl std::fmt::Debug for Tee {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tee({} legs, {} bytes)", self.legs.len(), self.size)
    }
}
