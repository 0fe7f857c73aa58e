//! `Buffers`: all memory that a link over /dev/fuse has for messages and their data. It is allocated, and every page of
//! it is present, before the first message is received.
//!
//! A message is received into a buffer of the largest size, because its length is not known before. While its request is
//! in the queue, the message has the smallest free buffer that the data fits in. So any message can be received, and any
//! request can be queued, as long as one of the largest buffers is free. If none is, nothing is received until a request
//! ends, and the kernel keeps further messages.
//!
//! No request waits for a message that the kernel keeps then: requests are answered one by one, a suspended device is
//! resumed and a deferred request is retried by other ways, and the kernel waits for no reply to FORGET and RELEASE
//! (FLUSH and INTERRUPT it sends once: the answer is ENOSYS).

use blkloom_io::{Buffer, Errno};

use crate::request::OwnedBuffer;

/// The sizes of buffers, and how many requests in flight share one. Large requests need fewer of them to keep storage
/// busy.
const SIZES: [(usize, usize); 4] = [(4 << 10, 2), (16 << 10, 4), (64 << 10, 4), (256 << 10, 8)];
/// How many requests share one of the largest size.
const LARGEST_PART: usize = 32;
/// More requests in flight get no more buffers.
const DEEPEST: usize = 256;

/// The free buffers of one size.
struct Class {
    size: usize,
    free: Vec<OwnedBuffer>,
}

pub(super) struct Buffers {
    /// The smallest first.
    classes: Vec<Class>,
}

impl Buffers {
    /// Allocates buffers for about `depth` requests of up to `largest` bytes.
    pub fn new(largest: usize, depth: usize) -> Result<Buffers, Errno> {
        sizes(largest, depth).map(|(size, count)| Class::new(size, count)).collect::<Result<_, _>>().map(Buffers::of)
    }

    /// Allocates one buffer.
    pub fn one(largest: usize) -> Result<Buffers, Errno> {
        Class::new(largest, 1).map(|class| Buffers::of(vec![class]))
    }

    fn of(classes: Vec<Class>) -> Buffers {
        Buffers { classes }
    }

    fn largest(&self) -> Option<&Class> {
        self.classes.last()
    }

    /// Size of the largest buffers in bytes.
    pub fn largest_size(&self) -> usize {
        self.largest().map_or(0, |class| class.size)
    }

    /// Whether a message can be received.
    pub fn is_ready(&self) -> bool {
        self.largest().is_some_and(|class| !class.free.is_empty())
    }

    /// Takes a buffer of the largest size.
    pub fn take(&mut self) -> Option<OwnedBuffer> {
        self.classes.last_mut().and_then(|class| class.free.pop())
    }

    /// Exchanges a buffer for the smallest free one of at least `length` bytes. The first `used` bytes are copied.
    pub fn exchange(&mut self, buffer: OwnedBuffer, length: usize, used: usize) -> OwnedBuffer {
        let fits = |class: &&mut Class| class.size >= length && class.size < buffer.bytes().len();
        let Some(mut smaller) = self.classes.iter_mut().filter(fits).find_map(|class| class.free.pop()) else {
            return buffer;
        };
        if let Some(memory) = smaller.unshared() {
            memory.bytes_mut()[..used].copy_from_slice(&buffer.bytes()[..used]);
        }
        self.put(buffer);
        smaller
    }

    /// Returns a buffer.
    pub fn put(&mut self, mut buffer: OwnedBuffer) {
        let size = buffer.bytes().len();
        if buffer.unshared().is_none() {
            // A fault that has timed out still reads it, and may do so for ever. The only allocation after the first
            // message; there are no more of them than faults without an answer.
            buffer = OwnedBuffer::new(Buffer::new(size));
        }
        if let Some(class) = self.classes.iter_mut().find(|class| class.size == size) {
            class.free.push(buffer);
        }
    }
}

impl Class {
    fn new(size: usize, count: usize) -> Result<Class, Errno> {
        let free = (0..count).map(|_| Buffer::present(size).map(OwnedBuffer::new)).collect::<Result<_, _>>()?;
        Ok(Class { size, free })
    }
}

/// The sizes and how many buffers there are of each. One more of the largest is for the message that is received.
fn sizes(largest: usize, depth: usize) -> impl Iterator<Item = (usize, usize)> {
    let count = move |part: usize| (depth.min(DEEPEST) / part).max(1);
    let smaller = SIZES.into_iter().take_while(move |(size, _)| *size < largest);
    let last = SIZES.into_iter().find(|(size, _)| *size >= largest).map_or(LARGEST_PART, |(_, part)| part);
    smaller.map(move |(size, part)| (size, count(part))).chain([(largest, count(last) + 1)])
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn free(buffers: &Buffers) -> usize {
        buffers.classes.iter().map(|class| class.free.len()).sum()
    }

    #[test]
    fn a_file_of_usual_settings_has_23_mib() {
        let all: Vec<_> = sizes(1 << 20, 256).collect();
        assert_eq!(all, [(4096, 128), (16 << 10, 64), (64 << 10, 64), (256 << 10, 32), (1 << 20, 9)]);
        assert_eq!(all.iter().map(|(size, count)| size * count).sum::<usize>(), (22 << 20) + (512 << 10));
    }

    proptest! {
        #[test]
        fn the_buffers_of_a_file_take_no_more_than_is_said(pages in 2usize..257, depth in 1usize..65536) {
            let all: Vec<_> = sizes(pages * 4096, depth).collect();
            prop_assert!(all.iter().map(|(size, count)| size * count).sum::<usize>() <= 23 << 20);
            prop_assert!(all.is_sorted());
            prop_assert!(all.last().is_some_and(|&(size, count)| size == pages * 4096 && count > 1));
        }

        /// Whatever requests of the queue have, all buffers come back, and data is copied with its message.
        #[test]
        fn buffers_are_exchanged_and_returned(lengths in prop::collection::vec((1usize..40_000, any::<u8>()), 1..40)) {
            const LARGEST: usize = 40_000;
            let mut buffers = Buffers::new(LARGEST, 8).unwrap();
            let all = free(&buffers);
            let mut queued: Vec<(OwnedBuffer, usize, u8)> = Vec::new();
            for (length, byte) in lengths {
                let Some(mut buffer) = buffers.take() else {
                    prop_assert!(!buffers.is_ready());
                    queued.drain(..).for_each(|(buffer, ..)| buffers.put(buffer));
                    prop_assert_eq!(free(&buffers), all);
                    continue;
                };
                buffer.unshared().unwrap().bytes_mut()[..length].fill(byte);
                let before = free(&buffers);
                let buffer = buffers.exchange(buffer, length, length);
                prop_assert!(buffer.bytes()[..length].iter().all(|&found| found == byte));
                prop_assert_eq!(free(&buffers), before, "one for one");
                queued.push((buffer, length, byte));
            }
            for (buffer, length, byte) in queued {
                prop_assert!(buffer.bytes()[..length].iter().all(|&found| found == byte), "others do not write to it");
                buffers.put(buffer);
            }
            prop_assert_eq!(free(&buffers), all);
        }
    }

    #[test]
    fn a_buffer_that_a_fault_keeps_is_replaced() {
        let mut buffers = Buffers::one(4096).unwrap();
        let buffer = buffers.take().unwrap();
        let shared = buffer.share();
        buffers.put(buffer);
        let mut next = buffers.take().unwrap();
        next.unshared().unwrap().bytes_mut().fill(1);
        assert_eq!(shared.bytes(), [0; 4096]);
    }
}
