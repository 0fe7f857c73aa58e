//! Files against a vector of bytes: buffered and direct, whole and sparse, alone and from several
//! threads. Direct I/O needs a file system that knows O_DIRECT under the temporary directory (set
//! TMPDIR to one); where there is none, those tests say so and pass.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};

use blkloom_io::{Buffer, File, FileError, Inline, InlinePolicy, Slice, Stretch, Syncing};
use proptest::prelude::*;

const EIO: i32 = 5;
const EOPNOTSUPP: i32 = 95;
const O_DIRECT: i32 = rustix::fs::OFlags::DIRECT.bits() as i32;

/// A file of its own, gone when dropped; `handle` changes it behind the engine's back.
struct Temporary {
    path: PathBuf,
    handle: std::fs::File,
}

impl Temporary {
    fn new(size: u64) -> Temporary {
        Self::within(std::env::temp_dir(), size)
    }

    fn within(directory: PathBuf, size: u64) -> Temporary {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = directory.join(format!("blkloom-file-{}-{number}", std::process::id()));
        let handle = std::fs::File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        handle.set_len(size).unwrap();
        Temporary { path, handle }
    }

    fn open(&self, flags: i32) -> std::io::Result<File> {
        let file = std::fs::File::options().read(true).write(true).custom_flags(flags).open(&self.path)?;
        Ok(File::new(file.into(), true, flags & O_DIRECT != 0, "test".into()).unwrap())
    }

    fn buffered(&self) -> File {
        self.open(0).unwrap()
    }

    /// None where the file system does not know O_DIRECT.
    fn direct(&self) -> Option<File> {
        match self.open(O_DIRECT) {
            Ok(file) => Some(file),
            Err(error) => {
                eprintln!("SKIPPED: O_DIRECT on {}: {error}", self.path.display());
                None
            }
        }
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        std::fs::remove_file(&self.path).unwrap();
    }
}

fn slice(bytes: &[u8]) -> Slice {
    // SAFETY: the tests keep the bytes until the call has ended, and pass those of shared borrows to
    // writes only.
    unsafe { Slice::new(bytes.as_ptr().cast_mut(), bytes.len()) }
}

fn read(file: &File, offset: u64, len: usize) -> Result<Vec<u8>, i32> {
    let mut bytes = vec![0xaa; len];
    // SAFETY: `bytes` outlives the call.
    file.read(offset, unsafe { Slice::new(bytes.as_mut_ptr(), len) }).map(|()| bytes)
}

fn random(seed: &mut u64) -> u64 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    *seed
}

#[derive(Debug, Clone)]
enum Act {
    Write { byte: u8, durable: bool },
    Read,
    Punch,
    Zero { unmap: bool },
    Sync,
}

fn acts(size: u64) -> impl Strategy<Value = Vec<(Act, u64, u64)>> {
    let act = prop_oneof![
        4 => (any::<u8>(), prop::bool::weighted(0.1)).prop_map(|(byte, durable)| Act::Write { byte, durable }),
        3 => Just(Act::Read),
        1 => Just(Act::Punch),
        2 => any::<bool>().prop_map(|unmap| Act::Zero { unmap }),
        1 => Just(Act::Sync),
    ];
    let offset = prop_oneof![0..size, (0..size / 512).prop_map(|sector| sector * 512)];
    let len = prop_oneof![1..2000u64, (1..40u64).prop_map(|sectors| sectors * 512), 1..size];
    prop::collection::vec((act, offset, len), 1..25)
}

