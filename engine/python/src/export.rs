//! Python classes `Export`, `Transport` and `Notices`.

use std::any::Any;
use std::collections::{BTreeMap, HashMap};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};

use blkloom_core::{Outcome, TransportHandle, fuse, nbd, vhost_user};
use blkloom_io::Errno;
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::border::{Bytes, number, os_error, stats, value_error};
use crate::device::Device;
use crate::fuse::DetachedFuse;
use crate::nbd::Detached;
use crate::vhost_user::DetachedVhostUser;

#[pyclass(frozen, module = "blkloom._engine")]
pub struct Notices {
    pub inner: Arc<blkloom_core::Notices>,
    /// The buffers of I/O in flight, by token.
    held: Mutex<HashMap<u64, Option<Bytes>>>,
}

impl Drop for Notices {
    /// Leaks the buffers of I/O in flight: they must outlive the I/O, and its end can no longer be reported. (The
    /// caller should not drop notices before their I/O has ended.)
    fn drop(&mut self) {
        let held = self.held.get_mut().unwrap_or_else(PoisonError::into_inner);
        self.inner.take().iter().for_each(|ended| drop(held.remove(&ended.token)));
        held.drain().for_each(|(_, bytes)| std::mem::forget(bytes));
    }
}

impl Notices {
    /// Keeps the buffer of I/O until its notice is taken. A token identifies one I/O at a time.
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
        let inner = blkloom_core::Notices::new()
            .map_err(|error| os_error(Errno::from_io_error(&error).unwrap_or(Errno::MFILE), "eventfd"))?;
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
                    (result, number(error))
                }
                Outcome::Users(count) => (count.into_pyobject(py)?.into_any(), 0),
                Outcome::Closed { reason } => (reason.into_pyobject(py)?.into_any(), 0),
                Outcome::Detached(left) => (detached(py, left)?, 0),
            };
            all.push((notice.token, result, errno));
        }
        Ok(all)
    }
}

/// Converts the state of a detached transport to the Python class of its kind.
fn detached<'py>(py: Python<'py>, left: Box<dyn Any + Send>) -> PyResult<Bound<'py, PyAny>> {
    let left = match left.downcast::<nbd::Detached>() {
        Ok(left) => return Ok(Bound::new(py, Detached::new(py, *left))?.into_any()),
        Err(left) => left,
    };
    let left = match left.downcast::<fuse::Detached>() {
        Ok(left) => return Ok(Bound::new(py, DetachedFuse::new(py, *left))?.into_any()),
        Err(left) => left,
    };
    match left.downcast::<vhost_user::Detached>() {
        Ok(left) => Ok(Bound::new(py, DetachedVhostUser::new(*left))?.into_any()),
        Err(_) => Err(PyRuntimeError::new_err("a transport of a kind that has no name in Python was detached")),
    }
}

/// An export of a device, with its own statistics.
#[pyclass(frozen, module = "blkloom._engine")]
pub struct Export {
    pub inner: Arc<blkloom_core::Export>,
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
        self.inner.transports().values().sum()
    }

    fn transports(&self) -> BTreeMap<&'static str, usize> {
        self.inner.transports()
    }

    fn older_requests(&self) -> u64 {
        self.inner.generations.turn()
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        stats(py, self.inner.stats.totals())
    }
}

#[pyclass(frozen, module = "blkloom._engine")]
pub struct Transport(pub TransportHandle);

#[pymethods]
impl Transport {
    fn close(&self) {
        self.0.close();
    }

    #[pyo3(signature = (*, drain = false))]
    fn detach(&self, drain: bool) {
        self.0.detach(drain);
    }
}
