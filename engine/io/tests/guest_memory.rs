//! Memory of other programs: what is refused, and what addresses lead to.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use blkloom_io::{GuestMemory, GuestMemoryError, GuestRegion, SharedMemory, Sharer};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

const PAGE: u64 = 4096;

fn memfd(pages: u64) -> OwnedFd {
    let file = memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&file, pages * PAGE).unwrap();
    file
}

fn sealed(pages: u64) -> OwnedFd {
    let file = memfd(pages);
    fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
    file
}

fn region(file: BorrowedFd<'_>, offset: u64, size: u64, guest: u64, user: u64) -> GuestRegion<'_> {
    GuestRegion { file, offset, size, guest, user }
}

#[test]
fn memory_that_can_raise_sigbus_is_refused() {
    let (open, sealed, file) = (memfd(1), sealed(2), std::fs::File::open("/dev/null").unwrap());
    let refused =
        |file: BorrowedFd<'_>, offset, size| SharedMemory::new(file, offset, size, Sharer::Other).err().unwrap();
    assert!(matches!(refused(open.as_fd(), 0, PAGE), GuestMemoryError::NotSealed));
    assert!(matches!(refused(file.as_fd(), 0, PAGE), GuestMemoryError::NotSealed));
    for (offset, size) in [(0, 2 * PAGE + 1), (PAGE, PAGE + 1), (PAGE, u64::MAX), (3 * PAGE, 1)] {
        assert!(matches!(refused(sealed.as_fd(), offset, size), GuestMemoryError::TooSmall { .. }));
    }
    assert!(matches!(refused(sealed.as_fd(), 0, 0), GuestMemoryError::Range { .. }));
    assert!(matches!(refused(sealed.as_fd(), 17, 1), GuestMemoryError::Os("mmap", _)));
    assert_eq!(SharedMemory::new(sealed.as_fd(), PAGE, 100, Sharer::Other).unwrap().slice().len(), 100);
}

#[test]
fn a_program_that_may_end_this_one_may_share_any_file_within_its_size() {
    let file = memfd(1);
    assert_eq!(SharedMemory::new(file.as_fd(), 0, PAGE, Sharer::MayEndThis).unwrap().slice().len(), PAGE as usize);
    let refused = SharedMemory::new(file.as_fd(), 0, PAGE + 1, Sharer::MayEndThis).err().unwrap();
    assert!(matches!(refused, GuestMemoryError::TooSmall { .. }));
}

#[test]
fn regions_with_the_same_or_too_high_addresses_are_refused() {
    let file = sealed(2);
    let file = file.as_fd();
    let refused = |regions: &[GuestRegion<'_>]| GuestMemory::new(regions.iter().copied(), Sharer::Other).err().unwrap();
    let overlapping = [region(file, 0, 2 * PAGE, PAGE, 0), region(file, 0, PAGE, 2 * PAGE, 0)];
    assert!(matches!(refused(&overlapping), GuestMemoryError::Overlap(address) if address == 2 * PAGE));
    for (guest, user) in [(u64::MAX - 5, 0), (0, u64::MAX - 5)] {
        assert!(matches!(refused(&[region(file, 0, PAGE, guest, user)]), GuestMemoryError::Range { .. }));
    }
}

#[test]
fn addresses_lead_to_the_bytes_of_their_region() {
    let (low, high) = (sealed(2), sealed(1));
    // Adjacent for the guest, and not in the other program.
    let regions =
        [region(high.as_fd(), 0, PAGE, 3 * PAGE, 1 << 40), region(low.as_fd(), PAGE, PAGE, 2 * PAGE, 1 << 20)];
    let memory = GuestMemory::new(regions, Sharer::Other).unwrap();
    rustix::io::pwrite(&low, b"low", 2 * PAGE - 3).unwrap();
    rustix::io::pwrite(&high, b"high", 0).unwrap();
    let mut found = [0; 7];
    assert!(memory.read(3 * PAGE - 3, &mut found));
    assert_eq!(&found, b"lowhigh");
    assert_eq!(memory.guest(3 * PAGE - 3, 7).unwrap().len(), 3);
    assert!(!memory.read(4 * PAGE - 3, &mut found) && !memory.read(PAGE, &mut found));
    assert!(!memory.read(u64::MAX - 3, &mut found));
    assert!(memory.guest(4 * PAGE, 1).is_none() && memory.guest(0, 1).is_none());
    assert_eq!(memory.user((1 << 40) + 1, 3).unwrap().to_vec(), b"igh");
    assert!(memory.user((1 << 20) + PAGE - 3, 4).is_none() && memory.user((1 << 20) - 1, 4).is_none());
}

#[test]
fn numbers_are_shared_with_other_mappings() {
    let file = sealed(1);
    let [one, other] = [0, 0].map(|offset| SharedMemory::new(file.as_fd(), offset, PAGE, Sharer::Other).unwrap());
    one.slice().store_u16(6, 0x1234);
    assert_eq!((other.slice().load_u16(6), other.slice().part(6, 2).to_vec()), (0x1234, vec![0x34, 0x12]));
}
