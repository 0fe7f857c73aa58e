//! Virtio block devices of virtual machines (vhost-user).

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use blkloom_core::vhost_user::{self, QueueMemory, QueueSettings, ServeError};
use blkloom_core::{EngineError, Recipient};
use blkloom_io::{GuestRegion, Sharer};
use blkloom_virtio_wire::inflight;
use pyo3::prelude::*;
use rustix::io::Errno;

use crate::border::{forked_error, os_error, value_error};
use crate::device::Engine;
use crate::export::{Export, Notices, Transport};
use crate::maps::duplicate;

fn sharer(may_end_this: bool) -> Sharer {
    if may_end_this { Sharer::MayEndThis } else { Sharer::Other }
}

#[pyclass(frozen, module = "blkloom._engine")]
pub struct GuestMemory(Arc<blkloom_io::GuestMemory>);

#[pymethods]
impl GuestMemory {
    #[new]
    #[pyo3(signature = (regions, *, may_end_this))]
    fn new(regions: Vec<(i32, u64, u64, u64, u64)>, may_end_this: bool) -> PyResult<GuestMemory> {
        let files: Vec<OwnedFd> = regions.iter().map(|region| duplicate(region.0)).collect::<PyResult<_>>()?;
        let regions = files.iter().zip(&regions).map(|(file, &(_, offset, size, guest, user))| GuestRegion {
            file: file.as_fd(),
            offset,
            size,
            guest,
            user,
        });
        Ok(GuestMemory(Arc::new(blkloom_io::GuestMemory::new(regions, sharer(may_end_this)).map_err(value_error)?)))
    }
}

#[pyclass(frozen, module = "blkloom._engine")]
pub struct SharedMemory(Arc<blkloom_io::SharedMemory>);

#[pymethods]
impl SharedMemory {
    #[new]
    #[pyo3(signature = (fd, offset, size, *, may_end_this))]
    fn new(fd: i32, offset: u64, size: u64, may_end_this: bool) -> PyResult<SharedMemory> {
        let made = blkloom_io::SharedMemory::new(duplicate(fd)?.as_fd(), offset, size, sharer(may_end_this));
        Ok(SharedMemory(Arc::new(made.map_err(value_error)?)))
    }
}

#[pyclass(frozen, module = "blkloom._engine")]
pub struct VhostUserDisk {
    inner: Arc<vhost_user::Disk>,
    export: Py<Export>,
}

#[pymethods]
impl VhostUserDisk {
    #[new]
    fn new(export: &Bound<'_, Export>, serial: &[u8]) -> VhostUserDisk {
        let inner = vhost_user::Disk::new(export.get().inner.clone(), serial);
        VhostUserDisk { inner, export: export.clone().unbind() }
    }

    #[getter]
    fn export(&self, py: Python<'_>) -> Py<Export> {
        self.export.clone_ref(py)
    }
}

#[pyclass(frozen, module = "blkloom._engine")]
pub struct VhostUserCall(Arc<vhost_user::Call>);

#[pymethods]
impl VhostUserCall {
    #[new]
    fn new() -> VhostUserCall {
        VhostUserCall(Arc::default())
    }

    #[pyo3(signature = (fd))]
    fn replace(&self, fd: Option<i32>) -> PyResult<()> {
        self.0.replace(fd.map(duplicate).transpose()?).map_err(|error| event_error(&error))
    }
}

#[pyclass(frozen, module = "blkloom._engine")]
pub struct VhostUserLog(Arc<vhost_user::DirtyLog>);

#[pymethods]
impl VhostUserLog {
    #[new]
    fn new(memory: &SharedMemory) -> VhostUserLog {
        VhostUserLog(Arc::new(vhost_user::DirtyLog::new(memory.0.clone())))
    }

    #[pyo3(signature = (fd))]
    fn set_event(&self, fd: Option<i32>) -> PyResult<()> {
        self.0.set_event(fd.map(duplicate).transpose()?).map_err(|error| event_error(&error))
    }
}

#[pyclass(frozen, module = "blkloom._engine")]
pub struct DetachedVhostUser(vhost_user::Detached);

impl DetachedVhostUser {
    pub fn new(left: vhost_user::Detached) -> DetachedVhostUser {
        DetachedVhostUser(left)
    }
}

#[pymethods]
impl DetachedVhostUser {
    #[getter]
    fn next(&self) -> u16 {
        self.0.next
    }

    #[getter]
    fn failure(&self) -> Option<&str> {
        self.0.failure.as_deref()
    }
}

#[pyfunction]
pub fn raise_event(fd: i32) -> PyResult<()> {
    let event = duplicate(fd)?;
    let raised = blkloom_io::Signal::new(event).and_then(|mut signal| signal.raise());
    raised.map_err(|error| event_error(&error))
}

fn event_error(error: &std::io::Error) -> PyErr {
    os_error(Errno::from_io_error(error).unwrap_or(Errno::IO), "an eventfd of another program")
}

#[pyfunction]
pub fn vhost_user_inflight_length(size: u16) -> usize {
    inflight::region_length(size)
}

#[pyfunction]
#[pyo3(signature = (engine, disk, guest, notices, token, *, inflight, kick, call, size, descriptors, available, used,
    next, event_idx, indirect, write_through, log, used_log))]
#[allow(clippy::too_many_arguments, reason = "the signature is the stub's")]
pub fn serve_vhost_user(
    py: Python<'_>,
    engine: &Engine,
    disk: &VhostUserDisk,
    guest: &GuestMemory,
    notices: &Notices,
    token: u64,
    inflight: (PyRef<'_, SharedMemory>, usize),
    kick: i32,
    call: &VhostUserCall,
    size: u16,
    descriptors: u64,
    available: u64,
    used: u64,
    next: u16,
    event_idx: bool,
    indirect: bool,
    write_through: bool,
    log: Option<PyRef<'_, VhostUserLog>>,
    used_log: Option<u64>,
) -> PyResult<Transport> {
    if !engine.0.is_here() {
        return Err(forked_error(py, "the engine"));
    }
    let recipient = Recipient { notices: notices.inner.clone(), token };
    let log = log.map(|log| log.0.clone());
    let memory = QueueMemory { guest: guest.0.clone(), inflight: (inflight.0.0.clone(), inflight.1), log };
    let settings =
        QueueSettings { size, descriptors, available, used, next, event_idx, indirect, write_through, used_log };
    let events = (duplicate(kick)?, call.0.clone());
    let served = py.detach(|| vhost_user::serve(&engine.0, &disk.inner, memory, settings, events, recipient));
    served.map(Transport).map_err(|error| match error {
        ServeError::Engine(EngineError::Os(what, error)) => {
            os_error(Errno::from_io_error(&error).unwrap_or(Errno::IO), what)
        }
        ServeError::Engine(error) => os_error(Errno::SHUTDOWN, &error.to_string()),
        error => value_error(error),
    })
}
