//! Python classes of maps: `File`, `Region`, `Extent`, `ClusterTable`, `Map`.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

use blkloom_core::{Kinds, Mapping};
use blkloom_io::{Errno, InlinePolicy, Source};
use blkloom_map::{Entry, Extent as MapExtent, Segment};
use pyo3::prelude::*;
use pyo3::types::PyAny;

use crate::backend::AnyBackend;
use crate::border::{self, Bytes, os_error, value_error};
use crate::device::Device;
use crate::filters::AnyFilter;
use crate::tee::Tee;

/// Duplicates a descriptor from Python.
pub fn duplicate(fd: RawFd) -> PyResult<OwnedFd> {
    if fd < 0 {
        return Err(os_error(Errno::BADF, "file descriptor"));
    }
    // SAFETY: borrowed only during dup. dup fails with EBADF if the number is not open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    borrowed.try_clone_to_owned().map_err(|error| os_error(Errno::from_io_error(&error).unwrap_or(Errno::BADF), "dup"))
}

/// An open regular file or block device. Owns a duplicate of `fd`.
#[pyclass(frozen, module = "blkloom._engine")]
pub struct File(pub Arc<blkloom_io::File>);

#[pymethods]
impl File {
    #[new]
    #[pyo3(signature = (fd, *, writable, direct = false, label = ""))]
    fn new(fd: RawFd, writable: bool, direct: bool, label: &str) -> PyResult<File> {
        match blkloom_io::File::new(duplicate(fd)?, writable, direct, label.to_owned()) {
            Ok(file) => Ok(File(Arc::new(file))),
            Err(blkloom_io::FileError::Os(call, error)) => Err(os_error(error, &format!("{label}: {call}"))),
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
        border::number(self.0.sync_error())
    }

    fn fail_syncs(&self, errno: i32) {
        self.0.fail_syncs(border::errno(errno).unwrap_or(Errno::IO));
    }

    #[getter]
    fn has_unreported_failure(&self) -> bool {
        self.0.has_unreported_failure()
    }

    fn set_failure_reported(&self) {
        self.0.set_failure_reported();
    }
}

/// Shared memory of a sealed memfd. Owns a duplicate of `fd`.
#[pyclass(frozen, module = "blkloom._engine")]
pub struct Region(pub Arc<blkloom_io::Region>);

#[pymethods]
impl Region {
    #[new]
    #[pyo3(signature = (fd, size, *, page_size = 4096))]
    fn new(fd: RawFd, size: u64, page_size: u64) -> PyResult<Region> {
        match blkloom_io::Region::new(duplicate(fd)?, size, page_size) {
            Ok(region) => Ok(Region(Arc::new(region))),
            Err(blkloom_io::RegionError::Os(call, error)) => Err(os_error(error, call)),
            Err(error) => Err(os_error(Errno::INVAL, &error.to_string())),
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

/// Location of the bytes of a range. Byte i of the range is at `offset` + i.
#[pyclass(frozen, module = "blkloom._engine")]
pub struct Extent(pub MapExtent<Kinds>);

#[pymethods]
impl Extent {
    #[staticmethod]
    #[pyo3(signature = (file, offset, *, read_only = false))]
    fn data(file: &File, offset: u64, read_only: bool) -> Extent {
        Extent(MapExtent::Data { file: file.0.clone(), offset, writable: !read_only && file.0.writable() })
    }

    #[staticmethod]
    fn memory(region: &Region, offset: u64) -> Extent {
        Extent(MapExtent::Memory { region: region.0.clone(), offset })
    }

    #[staticmethod]
    #[pyo3(signature = (*, discard_writes = false))]
    fn zero(discard_writes: bool) -> Extent {
        Extent(MapExtent::Zero { discard_writes })
    }

    #[staticmethod]
    fn error(errno: i32) -> PyResult<Extent> {
        match border::errno(errno) {
            Some(errno) => Ok(Extent(MapExtent::Error(errno))),
            None => Err(value_error(format!("{errno} is not an errno"))),
        }
    }

    #[staticmethod]
    fn fault() -> Extent {
        Extent(MapExtent::Fault)
    }

    #[staticmethod]
    #[pyo3(signature = (device, offset, *, read_only = false))]
    fn device(device: &Bound<'_, Device>, offset: u64, read_only: bool) -> Extent {
        Extent(MapExtent::Device { device: device.get().inner.clone(), offset, writable: !read_only })
    }

    #[staticmethod]
    #[pyo3(signature = (queue, offset, *, read_only = false))]
    fn backend(queue: AnyBackend<'_>, offset: u64, read_only: bool) -> Extent {
        Extent(MapExtent::Backend { backend: queue.inner(), offset, writable: !read_only })
    }

    #[staticmethod]
    fn stripes(chunk: u64, legs: Vec<PyRef<'_, Extent>>) -> Extent {
        Extent(MapExtent::Stripes { chunk, legs: legs.iter().map(|leg| leg.0.clone()).collect() })
    }

    #[staticmethod]
    fn unstriped(chunk: u64, stripe: u64, stripes: u64, striped: &Extent) -> Extent {
        Extent(MapExtent::Unstriped { chunk, stripe, stripes, striped: Box::new(striped.0.clone()) })
    }

    #[staticmethod]
    #[pyo3(signature = (filter, reads, others = None, *, elsewhere = None))]
    fn filtered(filter: AnyFilter<'_>, reads: &Extent, others: Option<&Extent>, elsewhere: Option<&Extent>) -> Extent {
        let nowhere = || MapExtent::Error(Errno::IO);
        let elsewhere = elsewhere.map_or_else(nowhere, |extent| extent.0.clone());
        let legs = [reads.0.clone(), others.unwrap_or(reads).0.clone(), elsewhere];
        Extent(MapExtent::Filtered(Arc::new(blkloom_map::Filtered { filter: filter.inner(), legs })))
    }

    #[staticmethod]
    fn tee(tee: &Tee, offset: u64) -> Extent {
        Extent(MapExtent::Tee { tee: tee.0.clone(), offset })
    }

    #[staticmethod]
    fn table(table: &ClusterTable) -> Extent {
        Extent(MapExtent::Table(table.0.clone()))
    }

    #[getter]
    fn kind(&self) -> &'static str {
        match &self.0 {
            MapExtent::Data { .. } => "data",
            MapExtent::Memory { .. } => "memory",
            MapExtent::Zero { .. } => "zero",
            MapExtent::Error(_) => "error",
            MapExtent::Fault => "fault",
            MapExtent::Device { .. } => "device",
            MapExtent::Stripes { .. } => "stripes",
            MapExtent::Table(_) => "table",
            MapExtent::Backend { .. } => "backend",
            MapExtent::Unstriped { .. } => "unstriped",
            MapExtent::Tee { .. } => "tee",
            MapExtent::Filtered(_) => "filtered",
        }
    }

    #[getter]
    fn cluster(&self) -> u64 {
        match &self.0 {
            MapExtent::Table(table) => table.cluster(),
            _ => 0,
        }
    }
}

/// A two-level table of the locations of clusters, filled when requests fault.
#[pyclass(frozen, module = "blkloom._engine")]
pub struct ClusterTable(pub Arc<blkloom_map::ClusterTable<Kinds>>);

#[pymethods]
impl ClusterTable {
    #[new]
    #[pyo3(signature = (size, cluster, files, *, devices = Vec::new(), missing = 0, page = 4096),
           text_signature = "(size, cluster, files, *, devices=(), missing=0, page=4096)")]
    fn new(
        size: u64,
        cluster: u64,
        files: Vec<PyRef<'_, File>>,
        devices: Vec<Bound<'_, Device>>,
        missing: u64,
        page: u64,
    ) -> PyResult<ClusterTable> {
        let files = files.iter().map(|file| file.0.clone()).collect();
        let devices = devices.iter().map(|device| device.get().inner.clone()).collect();
        let table = blkloom_map::ClusterTable::new(size, cluster, page, files).map_err(value_error)?;
        Ok(ClusterTable(Arc::new(table.with_devices(devices, Entry(missing)).map_err(value_error)?)))
    }