fn agrees(file: &File, handle: &std::fs::File, size: u64, acts: Vec<(Act, u64, u64)>) -> Result<(), TestCaseError> {
    let mut model = vec![0u8; size as usize];
    for (act, offset, len) in acts {
        let len = len.min(size - offset);
        let range = offset as usize..(offset + len) as usize;
        match act {
            Act::Write { byte, durable } => {
                let bytes: Vec<u8> = (0..len).map(|i| byte.wrapping_add(i as u8) | 1).collect();
                file.write(offset, slice(&bytes), durable).unwrap();
                model[range].copy_from_slice(&bytes);
            }
            Act::Read => prop_assert_eq!(&read(file, offset, range.len()).unwrap(), &model[range]),
            Act::Punch => {
                file.punch(offset, len).unwrap();
                model[range].fill(0);
            }
            Act::Zero { unmap } => {
                file.zero(offset, len, unmap, false).unwrap();
                model[range].fill(0);
            }
            Act::Sync => file.sync().unwrap(),
        }
        prop_assert_eq!(handle.metadata().unwrap().len(), size, "the file's length changed");
    }
    prop_assert_eq!(&read(file, 0, size as usize).unwrap(), &model);
    // Stretches cover the file, and holes are zeros.
    let mut at = 0;
    for Stretch { len, hole } in file.stretches(0, size, usize::MAX).unwrap() {
        prop_assert!(len > 0 && at + len <= size);
        prop_assert!(!hole || model[at as usize..(at + len) as usize].iter().all(|&byte| byte == 0));
        at += len;
    }
    prop_assert_eq!(at, size);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn a_buffered_file_is_a_vector_of_bytes(acts in acts(100_001)) {
        let temporary = Temporary::new(100_001);
        agrees(&temporary.buffered(), &temporary.handle, 100_001, acts)?;
    }

    /// The length is no multiple of any block: the last one is the hard one.
    #[test]
    fn a_direct_file_takes_any_alignment(acts in acts(100_001)) {
        let temporary = Temporary::new(100_001);
        if let Some(file) = temporary.direct() {
            agrees(&file, &temporary.handle, 100_001, acts)?;
        }
    }

    #[test]
    fn what_is_done_at_once_and_what_is_left_make_the_whole(
        writes in prop::collection::vec((0u64..60_000, 1usize..5000, any::<u8>()), 1..20),
        sparse in any::<bool>(),
    ) {
        let temporary = Temporary::new(65_536);
        if !sparse {
            std::os::unix::fs::FileExt::write_all_at(&temporary.handle, &[0; 65_536], 0).unwrap();
        }
        let (file, mut model) = (temporary.buffered(), vec![0u8; 65_536]);
        for (offset, len, byte) in writes {
            let bytes = vec![byte; len];
            match file.write_now(offset, slice(&bytes)) {
                Inline::Done => {}
                Inline::Wait(done) => file.write(offset + done as u64, slice(&bytes[done..]), false).unwrap(),
                Inline::Failed(errno) => panic!("write at {offset}: {errno}"),
            }
            model[offset as usize..offset as usize + len].copy_from_slice(&bytes);
            let mut back = vec![0xaa; len];
            // SAFETY: `back` outlives the calls.
            let memory = unsafe { Slice::new(back.as_mut_ptr(), len) };
            match file.read_now(offset, memory) {
                Inline::Done => {}
                Inline::Wait(done) => file.read(offset + done as u64, memory.part(done, len - done)).unwrap(),
                Inline::Failed(errno) => panic!("read at {offset}: {errno}"),
            }
            prop_assert_eq!(back, bytes);
        }
        prop_assert_eq!(read(&file, 0, 65_536).unwrap(), model);
    }
}

/// Threads own interleaved pieces of the same blocks, and meet in every one of them.
#[test]
fn unaligned_writers_of_one_direct_block_lose_nothing() {
    const PIECE: usize = 100;
    const THREADS: usize = 4;
    const PIECES: usize = 200;
    const SIZE: u64 = (PIECE * THREADS * PIECES) as u64;
    let temporary = Temporary::new(SIZE);
    let Some(file) = temporary.direct() else { return };
    let ready = Barrier::new(THREADS);
    std::thread::scope(|scope| {
        for mine in 0..THREADS {
            let (file, ready) = (&file, &ready);
            scope.spawn(move || {
                let (mut seed, mut model) = (mine as u64 + 1, vec![[0u8; PIECE]; PIECES]);
                ready.wait();
                for _ in 0..300 {
                    let piece = random(&mut seed) as usize % PIECES;
                    let offset = ((piece * THREADS + mine) * PIECE) as u64;
                    model[piece] = [random(&mut seed) as u8; PIECE];
                    file.write(offset, slice(&model[piece]), false).unwrap();
                }
                for (piece, bytes) in model.iter().enumerate() {
                    let offset = ((piece * THREADS + mine) * PIECE) as u64;
                    assert_eq!(read(file, offset, PIECE).unwrap(), bytes);
                }
            });
        }
    });
    assert_eq!(file.size(), Ok(SIZE));
}

