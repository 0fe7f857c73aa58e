//! Exports, connections and notices.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use blkloom_core::{ConnectionHandle, NbdSession, Outcome, Selected, Session, Skipping, Unfinished};
use blkloom_wire::Style;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::border::{Bytes, forked_error, os_error, stats, value_error};
use crate::device::{Device, Engine};
use crate::places::duplicate;

#[pyclass(frozen, module = "blkloom._engine")]
pub struct Notices {
    pub inner: Arc<blkloom_core::Notices>,
    /// I/O under way, with its buffer.
    held: Mutex<HashMap<u64, Option<Bytes>>>,
}

impl Drop for Notices {
    /// Buffers of I/O still under way must outlive it, and nobody is left to be told of its end: they
    /// are never freed. (Dropping notices before their I/O has ended is a mistake of the caller's.)
    fn drop(&mut self) {
        let held = self.held.get_mut().unwrap_or_else(PoisonError::into_inner);
        self.inner.take().iter().for_each(|ended| drop(held.remove(&ended.token)));
        held.drain().for_each(|(_, bytes)| std::mem::forget(bytes));
    }
}

impl Notices {
    /// Keeps the buffer of an I/O that begins until its notice is taken. A token names one I/O at a time.
    pub fn hold(&self, token: u64, bytes: Option<Bytes>) -> PyResult<()> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if held.contains_key(&token) {
            return Err(value_error(format!("token {token} is in use")));
        }
        held.insert(token, bytes);
        Ok(())
    }
}

#[pymethods]
impl Notices {
    #[new]
    fn new() -> PyResult<Notices> {
        let inner =
            blkloom_core::Notices::new().map_err(|error| os_error(error.raw_os_error().unwrap_or(24), "eventfd"))?;
        Ok(Notices { inner: Arc::new(inner), held: Mutex::new(HashMap::new()) })
    }

    fn fileno(&self) -> i32 {
        self.inner.fd().as_raw_fd()
    }

    fn take<'py>(&self, py: Python<'py>) -> PyResult<Vec<(u64, Bound<'py, PyAny>, i32)>> {
        let mut all = Vec::new();
        for notice in self.inner.take() {
            let (result, errno) = match notice.outcome {
                Outcome::Io { error, found } => {
                    let held = self.held.lock().unwrap_or_else(PoisonError::into_inner).remove(&notice.token);
                    drop(held); // not under the lock: releasing a buffer may run Python
                    let found: Vec<_> = found.iter().map(|f| (f.offset, f.len, f.flags)).collect();
                    let result =
                        if found.is_empty() { py.None().into_bound(py) } else { found.into_pyobject(py)?.into_any() };
                    (result, error)
                }
                Outcome::Closed { reason } => (reason.into_pyobject(py)?.into_any(), 0),
                Outcome::Detached { fd, unfinished } => {
                    (Bound::new(py, Detached::new(py, fd, unfinished))?.into_any(), 0)
                }
            };
            all.push((notice.token, result, errno));
        }
        Ok(all)
    }
}

#[pyclass(frozen, module = "blkloom._engine")]
pub struct Export {
    inner: Arc<blkloom_core::Export>,
    device: Py<Device>,
}

#[pymethods]
impl Export {
    #[new]
    #[pyo3(signature = (device, *, name = "", read_only = false))]
    fn new(device: &Bound<'_, Device>, name: &str, read_only: bool) -> Export {
        let inner = blkloom_core::Export::new(device.get().inner.clone(), name.to_owned(), read_only);
        Export { inner, device: device.clone().unbind() }
    }

    #[getter]
    fn device(&self, py: Python<'_>) -> Py<Device> {
        self.device.clone_ref(py)
    }

    #[getter]
    fn name(&self) -> &str {
        &self.inner.name
    }

    #[getter]
    fn read_only(&self) -> bool {
        self.inner.read_only
    }

    #[getter]
    fn connections(&self) -> usize {
        self.inner.connections.load(Ordering::Relaxed)
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        stats(py, self.inner.stats.totals())
    }
}

