//! What maps are made of: File, Region, Extent, ClusterTable, Map.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

use blkloom_core::{Kinds, Mapping};
use blkloom_io::{InlinePolicy, Slice};
use blkloom_map::{Entry, Extent as Place, Segment};
use pyo3::prelude::*;
use pyo3::types::PyAny;

use crate::border::{Bytes, os_error, value_error};
use crate::device::Device;

/// A duplicate of Python's descriptor.
pub fn duplicate(fd: RawFd) -> PyResult<OwnedFd> {
    if fd < 0 {
        return Err(os_error(9, "file descriptor"));
    }
    // SAFETY: borrowed for the duration of dup only; a closed number makes dup fail with EBADF.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    borrowed.try_clone_to_owned().map_err(|error| os_error(error.raw_os_error().unwrap_or(9), "dup"))
}

#[pyclass(frozen, module = "blkloom._engine")]
pub struct File(pub Arc<blkloom_io::File>);

#[pymethods]
impl File {
    #[new]
    #[pyo3(signature = (fd, *, writable, direct = false, label = ""))]
    fn new(fd: RawFd, writable: bool, direct: bool, label: &str) -> PyResult<File> {
        match blkloom_io::File::new(duplicate(fd)?, writable, direct, label.to_owned()) {
            Ok(file) => Ok(File(Arc::new(file))),
            Err(blkloom_io::FileError::Os(call, error)) => {
                Err(os_error(error.raw_os_error(), &format!("{label}: {call}")))
            }
            Err(error) => Err(value_error(format!("{label}: {error}"))),
        }
    }

    #[getter]
    fn size(&self, py: Python<'_>) -> PyResult<u64> {
        py.detach(|| self.0.size()).map_err(|errno| os_error(errno, self.0.label()))
    }

    #[getter]
    fn writable(&self) -> bool {
        self.0.writable()
    }

    #[getter]
    fn direct(&self) -> bool {
        self.0.direct()
    }

    #[getter]
    fn is_block_device(&self) -> bool {
        self.0.is_block_device()
    }

    #[getter]
    fn inline(&self) -> &'static str {
        match self.0.policy() {
            InlinePolicy::Always => "always",
            InlinePolicy::Nowait => "nowait",
            InlinePolicy::Never => "never",
        }
    }

    #[getter]
    fn offset_alignment(&self) -> u64 {
        self.0.offset_alignment()
    }

    #[getter]
    fn memory_alignment(&self) -> u64 {
        self.0.memory_alignment()
    }

    fn fileno(&self) -> RawFd {
        self.0.fd().as_raw_fd()
    }

    #[getter]
    fn label(&self) -> &str {
        self.0.label()
    }

    #[getter]
    fn in_flight(&self) -> usize {
        self.0.in_flight()
    }

    fn sync(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.0.sync()).map_err(|errno| os_error(errno, &format!("{}: fdatasync", self.0.label())))
    }

    #[getter]
    fn sync_error(&self) -> i32 {
        self.0.sync_error().unwrap_or(0)
    }

    fn fail_syncs(&self, errno: i32) {
        self.0.fail_syncs(if errno > 0 { errno } else { blkloom_io::errno::EIO });
    }

    #[getter]
    fn has_unreported_failure(&self) -> bool {
        self.0.has_unreported_failure()
    }

    fn set_failure_reported(&self) {
        self.0.set_failure_reported();
    }
}

#[pyclass(frozen, module = "blkloom._engine")]
pub struct Region(pub Arc<blkloom_io::Region>);

#[pymethods]
impl Region {
    #[new]
    #[pyo3(signature = (fd, size, *, page_size = 4096))]
    fn new(fd: RawFd, size: u64, page_size: u64) -> PyResult<Region> {
        match blkloom_io::Region::new(duplicate(fd)?, size, page_size) {
            Ok(region) => Ok(Region(Arc::new(region))),
            Err(blkloom_io::RegionError::Os(call, error)) => Err(os_error(error.raw_os_error(), call)),
            Err(error) => Err(os_error(22, &error.to_string())),
        }
    }