/// Aligned appends beyond a ragged end, and unaligned writes inside the last block: the latter cut
/// the file back to its length, but never what the former appended.
#[test]
fn a_write_in_the_last_block_does_not_cut_what_others_append() {
    for round in 0..100u8 {
        let temporary = Temporary::new(1000);
        let Some(file) = temporary.direct() else { return };
        let block = file.offset_alignment().max(file.memory_alignment()).max(1000_u64.next_power_of_two());
        let ready = Barrier::new(2);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                ready.wait();
                for at in [900u64, 990, 3, 700] {
                    file.write(at, slice(&[round | 1; 10]), false).unwrap();
                }
            });
            let mut buffer = Buffer::new(block as usize);
            buffer.bytes_mut().fill(7);
            ready.wait();
            // SAFETY: the buffer outlives the call.
            file.write(4 * block, unsafe { buffer.slice() }, false).unwrap();
        });
        assert_eq!(file.size(), Ok(5 * block));
        assert_eq!(read(&file, 4 * block, block as usize).unwrap(), vec![7; block as usize]);
        assert_eq!(read(&file, 990, 10).unwrap(), [round | 1; 10]);
    }
}

#[test]
fn a_write_across_the_end_of_a_direct_file_keeps_all_its_bytes() {
    let temporary = Temporary::new(1000);
    let Some(file) = temporary.direct() else { return };
    file.write(900, slice(&[5; 300]), false).unwrap();
    assert_eq!(file.size(), Ok(1200));
    assert_eq!(read(&file, 899, 301).unwrap(), [&[0][..], &[5; 300]].concat());
}

#[test]
fn a_file_truncated_underneath_is_an_error_not_zeros() {
    for flags in [0, O_DIRECT] {
        let temporary = Temporary::new(64 << 10);
        let file = match flags {
            0 => Some(temporary.buffered()),
            _ => temporary.direct(),
        };
        let Some(file) = file else { continue };
        file.write(0, slice(&vec![3; 64 << 10]), false).unwrap();
        temporary.handle.set_len(10_000).unwrap();
        assert_eq!(read(&file, 9000, 1000), Ok(vec![3; 1000]), "what is left can be read");
        for (offset, len) in [(9000, 1001), (10_000, 1), (8192, 4096), (0, 65_536), (32_768, 4096)] {
            assert_eq!(read(&file, offset, len), Err(EIO), "{len} bytes at {offset}");
            let mut bytes = vec![0; len];
            // SAFETY: `bytes` outlives the call.
            let now = file.read_now(offset, unsafe { Slice::new(bytes.as_mut_ptr(), len) });
            assert!(matches!(now, Inline::Failed(EIO) | Inline::Wait(_)), "{now:?} for {len} bytes at {offset}");
        }
    }
}

#[test]
fn stretches_tell_data_from_holes() {
    const BLOCK: u64 = 64 << 10; // holes are no smaller than a file system's block
    let temporary = Temporary::new(10 * BLOCK);
    let file = temporary.buffered();
    let fresh = Stretch { len: 10 * BLOCK, hole: true };
    if file.stretches(0, 10 * BLOCK, 9) != Ok(vec![fresh]) {
        eprintln!("SKIPPED: the file system under {} does not tell holes", temporary.path.display());
        return;
    }
    assert!(file.may_have_holes());
    file.write(2 * BLOCK, slice(&vec![1; BLOCK as usize]), false).unwrap();
    file.write(5 * BLOCK, slice(&vec![1; 2 * BLOCK as usize]), false).unwrap();
    let stretch = |blocks, hole| Stretch { len: blocks * BLOCK, hole };
    let all = [stretch(2, true), stretch(1, false), stretch(2, true), stretch(2, false), stretch(3, true)];
    assert_eq!(file.stretches(0, 10 * BLOCK, 9).unwrap(), all);
    assert_eq!(file.stretches(0, 10 * BLOCK, 2).unwrap(), all[..2]);
    assert_eq!(file.stretches(2 * BLOCK, 3 * BLOCK, 9).unwrap(), all[1..3]);
    let inside = [Stretch { len: 1, hole: true }, Stretch { len: 2, hole: false }];
    assert_eq!(file.stretches(2 * BLOCK - 1, 3, 9).unwrap(), inside);
    file.punch(5 * BLOCK, BLOCK).unwrap();
    let punched = [stretch(1, true), stretch(1, false)];
    assert_eq!(file.stretches(5 * BLOCK, 2 * BLOCK, 9).unwrap(), punched);
}

