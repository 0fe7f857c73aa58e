//! `without_admin`: runs code on this thread without CAP_SYS_ADMIN.
//!
//! The driver reads the partition table of a block device when that is started, unless a queue was passed to it by a
//! thread without that capability. It does so with a lock of the device: if the server dies meanwhile, the read waits for
//! the next server, which waits for that lock. Neither process ever ends then. Source: Linux drivers/block/ublk_drv.c
//! before 7.0 (`ublk_mark_io_ready`, `ublk_ctrl_start_dev`).

use std::io;

use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

/// Runs `work`, and gives the thread its capability back.
pub fn without_admin(work: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    let all = capabilities(None)?;
    let mut fewer = all;
    fewer.effective.remove(CapabilitySet::SYS_ADMIN);
    set_capabilities(None, fewer)?;
    let done = work();
    set_capabilities(None, all)?;
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    fn effective() -> CapabilitySet {
        capabilities(None).expect("capget").effective
    }

    #[test]
    fn only_the_work_lacks_the_capability() {
        let before = effective();
        without_admin(|| {
            assert_eq!(effective(), before - CapabilitySet::SYS_ADMIN);
            Ok(())
        })
        .expect("capset");
        assert_eq!(effective(), before);
    }

    #[test]
    fn an_error_of_the_work_is_returned_after_that() {
        let before = effective();
        assert!(without_admin(|| Err(io::ErrorKind::Other.into())).is_err());
        assert_eq!(effective(), before);
    }
}
