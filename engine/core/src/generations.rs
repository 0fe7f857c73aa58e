//! `Generations`: counts the requests in flight of an export in two generations, so that requests which last long are
//! found without a clock in each request.
//!
//! A request belongs to the current generation when it begins. `turn` tells how many requests of the older generation
//! are left; when there are none, the current generation becomes the older one. So a request of the older generation
//! began before the last such turn. Any thread may call; each update is one atomic operation.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::device::Export;

#[derive(Default)]
pub struct Generations {
    current: AtomicUsize,
    counts: [AtomicU64; 2],
}

impl Generations {
    fn begin(&self) -> usize {
        // A turn in between makes the request older than it is, which is the safe side.
        let generation = self.current.load(Ordering::SeqCst);
        self.counts[generation].fetch_add(1, Ordering::SeqCst);
        generation
    }

    fn end(&self, generation: usize) {
        self.counts[generation].fetch_sub(1, Ordering::SeqCst);
    }

    /// Number of requests of the older generation that are still in flight. If it is 0, the current generation becomes
    /// the older one. One thread at a time.
    pub fn turn(&self) -> u64 {
        let older = self.current.load(Ordering::SeqCst) ^ 1;
        let left = self.counts[older].load(Ordering::SeqCst);
        if left == 0 {
            self.current.store(older, Ordering::SeqCst);
        }
        left
    }
}

/// One request in flight, counted until this is dropped.
pub struct InFlight {
    export: Arc<Export>,
    generation: usize,
}

impl InFlight {
    pub fn new(export: Arc<Export>) -> InFlight {
        let generation = export.generations.begin();
        InFlight { export, generation }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.export.generations.end(self.generation);
    }
}

#[cfg(test)]
mod tests {
    use super::Generations;

    #[test]
    fn a_request_becomes_old_at_a_turn_and_is_told_of_until_it_ends() {
        let generations = Generations::default();
        let first = generations.begin();
        assert_eq!(generations.turn(), 0);
        let second = generations.begin();
        assert_eq!((generations.turn(), generations.turn()), (1, 1));
        generations.end(first);
        assert_eq!(generations.turn(), 0);
        assert_eq!(generations.turn(), 1, "the second one is old now");
        generations.end(second);
        assert_eq!((generations.turn(), generations.turn()), (0, 0));
    }
}