#[test]
fn zeroing_keeps_blocks_unless_it_may_not() {
    use std::os::unix::fs::MetadataExt;
    const SIZE: u64 = 1 << 20;
    let temporary = Temporary::new(SIZE);
    let file = temporary.buffered();
    let blocks = || temporary.handle.metadata().unwrap().blocks() * 512;
    file.write(0, slice(&vec![1; SIZE as usize]), true).unwrap();
    file.zero(0, SIZE, false, false).unwrap();
    assert_eq!(read(&file, 0, SIZE as usize).unwrap(), vec![0; SIZE as usize]);
    assert!(blocks() >= SIZE, "blocks were given back");
    file.write(0, slice(&vec![1; SIZE as usize]), true).unwrap();
    match file.zero(0, SIZE, true, true) {
        Ok(()) => assert!(blocks() < SIZE, "blocks were kept"),
        other => assert_eq!(other, Err(EOPNOTSUPP), "fast means not by writing"),
    }
}

#[test]
fn zeros_are_written_where_a_file_system_has_no_other_way() {
    const SIZE: usize = 4 << 20;
    let directory = PathBuf::from("/dev/shm"); // tmpfs has no ZERO_RANGE
    if !directory.is_dir() {
        eprintln!("SKIPPED: no /dev/shm");
        return;
    }
    let temporary = Temporary::within(directory, SIZE as u64);
    let file = temporary.buffered();
    let mut expected = vec![7; SIZE];
    file.write(0, slice(&expected), false).unwrap();
    for (offset, len) in [(0, 512), (1000, 3), (4095, 2), (5000, 3 << 20), (SIZE - 700, 700)] {
        file.zero(offset as u64, len as u64, false, false).unwrap();
        expected[offset..offset + len].fill(0);
    }
    assert!(read(&file, 0, SIZE).unwrap() == expected);
}

#[test]
fn files_in_memory_never_wait() {
    let directory = PathBuf::from("/dev/shm");
    if rustix::fs::statfs(&directory).map_or(true, |found| found.f_type != 0x0102_1994) {
        eprintln!("SKIPPED: /dev/shm is no tmpfs");
        return;
    }
    let temporary = Temporary::within(directory, 1 << 20);
    let file = temporary.buffered();
    assert_eq!(file.policy(), InlinePolicy::Always);
    assert!(!file.needs_sync());
    assert_eq!(file.write_now(1000, slice(&[4; 5000])), Inline::Done);
    let mut back = [0; 5002];
    // SAFETY: `back` outlives the call.
    assert_eq!(file.read_now(999, unsafe { Slice::new(back.as_mut_ptr(), 5002) }), Inline::Done);
    assert_eq!(back.to_vec(), [&[0][..], &[4; 5000], &[0]].concat());
    temporary.handle.set_len(2000).unwrap();
    // SAFETY: as above.
    assert_eq!(file.read_now(1999, unsafe { Slice::new(back.as_mut_ptr(), 2) }), Inline::Failed(EIO));
}

#[test]
fn only_files_and_block_devices_are_files() {
    for path in ["/dev/null", "/"] {
        let fd = std::fs::File::open(path).unwrap();
        assert!(matches!(File::new(fd.into(), false, false, path.into()), Err(FileError::NotAFile)), "{path}");
    }
}

#[test]
fn a_failed_sync_fails_all_that_follow_with_its_errno() {
    let temporary = Temporary::new(4096);
    let file = temporary.buffered();
    file.sync().unwrap();
    file.write(0, slice(&[1; 512]), true).unwrap();
    file.fail_syncs(EIO);
    file.fail_syncs(EOPNOTSUPP);
    assert!(file.has_unreported_failure());
    file.set_failure_reported();
    assert!(!file.has_unreported_failure());
    assert_eq!(file.sync(), Err(EIO));
    assert_eq!(file.write(0, slice(&[2; 512]), true), Err(EIO));
    file.write(512, slice(&[3; 512]), false).unwrap();
    assert_eq!(read(&file, 0, 1024).unwrap(), [[1; 512], [3; 512]].concat());
}

#[test]
fn a_sync_counts_only_when_those_beside_it_have_ended() {
    let temporary = Temporary::new(4096);
    for _ in 0..100 {
        let file = temporary.buffered();
        let beside = Syncing::new(&file);
        std::thread::scope(|scope| {
            let syncing = scope.spawn(|| file.sync());
            std::thread::yield_now();
            file.fail_syncs(EIO); // which the kernel told the other one alone
            drop(beside);
            assert_eq!(syncing.join().unwrap(), Err(EIO));
        });
    }
}
