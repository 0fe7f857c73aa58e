//! Durations: the longest timeout, and the age of a request; the monotonic clock.

use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// Longest timeout: ten years. `Instant` arithmetic with it does not overflow.
pub(crate) const LONGEST_TIMEOUT: Duration = Duration::from_secs(10 * 365 * 86400);

pub(crate) fn nanoseconds(since: Instant) -> u64 {
    since.elapsed().as_nanos() as u64
}

/// The monotonic clock in nanoseconds.
pub(crate) fn exact() -> i64 {
    read(ClockId::Monotonic)
}

/// The monotonic clock in nanoseconds at the last timer interrupt: cheaper to read, never later than `exact`.
pub(crate) fn coarse() -> i64 {
    read(ClockId::MonotonicCoarse)
}

fn read(clock: ClockId) -> i64 {
    let time = clock_gettime(clock);
    time.tv_sec * 1_000_000_000 + time.tv_nsec
}
