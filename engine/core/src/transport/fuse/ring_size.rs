//! Number and size of the entries of a FUSE file's ring, within `MEMORY` bytes in total.
//!
//! The kernel has one queue for each possible CPU of the machine, and each queue needs entries.

use blkloom_fuse_wire::Settings;
use rustix::param::page_size;

/// Most bytes of all entries of one file. This is address space; only used pages become memory.
const MEMORY: usize = 32 << 20;
/// Most entries per queue (and fewest, below). Further requests wait in the kernel.
const DEEPEST: usize = 32;
const SHALLOWEST: usize = 4;
/// Largest read or write in bytes.
const LARGEST: usize = 256 << 10;
const SMALLEST: usize = 8 << 10;

/// The settings for INIT.
pub fn settings() -> std::io::Result<Settings> {
    let (max_transfer, page_size) = (transfer(queues()?) as u32, page_size() as u32);
    Ok(Settings { over_ring: true, max_transfer, page_size, ..Settings::default() })
}

/// Number of possible CPUs of the machine.
pub(super) fn queues() -> std::io::Result<usize> {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/possible")?;
    parse(&text).ok_or_else(|| std::io::Error::other(format!("no list of CPUs: {text:?}")))
}

/// Number of CPUs in a list such as "0-3,8".
fn parse(list: &str) -> Option<usize> {
    let count = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        (last + 1).checked_sub(first)
    };
    list.trim().split(',').map(count).sum()
}

fn transfer(queues: usize) -> usize {
    let share = MEMORY / (queues * SHALLOWEST).max(1);
    let rounded = share.checked_ilog2().map_or(0, |exponent| 1 << exponent);
    rounded.clamp(SMALLEST, LARGEST)
}

/// Number of entries per queue.
pub(super) fn depth(queues: usize, payload: usize) -> usize {
    (MEMORY / (queues * payload).max(1)).clamp(SHALLOWEST, DEEPEST)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_list_of_cpus_is_counted() {
        assert_eq!(["0\n", "0-1\n", "0-3,8,10-11"].map(parse), [Some(1), Some(2), Some(7)]);
        assert_eq!(["", "a", "3-1"].map(parse), [None; 3]);
    }

    proptest! {
        #[test]
        fn the_entries_of_a_file_take_no_more_than_is_said(queues in 1usize..1025) {
            let payload = transfer(queues);
            prop_assert!(payload.is_power_of_two());
            prop_assert!(queues * depth(queues, payload) * payload <= MEMORY);
        }
    }

    #[test]
    fn a_small_machine_has_deep_queues_and_a_large_one_small_entries() {
        assert_eq!((transfer(2), depth(2, transfer(2))), (256 << 10, 32));
        assert_eq!((transfer(128), depth(128, transfer(128))), (64 << 10, 4));
    }
}
