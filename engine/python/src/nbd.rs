//! Python class `Detached` and function `serve_nbd`.

use std::os::fd::{IntoRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use blkloom_core::Recipient;
use blkloom_core::nbd::{self, Selected, Session, Skipping, Stream, Unfinished};
use blkloom_io::Errno;
use blkloom_wire::Style;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::border::{forked_error, os_error, value_error};
use crate::device::Engine;
use crate::export::{Export, Notices, Transport};
use crate::maps::duplicate;
use crate::tls::TlsSession;

#[pyclass(frozen, module = "blkloom._engine")]
pub struct Detached {
    initial: Py<PyBytes>,
    unsent: Py<PyBytes>,
    skipping: Option<(u64, Py<PyBytes>)>,
    fd: Mutex<Option<OwnedFd>>,
}

impl Detached {
    pub fn new(py: Python<'_>, nbd::Detached { fd, unfinished }: nbd::Detached) -> Detached {
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
        taken.map(OwnedFd::into_raw_fd).ok_or_else(|| os_error(Errno::BADF, "the descriptor was taken before"))
    }
}

#[pyfunction]
#[pyo3(signature = (
    engine, export, fd, notices, token, *, structured = false, extended = false, contexts = vec![],
    initial = &b""[..], unsent = &b""[..], skipping = None, max_payload = 33_554_432, stall_timeout = 60.0,
    read_only = false, tls = None,
), text_signature = "(engine, export, fd, notices, token, *, structured=False, extended=False, \
    contexts=(), initial=b'', unsent=b'', skipping=None, max_payload=33554432, stall_timeout=60.0, read_only=False, tls=None)")]
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
    read_only: bool,
    tls: Option<&TlsSession>,
) -> PyResult<Transport> {
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
    let session = Session { style, contexts, unfinished, read_only, max_payload, stall };
    let stream: Box<dyn Stream> = match tls {
        Some(tls) => Box::new(tls.take()?),
        None => duplicate(fd)?.into(),
    };
    let recipient = Recipient { notices: notices.inner.clone(), token };
    py.detach(|| nbd::serve(&engine.0, &export.inner, stream, session, recipient))
        .map(Transport)
        .map_err(|error| os_error(Errno::SHUTDOWN, &error.to_string()))
}
