//! Python class `NbdClient`: a backend whose bytes are on an NBD server.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use blkloom_core::nbd::Stream;
use blkloom_core::nbd_client::{self, Link, Offer, Report, Settings, Style};
use blkloom_io::Errno;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::border::{self, forked_error, os_error, value_error};
use crate::device::Engine;
use crate::maps::duplicate;
use crate::tls::TlsSession;

/// A backend whose bytes are on an NBD server.
#[pyclass(frozen, module = "blkloom._engine")]
pub struct NbdClient(pub Arc<nbd_client::NbdClient>);

#[pymethods]
impl NbdClient {
    #[new]
    #[pyo3(signature = (*, connections, longest, longest_range, block = 1, timeout = None, unflushed = false))]
    fn new(
        connections: usize,
        longest: u64,
        longest_range: u64,
        block: u64,
        timeout: Option<f64>,
        unflushed: bool,
    ) -> PyResult<NbdClient> {
        if connections == 0 || longest < block || longest_range < block || !block.is_power_of_two() {
            return Err(value_error(
                "connections, longest and longest_range must be at least 1, and block a power of two",
            ));
        }
        let timeout = timeout.map(Duration::try_from_secs_f64).transpose().map_err(value_error)?;
        let settings = Settings { longest, longest_range, block, timeout, connections, unflushed };
        let client = nbd_client::NbdClient::new(settings);
        let client =
            client.map_err(|error| os_error(Errno::from_io_error(&error).unwrap_or(Errno::MFILE), "eventfd"))?;
        Ok(NbdClient(client))
    }

    fn fileno(&self) -> RawFd {
        self.0.fd().as_raw_fd()
    }

    #[pyo3(signature = (engine, slot, fd, *, structured, extended, flags, allocation = None, tls = None))]
    #[allow(clippy::too_many_arguments, reason = "the signature is the stub's")]
    fn connect(
        &self,
        py: Python<'_>,
        engine: &Engine,
        slot: usize,
        fd: i32,
        structured: bool,
        extended: bool,
        flags: u16,
        allocation: Option<u32>,
        tls: Option<&TlsSession>,
    ) -> PyResult<()> {
        if !engine.0.is_here() {
            return Err(forked_error(py, "the engine"));
        }
        let style = match (extended, structured) {
            (true, _) => Style::Extended,
            (_, true) => Style::Structured,
            _ => Style::Simple,
        };
        let socket: Result<OwnedFd, Box<dyn Stream>> = match tls {
            Some(session) => Err(Box::new(session.take()?)),
            None => Ok(duplicate(fd)?),
        };
        let offer = Offer { style, flags, allocation };
        py.detach(|| self.0.connect(&engine.0, slot, socket, offer))
            .map_err(|error| os_error(Errno::SHUTDOWN, &error.to_string()))
    }

    #[pyo3(signature = (*, take = false))]
    fn report<'py>(&self, py: Python<'py>, take: bool) -> PyResult<Bound<'py, PyDict>> {
        let Report { links, usable, failing, in_flight, waiting, reconnects, lost } = self.0.report(take);
        let name = |link: &Link| match link {
            Link::Absent => "absent",
            Link::Up => "up",
            Link::Ending => "ending",
        };
        let report = PyDict::new(py);
        report.set_item("links", links.iter().map(name).collect::<Vec<_>>())?;
        report.set_item("usable", usable)?;
        report.set_item("failing", failing)?;
        report.set_item("in_flight", in_flight)?;
        report.set_item("waiting", waiting)?;
        report.set_item("reconnects", reconnects)?;
        report.set_item("lost", lost)?;
        Ok(report)
    }

    fn give_up(&self, errno: i32) -> bool {
        self.0.give_up(border::errno(errno).unwrap_or(Errno::IO))
    }

    fn close(&self) {
        self.0.close();
    }
}
