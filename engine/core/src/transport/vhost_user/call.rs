//! `Call`: the eventfd by which a driver learns of used buffers. The other program may replace it at any time.

use std::os::fd::OwnedFd;
use std::sync::Mutex;

use rustix::io::Errno;

use crate::lock;

#[derive(Default)]
pub struct Call(Mutex<Option<OwnedFd>>);

impl Call {
    /// Replaces the eventfd, which must be non-blocking. None: the driver polls. A driver that has been called by the
    /// former one may have missed that, so it is called again.
    pub fn replace(&self, event: Option<OwnedFd>) {
        *lock(&self.0) = event;
        self.raise();
    }

    pub(super) fn raise(&self) {
        if let Some(event) = &*lock(&self.0)
            && let Err(errno) = rustix::io::write(event, &1u64.to_ne_bytes())
            && errno != Errno::AGAIN
        {
            tracing::error!(%errno, "a driver could not be told of used buffers");
        }
    }
}
