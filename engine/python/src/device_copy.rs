//! Python class `DeviceCopy`: copies or compares two devices.

use std::os::fd::AsRawFd;

use blkloom_core::{Counts, End, Failure, Plan, Purpose, Side, Zeroes};
use blkloom_io::Errno;
use pyo3::prelude::*;

use crate::border::{os_error, value_error};
use crate::device::Device;

/// A copy or comparison of two devices, in progress.
#[pyclass(frozen, module = "blkloom._engine")]
pub struct DeviceCopy(blkloom_core::DeviceCopy);

impl Drop for DeviceCopy {
    /// Waits for the threads without the GIL, which the handlers of their faults may need.
    fn drop(&mut self) {
        self.0.stop();
        Python::attach(|py| py.detach(|| self.0.join()));
    }
}

fn end(device: &Device) -> End {
    End { engine: device.engine.clone(), device: device.inner.clone() }
}

#[pymethods]
impl DeviceCopy {
    #[new]
    #[pyo3(signature = (source, target, *, start, end, request_size, requests, zeroes = "unmap", detect_zeroes = 0,
        compare = false))]
    #[allow(clippy::too_many_arguments, reason = "the signature is the stub's")]
    fn new(
        py: Python<'_>,
        source: &Device,
        target: &Device,
        start: u64,
        end: u64,
        request_size: usize,
        requests: usize,
        zeroes: &str,
        detect_zeroes: u64,
        compare: bool,
    ) -> PyResult<DeviceCopy> {
        source.check_here(py)?;
        target.check_here(py)?;
        let zeroes = match zeroes {
            "skip" => Zeroes::Skip,
            "unmap" => Zeroes::Unmap,
            "allocate" => Zeroes::Allocate,
            _ => return Err(value_error(format!("zeroes is {zeroes:?}; one of 'skip', 'unmap', 'allocate'"))),
        };
        if !(1..=32 << 20).contains(&request_size) || !(1..=1024).contains(&requests) {
            return Err(value_error("request_size is 1 byte to 32 MiB, requests 1 to 1024"));
        }
        let plan = Plan {
            source: self::end(source),
            target: self::end(target),
            start,
            end,
            request: request_size,
            threads: requests,
            purpose: if compare { Purpose::Compare } else { Purpose::Copy { zeroes, detect: detect_zeroes } },
        };
        py.detach(|| blkloom_core::DeviceCopy::start(plan))
            .map(DeviceCopy)
            .map_err(|error| os_error(Errno::AGAIN, &error.to_string()))
    }

    fn fileno(&self) -> i32 {
        self.0.fd().as_raw_fd()
    }

    fn watch(&self, offset: u64) {
        self.0.watch(offset);
    }

    #[getter]
    fn position(&self) -> u64 {
        self.0.position()
    }

    #[getter]
    fn counts(&self) -> (u64, u64) {
        let Counts { data, zeros } = self.0.counts();
        (data, zeros)
    }

    #[getter]
    fn ended(&self) -> bool {
        self.0.has_ended()
    }

    #[getter]
    fn failure(&self) -> Option<(&'static str, &'static str, u64, u64, i32)> {
        self.0.failure().map(|failure| match failure {
            Failure::Io { side: Side::Source, op, offset, len, errno } => {
                ("source", op.name(), offset, len, errno.raw_os_error())
            }
            Failure::Io { side: Side::Target, op, offset, len, errno } => {
                ("target", op.name(), offset, len, errno.raw_os_error())
            }
            Failure::Differs { offset } => ("target", "differs", offset, 1, 0),
        })
    }

    fn stop(&self) {
        self.0.stop();
    }

    fn close(&self, py: Python<'_>) {
        self.0.stop();
        py.detach(|| self.0.join());
    }
}
