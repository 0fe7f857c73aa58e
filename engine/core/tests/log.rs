//! The queue of the engine's log for Python's logging. A separate test program, because the log is global.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use blkloom_core::{Device, log};
use rig::*;
use tracing::Level;

/// Lock that serializes the tests, because they share the log.
fn collecting() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    log::collect();
    turn
}

#[test]
fn a_record_has_level_module_thread_and_one_line_of_text() {
    let _turn = collecting();
    let hostile = "a\nb\u{1b}[31m\u{202e}";
    let saying = move || tracing::warn!(count = 3, path = hostile, raw = %hostile, "it says \"{}\"", hostile);
    std::thread::Builder::new().name("sayer".into()).spawn(saying).unwrap().join().unwrap();
    assert!(log::is_waiting());
    let taken = log::take();
    assert_eq!(taken.dropped, 0);
    let [record] = taken.records.as_slice() else { panic!("{taken:?}") };
    assert_eq!((*record.metadata.level(), record.metadata.target()), (Level::WARN, "log"));
    assert_eq!(record.thread, "sayer");
    let escaped = r"a\x0ab\x1b[31m\xe2\x80\xae";
    let debug = r#""a\nb\u{1b}[31m\u{202e}""#;
    assert_eq!(record.text, format!("it says \"{escaped}\" (count=3, path={debug}, raw={escaped})"));
    assert!(!log::is_waiting());
}

#[test]
fn records_that_find_the_queue_full_are_counted() {
    let _turn = collecting();
    let sayers: Vec<_> = (0..4)
        .map(|_| std::thread::spawn(|| (0..log::LIMIT).for_each(|number| tracing::info!(number, "many"))))
        .collect();
    sayers.into_iter().for_each(|sayer| sayer.join().unwrap());
    let taken = log::take();
    assert_eq!((taken.records.len(), taken.dropped), (log::LIMIT, 3 * log::LIMIT as u64));
    tracing::info!("there is room again");
    let taken = log::take();
    assert_eq!((taken.records.len(), taken.dropped), (1, 0));
}

#[test]
fn a_mapper_is_woken_for_the_first_record_and_for_those_before_it() {
    let _turn = collecting();
    let gone = Device::new("gone".into(), None, PATIENT).unwrap();
    gone.attach_mapper();
    drop(gone);
    tracing::error!("before there was a mapper");
    let device = Device::new("log".into(), None, PATIENT).unwrap();
    device.attach_mapper();
    assert!(device.next_faults(Some(PATIENT)).unwrap().is_empty());
    assert!(log::is_waiting());
    assert_eq!(log::take().records.len(), 1);
    std::thread::scope(|scope| {
        let woken = scope.spawn(|| device.next_faults(None));
        tracing::error!("while it waits");
        assert!(woken.join().unwrap().unwrap().is_empty());
    });
    assert_eq!(log::take().records.len(), 1);
    assert!(device.next_faults(Some(Duration::ZERO)).unwrap().is_empty());
}

#[test]
fn the_end_returns_records_that_were_not_taken() {
    let _turn = collecting();
    tracing::info!("the last words");
    assert_eq!(log::end().records.len(), 1);
    tracing::info!("these go to the standard error");
    assert!(!log::is_waiting());
    assert!(log::end().records.is_empty());
}