    #[getter]
    fn size(&self) -> u64 {
        self.0.size()
    }

    #[getter]
    fn resident(&self) -> u64 {
        self.0.resident()
    }
}

#[pyclass(frozen, module = "blkloom._engine")]
pub struct Extent(pub Place<Kinds>);

#[pymethods]
impl Extent {
    #[staticmethod]
    #[pyo3(signature = (file, offset, *, read_only = false))]
    fn data(file: &File, offset: u64, read_only: bool) -> Extent {
        Extent(Place::Data { file: file.0.clone(), offset, writable: !read_only && file.0.writable() })
    }

    #[staticmethod]
    fn memory(region: &Region, offset: u64) -> Extent {
        Extent(Place::Memory { region: region.0.clone(), offset })
    }

    #[staticmethod]
    #[pyo3(signature = (*, discard_writes = false))]
    fn zero(discard_writes: bool) -> Extent {
        Extent(Place::Zero { discard_writes })
    }

    #[staticmethod]
    fn error(errno: i32) -> PyResult<Extent> {
        if !(1..4096).contains(&errno) {
            return Err(value_error(format!("{errno} is not an errno")));
        }
        Ok(Extent(Place::Error(errno)))
    }

    #[staticmethod]
    fn fault() -> Extent {
        Extent(Place::Fault)
    }

    #[staticmethod]
    #[pyo3(signature = (device, offset, *, read_only = false))]
    fn device(device: &Bound<'_, Device>, offset: u64, read_only: bool) -> Extent {
        Extent(Place::Device { device: device.get().inner.clone(), offset, writable: !read_only })
    }

    #[staticmethod]
    fn stripes(chunk: u64, legs: Vec<PyRef<'_, Extent>>) -> Extent {
        Extent(Place::Stripes { chunk, legs: legs.iter().map(|leg| leg.0.clone()).collect() })
    }

    #[staticmethod]
    fn table(table: &ClusterTable) -> Extent {
        Extent(Place::Table(table.0.clone()))
    }

    #[getter]
    fn kind(&self) -> &'static str {
        match &self.0 {
            Place::Data { .. } => "data",
            Place::Memory { .. } => "memory",
            Place::Zero { .. } => "zero",
            Place::Error(_) => "error",
            Place::Fault => "fault",
            Place::Device { .. } => "device",
            Place::Stripes { .. } => "stripes",
            Place::Table(_) => "table",
        }
    }
}

#[pyclass(frozen, module = "blkloom._engine")]
pub struct ClusterTable(pub Arc<blkloom_map::ClusterTable<Kinds>>);

#[pymethods]
impl ClusterTable {
    #[new]
    #[pyo3(signature = (size, cluster, files, *, page = 4096))]
    fn new(size: u64, cluster: u64, files: Vec<PyRef<'_, File>>, page: u64) -> PyResult<ClusterTable> {
        let files = files.iter().map(|file| file.0.clone()).collect();
        let table = blkloom_map::ClusterTable::new(size, cluster, page, files).map_err(value_error)?;
        Ok(ClusterTable(Arc::new(table)))
    }

    fn install(&self, first: u64, entries: &Bound<'_, PyAny>) -> PyResult<()> {
        let bytes = Bytes::of(entries, false)?;
        if !bytes.len().is_multiple_of(8) {
            return Err(value_error(format!("entries are u64s; {} bytes are not a whole number of them", bytes.len())));
        }
        let copy = bytes.slice().to_vec();
        let entries: Vec<u64> = copy
            .chunks_exact(8)
            .map(|word| u64::from_ne_bytes([word[0], word[1], word[2], word[3], word[4], word[5], word[6], word[7]]))
            .collect();
        self.0.install(first, &entries).map_err(value_error)
    }

