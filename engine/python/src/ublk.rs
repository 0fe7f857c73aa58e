//! ublk block devices.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use blkloom_core::ublk::{self, ControlError, QueueSettings};
use blkloom_core::{EngineError, Recipient};
use blkloom_ublk_wire::control::Command;
use pyo3::exceptions::PyTimeoutError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use rustix::io::Errno;

use crate::border::{forked_error, os_error, value_error};
use crate::device::Engine;
use crate::export::{Export, Notices, Transport};
use crate::maps::duplicate;

#[pyfunction]
#[pyo3(signature = (control, command, *, device = u32::MAX, data = 0, buffer = &b""[..], timeout = 30.0),
    text_signature = "(control, command, *, device=4294967295, data=0, buffer=b'', timeout=30.0)")]
pub fn ublk_control(
    py: Python<'_>,
    control: i32,
    command: &str,
    device: u32,
    data: u64,
    buffer: &[u8],
    timeout: f64,
) -> PyResult<Py<PyBytes>> {
    let timeout = Duration::try_from_secs_f64(timeout).map_err(value_error)?;
    let what = Command::named(command).ok_or_else(|| value_error(format!("'{command}' is no command of ublk")))?;
    let (fd, mut bytes) = (duplicate(control)?, buffer.to_vec());
    match py.detach(|| ublk::control(&fd, what, (device, data), &mut bytes, timeout)) {
        Ok(()) => Ok(PyBytes::new(py, &bytes).unbind()),
        Err(error @ ControlError::Timeout(_)) => Err(PyTimeoutError::new_err(error.to_string())),
        Err(ControlError::Refused(errno)) => Err(os_error(errno, &format!("command {command} of ublk"))),
        Err(ControlError::Os(error)) => Err(os_error(errno_of(&error), "io_uring for commands of ublk")),
    }
}

#[pyclass(frozen, module = "blkloom._engine")]
pub struct UblkNode {
    inner: Arc<ublk::Node>,
    export: Py<Export>,
}

#[pymethods]
impl UblkNode {
    #[new]
    fn new(export: &Bound<'_, Export>) -> UblkNode {
        UblkNode { inner: ublk::Node::new(export.get().inner.clone()), export: export.clone().unbind() }
    }

    #[getter]
    fn export(&self, py: Python<'_>) -> Py<Export> {
        self.export.clone_ref(py)
    }

    fn leave_unanswered(&self, leaves: bool) {
        self.inner.leave_unanswered(leaves);
    }
}

#[pyfunction]
#[pyo3(signature = (engine, node, fd, notices, token, *, queue, depth, payload, privileged))]
#[allow(clippy::too_many_arguments, reason = "the signature is the stub's")]
pub fn serve_ublk(
    py: Python<'_>,
    engine: &Engine,
    node: &UblkNode,
    fd: i32,
    notices: &Notices,
    token: u64,
    queue: u16,
    depth: u16,
    payload: usize,
    privileged: bool,
) -> PyResult<Transport> {
    if !engine.0.is_here() {
        return Err(forked_error(py, "the engine"));
    }
    let (fd, recipient) = (duplicate(fd)?, Recipient { notices: notices.inner.clone(), token });
    let settings = QueueSettings { number: queue, depth, payload, privileged };
    let served = py.detach(|| ublk::serve(&engine.0, &node.inner, fd.as_fd(), settings, recipient));
    served.map(Transport).map_err(|error| match error {
        EngineError::Os(what, error) => os_error(errno_of(&error), what),
        error => os_error(Errno::SHUTDOWN, &error.to_string()),
    })
}

fn errno_of(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}
