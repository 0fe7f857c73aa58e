//! Wakeups of waiting tasks in an event loop's queue: task ids and messages.

/// Identifies a task of a queue. A slot that is used again has another generation.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct TaskId {
    pub slot: usize,
    pub generation: u32,
}

/// A wakeup of a task that waits at a gate, is deferred by its target, or waits for an instant.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wake {
    /// The gate has opened, or its device has closed.
    GateOpened(TaskId),
    /// The task's range is walked again.
    Released(TaskId),
    /// A deferred task fails. A task that waits for an instant continues.
    Refused(TaskId),
}
