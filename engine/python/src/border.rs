//! Small things every class needs: errors, buffers, operations, statistics.

use std::ffi::c_int;

use blkloom_core::{Op, Totals};
use blkloom_io::Slice;
use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// An OSError (or its subclass) for an errno.
pub fn os_error(errno: i32, what: &str) -> PyErr {
    let reason = std::io::Error::from_raw_os_error(errno).to_string();
    let reason = reason.split(" (os error").next().unwrap_or_default().to_owned();
    let text = if what.is_empty() { reason } else { format!("{what}: {reason}") };
    PyOSError::new_err((errno, text))
}

/// For what an engine of another process would have to do: `blkloom.errors.ForkedError`.
pub fn forked_error(py: Python<'_>, what: &str) -> PyErr {
    let raised =
        py.import("blkloom.errors").and_then(|errors| errors.getattr("ForkedError")?.call_method1("use_of", (what,)));
    raised.map_or_else(|error| error, PyErr::from_value)
}

pub fn value_error(error: impl std::fmt::Display) -> PyErr {
    PyValueError::new_err(error.to_string())
}

/// The memory of an object that supports the buffer protocol, held until dropped.
pub struct Bytes {
    view: Box<ffi::Py_buffer>,
}

// SAFETY: the view is only released while attached (see Drop); its memory is what it promises to be
// from any thread, for exporters may not move or free it while views exist.
unsafe impl Send for Bytes {}
// SAFETY: as above.
unsafe impl Sync for Bytes {}

impl Bytes {
    pub fn of(object: &Bound<'_, PyAny>, writable: bool) -> PyResult<Bytes> {
        let mut view = Box::new(ffi::Py_buffer::new());
        let flags: c_int = if writable { ffi::PyBUF_WRITABLE } else { ffi::PyBUF_SIMPLE };
        // SAFETY: attached to the interpreter (we hold a Bound); `view` is a fresh Py_buffer.
        if unsafe { ffi::PyObject_GetBuffer(object.as_ptr(), &mut *view, flags) } != 0 {
            return Err(PyErr::fetch(object.py()));
        }
        Ok(Bytes { view })
    }

    pub fn slice(&self) -> Slice {
        if self.view.len == 0 {
            return Slice::empty();
        }
        // SAFETY: a contiguous view of `len` bytes, writable where it was asked to be, valid until
        // released; callers keep self until the I/O has ended.
        unsafe { Slice::new(self.view.buf.cast(), self.view.len as usize) }
    }

    pub fn len(&self) -> usize {
        self.view.len as usize
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        // SAFETY: the view was filled by PyObject_GetBuffer and not released before.
        Python::attach(|_| unsafe { ffi::PyBuffer_Release(&mut *self.view) });
    }
}

pub fn operation(name: &str) -> PyResult<Op> {
    Op::ALL.into_iter().find(|op| op.name() == name).ok_or_else(|| value_error(format!("no operation {name:?}")))
}

/// The dict of `Device.stats` and `Export.stats`.
pub fn stats<'py>(py: Python<'py>, totals: Totals) -> PyResult<Bound<'py, PyDict>> {
    let all = PyDict::new(py);
    for op in totals.ops {
        let one = PyDict::new(py);
        one.set_item("count", op.count)?;
        one.set_item("bytes", op.bytes)?;
        one.set_item("errors", op.errors)?;
        one.set_item("latency", op.latency)?;
        all.set_item(op.op.name(), one)?;
    }
    all.set_item("faults", totals.faults)?;
    all.set_item("in_flight", totals.in_flight)?;
    Ok(all)
}
