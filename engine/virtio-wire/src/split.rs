//! Split virtqueues: sizes and offsets of their three areas, arithmetic of indices, and chains of descriptors.

use crate::Memory;

/// Largest queue that is served.
pub const LARGEST: u16 = 1024;
/// Most pieces of a chain: data in as many as a queue has descriptors, and the header and status of a request.
pub const MOST_PIECES: usize = LARGEST as usize + 2;

pub const DESCRIPTOR_SIZE: usize = 16;
/// Alignment of the areas: descriptors, available ring, used ring.
pub const ALIGNMENTS: [u64; 3] = [16, 2, 4];

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Flag of the available ring: the driver wants no notification of used buffers (without event indices).
pub const NO_INTERRUPT: u16 = 1;
/// Flag of the used ring: the device wants no notification of available buffers (without event indices).
pub const NO_NOTIFY: u16 = 1;

/// Offsets in both rings.
pub const FLAGS: usize = 0;
pub const INDEX: usize = 2;

pub const fn descriptors_length(size: u16) -> usize {
    DESCRIPTOR_SIZE * size as usize
}

pub const fn available_length(size: u16) -> usize {
    used_event_offset(size) + 2
}

pub const fn used_length(size: u16) -> usize {
    available_event_offset(size) + 2
}

/// Offset in the available ring of the entry with this index.
pub const fn available_offset(index: u16, size: u16) -> usize {
    4 + 2 * (index % size) as usize
}

/// Offset in the used ring of the element with this index.
pub const fn used_offset(index: u16, size: u16) -> usize {
    4 + USED_SIZE * (index % size) as usize
}

/// Offset in the available ring of the used index at which the driver wants a notification.
pub const fn used_event_offset(size: u16) -> usize {
    4 + 2 * size as usize
}

/// Offset in the used ring of the available index at which the device wants a notification.
pub const fn available_event_offset(size: u16) -> usize {
    4 + USED_SIZE * size as usize
}

pub const USED_SIZE: usize = 8;

/// An element of the used ring. written: number of bytes of the chain that the device has written.
pub fn used(head: u16, written: u32) -> [u8; USED_SIZE] {
    let mut bytes = [0; USED_SIZE];
    bytes[..4].copy_from_slice(&u32::from(head).to_le_bytes());
    bytes[4..].copy_from_slice(&written.to_le_bytes());
    bytes
}

/// Number of available chains that were not taken. available: the driver's index. next: the device's.
pub fn pending(available: u16, next: u16, size: u16) -> Result<u16, Malformed> {
    let pending = available.wrapping_sub(next);
    if pending > size { Err(Malformed::Index { available, next, size }) } else { Ok(pending) }
}

/// Whether to notify the other side, which wants that when the index passes `event`; the index was `old` at the last
/// notification.
pub fn must_notify(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// How a driver has broken the rules for rings and chains. The queue cannot be served any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Malformed {
    #[error("the available index {available} is not within {size} of {next}")]
    Index { available: u16, next: u16, size: u16 },
    #[error("descriptor {index} of a table of {size}")]
    Descriptor { index: u16, size: u16 },
    #[error("a chain of descriptors that is a circle, or has more than {MOST_PIECES}")]
    Long,
    #[error("a buffer of {length} bytes at {address:#x}")]
    Buffer { address: u64, length: u32 },
    #[error("an indirect table of {length} bytes at {address:#x}")]
    Table { address: u64, length: u32 },
    #[error("an indirect table that is in another one, is followed by a descriptor, or was not negotiated")]
    Indirect,
    #[error("a buffer to read behind one to write")]
    Order,
    #[error("no {0}")]
    Missing(&'static str),
    #[error("the entry {0} of the requests in flight")]
    Inflight(u16),
}

/// A contiguous buffer of the driver. The address and the length do not overflow together; whether it is memory of the
/// driver is not known.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    pub address: u64,
    pub length: u32,
}

/// The buffers of a chain: first those that the device reads, then those that it writes.
#[derive(Default, Debug)]
pub struct Chain {
    pub pieces: Vec<Piece>,
    /// Number of pieces that the device reads.
    pub readable: usize,
}

