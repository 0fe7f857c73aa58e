//! Python classes of backends: `BackendQueue` and `BackendOperation`.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use blkloom_core::{Backend, Limits, OperationId};
use blkloom_io::Errno;
use pyo3::prelude::*;
use pyo3::types::{PyAny, PyBytes};

use crate::border::{self, Bytes, os_error, value_error};
use crate::nbd_client::NbdClient;

type Id = (usize, usize, u32);

fn name_of(id: OperationId) -> Id {
    (id.queue, id.slot, id.generation)
}

/// Queue of operations that Python executes for a backend (storage that is neither a file nor memory).
#[pyclass(frozen, module = "blkloom._engine")]
pub struct BackendQueue(pub Arc<blkloom_core::BackendQueue>);

#[pymethods]
impl BackendQueue {
    #[new]
    #[pyo3(signature = (*, longest, most, most_bytes))]
    fn new(longest: u64, most: usize, most_bytes: u64) -> PyResult<BackendQueue> {
        if longest == 0 || most == 0 {
            return Err(value_error("longest and most must be at least 1"));
        }
        let queue = blkloom_core::BackendQueue::new(Limits { longest, most, most_bytes });
        let queue = queue.map_err(|error| os_error(Errno::from_io_error(&error).unwrap_or(Errno::MFILE), "eventfd"))?;
        Ok(BackendQueue(Arc::new(queue)))
    }

    #[getter]
    fn limits(&self) -> (u64, usize, u64) {
        let Limits { longest, most, most_bytes } = self.0.limits();
        (longest, most, most_bytes)
    }

    fn fileno(&self) -> RawFd {
        self.0.fd().as_raw_fd()
    }

    fn take(&self) -> (Vec<BackendOperation>, Vec<Id>) {
        let taken = self.0.take();
        let wrap = |operation| BackendOperation { queue: self.0.clone(), inner: Mutex::new(operation) };
        (taken.begun.into_iter().map(wrap).collect(), taken.cancelled.into_iter().map(name_of).collect())
    }

    fn close(&self) {
        self.0.close();
    }
}

/// Any backend from Python.
#[derive(FromPyObject)]
pub enum AnyBackend<'py> {
    Queue(PyRef<'py, BackendQueue>),
    Nbd(PyRef<'py, NbdClient>),
}

impl AnyBackend<'_> {
    pub fn inner(&self) -> Arc<dyn Backend> {
        match self {
            AnyBackend::Queue(queue) => queue.0.clone(),
            AnyBackend::Nbd(client) => client.0.clone(),
        }
    }
}

#[pyclass(frozen, module = "blkloom._engine")]
pub struct BackendOperation {
    queue: Arc<blkloom_core::BackendQueue>,
    inner: Mutex<blkloom_core::Operation>,
}

impl BackendOperation {
    fn with<T>(&self, act: impl FnOnce(&mut blkloom_core::Operation) -> T) -> T {
        act(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[pymethods]
impl BackendOperation {
    #[getter]
    fn id(&self) -> Id {
        self.with(|operation| name_of(operation.id))
    }

    #[getter]
    fn operation(&self) -> &'static str {
        self.with(|operation| operation.op.name())
    }

    #[getter]
    fn offset(&self) -> u64 {
        self.with(|operation| operation.offset)
    }

    #[getter]
    fn length(&self) -> u64 {
        self.with(|operation| operation.len)
    }

    #[getter]
    fn fua(&self) -> bool {
        self.with(|operation| operation.flags.fua)
    }

    #[getter]
    fn may_unmap(&self) -> bool {
        self.with(|operation| operation.flags.unmap)
    }

    #[getter]
    fn suspending(&self) -> bool {
        self.with(|operation| operation.flags.through_gate)
    }

    fn payload<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        self.with(|operation| PyBytes::new(py, operation.payload()))
    }

    #[pyo3(signature = (data = None))]
    fn done(&self, data: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        let bytes = data.map(|data| Bytes::of(data, false)).transpose()?.map(|bytes| bytes.source().to_vec());
        self.with(|operation| self.queue.complete(operation, Ok(bytes)));
        Ok(())
    }

    fn fail(&self, errno: i32) {
        self.with(|operation| self.queue.complete(operation, Err(border::errno(errno).unwrap_or(Errno::IO))));
    }
}
