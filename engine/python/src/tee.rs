//! Python class `Tee`: several devices that get the same writes.

use std::sync::Arc;

use blkloom_core::Backend;
use pyo3::prelude::*;

use crate::backend::BackendQueue;
use crate::border::value_error;
use crate::device::Device;

/// Several devices that get the same writes.
#[pyclass(frozen, module = "blkloom._engine")]
pub struct Tee(pub Arc<blkloom_core::Tee>);

#[pymethods]
impl Tee {
    #[new]
    fn new(legs: Vec<Bound<'_, Device>>, backend: &BackendQueue, size: u64, region: u64) -> PyResult<Tee> {
        if legs.is_empty() || size == 0 || region == 0 {
            return Err(value_error("a tee needs legs, a size and a size of a region"));
        }
        let legs = legs.iter().map(|leg| leg.get().inner.clone()).collect();
        let backend: Arc<dyn Backend> = backend.0.clone();
        Ok(Tee(blkloom_core::Tee::new(legs, backend, size, region)))
    }

    fn open(&self, first: usize, count: usize) {
        self.0.open(first, count);
    }

    fn shut(&self, first: usize, count: usize) -> bool {
        self.0.shut(first, count)
    }

    fn wait(&self, py: Python<'_>, first: usize, count: usize) -> bool {
        py.detach(|| self.0.wait(first, count))
    }

    fn end(&self) {
        self.0.end();
    }

    fn torn(&self) -> Vec<(u64, u64)> {
        self.0.torn()
    }

    fn mend(&self, offset: u64, length: u64) {
        self.0.mend(offset, length);
    }
}
