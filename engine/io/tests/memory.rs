//! Slices, buffers and their pool, and range locks.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use blkloom_io::{Buffer, BufferPool, RangeGuard, RangeLock, Slice, Source};
use proptest::prelude::*;

#[test]
fn a_slice_of_a_slice_stays_inside() {
    let mut bytes = [1, 2, 3, 4, 5, 6];
    let slice = Slice::from(&mut bytes[..]);
    slice.part(1, 4).part(1, 2).copy_from([8, 9][..].into());
    assert_eq!(slice.to_vec(), [1, 2, 8, 9, 5, 6]);
    slice.part(5, 1).zero();
    slice.part(6, 0).zero();
    assert_eq!(slice.to_vec(), [1, 2, 8, 9, 5, 0]);
    assert!(Slice::empty().is_empty() && Slice::empty().to_vec().is_empty());
    for (at, len) in [(0, 7), (6, 1), (7, 0), (1, usize::MAX)] {
        assert!(std::panic::catch_unwind(|| slice.part(at, len)).is_err(), "{at}+{len}");
        assert!(std::panic::catch_unwind(|| slice.source().part(at, len)).is_err(), "{at}+{len}");
    }
    assert_eq!(bytes, [1, 2, 8, 9, 5, 0], "and is the memory it was made of");
}

#[test]
fn a_copy_may_overlap_itself() {
    let mut bytes = [1, 2, 3, 4, 5, 6];
    let slice = Slice::from(&mut bytes[..]);
    slice.part(2, 4).copy_from(slice.part(0, 4).source());
    slice.part(0, 2).copy_from(slice.part(1, 2).into());
    assert_eq!(bytes, [2, 1, 1, 2, 3, 4]);
}

#[test]
fn what_a_slice_of_a_buffer_writes_is_in_the_buffer() {
    let mut buffer = Buffer::new(5000);
    buffer.bytes_mut().fill(1);
    let slice = buffer.slice();
    slice.part(10, 4000).zero();
    slice.part(4090, 10).copy_from(Source::from(&[7; 10][..]));
    assert_eq!(Source::from(buffer.bytes()).part(4088, 14).to_vec(), [[1; 2].as_slice(), &[7; 10], &[1; 2]].concat());
    assert!(buffer.bytes()[10..4010].iter().all(|&byte| byte == 0));
    // As an I/O has it: past any borrow, until the buffer is looked at again.
    // SAFETY: the buffer is there and not borrowed until the last use of the slice.
    let promised: Slice<'static> = unsafe { Slice::new(buffer.as_ptr(), buffer.len()) };
    let moved = buffer;
    promised.part(0, 2).copy_from([3, 4][..].into());
    assert_eq!(moved.bytes()[..3], [3, 4, 1], "a buffer that moves stays where it is");
}

#[test]
fn buffers_are_aligned_for_direct_io_and_begin_as_zeros() {
    for len in [0, 1, 4095, 4096, 4097, many(1 << 20)] {
        let buffer = Buffer::new(len);
        assert_eq!((buffer.len(), buffer.is_empty()), (len, len == 0));
        assert!(buffer.bytes().iter().all(|&byte| byte == 0));
        assert!((buffer.bytes().as_ptr() as usize).is_multiple_of(4096));
    }
}

/// So many; an eighth under Miri, which takes a hundred times as long.
const fn many(count: usize) -> usize {
    if cfg!(miri) { count.div_ceil(8) } else { count }
}

proptest! {
    /// For any sequence of `take` and `put`: lengths are as requested, no two live buffers share memory, and the pool
    /// keeps its limit.
    #[test]
    fn a_pool_lends_each_buffer_once(
        acts in prop::collection::vec((any::<bool>(), 1..many(40_000), any::<u8>()), 1..=many(99)),
        limit in 0..many(200_000),
    ) {
        let mut pool = BufferPool::new(limit);
        let mut live: Vec<(Buffer, u8)> = Vec::new();
        for (take, len, byte) in acts {
            if take || live.is_empty() {
                let mut buffer = pool.take(len);
                prop_assert_eq!(buffer.len(), len);
                prop_assert!((buffer.bytes().as_ptr() as usize).is_multiple_of(4096));
                buffer.bytes_mut().fill(byte);
                live.push((buffer, byte));
            } else {
                let (buffer, _) = live.swap_remove(len % live.len());
                pool.put(buffer);
            }
            for (buffer, byte) in &live {
                prop_assert!(buffer.bytes().iter().all(|found| found == byte));
            }
        }
    }

    /// `try_lock` grants exactly what the definition allows: sharers overlap, nothing overlaps an
    /// exclusive range, and a released range is free again.
    #[test]
    fn a_range_lock_grants_what_does_not_conflict(
        acts in prop::collection::vec((any::<bool>(), 0u64..30, 1u64..10, any::<bool>()), 1..=many(59)),
    ) {
        let lock = Arc::new(RangeLock::default());
        let mut held: Vec<(u64, u64, bool, RangeGuard)> = Vec::new();
        for (release, start, len, exclusive) in acts {
            if release && !held.is_empty() {
                let at = start as usize % held.len();
                drop(held.swap_remove(at));
                continue;
            }
            let end = start + len;
            let free = held.iter().all(|&(s, e, x, _)| end <= s || e <= start || !x && !exclusive);
            match lock.try_lock(start, end, exclusive) {
                Some(guard) => {
                    prop_assert!(free, "{start}..{end} conflicts");
                    held.push((start, end, exclusive, guard));
                }
                None => prop_assert!(!free, "{start}..{end} is free"),
            }
        }
        held.clear();
        prop_assert!(lock.try_lock(0, u64::MAX, true).is_some(), "everything was released");
    }
}

#[test]
fn waiting_lockers_exclude_each_other_and_all_get_their_turn() {
    const CELLS: usize = 16;
    let lock = Arc::new(RangeLock::default());
    // Sharers add one, exclusive holders subtract 1000: any other sum is an overlap.
    let cells: Arc<Vec<AtomicI64>> = Arc::new((0..CELLS).map(|_| AtomicI64::new(0)).collect());
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let (lock, cells) = (lock.clone(), cells.clone());
            scope.spawn(move || {
                let mut seed = thread + 1;
                for _ in 0..if cfg!(miri) { 20 } else { 5000 } {
                    seed ^= seed << 13;
                    seed ^= seed >> 7;
                    seed ^= seed << 17;
                    let start = seed as usize % CELLS;
                    let end = (start + 1 + (seed >> 8) as usize % 4).min(CELLS);
                    let exclusive = seed >> 16 & 1 == 1;
                    let _guard = lock.lock(start as u64, end as u64, exclusive);
                    let step = if exclusive { -1000 } else { 1 };
                    for cell in &cells[start..end] {
                        let before = cell.fetch_add(step, Ordering::SeqCst);
                        assert!(if exclusive { before == 0 } else { before >= 0 }, "{before} with {exclusive}");
                    }
                    for cell in &cells[start..end] {
                        cell.fetch_sub(step, Ordering::SeqCst);
                    }
                }
            });
        }
    });
}
