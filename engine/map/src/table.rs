//! `ClusterTable`: a two-level table that maps clusters to offsets in files and devices, and that is filled while it is
//! read.
//!
//! The table consists of pages of atomic u64 entries, each behind a pointer that is replaced atomically. A lookup is
//! three loads, an install is a store. A missing page faults, or has the entries of the table's `Missing`. The pointers are in groups that are allocated with their
//! first page: the cost of a table to create, keep and drop depends on its contents, not on its size. Dropping a page
//! is safe at any time: readers that have it finish with it, later readers find it missing, and it can always be
//! installed again. After an entry is *changed*, requests may still use the old location; the device's epochs handle that, not
//! the table.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use arc_swap::{ArcSwapOption, Guard};

use crate::extent::{Handles, Resolved};

/// One table entry: `kind << 61 | file << 49 | offset >> 9`. Files are counted first, then devices.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry(pub u64);

impl Entry {
    pub const FAULT: Entry = Entry(0);
    pub const KIND_DATA: u64 = 1;
    pub const KIND_READ_ONLY: u64 = 2;
    pub const KIND_ZERO: u64 = 3;
    pub const KIND_ERROR: u64 = 4;
    pub const MAX_FILES: usize = 1 << 12;

    pub fn kind(self) -> u64 {
        self.0 >> 61
    }

    pub fn file(self) -> usize {
        (self.0 >> 49) as usize & (Self::MAX_FILES - 1)
    }

    pub fn offset(self) -> u64 {
        (self.0 & ((1 << 49) - 1)) << 9
    }

    fn holds_data(self) -> bool {
        matches!(self.kind(), Self::KIND_DATA | Self::KIND_READ_ONLY)
    }

    /// Whether `next`, the entry of the next cluster, is contiguous with this entry.
    fn continues(self, next: Entry, step: u64) -> bool {
        if self.holds_data() { next.0 == self.0.wrapping_add(step) } else { next.kind() == self.kind() }
    }
}

type Page = Box<[AtomicU64]>;
type Group = Box<[ArcSwapOption<Page>]>;
const GROUP_SHIFT: u32 = 8;

/// A table of the locations of clusters.
pub struct ClusterTable<H: Handles> {
    size: u64,
    shift: u32,
    page_shift: u32,
    /// Each has pointers to `1 << GROUP_SHIFT` pages.
    groups: Box<[OnceLock<Group>]>,
    files: Box<[H::File]>,
    devices: Box<[H::Device]>,
    /// The entry of cluster 0 where the page is missing. That of cluster i is i clusters further.
    missing: Entry,
}

#[derive(Debug, PartialEq, Eq)]
pub enum TableError {
    /// A size is not a power of two in its bounds.
    Shape {
        what: &'static str,
        value: u64,
    },
    TooManyFiles(usize),
    OutOfRange {
        cluster: u64,
        clusters: u64,
    },
    BadEntry {
        entry: u64,
        why: &'static str,
    },
}

impl std::fmt::Display for TableError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            TableError::Shape { what, value } => {
                write!(f, "{what} {value} is not a power of two in its bounds")
            }
            TableError::TooManyFiles(n) => {
                write!(f, "{n} files; a table holds {} at most", Entry::MAX_FILES)
            }
            TableError::OutOfRange { cluster, clusters } => {
                write!(f, "cluster {cluster} is past the end of the table ({clusters} clusters)")
            }
            TableError::BadEntry { entry, why } => write!(f, "entry {entry:#018x}: {why}"),
        }
    }
}

impl std::error::Error for TableError {}

impl<H: Handles> ClusterTable<H> {
    /// size: bytes. cluster: bytes, a power of two from 512 to 2^30. page: entries per page, a power of two.
    pub fn new(size: u64, cluster: u64, page: u64, files: Vec<H::File>) -> Result<Self, TableError> {
        if !cluster.is_power_of_two() || !(512..=1 << 30).contains(&cluster) {
            return Err(TableError::Shape { what: "cluster size", value: cluster });
        }
        if !page.is_power_of_two() || page > 1 << 20 {
            return Err(TableError::Shape { what: "page size", value: page });
        }
        if size == 0 || size >= 1 << 63 {
            return Err(TableError::Shape { what: "table size", value: size });
        }
        if files.len() > Entry::MAX_FILES {
            return Err(TableError::TooManyFiles(files.len()));
        }
        let pages = size.div_ceil(cluster).div_ceil(page);
        if pages > 1 << 28 {
            return Err(TableError::Shape { what: "number of pages", value: pages });
        }
        Ok(ClusterTable {
            missing: Entry::FAULT,
            devices: Box::default(),
            size,
            shift: cluster.trailing_zeros(),
            page_shift: page.trailing_zeros(),
            groups: (0..pages.div_ceil(1 << GROUP_SHIFT)).map(|_| OnceLock::new()).collect(),
            files: files.into(),
        })
    }