    fn fill(&self, first: u64, count: u64, entry: u64) -> PyResult<()> {
        self.0.fill(first, count, Entry(entry)).map_err(value_error)
    }

    fn entry(&self, cluster: u64) -> PyResult<u64> {
        self.0.entry(cluster).map(|entry| entry.0).map_err(value_error)
    }

    #[pyo3(signature = (first, count, file, offset, *, patch = None, patch_at = 0))]
    #[allow(clippy::too_many_arguments, reason = "one call of Python's; keyword arguments there")]
    fn copy(
        &self,
        py: Python<'_>,
        first: u64,
        count: u64,
        file: &File,
        offset: u64,
        patch: Option<&Bound<'_, PyAny>>,
        patch_at: usize,
    ) -> PyResult<bool> {
        let (at, len) = self.0.range(first, count).map_err(value_error)?;
        let patch = patch.map(|patch| Bytes::of(patch, false)).transpose()?;
        let over = patch.as_ref().map_or(Slice::empty(), Bytes::slice);
        if patch_at.checked_add(over.len()).is_none_or(|end| end as u64 > len) {
            return Err(value_error(format!("{} bytes at {patch_at} of a copy of {len}", over.len())));
        }
        py.detach(|| blkloom_core::copy(&self.0, (at, len), (&file.0, offset), (over, patch_at)))
            .map_err(|errno| os_error(errno, file.0.label()))
    }

    fn drop(&self, page: u64) -> PyResult<()> {
        self.0.drop_page(page).map_err(value_error)
    }

    #[getter]
    fn pages(&self) -> usize {
        self.0.pages_held()
    }
}

#[pyclass(frozen, module = "blkloom._engine")]
pub struct Map(pub Arc<Mapping>);

#[pymethods]
impl Map {
    #[new]
    #[pyo3(signature = (segments, *, flush_owners = Vec::new()), text_signature = "(segments, *, flush_owners=())")]
    fn new(segments: Vec<(u64, u64, u32, PyRef<'_, Extent>)>, flush_owners: Vec<u32>) -> PyResult<Map> {
        let mut list = Vec::with_capacity(segments.len());
        for (start, length, owner, extent) in &segments {
            check_memory(&extent.0, *start, *length)?;
            let end = start.checked_add(*length).ok_or_else(|| value_error("a segment passes 2^64 bytes"))?;
            list.push(Segment { start: *start, end, owner: *owner, extent: extent.0.clone() });
        }
        let map = blkloom_core::Map::new(list, flush_owners).map_err(value_error)?;
        Ok(Map(Arc::new(Mapping::new(map))))
    }

    #[getter]
    fn size(&self) -> u64 {
        self.0.map.size()
    }

    fn __len__(&self) -> usize {
        self.0.map.segments().len()
    }
}

/// Memory is accessed without further checks: a map must not reach past a region's end. (Stripes
/// spread their length over their legs, so a leg is checked for its share, rounded up to a chunk.)
fn check_memory(extent: &Place<Kinds>, start: u64, length: u64) -> PyResult<()> {
    match extent {
        Place::Memory { region, offset } => match offset.checked_add(length) {
            Some(end) if end <= region.size() => Ok(()),
            _ => Err(value_error(format!(
                "segment at {start}: {length} bytes at {offset} of a region of {}",
                region.size()
            ))),
        },
        Place::Stripes { chunk, legs } if *chunk > 0 && !legs.is_empty() => {
            let share = length.div_ceil(*chunk).div_ceil(legs.len() as u64).saturating_mul(*chunk);
            legs.iter().try_for_each(|leg| check_memory(leg, start, share))
        }
        Place::Data { offset, .. } | Place::Device { offset, .. } => match offset.checked_add(length) {
            Some(end) if end < 1 << 63 => Ok(()),
            _ => Err(value_error(format!("segment at {start}: {length} bytes at {offset} pass 2^63"))),
        },
        _ => Ok(()),
    }
}