#[pyclass(frozen, module = "blkloom._engine")]
pub struct Connection(ConnectionHandle);

#[pymethods]
impl Connection {
    fn close(&self) {
        self.0.close();
    }

    #[pyo3(signature = (*, drain = false))]
    fn detach(&self, drain: bool) {
        self.0.detach(drain);
    }
}

#[pyclass(frozen, module = "blkloom._engine")]
pub struct Detached {
    initial: Py<PyBytes>,
    unsent: Py<PyBytes>,
    skipping: Option<(u64, Py<PyBytes>)>,
    fd: Mutex<Option<OwnedFd>>,
}

impl Detached {
    fn new(py: Python<'_>, fd: OwnedFd, unfinished: Unfinished) -> Detached {
        let bytes = |bytes: Vec<u8>| PyBytes::new(py, &bytes).unbind();
        Detached {
            initial: bytes(unfinished.initial),
            unsent: bytes(unfinished.unsent),
            skipping: unfinished.skipping.map(|skipping| (skipping.left, bytes(skipping.reply))),
            fd: Mutex::new(Some(fd)),
        }
    }
}

#[pymethods]
impl Detached {
    #[getter]
    fn initial(&self, py: Python<'_>) -> Py<PyBytes> {
        self.initial.clone_ref(py)
    }

    #[getter]
    fn unsent(&self, py: Python<'_>) -> Py<PyBytes> {
        self.unsent.clone_ref(py)
    }

    #[getter]
    fn skipping(&self, py: Python<'_>) -> Option<(u64, Py<PyBytes>)> {
        self.skipping.as_ref().map(|(left, reply)| (*left, reply.clone_ref(py)))
    }

    fn take_descriptor(&self) -> PyResult<i32> {
        let taken = self.fd.lock().unwrap_or_else(PoisonError::into_inner).take();
        taken.map(OwnedFd::into_raw_fd).ok_or_else(|| os_error(9, "the descriptor was taken before"))
    }
}

#[pyfunction]
#[pyo3(signature = (
    engine, export, fd, notices, token, *, structured = false, extended = false, contexts = vec![],
    initial = &b""[..], unsent = &b""[..], skipping = None, max_payload = 33_554_432, stall_timeout = 60.0,
), text_signature = "(engine, export, fd, notices, token, *, structured=False, extended=False, \
    contexts=(), initial=b'', unsent=b'', skipping=None, max_payload=33554432, stall_timeout=60.0)")]
#[allow(clippy::too_many_arguments, reason = "the signature is the stub's")]
pub fn serve_nbd(
    py: Python<'_>,
    engine: &Engine,
    export: &Export,
    fd: i32,
    notices: &Notices,
    token: u64,
    structured: bool,
    extended: bool,
    contexts: Vec<(u32, String)>,
    initial: &[u8],
    unsent: &[u8],
    skipping: Option<(u64, Vec<u8>)>,
    max_payload: u32,
    stall_timeout: f64,
) -> PyResult<Connection> {
    let style = match (extended, structured) {
        (true, _) => Style::Extended,
        (_, true) => Style::Structured,
        _ => Style::Simple,
    };
    if !engine.0.is_here() {
        return Err(forked_error(py, "the engine"));
    }
    let stall = Duration::try_from_secs_f64(stall_timeout).map_err(value_error)?;
    let contexts =
        contexts.iter().map(|(id, name)| Selected { id: *id, context: blkloom_core::context(name) }).collect();
    let skipping = skipping.map(|(left, reply)| Skipping { left, reply });
    let unfinished = Unfinished { initial: initial.to_vec(), unsent: unsent.to_vec(), skipping };
    let session = Session { style, contexts, unfinished, max_payload, stall };
    let (fd, export, notices) = (duplicate(fd)?, export.inner.clone(), notices.inner.clone());
    py.detach(|| engine.0.serve_nbd(NbdSession { export, fd, session, notices, token }))
        .map(Connection)
        .map_err(|error| os_error(108, &error.to_string()))
}