struct Descriptor {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn parse(bytes: [u8; DESCRIPTOR_SIZE]) -> Descriptor {
        let whole = u128::from_le_bytes(bytes);
        Descriptor {
            address: whole as u64,
            length: (whole >> 64) as u32,
            flags: (whole >> 96) as u16,
            next: (whole >> 112) as u16,
        }
    }
}

impl Chain {
    /// Replaces the contents by the chain that begins at `head` of a table of `size` descriptors. table: copies one of
    /// them, whose index is below `size`. indirect: indirect tables were negotiated.
    pub fn collect(
        &mut self,
        head: u16,
        (size, indirect): (u16, bool),
        table: impl Fn(u16) -> [u8; DESCRIPTOR_SIZE],
        memory: &impl Memory,
    ) -> Result<(), Malformed> {
        self.pieces.clear();
        self.readable = 0;
        let mut next = Some(head);
        for _ in 0..size {
            let Some(index) = next else { return Ok(()) };
            if index >= size {
                return Err(Malformed::Descriptor { index, size });
            }
            let descriptor = Descriptor::parse(table(index));
            next = (descriptor.flags & NEXT != 0).then_some(descriptor.next);
            if descriptor.flags & INDIRECT == 0 {
                self.add(&descriptor)?;
            } else if next.is_some() || !indirect {
                return Err(Malformed::Indirect);
            } else {
                self.collect_indirect(&descriptor, memory)?;
            }
        }
        if next.is_some() { Err(Malformed::Long) } else { Ok(()) }
    }

    fn collect_indirect(&mut self, table: &Descriptor, memory: &impl Memory) -> Result<(), Malformed> {
        let &Descriptor { address, length, .. } = table;
        let refused = Malformed::Table { address, length };
        let count = length / DESCRIPTOR_SIZE as u32;
        if count == 0 || length % DESCRIPTOR_SIZE as u32 != 0 || address.checked_add(length.into()).is_none() {
            return Err(refused);
        }
        let size = u16::try_from(count).ok().filter(|&count| count as usize <= MOST_PIECES).ok_or(refused)?;
        let mut next = Some(0);
        for _ in 0..size {
            let Some(index) = next else { return Ok(()) };
            if index >= size {
                return Err(Malformed::Descriptor { index, size });
            }
            let mut bytes = [0; DESCRIPTOR_SIZE];
            if !memory.read(address + u64::from(index) * DESCRIPTOR_SIZE as u64, &mut bytes) {
                return Err(refused);
            }
            let descriptor = Descriptor::parse(bytes);
            if descriptor.flags & INDIRECT != 0 {
                return Err(Malformed::Indirect);
            }
            next = (descriptor.flags & NEXT != 0).then_some(descriptor.next);
            self.add(&descriptor)?;
        }
        if next.is_some() { Err(Malformed::Long) } else { Ok(()) }
    }

    fn add(&mut self, &Descriptor { address, length, flags, .. }: &Descriptor) -> Result<(), Malformed> {
        if length == 0 || address.checked_add(length.into()).is_none() {
            return Err(Malformed::Buffer { address, length });
        }
        if self.pieces.len() == MOST_PIECES {
            return Err(Malformed::Long);
        }
        if flags & WRITE == 0 {
            if self.pieces.len() > self.readable {
                return Err(Malformed::Order);
            }
            self.readable += 1;
        }
        self.pieces.push(Piece { address, length });
        Ok(())
    }
}

/// Number of bytes in pieces.
pub fn length(pieces: &[Piece]) -> u64 {
    pieces.iter().map(|piece| u64::from(piece.length)).sum()
}

/// Copies the first bytes of pieces. False: there are fewer, or they are not memory of the driver.
pub fn gather(pieces: &[Piece], memory: &impl Memory, into: &mut [u8]) -> bool {
    let mut done = 0;
    for piece in pieces {
        let part = (into.len() - done).min(piece.length as usize);
        if part > 0 && !memory.read(piece.address, &mut into[done..done + part]) {
            return false;
        }
        done += part;
    }
    done == into.len()
}
