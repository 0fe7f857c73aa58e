//! Search for data or a hole in the extents of a range, for SEEK_DATA and SEEK_HOLE. No I/O.

use blkloom_fuse_wire::Whence;

use crate::operation::Found;

/// The bit of `Found::flags` for extents that read as zeros.
const ZERO: u32 = 2;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Sought {
    At(u64),
    /// Not found before this offset.
    NotBefore(u64),
}

/// Searches the extents of `start..end`, which are in order. A range without an extent counts as data. The extents may
/// end before `end`; the caller continues the search there.
pub(super) fn look(found: &[Found], start: u64, end: u64, whence: Whence) -> Sought {
    let mut at = start;
    for &Found { offset, len, flags } in found {
        if offset > at {
            if whence == Whence::Data {
                return Sought::At(at);
            }
            at = offset;
        }
        let stop = offset.saturating_add(len);
        if at >= end || stop <= at {
            continue;
        }
        if (flags & ZERO != 0) == (whence == Whence::Hole) {
            return Sought::At(at);
        }
        at = stop;
    }
    match whence {
        Whence::Data if at == start && at < end => Sought::At(at),
        Whence::Hole if at == start => Sought::NotBefore(end),
        _ => Sought::NotBefore(at.min(end)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The model: looks at every byte.
    fn model(found: &[Found], start: u64, end: u64, whence: Whence) -> Option<u64> {
        let hole = |byte: u64| {
            found.iter().any(|run| run.offset <= byte && byte < run.offset + run.len && run.flags & ZERO != 0)
        };
        (start..end).find(|&byte| hole(byte) == (whence == Whence::Hole))
    }

    proptest! {
        #[test]
        fn what_is_found_is_what_a_walk_of_every_byte_finds(
            start in 0u64..20,
            runs in prop::collection::vec((0u64..3, 1u64..6, 0u32..4), 0..8),
            hole: bool,
        ) {
            let (mut at, mut found) = (start, Vec::new());
            for (gap, len, flags) in runs {
                found.push(Found { offset: at + gap, len, flags });
                at += gap + len;
            }
            let whence = if hole { Whence::Hole } else { Whence::Data };
            let expected = model(&found, start, at, whence).map_or(Sought::NotBefore(at), Sought::At);
            prop_assert_eq!(look(&found, start, at, whence), expected);
        }

        #[test]
        fn a_search_that_was_cut_short_goes_on_where_it_ended(start in 0u64..20, len in 1u64..6, hole: bool) {
            let found = [Found { offset: start, len, flags: if hole { 0 } else { 3 } }];
            let whence = if hole { Whence::Hole } else { Whence::Data };
            prop_assert_eq!(look(&found, start, 100, whence), Sought::NotBefore(start + len));
        }
    }

    #[test]
    fn where_nothing_is_known_there_is_data() {
        assert_eq!(look(&[], 5, 9, Whence::Data), Sought::At(5));
        assert_eq!(look(&[], 5, 9, Whence::Hole), Sought::NotBefore(9));
    }
}
