//! Python functions of the engine's log, for `blkloom.device.engine_log`.

use std::time::UNIX_EPOCH;

use blkloom_core::log::{self, Record, Taken};
use pyo3::prelude::*;
use tracing::Level;

/// (level, module, text, file, line, thread, time)
type LogRecord = (u32, &'static str, String, &'static str, u32, String, f64);

#[pyfunction]
pub fn has_log_records() -> bool {
    log::is_waiting()
}

#[pyfunction]
pub fn log_records() -> (Vec<LogRecord>, u64) {
    told(log::take())
}

#[pyfunction]
pub fn end_log() -> (Vec<LogRecord>, u64) {
    told(log::end())
}

fn told(taken: Taken) -> (Vec<LogRecord>, u64) {
    (taken.records.into_iter().map(record).collect(), taken.dropped)
}

fn record(Record { metadata, text, thread, time }: Record) -> LogRecord {
    let (file, line) = (metadata.file().unwrap_or_default(), metadata.line().unwrap_or_default());
    let time = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    (number(metadata.level()), metadata.target(), text, file, line, thread, time)
}

/// The level in Python's logging.
fn number(level: &Level) -> u32 {
    match *level {
        Level::ERROR => 40,
        Level::WARN => 30,
        Level::INFO => 20,
        Level::DEBUG => 10,
        Level::TRACE => 5,
    }
}
