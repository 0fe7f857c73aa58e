//! `Vring`: a split virtqueue in the memory of a guest, and the region of its requests in flight.
//!
//! A head that is taken is marked in the region before it is served. Used heads are put into the used ring and become
//! visible to the driver together, with `publish`; then their marks are removed. The order of these stores is that of
//! `blkloom_virtio_wire::inflight`: if the process dies between two of them, the region tells which heads to serve again.
//!
//! The driver is hostile: what it stores is loaded once and checked, and the indices of this side are never loaded.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use blkloom_io::{GuestMemory, SharedMemory, Slice};
use blkloom_virtio_wire::split::{
    self, ALIGNMENTS, Chain, DESCRIPTOR_SIZE, FLAGS, INDEX, LARGEST, Malformed, NO_INTERRUPT, NO_NOTIFY, Piece,
};
use blkloom_virtio_wire::{Memory, inflight};

use super::{DirtyLog, QueueMemory, QueueSettings, ServeError};

/// The memory of a guest as a driver's.
struct Guest<'m>(&'m GuestMemory);

impl Memory for Guest<'_> {
    fn read(&self, address: u64, into: &mut [u8]) -> bool {
        self.0.read(address, into)
    }
}

pub(super) struct Vring {
    /// They keep the memory of all slices here.
    guest: Arc<GuestMemory>,
    _inflight: Arc<SharedMemory>,
    log: Option<Arc<DirtyLog>>,
    used_log: Option<u64>,
    descriptors: Slice<'static>,
    available: Slice<'static>,
    used: Slice<'static>,
    region: Slice<'static>,
    size: u16,
    event_idx: bool,
    indirect: bool,
    /// Heads to serve before those of the available ring.
    again: VecDeque<u16>,
    /// By head: it was taken, and the driver does not know that it is used.
    taken: Box<[bool]>,
    /// Index in the available ring of the next head.
    next: u16,
    /// Index of the used ring, as the driver knows it.
    index: u16,
    /// Heads that were put since.
    batch: Vec<u16>,
    last_batch: u16,
    counter: u64,
    /// Index at the last notification of the driver.
    notified: u16,
    /// The driver was asked to notify this side.
    asks: bool,
}

impl Vring {
    /// Also returns whether the requests in flight could be recovered.
    pub fn new(memory: QueueMemory, settings: QueueSettings) -> Result<(Vring, Result<(), Malformed>), ServeError> {
        let QueueSettings { size, event_idx, indirect, .. } = settings;
        if !size.is_power_of_two() || size > LARGEST {
            let what = format!("a queue of {size} descriptors: a power of two up to {LARGEST} is possible");
            return Err(ServeError::Settings(what));
        }
        let QueueMemory { guest, inflight: (shared, at), log } = memory;
        let used_log = settings.used_log.filter(|_| log.is_some());
        if let Some(log) = &log {
            let used_end = used_log.map_or(Some(0), |at| at.checked_add(split::used_length(size) as u64));
            if !used_end.is_some_and(|end| log.covers(end.max(guest.end()))) {
                let end = used_end.map_or_else(|| "the end of all addresses".to_owned(), |end| format!("{end:#x}"));
                let what = format!("a log that does not cover memory up to {:#x} and a ring up to {end}", guest.end());
                return Err(ServeError::Settings(what));
            }
        }
        let lengths = [split::descriptors_length(size), split::available_length(size), split::used_length(size)];
        let addresses = [settings.descriptors, settings.available, settings.used];
        let mut areas = [Slice::empty(); 3];
        for ((area, address), (length, alignment)) in
            areas.iter_mut().zip(addresses).zip(lengths.into_iter().zip(ALIGNMENTS))
        {
            let found = guest.user(address, length);
            // The address in this process is aligned as the other one, unless the regions are not.
            let found = found.filter(|found| (found.as_ptr() as usize as u64).is_multiple_of(alignment));
            let refused = || ServeError::Settings(format!("a ring of {length} bytes at {address:#x}"));
            // SAFETY: `guest` is kept as long as the slice.
            *area = unsafe { lasting(found.ok_or_else(refused)?) };
        }
        let (length, whole) = (inflight::region_length(size), shared.slice());
        if at > whole.len() || length > whole.len() - at || !at.is_multiple_of(8) {
            let what = format!("{length} bytes at {at} for requests in flight, of {}", whole.len());
            return Err(ServeError::Settings(what));
        }
        // SAFETY: `shared` is kept as long as the slice.
        let region = unsafe { lasting(whole.part(at, length)) };
        let [descriptors, available, used] = areas;
        let index = used.load_u16(INDEX);
        let mut vring = Vring {
            guest,
            _inflight: shared,
            log,
            used_log,
            descriptors,
            available,
            used,
            region,
            size,
            event_idx,
            indirect,
            again: VecDeque::new(),
            taken: vec![false; size.into()].into(),
            next: settings.next,
            index,
            batch: Vec::with_capacity(size.into()),
            last_batch: 0,
            counter: 0,
            notified: index,
            asks: true,
        };
        // A former engine may have died between a store and its mark.
        vring.mark_used(0, vring.used.len());
        let recovered = vring.recover();
        Ok((vring, recovered))
    }

