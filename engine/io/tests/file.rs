//! `File`, compared with a vector of bytes: buffered and direct, whole and sparse, from one and from several threads.
//! Tests of direct I/O need a file system with O_DIRECT for the temporary directory (TMPDIR). Without it they print a
//! message and pass.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};

use blkloom_io::Errno;
use blkloom_io::{Buffer, File, FileError, FileExtent, Inline, InlinePolicy, Scratch, Slice, Source, Syncing};
use proptest::prelude::*;

const EIO: Errno = Errno::IO;
const EOPNOTSUPP: Errno = Errno::OPNOTSUPP;
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

    /// None: the file system does not support O_DIRECT.
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

fn source(bytes: &[u8]) -> Source<'_> {
    bytes.into()
}

fn read(file: &File, offset: u64, len: usize) -> Result<Vec<u8>, Errno> {
    let mut bytes = vec![0xaa; len];
    file.read(offset, (&mut bytes[..]).into(), &mut Scratch::default()).map(|()| bytes)
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
    let (mut model, mut scratch) = (vec![0u8; size as usize], Scratch::default());
    for (act, offset, len) in acts {
        let len = len.min(size - offset);
        let range = offset as usize..(offset + len) as usize;
        match act {
            Act::Write { byte, durable } => {
                let bytes: Vec<u8> = (0..len).map(|i| byte.wrapping_add(i as u8) | 1).collect();
                file.write(offset, source(&bytes), durable, &mut scratch).unwrap();
                model[range].copy_from_slice(&bytes);
            }
            Act::Read => prop_assert_eq!(&read(file, offset, range.len()).unwrap(), &model[range]),
            Act::Punch => {
                file.punch(offset, len).unwrap();
                model[range].fill(0);
            }
            Act::Zero { unmap } => {
                file.zero(offset, len, unmap, false, &mut scratch).unwrap();
                model[range].fill(0);
            }
            Act::Sync => file.sync().unwrap(),
        }
        prop_assert_eq!(handle.metadata().unwrap().len(), size, "the file's length changed");
    }
    prop_assert_eq!(&read(file, 0, size as usize).unwrap(), &model);
    // The extents cover the file, and holes are zeros.
    let mut at = 0;
    for FileExtent { len, hole } in file.extents(0, size, usize::MAX).unwrap() {
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
    fn nowait_io_and_the_rest_together_transfer_all_bytes(
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
            match file.write_now(offset, source(&bytes)) {
                Inline::Done => {}
                Inline::Wait(done) => file.write(offset + done as u64, source(&bytes[done..]), false, &mut Scratch::default()).unwrap(),
                Inline::Failed(errno) => panic!("write at {offset}: {errno}"),
            }
            model[offset as usize..offset as usize + len].copy_from_slice(&bytes);
            let mut back = vec![0xaa; len];
            let memory = Slice::from(&mut back[..]);
            match file.read_now(offset, memory) {
                Inline::Done => {}
                Inline::Wait(done) => file.read(offset + done as u64, memory.part(done, len - done), &mut Scratch::default()).unwrap(),
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
                    file.write(offset, source(&model[piece]), false, &mut Scratch::default()).unwrap();
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
fn a_write_in_the_last_block_keeps_concurrently_appended_bytes() {
    for round in 0..100u8 {
        let temporary = Temporary::new(1000);
        let Some(file) = temporary.direct() else { return };
        let block = file.offset_alignment().max(file.memory_alignment()).max(1000_u64.next_power_of_two());
        let ready = Barrier::new(2);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                ready.wait();
                for at in [900u64, 990, 3, 700] {
                    file.write(at, source(&[round | 1; 10]), false, &mut Scratch::default()).unwrap();
                }
            });
            let mut buffer = Buffer::new(block as usize);
            buffer.bytes_mut().fill(7);
            ready.wait();
            file.write(4 * block, source(buffer.bytes()), false, &mut Scratch::default()).unwrap();
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
    file.write(900, source(&[5; 300]), false, &mut Scratch::default()).unwrap();
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
        file.write(0, source(&vec![3; 64 << 10]), false, &mut Scratch::default()).unwrap();
        temporary.handle.set_len(10_000).unwrap();
        assert_eq!(read(&file, 9000, 1000), Ok(vec![3; 1000]), "what is left can be read");
        for (offset, len) in [(9000, 1001), (10_000, 1), (8192, 4096), (0, 65_536), (32_768, 4096)] {
            assert_eq!(read(&file, offset, len), Err(EIO), "{len} bytes at {offset}");
            let mut bytes = vec![0; len];
            let now = file.read_now(offset, (&mut bytes[..]).into());
            assert!(matches!(now, Inline::Failed(EIO) | Inline::Wait(_)), "{now:?} for {len} bytes at {offset}");
        }
    }
}

#[test]
fn extents_tell_data_from_holes() {
    const BLOCK: u64 = 64 << 10; // holes are no smaller than a file system's block
    let temporary = Temporary::new(10 * BLOCK);
    let file = temporary.buffered();
    let fresh = FileExtent { len: 10 * BLOCK, hole: true };
    if file.extents(0, 10 * BLOCK, 9) != Ok(vec![fresh]) {
        eprintln!("SKIPPED: the file system under {} does not tell holes", temporary.path.display());
        return;
    }
    assert!(file.may_have_holes());
    file.write(2 * BLOCK, source(&vec![1; BLOCK as usize]), false, &mut Scratch::default()).unwrap();
    file.write(5 * BLOCK, source(&vec![1; 2 * BLOCK as usize]), false, &mut Scratch::default()).unwrap();
    let extent = |blocks, hole| FileExtent { len: blocks * BLOCK, hole };
    let all = [extent(2, true), extent(1, false), extent(2, true), extent(2, false), extent(3, true)];
    assert_eq!(file.extents(0, 10 * BLOCK, 9).unwrap(), all);
    assert_eq!(file.extents(0, 10 * BLOCK, 2).unwrap(), all[..2]);
    assert_eq!(file.extents(2 * BLOCK, 3 * BLOCK, 9).unwrap(), all[1..3]);
    let inside = [FileExtent { len: 1, hole: true }, FileExtent { len: 2, hole: false }];
    assert_eq!(file.extents(2 * BLOCK - 1, 3, 9).unwrap(), inside);
    file.punch(5 * BLOCK, BLOCK).unwrap();
    let punched = [extent(1, true), extent(1, false)];
    assert_eq!(file.extents(5 * BLOCK, 2 * BLOCK, 9).unwrap(), punched);
}

#[test]
fn zeroing_keeps_blocks_unless_unmap_is_set() {
    use std::os::unix::fs::MetadataExt;
    const SIZE: u64 = 1 << 20;
    let temporary = Temporary::new(SIZE);
    let file = temporary.buffered();
    let blocks = || temporary.handle.metadata().unwrap().blocks() * 512;
    file.write(0, source(&vec![1; SIZE as usize]), true, &mut Scratch::default()).unwrap();
    file.zero(0, SIZE, false, false, &mut Scratch::default()).unwrap();
    assert_eq!(read(&file, 0, SIZE as usize).unwrap(), vec![0; SIZE as usize]);
    assert!(blocks() >= SIZE, "blocks were given back");
    file.write(0, source(&vec![1; SIZE as usize]), true, &mut Scratch::default()).unwrap();
    match file.zero(0, SIZE, true, true, &mut Scratch::default()) {
        Ok(()) => assert!(blocks() < SIZE, "blocks were kept"),
        other => assert_eq!(other, Err(EOPNOTSUPP), "fast means not by writing"),
    }
}

#[test]
fn zeros_are_written_if_the_file_system_has_no_zero_range() {
    const SIZE: usize = 4 << 20;
    let directory = PathBuf::from("/dev/shm"); // tmpfs has no ZERO_RANGE
    if !directory.is_dir() {
        eprintln!("SKIPPED: no /dev/shm");
        return;
    }
    let temporary = Temporary::within(directory, SIZE as u64);
    for file in [Some(temporary.buffered()), temporary.direct()].into_iter().flatten() {
        let (mut expected, mut scratch) = (vec![7; SIZE], Scratch::default());
        file.write(0, source(&expected), false, &mut scratch).unwrap();
        for (offset, len) in [(0, 512), (1000, 3), (4095, 2), (5000, 3 << 20), (SIZE - 700, 700)] {
            file.zero(offset as u64, len as u64, false, false, &mut scratch).unwrap();
            expected[offset..offset + len].fill(0);
        }
        assert!(read(&file, 0, SIZE).unwrap() == expected, "direct: {}", file.direct());
    }
}

/// Such a transfer is moved in parts, each in the same memory.
#[test]
fn a_long_unaligned_transfer_is_whole() {
    const SIZE: usize = 1 << 20;
    let temporary = Temporary::new(SIZE as u64);
    let Some(file) = temporary.direct() else { return };
    let (mut model, mut scratch, mut seed) = (vec![0; SIZE], Scratch::present().unwrap(), 1);
    for (offset, len) in [(1, SIZE - 2), (511, 700_000), (4095, 131_073), (130_000, 300_001), (0, 131_071)] {
        let bytes: Vec<u8> = (0..len).map(|_| random(&mut seed) as u8).collect();
        file.write(offset as u64, source(&bytes), false, &mut scratch).unwrap();
        model[offset..offset + len].copy_from_slice(&bytes);
        let mut found = vec![0; SIZE - 3];
        file.read(2, (&mut found[..]).into(), &mut scratch).unwrap();
        assert!(found == model[2..SIZE - 1], "{offset}+{len}");
    }
    assert_eq!(file.size(), Ok(SIZE as u64));
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
    assert_eq!(file.write_now(1000, source(&[4; 5000])), Inline::Done);
    let mut back = [0; 5002];
    assert_eq!(file.read_now(999, (&mut back[..]).into()), Inline::Done);
    assert_eq!(back.to_vec(), [&[0][..], &[4; 5000], &[0]].concat());
    temporary.handle.set_len(2000).unwrap();
    assert_eq!(file.read_now(1999, (&mut back[..2]).into()), Inline::Failed(EIO));
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
    file.write(0, source(&[1; 512]), true, &mut Scratch::default()).unwrap();
    file.fail_syncs(EIO);
    file.fail_syncs(EOPNOTSUPP);
    assert!(file.has_unreported_failure());
    file.set_failure_reported();
    assert!(!file.has_unreported_failure());
    assert_eq!(file.sync(), Err(EIO));
    assert_eq!(file.write(0, source(&[2; 512]), true, &mut Scratch::default()), Err(EIO));
    file.write(512, source(&[3; 512]), false, &mut Scratch::default()).unwrap();
    assert_eq!(read(&file, 0, 1024).unwrap(), [[1; 512], [3; 512]].concat());
}

#[test]
fn a_sync_succeeds_only_after_concurrent_syncs_have_ended() {
    let temporary = Temporary::new(4096);
    for _ in 0..100 {
        let file = temporary.buffered();
        let beside = Syncing::new(&file);
        std::thread::scope(|scope| {
            let syncing = scope.spawn(|| file.sync());
            std::thread::yield_now();
            file.fail_syncs(EIO); // the kernel reported the error only to the other sync
            drop(beside);
            assert_eq!(syncing.join().unwrap(), Err(EIO));
        });
    }
}
