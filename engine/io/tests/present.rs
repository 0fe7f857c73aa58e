//! Memory whose pages are present before it is used.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::os::unix::fs::FileExt;

use blkloom_io::{Buffer, CommandRing};
use rustix::fs::{MemfdFlags, memfd_create};

const PAGE: usize = 4096;

/// Whether all pages of these bytes are in memory or in swap. Accesses none of them.
fn is_present(bytes: &[u8]) -> bool {
    let pages = std::fs::File::open("/proc/self/pagemap").unwrap();
    let (first, last) = (bytes.as_ptr() as usize / PAGE, (bytes.as_ptr() as usize + bytes.len() - 1) / PAGE);
    (first..=last).all(|page| {
        let mut entry = [0; 8];
        pages.read_exact_at(&mut entry, page as u64 * 8).unwrap();
        u64::from_ne_bytes(entry) >> 62 != 0
    })
}

#[test]
fn a_buffer_has_all_its_pages() {
    assert!(is_present(Buffer::present(3 << 20).unwrap().bytes()));
}

#[test]
fn the_entries_of_a_ring_have_all_their_pages() {
    const ENTRIES: usize = 3;
    let file = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
    let ring = match CommandRing::new(&file, ENTRIES, 288, 5000) {
        Ok(ring) => ring,
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            eprintln!("SKIPPED: io_uring is not permitted: {error}");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    for entry in 0..ENTRIES {
        assert!(is_present(ring.head(entry)) && is_present(ring.payload(entry)), "{entry}");
    }
}