    /// Begins with the requests that another engine has left in flight.
    fn recover(&mut self) -> Result<(), Malformed> {
        let left = inflight::left(&self.region.to_vec(), self.size, self.index)?;
        let Some(left) = left else {
            self.region.store_u16(inflight::COUNT, self.size);
            self.region.store_u16(inflight::USED_INDEX, self.index);
            self.region.store_u16(inflight::VERSION, inflight::USED);
            return Ok(());
        };
        left.used.iter().for_each(|&head| self.region.store_u8(inflight::mark_offset(head), 0));
        self.region.store_u16(inflight::USED_INDEX, self.index);
        if !left.unanswered.is_empty() {
            // The available ring has them and nothing else between the used index and the next head.
            self.next = self.index.wrapping_add(left.unanswered.len() as u16);
        }
        left.unanswered.iter().for_each(|&head| self.taken[usize::from(head)] = true);
        self.again = left.unanswered.into();
        self.counter = left.counter;
        Ok(())
    }

    pub fn is_logged(&self) -> bool {
        self.log.is_some()
    }

    /// Marks pieces that were written in the log.
    pub fn mark(&self, pieces: &[Piece]) {
        if let Some(log) = &self.log {
            pieces.iter().for_each(|piece| log.mark(piece.address, piece.length.into()));
        }
    }

    /// Tells the other program that the log has changed.
    pub fn tell_log(&self) {
        if let Some(log) = &self.log {
            log.tell();
        }
    }

    /// Marks a part of the used ring.
    fn mark_used(&self, at: usize, length: usize) {
        if let (Some(log), Some(start)) = (&self.log, self.used_log) {
            log.mark(start + at as u64, length as u64);
        }
    }

    fn store_used(&self, at: usize, value: u16) {
        self.used.store_u16(at, value);
        self.mark_used(at, size_of::<u16>());
    }

    pub fn next(&self) -> u16 {
        self.next
    }

    /// Whether `take_again` has a head.
    pub fn has_again(&self) -> bool {
        !self.again.is_empty()
    }

    /// A head that was taken before: by another engine, or by this one, which could not serve it.
    pub fn take_again(&mut self) -> Option<u16> {
        self.again.pop_front()
    }

    /// Serves a head that was just taken later, before others.
    pub fn postpone(&mut self, head: u16) {
        self.again.push_front(head);
    }

    /// Takes the next head of the available ring.
    pub fn take(&mut self) -> Result<Option<u16>, Malformed> {
        if split::pending(self.available.load_u16(INDEX), self.next, self.size)? == 0 {
            return Ok(None);
        }
        let head = self.available.load_u16(split::available_offset(self.next, self.size));
        match self.taken.get_mut(usize::from(head)) {
            Some(taken) if !*taken => *taken = true,
            _ => return Err(Malformed::Descriptor { index: head, size: self.size }),
        }
        self.next = self.next.wrapping_add(1);
        let counter = self.counter.to_le_bytes();
        self.region.part(inflight::counter_offset(head), counter.len()).copy_from(counter[..].into());
        self.region.store_u8(inflight::mark_offset(head), 1);
        self.counter = self.counter.wrapping_add(1);
        Ok(Some(head))
    }

