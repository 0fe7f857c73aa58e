//! Flags of an operation, metadata contexts, and block status results.

use std::sync::Arc;

/// Flags of a request. Flags that do not apply to the operation are ignored.
#[derive(Clone, Copy, Default, Debug)]
pub struct Flags {
    /// Force unit access: durable before the request completes.
    pub fua: bool,
    /// Write zeroes may deallocate blocks.
    pub unmap: bool,
    /// Write zeroes fails with EOPNOTSUPP rather than write zeros.
    pub fast: bool,
    /// Block status may return only the first extent.
    pub one: bool,
    /// Pass the gate of a suspended device (the flush at the end of its suspend).
    pub through_gate: bool,
}

/// The metadata context of a block status request: a name that targets answer, or None for `base:allocation`, which the
/// engine answers.
pub type Context = Option<Arc<str>>;

/// Converts the name of a metadata context.
pub fn context(name: &str) -> Context {
    (name != "base:allocation").then(|| name.into())
}

/// A run of bytes with one status. flags: 1 hole, 2 zero (as in NBD's base:allocation), or those of the metadata
/// context.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Found {
    pub offset: u64,
    pub len: u64,
    pub flags: u32,
}
