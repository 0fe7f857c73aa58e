//! Python classes `Engine` and `Device`.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blkloom_core::{
    Direction, Flags, IoChoice, IoError, Memory, News, Op, Owner, Request, SuspendError, SwapError, Transfer,
};
use blkloom_io::{Errno, Slice};
use pyo3::exceptions::{PyTimeoutError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyAny, PyBytes, PyDict, PyList, PyTuple};

use crate::border::{Bytes, forked_error, operation, os_error, stats, value_error};
use crate::export::Notices;
use crate::fault::Fault;
use crate::maps::Map;

/// Event loop threads, each with an io_uring, or a thread pool where io_uring is forbidden.
#[pyclass(frozen, module = "blkloom._engine")]
pub struct Engine(pub Arc<blkloom_core::Engine>);

#[pymethods]
impl Engine {
    #[new]
    #[pyo3(signature = (*, loops = 0, io = "auto", spin_us = 50, threads = 16, memory = 268_435_456),
        text_signature = "(*, loops=0, io='auto', spin_us=50, threads=16, memory=268435456)")]
    fn new(loops: usize, io: &str, spin_us: u64, threads: usize, memory: usize) -> PyResult<Engine> {
        let choice = match io {
            "auto" => IoChoice::Auto,
            "io_uring" => IoChoice::Ring,
            "threads" => IoChoice::Threads,
            _ => {
                return Err(value_error(format!("io is {io:?}; one of 'auto', 'io_uring', 'threads'")));
            }
        };
        let spin = Duration::from_micros(spin_us.min(10_000));
        let made = blkloom_core::Engine::new(loops, choice, spin, threads);
        made.map(|engine| Engine(Arc::new(engine.with_memory(memory)))).map_err(|error| match &error {
            blkloom_core::EngineError::NoRing(cause) => {
                os_error(Errno::from_io_error(cause).unwrap_or(Errno::NOSYS), "io_uring is not available here")
            }
            _ => os_error(Errno::IO, &error.to_string()),
        })
    }

    #[getter]
    fn io(&self) -> &'static str {
        if self.0.uses_ring() { "io_uring" } else { "threads" }
    }

    #[getter]
    fn loops(&self) -> usize {
        self.0.loops()
    }

    fn memory<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let used = self.0.memory_use();
        let all = PyDict::new(py);
        all.set_item("budget", used.budget)?;
        all.set_item("reserved", used.reserved)?;
        all.set_item("waiting", used.waiting)?;
        Ok(all)
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.0.close());
    }
}

#[pyclass(frozen, subclass, module = "blkloom._engine")]
pub struct Device {
    pub engine: Arc<blkloom_core::Engine>,
    pub inner: Arc<blkloom_core::Device>,
}

impl Device {
    /// Raises ForkedError in a fork of the process that created the device.
    pub fn check_here(&self, py: Python<'_>) -> PyResult<()> {
        if self.engine.is_here() {
            return Ok(());
        }
        Err(forked_error(py, &called(self.inner.name())))
    }

    fn transfer(&self, py: Python<'_>, transfer: Transfer<'_>, fua: bool) -> PyResult<()> {
        self.check_here(py)?;
        py.detach(|| self.engine.transfer(&self.inner, transfer, fua)).map_err(|errno| {
            let (verb, len) = (transfer.direction.op().name(), transfer.direction.len());
            self.error(errno, &format!("{verb} of {len} bytes at {}", transfer.offset))
        })
    }

    fn command(&self, py: Python<'_>, op: Op, offset: u64, len: u64, flags: Flags) -> PyResult<()> {
        self.check_here(py)?;
        py.detach(|| self.engine.command(&self.inner, op, offset, len, flags))
            .map(drop)
            .map_err(|errno| self.error(errno, &format!("{} of {len} bytes at {offset}", op.name())))
    }

    fn error(&self, errno: Errno, what: &str) -> PyErr {
        os_error(errno, &format!("{} ({} bytes): {what}", called(self.inner.name()), self.inner.size()))
    }
}

/// The name of a device in messages.
fn called(name: &str) -> String {
    if name.is_empty() { "the device".into() } else { format!("device '{name}'") }
}

fn suspend_error(error: SuspendError, name: &str) -> PyErr {
    let name = called(name);
    match error {
        SuspendError::Timeout => PyTimeoutError::new_err(format!(
            "{name}: requests in flight, or another call, did not finish in time; nothing changed"
        )),
        SuspendError::Closed => os_error(Errno::SHUTDOWN, &name),
        SuspendError::Flush(errno) => os_error(errno, &format!("{name}: flush on suspend")),
    }
}

