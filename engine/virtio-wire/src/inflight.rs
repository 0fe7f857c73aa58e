//! The requests in flight of a split virtqueue, in memory that outlives the device's process (vhost-user's
//! INFLIGHT_SHMFD): places in the region of a queue, and what follows from its contents after such a death.
//!
//! Each descriptor has an entry. A head that is taken from the available ring gets a counter and is then marked. Used
//! heads are linked into the last batch, the used index is advanced, the marks of the batch are removed, and then the
//! used index is noted here. If the used index of the ring is another one, the process died before the marks were
//! removed. Numbers are little-endian, as on every host that vhost-user is used on.

use crate::split::Malformed;

const HEADER_SIZE: usize = 16;
pub const ENTRY_SIZE: usize = 16;
/// Alignment of the regions of several queues.
const ALIGNMENT: usize = 64;
/// Value of the version of a region that is used.
pub const USED: u16 = 1;

/// Offsets in a region.
pub const VERSION: usize = 8;
pub const COUNT: usize = 10;
pub const LAST_BATCH: usize = 12;
pub const USED_INDEX: usize = 14;

/// Length of the region of a queue with `size` descriptors.
pub const fn region_length(size: u16) -> usize {
    (HEADER_SIZE + ENTRY_SIZE * size as usize).next_multiple_of(ALIGNMENT)
}

/// Offset of the mark of a head: one byte, 1 for in flight.
pub const fn mark_offset(head: u16) -> usize {
    HEADER_SIZE + ENTRY_SIZE * head as usize
}

/// Offset of the link of a head to the one before it in the last batch: 2 bytes.
pub const fn link_offset(head: u16) -> usize {
    mark_offset(head) + 6
}

/// Offset of the counter of a head: 8 bytes.
pub const fn counter_offset(head: u16) -> usize {
    mark_offset(head) + 8
}

/// What another process has left in a region.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Left {
    /// Heads whose marks must be removed: they are used.
    pub used: Vec<u16>,
    /// Heads to serve again, in the order in which they were taken.
    pub unanswered: Vec<u16>,
    /// The next counter.
    pub counter: u64,
}

/// Reads a copy of a region. index: of the used ring. None: the region was never used.
pub fn left(region: &[u8], size: u16, index: u16) -> Result<Option<Left>, Malformed> {
    let half = |at: usize| u16::from_le_bytes([region[at], region[at + 1]]);
    assert!(region.len() >= HEADER_SIZE + ENTRY_SIZE * usize::from(size), "the caller copies all entries");
    if half(VERSION) == 0 {
        return Ok(None);
    }
    if (half(VERSION), half(COUNT)) != (USED, size) {
        return Err(Malformed::Inflight(half(COUNT)));
    }
    let batch = index.wrapping_sub(half(USED_INDEX));
    if batch > size {
        return Err(Malformed::Inflight(half(USED_INDEX)));
    }
    let (mut used, mut head) = (Vec::new(), half(LAST_BATCH));
    for _ in 0..batch {
        if head >= size || used.contains(&head) {
            return Err(Malformed::Inflight(head));
        }
        used.push(head);
        head = half(link_offset(head));
    }
    let counter = |head: u16| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&region[counter_offset(head)..][..8]);
        u64::from_le_bytes(bytes)
    };
    let mut unanswered: Vec<u16> =
        (0..size).filter(|&head| region[mark_offset(head)] != 0 && !used.contains(&head)).collect();
    unanswered.sort_by_key(|&head| counter(head));
    let counter = unanswered.last().map_or(0, |&head| counter(head).wrapping_add(1));
    Ok(Some(Left { used, unanswered, counter }))
}
