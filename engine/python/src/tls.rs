//! Python classes `TlsServer`, `TlsClient` and `TlsSession`.

use std::io::IoSlice;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use blkloom_core::nbd::{Stream, StreamError};
use blkloom_io::{BufferPool, Errno};
use blkloom_tls::{Client, ClientCredentials, Credentials, CredentialsError, Handshake, Peer, Server, Session};
use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::border::{os_error, value_error};
use crate::maps::duplicate;

fn credentials_error(error: CredentialsError) -> PyErr {
    match error {
        CredentialsError::Unreadable { path, error } => {
            os_error(Errno::from_io_error(&error).unwrap_or(Errno::IO), &path)
        }
        unusable => value_error(unusable),
    }
}

fn stream_error(error: StreamError) -> PyErr {
    match error {
        StreamError::Again => os_error(Errno::AGAIN, ""),
        StreamError::Io(errno) => os_error(errno, ""),
        StreamError::Broken(reason) => PyOSError::new_err((Errno::PROTO.raw_os_error(), reason)),
    }
}

#[pyclass(frozen, module = "blkloom._engine")]
pub struct TlsServer(Server);

#[pymethods]
impl TlsServer {
    #[new]
    #[pyo3(signature = (*, certificates = None, psk = None, verify_peer = false))]
    fn new(
        py: Python<'_>,
        certificates: Option<PathBuf>,
        psk: Option<PathBuf>,
        verify_peer: bool,
    ) -> PyResult<TlsServer> {
        let credentials = match (certificates, psk) {
            (Some(directory), None) => Credentials::Certificates { directory, verify_peer },
            (None, Some(file)) => Credentials::PreShared { file },
            _ => return Err(value_error("either certificates or psk")),
        };
        py.detach(|| Server::new(&credentials)).map(TlsServer).map_err(credentials_error)
    }

    fn accept(&self, fd: i32) -> PyResult<TlsSession> {
        let session = self.0.accept(duplicate(fd)?).map_err(credentials_error)?;
        Ok(TlsSession(Mutex::new(Some(session))))
    }
}

#[pyclass(frozen, module = "blkloom._engine")]
pub struct TlsClient(Client);

#[pymethods]
impl TlsClient {
    #[new]
    #[pyo3(signature = (*, certificates = None, psk = None, user = String::new(), verify = true),
        text_signature = "(*, certificates=None, psk=None, user='', verify=True)")]
    fn new(
        py: Python<'_>,
        certificates: Option<PathBuf>,
        psk: Option<PathBuf>,
        user: String,
        verify: bool,
    ) -> PyResult<TlsClient> {
        let credentials = match (certificates, psk) {
            (Some(_), Some(_)) => return Err(value_error("either certificates or psk")),
            (None, Some(file)) => ClientCredentials::PreShared { file, user },
            (directory, None) => ClientCredentials::Certificates { directory, verify },
        };
        py.detach(|| Client::new(&credentials)).map(TlsClient).map_err(credentials_error)
    }

    fn connect(&self, fd: i32, host: &str) -> PyResult<TlsSession> {
        let session = self.0.connect(duplicate(fd)?, host).map_err(credentials_error)?;
        Ok(TlsSession(Mutex::new(Some(session))))
    }
}

#[pyclass(frozen, module = "blkloom._engine")]
pub struct TlsSession(Mutex<Option<Session>>);

impl TlsSession {
    fn lock(&self) -> MutexGuard<'_, Option<Session>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The session, which no longer belongs to Python.
    pub fn take(&self) -> PyResult<Session> {
        self.lock().take().ok_or_else(gone)
    }

    fn with<T: Send>(
        &self,
        py: Python<'_>,
        call: impl FnOnce(&mut Session) -> Result<T, StreamError> + Send,
    ) -> PyResult<T> {
        py.detach(|| self.lock().as_mut().map(call)).ok_or_else(gone)?.map_err(stream_error)
    }
}

fn gone() -> PyErr {
    os_error(Errno::BADF, "the TLS session was closed, or the engine has it")
}

#[pymethods]
impl TlsSession {
    fn handshake(&self, py: Python<'_>) -> PyResult<&'static str> {
        Ok(match self.with(py, Session::handshake)? {
            Handshake::Done => "done",
            Handshake::Read => "read",
            Handshake::Write => "write",
        })
    }

    fn receive<'py>(&self, py: Python<'py>, size: usize) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let received = self.with(py, |session| {
            let mut into = vec![0; size];
            match session.receive(&mut into) {
                Ok(count) => {
                    into.truncate(count);
                    Ok(Some(into))
                }
                Err(StreamError::Again) => Ok(None),
                Err(error) => Err(error),
            }
        })?;
        Ok(received.map(|bytes| PyBytes::new(py, &bytes)))
    }

    fn send(&self, py: Python<'_>, data: &[u8]) -> PyResult<usize> {
        self.with(py, |session| {
            let buffers = &mut BufferPool::new(0);
            if data.is_empty() {
                return session.flush(buffers).map(|()| 0);
            }
            match session.send(&[IoSlice::new(data)], buffers) {
                Err(StreamError::Again) => Ok(0),
                sent => sent,
            }
        })
    }

    #[getter]
    fn has_unsent(&self, py: Python<'_>) -> PyResult<bool> {
        self.with(py, |session| Ok(session.has_unsent()))
    }

    #[getter]
    fn peer(&self, py: Python<'_>) -> PyResult<Option<(&'static str, String, Option<String>)>> {
        self.with(py, |session| {
            Ok(session.peer().map(|peer| match peer {
                Peer::Certificate { subject, common_name } => ("certificate", subject, common_name),
                Peer::User(user) => ("psk", user, None),
            }))
        })
    }

    #[getter]
    fn agreed(&self, py: Python<'_>) -> PyResult<String> {
        self.with(py, |session| Ok(session.agreed()))
    }

    fn close(&self) {
        if let Some(mut session) = self.lock().take() {
            session.close();
        }
    }
}
