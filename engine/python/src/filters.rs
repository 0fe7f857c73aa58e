//! Python classes of filters: `DelayFilter`, `FlakeyFilter`, `ErrorFilter`, `SwitchFilter`, `BadBlockFilter`, `ThrottleFilter`.

use std::sync::Arc;
use std::time::Duration;

use blkloom_core::filter::{self, Filter, Limit, Operations, Per, Treatment};
use pyo3::prelude::*;

use crate::border::{self, value_error};

/// Any filter from Python.
#[derive(FromPyObject)]
pub enum AnyFilter<'py> {
    Delay(PyRef<'py, DelayFilter>),
    Flakey(PyRef<'py, FlakeyFilter>),
    Errors(PyRef<'py, ErrorFilter>),
    Switch(PyRef<'py, SwitchFilter>),
    BadBlocks(PyRef<'py, BadBlockFilter>),
    Throttle(PyRef<'py, ThrottleFilter>),
}

impl AnyFilter<'_> {
    pub fn inner(&self) -> Arc<dyn Filter> {
        match self {
            AnyFilter::Delay(filter) => filter.0.clone(),
            AnyFilter::Flakey(filter) => filter.0.clone(),
            AnyFilter::Errors(filter) => filter.0.clone(),
            AnyFilter::Switch(filter) => filter.0.clone(),
            AnyFilter::BadBlocks(filter) => filter.0.clone(),
            AnyFilter::Throttle(filter) => filter.0.clone(),
        }
    }
}

fn seconds(seconds: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(seconds).map_err(value_error)
}

/// Filter that delays requests.
#[pyclass(frozen, module = "blkloom._engine")]
pub struct DelayFilter(Arc<filter::Delay>);

#[pymethods]
impl DelayFilter {
    #[new]
    fn new(reads: f64, others: f64) -> PyResult<DelayFilter> {
        Ok(DelayFilter(Arc::new(filter::Delay::new(seconds(reads)?, seconds(others)?))))
    }

    #[getter]
    fn waiting(&self) -> (usize, usize) {
        self.0.waiting().into()
    }
}

/// Filter that is up for some seconds and down for some, in turn.
#[pyclass(frozen, module = "blkloom._engine")]
pub struct FlakeyFilter(Arc<filter::Flakey>);

#[pymethods]
impl FlakeyFilter {
    #[new]
    #[pyo3(signature = (up, down, *, reads, others, elapsed = 0.0))]
    fn new(up: u32, down: u32, reads: &str, others: &str, elapsed: f64) -> PyResult<FlakeyFilter> {
        let when_down = [treatment(reads)?, treatment(others)?];
        let inner = filter::Flakey::new(up, down, when_down, seconds(elapsed)?);
        Ok(FlakeyFilter(Arc::new(inner.ok_or_else(|| value_error("up and down are both 0"))?)))
    }

    #[getter]
    fn is_down(&self) -> bool {
        self.0.is_down()
    }
}

fn treatment(word: &str) -> PyResult<Treatment> {
    match word {
        "pass" => Ok(Treatment::Pass),
        "fail" => Ok(Treatment::Fail),
        "drop" => Ok(Treatment::Drop),
        "elsewhere" => Ok(Treatment::Elsewhere),
        "try" => Ok(Treatment::Try),
        _ => Err(value_error(format!("'{word}': must be pass, fail, drop, elsewhere or try"))),
    }
}

/// Filter whose treatment of requests may be set at any time.
#[pyclass(frozen, module = "blkloom._engine")]
pub struct SwitchFilter(Arc<filter::Switch>);

#[pymethods]
impl SwitchFilter {
    #[new]
    #[pyo3(signature = (reads = "pass", others = "pass"))]
    fn new(reads: &str, others: &str) -> PyResult<SwitchFilter> {
        Ok(SwitchFilter(Arc::new(filter::Switch::new(treatment(reads)?, treatment(others)?))))
    }

    fn set(&self, reads: &str, others: &str) -> PyResult<()> {
        self.0.set(treatment(reads)?, treatment(others)?);
        Ok(())
    }
}

/// Filter that fails requests, with a probability.
#[pyclass(frozen, module = "blkloom._engine")]
pub struct ErrorFilter(Arc<filter::Errors>);

#[pymethods]
impl ErrorFilter {
    #[new]
    #[pyo3(signature = (errno, operations, *, probability = 1_000_000_000, seed = 0))]
    fn new(errno: i32, operations: Vec<String>, probability: u32, seed: u64) -> PyResult<ErrorFilter> {
        let errno = border::errno(errno).ok_or_else(|| value_error(format!("{errno} is not an errno")))?;
        let mut of = Operations::default();
        for operation in &operations {
            match operation.as_str() {
                "read" => of.read = true,
                "write" => of.write = true,
                "discard" => of.discard = true,
                "write_zeroes" => of.write_zeroes = true,
                "flush" => of.flush = true,
                _ => {
                    return Err(value_error(format!(
                        "'{operation}': must be read, write, discard, write_zeroes or flush"
                    )));
                }
            }
        }
        Ok(ErrorFilter(Arc::new(filter::Errors::new(errno, of, probability, seed))))
    }
}

/// Filter that fails reads of bad blocks.
#[pyclass(frozen, module = "blkloom._engine")]
pub struct BadBlockFilter(Arc<filter::BadBlocks>);

#[pymethods]
impl BadBlockFilter {
    #[new]
    #[pyo3(signature = (block, *, start = 0))]
    fn new(block: u64, start: u64) -> PyResult<BadBlockFilter> {
        if block == 0 {
            return Err(value_error("a block of 0 bytes"));
        }
        Ok(BadBlockFilter(Arc::new(filter::BadBlocks::new(block, start))))
    }

    #[getter]
    fn enabled(&self) -> bool {
        self.0.is_enabled()
    }

    fn enable(&self, enabled: bool) {
        self.0.enable(enabled);
    }

    #[pyo3(signature = (block, failing_writes = 0))]
    fn add(&self, block: u64, failing_writes: u8) -> bool {
        self.0.add(block, failing_writes)
    }

    fn remove(&self, block: u64) -> bool {
        self.0.remove(block)
    }

    fn clear(&self) -> usize {
        self.0.clear()
    }

    fn list(&self) -> Vec<(u64, u8)> {
        self.0.list()
    }
}

/// Filter that delays requests so that they keep limits.
#[pyclass(frozen, module = "blkloom._engine")]
pub struct ThrottleFilter(Arc<filter::Throttle>);

#[pymethods]
impl ThrottleFilter {
    #[new]
    fn new() -> ThrottleFilter {
        ThrottleFilter(Arc::default())
    }

    fn set(&self, limits: Vec<(String, String, u64, f64)>) -> PyResult<()> {
        let limits = limits.iter().map(|(per, of, rate, burst)| limit(per, of, *rate, *burst));
        self.0.set(limits.collect::<PyResult<_>>()?);
        Ok(())
    }

    #[getter]
    fn waiting(&self) -> usize {
        self.0.waiting()
    }
}

fn limit(per: &str, of: &str, rate: u64, burst: f64) -> PyResult<Limit> {
    let per = match per {
        "operations" => Per::Operations,
        "bytes" => Per::Bytes,
        _ => return Err(value_error(format!("'{per}': must be operations or bytes"))),
    };
    let (reads, writes) = match of {
        "reads" => (true, false),
        "writes" => (false, true),
        "all" => (true, true),
        _ => return Err(value_error(format!("'{of}': must be reads, writes or all"))),
    };
    if rate == 0 {
        return Err(value_error("a rate of 0"));
    }
    Ok(Limit { per, reads, writes, rate, burst: seconds(burst)? })
}
