//! `Record`: owner, mode and open count of a FUSE file, in a memfd that outlives the serving process.
//!
//! A file whose owner has made it private must stay private when another process serves it. Any thread may use it.

use std::os::fd::OwnedFd;

use rustix::io::{Errno, pread, pwrite, retry_on_intr};

use super::file::Owner;

/// The first bytes of a record.
const MAGIC: [u8; 4] = *b"own1";
const SIZE: usize = 16;
/// Offset of the open count, after the owner.
const USERS_AT: u64 = SIZE as u64;

/// The memfd, which is empty at first.
pub struct Record(OwnedFd);

#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error("reading the record of a FUSE file: {0}")]
    Read(#[from] Errno),
    #[error("{0:02x?} are no record of a FUSE file's owner")]
    Unknown(Vec<u8>),
}

impl Record {
    pub fn new(fd: OwnedFd) -> Record {
        Record(fd)
    }

    /// Loads the owner. None: none was stored.
    pub(super) fn load(&self) -> Result<Option<Owner>, RecordError> {
        let mut bytes = [0; SIZE];
        match retry_on_intr(|| pread(&self.0, &mut bytes, 0))? {
            0 => Ok(None),
            SIZE if bytes == [0; SIZE] => Ok(None),
            SIZE => parse(bytes).map(Some).ok_or_else(|| RecordError::Unknown(bytes.to_vec())),
            length => Err(RecordError::Unknown(bytes[..length].to_vec())),
        }
    }

    /// Loads the open count. 0: none was stored.
    pub(super) fn load_users(&self) -> Result<u64, Errno> {
        let mut bytes = [0; 8];
        let length = retry_on_intr(|| pread(&self.0, &mut bytes, USERS_AT))?;
        Ok(if length == bytes.len() { u64::from_ne_bytes(bytes) } else { 0 })
    }

    pub(super) fn store_users(&self, users: u64) -> Result<(), Errno> {
        retry_on_intr(|| pwrite(&self.0, &users.to_ne_bytes(), USERS_AT)).map(drop)
    }

    /// Stores the owner by one write: if this process dies meanwhile, all of it is stored or nothing.
    pub(super) fn store(&self, owner: Owner) -> Result<(), Errno> {
        match retry_on_intr(|| pwrite(&self.0, &bytes(owner), 0))? {
            SIZE => Ok(()),
            _ => Err(Errno::IO),
        }
    }
}

fn bytes(Owner { user, group, mode }: Owner) -> [u8; SIZE] {
    let words = [MAGIC, mode.to_ne_bytes(), user.to_ne_bytes(), group.to_ne_bytes()];
    std::array::from_fn(|at| words[at / 4][at % 4])
}

fn parse(bytes: [u8; SIZE]) -> Option<Owner> {
    let word = |at: usize| [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]];
    let owner = Owner {
        mode: u32::from_ne_bytes(word(4)),
        user: u32::from_ne_bytes(word(8)),
        group: u32::from_ne_bytes(word(12)),
    };
    (word(0) == MAGIC && owner.mode & !0o777 == 0).then_some(owner)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_stored_is_parsed(user: u32, group: u32, mode in 0u32..0o1000) {
            let owner = Owner { user, group, mode };
            prop_assert_eq!(parse(bytes(owner)), Some(owner));
        }

        #[test]
        fn other_bytes_are_no_record(other: [u8; SIZE]) {
            prop_assume!(other[..4] != MAGIC);
            prop_assert_eq!(parse(other), None);
        }
    }
}
