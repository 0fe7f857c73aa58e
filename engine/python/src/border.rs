//! Conversions that all classes use: errors, buffers, operations, statistics.

use std::ffi::c_int;

use blkloom_core::{Op, Totals};
use blkloom_io::{Errno, Slice, Source};
use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// Converts an errno from Python. None: out of range.
pub fn errno(number: i32) -> Option<Errno> {
    (1..4096).contains(&number).then(|| Errno::from_raw_os_error(number))
}

/// Converts an errno for Python. 0: no error.
pub fn number(error: Option<Errno>) -> i32 {
    error.map_or(0, Errno::raw_os_error)
}

/// Creates an OSError (or the subclass for the errno).
pub fn os_error(errno: Errno, what: &str) -> PyErr {
    let reason = std::io::Error::from(errno).to_string();
    let reason = reason.split(" (os error").next().unwrap_or_default().to_owned();
    let text = if what.is_empty() { reason } else { format!("{what}: {reason}") };
    PyOSError::new_err((errno.raw_os_error(), text))
}

/// Creates a `blkloom.errors.ForkedError`: the object belongs to another process.
pub fn forked_error(py: Python<'_>, what: &str) -> PyErr {
    let raised =
        py.import("blkloom.errors").and_then(|errors| errors.getattr("ForkedError")?.call_method1("use_of", (what,)));
    raised.map_or_else(|error| error, PyErr::from_value)
}

pub fn value_error(error: impl std::fmt::Display) -> PyErr {
    PyValueError::new_err(error.to_string())
}

/// A view of an object with the buffer protocol. Dropping it releases the view.
pub struct Bytes {
    view: Box<ffi::Py_buffer>,
}

// SAFETY: the view is released only while attached to the interpreter (see Drop). Its memory is valid on any thread,
// because exporters must not move or free it while a view exists.
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

    /// The memory to copy from.
    pub fn source(&self) -> Source<'_> {
        // SAFETY: the view is valid as long as self, and nothing is written to it.
        unsafe { self.promised_source() }
    }

    /// The memory to copy into. None: the object is read-only.
    pub fn slice(&self) -> Option<Slice<'_>> {
        // SAFETY: the view is valid as long as self.
        unsafe { self.promised() }
    }

    /// The memory to copy into, for I/O that outlives the call that started it. None: the object is read-only.
    ///
    /// # Safety
    /// Self must be kept until the I/O has ended.
    pub unsafe fn promised(&self) -> Option<Slice<'static>> {
        // SAFETY: a contiguous view of `len` bytes, valid until released, and writable as just checked.
        (self.view.readonly == 0).then(|| unsafe { self.memory() })
    }

    /// The memory to copy from, for I/O that outlives the call that started it.
    ///
    /// # Safety
    /// Self must be kept until the I/O has ended.
    pub unsafe fn promised_source(&self) -> Source<'static> {
        // SAFETY: as above, and only read.
        unsafe { self.memory() }.source()
    }

    /// The memory of the view.
    ///
    /// # Safety
    /// It must not be used after self is dropped, nor written if the view is read-only.
    unsafe fn memory(&self) -> Slice<'static> {
        if self.view.len == 0 {
            return Slice::empty();
        }
        // SAFETY: the caller guarantees it.
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