fn swap_error(error: SwapError, name: &str) -> PyErr {
    let name = called(name);
    match error {
        SwapError::Closed => os_error(Errno::SHUTDOWN, &name),
        SwapError::TooDeep(levels) => {
            os_error(Errno::LOOP, &format!("{name}: the stack would have {levels} levels of devices, the limit is 32"))
        }
        SwapError::Cycle => PyValueError::new_err(format!("{name}: the new map would reach the device itself")),
    }
}

#[pymethods]
impl Device {
    #[new]
    #[pyo3(signature = (engine, map = None, *, name = "", fault_timeout = 30.0, **kwargs))]
    fn new(
        engine: &Engine,
        map: Option<&Map>,
        name: &str,
        fault_timeout: f64,
        kwargs: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Device> {
        let _for_subclasses = kwargs;
        let timeout = Duration::try_from_secs_f64(fault_timeout).map_err(value_error)?;
        let inner = blkloom_core::Device::new(name.to_owned(), map.map(|map| map.0.clone()), timeout)
            .map_err(|error| swap_error(error, name))?;
        Ok(Device { engine: engine.0.clone(), inner })
    }

    #[getter]
    fn name(&self) -> &str {
        self.inner.name()
    }

    #[getter]
    fn size(&self) -> u64 {
        self.inner.size()
    }

    #[getter]
    fn suspended(&self) -> bool {
        self.inner.suspended()
    }

    #[pyo3(signature = (*, flush = true, timeout = None))]
    fn suspend(&self, py: Python<'_>, flush: bool, timeout: Option<f64>) -> PyResult<()> {
        self.check_here(py)?;
        let timeout = timeout.map(Duration::try_from_secs_f64).transpose().map_err(value_error)?;
        py.detach(|| {
            self.engine.suspend(&self.inner, flush, timeout.and_then(|timeout| Instant::now().checked_add(timeout)))
        })
        .map_err(|error| suspend_error(error, self.inner.name()))
    }

    fn swap(&self, py: Python<'_>, map: &Map) -> PyResult<()> {
        self.check_here(py)?;
        let mapping = map.0.clone();
        py.detach(|| self.inner.swap(mapping).map(drop)).map_err(|error| swap_error(error, self.inner.name()))
    }

    fn resume(&self, py: Python<'_>) -> PyResult<()> {
        self.check_here(py)?;
        match py.detach(|| self.inner.resume()) {
            true => Ok(()),
            false => Err(self.error(Errno::INVAL, "resume without a map, or after close")),
        }
    }

    fn synchronize(&self, py: Python<'_>) -> PyResult<()> {
        self.check_here(py)?;
        py.detach(|| self.inner.synchronize());
        Ok(())
    }

    #[pyo3(signature = (timeout = None))]
    fn next_faults(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<Option<Vec<Fault>>> {
        self.check_here(py)?;
        let timeout = timeout.map(Duration::try_from_secs_f64).transpose().map_err(value_error)?;
        let faults = py.detach(|| self.inner.next_faults(timeout));
        Ok(faults.map(|faults| faults.into_iter().map(Fault::new).collect()))
    }

    #[getter]
    fn gate_changes(&self, py: Python<'_>) -> PyResult<u64> {
        self.check_here(py)?;
        Ok(self.inner.gate_changes())
    }

    fn fault_event(&self, py: Python<'_>) -> PyResult<i32> {
        self.check_here(py)?;
        Ok(self.inner.fault_event()?.as_raw_fd())
    }

    fn wake_mapper(&self, py: Python<'_>) -> PyResult<()> {
        self.check_here(py)?;
        self.inner.wake_mapper();
        Ok(())
    }

    #[getter]
    fn deferred(&self, py: Python<'_>) -> PyResult<usize> {
        self.check_here(py)?;
        Ok(self.inner.deferred())
    }

    fn retry_deferred(&self, py: Python<'_>) -> PyResult<()> {
        self.check_here(py)?;
        self.inner.retry_deferred();
        Ok(())
    }

    fn fail_deferred(&self, py: Python<'_>) -> PyResult<()> {
        self.check_here(py)?;
        self.inner.fail_deferred();
        Ok(())
    }

    fn attach_mapper(&self, py: Python<'_>) -> PyResult<()> {
        self.check_here(py)?;
        self.inner.attach_mapper();
        Ok(())
    }

    fn close(&self, py: Python<'_>) {
        if self.engine.is_here() {
            py.detach(|| self.inner.close());
        }
    }

    fn pread<'py>(&self, py: Python<'py>, length: usize, offset: u64) -> PyResult<Bound<'py, PyBytes>> {
        if length as u64 > self.inner.size() {
            let errno = if self.inner.closed() { Errno::SHUTDOWN } else { Errno::INVAL };
            return Err(self.error(errno, &format!("read of {length} bytes at {offset}")));
        }
        // SAFETY: a new bytes object of `length` uninitialised bytes, or NULL with an exception set.
        let bytes = unsafe {
            let object = ffi::PyBytes_FromStringAndSize(std::ptr::null(), length as ffi::Py_ssize_t);
            Bound::from_owned_ptr_or_err(py, object)?.cast_into_unchecked::<PyBytes>()
        };
        // SAFETY: no other code has a reference to the new object, so this function may write its memory. `bytes` keeps
        // it alive until the read has ended.
        let memory = unsafe { Slice::new(bytes.as_bytes().as_ptr().cast_mut(), length) };
        self.transfer(py, Transfer { direction: Direction::Read(memory), offset }, false)?;
        Ok(bytes)
    }

