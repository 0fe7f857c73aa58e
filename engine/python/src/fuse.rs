//! Python classes and functions of the FUSE transport.

use std::os::fd::{BorrowedFd, IntoRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use blkloom_core::fuse::{self, InitError, Owner, Record, RecordError};
use blkloom_core::{EngineError, Recipient};
use blkloom_fuse_wire::{Negotiated, Settings, capability};
use pyo3::exceptions::PyTimeoutError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use rustix::io::Errno;

use crate::border::{forked_error, os_error, value_error};
use crate::device::Engine;
use crate::export::{Export, Notices, Transport};
use crate::maps::duplicate;

fn negotiated(bytes: &[u8]) -> PyResult<Negotiated> {
    Negotiated::from_bytes(bytes).map_err(value_error)
}

#[pyfunction]
#[pyo3(signature = (fd, *, timeout = 10.0, uring = false))]
pub fn fuse_init(py: Python<'_>, fd: i32, timeout: f64, uring: bool) -> PyResult<Py<PyBytes>> {
    let timeout = Duration::try_from_secs_f64(timeout).map_err(value_error)?;
    let fd = duplicate(fd)?;
    let settings = match uring {
        true => fuse::ring_settings().map_err(|error| os_error(errno_of(&error), "the machine's CPUs"))?,
        false => Settings::default(),
    };
    match py.detach(|| fuse::answer_init(&fd, &settings, timeout)) {
        Ok(negotiated) => Ok(PyBytes::new(py, &negotiated.to_bytes()).unbind()),
        Err(error @ InitError::Timeout(_)) => Err(PyTimeoutError::new_err(error.to_string())),
        Err(InitError::Os(errno)) => Err(os_error(errno, "INIT of a FUSE connection")),
        Err(error) => Err(os_error(Errno::PROTO, &error.to_string())),
    }
}

#[pyfunction]
pub fn fuse_can_resend(negotiated: &[u8]) -> PyResult<bool> {
    Ok(self::negotiated(negotiated)?.has(capability::HAS_RESEND))
}

#[pyfunction]
pub fn fuse_is_over_uring(negotiated: &[u8]) -> PyResult<bool> {
    Ok(self::negotiated(negotiated)?.has(capability::OVER_IO_URING))
}

#[pyfunction]
pub fn fuse_resend(py: Python<'_>, fd: i32) -> PyResult<()> {
    notify(py, fd, "FUSE_NOTIFY_RESEND", |fd| fuse::resend(fd))
}

#[pyfunction]
pub fn fuse_invalidate(py: Python<'_>, fd: i32) -> PyResult<()> {
    notify(py, fd, "FUSE_NOTIFY_INVAL_INODE", |fd| fuse::invalidate(fd))
}

fn notify(
    py: Python<'_>,
    fd: i32,
    what: &str,
    send: impl FnOnce(BorrowedFd<'_>) -> Result<(), Errno> + Send,
) -> PyResult<()> {
    let fd = duplicate(fd)?;
    py.detach(|| send(std::os::fd::AsFd::as_fd(&fd))).map_err(|errno| os_error(errno, what))
}

#[pyclass(frozen, module = "blkloom._engine")]
pub struct FuseFile {
    inner: Arc<fuse::FuseFile>,
    export: Py<Export>,
}

#[pymethods]
impl FuseFile {
    #[new]
    #[pyo3(signature = (export, negotiated, owner, *, record = None))]
    fn new(
        export: &Bound<'_, Export>,
        negotiated: &[u8],
        owner: (u32, u32, u32),
        record: Option<i32>,
    ) -> PyResult<FuseFile> {
        let (user, group, mode) = owner;
        let (owner, negotiated) = (Owner { user, group, mode }, self::negotiated(negotiated)?);
        let record = record.map(duplicate).transpose()?.map(Record::new);
        let made = fuse::FuseFile::new(export.get().inner.clone(), negotiated, owner, record);
        let inner = made.map_err(|error| match error {
            RecordError::Read(errno) => os_error(errno, "record of a FUSE file"),
            RecordError::Unknown(_) => value_error(error),
        })?;
        Ok(FuseFile { inner, export: export.clone().unbind() })
    }

    #[getter]
    fn export(&self, py: Python<'_>) -> Py<Export> {
        self.export.clone_ref(py)
    }

    #[getter]
    fn users(&self) -> u64 {
        self.inner.users()
    }

    #[getter]
    fn owner(&self) -> (u32, u32, u32) {
        let Owner { user, group, mode } = self.inner.owner();
        (user, group, mode)
    }
}

#[pyclass(frozen, module = "blkloom._engine")]
pub struct DetachedFuse {
    unserved: Py<PyBytes>,
    fd: Mutex<Option<OwnedFd>>,
}

impl DetachedFuse {
    pub fn new(py: Python<'_>, fuse::Detached { fd, unserved }: fuse::Detached) -> DetachedFuse {
        DetachedFuse { unserved: PyBytes::new(py, &unserved).unbind(), fd: Mutex::new(Some(fd)) }
    }
}

#[pymethods]
impl DetachedFuse {
    #[getter]
    fn unserved(&self, py: Python<'_>) -> Py<PyBytes> {
        self.unserved.clone_ref(py)
    }

    fn take_descriptor(&self) -> PyResult<i32> {
        let taken = self.fd.lock().unwrap_or_else(PoisonError::into_inner).take();
        taken.map(OwnedFd::into_raw_fd).ok_or_else(|| os_error(Errno::BADF, "the descriptor was taken before"))
    }
}

#[pyfunction]
#[pyo3(signature = (engine, file, fd, notices, token, *, unserved = &b""[..]),
    text_signature = "(engine, file, fd, notices, token, *, unserved=b'')")]
pub fn serve_fuse(
    py: Python<'_>,
    engine: &Engine,
    file: &FuseFile,
    fd: i32,
    notices: &Notices,
    token: u64,
    unserved: &[u8],
) -> PyResult<Transport> {
    if !engine.0.is_here() {
        return Err(forked_error(py, "the engine"));
    }
    let (fd, recipient) = (duplicate(fd)?, Recipient { notices: notices.inner.clone(), token });
    let unserved = unserved.to_vec();
    py.detach(|| fuse::serve(&engine.0, &file.inner, fd, unserved, recipient)).map(Transport).map_err(|error| {
        match error {
            EngineError::Os(what, error) => os_error(errno_of(&error), what),
            error => os_error(Errno::SHUTDOWN, &error.to_string()),
        }
    })
}

fn errno_of(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}