    fn install(&self, first: u64, entries: &Bound<'_, PyAny>) -> PyResult<()> {
        let bytes = Bytes::of(entries, false)?;
        if !bytes.len().is_multiple_of(8) {
            return Err(value_error(format!("entries are u64s; {} bytes are not a whole number of them", bytes.len())));
        }
        let copy = bytes.source().to_vec();
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
        let over = patch.as_ref().map_or(Source::empty(), Bytes::source);
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
    #[pyo3(signature = (segments, *, flush_owners = Vec::new(), fua_flushes = true),
           text_signature = "(segments, *, flush_owners=(), fua_flushes=True)")]
    fn new(
        segments: Vec<(u64, u64, u32, PyRef<'_, Extent>)>,
        flush_owners: Vec<u32>,
        fua_flushes: bool,
    ) -> PyResult<Map> {
        let mut list = Vec::with_capacity(segments.len());
        for (start, length, owner, extent) in &segments {
            let end = start.checked_add(*length).ok_or_else(|| value_error("a segment passes 2^64 bytes"))?;
            list.push(Segment { start: *start, end, owner: *owner, extent: extent.0.clone() });
        }
        let map = blkloom_core::Map::new(list, flush_owners).map_err(value_error)?;
        let mapping = Mapping::new(map).map_err(value_error)?;
        Ok(Map(Arc::new(if fua_flushes { mapping } else { mapping.without_fua_flushes() })))
    }

    #[getter]
    fn size(&self) -> u64 {
        self.0.map.size()
    }

    fn __len__(&self) -> usize {
        self.0.map.segments().len()
    }
}
