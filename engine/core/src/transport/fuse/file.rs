//! `FuseFile`: state of a mounted FUSE file that all descriptors of its connection share (attributes, open count). Any
//! thread may use it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use blkloom_fuse_wire::reply::{Attributes, FileSystem};
use blkloom_fuse_wire::{Errno, Negotiated, SetAttributes, SetTime, capability};

use super::record::{Record, RecordError};
use crate::device::Export;
use crate::lock;

/// The reported allocated size is the file's size minus these bytes: programs that copy files look for holes only if
/// the file has fewer blocks than its size needs, and skip a file without blocks.
pub const SPARSE: u64 = 512;
/// Preferred I/O size in bytes.
const BLOCK: u32 = 4096;

/// Owner, group and mode of the file. mode: permission bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Owner {
    pub user: u32,
    pub group: u32,
    pub mode: u32,
}

struct State {
    owner: Owner,
    users: u64,
    access_time: Duration,
    modification_time: Duration,
    change_time: Duration,
}

pub struct FuseFile {
    pub export: Arc<Export>,
    pub negotiated: Negotiated,
    state: Mutex<State>,
    record: Option<Record>,
    /// A write has occurred that the modification time does not include yet.
    written: AtomicBool,
}

/// The current time, since 1970.
fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

impl FuseFile {
    /// record: an owner stored there replaces `owner`. The file's times start at the current time: after a change of
    /// servers the file looks modified even if it is not.
    pub fn new(
        export: Arc<Export>,
        negotiated: Negotiated,
        owner: Owner,
        record: Option<Record>,
    ) -> Result<Arc<FuseFile>, RecordError> {
        let recorded = record.as_ref().map(Record::load).transpose()?.flatten();
        let (now, owner) = (now(), recorded.unwrap_or(owner));
        let users = record.as_ref().map(Record::load_users).transpose()?.unwrap_or_default();
        let state = State { owner, users, access_time: now, modification_time: now, change_time: now };
        Ok(Arc::new(FuseFile { export, negotiated, state: Mutex::new(state), record, written: AtomicBool::new(false) }))
    }

    /// The current owner and mode, including changes by chown(2) and chmod(2).
    pub fn owner(&self) -> Owner {
        lock(&self.state).owner
    }

    /// Number of open file descriptions of the file. It may be wrong after a server was killed: only umount(2) tells
    /// whether the file is in use.
    pub fn users(&self) -> u64 {
        lock(&self.state).users
    }

    pub(super) fn count_user(&self, came: bool) -> u64 {
        let mut state = lock(&self.state);
        state.users = if came { state.users + 1 } else { state.users.saturating_sub(1) };
        // If the count is not stored, the next server's count is wrong: see `users`.
        let _ = self.record.iter().try_for_each(|record| record.store_users(state.users));
        state.users
    }

    /// Current size in bytes.
    pub fn size(&self) -> u64 {
        self.export.device.size()
    }

    /// Whether the kernel supports RESEND: it sends requests again that were read and not answered.
    pub fn is_resent(&self) -> bool {
        self.negotiated.has(capability::HAS_RESEND)
    }

    pub(super) fn note_written(&self) {
        // Load first: the cache line stays shared between the loops that write.
        if !self.written.load(Ordering::Relaxed) {
            self.written.store(true, Ordering::Relaxed);
        }
    }

    pub(super) fn attributes(&self) -> Attributes {
        let size = self.size();
        let mut state = lock(&self.state);
        if self.written.swap(false, Ordering::Relaxed) {
            state.modification_time = now();
            state.change_time = state.modification_time;
        }
        Attributes {
            size,
            allocated: size.saturating_sub(SPARSE).max(size.min(1)),
            mode: state.owner.mode,
            user: state.owner.user,
            group: state.owner.group,
            access_time: state.access_time,
            modification_time: state.modification_time,
            change_time: state.change_time,
            block_size: BLOCK,
        }
    }

    /// Sets owner, mode and times. Setting a size fails: it is the device's, and a program that truncates a file
    /// expects zeros after that.
    pub(super) fn set_attributes(&self, set: &SetAttributes) -> Result<(), Errno> {
        if set.size.is_some_and(|size| size != self.size()) {
            return Err(Errno::PERM);
        }
        let mut state = lock(&self.state);
        let state = &mut *state;
        let owner = Owner {
            user: set.user.unwrap_or(state.owner.user),
            group: set.group.unwrap_or(state.owner.group),
            mode: set.mode.map_or(state.owner.mode, |mode| mode & 0o777),
        };
        if owner != state.owner {
            self.record.iter().try_for_each(|record| record.store(owner)).map_err(|_| Errno::IO)?;
            state.owner = owner;
        }
        state.change_time = now();
        let set_time = |time: &mut Duration, set: Option<SetTime>| match set {
            Some(SetTime::Now) => *time = now(),
            Some(SetTime::To(to)) => *time = to,
            None => {}
        };
        set_time(&mut state.access_time, set.access_time);
        set_time(&mut state.modification_time, set.modification_time);
        set_time(&mut state.change_time, set.change_time);
        if set.modification_time.is_some() {
            self.written.store(false, Ordering::Relaxed);
        }
        Ok(())
    }

    pub(super) fn system(&self) -> FileSystem {
        FileSystem { block_size: BLOCK, blocks: self.size().div_ceil(u64::from(BLOCK)), free_blocks: 0 }
    }
}