    fn pread_into(&self, py: Python<'_>, buffer: &Bound<'_, PyAny>, offset: u64) -> PyResult<usize> {
        let bytes = Bytes::of(buffer, true)?;
        self.transfer(py, Transfer { direction: reading(&bytes)?, offset }, false)?;
        Ok(bytes.len())
    }

    #[pyo3(signature = (data, offset, *, fua = false))]
    fn pwrite(&self, py: Python<'_>, data: &Bound<'_, PyAny>, offset: u64, fua: bool) -> PyResult<usize> {
        let bytes = Bytes::of(data, false)?;
        self.transfer(py, Transfer { direction: Direction::Write(bytes.source()), offset }, fua)?;
        Ok(bytes.len())
    }

    fn flush(&self, py: Python<'_>) -> PyResult<()> {
        self.command(py, Op::Flush, 0, 0, Flags::default())
    }

    fn discard(&self, py: Python<'_>, offset: u64, length: u64) -> PyResult<()> {
        self.command(py, Op::Discard, offset, length, Flags::default())
    }

    #[pyo3(signature = (offset, length, *, unmap = true, fast = false, fua = false))]
    fn write_zeroes(
        &self,
        py: Python<'_>,
        offset: u64,
        length: u64,
        unmap: bool,
        fast: bool,
        fua: bool,
    ) -> PyResult<()> {
        self.command(py, Op::WriteZeroes, offset, length, Flags { fua, unmap, fast, ..Flags::default() })
    }

    #[pyo3(signature = (offset = 0, length = None, *, context = "base:allocation"))]
    fn extents(
        &self,
        py: Python<'_>,
        offset: u64,
        length: Option<u64>,
        context: &str,
    ) -> PyResult<Vec<(u64, u64, u32)>> {
        self.check_here(py)?;
        let asked = blkloom_core::context(context);
        let end = match length {
            Some(length) => offset.saturating_add(length),
            None => self.inner.size().max(offset),
        };
        py.detach(|| {
            let mut all: Vec<(u64, u64, u32)> = Vec::new();
            let mut at = offset;
            while at < end {
                let before = at;
                for found in self.engine.extents(&self.inner, at, end - at, asked.clone())? {
                    if found.offset != at {
                        break; // a gap: the answer is incomplete; ask again from here
                    }
                    at += found.len;
                    match all.last_mut() {
                        Some((_, len, flags)) if *flags == found.flags => *len += found.len,
                        _ => all.push((found.offset, found.len, found.flags)),
                    }
                }
                if at == before {
                    return Err(Errno::IO);
                }
            }
            Ok(all)
        })
        .map_err(|errno| self.error(errno, &format!("extents of {} bytes at {offset}", end - offset)))
    }

