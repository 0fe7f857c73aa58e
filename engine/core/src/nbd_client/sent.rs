//! When requests of a connection were sent, oldest first; also some that are answered.

use std::collections::VecDeque;
use std::time::Instant;

use super::connection::MOST;

/// Most requests, twice as many as are in flight.
const LONGEST: usize = 2 * MOST;

#[derive(Default)]
pub(super) struct Sent(VecDeque<(Instant, u64)>);

impl Sent {
    /// Adds a request. in_flight: whether one with that cookie is not answered.
    pub fn add(&mut self, at: Instant, cookie: u64, in_flight: impl Fn(u64) -> bool) {
        if self.0.len() >= LONGEST {
            self.0.retain(|&(_, cookie)| in_flight(cookie));
        }
        self.0.push_back((at, cookie));
    }

    /// Forgets answered requests that are older than all others.
    pub fn forget(&mut self, in_flight: impl Fn(u64) -> bool) {
        while self.0.front().is_some_and(|&(_, cookie)| !in_flight(cookie)) {
            self.0.pop_front();
        }
    }

    pub fn oldest(&self) -> Option<Instant> {
        self.0.front().map(|&(at, _)| at)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn answered_requests_do_not_stay_however_many_there_are() {
        let (start, mut sent) = (Instant::now(), Sent::default());
        for number in 0..100_000 {
            sent.add(start + Duration::from_millis(number), number, |cookie| cookie == 5 || cookie == 99_999);
            assert!(sent.0.len() <= LONGEST);
        }
        sent.forget(|cookie| cookie == 5 || cookie == 99_999);
        assert_eq!(sent.oldest(), Some(start + Duration::from_millis(5)));
        sent.forget(|cookie| cookie == 99_999);
        assert_eq!(sent.oldest(), Some(start + Duration::from_millis(99_999)));
    }
}