    /// The table with devices, whose numbers follow those of the files, and with an entry for clusters of missing pages:
    /// that of cluster 0. Those of the next clusters continue it.
    pub fn with_devices(mut self, devices: Vec<H::Device>, missing: Entry) -> Result<Self, TableError> {
        if self.files.len() + devices.len() > Entry::MAX_FILES {
            return Err(TableError::TooManyFiles(self.files.len() + devices.len()));
        }
        self.devices = devices.into();
        self.check_run(missing, self.clusters())?;
        self.missing = missing;
        Ok(self)
    }

    pub fn size(&self) -> u64 {
        self.size
    }

    /// Cluster size in bytes.
    pub fn cluster(&self) -> u64 {
        1 << self.shift
    }

    pub fn clusters(&self) -> u64 {
        self.size.div_ceil(1 << self.shift)
    }

    pub fn files(&self) -> &[H::File] {
        &self.files
    }

    pub fn devices(&self) -> &[H::Device] {
        &self.devices
    }

    pub fn pages_held(&self) -> usize {
        let groups = self.groups.iter().filter_map(OnceLock::get);
        groups.flat_map(|pages| pages.iter()).filter(|page| page.load().is_some()).count()
    }

    pub fn entry(&self, cluster: u64) -> Result<Entry, TableError> {
        self.check(cluster, 1)?;
        Ok(match self.loaded(cluster).as_deref() {
            Some(Some(page)) => Entry(page[self.slot(cluster)].load(Ordering::Acquire)),
            _ => self.following(self.missing, cluster),
        })
    }

    /// Stores consecutive entries from cluster `first` on. All are checked before any is stored.
    pub fn install(&self, first: u64, entries: &[u64]) -> Result<(), TableError> {
        self.check(first, entries.len() as u64)?;
        entries.iter().try_for_each(|&entry| self.check_entry(Entry(entry)))?;
        let mut cluster = first;
        let mut rest = entries;
        while !rest.is_empty() {
            let slot = self.slot(cluster);
            let run = rest.len().min((1 << self.page_shift) - slot);
            let page = self.page(cluster >> self.page_shift);
            for (to, &from) in page[slot..slot + run].iter().zip(rest) {
                to.store(from, Ordering::Release);
            }
            rest = &rest[run..];
            cluster += run as u64;
        }
        Ok(())
    }

    /// Stores `entry` for `count` clusters from `first` on. The offset of data entries advances by one cluster each.
    pub fn fill(&self, first: u64, count: u64, entry: Entry) -> Result<(), TableError> {
        self.check(first, count)?;
        self.check_run(entry, count)?;
        for i in 0..count {
            let cluster = first + i;
            let page = self.page(cluster >> self.page_shift);
            page[self.slot(cluster)].store(self.following(entry, i).0, Ordering::Release);
        }
        Ok(())
    }

    /// The byte range (offset, length) of `count` clusters from `first` on. The last cluster of the table may be
    /// shorter.
    pub fn range(&self, first: u64, count: u64) -> Result<(u64, u64), TableError> {
        self.check(first, count)?;
        let (low, high) = (first << self.shift, self.size.min((first + count) << self.shift));
        Ok((low, high - low))
    }

    pub fn drop_page(&self, page: u64) -> Result<(), TableError> {
        if page >= self.clusters().div_ceil(1 << self.page_shift) {
            return Err(TableError::OutOfRange { cluster: page << self.page_shift, clusters: self.clusters() });
        }
        if let Some(pointer) = self.pointer(page) {
            pointer.store(None);
        }
        Ok(())
    }

    /// Where byte `at` is, and the length of its contiguous run (`len` at most, which is not 0 and not past the
    /// end).
    pub fn at(&self, at: u64, len: u64) -> (Resolved<'_, H>, u64) {
        let cluster = at >> self.shift;
        let within = at & ((1 << self.shift) - 1);
        let mut run = (1u64 << self.shift) - within;
        let page = self.loaded(cluster);
        let Some(Some(page)) = page.as_deref() else {
            let span = 1u64 << (self.shift + self.page_shift);
            let run = len.min(span - (at & (span - 1)));
            return (self.resolved(self.following(self.missing, cluster), within), run);
        };
        let mut slot = self.slot(cluster);
        let first = Entry(page[slot].load(Ordering::Acquire));
        let mut last = first;
        let step = 1u64 << (self.shift - 9);
        while run < len && slot + 1 < page.len() {
            slot += 1;
            let next = Entry(page[slot].load(Ordering::Acquire));
            if !last.continues(next, step) {
                break;
            }
            last = next;
            run += 1 << self.shift;
        }
        (self.resolved(first, within), run.min(len))
    }

