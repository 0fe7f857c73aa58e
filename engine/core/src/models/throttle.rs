//! The bucket of a throttle: threads that take from it together.

use std::sync::Arc;

use loom::thread;

use super::explore;
use crate::filter::Bucket;

const SECOND: i64 = 1_000_000_000;

#[test]
fn what_two_threads_take_together_is_counted_twice() {
    explore("throttle: two threads fill and take", || {
        let bucket = Arc::new(Bucket::default());
        bucket.begin(1, SECOND, 0);
        let taking = [10, 20].map(|seconds| {
            let bucket = bucket.clone();
            thread::spawn(move || {
                bucket.fill(seconds * SECOND);
                bucket.take(1)
            })
        });
        let mut begun = taking.map(|thread| thread.join().unwrap());
        begun.sort_unstable();
        assert!(begun[1] >= begun[0] + SECOND, "both begin at {begun:?}");
        assert!(bucket.taken() >= 20 * SECOND, "the later one is counted");
        assert_eq!(bucket.taken(), begun[1] + SECOND, "what was taken last ends last");
    });
}
