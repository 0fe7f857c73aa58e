//! Python class `Fault`, for the mapper thread.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use blkloom_core::Answer;
use blkloom_io::Errno;
use pyo3::prelude::*;
use pyo3::types::{PyAny, PyBytes};

use crate::border::{self, Bytes, value_error};

#[pyclass(frozen, module = "blkloom._engine")]
pub struct Fault {
    inner: Mutex<blkloom_core::Fault>,
}

impl Fault {
    pub fn new(fault: blkloom_core::Fault) -> Fault {
        Fault { inner: Mutex::new(fault) }
    }

    fn with<T>(&self, act: impl FnOnce(&mut blkloom_core::Fault) -> T) -> T {
        act(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[pymethods]
impl Fault {
    #[getter]
    fn operation(&self) -> &'static str {
        self.with(|fault| fault.op.name())
    }

    #[getter]
    fn owner(&self) -> u32 {
        self.with(|fault| fault.owner)
    }

    #[getter]
    fn offset(&self) -> u64 {
        self.with(|fault| fault.offset)
    }

    #[getter]
    fn length(&self) -> u64 {
        self.with(|fault| fault.len)
    }

    #[getter]
    fn context(&self) -> String {
        self.with(|fault| fault.context.as_deref().unwrap_or("base:allocation").to_owned())
    }

    #[getter]
    fn one(&self) -> bool {
        self.with(|fault| fault.flags.one)
    }

    #[getter]
    fn fua(&self) -> bool {
        self.with(|fault| fault.flags.fua)
    }

    #[getter]
    fn may_unmap(&self) -> bool {
        self.with(|fault| fault.flags.unmap)
    }

    #[getter]
    fn fast(&self) -> bool {
        self.with(|fault| fault.flags.fast)
    }

    #[getter]
    fn sync_failed(&self) -> bool {
        self.with(|fault| fault.sync_failed)
    }

    #[getter]
    fn again(&self) -> bool {
        self.with(|fault| fault.again)
    }

    #[getter]
    fn no_space(&self) -> i32 {
        self.with(|fault| border::number(fault.no_space))
    }

    #[getter]
    fn expired(&self) -> bool {
        self.with(|fault| fault.expired())
    }

    #[getter(from_client)]
    fn is_from_client(&self) -> bool {
        self.with(|fault| fault.from_client)
    }

    #[getter]
    fn blocks_suspend(&self) -> bool {
        self.with(|fault| fault.blocks_suspend())
    }

    #[getter]
    fn time_left(&self) -> f64 {
        self.with(|fault| fault.time_left().as_secs_f64())
    }

    fn payload<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        self.with(|fault| PyBytes::new(py, fault.payload()))
    }

    fn retry(&self) {
        self.with(|fault| fault.answer(Answer::Retry));
    }

    #[pyo3(signature = (data = None))]
    fn done(&self, data: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        let bytes = data.map(|data| Bytes::of(data, false)).transpose()?.map(|bytes| bytes.source().to_vec());
        self.with(|fault| fault.answer(Answer::Done(bytes)));
        Ok(())
    }

    fn extents(&self, extents: Vec<(u64, u32)>) {
        self.with(|fault| fault.answer(Answer::Extents(extents)));
    }

    #[pyo3(signature = (errno, seconds = None))]
    fn defer(&self, errno: i32, seconds: Option<f64>) -> PyResult<()> {
        let errno = border::errno(errno).unwrap_or(Errno::IO);
        let time = seconds.map(Duration::try_from_secs_f64).transpose().map_err(value_error)?;
        self.with(|fault| match time {
            Some(time) => fault.defer_for(errno, time),
            None => fault.defer(errno),
        });
        Ok(())
    }

    fn interrupt(&self, errno: i32) {
        self.with(|fault| fault.interrupt(border::errno(errno).unwrap_or(Errno::IO)));
    }

    fn fail(&self, errno: i32) {
        self.with(|fault| fault.answer(Answer::Fail(border::errno(errno).unwrap_or(Errno::IO))));
    }
}