    /// Where byte `within` of a cluster with this entry is.
    fn resolved(&self, entry: Entry, within: u64) -> Resolved<'_, H> {
        match entry.kind() {
            Entry::KIND_DATA | Entry::KIND_READ_ONLY => {
                let (offset, writable) = (entry.offset() + within, entry.kind() == Entry::KIND_DATA);
                match self.files.get(entry.file()) {
                    Some(file) => Resolved::Data { file, offset, writable, punch: false },
                    None => {
                        Resolved::Device { device: &self.devices[entry.file() - self.files.len()], offset, writable }
                    }
                }
            }
            Entry::KIND_ZERO => Resolved::Zero { discard_writes: false },
            Entry::KIND_ERROR => Resolved::Error(H::ENTRY_ERROR),
            _ => Resolved::Fault,
        }
    }

    /// The entry of a run that is `count` clusters after `entry`.
    fn following(&self, entry: Entry, count: u64) -> Entry {
        if entry.holds_data() { Entry(entry.0 + (count << (self.shift - 9))) } else { entry }
    }

    fn slot(&self, cluster: u64) -> usize {
        (cluster & ((1 << self.page_shift) - 1)) as usize
    }

    /// The page with a cluster's entry, without a reference count.
    fn loaded(&self, cluster: u64) -> Option<Guard<Option<Arc<Page>>>> {
        self.pointer(cluster >> self.page_shift).map(|pointer| pointer.load())
    }

    /// The pointer to a page. None: its group was never allocated.
    fn pointer(&self, page: u64) -> Option<&ArcSwapOption<Page>> {
        let (group, within) = grouped(page);
        Some(&self.groups[group].get()?[within])
    }

    /// The page; a missing page is created with the entries that it has while it is missing. If two threads create it at the same time, one page is
    /// used.
    fn page(&self, index: u64) -> Arc<Page> {
        let (group, within) = grouped(index);
        let made = || (0..1 << GROUP_SHIFT).map(|_| ArcSwapOption::empty()).collect();
        let slot = &self.groups[group].get_or_init(made)[within];
        if let Some(page) = slot.load_full() {
            return page;
        }
        let first = index << self.page_shift;
        let entries = first..first + (1 << self.page_shift);
        // The last page has slots past the end of the table, which no lookup reaches.
        let entry = |cluster: u64| self.following(self.missing, cluster.min(self.clusters() - 1));
        let fresh: Arc<Page> = Arc::new(entries.map(|cluster| AtomicU64::new(entry(cluster).0)).collect());
        let before = slot.compare_and_swap(&None::<Arc<Page>>, Some(fresh.clone()));
        match &*before {
            Some(page) => page.clone(),
            None => fresh,
        }
    }

    fn check(&self, first: u64, count: u64) -> Result<(), TableError> {
        match first.checked_add(count) {
            Some(end) if end <= self.clusters() => Ok(()),
            _ => Err(TableError::OutOfRange { cluster: first.saturating_add(count), clusters: self.clusters() }),
        }
    }

    /// Checks `entry` and the entries of the `count` - 1 clusters after it, in one run.
    fn check_run(&self, entry: Entry, count: u64) -> Result<(), TableError> {
        let step = if entry.holds_data() { 1u64 << (self.shift - 9) } else { 0 };
        let last = entry
            .0
            .checked_add(step.saturating_mul(count.saturating_sub(1)))
            .filter(|&last| last >> 49 == entry.0 >> 49)
            .ok_or(TableError::BadEntry { entry: entry.0, why: "its run passes the largest offset" })?;
        self.check_entry(entry)?;
        self.check_entry(Entry(last))
    }

    fn check_entry(&self, entry: Entry) -> Result<(), TableError> {
        if entry.kind() > Entry::KIND_ERROR {
            return Err(TableError::BadEntry { entry: entry.0, why: "unknown kind" });
        }
        if entry.holds_data() && entry.file() >= self.files.len() + self.devices.len() {
            return Err(TableError::BadEntry { entry: entry.0, why: "names a file or device the table does not have" });
        }
        Ok(())
    }
}

/// The group of a page's pointer, and the index in that group.
fn grouped(page: u64) -> (usize, usize) {
    ((page >> GROUP_SHIFT) as usize, (page & ((1 << GROUP_SHIFT) - 1)) as usize)
}
