//! The engine's log: a `tracing` subscriber that queues records for Python's logging, or writes them to standard error.
//!
//! Threads of the engine never call Python. After `collect`, records go to a queue of bounded size, and mapper threads
//! (`attach`) are woken to take them. When the queue is full, records are counted and dropped. Before `collect` and
//! after `end`, records go to standard error. A thread that logs holds the queue's lock only to add a record. A fork
//! has a queue of its own; the parent logs the records in its queue.

use std::fmt::{self, Write as _};
use std::io::Write as _;
use std::sync::{Arc, Mutex, Once, Weak};
use std::time::SystemTime;

use arc_swap::ArcSwapOption;
use blkloom_io::Process;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record as Values};
use tracing::{Event, Metadata, Subscriber};

use crate::device::Device;
use crate::lock;

/// Most records in the queue.
pub const LIMIT: usize = 256;

/// One log record.
#[derive(Clone, Debug)]
pub struct Record {
    /// Level, module, file and line.
    pub metadata: &'static Metadata<'static>,
    /// One line: the message, then the fields as ` (name=value, ...)`. Unprintable characters are written as `\xNN`.
    pub text: String,
    /// The name of the thread.
    pub thread: String,
    pub time: SystemTime,
}

/// Records since the last `take`.
#[derive(Default, Debug)]
pub struct Taken {
    pub records: Vec<Record>,
    /// Number of records dropped because the queue was full.
    pub dropped: u64,
}

#[derive(Default)]
struct State {
    taken: Taken,
    mappers: Vec<Weak<Device>>,
    ended: bool,
}

struct Queue {
    state: Mutex<State>,
    home: Process,
}

static QUEUE: ArcSwapOption<Queue> = ArcSwapOption::const_empty();

/// Installs this subscriber in the process, unless the process has one (a program that embeds the engine may).
pub(crate) fn install() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        let _theirs_stays = tracing::subscriber::set_global_default(EngineLog);
    });
}

/// Starts queueing records for `take`.
pub fn collect() {
    install();
    QUEUE.store(Some(Queue::new()));
}

/// Stops queueing: later records go to standard error. Returns the records that `take` has not returned.
pub fn end() -> Taken {
    let queue = current();
    QUEUE.store(None);
    queue.map_or_else(Taken::default, |queue| {
        let mut state = lock(&queue.state);
        state.ended = true;
        std::mem::take(&mut state.taken)
    })
}

/// Writes all queued records to standard error, because the process is about to abort.
pub(crate) fn spill() {
    end().records.iter().for_each(print);
}

/// Whether `take` has records to return.
pub fn is_waiting() -> bool {
    current().is_some_and(|queue| !lock(&queue.state).taken.records.is_empty())
}

pub fn take() -> Taken {
    current().map_or_else(Taken::default, |queue| std::mem::take(&mut lock(&queue.state).taken))
}

/// Registers a device whose mapper is woken when a record is queued. The reference is weak.
pub(crate) fn attach(device: &Arc<Device>) {
    let Some(queue) = current() else {
        return;
    };
    let mut state = lock(&queue.state);
    state.mappers.retain(|mapper| mapper.strong_count() > 0);
    state.mappers.push(Arc::downgrade(device));
    if !state.taken.records.is_empty() {
        drop(state);
        device.wake_mapper();
    }
}

/// The queue of this process. None: records go to standard error.
fn current() -> Option<Arc<Queue>> {
    let queue = QUEUE.load_full()?;
    if queue.home.is_current() {
        return Some(queue);
    }
    // A thread that does not exist in this fork may hold the lock of the parent's queue.
    let before = QUEUE.compare_and_swap(&queue, Some(Queue::new()));
    drop(before);
    QUEUE.load_full()
}

impl Queue {
    fn new() -> Arc<Queue> {
        Arc::new(Queue { state: Mutex::default(), home: Process::current() })
    }

    fn push(&self, record: Record) {
        let mappers = {
            let mut state = lock(&self.state);
            if state.ended {
                return print(&record);
            }
            if state.taken.records.len() >= LIMIT {
                state.taken.dropped += 1;
                return;
            }
            state.taken.records.push(record);
            if state.taken.records.len() > 1 {
                return;
            }
            state.mappers.clone()
        };
        mappers.iter().filter_map(Weak::upgrade).for_each(|device| device.wake_mapper());
    }
}

struct EngineLog;

impl Subscriber for EngineLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() <= LevelFilter::DEBUG
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::DEBUG)
    }

    fn event(&self, event: &Event<'_>) {
        let mut text = Text::default();
        event.record(&mut text);
        let record = Record {
            metadata: event.metadata(),
            text: text.line(),
            thread: std::thread::current().name().unwrap_or_default().to_owned(),
            time: SystemTime::now(),
        };
        match current() {
            Some(queue) => queue.push(record),
            None => print(&record),
        }
    }

    // Spans are not enabled.
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Values<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

fn print(record: &Record) {
    // If standard error is closed, the record is lost.
    let _written = writeln!(std::io::stderr(), "blkloom engine: {}", record.text);
}

/// Collects the message and the fields of an event.
#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let _never_fails = if field.name() == "message" {
            write!(self.message, "{value:?}")
        } else {
            let comma = if self.fields.is_empty() { "" } else { ", " };
            write!(self.fields, "{comma}{}={value:?}", field.name())
        };
    }
}

impl Text {
    fn line(self) -> String {
        if self.fields.is_empty() {
            printable(&self.message)
        } else {
            printable(&format!("{} ({})", self.message, self.fields))
        }
    }
}

/// Escapes unprintable characters as `blkloom.printing.printable` does.
fn printable(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for one in text.chars() {
        if matches!(one, '"' | '\'' | '\\') || one.escape_debug().len() == 1 {
            line.push(one);
        } else {
            let _never_fails = one.encode_utf8(&mut [0; 4]).bytes().try_for_each(|byte| write!(line, "\\x{byte:02x}"));
        }
    }
    line
}
