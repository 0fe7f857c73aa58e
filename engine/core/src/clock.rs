//! Durations: the longest timeout, and the age of a request.

use std::time::{Duration, Instant};

/// Longest timeout: ten years. `Instant` arithmetic with it does not overflow.
pub(crate) const LONGEST_TIMEOUT: Duration = Duration::from_secs(10 * 365 * 86400);

pub(crate) fn nanoseconds(since: Instant) -> u64 {
    since.elapsed().as_nanos() as u64
}