    /// Reads the chain of a head.
    pub fn collect(&self, head: u16, chain: &mut Chain) -> Result<(), Malformed> {
        let table = |index: u16| {
            let mut bytes = [0; DESCRIPTOR_SIZE];
            let from = self.descriptors.part(usize::from(index) * DESCRIPTOR_SIZE, DESCRIPTOR_SIZE);
            Slice::from(&mut bytes[..]).copy_from(from.source());
            bytes
        };
        chain.collect(head, (self.size, self.indirect), table, &self.memory())
    }

    pub fn memory(&self) -> impl Memory + '_ {
        Guest(&self.guest)
    }

    /// The memory of a piece, up to the end of its region. None: it is not memory of the guest.
    ///
    /// # Safety
    /// The vring is kept as long as the slice.
    pub unsafe fn part(&self, Piece { address, length }: Piece) -> Option<Slice<'static>> {
        // SAFETY: promised by the caller; the vring keeps `guest`.
        self.guest.guest(address, length as usize).map(|part| unsafe { lasting(part) })
    }

    /// Puts a head into the used ring. written: number of bytes of its chain that were written.
    pub fn put(&mut self, head: u16, written: u32) {
        let element = split::used(head, written);
        let at = self.index.wrapping_add(self.batch.len() as u16);
        let place = split::used_offset(at, self.size);
        self.used.part(place, element.len()).copy_from(element[..].into());
        self.mark_used(place, element.len());
        self.region.store_u16(inflight::link_offset(head), self.last_batch);
        self.region.store_u16(inflight::LAST_BATCH, head);
        self.last_batch = head;
        self.batch.push(head);
    }

    /// Number of heads that the driver does not know to be used.
    pub fn unpublished(&self) -> usize {
        self.batch.len()
    }

    /// Makes the used heads visible to the driver. Returns whether the driver wants to be notified.
    pub fn publish(&mut self) -> bool {
        if self.batch.is_empty() {
            return false;
        }
        self.index = self.index.wrapping_add(self.batch.len() as u16);
        self.store_used(INDEX, self.index);
        // Between the index and the marks, whose order counts if the process dies here; and before the load of what the
        // driver wants: it stores that and then loads the index.
        fence(Ordering::SeqCst);
        for head in self.batch.drain(..) {
            self.taken[usize::from(head)] = false;
            self.region.store_u8(inflight::mark_offset(head), 0);
        }
        self.region.store_u16(inflight::USED_INDEX, self.index);
        if !self.event_idx {
            return self.available.load_u16(FLAGS) & NO_INTERRUPT == 0;
        }
        let event = self.available.load_u16(split::used_event_offset(self.size));
        let wanted = split::must_notify(event, self.index, self.notified);
        if wanted {
            self.notified = self.index;
        }
        wanted
    }

    /// Lets the driver not notify this side, which looks at the available ring anyway.
    pub fn ask_for_nothing(&mut self) {
        if self.asks && !self.event_idx {
            self.store_used(FLAGS, NO_NOTIFY);
        }
        // With event indices, no notification follows the one for the index that was asked for.
        self.asks = false;
    }

    /// Asks the driver to notify this side of the next available head. Returns whether there is one already.
    pub fn ask(&mut self) -> bool {
        if self.event_idx {
            self.store_used(split::available_event_offset(self.size), self.next);
        } else if !self.asks {
            self.store_used(FLAGS, 0);
        }
        self.asks = true;
        // The driver stores its index and then loads what was just stored.
        fence(Ordering::SeqCst);
        self.available.load_u16(INDEX) != self.next
    }
}

/// # Safety
/// The memory is kept as long as the slice.
unsafe fn lasting(slice: Slice<'_>) -> Slice<'static> {
    // SAFETY: promised by the caller.
    unsafe { Slice::new(slice.as_ptr(), slice.len()) }
}