    fn batch<'py>(&self, py: Python<'py>, requests: &Bound<'py, PyAny>) -> PyResult<Vec<i64>> {
        self.check_here(py)?;
        let requests = match requests.cast::<PyList>() {
            Ok(list) => list.clone(),
            Err(_) => PyList::new(py, requests.try_iter()?.collect::<PyResult<Vec<_>>>()?)?,
        };
        let mut asked = Vec::with_capacity(requests.len());
        for request in requests.iter() {
            let request = request.cast::<PyTuple>()?;
            if request.len() != 3 {
                return Err(value_error("a request is (\"r\" or \"w\", buffer, offset)"));
            }
            let reads = match request.get_borrowed_item(0)?.extract::<&str>()? {
                "r" => true,
                "w" => false,
                other => return Err(value_error(format!("direction {other:?}; \"r\" or \"w\""))),
            };
            let bytes = Bytes::of(&request.get_item(1)?, reads)?;
            let offset: u64 = request.get_borrowed_item(2)?.extract()?;
            asked.push((reads, bytes, offset));
        }
        let batch = asked.iter().map(transfer).collect::<PyResult<Vec<_>>>()?;
        let results = py.detach(|| self.engine.batch(&self.inner, &batch));
        let answer = |(error, bytes): (Option<Errno>, &Bytes)| match error {
            None => bytes.len() as i64,
            Some(errno) => -i64::from(errno.raw_os_error()),
        };
        Ok(results.into_iter().zip(asked.iter().map(|(_, bytes, _)| bytes)).map(answer).collect())
    }

    #[pyo3(signature = (notices, token, operation, offset, length, buffer = None, *, fua = false, unmap = true, fast = false,
        context = "base:allocation", suspending = false))]
    #[allow(clippy::too_many_arguments, reason = "the signature is the stub's")]
    fn submit(
        &self,
        py: Python<'_>,
        notices: &Notices,
        token: u64,
        operation: &str,
        offset: u64,
        length: u64,
        buffer: Option<&Bound<'_, PyAny>>,
        fua: bool,
        unmap: bool,
        fast: bool,
        context: &str,
        suspending: bool,
    ) -> PyResult<bool> {
        self.check_here(py)?;
        let op = self::operation(operation)?;
        let bytes = match (op, buffer) {
            (Op::Read | Op::Write, Some(buffer)) => Some(Bytes::of(buffer, op == Op::Read)?),
            (Op::Read | Op::Write, None) => return Err(value_error(format!("{operation} needs a buffer"))),
            _ => None,
        };
        if let Some(bytes) = bytes.as_ref().filter(|bytes| bytes.len() as u64 != length) {
            return Err(value_error(format!("a buffer of {} bytes for {length}", bytes.len())));
        }
        // SAFETY: this function keeps the view until `notices.hold`, and the notices keep it until the request has
        // ended.
        let memory = match &bytes {
            None => Memory::None,
            Some(bytes) if op == Op::Read => Memory::Borrowed(unsafe { bytes.promised() }.ok_or_else(read_only)?),
            Some(bytes) => Memory::Source(unsafe { bytes.promised_source() }),
        };
        let mut request = Request {
            device: self.inner.clone(),
            op,
            offset,
            len: length,
            flags: Flags { fua, unmap, fast, through_gate: suspending && op == Op::Flush, ..Flags::default() },
            memory,
            owner: Owner::Notice { notices: notices.inner.clone(), token },
            started: Instant::now(),
            context: blkloom_core::context(context),
            done: 0,
        };
        match py.detach(|| self.engine.attempt(&mut request)) {
            Some(Ok(())) => return Ok(true),
            Some(Err(errno)) => return Err(self.error(errno, &format!("{} of {length} bytes at {offset}", op.name()))),
            None => {}
        }
        notices.hold(token, bytes)?;
        py.detach(|| self.engine.start(request));
        Ok(false)
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let all = stats(py, self.inner.stats().totals())?;
        all.set_item("io_errors", self.inner.io_errors().count())?;
        Ok(all)
    }

    #[getter]
    fn io_errors(&self) -> u64 {
        self.inner.io_errors().count()
    }

    #[getter]
    fn last_io_error(&self) -> Option<(&'static str, u64, i32, String)> {
        self.inner.io_errors().last().map(told)
    }

    #[getter]
    fn has_new_io_errors(&self) -> bool {
        self.inner.io_errors().waiting()
    }

    #[allow(clippy::type_complexity, reason = "a list of tuples, as Python sees it")]
    fn new_io_errors(&self) -> (Vec<(&'static str, u64, i32, String, u64)>, u64) {
        let News { kinds, others } = self.inner.io_errors().take();
        let told = |(error, times)| {
            let (op, offset, errno, file) = told(error);
            (op, offset, errno, file, times)
        };
        (kinds.into_iter().map(told).collect(), others)
    }
}

fn told(IoError { op, offset, errno, file }: IoError) -> (&'static str, u64, i32, String) {
    (op.name(), offset, errno.raw_os_error(), file)
}

/// Converts one request of a batch: (whether it reads, buffer, offset).
fn transfer((reads, bytes, offset): &(bool, Bytes, u64)) -> PyResult<Transfer<'_>> {
    let direction = if *reads { reading(bytes)? } else { Direction::Write(bytes.source()) };
    Ok(Transfer { direction, offset: *offset })
}

/// A read into a Python buffer.
fn reading(bytes: &Bytes) -> PyResult<Direction<'_>> {
    bytes.slice().map(Direction::Read).ok_or_else(read_only)
}

fn read_only() -> PyErr {
    value_error("the buffer is read-only")
}
